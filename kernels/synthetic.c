/* SPDX-License-Identifier: Apache-2.0 */
/* Synthetic matrices on the host, for the backends that compute there and for checks. */
#include "synthetic.h"

#include "half.h"

#include <math.h>
#include <stdlib.h>

/* fp16 holds eight significant bits down to 2^-17, and the least scale is half of this. */
#define BASE_MIN 0x1p-15

float fq_synthetic_base(const struct fq_matrix *shape) {
    double half = (double)(1 << (shape->bits - 1));
    double codes = (half - 1) * (2 * half - 1) / 6; /* variance of the codes */
    double base = 1 / sqrt((double)shape->k * codes * 13 / 12);

    return (float)(base > BASE_MIN ? base : BASE_MIN);
}

static void make_row(const struct fq_matrix *shape, uint64_t seed, int64_t row, uint8_t *codes) {
    uint64_t hash = 0;

    for (int64_t k = 0; k < shape->k; k++) {
        int place = (int)(k % FQ_SYNTHETIC_BLOCK);

        if (place == 0)
            hash = fq_synthetic_hash(seed, FQ_SYNTHETIC_CODES, row, k / FQ_SYNTHETIC_BLOCK);
        codes[k] = (uint8_t)fq_synthetic_code(hash, place, shape->bits);
    }
}

int fq_synthetic_new(const struct fq_matrix *shape, uint64_t seed, int64_t row0, int64_t rows,
                     struct fq_matrix **out, struct fq_error *err) {
    int64_t row_bytes = fq_matrix_row_bytes(shape), groups = fq_matrix_groups(shape);
    size_t codes_bytes = (size_t)(rows * row_bytes), count = (size_t)(rows * groups);
    struct fq_matrix *matrix = malloc(sizeof *matrix + codes_bytes + count * 3);
    uint8_t *row = malloc((size_t)shape->k);
    float base = fq_synthetic_base(shape);

    *out = NULL;
    if (!matrix || !row) {
        free(matrix);
        free(row);
        return fq_fail(err, FQ_NO_MEMORY, "no memory for %lld rows of %lld synthetic weights",
                       (long long)rows, (long long)shape->k);
    }
    uint8_t *codes = (uint8_t *)(matrix + 1), *scales = codes + codes_bytes;
    uint8_t *zeros = scales + 2 * count;
    for (int64_t n = 0; n < rows; n++) {
        make_row(shape, seed, row0 + n, row);
        fq_matrix_pack_row(codes + n * row_bytes, row, shape->k, shape->bits);
        for (int64_t g = 0; g < groups; g++) {
            fq_store(scales, (int)shape->scale_type, (size_t)(n * groups + g),
                     fq_synthetic_scale(seed, row0 + n, g, base));
            zeros[n * groups + g] = fq_synthetic_zero(seed, row0 + n, g, shape->bits);
        }
    }
    free(row);
    *matrix = *shape;
    matrix->n = rows;
    matrix->codes = codes;
    matrix->scales = scales;
    matrix->zeros = shape->zeros ? zeros : NULL;
    *out = matrix;
    return 0;
}

void fq_synthetic_free(struct fq_matrix *matrix) {
    free(matrix);
}
