/* SPDX-License-Identifier: Apache-2.0 */
/* A row of X to block fixed point with AVX2: fixed.h and its survey(). */
#ifndef FQ_KERNELS_CPU_FIXED_AVX2_H
#define FQ_KERNELS_CPU_FIXED_AVX2_H

#include "fixed.h"

#include <immintrin.h>

#define LANES 8

static float survey(const float *x, int64_t columns, float *squares) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i largest = _mm256_setzero_si256();
    __m256 sum = _mm256_setzero_ps();
    _Alignas(32) int32_t bits[LANES];
    _Alignas(32) float sums[LANES];
    float value;

    for (int64_t k = 0; k < columns; k += LANES) {
        __m256 v = _mm256_loadu_ps(x + k);

        largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(v), magnitude));
        sum = _mm256_fmadd_ps(v, v, sum);
    }
    _mm256_store_si256((__m256i *)(void *)bits, largest);
    _mm256_store_ps(sums, sum);
    *squares = 0;
    for (int i = 0; i < LANES; i++) {
        *squares += sums[i];
        if (bits[0] < bits[i])
            bits[0] = bits[i];
    }
    memcpy(&value, &bits[0], sizeof value);
    return value;
}

#endif
