/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The inner loops, compiled once for each instruction set (local.mk gives the
 * flags and FQ_CPU_ISA).  Written in GCC's vector extensions; what a set does
 * better with an instruction of its own stands under its macro.
 *
 * decode: for up to 64 rows.  A tile is NV vectors of rows of W times MR rows of
 * X; weights go from packed words to floats in registers, a group's products
 * are summed, and the sum is scaled once.  Few blocks are computed in parts of K
 * (fq_cpu_splits).  The order of the additions to one
 * result is k, then groups, then parts, whatever MR is: that is what makes a row's bits
 * independent of its company, and of the number of threads.
 *
 * panel: for more rows.  FQ_CPU_PANEL_K columns of a block are dequantized into
 * a panel that stays in the second-level cache, and every tile of X is
 * multiplied with it.
 */
#include "cpu.h"
#include "half.h"

#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined __AVX512F__
#define VL       16
#define NV       4
#define MR       4 /* rows of X in a decode tile: 16 accumulators */
#define PANEL_NV 4 /* and in a panel tile: 24 */
#define PANEL_MR 6
#elif defined __AVX2__
#define VL       8
#define NV       4
#define MR       2
#define PANEL_NV 2
#define PANEL_MR 6
#else
#define VL       4
#define NV       4
#define MR       2
#define PANEL_NV 2
#define PANEL_MR 4
#endif
#if defined __F16C__ || defined __AVX512F__
#include <immintrin.h>
#endif

/* Every loop over registers must vanish, or the arrays it indexes live in memory. */
#define UNROLL       _Pragma("GCC unroll 8")
#define INLINE       static inline __attribute__((always_inline))
#define PASTE(a, b)  a##b
#define JOIN(a, b)   PASTE(a, b)
#define NAME(isa)    JOIN(fq_cpu_, isa)
#define TEXT(isa)    STRING(isa)
#define STRING(text) #text

