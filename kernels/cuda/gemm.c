/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Streams of the CUDA backend, and how a struct fq_gemm becomes launches: the
 * split of K, row pointers, and the staging of rows that lie in host memory.
 * Queues only: nothing here waits for the GPU, but for the scratch memory's
 * growth.
 *
 * X in host memory is always staged: every CTA reads all of X, and host memory
 * is not cached on the device.  Y is written once, so on the decode path it
 * goes straight to the host.
 */
#include "cuda-impl.h"
#include "tiles.h"

#include <stdlib.h>
#include <string.h>

#define STAGING_BYTES                                                                              \
    ((int64_t)64 << 20) /* X and Y of a chunk of host rows, unless rows are long */
#define STAGING_ROWS ((int64_t)FQ_CUDA_PREFILL_BLOCK) /* a chunk has at least these */

void fq_cuda_stream_free(struct fq_stream *base) {
    struct fq_cuda_stream *stream = (struct fq_cuda_stream *)base;

    (void)fq_cuda_use(base->backend, NULL);
    if (stream->stream) {
        (void)cudaStreamSynchronize(stream->stream);
        (void)cudaStreamDestroy(stream->stream);
    }
    (void)cudaFree(stream->partials);
    (void)cudaFree(stream->counters);
    (void)cudaFree(stream->scratch);
    (void)cudaGetLastError();
    free(stream);
}

int fq_cuda_stream_new(struct fq_backend *backend, struct fq_stream **out, struct fq_error *err) {
    int processors = ((struct fq_cuda_backend *)backend)->processors;
    size_t counters = (size_t)fq_cuda_counters(processors) * sizeof(unsigned);
    struct fq_cuda_stream *stream;
    void *memory;
    int status;

    status = fq_cuda_use(backend, err);
    if (status < 0)
        return status;
    stream = calloc(1, sizeof *stream);
    if (!stream)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for a stream");
    stream->base.backend = backend;
    status = fq_cuda_check(cudaStreamCreateWithFlags(&stream->stream, cudaStreamNonBlocking), err,
                           "create a CUDA stream");
    if (status < 0)
        goto fail;
    status = fq_cuda_check(
        cudaMalloc(&memory, (size_t)fq_cuda_slots(processors) * FQ_CUDA_PARTIAL_BYTES), err,
        "allocate a stream's partial sums");
    if (status < 0)
        goto fail;
    stream->partials = memory;
    status = fq_cuda_check(cudaMalloc(&memory, counters), err, "allocate a stream's counters");
    if (status < 0)
        goto fail;
    stream->counters = memory;
    status = fq_cuda_check(cudaMemsetAsync(stream->counters, 0, counters, stream->stream), err,
                           "clear a stream's counters");
    if (status < 0)
        goto fail;
    *out = &stream->base;
    return 0;
fail:
    fq_cuda_stream_free(&stream->base);
    return status;
}

void *fq_cuda_stream_native(struct fq_stream *stream) {
    return ((struct fq_cuda_stream *)stream)->stream;
}

static int launch_gemm(struct fq_cuda_stream *stream, struct fq_cuda_launch *launch,
                       struct fq_error *err) {
    int processors = ((struct fq_cuda_backend *)stream->base.backend)->processors;
    const struct fq_cuda_matrix *w = &launch->w;
    cudaError_t error;

    if (launch->m > FQ_DECODE_ROWS) {
        launch->splits = fq_cuda_prefill_splits(w->n, launch->m, w->tiles, processors);
        error = fq_cuda_prefill(launch, stream->stream);
    } else {
        launch->splits = fq_cuda_decode_splits(w->n, w->tiles, processors);
        error = w->bits == 8   ? fq_cuda_decode_int8(launch, stream->stream)
                : w->bits == 4 ? fq_cuda_decode_int4(launch, stream->stream)
                               : fq_cuda_decode_int3(launch, stream->stream);
    }
    return fq_cuda_check(error, err, "launch a GEMM");
}

/* Rows [0, m) of base and stride become row pointers where the decode path wants them. */
static void set_rows(struct fq_cuda_launch *launch, int m, const void *x, int64_t x_stride, void *y,
                     int64_t y_stride) {
    launch->m = m;
    launch->x = x;
    launch->y = y;
    launch->x_stride = x_stride;
    launch->y_stride = y_stride;
    for (int i = 0; i < m && m <= FQ_DECODE_ROWS; i++) {
        launch->x_rows[i] = (const uint16_t *)x + i * x_stride;
        launch->y_rows[i] = (uint16_t *)y + i * y_stride;
    }
}

