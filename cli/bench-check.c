/* SPDX-License-Identifier: Apache-2.0 */
/* Results held to the reference backend, in fp32 with float64 sums; see bench-check.h. */
#include "bench-check.h"

#include "half.h"

#include <math.h>
#include <stdlib.h>

#define ROWS    4  /* of Y that are checked, evenly spread */
#define BLOCKS  4  /* of columns, likewise */
#define COLUMNS 16 /* of a block */

struct bench_check {
    struct bench_product_kind kind;
    struct fq_backend *reference;
    struct fq_stream *stream;
    struct fq_weights *weights[BLOCKS], *gates[BLOCKS]; /* their rows are columns of Y */
    int64_t first[BLOCKS];                              /* column of each */
    int64_t columns;                                    /* of a block */
    float *x;                                           /* a row */
    void *y;                                            /* a row as the GPU wrote it */
};

static int make_block(struct bench_check *check, int block, uint64_t seed, struct fq_weights **out,
                      struct fq_error *err) {
    struct fq_matrix *matrix;
    int status = fq_synthetic_new(&check->kind.shape, seed, check->first[block], check->columns,
                                  &matrix, err);

    if (status == 0)
        status = fq_weights_new(check->reference, matrix, out, err);
    fq_synthetic_free(matrix);
    return status;
}

int bench_check_new(const struct bench_product_kind *kind, struct bench_check **out,
                    struct fq_error *err) {
    struct bench_check *check = calloc(1, sizeof *check);
    int64_t n = kind->shape.n;
    int status = 0;

    *out = NULL;
    if (!check)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for a check");
    check->kind = *kind;
    check->columns = n < COLUMNS ? n : COLUMNS;
    check->x = malloc((size_t)kind->shape.k * sizeof *check->x);
    check->y = malloc((size_t)n * 2);
    if (!check->x || !check->y)
        status = fq_fail(err, FQ_NO_MEMORY, "no memory for a row of %lld inputs",
                         (long long)kind->shape.k);
    if (status == 0)
        status = fq_backend_new("reference", NULL, &check->reference, err);
    if (status == 0)
        status = fq_stream_new(check->reference, &check->stream, err);
    for (int i = 0; i < BLOCKS && status == 0; i++) {
        check->first[i] = i * (n - check->columns) / (BLOCKS - 1); /* the first and the last too */
        status = make_block(check, i, BENCH_SEED_WEIGHTS, &check->weights[i], err);
        if (status == 0 && kind->gate)
            status = make_block(check, i, BENCH_SEED_GATE, &check->gates[i], err);
    }
    if (status)
        bench_check_free(check);
    else
        *out = check;
    return status;
}

void bench_check_free(struct bench_check *check) {
    if (!check)
        return;
    for (int i = 0; i < BLOCKS; i++) {
        fq_weights_free(check->weights[i]);
        fq_weights_free(check->gates[i]);
    }
    fq_stream_free(check->stream);
    fq_backend_free(check->reference);
    free(check->x);
    free(check->y);
    free(check);
}

/* Columns of a block in row `row` of Y, computed again. */
static int compute(struct bench_check *check, int block, int64_t row, float *y,
                   struct fq_error *err) {
    const struct bench_product_kind *kind = &check->kind;
    float bias[2][COLUMNS], residual[COLUMNS];
    struct fq_gemm gemm = {.weights = check->weights[block],
                           .gate = check->gates[block],
                           .type = FQ_F32,
                           .m = 1,
                           .x = check->x,
                           .y = y,
                           .x_stride = kind->shape.k,
                           .y_stride = check->columns,
                           .residual_stride = check->columns,
                           .activation = kind->activation,
                           .bias_type = FQ_F32,
                           .host = true};

    for (int i = 0; i < check->columns; i++) {
        int64_t n = check->first[block] + i;

        for (int j = 0; j < 2; j++)
            bias[j][i] = fq_synthetic_value(BENCH_SEED_BIAS, j, n, FQ_F32);
        residual[i] = fq_synthetic_value(BENCH_SEED_RESIDUAL, row, n, kind->dtype);
    }
    if (kind->bias) {
        gemm.bias = bias[0];
        gemm.gate_bias = kind->gate ? bias[1] : NULL;
    }
    if (kind->residual)
        gemm.residual = residual;
    return fq_gemm(check->stream, &gemm, err);
}

int bench_check_error(struct bench_check *check, struct fq_memory *y, int64_t m, double *error,
                      struct fq_error *err) {
    const struct bench_product_kind *kind = &check->kind;
    uint64_t row_bytes = (uint64_t)kind->shape.n * 2;
    int64_t step = (m + ROWS - 1) / ROWS;
    double difference = 0, norm = 0;
    int status = 0;

    for (int64_t row = m - 1; row >= 0 && status == 0; row -= step) {
        for (int64_t k = 0; k < kind->shape.k; k++)
            check->x[k] = fq_synthetic_value(BENCH_SEED_X, row, k, kind->dtype);
        status = fq_memory_read(y, (uint64_t)row * row_bytes, check->y, row_bytes, err);
        for (int block = 0; block < BLOCKS && status == 0; block++) {
            float wanted[COLUMNS];

            status = compute(check, block, row, wanted, err);
            for (int i = 0; i < check->columns && status == 0; i++) {
                size_t n = (size_t)(check->first[block] + i);
                double off = (double)fq_load(check->y, (int)kind->dtype, n) - (double)wanted[i];

                difference += off * off;
                norm += (double)wanted[i] * (double)wanted[i];
            }
        }
    }
    *error = sqrt(difference / norm);
    return status;
}
