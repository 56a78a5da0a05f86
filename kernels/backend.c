/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The front of the kernels: the table of backends, and the checks that every
 * backend would otherwise repeat.  Holds no state of its own.
 */
#ifdef HAVE_CONFIG_H
#include <config.h>
#endif

#include "backend-impl.h"
#include "synthetic.h"

#include <string.h>

/* Best first: "auto" takes the first that opens. */
static const struct fq_backend_ops *const backends[] = {
#ifdef HAVE_CUDA
    &fq_cuda_ops,
#endif
    &fq_cpu_ops,
    &fq_reference_ops,
};

#define BACKEND_COUNT (int)(sizeof backends / sizeof *backends)

#define THREADS_MAX      4096
#define MEMORY_BYTES_MAX ((uint64_t)1 << 46)
#define STRIDE_MAX       ((int64_t)1 << 40) /* with FQ_GEMM_ROWS_MAX rows, sizes stay in 63 bits */

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

#define BACKEND_NAMES "auto, cuda, cpu and reference"

int fq_backend_new(const char *name, const struct fq_backend_options *options,
                   struct fq_backend **out, struct fq_error *err) {
    static const struct fq_backend_options defaults;

    *out = NULL;
    if (!options)
        options = &defaults;
    if (!name)
        return fq_fail(err, FQ_INVALID, "no backend is named; there are " BACKEND_NAMES);
    if (options->threads < 0 || options->threads > THREADS_MAX)
        return fq_fail(err, FQ_INVALID, "threads is %d, allowed are 0 (all) to %d",
                       options->threads, THREADS_MAX);
    if (strcmp(name, "auto") == 0) {
        if (!options->device)
            return open_best(options, out, err);
        name = "cuda"; /* whoever names a GPU does not want another device in its place */
    }
    for (int i = 0; i < BACKEND_COUNT; i++)
        if (strcmp(backends[i]->name, name) == 0)
            return backends[i]->open(options, out, err);
    if (strcmp(name, "cuda") == 0)
        return fq_fail(err, FQ_UNSUPPORTED, "this build has no CUDA backend");
    return fq_fail(err, FQ_INVALID, "no backend '%s'; there are " BACKEND_NAMES, name);
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

static int memory_check(enum fq_memory_kind kind, uint64_t bytes, struct fq_error *err) {
    if (kind != FQ_MEMORY_HOST && kind != FQ_MEMORY_DEVICE)
        return fq_fail(err, FQ_INVALID, "memory kind %d, allowed are %d (host) and %d (device)",
                       (int)kind, FQ_MEMORY_HOST, FQ_MEMORY_DEVICE);
    if (bytes == 0 || bytes > MEMORY_BYTES_MAX)
        return fq_fail(err, FQ_INVALID, "a region of %llu bytes, allowed are 1 to %llu",
                       (unsigned long long)bytes, (unsigned long long)MEMORY_BYTES_MAX);
    return 0;
}

int fq_memory_new(struct fq_backend *backend, enum fq_memory_kind kind, uint64_t bytes,
                  struct fq_memory **out, struct fq_error *err) {
    int status = memory_check(kind, bytes, err);

    *out = NULL;
    return status ? status : backend->ops->memory_new(backend, kind, bytes, out, err);
}

int fq_memory_import(struct fq_backend *backend, const struct fq_memory_handle *handle,
                     struct fq_memory **out, struct fq_error *err) {
    int status = memory_check(handle->kind, handle->bytes, err);

    *out = NULL;
    if (status == 0 && handle->kind == FQ_MEMORY_HOST && handle->fd < 0)
        status = fq_fail(err, FQ_INVALID, "host memory with file descriptor %d", handle->fd);
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
        return fq_fail(err, FQ_INVALID, "%llu bytes at offset %llu of a region of %llu",
                       (unsigned long long)bytes, (unsigned long long)offset,
                       (unsigned long long)memory->bytes);
    if (bytes == 0)
        return 0;
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
    return fq_matrix_check(matrix, NULL) ? 0 : backend->ops->weights_size(backend, matrix);
}

int fq_weights_new(struct fq_backend *backend, const struct fq_matrix *matrix,
                   struct fq_weights **out, struct fq_error *err) {
    int status = fq_matrix_check(matrix, err);

    *out = NULL;
    if (status == 0 && (!matrix->codes || !matrix->scales))
        status = fq_fail(err, FQ_INVALID, "the matrix has no codes or no scales");
    return status ? status : backend->ops->weights_new(backend, matrix, out, err);
}

int fq_weights_synthetic(struct fq_backend *backend, const struct fq_matrix *shape, uint64_t seed,
                         struct fq_weights **out, struct fq_error *err) {
    int status = fq_matrix_check(shape, err);
    struct fq_matrix *matrix;

    *out = NULL;
    if (status)
        return status;
    if (backend->ops->weights_synthetic)
        return backend->ops->weights_synthetic(backend, shape, seed, out, err);
    status = fq_synthetic_new(shape, seed, 0, shape->n, &matrix, err);
    if (status == 0)
        status = backend->ops->weights_new(backend, matrix, out, err);
    fq_synthetic_free(matrix);
    return status;
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

static int check_address(const char *what, int64_t row, const void *address, size_t size,
                         struct fq_error *err) {
    if (address && (uintptr_t)address % size == 0)
        return 0;
    return fq_fail(err, FQ_INVALID, "row %lld of %s is at %p, allowed are multiples of %zu, not 0",
                   (long long)row, what, address, size);
}

static int check_rows(const struct fq_gemm *gemm, size_t size, struct fq_error *err) {
    int status = 0;

    if (!gemm->x_rows != !gemm->y_rows)
        return fq_fail(err, FQ_INVALID, "row pointers for %s alone, allowed are both or neither",
                       gemm->x_rows ? "X" : "Y");
    if (gemm->m > FQ_DECODE_ROWS)
        return fq_fail(err, FQ_INVALID, "m is %lld with row pointers, allowed are 1 to %d",
                       (long long)gemm->m, FQ_DECODE_ROWS);
    for (int64_t i = 0; i < gemm->m && status == 0; i++) {
        status = check_address("X", i, gemm->x_rows[i], size, err);
        if (status == 0)
            status = check_address("Y", i, gemm->y_rows[i], size, err);
        if (status == 0 && gemm->residual_rows)
            status = check_address("the residual", i, gemm->residual_rows[i], size, err);
    }
    return status;
}

/* Row m of a plane lies at m·stride: the stride spans a row, and the last row does not wrap round
 * the address space. */
static int check_plane(const char *what, const void *base, int64_t stride, int64_t width,
                       const struct fq_gemm *gemm, size_t size, struct fq_error *err) {
    int status = check_address(what, 0, base, size, err);

    if (status)
        return status;
    if (stride < width || stride > STRIDE_MAX)
        return fq_fail(err, FQ_INVALID, "the stride of %s is %lld, allowed are %lld to %lld", what,
                       (long long)stride, (long long)width, (long long)STRIDE_MAX);
    if (((uint64_t)(gemm->m - 1) * (uint64_t)stride + (uint64_t)width) * size >
        UINTPTR_MAX - (uintptr_t)base)
        return fq_fail(err, FQ_INVALID,
                       "%s at %p with stride %lld and %lld rows ends beyond the address space",
                       what, base, (long long)stride, (long long)gemm->m);
    return 0;
}

static int check_planes(const struct fq_gemm *gemm, size_t size, struct fq_error *err) {
    const struct fq_weights_info *info = &gemm->weights->info;
    int status = check_plane("X", gemm->x, gemm->x_stride, info->k, gemm, size, err);

    if (status == 0)
        status = check_plane("Y", gemm->y, gemm->y_stride, info->n, gemm, size, err);
    if (status == 0 && gemm->residual)
        status = check_plane("the residual", gemm->residual, gemm->residual_stride, info->n, gemm,
                             size, err);
    return status;
}

static int check_bias(const char *what, const void *bias, enum fq_dtype type,
                      struct fq_error *err) {
    size_t size = fq_dtype_size(type);

    if (!bias)
        return 0;
    if (size == 0)
        return fq_fail(err, FQ_INVALID, "bias dtype %d, allowed are f32 (1), f16 (2) and bf16 (3)",
                       (int)type);
    if ((uintptr_t)bias % size)
        return fq_fail(err, FQ_INVALID, "%s is at %p, allowed are multiples of %zu", what, bias,
                       size);
    return 0;
}

static int check_gate(struct fq_backend *backend, const struct fq_gemm *gemm,
                      struct fq_error *err) {
    const struct fq_weights_info *own = &gemm->weights->info, *gate;

    if (!gemm->gate)
        return gemm->gate_bias
                   ? fq_fail(err, FQ_INVALID, "a gate bias at %p without a gate", gemm->gate_bias)
                   : 0;
    if (gemm->gate->backend != backend)
        return fq_fail(err, FQ_INVALID, "the gate belongs to another backend (%s) than the stream",
                       gemm->gate->backend->ops->name);
    gate = &gemm->gate->info;
    if (gate->n != own->n || gate->k != own->k)
        return fq_fail(err, FQ_INVALID, "the gate is %lld×%lld, allowed is the weights' %lld×%lld",
                       (long long)gate->n, (long long)gate->k, (long long)own->n,
                       (long long)own->k);
    if (gate->bits != own->bits)
        return fq_fail(err, FQ_INVALID, "the gate has %d bits, allowed are the weights' %d",
                       gate->bits, own->bits);
    return check_bias("the gate bias", gemm->gate_bias, gemm->bias_type, err);
}

/* The residual is given as Y is; its addresses are checked with those of X and Y. */
static int check_residual(const struct fq_gemm *gemm, struct fq_error *err) {
    if (gemm->residual && gemm->y_rows)
        return fq_fail(err, FQ_INVALID,
                       "a residual by base with Y by row pointers, allowed are both alike");
    if (gemm->residual_rows && !gemm->y_rows)
        return fq_fail(err, FQ_INVALID,
                       "a residual by row pointers with Y by base, allowed are both alike");
    return 0;
}

static int check_gemm(struct fq_backend *backend, const struct fq_gemm *gemm,
                      struct fq_error *err) {
    size_t size = fq_dtype_size(gemm->type);
    int status;

    if (!gemm->weights)
        return fq_fail(err, FQ_INVALID, "the weights are NULL");
    if (gemm->weights->backend != backend)
        return fq_fail(err, FQ_INVALID,
                       "the weights belong to another backend (%s) than the stream",
                       gemm->weights->backend->ops->name);
    if (size == 0)
        return fq_fail(err, FQ_INVALID, "dtype %d, allowed are f32 (1), f16 (2) and bf16 (3)",
                       (int)gemm->type);
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
    status = check_bias("the bias", gemm->bias, gemm->bias_type, err);
    if (status == 0)
        status = check_gate(backend, gemm, err);
    if (status == 0)
        status = check_residual(gemm, err);
    if (status)
        return status;
    if (gemm->x_rows || gemm->y_rows)
        return check_rows(gemm, size, err);
    return check_planes(gemm, size, err);
}

void *fq_stream_native(struct fq_stream *stream) {
    const struct fq_backend_ops *ops = stream->backend->ops;

    return ops->stream_native ? ops->stream_native(stream) : NULL;
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
