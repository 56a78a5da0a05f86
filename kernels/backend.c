/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The front of the kernels: the table of backends, and the checks that every
 * backend would otherwise repeat.  Holds no state of its own.
 */
#ifdef HAVE_CONFIG_H
#include <config.h>
#endif

#include "backend-impl.h"

#include <string.h>

/* Best first: "auto" takes the first that opens. */
static const struct fq_backend_ops *const backends[] = {
    &fq_cpu_ops,
    &fq_reference_ops,
};

#define BACKEND_COUNT (int)(sizeof backends / sizeof *backends)

const char *fq_backend_list(int i) {
    return i >= 0 && i < BACKEND_COUNT ? backends[i]->name : NULL;
}

static int open_best(const struct fq_backend_options *options, struct fq_backend **out,
                     struct fq_error *err) {
    int status = -FQ_UNAVAILABLE;

    for (int i = 0; i < BACKEND_COUNT; i++) {
        status = backends[i]->open(options, out, err);
        if (status != -FQ_UNAVAILABLE)
            break;
    }
    return status;
}

int fq_backend_new(const char *name, const struct fq_backend_options *options,
                   struct fq_backend **out, struct fq_error *err) {
    static const struct fq_backend_options defaults;

    *out = NULL;
    if (!options)
        options = &defaults;
    if (options->threads < 0 || options->threads > 4096)
        return fq_fail(err, FQ_INVALID, "threads is %d, allowed are 0 (all) to 4096",
                       options->threads);
    if (strcmp(name, "auto") == 0)
        return open_best(options, out, err);
    for (int i = 0; i < BACKEND_COUNT; i++)
        if (strcmp(backends[i]->name, name) == 0)
            return backends[i]->open(options, out, err);
    if (strcmp(name, "cuda") == 0)
        return fq_fail(err, FQ_UNSUPPORTED, "this build has no CUDA backend");
    return fq_fail(err, FQ_INVALID, "no backend '%s'; there are auto, cuda, cpu and reference",
                   name);
}

void fq_backend_free(struct fq_backend *backend) {
    if (backend)
        backend->ops->close(backend);
}

int fq_backend_info(struct fq_backend *backend, struct fq_device_info *info, struct fq_error *err) {
    memset(info, 0, sizeof *info);
    strncpy(info->backend, backend->ops->name, sizeof info->backend - 1);
    info->f32_activations = backend->ops->f32_activations;
    return backend->ops->info(backend, info, err);
}

/* ---- Memory ------------------------------------------------------------------------------ */

static int memory_check_bytes(uint64_t bytes, struct fq_error *err) {
    if (bytes == 0 || bytes > (uint64_t)1 << 46)
        return fq_fail(err, FQ_INVALID, "a region of %llu bytes; allowed are 1 to 2^46",
                       (unsigned long long)bytes);
    return 0;
}

int fq_memory_new(struct fq_backend *backend, enum fq_memory_kind kind, uint64_t bytes,
                  struct fq_memory **out, struct fq_error *err) {
    int status = memory_check_bytes(bytes, err);

    *out = NULL;
    return status ? status : backend->ops->memory_new(backend, kind, bytes, out, err);
}

int fq_memory_import(struct fq_backend *backend, const struct fq_memory_handle *handle,
                     struct fq_memory **out, struct fq_error *err) {
    int status = memory_check_bytes(handle->bytes, err);

    *out = NULL;
    return status ? status : backend->ops->memory_import(backend, handle, out, err);
}

int fq_memory_export(struct fq_memory *memory, struct fq_memory_handle *handle,
                     struct fq_error *err) {
    memset(handle, 0, sizeof *handle);
    handle->kind = memory->kind;
    handle->fd = -1;
    handle->bytes = memory->bytes;
    return memory->backend->ops->memory_export(memory, handle, err);
}

void fq_memory_free(struct fq_memory *memory) {
    if (memory)
        memory->backend->ops->memory_free(memory);
}

void *fq_memory_address(const struct fq_memory *memory) {
    return memory->address;
}

void *fq_memory_host(const struct fq_memory *memory) {
    return memory->host;
}

