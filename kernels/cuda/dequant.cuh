/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From packed codes to mma fragments, in registers.  A fragment holds code −
 * zero, an integer of at most eight bits and a sign and so exact in fp16 and bf16;
 * the scale is applied afterwards: in fp32 to the sums of a group (decode, sm_80), or to
 * the fragment (prefill on Hopper).
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
    static __device__ __forceinline__ uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
        return fma_f16x2(a, b, c);
    }
    static __device__ __forceinline__ uint32_t mul(uint32_t a, uint32_t b) {
        return mul_f16x2(a, b);
    }
    static __device__ __forceinline__ uint32_t pack(float low, float high) {
        return cvt_f16x2(low, high);
    }
    static __device__ __forceinline__ __half round(float v) {
        return __float2half_rn(v);
    }
    static __device__ __forceinline__ float widen(__half v) {
        return __half2float(v);
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
    static __device__ __forceinline__ uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
        return fma_bf16x2(a, b, c);
    }
    static __device__ __forceinline__ uint32_t mul(uint32_t a, uint32_t b) {
        return mul_bf16x2(a, b);
    }
    static __device__ __forceinline__ uint32_t pack(float low, float high) {
        return cvt_bf16x2(low, high);
    }
    static __device__ __forceinline__ __nv_bfloat16 round(float v) {
        return __float2bfloat16_rn(v);
    }
    static __device__ __forceinline__ float widen(__nv_bfloat16 v) {
        return __bfloat162float(v);
    }
};

/* A lane's codes of one quarter of a tile: 32, in the order of layout.h. */
template <int BITS> struct lane_codes { uint32_t words[BITS]; };

/* Where a lane's first word is in a quarter. */
template <int BITS> static __device__ __forceinline__ uint32_t lane_offset(int lane) {
    return lane * (BITS == 3 ? 4 : 16);
}

