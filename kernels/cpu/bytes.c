/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The decode path where a processor has byte dot products, but not AVX-512: AVX-VNNI, as laptops
 * and small servers have it.  The arithmetic is dot.c's: X in block fixed point of two or three
 * bytes (bytes-fixed.c), an accumulator a limb, limbs 0 and 1 put together in int32.
 *
 * A register is four columns of 8 rows of W.
 */
#define LIMBS_FEW 2
#define LIMBS_ALL FQ_CPU_LIMBS
#include "avx2.h"
#include "fixed-decode.h"

#define NV 4 /* registers of rows of W in a tile, at most */

/* ---- Codes to bytes ---------------------------------------------------------------------- */

/* Columns 4i to 4i + 3 of a step for 8 rows, 2^(bits-1) more than they are; 3 bits: `half` is which
 * step of a pair it is. */
INLINE __m256i unpack(const uint8_t *codes, int64_t step, int half, int i, int bits) {
    const int pitch = FQ_CPU_BLOCK * 4; /* bytes from a word to the next */
    __m256i words;

    if (bits == 8)
        return _mm256_xor_si256(load(codes + (step * 4 + i) * pitch), _mm256_set1_epi8((char)0x80));
    words = word_of_pairs(codes, step, half, i / 2, bits);
    return _mm256_and_si256(i % 2 ? _mm256_srli_epi32(words, bits) : words,
                            _mm256_set1_epi8((char)((1 << bits) - 1)));
}

/* ---- The product ------------------------------------------------------------------------- */

/* sum + w · the four bytes of x, in every lane; in assembly as broadcast(). */
INLINE __m256i dot(__m256i sum, __m256i w, __m256i x) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x));
    return sum;
}

/* Limb l of columns 4i to 4i + 3 of a step, in every lane. */
INLINE __m256i limb_of(const struct fq_cpu_fixed *fixed, int64_t step, int l, int i) {
    return broadcast(fixed->limbs + step * (FQ_CPU_STEP * FQ_CPU_LIMBS) + l * FQ_CPU_STEP + i * 4);
}

INLINE void tile_step(const uint8_t *codes, const struct fq_cpu_fixed *fixed, int64_t step,
                      int half, __m256i (*sum)[NV][FQ_CPU_LIMBS], int mr, int nv, int bits,
                      int limbs) {
    UNROLL for (int i = 0; i < 4; i++) {
        __m256i w[NV];

        if (mr == 1) { /* whose codes would take the registers of sums */
            __m256i limb[FQ_CPU_LIMBS];

            UNROLL for (int l = 0; l < limbs; l++) limb[l] = limb_of(fixed, step, l, i);
            UNROLL for (int v = 0; v < nv; v++) {
                w[0] = unpack(codes + v * LANES * 4, step, half, i, bits);
                UNROLL for (int l = 0; l < limbs; l++) sum[0][v][l] =
                    dot(sum[0][v][l], w[0], limb[l]);
            }
            continue;
        }
        UNROLL for (int v = 0; v < nv; v++) w[v] =
            unpack(codes + v * LANES * 4, step, half, i, bits);
        UNROLL for (int m = 0; m < mr; m++) UNROLL for (int l = 0; l < limbs; l++) {
            const __m256i limb = limb_of(&fixed[m], step, l, i);

            UNROLL for (int v = 0; v < nv; v++) sum[m][v][l] = dot(sum[m][v][l], w[v], limb);
        }
    }
}

/* values[m][lane..] += one chunk over its unit, for mr rows of X from `first` on and nv registers
 * of rows of W. */
INLINE void tile_part(const struct block *block, const struct fq_cpu_span *span, int first,
                      int lane, float *values, int mr, int nv, int bits, int limbs) {
    const struct fq_cpu_fixed *fixed = block->fixed + first;
    const int64_t begin = span->begin / FQ_CPU_STEP, end = span->end / FQ_CPU_STEP;
    const int step_bytes = FQ_CPU_BLOCK * FQ_CPU_STEP * bits / 8;
    const int share = step_bytes * nv * LANES / FQ_CPU_BLOCK;
    const uint8_t *part = part_of(block, begin * step_bytes, (end - begin) * step_bytes, lane);
    __m256i sum[MR][NV][FQ_CPU_LIMBS];

    UNROLL for (int m = 0; m < mr; m++) UNROLL for (int v = 0; v < nv; v++) {
        const struct fq_cpu_chunk *chunk = &fixed[m].chunks[span->chunks - 1];

        sum[m][v][0] = _mm256_set1_epi32(chunk->offset[0]);
        sum[m][v][1] = _mm256_setzero_si256();
        sum[m][v][2] = _mm256_set1_epi32(chunk->offset[1]);
    }
    for (int64_t step = begin; step < end; step++, part += share) {
        if (first == 0) /* 3 bits: beside a branch GCC 12 keeps fewer sums in registers */
            prefetch(part, share, block->codes_end, bits == 3 ? 1 : 4);
        if (bits == 3 && step % 2)
            tile_step(block->codes + lane * 4, fixed, step, 1, sum, mr, nv, bits, limbs);
        else
            tile_step(block->codes + lane * 4, fixed, step, 0, sum, mr, nv, bits, limbs);
    }
    UNROLL for (int v = 0; v < nv; v++) {
        const struct row_terms terms = row_terms_of(block, span, lane + v * LANES);

        UNROLL for (int m = 0; m < mr; m++) {
            __m256 product = _mm256_cvtepi32_ps(
                _mm256_add_epi32(sum[m][v][0], _mm256_slli_epi32(sum[m][v][1], 8)));

            if (limbs == LIMBS_ALL)
                product = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[m][v][2]), _mm256_set1_ps(65536),
                                          product);
            add_product(values + (first + m) * FQ_CPU_BLOCK + lane + v * LANES, product, &terms,
                        fixed[m].chunks[span->chunks - 1].sum);
        }
    }
}

/* As many registers of rows of W as the sums of a tile leave room for: twelve sums at most, of 16
 * registers. */
INLINE void tile_rows(const struct block *block, const struct fq_cpu_span *span, int first,
                      float *values, int mr, int bits, int limbs) {
    const int sums = mr * limbs;
    const int nv = sums <= 3 ? 4 : sums <= 6 ? 2 : 1;

    for (int lane = 0; lane < FQ_CPU_BLOCK; lane += nv * LANES)
        tile_part(block, span, first, lane, values, mr, nv, bits, limbs);
}

/* Four rows of two limbs leave room for one register, where each product wants a register of X of
 * its own; of 4 bits, three rows and then one are faster. */
INLINE void tile_chunk(const struct block *block, const struct fq_cpu_span *span, float *values,
                       int mr, int bits, int limbs) {
    if (mr == 4 && bits == 4 && limbs == LIMBS_FEW) {
        tile_rows(block, span, 0, values, 3, bits, limbs);
        tile_rows(block, span, 3, values, 1, bits, limbs);
    } else {
        tile_rows(block, span, 0, values, mr, bits, limbs);
    }
}

const struct fq_cpu_kernels fq_cpu_avxvnni = {
    .name = "avxvnni",
    .decode = decode,
    .panel = panel,
    .to_f32 = to_f32,
    .to_fixed = fq_cpu_to_fixed_bytes,
    .limb_bytes = FQ_CPU_LIMBS,
};
