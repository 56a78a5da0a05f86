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
 *     3 bits:  p, p + 4 of 8, plus 4: of the low 24 bits of a word, or of the
 *              three words' top bytes
 *
 * and the limbs of X lie in the same order.
 */
#define LANES     8
#define LIMBS_FEW 1
#define LIMBS_ALL 2
#define FALLBACK  fq_cpu_avx2_float
#include "fixed-decode.h"

#include <immintrin.h>

/* Bytes of codes that are asked for ahead of their use; a chunk's bytes where it has more. */
#define AHEAD 4096

#define NV 8 /* registers of rows of W in a tile, at most: all of a block */

/* ---- Codes to 16-bit integers ------------------------------------------------------------ */

INLINE __m256i load(const uint8_t *codes) {
    return _mm256_load_si256((const __m256i *)(const void *)codes);
}

/* Eight 3-bit codes of the low 24 bits of each lane: four in either half of it, plus 4. */
INLINE __m256i halves_of_three(__m256i words) {
    const __m256i low = _mm256_and_si256(words, _mm256_set1_epi32(0x00000fff));
    const __m256i high =
        _mm256_and_si256(_mm256_slli_epi32(words, 4), _mm256_set1_epi32(0x0fff0000));

    return _mm256_xor_si256(_mm256_or_si256(low, high), _mm256_set1_epi16(04444));
}

/* The top bytes of three words, the first one's lowest. */
INLINE __m256i top_of_three(const uint8_t *codes, int pitch) {
    const __m256i second = _mm256_srli_epi32(load(codes + pitch), 16);
    const __m256i third = _mm256_srli_epi32(load(codes + 2 * pitch), 8);

    return _mm256_or_si256(_mm256_srli_epi32(load(codes), 24),
                           _mm256_or_si256(_mm256_and_si256(second, _mm256_set1_epi32(0xff00)),
                                           _mm256_and_si256(third, _mm256_set1_epi32(0xff0000))));
}

/* Word i of a step for 8 rows, ready for pair_of; 3 bits: `half` is which step of two it is. */
INLINE __m256i word_of(const uint8_t *codes, int64_t step, int half, int i, int bits) {
    const int pitch = FQ_CPU_BLOCK * 4; /* bytes from a word to the next */

    if (bits == 8)
        return load(codes + (step * 4 + i) * pitch);
    if (bits == 4)
        return _mm256_xor_si256(load(codes + (step * 2 + i) * pitch), _mm256_set1_epi8((char)0x88));
    codes += step / 2 * 3 * pitch;
    return halves_of_three(half && i ? top_of_three(codes, pitch)
                                     : load(codes + (half * 2 + i) * pitch));
}

INLINE __m256i pair_of(__m256i word, int p, int bits) {
    if (bits == 8)
        return _mm256_srai_epi16(p ? word : _mm256_slli_epi16(word, 8), 8);
    if (p > 0)
        word = _mm256_srli_epi16(word, p * bits);
    return p == 3 ? word : _mm256_and_si256(word, _mm256_set1_epi16((1 << bits) - 1));
}

/* Asks for the lines of `bytes` of codes. */
INLINE void prefetch(const uint8_t *codes, int bytes) {
    UNROLL for (int at = 0; at < bytes; at += 64)
        _mm_prefetch((const char *)codes + at, _MM_HINT_T0);
}

/* ---- The product ------------------------------------------------------------------------- */

/* The pair at x in every lane. */
INLINE __m256i broadcast(const int8_t *x) {
    struct four {
        int8_t bytes[4];
    };
    __m256i pairs;

    __asm__("vpbroadcastd %1, %0" : "=x"(pairs) : "m"(*(const struct four *)(const void *)x));
    return pairs;
}

/* sum + w · x, over the pair of every lane.  As broadcast() in assembly to keep the order: GCC 12
 * computes the products of a step first, and then has no register left for a sum. */
