/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a backend implements.  backend.c checks arguments, so that an
 * implementation sees only valid ones, and dispatches.  Each implementation
 * embeds these structs as the first member of its own.
 */
#ifndef FQ_KERNELS_BACKEND_IMPL_H
#define FQ_KERNELS_BACKEND_IMPL_H

#include "backend.h"

struct fq_backend_ops {
    const char *name;
    bool f32_activations;
    int (*open)(const struct fq_backend_options *options, struct fq_backend **out,
                struct fq_error *err);
    void (*close)(struct fq_backend *backend);
    int (*info)(struct fq_backend *backend, struct fq_device_info *info, struct fq_error *err);

    int (*memory_new)(struct fq_backend *backend, enum fq_memory_kind kind, uint64_t bytes,
                      struct fq_memory **out, struct fq_error *err);
    int (*memory_import)(struct fq_backend *backend, const struct fq_memory_handle *handle,
                         struct fq_memory **out, struct fq_error *err);
    int (*memory_export)(struct fq_memory *memory, struct fq_memory_handle *handle,
                         struct fq_error *err);
    void (*memory_free)(struct fq_memory *memory);
    /* to_device: host → memory, else memory → host; only for DEVICE memory */
    int (*memory_copy)(struct fq_memory *memory, uint64_t offset, void *host, uint64_t bytes,
                       bool to_device, struct fq_error *err);

    uint64_t (*weights_size)(struct fq_backend *backend, const struct fq_matrix *matrix);
    int (*weights_new)(struct fq_backend *backend, const struct fq_matrix *matrix,
                       struct fq_weights **out, struct fq_error *err);
    int (*weights_synthetic)(struct fq_backend *backend, const struct fq_matrix *shape,
                             uint64_t seed, struct fq_weights **out,
                             struct fq_error *err); /* NULL: made on the host, then weights_new */
    void (*weights_free)(struct fq_weights *weights);
    int (*weights_export)(struct fq_weights *weights, struct fq_weights_handle *handle,
                          struct fq_error *err); /* NULL: unsupported */
    int (*weights_import)(struct fq_backend *backend, const struct fq_weights_handle *handle,
                          struct fq_weights **out, struct fq_error *err);

    int (*stream_new)(struct fq_backend *backend, struct fq_stream **out, struct fq_error *err);
    void (*stream_free)(struct fq_stream *stream);
    void *(*stream_native)(struct fq_stream *stream); /* NULL: there is none */
    int (*gemm)(struct fq_stream *stream, const struct fq_gemm *gemm, struct fq_error *err);

    int (*event_new)(struct fq_backend *backend, struct fq_event **out, struct fq_error *err);
    void (*event_free)(struct fq_event *event);
    int (*event_record)(struct fq_event *event, struct fq_stream *stream, struct fq_error *err);
    int (*event_query)(struct fq_event *event, struct fq_error *err);
    int (*event_wait)(struct fq_event *event, struct fq_error *err);
};

struct fq_backend {
    const struct fq_backend_ops *ops;
};

struct fq_memory {
    struct fq_backend *backend;
    enum fq_memory_kind kind;
    uint64_t bytes;
    void *host;    /* NULL for DEVICE */
    void *address; /* what kernels dereference */
    int fd;        /* HOST: owned memfd; -1 otherwise */
};

struct fq_weights {
    struct fq_backend *backend;
    struct fq_weights_info info;
};

struct fq_stream {
    struct fq_backend *backend;
};

struct fq_event {
    struct fq_backend *backend;
};

/* What fq_weights_info answers for a matrix that takes `bytes` when prepacked. */
static inline struct fq_weights_info fq_matrix_info(const struct fq_matrix *matrix,
                                                    uint64_t bytes) {
    return (struct fq_weights_info){
        .n = matrix->n,
        .k = matrix->k,
        .group = matrix->group,
        .bits = matrix->bits,
        .scale_type = matrix->scale_type,
        .symmetric = !matrix->zeros,
        .bytes = bytes,
    };
}

/* Row m of X and of Y, however the rows are given. */
static inline const void *fq_gemm_x_row(const struct fq_gemm *gemm, int64_t m) {
    if (gemm->x_rows)
        return gemm->x_rows[m];
    return (const char *)gemm->x + m * gemm->x_stride * (int64_t)fq_dtype_size(gemm->type);
}

static inline void *fq_gemm_y_row(const struct fq_gemm *gemm, int64_t m) {
    if (gemm->y_rows)
        return gemm->y_rows[m];
    return (char *)gemm->y + m * gemm->y_stride * (int64_t)fq_dtype_size(gemm->type);
}

/* Row m of the residual, NULL where there is none. */
static inline const void *fq_gemm_residual_row(const struct fq_gemm *gemm, int64_t m) {
    if (gemm->residual_rows)
        return gemm->residual_rows[m];
    if (!gemm->residual)
        return NULL;
    return (const char *)gemm->residual +
           m * gemm->residual_stride * (int64_t)fq_dtype_size(gemm->type);
}

extern const struct fq_backend_ops fq_reference_ops;
extern const struct fq_backend_ops fq_cpu_ops;
extern const struct fq_backend_ops fq_cuda_ops; /* only with HAVE_CUDA */

/* ---- Host pieces that reference and cpu share, and cuda takes what fits (host.c) ---------- */

/* A sealed (grow, shrink, seal), zero-filled, mapped memfd; fills *memory but its backend. */
int fq_host_memory_init(struct fq_memory *memory, uint64_t bytes, struct fq_error *err);
/* Maps a duplicate of fd, which must be sealed against shrinking and at least bytes long. */
int fq_host_memory_init_from_fd(struct fq_memory *memory, int fd, uint64_t bytes,
                                struct fq_error *err);
void fq_host_memory_fini(struct fq_memory *memory);

/* The memory, stream and event operations of a backend that computes on the host, in the caller. */
int fq_host_memory_new(struct fq_backend *backend, enum fq_memory_kind kind, uint64_t bytes,
                       struct fq_memory **out, struct fq_error *err);
int fq_host_memory_import(struct fq_backend *backend, const struct fq_memory_handle *handle,
                          struct fq_memory **out, struct fq_error *err);
int fq_host_memory_export(struct fq_memory *memory, struct fq_memory_handle *handle,
                          struct fq_error *err);
void fq_host_memory_free(struct fq_memory *memory);
int fq_host_stream_new(struct fq_backend *backend, struct fq_stream **out, struct fq_error *err);
void fq_host_stream_free(struct fq_stream *stream);
int fq_host_event_new(struct fq_backend *backend, struct fq_event **out, struct fq_error *err);
void fq_host_event_free(struct fq_event *event);
int fq_host_event_record(struct fq_event *event, struct fq_stream *stream, struct fq_error *err);
int fq_host_event_query(struct fq_event *event, struct fq_error *err);
int fq_host_event_wait(struct fq_event *event, struct fq_error *err);

/* Total and free physical memory in bytes, cgroup limits considered; a processor's model name. */
void fq_host_memory_info(uint64_t *total, uint64_t *available);
void fq_host_processor_name(char *name, size_t size);
/* Processors that the calling thread may run on; 1 without OpenMP. */
int fq_host_threads(void);
/* Copies so many rows of `width` bytes, which begin `pitch` bytes apart, to side by side, by as
 * many of those processors as it pays. */
void fq_host_copy_rows(void *to, const void *from, int64_t rows, uint64_t width, uint64_t pitch);

#endif
