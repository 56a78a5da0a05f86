/* SPDX-License-Identifier: Apache-2.0 */
/* The canonical form: checks, element access and packing.  Pure functions, any thread. */
#include "matrix.h"

#include "half.h"

#include <string.h>

int64_t fq_matrix_bytes(const struct fq_matrix *matrix) {
    int64_t group_bytes = 2 + (matrix->zeros ? 1 : 0);

    return matrix->n * (fq_matrix_row_bytes(matrix) + fq_matrix_groups(matrix) * group_bytes);
}

int fq_matrix_check(const struct fq_matrix *matrix, struct fq_error *err) {
    if (matrix->n < 1 || matrix->n > FQ_MATRIX_DIM_MAX)
        return fq_fail(err, FQ_INVALID, "n is %lld, allowed are 1 to %lld", (long long)matrix->n,
                       (long long)FQ_MATRIX_DIM_MAX);
    if (matrix->k < 1 || matrix->k > FQ_MATRIX_DIM_MAX)
        return fq_fail(err, FQ_INVALID, "k is %lld, allowed are 1 to %lld", (long long)matrix->k,
                       (long long)FQ_MATRIX_DIM_MAX);
    if (matrix->bits != 8 && matrix->bits != 4 && matrix->bits != 3)
        return fq_fail(err, FQ_INVALID, "bits is %d, allowed are 8, 4 and 3", matrix->bits);
    if (matrix->group != matrix->k &&
        (matrix->group < FQ_GROUP_MIN || matrix->group % FQ_GROUP_MIN || matrix->group > matrix->k))
        return fq_fail(
            err, FQ_INVALID,
            "group size is %lld, allowed are multiples of %d below k, and k itself (%lld)",
            (long long)matrix->group, FQ_GROUP_MIN, (long long)matrix->k);
    if (matrix->scale_type != FQ_F16 && matrix->scale_type != FQ_BF16)
        return fq_fail(err, FQ_INVALID, "scale type is %d, allowed are f16 and bf16",
                       (int)matrix->scale_type);
    return 0;
}

static unsigned code_in_row(const uint8_t *row, int64_t column, int bits) {
    int64_t bit = column * bits;
    const uint8_t *at = row + bit / 8;
    unsigned pair = at[0];

    if (bit % 8 + bits > 8)
        pair |= (unsigned)at[1] << 8;
    return pair >> bit % 8 & ((1u << bits) - 1);
}

unsigned fq_matrix_code(const struct fq_matrix *matrix, int64_t row, int64_t column) {
    const uint8_t *codes = matrix->codes;

    return code_in_row(codes + row * fq_matrix_row_bytes(matrix), column, matrix->bits);
}

void fq_matrix_dequantize_row(const struct fq_matrix *matrix, int64_t row, double *out) {
    const uint8_t *codes = (const uint8_t *)matrix->codes + row * fq_matrix_row_bytes(matrix);
    int64_t groups = fq_matrix_groups(matrix);

    for (int64_t g = 0; g < groups; g++) {
        size_t at = (size_t)(row * groups + g);
        double scale = (double)fq_load(matrix->scales, matrix->scale_type, at);
        int zero = matrix->zeros ? matrix->zeros[at] : 1 << (matrix->bits - 1);
        int64_t end = (g + 1) * matrix->group < matrix->k ? (g + 1) * matrix->group : matrix->k;

        for (int64_t k = g * matrix->group; k < end; k++)
            out[k] = ((int)code_in_row(codes, k, matrix->bits) - zero) * scale;
    }
}

void fq_matrix_pack_row(uint8_t *packed, const uint8_t *codes, int64_t k, int bits) {
    memset(packed, 0, (size_t)((k * bits + 31) / 32 * 4));
    for (int64_t i = 0; i < k; i++) {
        int64_t bit = i * bits;
        unsigned spread = (unsigned)codes[i] << bit % 8;

        packed[bit / 8] |= (uint8_t)spread;
        if (bit % 8 + bits > 8)
            packed[bit / 8 + 1] |= (uint8_t)(spread >> 8);
    }
}
