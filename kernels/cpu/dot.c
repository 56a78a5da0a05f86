/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The decode path where the processor has byte dot products (AVX512-VNNI).  fp32
 * arithmetic needs a conversion and an FMA for 16 weights; vpdpbusd multiplies 64
 * codes as they are.  X is in block fixed point (fixed.c): an accumulator a limb, and
 * limbs 0 and 1 are put together in int32.
 *
 * Compiled twice: avx512vnni for any such processor, avx512gfni for Intel's with GFNI, which
 * unpacks codes faster there and slower on AMD's, and is asked ahead for otherwise.
 *
 * A tile is 1 to 4 rows of X times some registers of rows of W: each register of
 * codes is unpacked once and multiplied with every limb of every row.
 */
#include "dot.h"
#include "fixed-decode.h"

#ifdef __GFNI__
#define SET   fq_cpu_avx512gfni
#define NAME  "avx512gfni"
#define PAGES 4
#else
#define SET   fq_cpu_avx512vnni
#define NAME  "avx512vnni"
#define PAGES 1
#endif

/* Asks for what lies behind a step: the pass-th of so many passes over it for its part, so that
 * memory is never idle. */
INLINE void prefetch_step(const struct block *block, int64_t step, int half, int bits, int pass,
                          int passes) {
    const int pitch = FQ_CPU_BLOCK * 4; /* bytes from a word to the next */
    const int words = bits == 3 ? 1 + (half == 0) : bits / 2;
    const int64_t first = bits == 3 ? step / 2 * 3 + half * 2 : step * words;
    const int begin = words * pass / passes, end = words * (pass + 1) / passes;

    prefetch(block->codes + (first + begin) * pitch, (end - begin) * pitch, block->codes_end,
             PAGES);
}

/* ---- The product ------------------------------------------------------------------------- */

/* sum + w · the four bytes at x, in every lane.  GCC 12 broadcasts x to a register of its own, and
 * the accumulators of a tile leave none to spare. */
INLINE __m512i dot(__m512i sum, __m512i w, const int8_t *x) {
    struct four {
        int8_t bytes[4];
    };

    __asm__("vpdpbusd %2%{1to16%}, %1, %0"
            : "+v"(sum)
            : "v"(w), "m"(*(const struct four *)(const void *)x));
    return sum;
}

/* Registers are live as short as can be: one of codes a row vector. */
INLINE void tile_step(const uint8_t *codes, const struct fq_cpu_fixed *fixed, int64_t step,
                      int half, __m512i (*sum)[4][FQ_CPU_LIMBS], int mr, int nv, int bits,
                      int limbs) {
    UNROLL for (int i = 0; i < 4; i++) {
        __m512i w[4];

        UNROLL for (int v = 0; v < nv; v++) w[v] =
            unpack(codes + v * LANES * 4, step, half, i, bits);
        UNROLL for (int m = 0; m < mr; m++) {
            const int8_t *x = fixed[m].limbs + step * (FQ_CPU_STEP * FQ_CPU_LIMBS) + i * 4;

            UNROLL for (int l = 0; l < limbs; l++) UNROLL for (int v = 0; v < nv; v++)
                sum[m][v][l] = dot(sum[m][v][l], w[v], x + l * FQ_CPU_STEP);
        }
    }
}

/* values[m][lane..] += one chunk over its unit, for mr rows of X from `first` on and nv registers
 * of rows of W: the pass-th of so many passes over the chunk. */
INLINE void tile_part(const struct block *block, const struct fq_cpu_span *span, int first,
                      int lane, float *values, int mr, int nv, int bits, int limbs, int pass,
                      int passes) {
    const struct fq_cpu_fixed *fixed = block->fixed + first;
    __m512i sum[MR][4][FQ_CPU_LIMBS];

    values += first * FQ_CPU_BLOCK;
    UNROLL for (int m = 0; m < mr; m++) UNROLL for (int v = 0; v < nv; v++) {
        const struct fq_cpu_chunk *chunk = &fixed[m].chunks[span->chunks - 1];

        sum[m][v][0] = _mm512_set1_epi32(chunk->offset[0]);
        sum[m][v][1] = _mm512_setzero_si512();
        sum[m][v][2] = _mm512_set1_epi32(chunk->offset[1]);
    }
    for (int64_t step = span->begin / FQ_CPU_STEP; step < span->end / FQ_CPU_STEP; step++) {
        if (bits == 3 && step % 2) {
            prefetch_step(block, step, 1, bits, pass, passes);
            tile_step(block->codes + lane * 4, fixed, step, 1, sum, mr, nv, bits, limbs);
        } else {
            prefetch_step(block, step, 0, bits, pass, passes);
            tile_step(block->codes + lane * 4, fixed, step, 0, sum, mr, nv, bits, limbs);
        }
    }
    UNROLL for (int v = 0; v < nv; v++) {
        const int64_t at = span->group * FQ_CPU_BLOCK + lane + v * LANES;
        __m512 scale = scale_of(block->scales + at, block->weights->base.info.scale_type);
        __m512 zero = _mm512_setzero_ps();

        if (block->zeros)
            zero = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
                _mm_loadu_si128((const __m128i *)(const void *)(block->zeros + at))));
        UNROLL for (int m = 0; m < mr; m++) {
            const struct fq_cpu_chunk *chunk = &fixed[m].chunks[span->chunks - 1];
            float *out = values + m * FQ_CPU_BLOCK + lane + v * LANES;
            __m512 product = _mm512_cvtepi32_ps(
                _mm512_add_epi32(sum[m][v][0], _mm512_slli_epi32(sum[m][v][1], 8)));

            if (limbs == 3)
                product = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m][v][2]), _mm512_set1_ps(65536),
                                          product);
            if (block->zeros)
                product = _mm512_fnmadd_ps(zero, _mm512_set1_ps(chunk->sum), product);
            _mm512_store_ps(out, _mm512_fmadd_ps(product, scale, _mm512_load_ps(out)));
        }
    }
}

/* values[mr][64] += one chunk over its unit.  The accumulators of three rows of two limbs, or two
 * of three, and a whole block fill the register file.  Of more rows, either half of the rows goes
 * first, and the others find the codes in the first-level cache: 8 bits, whose lines are then read
 * in their order.  Or half of the block: the fewer bits, where unpacking twice costs more. */
INLINE void tile_chunk(const struct block *block, const struct fq_cpu_span *span, float *values,
                       int mr, int bits, int limbs) {
    if (mr <= (limbs == 2 ? 3 : 2)) {
        tile_part(block, span, 0, 0, values, mr, 4, bits, limbs, 0, 1);
    } else if (bits == 8) {
        tile_part(block, span, 0, 0, values, 2, 4, bits, limbs, 0, 2);
        tile_part(block, span, 2, 0, values, mr - 2, 4, bits, limbs, 1, 2);
    } else {
        tile_part(block, span, 0, 0, values, mr, 2, bits, limbs, 0, 2);
        tile_part(block, span, 0, 2 * LANES, values, mr, 2, bits, limbs, 1, 2);
    }
}

static void panel(const struct fq_cpu_job *job) {
    FALLBACK.panel(job);
}

const struct fq_cpu_kernels SET = {
    .name = NAME,
    .decode = decode,
    .panel = panel,
    .to_f32 = to_f32,
    .to_fixed = fq_cpu_to_fixed,
    .limb_bytes = FQ_CPU_LIMBS,
};