INLINE __m256i dot(__m256i sum, __m256i w, __m256i x) {
    __m256i product;

    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
            : "+x"(sum), "=&x"(product)
            : "x"(w), "x"(x));
    return sum;
}

INLINE __m256 scale_of(const uint16_t *scales, enum fq_dtype type) {
    const __m128i bits = _mm_loadu_si128((const __m128i *)(const void *)scales);

    if (type == FQ_BF16)
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    return _mm256_cvtph_ps(bits);
}

INLINE __m256 zero_of(const int8_t *zeros) {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)zeros)));
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
    /* Each of the passes that lanes make over a chunk asks for a part of the lines of a later one,
     * in their order.  All of them at once would be more than a core can wait for. */
    const uint8_t *next = block->codes + begin * step_bytes + (bytes > AHEAD ? bytes : AHEAD) +
                          bytes * lane / FQ_CPU_BLOCK;
    __m256i sum[MR][NV][LIMBS_ALL];

    UNROLL for (int m = 0; m < mr; m++) UNROLL for (int v = 0; v < nv; v++)
        UNROLL for (int l = 0; l < limbs; l++) sum[m][v][l] =
            _mm256_set1_epi32(fixed[m].chunks[span->chunks - 1].offset[l]);
    for (int64_t step = begin; step < end; step++, next += share) {
        prefetch(next, share);
        if (bits == 3 && step % 2)
            tile_step(block->codes + lane * 4, fixed, step, 1, sum, mr, nv, bits, limbs);
        else
            tile_step(block->codes + lane * 4, fixed, step, 0, sum, mr, nv, bits, limbs);
    }
    UNROLL for (int v = 0; v < nv; v++) {
        const int64_t at = span->group * FQ_CPU_BLOCK + lane + v * LANES;
        const __m256 scale = scale_of(block->scales + at, block->weights->base.info.scale_type);
        const __m256 zero = block->zeros ? zero_of(block->zeros + at) : _mm256_setzero_ps();

        UNROLL for (int m = 0; m < mr; m++) {
            float *out = values + m * FQ_CPU_BLOCK + lane + v * LANES;
            __m256 product = _mm256_cvtepi32_ps(sum[m][v][0]);

            if (limbs == LIMBS_ALL)
                product = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[m][v][1]), _mm256_set1_ps(65536),
                                          product);
            if (block->zeros)
                product = _mm256_fnmadd_ps(
                    zero, _mm256_set1_ps(fixed[m].chunks[span->chunks - 1].sum), product);
            _mm256_store_ps(out, _mm256_fmadd_ps(product, scale, _mm256_load_ps(out)));
        }
    }
}

INLINE void end_segment(const struct block *block, int64_t segment, float *part, float *values,
                        int mr) {
    for (int m = 0; m < mr; m++) {
        const __m256 unit = _mm256_set1_ps(block->fixed[m].segments[segment].unit);

        for (int lane = 0; lane < FQ_CPU_BLOCK; lane += LANES) {
            float *out = values + m * FQ_CPU_BLOCK + lane, *in = part + m * FQ_CPU_BLOCK + lane;

            _mm256_store_ps(out, _mm256_fmadd_ps(_mm256_load_ps(in), unit, _mm256_load_ps(out)));
            _mm256_store_ps(in, _mm256_setzero_ps());
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

static void panel(const struct fq_cpu_job *job) {
    fq_cpu_avx2_float.panel(job);
}

static void to_f32(float *out, const void *in, enum fq_dtype type, int64_t count) {
    fq_cpu_avx2_float.to_f32(out, in, type, count);
}

const struct fq_cpu_kernels fq_cpu_avx2 = {
    .name = "avx2",
    .decode = decode,
    .panel = panel,
    .to_f32 = to_f32,
    .to_fixed = fq_cpu_to_fixed_words,
    .limb_bytes = 2 * LIMBS_ALL,
};
