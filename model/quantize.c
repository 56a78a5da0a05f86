/* SPDX-License-Identifier: Apache-2.0 */
/* Rounding a whole matrix, row by row, and the error that any quantized matrix keeps. */
#include "quantize.h"

#include "half.h"
#include "quantize-row.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* What is to be made, where the parts of it lie, and what each row left. */
struct output {
    const struct fq_matrix *matrix;
    const struct fq_quantize_method *method;
    uint8_t *codes;  /* [n][row_bytes] */
    uint8_t *scales; /* [n][groups], fp16 */
    uint8_t *zeros;  /* [n][groups], or NULL */
    double *sums;    /* [n][2]: Σ(w − q·s)², Σw² */
};

static void pack(const struct fq_row *row, int bits, uint8_t *out) {
    size_t padded = (row->blocks + 1) / 2 * 2 * FQ_QUANTIZE_BLOCK, bytes;
    uint8_t last[32] = {0};
    size_t whole = (size_t)row->k / 32 * 32;

    if (bits == 8) {
        memcpy(out, row->codes, (size_t)row->k);
        memset(out + row->k, 0, ((size_t)row->k + 3) / 4 * 4 - (size_t)row->k);
        return;
    }
    void (*kernel)(const uint8_t *, size_t, uint8_t *) =
        bits == 4 ? row->kernels->pack4 : row->kernels->pack3;
    kernel(row->codes, whole, out);
    if (padded == whole)
        return;
    kernel(row->codes + whole, 32, last);
    bytes = ((size_t)row->k * (size_t)bits + 31) / 32 * 4 - whole * (size_t)bits / 8;
    memcpy(out + whole * (size_t)bits / 8, last, bytes);
}

/* Quantizes a loaded row into its place; false with *fault. */
static bool quantize_row(struct fq_row *row, int64_t n, void *context, struct fq_row_fault *fault) {
    const struct output *out = context;
    const struct fq_matrix *matrix = out->matrix;
    int64_t groups = fq_matrix_groups(matrix);
    double left = 0;

    for (int64_t g = 0; g < groups; g++) {
        int64_t column = g * matrix->group;
        int64_t count = matrix->k - column < matrix->group ? matrix->k - column : matrix->group;
        struct fq_fit fit;

        if (!fq_row_fit(row, column, count, matrix->bits, out->method, &fit, fault))
            return false;
        if (fit.scale != 0) {
            left += row->kernels->round(row->weights + column,
                                        ((size_t)count + FQ_QUANTIZE_BLOCK - 1) / FQ_QUANTIZE_BLOCK,
                                        fit.scale, fit.low, fit.high, row->codes + column);
        } else {
            left += fq_row_error(row, column, count, &fit);
            memset(row->codes + column, (int)-fit.low, (size_t)count);
        }
        memcpy(out->scales + (n * groups + g) * 2, &fit.stored, 2);
        if (out->zeros)
            out->zeros[n * groups + g] = (uint8_t)-fit.low;
    }
    for (size_t i = (size_t)row->k; i < row->blocks * FQ_QUANTIZE_BLOCK; i++)
        row->codes[i] = 0; /* the padding had the code of zero */
    pack(row, matrix->bits, out->codes + n * fq_matrix_row_bytes(matrix));
    out->sums[2 * n] = left;
    out->sums[2 * n + 1] = row->power;
    return true;
}

static int check(const struct fq_dense *dense, struct fq_matrix *matrix, struct fq_error *err) {
    matrix->n = dense->n;
    matrix->k = dense->k;
    if (matrix->group == 0 || matrix->group > dense->k)
        matrix->group = dense->k; /* one group a row, however it was asked for */
    matrix->scale_type = FQ_F16;
    matrix->codes = matrix->scales = NULL;
    matrix->zeros = NULL;
    if (fq_dtype_size((int)dense->type) == 0)
        return fq_fail(err, FQ_INVALID, "dtype %d, allowed are f32, f16 and bf16",
                       (int)dense->type);
    return fq_matrix_check(matrix, err);
}

/* In order, whatever the number of threads was. */
static double relative(const double *sums, int64_t n) {
    double difference = 0, norm = 0;

    for (int64_t row = 0; row < n; row++) {
        difference += sums[2 * row];
        norm += sums[2 * row + 1];
    }
    return norm == 0 ? 0 : sqrt(difference / norm);
}

int fq_quantize(const struct fq_dense *dense, const struct fq_quantize_method *method,
                struct fq_matrix *matrix, void **storage, double *error, struct fq_error *err) {
    struct output out = {.matrix = matrix, .method = method};
    int rc = check(dense, matrix, err);
    size_t code_bytes, count;

    if (rc < 0)
        return rc;
    code_bytes = (size_t)matrix->n * (size_t)fq_matrix_row_bytes(matrix);
    count = (size_t)matrix->n * (size_t)fq_matrix_groups(matrix);
    out.codes = malloc(code_bytes + count * (method->asymmetric ? 3 : 2));
    out.sums = malloc((size_t)matrix->n * 2 * sizeof *out.sums);
    if (!out.codes || !out.sums) {
        rc = fq_fail(err, FQ_NO_MEMORY, "no memory to quantize %lld by %lld weights",
                     (long long)matrix->n, (long long)matrix->k);
        goto out;
    }
    out.scales = out.codes + code_bytes;
    out.zeros = method->asymmetric ? out.scales + 2 * count : NULL;
    rc = fq_rows(dense, NULL, method->allow_nonfinite, quantize_row, &out, err);
    if (rc < 0)
        goto out;
    if (error)
        *error = relative(out.sums, matrix->n);
    matrix->codes = out.codes;
    matrix->scales = out.scales;
    matrix->zeros = out.zeros;
    *storage = out.codes;
    out.codes = NULL;
out:
    free(out.sums);
    free(out.codes);
    return rc;
}

static int thread_count(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

static int thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

double fq_quantize_error(const struct fq_dense *dense, const struct fq_matrix *matrix) {
    size_t n = (size_t)matrix->n, k = (size_t)matrix->k;
    double *sums = malloc((2 * n + k * (size_t)thread_count()) * sizeof *sums);
    double error;

    if (!sums)
        return NAN;
#pragma omp parallel for schedule(static)
    for (size_t row = 0; row < n; row++) {
        double *weights = sums + 2 * n + k * (size_t)thread_number();
        double row_difference = 0, row_norm = 0;

        fq_matrix_dequantize_row(matrix, (int64_t)row, weights);
        for (size_t i = 0; i < k; i++) {
            double w = (double)fq_load(dense->data, (int)dense->type, row * k + i);

            row_difference += (w - weights[i]) * (w - weights[i]);
            row_norm += w * w;
        }
        sums[2 * row] = row_difference;
        sums[2 * row + 1] = row_norm;
    }
    error = relative(sums, matrix->n);
    free(sums);
    return error;
}
