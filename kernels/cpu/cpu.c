/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The cpu backend: chooses the instruction set when it opens, converts X to
 * fp32 once a call, and splits large M into passes.  A GEMM runs in the caller,
 * with OpenMP threads beside it.
 *
 * FINEQUANT_CPU_KERNELS=generic|avx2|avx512 takes a lesser set than the best, to
 * test it or to work round a processor.
 */
#ifdef HAVE_CONFIG_H
#include <config.h>
#endif

#include "cpu.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>

struct cpu_backend {
    struct fq_backend base;
    const struct fq_cpu_kernels *kernels;
    int threads;
};

struct cpu_stream {
    struct fq_stream base;
    float *scratch; /* grows to what the largest call needed */
    size_t scratch_floats;
};

size_t fq_cpu_scratch_floats(int64_t rows) {
    return FQ_CPU_PANEL_K * FQ_CPU_BLOCK + (size_t)rows * FQ_CPU_BLOCK;
}

static bool runs_here(const struct fq_cpu_kernels *kernels) {
#ifdef FQ_CPU_X86
    if (kernels == &fq_cpu_avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("fma");
    if (kernels == &fq_cpu_avx2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("f16c");
#endif
    return kernels == &fq_cpu_generic;
}

static int choose_kernels(const struct fq_cpu_kernels **out, struct fq_error *err) {
    static const struct fq_cpu_kernels *const best_first[] = {
#ifdef FQ_CPU_X86
        &fq_cpu_avx512,
        &fq_cpu_avx2,
#endif
        &fq_cpu_generic,
    };
    const char *wanted = getenv("FINEQUANT_CPU_KERNELS");

    for (size_t i = 0; i < sizeof best_first / sizeof *best_first; i++) {
        *out = best_first[i];
        if (wanted && *wanted && strcmp(wanted, (*out)->name) != 0)
            continue;
        if (runs_here(*out))
            return 0;
        if (wanted && *wanted)
            return fq_fail(err, FQ_UNAVAILABLE, "FINEQUANT_CPU_KERNELS=%s: not on this processor",
                           wanted);
    }
    return fq_fail(err, FQ_INVALID, "FINEQUANT_CPU_KERNELS=%s: there are avx512, avx2 and generic",
                   wanted);
}

static int usable_threads(void) {
#ifdef _OPENMP
    cpu_set_t set;

    if (sched_getaffinity(0, sizeof set, &set) == 0)
        return CPU_COUNT(&set);
#endif
    return 1;
}

static int cpu_open(const struct fq_backend_options *options, struct fq_backend **out,
                    struct fq_error *err) {
    const struct fq_cpu_kernels *kernels;
    int status = choose_kernels(&kernels, err);

    if (status)
        return status;
    struct cpu_backend *backend = calloc(1, sizeof *backend);
    if (!backend)
        return fq_fail(err, FQ_NO_MEMORY, "no memory");
    backend->base.ops = &fq_cpu_ops;
    backend->kernels = kernels;
    backend->threads = options->threads ? options->threads : usable_threads();
    *out = &backend->base;
    return 0;
}

static void cpu_close(struct fq_backend *backend) {
    free(backend);
}

static int cpu_info(struct fq_backend *base, struct fq_device_info *info, struct fq_error *err) {
    struct cpu_backend *backend = (struct cpu_backend *)base;

    (void)err;
    fq_host_processor_name(info->name, sizeof info->name);
    strcpy(info->kernels, backend->kernels->name);
    info->threads = backend->threads;
    fq_host_memory_info(&info->memory_total, &info->memory_free);
    return 0;
}

static int cpu_stream_new(struct fq_backend *backend, struct fq_stream **out,
                          struct fq_error *err) {
    struct cpu_stream *stream = calloc(1, sizeof *stream);

    if (!stream)
        return fq_fail(err, FQ_NO_MEMORY, "no memory");
    stream->base.backend = backend;
    *out = &stream->base;
    return 0;
}

static void cpu_stream_free(struct fq_stream *base) {
    struct cpu_stream *stream = (struct cpu_stream *)base;

    free(stream->scratch);
    free(stream);
}

static int reserve(struct cpu_stream *stream, size_t floats, struct fq_error *err) {
    if (floats <= stream->scratch_floats)
        return 0;
    floats = (floats + 1023) / 1024 * 1024;
    free(stream->scratch);
    stream->scratch_floats = 0;
    stream->scratch = aligned_alloc(4096, floats * sizeof(float));
    if (!stream->scratch)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for %zu bytes of scratch",
                       floats * sizeof(float));
    stream->scratch_floats = floats;
    return 0;
}

static void sum_groups(const struct fq_cpu_weights *weights, const float *x, float *sums) {
    int64_t group = weights->base.info.group;

    for (int64_t g = 0; g < weights->groups; g++) {
        int64_t end = (g + 1) * group < weights->k_padded ? (g + 1) * group : weights->k_padded;
        float sum = 0;

        for (int64_t k = g * group; k < end; k++)
            sum += x[k];
        sums[g] = sum;
    }
}

static size_t round_up(size_t value) {
    return (value + 15) / 16 * 16; /* floats in a cache line */
}

static int run_pass(struct cpu_stream *stream, const struct fq_gemm *gemm, int64_t row,
                    int64_t rows, struct fq_error *err) {
    const struct cpu_backend *backend = (const struct cpu_backend *)stream->base.backend;
    const struct fq_cpu_weights *weights = (const struct fq_cpu_weights *)gemm->weights;
    const int64_t k = weights->base.info.k;
    const bool decode = gemm->m <= FQ_DECODE_ROWS;
    const size_t x_floats = round_up((size_t)(rows * weights->k_padded));
    const size_t sum_floats =
        weights->zeros && decode ? round_up((size_t)(rows * weights->groups)) : 0;
    const size_t thread_floats =
        decode ? 0 : fq_cpu_scratch_floats(rows) * (size_t)backend->threads;
    int status = reserve(stream, x_floats + sum_floats + thread_floats, err);

    if (status)
        return status;
    float *x = stream->scratch;
    float *sums = sum_floats ? x + x_floats : NULL;
    for (int64_t m = 0; m < rows; m++) {
        float *line = x + m * weights->k_padded;

        backend->kernels->to_f32(line, fq_gemm_x_row(gemm, row + m), gemm->type, k);
        memset(line + k, 0, (size_t)(weights->k_padded - k) * sizeof *line);
        if (sums)
            sum_groups(weights, line, sums + m * weights->groups);
    }
    struct fq_cpu_job job = {
        .weights = weights,
        .gemm = gemm,
        .row = row,
        .rows = rows,
        .x = x,
        .x_sum = sums,
        .threads = backend->threads < weights->blocks ? backend->threads : (int)weights->blocks,
        .scratch = x + x_floats + sum_floats,
    };
    if (decode)
        backend->kernels->decode(&job);
    else
        backend->kernels->panel(&job);
    return 0;
}

static int cpu_gemm(struct fq_stream *stream, const struct fq_gemm *gemm, struct fq_error *err) {
    int status = 0;

    for (int64_t row = 0; row < gemm->m && status == 0; row += FQ_CPU_ROWS_PASS) {
        int64_t left = gemm->m - row;

        status = run_pass((struct cpu_stream *)stream, gemm, row,
                          left < FQ_CPU_ROWS_PASS ? left : FQ_CPU_ROWS_PASS, err);
    }
    return status;
}

const struct fq_backend_ops fq_cpu_ops = {
    .name = "cpu",
    .f32_activations = true,
    .open = cpu_open,
    .close = cpu_close,
    .info = cpu_info,
    .memory_new = fq_host_memory_new,
    .memory_import = fq_host_memory_import,
    .memory_export = fq_host_memory_export,
    .memory_free = fq_host_memory_free,
    .weights_size = fq_cpu_weights_size,
    .weights_new = fq_cpu_weights_new,
    .weights_free = fq_cpu_weights_free,
    .stream_new = cpu_stream_new,
    .stream_free = cpu_stream_free,
    .gemm = cpu_gemm,
    .event_new = fq_host_event_new,
    .event_free = fq_host_event_free,
    .event_record = fq_host_event_record,
    .event_query = fq_host_event_query,
    .event_wait = fq_host_event_wait,
};