typedef float vf __attribute__((vector_size(VL * 4)));
typedef float vf_unaligned __attribute__((vector_size(VL * 4), aligned(4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef int8_t vb __attribute__((vector_size(VL)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));

INLINE vf broadcast(float value) {
    return value - (vf){0}; /* not a sum: −0 + 0 is 0, which costs an addition */
}

/* ---- From packed to float ---------------------------------------------------------------- */

/* The two's complement code of `bits` bits at bit `shift` of each lane, as a float. */
INLINE vf field(vu word, int shift, int bits) {
#if defined __AVX512F__
    /* vpermps looks at the lowest four bits alone: one shift and one look-up. */
    const __m512 four = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    const __m512 three = _mm512_setr_ps(0, 1, 2, 3, -4, -3, -2, -1, 0, 1, 2, 3, -4, -3, -2, -1);

    if (bits < 8)
        return (vf)_mm512_permutexvar_ps((__m512i)(word >> shift), bits == 4 ? four : three);
    return (vf)_mm512_cvtepi32_ps((__m512i)((vi)(word << (24 - shift)) >> 24));
#else
    return __builtin_convertvector((vi)(word << (32 - bits - shift)) >> (32 - bits), vf);
#endif
}

/* Weights j of a step of 16 columns, for the VL rows that begin at `lane` of a block. */
INLINE vf weight(const uint8_t *codes, int64_t step, int half, int j, int lane, int bits) {
    const vu *words = (const vu *)(const void *)(codes + lane * 4);
    const int64_t pitch = FQ_CPU_BLOCK / VL; /* vectors from a word to the next */

    if (bits == 8)
        return field(words[(step * 4 + j / 4) * pitch], j % 4 * 8, 8);
    if (bits == 4)
        return field(words[(step * 2 + j / 8) * pitch], j % 4 * 8 + j % 8 / 4 * 4, 4);

    /* Two steps share three words; `half` is which of the two this is. */
    const int shift = j % 4 * 8 + j % 8 / 4 * 3;

    words += step / 2 * 3 * pitch;
    if (half == 0 || j < 8)
        return field(words[(half * 2 + j / 8) * pitch], shift, 3);
    return field((words[0] >> 6 & 0x03030303) | (words[pitch] >> 4 & 0x0c0c0c0c) |
                     (words[2 * pitch] >> 2 & 0x30303030),
                 shift, 3);
}

INLINE vf scale(const uint16_t *scales, enum fq_dtype type) {
    vh bits;

    memcpy(&bits, scales, sizeof bits);
    if (type == FQ_BF16)
        return (vf)(__builtin_convertvector(bits, vu) << 16);
#if defined __AVX512F__
    return (vf)_mm512_cvtph_ps((__m256i)bits);
#elif defined __F16C__
    return (vf)_mm256_cvtph_ps((__m128i)bits);
#else
    vf out;
    for (int i = 0; i < VL; i++)
        out[i] = fq_f16_to_f32(bits[i]);
    return out;
#endif
}

INLINE vf zero_point(const int8_t *zeros) {
    vb bytes;
    vf out;

    memcpy(&bytes, zeros, sizeof bytes);
    out = __builtin_convertvector(__builtin_convertvector(bytes, vi), vf);
    return out;
}

static void to_f32(float *out, const void *in, enum fq_dtype type, int64_t count) {
    int64_t i = 0;

    if (type == FQ_F32) {
        memcpy(out, in, (size_t)count * 4);
        return;
    }
    for (; i + VL <= count; i += VL)
        *(vf_unaligned *)(void *)(out + i) = scale((const uint16_t *)in + i, type);
    for (; i < count; i++)
        out[i] = fq_load(in, type, (size_t)i);
}

static void store_row(void *y, enum fq_dtype type, int64_t column, const float *values,
                      int64_t count) {
    int64_t i = 0;

#if defined __F16C__
    if (type == FQ_F16)
        for (; i + 8 <= count; i += 8)
            _mm_storeu_si128((__m128i *)(void *)((uint16_t *)y + column + i),
                             _mm256_cvtps_ph(_mm256_loadu_ps(values + i), 0));
#endif
    for (; i < count; i++)
        fq_store(y, (int)type, (size_t)(column + i), values[i]);
}

/* ---- decode ------------------------------------------------------------------------------ */

struct tile {
    const struct fq_cpu_weights *weights;
    const uint8_t *codes;
    const uint16_t *scales;
    const int8_t *zeros;
    const float *x, *x_sum;
    int64_t begin, end; /* steps of K */
    int lane;
};

INLINE void tile_step(const struct tile *tile, int64_t step, int half, vf (*sum)[NV], int mr,
                      int bits) {
    const float *x = tile->x + step * FQ_CPU_STEP;
    const int64_t pitch = tile->weights->k_padded;

#pragma GCC unroll 16
    for (int j = 0; j < FQ_CPU_STEP; j++) {
        vf w[NV];

        UNROLL for (int v = 0; v < NV; v++) w[v] =
            weight(tile->codes, step, half, j, tile->lane + v * VL, bits);
        UNROLL for (int m = 0; m < mr; m++) UNROLL for (int v = 0; v < NV; v++) sum[m][v] +=
            w[v] * broadcast(x[m * pitch + j]);
    }
}

INLINE void tile_run(const struct tile *tile, float *out, int mr, int bits) {
    const struct fq_cpu_weights *weights = tile->weights;
    const enum fq_dtype scale_type = weights->base.info.scale_type;
    const int64_t steps = weights->k_padded / FQ_CPU_STEP, group = weights->base.info.group;
    const int64_t first = tile->begin * FQ_CPU_STEP / group;
    vf total[MR][NV];

    UNROLL for (int m = 0; m < mr; m++) UNROLL for (int v = 0; v < NV; v++) total[m][v] = (vf){0};
    for (int64_t g = first < weights->groups ? first : weights->groups - 1, step = tile->begin;
         step < tile->end; g++) {
        const int64_t group_end = g + 1 == weights->groups ? steps : (g + 1) * group / FQ_CPU_STEP;
        const int64_t end = group_end < tile->end ? group_end : tile->end;
        const bool subtract = tile->zeros && end == group_end; /* once a group */
        const int64_t at = g * FQ_CPU_BLOCK + tile->lane;
        vf sum[MR][NV];

        UNROLL for (int m = 0; m < mr; m++) UNROLL for (int v = 0; v < NV; v++) sum[m][v] = (vf){0};
        if (bits == 3)
            for (; step < end; step++)
                if (step % 2)
                    tile_step(tile, step, 1, sum, mr, bits);
                else
                    tile_step(tile, step, 0, sum, mr, bits);
        else
            for (; step < end; step++)
                tile_step(tile, step, 0, sum, mr, bits);
        UNROLL for (int v = 0; v < NV; v++) {
            vf s = scale(tile->scales + at + v * VL, scale_type);
            vf z = subtract ? zero_point(tile->zeros + at + v * VL) : (vf){0};

            UNROLL for (int m = 0; m < mr; m++) {
                if (subtract)
                    sum[m][v] -= z * broadcast(tile->x_sum[m * weights->groups + g]);
                total[m][v] += s * sum[m][v];
            }
        }
    }
    UNROLL for (int m = 0; m < mr; m++) UNROLL for (int v = 0; v < NV; v++) *
        (vf_unaligned *)(void *)(out + m * FQ_CPU_BLOCK + tile->lane + v * VL) = total[m][v];
}

typedef void tile_function(const struct tile *tile, float *out);

#define TILE(bits, mr)                                                                             \
    static void tile_##bits##_##mr(const struct tile *tile, float *out) {                          \
        tile_run(tile, out, mr, bits);                                                             \
    }
TILE(8, 1)
TILE(4, 1)
TILE(3, 1)
TILE(8, 2)
TILE(4, 2)
TILE(3, 2)
#if MR == 4
TILE(8, 4)
TILE(4, 4)
TILE(3, 4)
#else
#define tile_8_4 NULL
#define tile_4_4 NULL
#define tile_3_4 NULL
#endif

static tile_function *tile_for(int bits, int mr) {
    static tile_function *const table[3][3] = {{tile_8_1, tile_8_2, tile_8_4},
                                               {tile_4_1, tile_4_2, tile_4_4},
                                               {tile_3_1, tile_3_2, tile_3_4}};

    return table[bits == 8 ? 0 : bits == 4 ? 1 : 2][mr / 2];
}

static void finish(const struct fq_cpu_job *job, int64_t block, int64_t row, int64_t rows,
                   float *values) {
    const struct fq_weights_info *info = &job->gemm->weights->info;
    int64_t column = block * FQ_CPU_BLOCK;
    int64_t count = info->n - column < FQ_CPU_BLOCK ? info->n - column : FQ_CPU_BLOCK;

    for (int64_t m = 0; m < rows; m++) {
        float *line = values + m * FQ_CPU_BLOCK;
        float *gate = job->operands > FQ_CPU_GATE ? line + rows * FQ_CPU_BLOCK : NULL;
        int64_t at = job->row + row + m;

        fq_cpu_epilogue(job->gemm, at, column, line, gate, count);
        store_row(fq_gemm_y_row(job->gemm, at), job->gemm->type, column, line, count);
    }
}

INLINE struct tile tile_of(const struct fq_cpu_weights *weights, int64_t block) {
    int64_t groups_at = block * weights->groups * FQ_CPU_BLOCK;

    return (struct tile){
        .weights = weights,
        .codes = weights->codes + block * weights->block_bytes,
        .scales = weights->scales + groups_at,
        .zeros = weights->zeros ? weights->zeros + groups_at : NULL,
    };
}

/* How many rows from one on are a tile. */
INLINE int tile_rows(const struct fq_cpu_job *job, int64_t row) {
    return job->rows - row >= MR ? MR : job->rows - row >= 2 ? 2 : 1;
}

/* values[operand][mr][64]: a tile's products with a block, over part `split` of K. */
static void run_tile(const struct fq_cpu_job *job, int64_t block, int64_t row, int mr,
                     int64_t split, int64_t splits, float *values) {
    tile_function *run = tile_for(job->gemm->weights->info.bits, mr);

    for (int i = 0; i < job->operands; i++) {
        const struct fq_cpu_operand *operand = &job->operand[i];
        struct tile tile = tile_of(operand->weights, block);
        const int64_t steps = tile.weights->k_padded / FQ_CPU_STEP;

        tile.x = job->x + row * tile.weights->k_padded;
        tile.x_sum = operand->x_sum ? operand->x_sum + row * tile.weights->groups : NULL;
        tile.begin = steps * split / splits;
        tile.end = steps * (split + 1) / splits;
        for (tile.lane = 0; tile.lane < FQ_CPU_BLOCK; tile.lane += NV * VL)
            run(&tile, values + i * mr * FQ_CPU_BLOCK);
    }
}

static void decode_block(const struct fq_cpu_job *job, int64_t block, int64_t end) {
    (void)end;
    for (int64_t row = 0; row < job->rows;) {
        const int mr = tile_rows(job, row);
        float values[FQ_CPU_OPERANDS * MR * FQ_CPU_BLOCK];

        run_tile(job, block, row, mr, 0, 1, values);
        finish(job, block, row, mr, values);
        row += mr;
    }
}

/* A part's products, every tile at its first row's place. */
static void decode_part(const struct fq_cpu_job *job, int64_t block, int64_t split, int64_t splits,
                        float *part) {
    for (int64_t row = 0; row < job->rows; row += tile_rows(job, row))
        run_tile(job, block, row, tile_rows(job, row), split, splits,
                 part + row * job->operands * FQ_CPU_BLOCK);
}

static void join_parts(const struct fq_cpu_job *job, int64_t block, float *values) {
    for (int64_t row = 0; row < job->rows; row += tile_rows(job, row))
        finish(job, block, row, tile_rows(job, row), values + row * job->operands * FQ_CPU_BLOCK);
}

static void decode(const struct fq_cpu_job *job) {
    fq_cpu_run_blocks(job, decode_block, decode_part, join_parts);
}

/* ---- panel ------------------------------------------------------------------------------- */

INLINE void dequantize_step(const struct tile *tile, int64_t step, int half, float *panel,
                            int bits) {
    const struct fq_cpu_weights *weights = tile->weights;
    int64_t g = step * FQ_CPU_STEP / weights->base.info.group;

    if (g >= weights->groups)
        g = weights->groups - 1; /* padding past K: its weights are zero */
    for (int lane = 0; lane < FQ_CPU_BLOCK; lane += VL) {
        int64_t at = g * FQ_CPU_BLOCK + lane;
        vf s = scale(tile->scales + at, weights->base.info.scale_type);
        vf z = tile->zeros ? zero_point(tile->zeros + at) : (vf){0};

#pragma GCC unroll 16
        for (int j = 0; j < FQ_CPU_STEP; j++)
            *(vf *)(void *)(panel + j * FQ_CPU_BLOCK + lane) =
                (weight(tile->codes, step, half, j, lane, bits) - z) * s;
    }
}

static void dequantize_panel(const struct tile *tile, int64_t k, int64_t columns, float *panel) {
    int bits = tile->weights->base.info.bits;

    for (int64_t i = 0; i < columns; i += FQ_CPU_STEP) {
        int64_t step = (k + i) / FQ_CPU_STEP;
        float *out = panel + i * FQ_CPU_BLOCK;

        if (bits == 8)
            dequantize_step(tile, step, 0, out, 8);
        else if (bits == 4)
            dequantize_step(tile, step, 0, out, 4);
        else if (step % 2)
            dequantize_step(tile, step, 1, out, 3);
        else
            dequantize_step(tile, step, 0, out, 3);
    }
}

/* values[mr][lanes] += x[mr][columns] · panel[columns][lanes] */
INLINE void multiply_tile(const float *x, int64_t pitch, const float *panel, int64_t columns,
                          float *values, int mr) {
    vf sum[PANEL_MR][PANEL_NV];

    UNROLL for (int m = 0; m < mr; m++) UNROLL for (int v = 0; v < PANEL_NV; v++) sum[m][v] =
        *(const vf *)(const void *)(values + m * FQ_CPU_BLOCK + v * VL);
    for (int64_t k = 0; k < columns; k++) {
        vf w[PANEL_NV];

        UNROLL for (int v = 0; v < PANEL_NV; v++) w[v] =
            *(const vf *)(const void *)(panel + k * FQ_CPU_BLOCK + v * VL);
        UNROLL for (int m = 0; m < mr; m++) {
            vf b = broadcast(x[m * pitch + k]);

            UNROLL for (int v = 0; v < PANEL_NV; v++) sum[m][v] += w[v] * b;
        }
    }
    UNROLL for (int m = 0; m < mr; m++) UNROLL for (int v = 0; v < PANEL_NV; v++) *
        (vf *)(void *)(values + m * FQ_CPU_BLOCK + v * VL) = sum[m][v];
}

static void multiply_panel(const float *x, int64_t pitch, const float *panel, int64_t columns,
                           float *values, int64_t rows) {
    for (int lane = 0; lane < FQ_CPU_BLOCK; lane += PANEL_NV * VL) {
        int64_t m = 0;

        for (; m + PANEL_MR <= rows; m += PANEL_MR)
            multiply_tile(x + m * pitch, pitch, panel + lane, columns,
                          values + m * FQ_CPU_BLOCK + lane, PANEL_MR);
        for (; m < rows; m++)
            multiply_tile(x + m * pitch, pitch, panel + lane, columns,
                          values + m * FQ_CPU_BLOCK + lane, 1);
    }
}

static void panel_block(const struct fq_cpu_job *job, int64_t block, float *panel) {
    float *values = panel + FQ_CPU_PANEL_K * FQ_CPU_BLOCK;
    const int64_t floats = job->rows * FQ_CPU_BLOCK;

    memset(values, 0, (size_t)(job->operands * floats) * sizeof *values);
    for (int i = 0; i < job->operands; i++) {
        const struct tile tile = tile_of(job->operand[i].weights, block);
        const int64_t k_padded = tile.weights->k_padded;

        for (int64_t k = 0; k < k_padded; k += FQ_CPU_PANEL_K) {
            int64_t left = k_padded - k;
            int64_t columns = left < FQ_CPU_PANEL_K ? left : FQ_CPU_PANEL_K;

            dequantize_panel(&tile, k, columns, panel);
            multiply_panel(job->x + k, k_padded, panel, columns, values + i * floats, job->rows);
        }
    }
    finish(job, block, 0, job->rows, values);
}

static void run_panels(const struct fq_cpu_job *job) {
    int64_t blocks = job->operand[FQ_CPU_MAIN].weights->blocks;
    size_t floats = fq_cpu_scratch_floats(job->rows, job->operands);

#pragma omp parallel for schedule(static) num_threads(job->threads) if (job->threads > 1)
    for (int64_t block = 0; block < blocks; block++) {
#ifdef _OPENMP
        int thread = omp_get_thread_num();
#else
        int thread = 0;
#endif
        panel_block(job, block, job->scratch + (size_t)thread * floats);
    }
}

static void dequantize(const struct fq_cpu_weights *weights, int64_t block, int64_t k,
                       int64_t columns, float *panel) {
    const struct tile tile = tile_of(weights, block);

    dequantize_panel(&tile, k, columns, panel);
}

const struct fq_cpu_kernels NAME(FQ_CPU_ISA) = {
    .name = TEXT(FQ_CPU_ISA),
    .decode = decode,
    .panel = run_panels,
    .to_f32 = to_f32,
    .dequantize = dequantize,
    .finish = finish,
};
