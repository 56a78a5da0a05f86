/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Scalar conversions between binary32 and the two 16-bit formats, rounding to
 * nearest even, with infinities and NaN kept.  Plain C, so that every layer
 * and every platform agrees; vector code has instructions of its own.
 */
#ifndef FQ_BASE_HALF_H
#define FQ_BASE_HALF_H

#include "finequant-types.h"

#include <string.h>

static inline uint32_t fq_f32_bits(float value) {
    uint32_t bits;

    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float fq_f32_from_bits(uint32_t bits) {
    float value;

    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float fq_bf16_to_f32(uint16_t bits) {
    return fq_f32_from_bits((uint32_t)bits << 16);
}

static inline uint16_t fq_f32_to_bf16(float value) {
    uint32_t bits = fq_f32_bits(value);

    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(bits >> 16 | 0x40u); /* quiet NaN: rounding could turn it into infinity */
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static inline float fq_f16_to_f32(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t exponent = half >> 10 & 0x1fu;
    uint32_t mantissa = half & 0x3ffu;

    if (exponent == 0x1fu)
        return fq_f32_from_bits(sign | 0x7f800000u | mantissa << 13);
    if (exponent == 0) {
        float magnitude = (float)mantissa * 0x1p-24f; /* subnormals are multiples of 2^-24 */
        return sign ? -magnitude : magnitude;
    }
    return fq_f32_from_bits(sign | (exponent + 112u) << 23 | mantissa << 13);
}

static inline uint16_t fq_f32_to_f16(float value) {
    uint32_t bits = fq_f32_bits(value);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    uint32_t magnitude = bits & 0x7fffffffu;

    if (magnitude > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) /* 65520 and above round to infinity */
        return (uint16_t)(sign | 0x7c00u);
    if (magnitude < 0x38800000u) { /* below 2^-14: let the FPU round to a multiple of 2^-24 */
        float scaled = fq_f32_from_bits(magnitude) + 0.5f;
        return (uint16_t)(sign | (uint16_t)(fq_f32_bits(scaled) - 0x3f000000u));
    }
    magnitude += 0xfffu + (magnitude >> 13 & 1u);
    return (uint16_t)(sign | (uint16_t)((magnitude - 0x38000000u) >> 13));
}

/* Element i of an array of the given type, which need not be aligned. */
static inline float fq_load(const void *base, int dtype, size_t i) {
    if (dtype == FQ_F32) {
        float value;

        memcpy(&value, (const char *)base + i * 4, 4);
        return value;
    }
    uint16_t bits;

    memcpy(&bits, (const char *)base + i * 2, 2);
    return dtype == FQ_F16 ? fq_f16_to_f32(bits) : fq_bf16_to_f32(bits);
}

static inline void fq_store(void *base, int dtype, size_t i, float value) {
    if (dtype == FQ_F32) {
        memcpy((char *)base + i * 4, &value, 4);
        return;
    }
    uint16_t bits = dtype == FQ_F16 ? fq_f32_to_f16(value) : fq_f32_to_bf16(value);

    memcpy((char *)base + i * 2, &bits, 2);
}

#endif
