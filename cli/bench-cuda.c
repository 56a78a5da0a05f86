/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Timing on a GPU.  What is compared runs as replays of CUDA graphs in turns on
 * one stream, all queued before the first is waited for: no launch of the host is
 * in any time, and what the GPU does over time meets all alike.  Graphs of one contender go on
 * where the last one ended, so that the replays together go round all its copies.
 */
#include "bench-cuda.h"

#include "bench.h"

#include <string.h>

#define GRAPH_US  1500.0 /* a replay's least length: a thousand times what its two events cost */
#define CALLS_MAX 4096

int bench_cuda_check(cudaError_t error, const char *what, struct fq_error *err) {
    if (error == cudaSuccess)
        return 0;
    (void)cudaGetLastError(); /* a later check shall not find it again */
    return fq_fail(err, error == cudaErrorMemoryAllocation ? FQ_NO_MEMORY : FQ_DEVICE,
                   "cannot %s: %s (%s)", what, cudaGetErrorName(error), cudaGetErrorString(error));
}

/* ---- Capturing ------------------------------------------------------------------------------ */

/* Two calls outside of a graph: the first loads the kernels, the second is timed. */
static int estimate(struct bench_contender *contender, cudaStream_t stream, double *us,
                    struct fq_error *err) {
    cudaEvent_t start = NULL, end = NULL;
    float ms = 0;
    int status = bench_cuda_check(cudaEventCreate(&start), "create an event", err);

    if (status == 0)
        status = bench_cuda_check(cudaEventCreate(&end), "create an event", err);
    if (status == 0)
        status = contender->queue(contender->context, 0, err);
    if (status == 0)
        status = bench_cuda_check(cudaEventRecord(start, stream), "record an event", err);
    if (status == 0)
        status = contender->queue(contender->context, 1, err);
    if (status == 0)
        status = bench_cuda_check(cudaEventRecord(end, stream), "record an event", err);
    if (status == 0)
        status = bench_cuda_check(cudaEventSynchronize(end), "finish what the GPU was given", err);
    if (status == 0)
        status = bench_cuda_check(cudaEventElapsedTime(&ms, start, end), "read an event", err);
    if (start)
        (void)cudaEventDestroy(start);
    if (end)
        (void)cudaEventDestroy(end);
    *us = (double)ms * 1e3;
    return status;
}

static int capture(struct bench_contender *contender, int first, cudaStream_t stream,
                   cudaGraphExec_t *out, struct fq_error *err) {
    cudaGraph_t graph = NULL;
    int status = bench_cuda_check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed),
                                  "capture a stream", err);

    if (status)
        return status;
    for (int i = 0; i < contender->calls && status == 0; i++)
        status = contender->queue(contender->context, first + i, err);
    cudaError_t error =
        cudaStreamEndCapture(stream, &graph); /* also to end a capture that failed */
    if (status == 0)
        status = bench_cuda_check(error, "capture a stream", err);
    if (status == 0)
        status = bench_cuda_check(cudaGraphInstantiateWithFlags(out, graph, 0),
                                  "make a graph executable", err);
    if (status == 0)
        status = bench_cuda_check(cudaGraphUpload(*out, stream), "upload a graph", err);
    if (graph)
        (void)cudaGraphDestroy(graph);
    return status;
}

int bench_contender_capture(struct bench_contender *contender, cudaStream_t stream,
                            struct fq_error *err) {
    double us;
    int status = estimate(contender, stream, &us, err);

    if (status)
        return status;
    contender->calls = us * CALLS_MAX > GRAPH_US ? (int)(GRAPH_US / us) + 1 : CALLS_MAX;
    int graphs = (contender->rotation + contender->calls - 1) / contender->calls;
    if (graphs > BENCH_REPLAYS) {
        graphs = BENCH_REPLAYS;
        contender->calls = (contender->rotation + graphs - 1) / graphs;
    }
    while (contender->graph_count < graphs && status == 0) {
        int at = contender->graph_count;

        status = capture(contender, at * contender->calls, stream, &contender->graphs[at], err);
        contender->graph_count += contender->graphs[at] != NULL;
    }
    return status;
}

void bench_contender_fini(struct bench_contender *contender) {
    for (int i = 0; i < contender->graph_count; i++)
        (void)cudaGraphExecDestroy(contender->graphs[i]);
    contender->graph_count = 0;
}

/* ---- Replaying ------------------------------------------------------------------------------ */

/* Of one replay: events, and what the multiprocessors' clocks say before and after them. */
struct span {
    cudaEvent_t start, end;
    struct bench_stamp *before, *after; /* or NULL */
};