uint64_t fq_memory_bytes(const struct fq_memory *memory) {
    return memory->bytes;
}

enum fq_memory_kind fq_memory_kind(const struct fq_memory *memory) {
    return memory->kind;
}

static int memory_copy(struct fq_memory *memory, uint64_t offset, void *host, uint64_t bytes,
                       bool to_memory, struct fq_error *err) {
    if (offset > memory->bytes || bytes > memory->bytes - offset)
        return fq_fail(err, FQ_INVALID, "bytes %llu to %llu of a region of %llu",
                       (unsigned long long)offset, (unsigned long long)(offset + bytes),
                       (unsigned long long)memory->bytes);
    if (!memory->host)
        return memory->backend->ops->memory_copy(memory, offset, host, bytes, to_memory, err);
    if (to_memory)
        memcpy((char *)memory->host + offset, host, bytes);
    else
        memcpy(host, (char *)memory->host + offset, bytes);
    return 0;
}

int fq_memory_write(struct fq_memory *memory, uint64_t offset, const void *from, uint64_t bytes,
                    struct fq_error *err) {
    return memory_copy(memory, offset, (void *)(uintptr_t)from, bytes, true, err);
}

int fq_memory_read(struct fq_memory *memory, uint64_t offset, void *to, uint64_t bytes,
                   struct fq_error *err) {
    return memory_copy(memory, offset, to, bytes, false, err);
}

/* ---- Weights ----------------------------------------------------------------------------- */

uint64_t fq_weights_size(struct fq_backend *backend, const struct fq_matrix *matrix) {
    return backend->ops->weights_size(backend, matrix);
}

int fq_weights_new(struct fq_backend *backend, const struct fq_matrix *matrix,
                   struct fq_weights **out, struct fq_error *err) {
    int status = fq_matrix_check(matrix, err);

    *out = NULL;
    if (status == 0 && (!matrix->codes || !matrix->scales))
        status = fq_fail(err, FQ_INVALID, "the matrix has no codes or no scales");
    return status ? status : backend->ops->weights_new(backend, matrix, out, err);
}

void fq_weights_free(struct fq_weights *weights) {
    if (weights)
        weights->backend->ops->weights_free(weights);
}

void fq_weights_info(const struct fq_weights *weights, struct fq_weights_info *info) {
    *info = weights->info;
}

int fq_weights_export(struct fq_weights *weights, struct fq_weights_handle *handle,
                      struct fq_error *err) {
    const struct fq_backend_ops *ops = weights->backend->ops;

    memset(handle, 0, sizeof *handle);
    if (!ops->weights_export)
        return fq_fail(err, FQ_UNSUPPORTED, "the %s backend does not share weights", ops->name);
    handle->info = weights->info;
    return ops->weights_export(weights, handle, err);
}

int fq_weights_import(struct fq_backend *backend, const struct fq_weights_handle *handle,
                      struct fq_weights **out, struct fq_error *err) {
    *out = NULL;
    if (!backend->ops->weights_import)
        return fq_fail(err, FQ_UNSUPPORTED, "the %s backend does not share weights",
                       backend->ops->name);
    return backend->ops->weights_import(backend, handle, out, err);
}

/* ---- Streams and GEMM -------------------------------------------------------------------- */

int fq_stream_new(struct fq_backend *backend, struct fq_stream **out, struct fq_error *err) {
    *out = NULL;
    return backend->ops->stream_new(backend, out, err);
}

void fq_stream_free(struct fq_stream *stream) {
    if (stream)
        stream->backend->ops->stream_free(stream);
}

static bool misaligned(const void *address, size_t size) {
    return (uintptr_t)address % size != 0;
}

static int check_rows(const struct fq_gemm *gemm, size_t size, struct fq_error *err) {
    if (!gemm->x_rows != !gemm->y_rows)
        return fq_fail(err, FQ_INVALID, "row pointers for %s alone; both or neither are allowed",
                       gemm->x_rows ? "X" : "Y");
    if (gemm->m > FQ_DECODE_ROWS)
        return fq_fail(err, FQ_INVALID, "row pointers with m %lld, allowed are up to %d",
                       (long long)gemm->m, FQ_DECODE_ROWS);
    for (int64_t i = 0; i < gemm->m; i++)
        if (!gemm->x_rows[i] || !gemm->y_rows[i] || misaligned(gemm->x_rows[i], size) ||
            misaligned(gemm->y_rows[i], size))
            return fq_fail(err, FQ_INVALID, "row %lld: a pointer is NULL or not a multiple of %zu",
                           (long long)i, size);
    return 0;
}

