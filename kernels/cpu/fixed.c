/* SPDX-License-Identifier: Apache-2.0 */
/*
 * X in block fixed point, for the byte dot products of dot.c and amx.c.  The columns of a
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
#define LIMBS_FEW 2
#define LIMBS_ALL FQ_CPU_LIMBS
#define BITS_FEW  14
#define BITS_ALL  21
#define FEW_MAX   (127 * 256 + 127)
#define TO_FIXED  fq_cpu_to_fixed
#include "fixed.h"

#include <immintrin.h>

#define LANES 16

static void survey_lanes(const float *x, __m512i *largest, __m512 *sum) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    const __m512 v = _mm512_loadu_ps(x);

    *largest = _mm512_max_epi32(*largest, _mm512_and_si512(_mm512_castps_si512(v), magnitude));
    *sum = _mm512_fmadd_ps(v, v, *sum);
}

static float survey(const float *x, int64_t columns, float *squares) {
    __m512i largest = _mm512_setzero_si512();
    /* two sums hide the latency of an FMA */
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    uint32_t bits;
    float value;

    for (int64_t k = 0; k < columns; k += 2 * LANES) {
        survey_lanes(x + k, &largest, &even);
        if (k + LANES < columns)
            survey_lanes(x + k + LANES, &largest, &odd);
    }
    *squares = _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
    bits = (uint32_t)_mm512_reduce_max_epi32(largest);
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Byte l of each lane to the l-th quarter of a register. */
static __m512i quarters(__m512i lanes) {
    const __m128i bytes = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i index = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);

    return _mm512_permutexvar_epi32(index,
                                    _mm512_shuffle_epi8(lanes, _mm512_broadcast_i32x4(bytes)));
}

static void fix_chunk(const float *x, int64_t begin, int64_t end, int exponent, int bits,
                      const struct fq_cpu_fixed *fixed, struct fq_cpu_chunk *chunk) {
    const int columns_log2 = __builtin_ctz((unsigned)fixed->columns);
    const __m512 up = _mm512_set1_ps(power_of_two(-exponent));
    /* of three bytes that are signed each: 128 more in every one, and back */
    const __m512i half = _mm512_set1_epi32(0x808080);
    __m512i sums = _mm512_setzero_si512(); /* of four columns, limb after limb */

    for (int64_t k = begin; k < end; k += FQ_CPU_STEP) {
        int8_t *to =
            fixed->limbs + (k >> columns_log2) * fixed->columns_pitch + (k & (fixed->columns - 1));
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + k), up));
        const __m512i limbs = quarters(_mm512_xor_si512(_mm512_add_epi32(whole, half), half));

        _mm_storeu_si128((__m128i *)(void *)to, _mm512_castsi512_si128(limbs));
        _mm_storeu_si128((__m128i *)(void *)(to + fixed->pitch),
                         _mm512_extracti32x4_epi32(limbs, 1));
        _mm_storeu_si128((__m128i *)(void *)(to + 2 * fixed->pitch),
                         _mm512_extracti32x4_epi32(limbs, 2));
        sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), limbs);
    }
    sums = _mm512_add_epi32(sums, _mm512_shuffle_epi32(sums, _MM_PERM_BADC));
    sums = _mm512_add_epi32(sums, _mm512_shuffle_epi32(sums, _MM_PERM_CDAB));
    const int32_t limb[FQ_CPU_LIMBS] = {_mm512_cvtsi512_si32(sums),
                                        _mm_cvtsi128_si32(_mm512_extracti32x4_epi32(sums, 1)),
                                        _mm_cvtsi128_si32(_mm512_extracti32x4_epi32(sums, 2))};
    const int32_t low = limb[0] + limb[1] * 256;

    chunk->offset[0] = (int32_t)(0u - (uint32_t)low * (1u << (bits - 1)));
    chunk->offset[1] = (int32_t)(0u - (uint32_t)limb[2] * (1u << (bits - 1)));
    chunk->sum = (float)((double)limb[2] * 65536 + low);
}
