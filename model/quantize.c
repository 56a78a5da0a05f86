/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rounding to nearest with one absmax scale a group, as quantize.h says.  The
 * rows are independent and are shared among OpenMP's threads; the result does
 * not depend on their number.
 */
#include "quantize.h"

#include "half.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* What can be wrong with a row, and where. */
struct fault {
    int64_t row, column; /* column is a weight's, or a group's first */
    enum {
        NO_FAULT,
        NOT_FINITE,
        SCALE_OVERFLOW
    } kind;
    float value;
};

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

static void load_row(const struct fq_dense *dense, int64_t row, float *out) {
    size_t first = (size_t)row * (size_t)dense->k;

    if (dense->type == FQ_F32) {
        memcpy(out, (const char *)dense->data + first * 4, (size_t)dense->k * 4);
        return;
    }
    for (int64_t k = 0; k < dense->k; k++)
        out[k] = fq_load(dense->data, (int)dense->type, first + (size_t)k);
}

/*
 * One group: returns its scale as fp16 bits and puts the codes.  The quotient is formed in
 * float64, where it lies on a tie only if the exact one does; ties go to even.
 */
static uint16_t quantize_group(const float *weights, int64_t count, float absmax, int bits,
                               uint8_t *codes) {
    const double low = -(double)(1 << (bits - 1)), high = (double)((1 << (bits - 1)) - 1);
    const double to_integer = 0x1.8p52; /* adding it rounds to an integer, to nearest even */
    uint16_t scale = fq_f32_to_f16((float)(2.0 * absmax / (double)((1 << bits) - 1)));
    double s = (double)fq_f16_to_f32(scale);

    if (s == 0) { /* all zero, or too small for fp16: then zero is the nearest */
        memset(codes, 1 << (bits - 1), (size_t)count);
        return scale;
    }
    for (int64_t i = 0; i < count; i++) {
        double q = ((double)weights[i] / s + to_integer) - to_integer;

        q = q < low ? low : q > high ? high : q;
        codes[i] = (uint8_t)((int)q + (1 << (bits - 1)));
    }
    return scale;
}

static void quantize_row(const struct fq_matrix *matrix, const float *weights, uint8_t *codes,
                         uint8_t *scales, struct fault *fault) {
    for (int64_t k = 0, group = 0; k < matrix->k; k += matrix->group, group++) {
        int64_t count = matrix->k - k < matrix->group ? matrix->k - k : matrix->group;
        float absmax = 0;
        uint16_t scale;

        for (int64_t i = 0; i < count; i++) {
            float magnitude = fabsf(weights[k + i]);

            if (!(magnitude <= FLT_MAX)) {
                *fault =
                    (struct fault){.column = k + i, .kind = NOT_FINITE, .value = weights[k + i]};
                return;
            }
            absmax = magnitude > absmax ? magnitude : absmax;
        }
        scale = quantize_group(weights + k, count, absmax, matrix->bits, codes + k);
        if ((scale & 0x7c00u) == 0x7c00u) {
            *fault = (struct fault){.column = k, .kind = SCALE_OVERFLOW, .value = absmax};
            return;
        }
        memcpy(scales + group * 2, &scale, 2);
    }
}

static int report(const struct fault *fault, struct fq_error *err) {
    if (fault->kind == NOT_FINITE)
        return fq_fail(err, FQ_INVALID,
                       "row %lld, column %lld is %s, only finite weights can be "
                       "quantized",
                       (long long)fault->row, (long long)fault->column,
                       isnan(fault->value) ? "NaN" : "infinite");
    return fq_fail(err, FQ_INVALID,
                   "row %lld, columns from %lld: the largest magnitude is %g, whose scale exceeds "
                   "fp16's 65504",
                   (long long)fault->row, (long long)fault->column, (double)fault->value);
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

int fq_quantize(const struct fq_dense *dense, struct fq_matrix *matrix, void **storage,
                struct fq_error *err) {
    struct fault first = {.row = INT64_MAX};
    size_t scratch_bytes = (size_t)dense->k * (sizeof(float) + 1);
    uint8_t *codes, *scales, *scratch;
    int64_t row_bytes, groups;
    int rc = check(dense, matrix, err);

    if (rc < 0)
        return rc;
    row_bytes = fq_matrix_row_bytes(matrix);
    groups = fq_matrix_groups(matrix);
    scratch_bytes = (scratch_bytes + 63) / 64 * 64;
    codes = malloc((size_t)matrix->n * (size_t)(row_bytes + 2 * groups));
    scratch = malloc(scratch_bytes * (size_t)thread_count());
    if (!codes || !scratch) {
        free(scratch);
        free(codes);
        return fq_fail(err, FQ_NO_MEMORY, "no memory to quantize %lld by %lld weights",
                       (long long)matrix->n, (long long)matrix->k);
    }
    scales = codes + matrix->n * row_bytes;
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < matrix->n; row++) {
        float *weights = (float *)(scratch + scratch_bytes * (size_t)thread_number());
        uint8_t *row_codes = (uint8_t *)(weights + matrix->k);
        struct fault fault = {.kind = NO_FAULT};

        load_row(dense, row, weights);
        quantize_row(matrix, weights, row_codes, scales + row * groups * 2, &fault);
        if (fault.kind == NO_FAULT) {
            fq_matrix_pack_row(codes + row * row_bytes, row_codes, matrix->k, matrix->bits);
            continue;
        }
        fault.row = row;
#pragma omp critical(fq_quantize_fault)
        if (row < first.row)
            first = fault;
    }
    free(scratch);
    if (first.kind != NO_FAULT) {
        free(codes);
        return report(&first, err);
    }
    matrix->codes = codes;
    matrix->scales = scales;
    *storage = codes;
    return 0;
}

double fq_quantize_error(const struct fq_dense *dense, const struct fq_matrix *matrix) {
    size_t n = (size_t)matrix->n, k = (size_t)matrix->k;
    double *sums = malloc((2 * n + k * (size_t)thread_count()) * sizeof *sums);
    double difference = 0, norm = 0;

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
    for (size_t row = 0; row < n; row++) { /* in order, whatever the number of threads */
        difference += sums[2 * row];
        norm += sums[2 * row + 1];
    }
    free(sums);
    return norm > 0 ? sqrt(difference / norm) : 0;
}
