/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From packed codes to mma fragments, in registers.  A fragment holds code −
 * zero, an integer of at most nine bits and so exact in fp16 and bf16; the
 * scale is applied in fp32 to the sums of a group, not here.
 *
 * An integer c becomes a float without a conversion by putting it into the low
 * mantissa bits of a power of two: 0x6400 | c is 1024 + c in fp16 (ten mantissa
 * bits), 0x4300 | c is 128 + c in bf16 (seven), 0x4b000000 | c is 2^23 + c in
 * fp32.  The zero point is subtracted together with that bias.
 */
#ifndef FQ_KERNELS_CUDA_DEQUANT_CUH
#define FQ_KERNELS_CUDA_DEQUANT_CUH

#include "layout.h"
#include "ptx.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

/* The two element types of X and Y. */
struct f16 {
    using type = __half;
    static constexpr bool is_f16 = true;
    static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) {
        mma_f16(d, a, b0, b1);
    }
    static __device__ __forceinline__ void mma_first(float (&d)[4], const uint32_t (&a)[4],
                                                     uint32_t b0, uint32_t b1) {
        mma_first_f16(d, a, b0, b1);
    }
    static __device__ __forceinline__ __half round(float v) {
        return __float2half_rn(v);
    }
};

struct bf16 {
    using type = __nv_bfloat16;
    static constexpr bool is_f16 = false;
    static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) {
        mma_bf16(d, a, b0, b1);
    }
    static __device__ __forceinline__ void mma_first(float (&d)[4], const uint32_t (&a)[4],
                                                     uint32_t b0, uint32_t b1) {
        mma_first_bf16(d, a, b0, b1);
    }
    static __device__ __forceinline__ __nv_bfloat16 round(float v) {
        return __float2bfloat16_rn(v);
    }
};

/* A lane's codes of one tile. */
template <int BITS> struct lane_codes { uint32_t words[BITS]; };

template <int BITS>
static __device__ __forceinline__ lane_codes<BITS> load_codes(uint32_t tile, int lane) {
    lane_codes<BITS> c;

    if constexpr (BITS == 8) {
        uint4 low = lds_128(tile + lane * 16), high = lds_128(tile + 512 + lane * 16);

        c = {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
    } else if constexpr (BITS == 4) {
        uint4 all = lds_128(tile + lane * 16);

        c = {{all.x, all.y, all.z, all.w}};
    } else {
        uint2 low = lds_64(tile + lane * 8);

        c = {{low.x, low.y, lds_32(tile + 256 + lane * 4)}};
    }
    return c;
}

/* The subtrahends for rows g and g+8, in whatever form fragment() below wants them. */
struct zero_pair {
    uint32_t low, high;
};

template <int BITS, class T>
static __device__ __forceinline__ zero_pair make_zeros(uint32_t low, uint32_t high) {
    if constexpr (BITS == 8) {
        if constexpr (T::is_f16)
            return {(0x6400u | low) * 0x10001u, (0x6400u | high) * 0x10001u};
        else
            return {0x4b000000u | low, 0x4b000000u | high};
    } else if constexpr (T::is_f16) {
        /* 1024 + zero, and −(64 + zero) for the nibbles that stand four bits higher */
        return {(0x6400u | low) * 0x10001u, (0xd400u | high << 4) * 0x10001u};
    } else {
        return {(0xc300u | low) * 0x10001u, (0xc300u | high) * 0x10001u}; /* −(128 + zero) */
    }
}

/* The eight nibbles of one step; of int3, bit 3 of each is of no meaning. */
template <int BITS>
static __device__ __forceinline__ uint32_t step_nibbles(const lane_codes<BITS> &c, int step) {
    if constexpr (BITS == 4) {
        return c.words[step];
    } else {
        uint32_t low = step & 1 ? c.words[step >> 1] >> 2 : c.words[step >> 1];
        uint32_t high = step < 2 ? c.words[2] << (2 - step) : c.words[2] >> (step - 2);

        return lop3<0xe4>(low, high, 0x33333333u); /* low where the mask is set, else high */
    }
}

/* The A fragment of step 0 to 3: {row g, row g+8, row g k+8, row g+8 k+8}, two codes each. */
template <int BITS, class T>
static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const lane_codes<BITS> &c,
                                                int step, zero_pair zero) {
    if constexpr (BITS == 8 && T::is_f16) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t word = c.words[2 * step + half];

            a[2 * half] = sub_f16x2(prmt(word, 0x64646464u, 0x4140), zero.low);
            a[2 * half + 1] = sub_f16x2(prmt(word, 0x64646464u, 0x4342), zero.high);
        }
    } else if constexpr (BITS == 8) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t word = c.words[2 * step + half];
            float v[4];

#pragma unroll
            for (int i = 0; i < 4; i++)
                v[i] = __uint_as_float(prmt(word, 0x4b000000u, 0x7650 + i)) -
                       __uint_as_float(i < 2 ? zero.low : zero.high);
            a[2 * half] = cvt_bf16x2(v[0], v[1]);
            a[2 * half + 1] = cvt_bf16x2(v[2], v[3]);
        }
    } else {
        constexpr uint32_t mask = BITS == 4 ? 0x000f000fu : 0x00070007u;
        uint32_t word = step_nibbles<BITS>(c, step);

        if constexpr (T::is_f16) {
            constexpr uint32_t magic = 0x64006400u, sixteenth = 0x2c002c00u;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                /* (word & mask) | magic; the upper nibbles read 1024 + 16·code */
                a[2 * half] = sub_f16x2(lop3<0xea>(word, mask, magic), zero.low);
                a[2 * half + 1] =
                    fma_f16x2(lop3<0xea>(word, mask << 4, magic), sixteenth, zero.high);
                word >>= 8;
            }
        } else {
            constexpr uint32_t magic = 0x43004300u, one = 0x3f803f80u;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                a[i] = fma_bf16x2(lop3<0xea>(word, mask, magic), one, i & 1 ? zero.high : zero.low);
                word >>= 4;
            }
        }
    }
}

/* Two scales as they lie in memory, rows g and g+8. */
static __device__ __forceinline__ float2 unpack_scales(uint32_t word, int is_bf16) {
    float2 half = __half22float2(*reinterpret_cast<const __half2 *>(&word));

    /* both forms and a selection: a branch would part the loop that this stands in */
    return make_float2(is_bf16 ? __uint_as_float(word << 16) : half.x,
                       is_bf16 ? __uint_as_float(word & 0xffff0000u) : half.y);
}

#endif