static int grow_scratch(struct fq_cuda_stream *stream, uint64_t bytes, struct fq_error *err) {
    void *memory;
    int status;

    if (bytes <= stream->scratch_bytes)
        return 0;
    status = fq_cuda_check(cudaStreamSynchronize(stream->stream), err, "finish earlier work");
    if (status < 0)
        return status;
    (void)cudaFree(stream->scratch);
    stream->scratch = NULL;
    stream->scratch_bytes = 0;
    status = fq_cuda_check(cudaMalloc(&memory, bytes), err, "allocate staging for host rows");
    if (status < 0)
        return status;
    stream->scratch = memory;
    stream->scratch_bytes = bytes;
    return 0;
}

static int64_t align_row(int64_t elements) {
    return (elements + 7) / 8 * 8; /* 16 bytes */
}

/* launch has its row pointers: X's rows are gathered on the device. */
static int decode_from_host(struct fq_cuda_stream *stream, struct fq_cuda_launch *launch,
                            struct fq_error *err) {
    struct fq_cuda_gather gather = {
        .stride = align_row(launch->w.k), .count = launch->w.k, .m = launch->m};
    int status;

    status = grow_scratch(stream, (uint64_t)gather.m * gather.stride * 2, err);
    if (status < 0)
        return status;
    gather.to = (uint16_t *)stream->scratch;
    for (int i = 0; i < launch->m; i++) {
        gather.rows[i] = launch->x_rows[i];
        launch->x_rows[i] = gather.to + i * gather.stride;
    }
    status = fq_cuda_check(fq_cuda_gather_rows(&gather, stream->stream), err, "stage host rows");
    if (status < 0)
        return status;
    return launch_gemm(stream, launch, err);
}

static int prefill_from_host(struct fq_cuda_stream *stream, struct fq_cuda_launch *launch,
                             const struct fq_gemm *gemm, struct fq_error *err) {
    int64_t n = launch->w.n, k = launch->w.k;
    int64_t x_stride = align_row(k), y_stride = align_row(n);
    int64_t rows = STAGING_BYTES / ((x_stride + y_stride) * 2);
    uint16_t *x, *y;
    int status;

    rows = rows < STAGING_ROWS ? STAGING_ROWS : rows / STAGING_ROWS * STAGING_ROWS;
    rows = rows < gemm->m ? rows : gemm->m;
    status = grow_scratch(stream, (uint64_t)rows * (x_stride + y_stride) * 2, err);
    if (status < 0)
        return status;
    x = (uint16_t *)stream->scratch;
    y = x + rows * x_stride;
    for (int64_t row = 0; row < gemm->m; row += rows) {
        int m = (int)(gemm->m - row < rows ? gemm->m - row : rows);

        status = fq_cuda_check(
            cudaMemcpy2DAsync(x, x_stride * 2, (const uint16_t *)gemm->x + row * gemm->x_stride,
                              gemm->x_stride * 2, k * 2, m, cudaMemcpyDefault, stream->stream),
            err, "stage host rows");
        if (status < 0)
            return status;
        set_rows(launch, m, x, x_stride, y, y_stride);
        status = launch_gemm(stream, launch, err);
        if (status < 0)
            return status;
        status = fq_cuda_check(cudaMemcpy2DAsync((uint16_t *)gemm->y + row * gemm->y_stride,
                                                 gemm->y_stride * 2, y, y_stride * 2, n * 2, m,
                                                 cudaMemcpyDefault, stream->stream),
                               err, "bring host rows back");
        if (status < 0)
            return status;
    }
    return 0;
}

int fq_cuda_gemm(struct fq_stream *base, const struct fq_gemm *gemm, struct fq_error *err) {
    struct fq_cuda_stream *stream = (struct fq_cuda_stream *)base;
    struct fq_cuda_launch launch;
    int status;

    if (gemm->gate || gemm->residual || gemm->residual_rows)
        return fq_fail(err, FQ_UNSUPPORTED,
                       "the cuda backend has no gated products or residuals yet");
    status = fq_cuda_use(base->backend, err);
    if (status < 0)
        return status;
    launch.w = ((const struct fq_cuda_weights *)gemm->weights)->matrix;
    launch.partials = stream->partials;
    launch.counters = stream->counters;
    launch.bias = gemm->bias;
    launch.bias_type = gemm->bias_type;
    launch.activation = gemm->activation;
    launch.type = gemm->type;
    set_rows(&launch, (int)gemm->m, gemm->x, gemm->x_stride, gemm->y, gemm->y_stride);
    if (gemm->x_rows) {
        memcpy(launch.x_rows, gemm->x_rows, (size_t)gemm->m * sizeof *gemm->x_rows);
        memcpy(launch.y_rows, gemm->y_rows, (size_t)gemm->m * sizeof *gemm->y_rows);
    }
    if (!gemm->host)
        return launch_gemm(stream, &launch, err);
    if (gemm->m > FQ_DECODE_ROWS)
        return prefill_from_host(stream, &launch, gemm, err);
    return decode_from_host(stream, &launch, err);
}
