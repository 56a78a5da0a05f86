/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The cpu backend: chooses the instruction set when it opens, converts X to
 * fp32 once a call, and splits large M into passes.  A GEMM runs in the caller,
 * with OpenMP threads beside it.
 *
 * FINEQUANT_CPU_KERNELS=generic|avx2|avxvnni|avx512|avx512vnni|avx512gfni|avx512bf16|amx takes a
 * lesser set than the best, to test it or to work round a processor.
 */
#ifdef HAVE_CONFIG_H
#include <config.h>
#endif

#include "cpu.h"

#include <stdlib.h>
#include <string.h>

struct cpu_stream {
    struct fq_stream base;
    char *scratch; /* page aligned; grows to what the largest call needed */
    size_t scratch_bytes;
};

size_t fq_cpu_scratch_floats(int64_t rows, int operands) {
    return FQ_CPU_PANEL_K * FQ_CPU_BLOCK + (size_t)rows * FQ_CPU_BLOCK * (size_t)operands;
}

static bool runs_here(const struct fq_cpu_kernels *kernels) {
#ifdef FQ_CPU_AMX
    if (kernels == &fq_cpu_amx)
        return runs_here(&fq_cpu_avx512gfni) && __builtin_cpu_supports("amx-int8") &&
               fq_cpu_amx_allowed();
#endif
#ifdef FQ_CPU_X86
    if (kernels == &fq_cpu_avx512bf16)
        return runs_here(&fq_cpu_avx512vnni) && __builtin_cpu_supports("avx512bf16");
    if (kernels == &fq_cpu_avx512gfni)
        return runs_here(&fq_cpu_avx512vnni) && __builtin_cpu_supports("gfni");
    if (kernels == &fq_cpu_avx512vnni)
        return runs_here(&fq_cpu_avx512) && __builtin_cpu_supports("avx512vnni");
    if (kernels == &fq_cpu_avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("fma");
#ifdef FQ_CPU_AVXVNNI
    if (kernels == &fq_cpu_avxvnni)
        return runs_here(&fq_cpu_avx2) && __builtin_cpu_supports("avxvnni");
#endif
    if (kernels == &fq_cpu_avx2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("f16c");
#endif
    return kernels == &fq_cpu_generic;
}

/* Whether a set that runs here is one to take unasked: avx512gfni is slower than avx512vnni on
 * processors that are not Intel's (NOTES.md). */
static bool pays_here(const struct fq_cpu_kernels *kernels) {
#ifdef FQ_CPU_X86
    return kernels != &fq_cpu_avx512gfni || __builtin_cpu_is("intel");
#else
    (void)kernels;
    return true;
#endif
}

#ifdef FQ_CPU_X86
const struct fq_cpu_kernels *fq_cpu_byte_products(void) {
    const bool gfni = runs_here(&fq_cpu_avx512gfni) && pays_here(&fq_cpu_avx512gfni);

    return gfni ? &fq_cpu_avx512gfni : &fq_cpu_avx512vnni;
}
#endif

static int choose_kernels(const struct fq_cpu_kernels **out, struct fq_error *err) {
    static const struct fq_cpu_kernels *const best_first[] = {
#ifdef FQ_CPU_AMX
        &fq_cpu_amx,
#endif
#ifdef FQ_CPU_X86
        &fq_cpu_avx512bf16, &fq_cpu_avx512gfni, &fq_cpu_avx512vnni, &fq_cpu_avx512,
#ifdef FQ_CPU_AVXVNNI
        &fq_cpu_avxvnni,
#endif
        &fq_cpu_avx2,
#endif
        &fq_cpu_generic,
    };
    const char *wanted = getenv("FINEQUANT_CPU_KERNELS");

    for (size_t i = 0; i < sizeof best_first / sizeof *best_first; i++) {
        *out = best_first[i];
        if (wanted && *wanted ? strcmp(wanted, (*out)->name) != 0 : !pays_here(*out))
            continue;
        if (runs_here(*out))
            return 0;
        if (wanted && *wanted)
            return fq_fail(err, FQ_UNAVAILABLE, "FINEQUANT_CPU_KERNELS=%s: not on this processor",
                           wanted);
    }
    return fq_fail(err, FQ_INVALID,
                   "FINEQUANT_CPU_KERNELS=%s, allowed are amx, avx512bf16, avx512gfni, avx512vnni, "
                   "avx512, avxvnni, avx2 and generic",
                   wanted);
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
    backend->threads = options->threads ? options->threads : fq_host_threads();
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

static int reserve(struct cpu_stream *stream, size_t bytes, struct fq_error *err) {
    if (bytes <= stream->scratch_bytes)
        return 0;
    bytes = (bytes + 4095) / 4096 * 4096;
    free(stream->scratch);
    stream->scratch_bytes = 0;
    stream->scratch = aligned_alloc(4096, bytes);
    if (!stream->scratch)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for %zu bytes of scratch", bytes);
    stream->scratch_bytes = bytes;
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

/* Where the parts of a pass's scratch memory lie: bytes from its start, each on a cache line. */
struct parts {
    size_t x, threads, total;
    struct {
        size_t sums, fixed, limbs, chunks, segments;
    } of[FQ_CPU_OPERANDS];
};

/* Bytes that the limbs of so many rows take, and what may be read behind them. */
static size_t limbs_size(const struct fq_cpu_kernels *kernels, const struct fq_cpu_weights *weights,
                         size_t rows, enum fq_dtype type) {
    const size_t k = (size_t)weights->k_padded, bytes = (size_t)kernels->limb_bytes;
    const size_t block = (size_t)fq_cpu_tile_rows((int64_t)rows, type);

    if (!kernels->few)
        return rows * k * bytes;
    return (rows + block - 1) / block * block *
               ((k + FQ_CPU_TILE - 1) / FQ_CPU_TILE * FQ_CPU_TILE) * bytes +
           FQ_CPU_TILE_SLACK;
}

static size_t take(struct parts *parts, size_t bytes) {
    size_t at = parts->total;

    parts->total += (bytes + 63) / 64 * 64;
    return at;
}

static struct parts lay_out(const struct cpu_backend *backend, const struct fq_cpu_kernels *kernels,
                            const struct fq_cpu_job *job, bool decode) {
    const size_t count = (size_t)job->rows;
    const struct fq_cpu_weights *first = job->operand[FQ_CPU_MAIN].weights;
    const size_t k = (size_t)first->k_padded;
    struct parts parts = {0};

    parts.x = take(&parts, count * k * sizeof(float));
    if (!decode) {
        parts.threads = take(&parts, fq_cpu_scratch_floats(job->rows, job->operands) *
                                         sizeof(float) * (size_t)backend->threads);
        return parts;
    }
    for (int i = 0; i < job->operands; i++) {
        const struct fq_cpu_weights *weights = job->operand[i].weights;
        const size_t groups = (size_t)weights->groups, chunks = (size_t)fq_cpu_chunks(weights);

        parts.of[i].sums = take(&parts, weights->zeros ? count * groups * sizeof(float) : 0);
        if (!kernels->to_fixed)
            continue;
        parts.of[i].fixed = take(&parts, count * sizeof(struct fq_cpu_fixed));
        parts.of[i].limbs = take(&parts, limbs_size(kernels, weights, count, job->gemm->type));
        parts.of[i].chunks = take(&parts, count * chunks * sizeof(struct fq_cpu_chunk));
        parts.of[i].segments = take(&parts, count * chunks * sizeof(struct fq_cpu_segment));
    }
    if (fq_cpu_splits(first) > 1)
        parts.threads = take(&parts, (size_t)(first->blocks * fq_cpu_splits(first)) * count *
                                         (size_t)job->operands * FQ_CPU_BLOCK * sizeof(float));
    return parts;
}

/* Where the limbs and chunks of row m of so many lie: behind those of the rows before, or in
 * tiles. */
static void place_row(struct fq_cpu_fixed *fixed, const struct fq_cpu_kernels *kernels,
                      const struct fq_cpu_weights *weights, int64_t chunks, int64_t m, int64_t rows,
                      enum fq_dtype type) {
    const int block = fq_cpu_tile_rows(rows, type);

    if (!kernels->few) {
        fixed->limbs += m * weights->k_padded * kernels->limb_bytes;
        fixed->chunks += m * chunks;
        return;
    }
    fixed->columns = fq_cpu_tile_columns(weights);
    fixed->pitch = (int64_t)block * fixed->columns;
    fixed->columns_pitch = (rows + block - 1) / block * FQ_CPU_LIMBS * fixed->pitch;
    fixed->limbs += m / block * FQ_CPU_LIMBS * fixed->pitch + m % block * fixed->columns;
    fixed->chunks_pitch = rows;
    fixed->chunks += m;
}

/* Row m of X, in floats, as an operand's groups want it. */
static void convert_row(const struct fq_cpu_job *job, int i, const struct fq_cpu_kernels *kernels,
                        const struct parts *parts, char *scratch, int64_t m, const float *x) {
    const struct fq_cpu_weights *weights = job->operand[i].weights;
    struct fq_cpu_fixed *fixed = (struct fq_cpu_fixed *)(void *)(scratch + parts->of[i].fixed);
    const int64_t chunks = fq_cpu_chunks(weights);

    if (kernels->to_fixed) {
        fixed[m] = (struct fq_cpu_fixed){
            .limbs = (int8_t *)scratch + parts->of[i].limbs,
            .columns = FQ_CPU_STEP,
            .pitch = FQ_CPU_STEP,
            .columns_pitch = FQ_CPU_LIMBS * FQ_CPU_STEP,
            .chunks_pitch = 1,
            .chunks = (struct fq_cpu_chunk *)(void *)(scratch + parts->of[i].chunks),
            .segments =
                (struct fq_cpu_segment *)(void *)(scratch + parts->of[i].segments) + m * chunks,
        };
        place_row(&fixed[m], kernels, weights, chunks, m, job->rows, job->gemm->type);
        kernels->to_fixed(weights, x, job->gemm->type, &fixed[m]);
    }
    if (weights->zeros)
        sum_groups(weights, x,
                   (float *)(void *)(scratch + parts->of[i].sums) + m * weights->groups);
}

static void copy_bf16(uint16_t *to, const void *from, int64_t k, int64_t padded) {
    memcpy(to, from, (size_t)k * sizeof *to);
    memset(to + k, 0, (size_t)(padded - k) * sizeof *to);
}

/* X to float, and for decode to what the kernels take; or as it is, where as_bf16. */
static void convert_rows(struct fq_cpu_job *job, const struct fq_cpu_kernels *kernels,
                         const struct parts *parts, char *scratch, bool decode, bool as_bf16) {
    const int64_t k = job->gemm->weights->info.k;
    const int64_t pitch = job->operand[FQ_CPU_MAIN].weights->k_padded;

#pragma omp parallel for schedule(static)                                                          \
    num_threads(job->threads) if (job->threads > 1 && job->rows > 1)
    for (int64_t m = 0; m < job->rows; m++) {
        const void *from = fq_gemm_x_row(job->gemm, job->row + m);
        float *x = (float *)(void *)(scratch + parts->x) + m * pitch;

        if (as_bf16) {
            copy_bf16((uint16_t *)(void *)(scratch + parts->x) + m * pitch, from, k, pitch);
            continue;
        }
        kernels->to_f32(x, from, job->gemm->type, k);
        memset(x + k, 0, (size_t)(pitch - k) * sizeof *x);
        for (int i = 0; i < job->operands && decode; i++)
            convert_row(job, i, kernels, parts, scratch, m, x);
    }
    if (as_bf16)
        job->x_bf16 = (uint16_t *)(void *)(scratch + parts->x);
    else
        job->x = (float *)(void *)(scratch + parts->x);
    for (int i = 0; i < job->operands; i++) {
        struct fq_cpu_operand *operand = &job->operand[i];

        operand->fixed = (struct fq_cpu_fixed *)(void *)(scratch + parts->of[i].fixed);
        if (operand->weights->zeros)
            operand->x_sum = (float *)(void *)(scratch + parts->of[i].sums);
    }
}

static void run_parts(const struct fq_cpu_job *job, int64_t splits, fq_cpu_part *part,
                      fq_cpu_join *join) {
    const int64_t blocks = job->operand[FQ_CPU_MAIN].weights->blocks;
    const int64_t floats = job->rows * job->operands * FQ_CPU_BLOCK;

#pragma omp parallel num_threads(job->threads) if (job->threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < blocks * splits; unit++)
            part(job, unit / splits, unit % splits, splits, job->scratch + unit * floats);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            float *values = job->scratch + block * splits * floats;

            for (int64_t split = 1; split < splits; split++)
                for (int64_t i = 0; i < floats; i++)
                    values[i] += values[split * floats + i];
            join(job, block, values);
        }
    }
}

/* Shares of a thread's blocks, where there are twice as many: a core that others use, too, leaves
 * some of its own to the rest.  Smaller ones lose time at each one's begin, when nothing has been
 * asked for. */
#define SHARES 8

static void run_share(const struct fq_cpu_job *job, int64_t share, int64_t shares,
                      fq_cpu_whole *whole) {
    const int64_t blocks = job->operand[FQ_CPU_MAIN].weights->blocks;
    const int64_t end = blocks * (share + 1) / shares;

    for (int64_t block = blocks * share / shares; block < end; block++)
        whole(job, block, end);
}

void fq_cpu_run_blocks(const struct fq_cpu_job *job, fq_cpu_whole *whole, fq_cpu_part *part,
                       fq_cpu_join *join) {
    const int64_t blocks = job->operand[FQ_CPU_MAIN].weights->blocks;
    const int64_t splits = fq_cpu_splits(job->operand[FQ_CPU_MAIN].weights);

    if (splits > 1) {
        run_parts(job, splits, part, join);
        return;
    }
    if (blocks < 2 * SHARES * job->threads) {
#pragma omp parallel for schedule(static) num_threads(job->threads) if (job->threads > 1)
        for (int share = 0; share < job->threads; share++)
            run_share(job, share, job->threads, whole);
        return;
    }
#pragma omp parallel for schedule(dynamic) num_threads(job->threads) if (job->threads > 1)
    for (int share = 0; share < SHARES * job->threads; share++)
        run_share(job, share, SHARES * job->threads, whole);
}

/* Whether all rows of X are in fixed point. */
static bool all_valid(const struct fq_cpu_job *job) {
    for (int i = 0; i < job->operands; i++)
        for (int64_t m = 0; m < job->rows; m++)
            if (!job->operand[i].fixed[m].valid)
                return false;
    return true;
}

/* The kernels of a pass, as far as its shape tells. */
static const struct fq_cpu_kernels *kernels_for(const struct fq_cpu_kernels *kernels,
                                                const struct fq_cpu_job *job) {
    for (int i = 0; i < job->operands && kernels->few; i++)
        if (!fq_cpu_wants_tiles(job->operand[i].weights, job->rows, job->gemm->type))
            return kernels->few;
    return kernels;
}

static int run_pass(struct cpu_stream *stream, const struct fq_gemm *gemm, int64_t row,
                    int64_t rows, struct fq_error *err) {
    const struct cpu_backend *backend = (const struct cpu_backend *)stream->base.backend;
    const struct fq_cpu_weights *weights = (const struct fq_cpu_weights *)gemm->weights;
    const bool decode = gemm->m <= FQ_DECODE_ROWS || !backend->kernels->panel;
    const bool as_bf16 = !decode && gemm->type == FQ_BF16 && backend->kernels->panel_bf16;
    const int64_t units = weights->blocks * (decode ? fq_cpu_splits(weights) : 1);
    struct fq_cpu_job job = {
        .gemm = gemm,
        .operands = gemm->gate ? 2 : 1,
        .operand = {{.weights = weights}, {.weights = (const struct fq_cpu_weights *)gemm->gate}},
        .row = row,
        .rows = rows,
        .threads = backend->threads < units ? backend->threads : (int)units,
    };
    const struct fq_cpu_kernels *kernels = kernels_for(backend->kernels, &job);
    const struct parts parts = lay_out(backend, kernels, &job, decode);
    int status = reserve(stream, parts.total, err);

    if (status)
        return status;
    job.scratch = (float *)(void *)(stream->scratch + parts.threads);
    convert_rows(&job, kernels, &parts, stream->scratch, decode, as_bf16);
    if (kernels->few && !all_valid(&job)) { /* what `few` wants has room in these parts */
        kernels = kernels->few;
        convert_rows(&job, kernels, &parts, stream->scratch, decode, as_bf16);
    }
    if (decode)
        kernels->decode(&job);
    else if (as_bf16)
        kernels->panel_bf16(&job);
    else
        kernels->panel(&job);
    return 0;
}

static int cpu_gemm(struct fq_stream *stream, const struct fq_gemm *gemm, struct fq_error *err) {
    const struct cpu_backend *backend = (const struct cpu_backend *)stream->backend;
    const int64_t pass = backend->kernels->panel ? FQ_CPU_ROWS_PASS : FQ_DECODE_ROWS;
    int status = 0;

    for (int64_t row = 0; row < gemm->m && status == 0; row += pass) {
        int64_t left = gemm->m - row;

        status = run_pass((struct cpu_stream *)stream, gemm, row, left < pass ? left : pass, err);
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
