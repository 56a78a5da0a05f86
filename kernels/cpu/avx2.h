/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Decode in fixed point with registers of eight rows of W: what words.c and bytes.c do alike.
 */
#ifndef FQ_KERNELS_CPU_AVX2_H
#define FQ_KERNELS_CPU_AVX2_H

#define LANES    8
#define FALLBACK fq_cpu_avx2_float
#include "block.h"

#include <immintrin.h>

INLINE __m256i load(const uint8_t *codes) {
    return _mm256_load_si256((const __m256i *)(const void *)codes);
}

/* Word `word` of a step, whose codes are two in each byte, 2^(bits-1) more than they are; 3 bits:
 * `half` is which step of a pair it is, and the pair's fourth word is in the three others.  What is
 * left of a byte is anything. */
INLINE __m256i word_of_pairs(const uint8_t *codes, int64_t step, int half, int word, int bits) {
    const int pitch = FQ_CPU_BLOCK * 4; /* bytes from a word to the next */
    __m256i words;

    if (bits == 4)
        return _mm256_xor_si256(load(codes + (step * 2 + word) * pitch),
                                _mm256_set1_epi8((char)0x88));
    codes += step / 2 * 3 * pitch;
    if (half && word) {
        const __m256i first = _mm256_srli_epi32(load(codes), 6);
        const __m256i second = _mm256_srli_epi32(load(codes + pitch), 4);
        const __m256i third = _mm256_srli_epi32(load(codes + 2 * pitch), 2);

        words = _mm256_or_si256(_mm256_and_si256(first, _mm256_set1_epi8(0x03)),
                                _mm256_or_si256(_mm256_and_si256(second, _mm256_set1_epi8(0x0c)),
                                                _mm256_and_si256(third, _mm256_set1_epi8(0x30))));
    } else {
        words = load(codes + (half * 2 + word) * pitch);
    }
    return _mm256_xor_si256(words, _mm256_set1_epi8(0x24));
}

/* The four bytes at x in every lane.  In assembly to keep the order: GCC 12 computes the products
 * of a step first, and then has no register left for a sum. */
INLINE __m256i broadcast(const int8_t *x) {
    struct four {
        int8_t bytes[4];
    };
    __m256i lanes;

    __asm__("vpbroadcastd %1, %0" : "=x"(lanes) : "m"(*(const struct four *)(const void *)x));
    return lanes;
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

/* What a chunk's products of 8 rows of W are scaled by. */
struct row_terms {
    __m256 scale, zero;
    bool zeros; /* whether there are zero points */
};

INLINE struct row_terms row_terms_of(const struct block *block, const struct fq_cpu_span *span,
                                     int lane) {
    const int64_t at = span->group * FQ_CPU_BLOCK + lane;

    return (struct row_terms){
        .scale = scale_of(block->scales + at, block->weights->base.info.scale_type),
        .zero = block->zeros ? zero_of(block->zeros + at) : _mm256_setzero_ps(),
        .zeros = block->zeros != NULL,
    };
}

/* values += (product - zero · sum of x) · scale, of 8 rows of W. */
INLINE void add_product(float *values, __m256 product, const struct row_terms *terms, float sum) {
    if (terms->zeros)
        product = _mm256_fnmadd_ps(terms->zero, _mm256_set1_ps(sum), product);
    _mm256_store_ps(values, _mm256_fmadd_ps(product, terms->scale, _mm256_load_ps(values)));
}

/* Where the part of a chunk begins, which starts at byte `begin` of a block and has so many, for
 * which a pass over it asks ahead: each of the passes that lanes make for its own.  All at once
 * would be more than a core can wait for. */
INLINE const uint8_t *part_of(const struct block *block, int64_t begin, int64_t bytes, int lane) {
    return block->codes + begin + bytes * lane / FQ_CPU_BLOCK;
}

/* values += part · unit, and part = 0: the end of a segment. */
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

static inline void panel(const struct fq_cpu_job *job) {
    FALLBACK.panel(job);
}

static inline void to_f32(float *out, const void *in, enum fq_dtype type, int64_t count) {
    FALLBACK.to_f32(out, in, type, count);
}

#endif
