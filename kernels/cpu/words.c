/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The decode path of AVX2, which has no byte dot products that add up in int32,
 * but vpmaddwd: 16 products of 16-bit integers, added in pairs.  X is in block
 * fixed point of one or two 16-bit limbs (words-fixed.c), an accumulator each.
 *
 * A register of words is 8 rows of W.  A pair is two columns of each, as 16-bit
 * integers; with the words of cpu.h pair p is, by shifts and a mask alone,
 *
 *     8 bits:  columns p, p + 2 of the word's 4, signed
 *     4 bits:  0,2 | 4,6 | 1,3 | 5,7 of its 8, plus 8
 *     3 bits:  likewise, plus 4; the fourth word of two steps is in three others
 *
 * and the limbs of X lie in the same order.
 */
#define LIMBS_FEW 1
#define LIMBS_ALL 2
#include "avx2.h"
#include "fixed-decode.h"

#define NV 8 /* registers of rows of W in a tile, at most: all of a block */

/* ---- Codes to 16-bit integers ------------------------------------------------------------ */

/* Word i of a step for 8 rows, ready for pair_of; 3 bits: `half` is which step of two it is. */
INLINE __m256i word_of(const uint8_t *codes, int64_t step, int half, int i, int bits) {
    if (bits == 8)
        return load(codes + (step * 4 + i) * FQ_CPU_BLOCK * 4);
    return word_of_pairs(codes, step, half, i, bits);
}

INLINE __m256i pair_of(__m256i word, int p, int bits) {
    if (bits == 8)
        return _mm256_srai_epi16(p ? word : _mm256_slli_epi16(word, 8), 8);
    if (p > 0)
        word = _mm256_srli_epi16(word, p / 2 * 8 + p % 2 * bits);
    return p == 3 && bits == 4 ? word : _mm256_and_si256(word, _mm256_set1_epi16((1 << bits) - 1));
}

/* ---- The product ------------------------------------------------------------------------- */

/* sum + w · x, over the pair of every lane.  As broadcast() in assembly to keep the order: GCC 12
 * computes the products of a step first, and then has no register left for a sum. */
INLINE __m256i dot(__m256i sum, __m256i w, __m256i x) {
    __m256i product;

    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
            : "+x"(sum), "=&x"(product)
            : "x"(w), "x"(x));
    return sum;
}

INLINE void tile_step(const uint8_t *codes, const struct fq_cpu_fixed *fixed, int64_t step,
                      int half, __m256i (*sum)[NV][LIMBS_ALL], int mr, int nv, int bits,
                      int limbs) {
    const int words = bits == 8 ? 4 : 2, pairs = bits == 8 ? 2 : 4; /* of a word */

    UNROLL for (int i = 0; i < words; i++) {
        __m256i word[NV];

        if (nv == NV) { /* whose words would take the registers of sums */
            UNROLL for (int p = 0; p < pairs; p++) {
                const __m256i x = broadcast(fixed->limbs + step * (FQ_CPU_STEP * LIMBS_ALL * 2) +
                                            (i * pairs + p) * 4);

                UNROLL for (int v = 0; v < NV; v++) sum[0][v][0] =
                    dot(sum[0][v][0],
                        pair_of(word_of(codes + v * LANES * 4, step, half, i, bits), p, bits), x);
            }
            continue;
        }

        UNROLL for (int v = 0; v < nv; v++) word[v] =
            word_of(codes + v * LANES * 4, step, half, i, bits);
        UNROLL for (int p = 0; p < pairs; p++) {
            __m256i w[NV];

            UNROLL for (int v = 0; v < nv; v++) w[v] = pair_of(word[v], p, bits);
            UNROLL for (int m = 0; m < mr; m++) UNROLL for (int l = 0; l < limbs; l++) {
                const __m256i x = broadcast(fixed[m].limbs + step * (FQ_CPU_STEP * LIMBS_ALL * 2) +
                                            l * FQ_CPU_STEP * 2 + (i * pairs + p) * 4);

                UNROLL for (int v = 0; v < nv; v++) sum[m][v][l] = dot(sum[m][v][l], w[v], x);
            }
        }
    }
}

/* values[m][lane..] += one chunk over its unit, for mr rows of X and nv registers of rows of W. */
INLINE void tile_part(const struct block *block, const struct fq_cpu_span *span, int lane,
                      float *values, int mr, int nv, int bits, int limbs) {
    const struct fq_cpu_fixed *fixed = block->fixed;
    const int64_t begin = span->begin / FQ_CPU_STEP, end = span->end / FQ_CPU_STEP;
    const int step_bytes = FQ_CPU_BLOCK * FQ_CPU_STEP * bits / 8;
    const int share = step_bytes * nv * LANES / FQ_CPU_BLOCK;
    const int64_t bytes = (end - begin) * step_bytes;
    const uint8_t *part = part_of(block, begin * step_bytes, bytes, lane);
    __m256i sum[MR][NV][LIMBS_ALL];

    UNROLL for (int m = 0; m < mr; m++) UNROLL for (int v = 0; v < nv; v++)
        UNROLL for (int l = 0; l < limbs; l++) sum[m][v][l] =
            _mm256_set1_epi32(fixed[m].chunks[span->chunks - 1].offset[l]);
    for (int64_t step = begin; step < end; step++, part += share) {
        prefetch(part, share, block->codes_end, 1);
        if (bits == 3 && step % 2)
            tile_step(block->codes + lane * 4, fixed, step, 1, sum, mr, nv, bits, limbs);
        else
            tile_step(block->codes + lane * 4, fixed, step, 0, sum, mr, nv, bits, limbs);
    }
    UNROLL for (int v = 0; v < nv; v++) {
        const struct row_terms terms = row_terms_of(block, span, lane + v * LANES);

        UNROLL for (int m = 0; m < mr; m++) {
            __m256 product = _mm256_cvtepi32_ps(sum[m][v][0]);

            if (limbs == LIMBS_ALL)
                product = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[m][v][1]), _mm256_set1_ps(65536),
                                          product);
            add_product(values + m * FQ_CPU_BLOCK + lane + v * LANES, product, &terms,
                        fixed[m].chunks[span->chunks - 1].sum);
        }
    }
}

/* Of the 16 registers eight at most are sums; unpacking fewer bits takes some more. */
INLINE void tile_chunk(const struct block *block, const struct fq_cpu_span *span, float *values,
                       int mr, int bits, int limbs) {
    const int sums = mr * limbs;
    const int nv = sums == 1 && bits == 8                  ? 8
                   : sums == 1 || (bits == 8 && sums == 2) ? 4
                   : sums <= 4                             ? 2
                                                           : 1;

    for (int lane = 0; lane < FQ_CPU_BLOCK; lane += nv * LANES)
        tile_part(block, span, lane, values, mr, nv, bits, limbs);
}

const struct fq_cpu_kernels fq_cpu_avx2 = {
    .name = "avx2",
    .decode = decode,
    .panel = panel,
    .to_f32 = to_f32,
    .to_fixed = fq_cpu_to_fixed_words,
    .limb_bytes = 2 * LIMBS_ALL,
};