/* address: of the quarter in shared memory, and lane_offset(). */
template <int BITS>
static __device__ __forceinline__ lane_codes<BITS> load_codes(uint32_t address) {
    lane_codes<BITS> c;

    if constexpr (BITS == 8) {
        uint4 low = lds_128(address), high = lds_128(address + 512);

        c = {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
    } else if constexpr (BITS == 4) {
        uint4 all = lds_128(address);

        c = {{all.x, all.y, all.z, all.w}};
    } else {
        c = {{lds_32(address), lds_32(address + 128), lds_32(address + 256)}};
    }
    return c;
}

/*
 * What turns a masked field into code − zero, for rows g and g+8.  A field that stands `shift` bits
 * up reads magic + code · 2^shift, and a multiplication by 2^−shift comes with the subtraction, so
 * that the word need not be shifted for it.
 */
template <int BITS, class T> struct zero_terms {
    static constexpr int FORMS = BITS != 3 ? 1 : T::is_f16 ? 3 : 2;
    uint32_t low[FORMS], high[FORMS];
};

template <int BITS, class T>
static __device__ __forceinline__ zero_terms<BITS, T> make_zeros(uint32_t low, uint32_t high) {
    constexpr uint32_t both = 0x10001u;

    if constexpr (BITS == 8 && T::is_f16) {
        return {{(0x6400u | low) * both}, {(0x6400u | high) * both}}; /* 1024 + zero */
    } else if constexpr (BITS == 8) {
        return {{0x4b000000u | low}, {0x4b000000u | high}}; /* 2^23 + zero, in fp32 */
    } else if constexpr (BITS == 4 && T::is_f16) {
        /* row g's nibbles stand at 0: 1024 + zero; row g+8's at 4: −(64 + zero) */
        return {{(0x6400u | low) * both}, {(0xd400u | high << 4) * both}};
    } else if constexpr (BITS == 4) {
        return {{(0xc300u | low) * both}, {(0xc300u | high) * both}}; /* −(128 + zero) */
    } else if constexpr (T::is_f16) {
        /* at bits 0, 3 and 6: −(1024 + zero), −(128 + zero), −(16 + zero) */
        return {
            {(0xe400u | low) * both, (0xd800u | low << 3) * both, (0xcc00u | low << 6) * both},
            {(0xe400u | high) * both, (0xd800u | high << 3) * both, (0xcc00u | high << 6) * both}};
    } else {
        /* at bits 0 and 3: −(128 + zero), −(16 + zero) */
        return {{(0xc300u | low) * both, (0xc180u | low << 3) * both},
                {(0xc300u | high) * both, (0xc180u | high << 3) * both}};
    }
}

/* Pair `index` (0 to 15) of a lane's 32 codes of int3, as code − zero. */
template <class T>
static __device__ __forceinline__ uint32_t int3_pair(const lane_codes<3> &c, int index,
                                                     const uint32_t (&zero)[T::is_f16 ? 3 : 2]) {
    constexpr uint32_t magic = T::is_f16 ? 0x64006400u : 0x43004300u;
    constexpr int in_place = T::is_f16 ? 3 : 2; /* fields that the mantissa has room for */
    constexpr uint32_t factors[3] = {T::is_f16 ? 0x3c003c00u : 0x3f803f80u, /* 1, 1/8, 1/64 */
                                     T::is_f16 ? 0x30003000u : 0x3e003e00u, 0x24002400u};
    int form = index % 5 % in_place;
    uint32_t field;

    if (index == 15) {
        form = 0;
        field = lop3<0xea>(c.words[0] >> 15, 0x00010001u, magic);
        field = lop3<0xea>(c.words[1] >> 14, 0x00020002u, field);
        field = lop3<0xea>(c.words[2] >> 13, 0x00040004u, field);
    } else {
        uint32_t word = c.words[index / 5] >> (3 * (index % 5 / in_place * in_place));

        field = lop3<0xea>(word, 0x00070007u << (3 * form), magic);
    }
    return T::fma(field, factors[form], zero[form]);
}

/*
 * Codes of eight bits, in the lower byte of each half, less 128, in bf16, whose mantissa has room
 * for seven: 128 + the seven, less 256 where the eighth is 0 and 128 where it is 1.  Both numbers
 * are the codes' bits under an exponent, and what remains of them is exact.
 */
static __device__ __forceinline__ uint32_t centred_bytes_bf16(uint32_t word) {
    const uint32_t seven = lop3<0xea>(word, 0x007f007fu, 0x43004300u);  /* and, or */
    const uint32_t eighth = lop3<0x6a>(word, 0x00800080u, 0x43804380u); /* and, xor */

    return fma_bf16x2(eighth, 0xbf80bf80u, seven);
}

/*
 * The A fragment of step 0 to 3: {row g, row g+8, row g k+8, row g+8 k+8}, two codes each.
 * SYMMETRIC: zero is middle_zeros(), and the compiler is to know.
 */
template <int BITS, class T, bool SYMMETRIC>
static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const lane_codes<BITS> &c,
                                                int step, const zero_terms<BITS, T> &zero) {
    if constexpr (BITS == 8 && T::is_f16) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t word = c.words[2 * step + half];

            a[2 * half] = sub_f16x2(prmt(word, 0x64646464u, 0x4240), zero.low[0]);
            a[2 * half + 1] = sub_f16x2(prmt(word, 0x64646464u, 0x4341), zero.high[0]);
        }
    } else if constexpr (BITS == 8 && SYMMETRIC) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t word = c.words[2 * step + half];

            a[2 * half] = centred_bytes_bf16(word);
            a[2 * half + 1] = centred_bytes_bf16(word >> 8);
        }
    } else if constexpr (BITS == 8) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t word = c.words[2 * step + half];
            uint32_t v[4];

