/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What finequant-bench needs of a GPU beside the backend: work captured into
 * CUDA graphs and timed by events, the plain read that no kernel can beat, and
 * cuBLAS, loaded where it is.  Only in builds with CUDA.  One thread, whose
 * device is the one that the cuda backend opened.
 */
#ifndef FQ_CLI_BENCH_CUDA_H
#define FQ_CLI_BENCH_CUDA_H

#include "backend.h"
#include "synthetic.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* 0, or -FQ_DEVICE (-FQ_NO_MEMORY) with what could not be done and CUDA's reason. */
int bench_cuda_check(cudaError_t error, const char *what, struct fq_error *err);

/* ---- Kernels (bench-cuda-kernels.cu) ------------------------------------------------------- */

/* Reads every byte once, 16 at a time: `from` and `bytes` are multiples of 16.  Writes to sink,
 * four bytes, only if what it read sums to a certain number, so that the loads cannot be left out.
 */
cudaError_t bench_cuda_read(const void *from, uint64_t bytes, unsigned *sink, cudaStream_t stream);

/* to[row][column] = scale · fq_synthetic_value, as fp16 or bf16; exact where scale is 1. */
cudaError_t bench_cuda_fill(void *to, int64_t rows, int64_t columns, enum fq_dtype dtype,
                            uint64_t seed, float scale, cudaStream_t stream);

/* Cycles and nanoseconds that a multiprocessor has counted, each from a start of its own. */
struct bench_stamp {
    int64_t cycles, ns;
};
#define BENCH_STAMPS 256 /* of a device, by the number of the multiprocessor */
/* Stamps of the multiprocessors that ran one of its blocks; the others stay as they are. */
cudaError_t bench_cuda_stamp(struct bench_stamp *stamps, cudaStream_t stream);

/* ---- Graphs (bench-cuda.c) ----------------------------------------------------------------- */

#define BENCH_REPLAYS        9
#define BENCH_CONTENDERS_MAX 4

/* One thing that is measured: `queue` gives call number `call` to the stream and waits for nothing,
 * since it is captured.  Calls `rotation` apart touch the same memory. */
struct bench_contender {
    int (*queue)(void *context, int call, struct fq_error *err);
    void *context;
    int rotation;
    /* Filled by bench_contender_capture: graphs that together make `rotation` calls or more. */
    cudaGraphExec_t graphs[BENCH_REPLAYS];
    int graph_count, calls; /* calls of one graph */
};

/* Runs a call to find out how long it takes, then captures as many as make a graph long enough for
 * the events round it not to matter. */
int bench_contender_capture(struct bench_contender *contender, cudaStream_t stream,
                            struct fq_error *err);
/* Replays the graphs of all in turns, BENCH_REPLAYS times; us[i] is the median time of one call of
 * contenders[i], and mhz[i], unless mhz is NULL, the median clock of its replays' multiprocessors.
 */
int bench_contenders_time(struct bench_contender *contenders, int count, cudaStream_t stream,
                          double *us, double *mhz, struct fq_error *err);
void bench_contender_fini(struct bench_contender *contender);

/* A contender's context: the plain read. */
struct bench_reader {
    const uint8_t *buffer; /* rotation · stride bytes */
    uint64_t bytes, stride;
    int rotation;
    unsigned *sink;
    cudaStream_t stream;
};
int bench_reader_queue(void *context, int call, struct fq_error *err);

/* ---- cuBLAS (bench-cublas.c) ------------------------------------------------------------------
 */

struct bench_cublas;

/*
 * Loads cuBLAS from `path`, or finds it where the loader does: *out stays NULL and 0 is returned if
 * it is not there.  `name`, of 64 bytes, then says what was looked for, otherwise the version.
 * Errors: -FQ_UNAVAILABLE (a path that does not load), -FQ_DEVICE.
 */
int bench_cublas_new(const char *path, cudaStream_t stream, struct bench_cublas **out, char *name,
                     struct fq_error *err);
void bench_cublas_free(struct bench_cublas *cublas); /* NULL is fine */
/* Queues Y[m][n] = X[m][k] · W[n][k]ᵀ, dense and without gaps, summed in fp32. */
int bench_cublas_gemm(struct bench_cublas *cublas, enum fq_dtype dtype, int64_t m, int64_t n,
                      int64_t k, const void *x, const void *w, void *y, struct fq_error *err);

#ifdef __cplusplus
}
#endif
#endif
