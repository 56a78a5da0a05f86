/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Decode by products of bytes with AVX-512: what dot.c and amx.c do alike.  Codes
 * become registers of bytes, four columns of 16 rows of W; and sums of a segment become
 * floats.
 */
#ifndef FQ_KERNELS_CPU_DOT_H
#define FQ_KERNELS_CPU_DOT_H

#define LANES     16
#define LIMBS_FEW 2
#define LIMBS_ALL FQ_CPU_LIMBS
#define FALLBACK  fq_cpu_avx512
#include "block.h"

#include <immintrin.h>

/* One register of bytes is four columns of 16 rows: 0 ≤ code < 2^bits, from two's complement. */
INLINE __m512i unsigned_code(__m512i bytes, int bits) {
    const __m512i mask = _mm512_set1_epi8((char)((1 << bits) - 1));
    const __m512i sign = _mm512_set1_epi8((char)(1 << (bits - 1)));

    return _mm512_ternarylogic_epi32(bytes, mask, sign, 0x6a); /* (bytes & mask) ^ sign */
}

/* rest with the bits of `mask` taken from `from` besides. */
INLINE __m512i insert_byte(__m512i rest, __m512i from, int mask) {
    return _mm512_ternarylogic_epi32(from, rest, _mm512_set1_epi32(mask), 0xec);
}

/* The 3-bit codes at bits first, +3, +6 and +9 of each 32-bit lane. */
INLINE __m512i four_of_three(__m512i words, int first) {
    const uint64_t at = 0x2926232009060300u + 0x0101010101010101u * (uint64_t)first;

    return unsigned_code(_mm512_multishift_epi64_epi8(_mm512_set1_epi64((long long)at), words), 3);
}

INLINE __m512i load(const uint8_t *codes) {
    return _mm512_load_si512(codes);
}

/* Columns 4·i to 4·i + 3 of a step for 16 rows; 3 bits: `half` is which step of a pair it is. */
INLINE __m512i unpack(const uint8_t *codes, int64_t step, int half, int i, int bits) {
    const int pitch = FQ_CPU_BLOCK * 4; /* bytes from a word to the next */

    if (bits == 8)
        return unsigned_code(load(codes + (step * 4 + i) * pitch), 8);
    if (bits == 4) {
        const __m512i words = load(codes + (step * 2 + i / 2) * pitch);

        return unsigned_code(i % 2 ? _mm512_srli_epi32(words, 4) : words, 4);
    }
    codes += step / 2 * 3 * pitch;
    if (!half)
        return four_of_three(load(codes + i / 2 * pitch), i % 2 * 12);
    if (i < 2)
        return four_of_three(load(codes + 2 * pitch), i * 12);
    /* the top bytes of all three */
    __m512i top = _mm512_srli_epi32(load(codes), 24);
    top = insert_byte(top, _mm512_srli_epi32(load(codes + pitch), 16), 0xff00);
    top = insert_byte(top, _mm512_srli_epi32(load(codes + 2 * pitch), 8), 0xff0000);
    return four_of_three(top, i % 2 * 12);
}

INLINE __m512 scale_of(const uint16_t *scales, enum fq_dtype type) {
    __m256i bits = _mm256_loadu_si256((const __m256i *)(const void *)scales);

    if (type == FQ_BF16)
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    return _mm512_cvtph_ps(bits);
}

/* values += part · unit, and part = 0: the end of a segment. */
INLINE void end_segment(const struct block *block, int64_t segment, float *part, float *values,
                        int mr) {
    for (int m = 0; m < mr; m++) {
        const __m512 unit = _mm512_set1_ps(block->fixed[m].segments[segment].unit);

        for (int lane = 0; lane < FQ_CPU_BLOCK; lane += LANES) {
            float *out = values + m * FQ_CPU_BLOCK + lane, *in = part + m * FQ_CPU_BLOCK + lane;

            _mm512_store_ps(out, _mm512_fmadd_ps(_mm512_load_ps(in), unit, _mm512_load_ps(out)));
            _mm512_store_ps(in, _mm512_setzero_ps());
        }
    }
}

static inline void to_f32(float *out, const void *in, enum fq_dtype type, int64_t count) {
    FALLBACK.to_f32(out, in, type, count);
}

#endif