static int check_planes(const struct fq_gemm *gemm, size_t size, struct fq_error *err) {
    const struct fq_weights_info *info = &gemm->weights->info;

    if (!gemm->x || !gemm->y || misaligned(gemm->x, size) || misaligned(gemm->y, size))
        return fq_fail(err, FQ_INVALID, "X or Y is NULL or not a multiple of %zu", size);
    if (gemm->x_stride < info->k || gemm->x_stride > (int64_t)1 << 40)
        return fq_fail(err, FQ_INVALID, "the stride of X is %lld, allowed are k (%lld) to 2^40",
                       (long long)gemm->x_stride, (long long)info->k);
    if (gemm->y_stride < info->n || gemm->y_stride > (int64_t)1 << 40)
        return fq_fail(err, FQ_INVALID, "the stride of Y is %lld, allowed are n (%lld) to 2^40",
                       (long long)gemm->y_stride, (long long)info->n);
    return 0;
}

static int check_gemm(struct fq_backend *backend, const struct fq_gemm *gemm,
                      struct fq_error *err) {
    size_t size = fq_dtype_size(gemm->type);

    if (!gemm->weights || gemm->weights->backend != backend)
        return fq_fail(err, FQ_INVALID, "the weights belong to another backend");
    if (size == 0)
        return fq_fail(err, FQ_INVALID, "dtype %d, allowed are f16, bf16 and f32", (int)gemm->type);
    if (gemm->type == FQ_F32 && !backend->ops->f32_activations)
        return fq_fail(err, FQ_UNSUPPORTED,
                       "f32 activations on the %s backend, which has f16 and bf16",
                       backend->ops->name);
    if (gemm->m < 1 || gemm->m > FQ_GEMM_ROWS_MAX)
        return fq_fail(err, FQ_INVALID, "m is %lld, allowed are 1 to %d", (long long)gemm->m,
                       FQ_GEMM_ROWS_MAX);
    if (!fq_activation_name(gemm->activation))
        return fq_fail(err, FQ_INVALID, "activation %d, allowed are 0 to %d", (int)gemm->activation,
                       FQ_ACTIVATION_COUNT - 1);
    if (gemm->bias && !fq_dtype_size(gemm->bias_type))
        return fq_fail(err, FQ_INVALID, "bias dtype %d, allowed are f16, bf16 and f32",
                       (int)gemm->bias_type);
    if (gemm->bias && misaligned(gemm->bias, fq_dtype_size(gemm->bias_type)))
        return fq_fail(err, FQ_INVALID, "the bias is not aligned to its %zu-byte elements",
                       fq_dtype_size(gemm->bias_type));
    if (gemm->x_rows || gemm->y_rows)
        return check_rows(gemm, size, err);
    return check_planes(gemm, size, err);
}

int fq_gemm(struct fq_stream *stream, const struct fq_gemm *gemm, struct fq_error *err) {
    int status = check_gemm(stream->backend, gemm, err);

    return status ? status : stream->backend->ops->gemm(stream, gemm, err);
}

int fq_event_new(struct fq_backend *backend, struct fq_event **out, struct fq_error *err) {
    *out = NULL;
    return backend->ops->event_new(backend, out, err);
}

void fq_event_free(struct fq_event *event) {
    if (event)
        event->backend->ops->event_free(event);
}

int fq_event_record(struct fq_event *event, struct fq_stream *stream, struct fq_error *err) {
    return event->backend->ops->event_record(event, stream, err);
}

int fq_event_query(struct fq_event *event, struct fq_error *err) {
    return event->backend->ops->event_query(event, err);
}

int fq_event_wait(struct fq_event *event, struct fq_error *err) {
    return event->backend->ops->event_wait(event, err);
}
