/* SPDX-License-Identifier: Apache-2.0 */
/*
 * X in block fixed point, for words.c: as in fixed.c, but the limbs are one or
 * two signed 16-bit integers,
 *
 *     x = unit · (limb0 + 2^16 · limb1)
 *
 * One carries 15 bits and sign, two 26.  With codes of up to 8 bits and chunks of
 * up to 256 columns every sum is exact in int32.
 */
#define LIMBS_FEW 1
#define LIMBS_ALL 2
#define BITS_FEW  14
#define BITS_ALL  25
#define FEW_MAX   32767
#define TO_FIXED  fq_cpu_to_fixed_words
#include "fixed-avx2.h"

/* Bytes of eight 16-bit limbs in the order in which words.c has the columns. */
static __m256i order_of(int bits) {
    const __m128i eight = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    const __m128i fewer = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);

    return _mm256_broadcastsi128_si256(bits == 8 ? eight : fewer);
}

static void fix_chunk(const float *x, int64_t begin, int64_t end, int exponent, int bits,
                      const struct fq_cpu_fixed *fixed, struct fq_cpu_chunk *chunk) {
    const __m256 up = _mm256_set1_ps(power_of_two(-exponent));
    const __m256i order = order_of(bits);
    __m256i sum = _mm256_setzero_si256(); /* of pairs: a limb in either half */

    for (int64_t k = begin; k < end; k += LANES) {
        const __m256i whole = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + k), up));
        const __m256i low = _mm256_srai_epi32(_mm256_slli_epi32(whole, 16), 16);
        const __m256i high = _mm256_srai_epi32(_mm256_sub_epi32(whole, low), 16);
        const __m256i both = _mm256_shuffle_epi8(
            _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8), order);
        int8_t *out =
            fixed->limbs + k / FQ_CPU_STEP * (FQ_CPU_STEP * LIMBS_ALL * 2) + k % FQ_CPU_STEP * 2;

        _mm_storeu_si128((__m128i *)(void *)out, _mm256_castsi256_si128(both));
        _mm_storeu_si128((__m128i *)(void *)(out + FQ_CPU_STEP * 2),
                         _mm256_extracti128_si256(both, 1));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(both, _mm256_set1_epi16(1)));
    }
    sum = _mm256_add_epi32(sum, _mm256_shuffle_epi32(sum, 0x4e));
    sum = _mm256_add_epi32(sum, _mm256_shuffle_epi32(sum, 0xb1));
    const int32_t sums[LIMBS_ALL] = {_mm256_cvtsi256_si32(sum), _mm256_extract_epi32(sum, 4)};
    for (int l = 0; l < LIMBS_ALL; l++) /* codes of 8 bits are signed there */
        chunk->offset[l] = bits == 8 ? 0 : (int32_t)(0u - (uint32_t)sums[l] * (1u << (bits - 1)));
    chunk->sum = (float)((double)sums[1] * 65536 + sums[0]);
}
