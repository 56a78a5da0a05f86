/* SPDX-License-Identifier: Apache-2.0 */
/*
 * X in block fixed point, for the byte dot products of dot.c.  The columns of a
 * segment (256, or the whole groups that fit in as many) share a unit, a power of
 * two, and each element is an integer of two or three signed bytes, its limbs:
 *
 *     x = unit · (limb0 + 2^8 · limb1 + 2^16 · limb2)
 *
 * Every product and sum of a chunk (the columns that share a scale) is then exact
 * in int32, and goes to fp32 once.  Three limbs carry 22 bits and sign.  Two carry
 * 15: what is lost of an fp16 or bf16 element is only what lies below 2^-15 of the
 * segment's largest, so that segments whose largest stands out little take two.
 * The form is decided by that segment of that row alone, so that a row's bits do
 * not depend on its company.  Rows with an infinity or NaN are not valid.
 */
#define LIMBS_FEW   2
#define LIMBS_ALL   FQ_CPU_LIMBS
#define BITS_FEW    14
#define BITS_ALL    21
#define FEW_MAX     (127 * 256 + 127)
#define LIMBS_BYTES FQ_CPU_LIMBS
#define TO_FIXED    fq_cpu_to_fixed
#include "fixed.h"

#include <immintrin.h>

#define LANES 16

static float survey(const float *x, int64_t columns, float *squares) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i largest = _mm512_setzero_si512();
    __m512 sum = _mm512_setzero_ps();
    uint32_t bits;
    float value;

    for (int64_t k = 0; k < columns; k += LANES) {
        __m512 v = _mm512_loadu_ps(x + k);

        largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(v), magnitude));
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    *squares = _mm512_reduce_add_ps(sum);
    bits = (uint32_t)_mm512_reduce_max_epi32(largest);
    memcpy(&value, &bits, sizeof value);
    return value;
}

static __m512i low_byte(__m512i v) {
    return _mm512_srai_epi32(_mm512_slli_epi32(v, 24), 24);
}

static void fix_chunk(const float *x, int64_t columns, int exponent, int bits, int8_t *limbs,
                      struct fq_cpu_chunk *chunk) {
    const __m512 up = _mm512_set1_ps(power_of_two(-exponent));
    __m512i low = _mm512_setzero_si512(), high = _mm512_setzero_si512();

    for (int64_t k = 0; k < columns; k += FQ_CPU_STEP, limbs += FQ_CPU_LIMBS * FQ_CPU_STEP) {
        __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + k), up));
        __m512i rest = whole;

        for (int l = 0; l < FQ_CPU_LIMBS; l++) {
            __m512i limb = low_byte(rest);

            rest = _mm512_srai_epi32(_mm512_sub_epi32(rest, limb), 8);
            _mm_storeu_si128((__m128i *)(void *)(limbs + l * FQ_CPU_STEP),
                             _mm512_cvtepi32_epi8(limb));
            if (l == FQ_CPU_LIMBS - 1) {
                high = _mm512_add_epi32(high, limb);
                low = _mm512_add_epi32(low, _mm512_sub_epi32(whole, _mm512_slli_epi32(limb, 16)));
            }
        }
    }
    const int32_t sums[2] = {_mm512_reduce_add_epi32(low), _mm512_reduce_add_epi32(high)};
    for (int i = 0; i < 2; i++)
        chunk->offset[i] = (int32_t)(0u - (uint32_t)sums[i] * (1u << (bits - 1)));
    chunk->sum = (float)((double)sums[1] * 65536 + sums[0]);
}
