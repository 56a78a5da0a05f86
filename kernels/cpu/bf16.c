/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Many rows of bf16 where the processor multiplies bf16 (AVX512-BF16): vdpbf16ps
 * does 32 products where an FMA does 16, and X needs no conversion.  A panel of
 * W is dequantized as for fp32 (kernels.c), a few columns at a time in the
 * first-level cache, and rounded to bf16 there: 2^-9 of each weight, as much as
 * the rounding of Y.  Few rows go the way of dot.c.
 *
 * The bf16 panel, one vector a pair of columns of 16 rows of W:
 *
 *     [columns / 2][64 rows][2]
 */
#include "cpu.h"

#include <immintrin.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define INLINE  static inline __attribute__((always_inline))
#define UNROLL  _Pragma("GCC unroll 8")
#define LANES   16
#define NV      4  /* registers of rows of W in a tile: all of a block */
#define MR      6  /* and rows of X: 24 accumulators */
#define COLUMNS 32 /* dequantized to fp32 at once: 8 KiB */

/* fp32 panel[columns][64] to bf16 pairs. */
static void round_panel(const float *panel, int64_t columns, uint16_t *out) {
    const __m512i pairs =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);

    for (int64_t k = 0; k < columns; k += 2, panel += 2 * FQ_CPU_BLOCK)
        for (int lane = 0; lane < FQ_CPU_BLOCK; lane += LANES, out += 2 * LANES) {
            __m512 first = _mm512_load_ps(panel + lane);
            __m512 second = _mm512_load_ps(panel + FQ_CPU_BLOCK + lane);
            __m512bh both = _mm512_cvtne2ps_pbh(second, first);

            _mm512_store_si512(out, _mm512_permutexvar_epi16(pairs, (__m512i)both));
        }
}

/* values[mr][64] += x[mr][columns] · panel */
INLINE void multiply_tile(const uint16_t *x, int64_t pitch, const uint16_t *panel, int64_t columns,
                          float *values, int mr) {
    __m512 sum[MR][NV];

    UNROLL for (int m = 0; m < mr; m++) UNROLL for (int v = 0; v < NV; v++) sum[m][v] =
        _mm512_load_ps(values + m * FQ_CPU_BLOCK + v * LANES);
    for (int64_t k = 0; k < columns; k += 2, panel += 2 * FQ_CPU_BLOCK) {
        __m512bh w[NV];

        UNROLL for (int v = 0; v < NV; v++) w[v] =
            (__m512bh)_mm512_load_si512(panel + v * 2 * LANES);
        UNROLL for (int m = 0; m < mr; m++) {
            int32_t pair;

            memcpy(&pair, x + m * pitch + k, sizeof pair);
            UNROLL for (int v = 0; v < NV; v++) sum[m][v] =
                _mm512_dpbf16_ps(sum[m][v], w[v], (__m512bh)_mm512_set1_epi32(pair));
        }
    }
    UNROLL for (int m = 0; m < mr; m++) UNROLL for (int v = 0; v < NV; v++)
        _mm512_store_ps(values + m * FQ_CPU_BLOCK + v * LANES, sum[m][v]);
}

static void multiply_panel(const uint16_t *x, int64_t pitch, const uint16_t *panel, int64_t columns,
                           float *values, int64_t rows) {
    int64_t m = 0;

    for (; m + MR <= rows; m += MR)
        multiply_tile(x + m * pitch, pitch, panel, columns, values + m * FQ_CPU_BLOCK, MR);
    for (; m + 2 <= rows; m += 2)
        multiply_tile(x + m * pitch, pitch, panel, columns, values + m * FQ_CPU_BLOCK, 2);
    if (m < rows)
        multiply_tile(x + m * pitch, pitch, panel, columns, values + m * FQ_CPU_BLOCK, 1);
}

static void panel_block(const struct fq_cpu_job *job, int64_t block, float *scratch) {
    uint16_t *panel = (uint16_t *)(void *)scratch;
    float *values = scratch + FQ_CPU_PANEL_K * FQ_CPU_BLOCK;
    const int64_t floats = job->rows * FQ_CPU_BLOCK;
    _Alignas(64) float few[COLUMNS * FQ_CPU_BLOCK];

    memset(values, 0, (size_t)(job->operands * floats) * sizeof *values);
    for (int i = 0; i < job->operands; i++) {
        const struct fq_cpu_weights *weights = job->operand[i].weights;

        for (int64_t k = 0; k < weights->k_padded; k += FQ_CPU_PANEL_K) {
            int64_t left = weights->k_padded - k;
            int64_t columns = left < FQ_CPU_PANEL_K ? left : FQ_CPU_PANEL_K;

            for (int64_t at = 0; at < columns; at += COLUMNS) {
                fq_cpu_avx512.dequantize(weights, block, k + at, COLUMNS, few);
                round_panel(few, COLUMNS, panel + at * FQ_CPU_BLOCK);
            }
            multiply_panel(job->x_bf16 + k, weights->k_padded, panel, columns, values + i * floats,
                           job->rows);
        }
    }
    fq_cpu_avx512.finish(job, block, 0, job->rows, values);
}

static void panel_bf16(const struct fq_cpu_job *job) {
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

static void decode(const struct fq_cpu_job *job) {
    fq_cpu_byte_products()->decode(job);
}

static void panel(const struct fq_cpu_job *job) {
    fq_cpu_avx512.panel(job);
}

static void to_f32(float *out, const void *in, enum fq_dtype type, int64_t count) {
    fq_cpu_avx512.to_f32(out, in, type, count);
}

const struct fq_cpu_kernels fq_cpu_avx512bf16 = {
    .name = "avx512bf16",
    .decode = decode,
    .panel = panel,
    .panel_bf16 = panel_bf16,
    .to_f32 = to_f32,
    .to_fixed = fq_cpu_to_fixed,
    .limb_bytes = FQ_CPU_LIMBS,
};
