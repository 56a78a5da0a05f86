/* SPDX-License-Identifier: Apache-2.0 */
/*
 * X in block fixed point of two or three signed bytes, for bytes.c: as fixed.c has it, with AVX2.
 */
#define LIMBS_FEW 2
#define LIMBS_ALL FQ_CPU_LIMBS
#define BITS_FEW  14
#define BITS_ALL  21
#define FEW_MAX   (127 * 256 + 127)
#define TO_FIXED  fq_cpu_to_fixed_bytes
#include "fixed-avx2.h"

/* Byte l of the four lanes of either half to its l-th quarter. */
static __m256i quarters(__m256i lanes) {
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);

    return _mm256_shuffle_epi8(lanes, _mm256_broadcastsi128_si256(order));
}

static int32_t sum_of(__m256i lanes) {
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));

    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

static void fix_chunk(const float *x, int64_t begin, int64_t end, int exponent, int bits,
                      const struct fq_cpu_fixed *fixed, struct fq_cpu_chunk *chunk) {
    const __m256 up = _mm256_set1_ps(power_of_two(-exponent));
    /* of three bytes that are signed each: 128 more in every one, and back */
    const __m256i half = _mm256_set1_epi32(0x808080), low_half = _mm256_set1_epi32(0x8080);
    __m256i sum = _mm256_setzero_si256(), high = _mm256_setzero_si256(); /* high: of limb 2 */

    for (int64_t k = begin; k < end; k += FQ_CPU_STEP) {
        int8_t *to = fixed->limbs + k * FQ_CPU_LIMBS;
        const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + k), up));
        const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + k + LANES), up));
        /* columns 0 to 3 and 8 to 11, and those between and behind */
        const __m256i even = _mm256_permute2x128_si256(a, b, 0x20);
        const __m256i odd = _mm256_permute2x128_si256(a, b, 0x31);
        const __m256i p = quarters(_mm256_xor_si256(_mm256_add_epi32(even, half), half));
        const __m256i q = quarters(_mm256_xor_si256(_mm256_add_epi32(odd, half), half));

        _mm256_storeu_si256((__m256i *)(void *)to,
                            _mm256_permute4x64_epi64(_mm256_unpacklo_epi32(p, q), 0xd8));
        _mm_storeu_si128(
            (__m128i *)(void *)(to + 2 * FQ_CPU_STEP),
            _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_unpackhi_epi32(p, q), 0xd8)));
        sum = _mm256_add_epi32(sum, _mm256_add_epi32(a, b));
        high = _mm256_add_epi32(
            high, _mm256_add_epi32(_mm256_srai_epi32(_mm256_add_epi32(a, low_half), 16),
                                   _mm256_srai_epi32(_mm256_add_epi32(b, low_half), 16)));
    }
    const int32_t all = sum_of(sum), limb2 = sum_of(high); /* 256 times 2^22 at most */
    const uint32_t low = (uint32_t)all - (uint32_t)limb2 * 65536u;

    chunk->offset[0] = (int32_t)(0u - low * (1u << (bits - 1)));
    chunk->offset[1] = (int32_t)(0u - (uint32_t)limb2 * (1u << (bits - 1)));
    chunk->sum = (float)all;
}
