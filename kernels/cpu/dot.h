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

INLINE __m512i load(const uint8_t *codes) {
    return _mm512_load_si512(codes);
}

#ifdef __GFNI__
/* Bits of each byte of codes to where they belong in a code, and the sign flipped: bit i of the
 * result is the byte's bit from<i>, or 0 where that is −1, XOR bit i of `flip`; the upper four are
 * 0.  The instruction's matrix has the row of bit 0 in its last byte. */
#define BITS(codes, flip, from0, from1, from2, from3)                                              \
    _mm512_gf2p8affine_epi64_epi8(                                                                 \
        codes, _mm512_set1_epi64(ROW(from0, 7) | ROW(from1, 6) | ROW(from2, 5) | ROW(from3, 4)),   \
        flip)
#define ROW(bit, byte) ((bit) < 0 ? 0 : (long long)(1ULL << ((bit)&7) << (8 * (byte))))

/* A byte's second code. */
INLINE __m512i second_code(__m512i words, int bits) {
    return bits == 4 ? BITS(words, 8, 4, 5, 6, 7) : BITS(words, 4, 3, 4, 5, -1);
}

/* The first and the second code of the fourth word, out of three words' upper bits. */
INLINE __m512i first_of_fourth(const uint8_t *codes, int pitch) {
    return _mm512_xor_si512(BITS(load(codes), 4, 6, 7, -1, -1),
                            BITS(load(codes + pitch), 0, -1, -1, 6, -1));
}

INLINE __m512i second_of_fourth(const uint8_t *codes, int pitch) {
    return _mm512_xor_si512(BITS(load(codes + pitch), 4, 7, -1, -1, -1),
                            BITS(load(codes + 2 * pitch), 0, -1, 6, 7, -1));
}
#undef BITS
#undef ROW
#else
INLINE __m512i second_code(__m512i words, int bits) {
    return unsigned_code(_mm512_srli_epi32(words, (unsigned)bits), bits);
}

/* The fourth word of 3 bits, which three are; its bytes' upper two bits are anything. */
INLINE __m512i fourth_of_three(const uint8_t *codes, int pitch) {
    const __m512i first = _mm512_srli_epi32(load(codes), 6);
    const __m512i second = _mm512_srli_epi32(load(codes + pitch), 4);
    const __m512i third = _mm512_srli_epi32(load(codes + 2 * pitch), 2);
    /* by the mask's bits of the first or the second, and so on: mask ? a : b */
    const __m512i two = _mm512_ternarylogic_epi32(_mm512_set1_epi8(3), first, second, 0xca);

    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(15), two, third, 0xca);
}

INLINE __m512i first_of_fourth(const uint8_t *codes, int pitch) {
    return unsigned_code(fourth_of_three(codes, pitch), 3);
}

INLINE __m512i second_of_fourth(const uint8_t *codes, int pitch) {
    return second_code(fourth_of_three(codes, pitch), 3);
}
#endif

/* Columns 4·i to 4·i + 3 of a step for 16 rows; 3 bits: `half` is which step of a pair it is. */
INLINE __m512i unpack(const uint8_t *codes, int64_t step, int half, int i, int bits) {
    const int pitch = FQ_CPU_BLOCK * 4; /* bytes from a word to the next */
    __m512i words;

    if (bits == 8)
        return unsigned_code(load(codes + (step * 4 + i) * pitch), 8);
    if (bits == 3 && half && i >= 2) {
        codes += step / 2 * 3 * pitch;
        return i == 2 ? first_of_fourth(codes, pitch) : second_of_fourth(codes, pitch);
    }
    if (bits == 4)
        words = load(codes + (step * 2 + i / 2) * pitch);
    else
        words = load(codes + (step / 2 * 3 + half * 2 + i / 2) * pitch);
    return i % 2 ? second_code(words, bits) : unsigned_code(words, bits);
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