static int replay(struct bench_contender *contender, int turn, const struct span *span,
                  cudaStream_t stream, struct fq_error *err) {
    cudaGraphExec_t graph = contender->graphs[turn % contender->graph_count];
    int status = 0;

    if (span->before)
        status =
            bench_cuda_check(bench_cuda_stamp(span->before, stream), "read the GPU's clocks", err);
    if (status == 0)
        status = bench_cuda_check(cudaEventRecord(span->start, stream), "record an event", err);
    if (status == 0)
        status = bench_cuda_check(cudaGraphLaunch(graph, stream), "launch a graph", err);
    if (status == 0)
        status = bench_cuda_check(cudaEventRecord(span->end, stream), "record an event", err);
    if (status == 0 && span->after)
        status =
            bench_cuda_check(bench_cuda_stamp(span->after, stream), "read the GPU's clocks", err);
    return status;
}

/* Over the multiprocessors that were stamped before and after a replay, and over the replays. */
static int median_mhz(const struct span *spans, int stride, double *mhz, struct fq_error *err) {
    struct bench_samples samples = {0};
    int status = 0;

    for (int turn = 0; turn < BENCH_REPLAYS; turn++) {
        const struct span *span = &spans[turn * stride];

        for (int i = 0; i < BENCH_STAMPS && status == 0; i++) {
            const struct bench_stamp *before = &span->before[i], *after = &span->after[i];

            if (before->ns && after->ns)
                status = bench_samples_add(&samples,
                                           (double)(after->cycles - before->cycles) * 1e3 /
                                               (double)(after->ns - before->ns),
                                           err);
        }
    }
    *mhz = bench_samples_at(&samples, 0.5);
    bench_samples_fini(&samples);
    return status;
}

static int median_us(const struct span *spans, int stride, int calls, double *us,
                     struct fq_error *err) {
    struct bench_samples samples = {0};
    int status = 0;

    for (int turn = 0; turn < BENCH_REPLAYS && status == 0; turn++) {
        const struct span *span = &spans[turn * stride];
        float ms = 0;

        status = bench_cuda_check(cudaEventElapsedTime(&ms, span->start, span->end),
                                  "read an event", err);
        if (status == 0)
            status = bench_samples_add(&samples, (double)ms * 1e3 / calls, err);
    }
    *us = bench_samples_at(&samples, 0.5);
    bench_samples_fini(&samples);
    return status;
}

int bench_contenders_time(struct bench_contender *contenders, int count, cudaStream_t stream,
                          double *us, double *mhz, struct fq_error *err) {
    struct span spans[BENCH_REPLAYS * BENCH_CONTENDERS_MAX] = {{NULL}};
    struct bench_stamp *stamps = NULL;
    int span_count = BENCH_REPLAYS * count, status = 0;
    size_t bytes = 2 * (size_t)span_count * BENCH_STAMPS * sizeof *stamps;

    if (mhz) { /* in host memory, where the GPU writes them */
        status = bench_cuda_check(cudaMallocHost((void **)&stamps, bytes),
                                  "allocate page-locked memory for clocks", err);
        if (status)
            return status;
        memset(stamps, 0, bytes);
    }
    for (int i = 0; i < span_count && status == 0; i++) {
        if (mhz) {
            spans[i].before = stamps + 2 * i * BENCH_STAMPS;
            spans[i].after = spans[i].before + BENCH_STAMPS;
        }
        status = bench_cuda_check(cudaEventCreate(&spans[i].start), "create an event", err);
        if (status == 0)
            status = bench_cuda_check(cudaEventCreate(&spans[i].end), "create an event", err);
    }
    for (int i = 0; i < count && status == 0;
         i++) /* warms up, and keeps the GPU ahead of the host */
        status = bench_cuda_check(cudaGraphLaunch(contenders[i].graphs[0], stream),
                                  "launch a graph", err);
    for (int i = 0; i < span_count && status == 0; i++)
        status = replay(&contenders[i % count], i / count, &spans[i], stream, err);
    if (status == 0)
        status =
            bench_cuda_check(cudaStreamSynchronize(stream), "finish what the GPU was given", err);
    for (int i = 0; i < count && status == 0; i++)
        status = median_us(&spans[i], count, contenders[i].calls, &us[i], err);
    for (int i = 0; i < count && status == 0 && mhz; i++)
        status = median_mhz(&spans[i], count, &mhz[i], err);
    for (int i = 0; i < span_count; i++) {
        if (spans[i].start)
            (void)cudaEventDestroy(spans[i].start);
        if (spans[i].end)
            (void)cudaEventDestroy(spans[i].end);
    }
    if (stamps)
        (void)cudaFreeHost(stamps);
    return status;
}

/* ---- The plain read ------------------------------------------------------------------------- */

int bench_reader_queue(void *context, int call, struct fq_error *err) {
    const struct bench_reader *reader = context;
    const uint8_t *from = reader->buffer + (uint64_t)(call % reader->rotation) * reader->stride;

    return bench_cuda_check(bench_cuda_read(from, reader->bytes, reader->sink, reader->stream),
                            "launch the plain read", err);
}