#pragma unroll
            for (int i = 0; i < 4; i++)
                v[i] = __float_as_uint(__uint_as_float(prmt(word, 0x4b000000u, 0x7650 + i)) -
                                       __uint_as_float(i % 2 ? zero.high[0] : zero.low[0]));
            /* at most eight bits: nothing is lost with the lower halves */
            a[2 * half] = prmt(v[0], v[2], 0x7632);
            a[2 * half + 1] = prmt(v[1], v[3], 0x7632);
        }
    } else if constexpr (BITS == 3) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            a[i] = int3_pair<T>(c, 4 * step + i, i & 1 ? zero.high : zero.low);
    } else if constexpr (T::is_f16) {
        constexpr uint32_t mask = 0x000f000fu, magic = 0x64006400u, sixteenth = 0x2c002c00u;
        uint32_t word = c.words[step];

#pragma unroll
        for (int half = 0; half < 2; half++) {
            a[2 * half] = sub_f16x2(lop3<0xea>(word, mask, magic), zero.low[0]);
            a[2 * half + 1] =
                fma_f16x2(lop3<0xea>(word, mask << 4, magic), sixteenth, zero.high[0]);
            word >>= 8;
        }
    } else {
        constexpr uint32_t mask = 0x000f000fu, magic = 0x43004300u, one = 0x3f803f80u;

#pragma unroll
        for (int i = 0; i < 4; i++)
            a[i] = fma_bf16x2(lop3<0xea>(c.words[step] >> (4 * i), mask, magic), one,
                              i & 1 ? zero.high[0] : zero.low[0]);
    }
}

/* Two numbers of two bytes, the lower of which is one of `pair`'s and the upper `top`. */
static __device__ __forceinline__ uint32_t twice(uint32_t pair, int which, uint32_t top) {
    return prmt(pair, top * 0x01010101u, which ? 0x4141 : 0x4040);
}

/* Zero points of rows g and g+8 as they lie in memory, a byte each: what make_zeros() says of them,
 * in few instructions, since they are wanted for every group. */
template <int BITS, class T>
static __device__ __forceinline__ zero_terms<BITS, T> unpack_zeros(uint32_t pair) {
    zero_terms<BITS, T> to;

#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint32_t(&zero)[zero_terms<BITS, T>::FORMS] = i ? to.high : to.low;

        if constexpr (BITS == 8 && T::is_f16)
            zero[0] = twice(pair, i, 0x64);
        else if constexpr (BITS == 8)
            zero[0] = prmt(pair, 0x4b000000u, 0x7440 + i);
        else if constexpr (BITS == 4 && T::is_f16)
            zero[0] = i ? twice(pair >> 4, 0, 0xd4) : twice(pair, 0, 0x64);
        else
            zero[0] = twice(pair, i, BITS == 3 && T::is_f16 ? 0xe4 : 0xc3);
        if constexpr (BITS == 3 && T::is_f16) {
            zero[1] = T::fma(zero[0], 0x3c003c00u, 0x63006300u); /* 896 more */
            zero[2] = T::fma(zero[0], 0x3c003c00u, 0x63e063e0u); /* 1008 */
        } else if constexpr (BITS == 3) {
            zero[1] = T::fma(zero[0], 0x3f803f80u, 0x42e042e0u); /* 112 */
        }
    }
    return to;
}

/* Of a symmetric matrix. */
template <int BITS, class T> static __device__ __forceinline__ zero_terms<BITS, T> middle_zeros() {
    return make_zeros<BITS, T>(1u << (BITS - 1), 1u << (BITS - 1));
}

/*
 * A scale, to multiply pairs of weights by with one rounding.  fp16 holds any fp16 or bf16 scale
 * that is brought into its range; bf16 holds an fp16 scale's eleven bits only in two PARTS, and a
 * bf16 scale in one.
 */
template <class T> struct scale_pair {
    uint32_t value, rest; /* twice each; rest: of bf16 */

    scale_pair() = default;
    __device__ __forceinline__ explicit scale_pair(float scale) : value(T::pack(scale, scale)) {
        if constexpr (!T::is_f16) {
            const float left = scale - __uint_as_float(value << 16);

            rest = T::pack(left, left);
        }
    }
    template <int PARTS> __device__ __forceinline__ uint32_t times(uint32_t pair) const {
        if constexpr (PARTS == 1)
            return T::mul(pair, value);
        else
            return T::fma(pair, value, T::mul(pair, rest));
    }
};

/* Two scales as they lie in memory, rows g and g+8. */
static __device__ __forceinline__ float2 unpack_scales(uint32_t word, int is_bf16) {
    float2 half = __half22float2(*reinterpret_cast<const __half2 *>(&word));

    /* both forms and a selection: a branch would part the loop that this stands in */
    return make_float2(is_bf16 ? __uint_as_float(word << 16) : half.x,
                       is_bf16 ? __uint_as_float(word & 0xffff0000u) : half.y);
}

#endif
