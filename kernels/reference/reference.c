/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The judge: the same contract as the other backends in plain C, dequantizing
 * a row at a time and accumulating in float64.  Holds the canonical form as it
 * came.  Slow on purpose; one thread.
 */
#include "backend-impl.h"
#include "half.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct reference_weights {
    struct fq_weights base;
    struct fq_matrix matrix; /* points into storage */
    uint8_t storage[];
};

static int reference_open(const struct fq_backend_options *options, struct fq_backend **out,
                          struct fq_error *err) {
    struct fq_backend *backend = calloc(1, sizeof *backend);

    (void)options;
    if (!backend)
        return fq_fail(err, FQ_NO_MEMORY, "no memory");
    backend->ops = &fq_reference_ops;
    *out = backend;
    return 0;
}

static void reference_close(struct fq_backend *backend) {
    free(backend);
}

static int reference_info(struct fq_backend *backend, struct fq_device_info *info,
                          struct fq_error *err) {
    (void)backend;
    (void)err;
    fq_host_processor_name(info->name, sizeof info->name);
    strcpy(info->kernels, "float64");
    info->threads = 1;
    fq_host_memory_info(&info->memory_total, &info->memory_free);
    return 0;
}

static uint64_t reference_weights_size(struct fq_backend *backend, const struct fq_matrix *matrix) {
    (void)backend;
    return (uint64_t)fq_matrix_bytes(matrix);
}

static int reference_weights_new(struct fq_backend *backend, const struct fq_matrix *matrix,
                                 struct fq_weights **out, struct fq_error *err) {
    size_t code_bytes = (size_t)(matrix->n * fq_matrix_row_bytes(matrix));
    size_t group_count = (size_t)(matrix->n * fq_matrix_groups(matrix));
    size_t bytes = (size_t)fq_matrix_bytes(matrix);
    struct reference_weights *weights = malloc(sizeof *weights + bytes);

    if (!weights)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for %zu bytes of weights", bytes);
    weights->base = (struct fq_weights){.backend = backend, .info = fq_matrix_info(matrix, bytes)};
    weights->matrix = *matrix;
    weights->matrix.codes = memcpy(weights->storage, matrix->codes, code_bytes);
    weights->matrix.scales = memcpy(weights->storage + code_bytes, matrix->scales, group_count * 2);
    if (matrix->zeros)
        weights->matrix.zeros =
            memcpy(weights->storage + code_bytes + group_count * 2, matrix->zeros, group_count);
    *out = &weights->base;
    return 0;
}

static void reference_weights_free(struct fq_weights *weights) {
    free(weights);
}

static double apply_activation(double v, enum fq_activation activation) {
    switch (activation) {
    case FQ_ACTIVATION_RELU:
        return v > 0 ? v : 0;
    case FQ_ACTIVATION_GELU:
        return 0.5 * v * (1 + erf(v * M_SQRT1_2));
    case FQ_ACTIVATION_GELU_TANH:
        return 0.5 * v * (1 + tanh(sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
    case FQ_ACTIVATION_SILU:
        return v / (1 + exp(-v));
    case FQ_ACTIVATION_NONE:
        break;
    }
    return v;
}

/* x · row + bias[n], in the order of k. */
static double product(const void *x, enum fq_dtype type, const double *row, int64_t k,
                      const void *bias, enum fq_dtype bias_type, int64_t n) {
    double sum = bias ? (double)fq_load(bias, bias_type, (size_t)n) : 0.0;

    for (int64_t i = 0; i < k; i++)
        sum += (double)fq_load(x, type, (size_t)i) * row[i];
    return sum;
}

static int reference_gemm(struct fq_stream *stream, const struct fq_gemm *gemm,
                          struct fq_error *err) {
    const struct fq_matrix *matrix = &((const struct reference_weights *)gemm->weights)->matrix;
    const struct fq_matrix *gate =
        gemm->gate ? &((const struct reference_weights *)gemm->gate)->matrix : NULL;
    const int64_t k = matrix->k;
    double *row = malloc((size_t)k * 2 * sizeof *row), *gate_row;

    (void)stream;
    if (!row)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for two rows of %lld weights", (long long)k);
    gate_row = row + k;
    for (int64_t n = 0; n < matrix->n; n++) {
        fq_matrix_dequantize_row(matrix, n, row);
        if (gate)
            fq_matrix_dequantize_row(gate, n, gate_row);
        for (int64_t m = 0; m < gemm->m; m++) {
            const void *x = fq_gemm_x_row(gemm, m), *residual = fq_gemm_residual_row(gemm, m);
            double sum = product(x, gemm->type, row, k, gemm->bias, gemm->bias_type, n);

            if (gate)
                sum *= apply_activation(
                    product(x, gemm->type, gate_row, k, gemm->gate_bias, gemm->bias_type, n),
                    gemm->activation);
            else
                sum = apply_activation(sum, gemm->activation);
            if (residual)
                sum += (double)fq_load(residual, gemm->type, (size_t)n);
            fq_store(fq_gemm_y_row(gemm, m), gemm->type, (size_t)n, (float)sum);
        }
    }
    free(row);
    return 0;
}

const struct fq_backend_ops fq_reference_ops = {
    .name = "reference",
    .f32_activations = true,
    .open = reference_open,
    .close = reference_close,
    .info = reference_info,
    .memory_new = fq_host_memory_new,
    .memory_import = fq_host_memory_import,
    .memory_export = fq_host_memory_export,
    .memory_free = fq_host_memory_free,
    .weights_size = reference_weights_size,
    .weights_new = reference_weights_new,
    .weights_free = reference_weights_free,
    .stream_new = fq_host_stream_new,
    .stream_free = fq_host_stream_free,
    .gemm = reference_gemm,
    .event_new = fq_host_event_new,
    .event_free = fq_host_event_free,
    .event_record = fq_host_event_record,
    .event_query = fq_host_event_query,
    .event_wait = fq_host_event_wait,
};
