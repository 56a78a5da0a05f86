/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From packed codes to mma fragments, in registers.  A fragment holds code −
 * zero, an integer of at most eight bits and a sign and so exact in fp16 and bf16, or that by a
 * power of two (fragment_factor); the scale is applied afterwards: in fp32 to the sums of a group
 * (decode, sm_80), or to the fragment (on Hopper prefill, and decode in groups of 16).
 *
 * An integer c becomes a float without a conversion by putting it into the low
 * mantissa bits of a power of two: 0x6400 | c is 1024 + c in fp16 (ten mantissa
 * bits), 0x4300 | c is 128 + c in bf16 (seven).  The zero point is subtracted
 * together with that bias.  A field that stands s bits up needs no shift under a power of two
 * that is 2^s smaller: 0x5400 | c << 4 is 64 + c in fp16.
 *
 * Where bf16 has no room for that, a byte b is the number b · 2^−133 as it stands: subnormal up to
 * 127, and from there on the numbers go on as evenly.  A multiplication by 2^127, the largest power
 * there is, comes with the subtraction, and leaves int8 2^6 times too small, and int4, four bits
 * up, 2^2 times.
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
    static __device__ __forceinline__ uint32_t sub(uint32_t a, uint32_t b) {
        return sub_f16x2(a, b);
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
    static __device__ __forceinline__ uint32_t sub(uint32_t a, uint32_t b) {
        return sub_bf16x2(a, b);
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

/* What a fragment of code − zero is to be multiplied by, as well as by the scale. */
template <int BITS, class T> static constexpr float fragment_factor = 1;
template <> constexpr float fragment_factor<8, bf16> = 64;
template <> constexpr float fragment_factor<4, bf16> = 4;

/* Times a byte as it stands: 2^−6 of it, and −2^−6. */
#define FQ_BF16_LARGEST       0x7f007f00u
#define FQ_BF16_MINUS_LARGEST 0xff00ff00u

/*
 * How fields that stand s bits up in their half are read, of int3 and, in fp16, int4: under a power
 * of two of their `own`; or all under a `common` one, where a multiplication by 2^−s comes with the
 * subtraction.  The results are the same; which is faster depends on what is around it.
 */
enum class reading {
    own,
    common
};

/* Of the decode kernels for up to n rows of X, as measured (NOTES.md, version 21). */
constexpr reading decode_reading(int bits, int n) {
    return n <= (bits == 3 ? 8 : 16) ? reading::common : reading::own;
}

/* From codes of so many bits to fragments. */
template <int BITS, class T, reading READING> struct dequantizer {
    static constexpr bool OWN = READING == reading::own;
    /* Places of fields in a half: int3 has them at bits 0, 3 and, in fp16, 6. */
    static constexpr int PLACES = BITS != 3 ? 1 : T::is_f16 ? 3 : 2;

    /*
     * What turns a masked field into code − zero, for rows g and g+8: what the zero point reads as
     * in the field's place; or, where a multiplication comes with the subtraction, −zero.  In int4
     * row g has the nibbles at bits 0 and 8 of the halves, row g+8 those at 4 and 12.
     */
    struct zero_terms {
        uint32_t low[PLACES], high[PLACES];
        uint32_t last; /* of int3's sixteenth pair, which is of row g+8: −112 − zero */
    };

    /* The A fragment of step 0 to 3: {row g, row g+8, row g k+8, row g+8 k+8}, two codes each. */
    static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const lane_codes<BITS> &c,
                                                    int step, const zero_terms &zero) {
        constexpr uint32_t nibbles = 0x000f000fu, bytes = 0x00ff00ffu;

        if constexpr (BITS == 3) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[i] = 4 * step + i == 15
                           ? last_int3_pair(c, zero.last)
                           : int3_pair(c, 4 * step + i, i & 1 ? zero.high : zero.low);
        }
#pragma unroll
        for (int half = 0; half < (BITS == 3 ? 0 : 2); half++) {
            uint32_t &low = a[2 * half], &high = a[2 * half + 1];

            if constexpr (BITS == 8) {
                const uint32_t word = c.words[2 * step + half];

                if constexpr (T::is_f16) {
                    low = sub_f16x2(prmt(word, 0x64646464u, 0x4240), zero.low[0]);
                    high = sub_f16x2(prmt(word, 0x64646464u, 0x4341), zero.high[0]);
                } else {
                    low = fma_bf16x2(word & bytes, FQ_BF16_LARGEST, zero.low[0]);
                    high = fma_bf16x2(word >> 8 & bytes, FQ_BF16_LARGEST, zero.high[0]);
                }
            } else if constexpr (BITS == 4) {
                const uint32_t word = c.words[step] >> 8 * half;

                if constexpr (T::is_f16) {
                    const uint32_t field =
                        lop3<0xea>(word, nibbles << 4, OWN ? 0x54005400u : 0x64006400u);

                    low = sub_f16x2(lop3<0xea>(word, nibbles, 0x64006400u), zero.low[0]);
                    high = OWN ? sub_f16x2(field, zero.high[0])
                               : fma_f16x2(field, 0x2c002c00u, zero.high[0]);
                } else { /* 32 + code / 4 */
                    low = sub_bf16x2(lop3<0xea>(word, nibbles, 0x42004200u), zero.low[0]);
                    high = fma_bf16x2(word & nibbles << 4, FQ_BF16_LARGEST, zero.high[0]);
                }
            }
        }
    }

    /* Zero points of rows g and g+8 as they lie in memory, a byte each: in few instructions, since
     * they are wanted for every group; those of both rows in one. */
    static __device__ __forceinline__ zero_terms unpack_zeros(uint32_t pair) {
        if constexpr (BITS == 8 && T::is_f16) {
            const uint32_t both = widened(pair, 0x64); /* 1024 + zero */

            return {{twice_low(both)}, {twice_high(both)}};
        } else if constexpr (BITS == 8) {
            const uint32_t both = mul_bf16x2(widened(pair, 0), FQ_BF16_MINUS_LARGEST);

            return {{twice_low(both)}, {twice_high(both)}};
        } else if constexpr (BITS == 4) {
            /* in fp16 1024 + zero, and 64 + zero or that negated; in bf16 32 + zero / 4, and
             * −zero / 4 */
            const uint32_t both = widened(pair, T::is_f16 ? 0x64 : 0x42);
            const uint32_t less = T::is_f16 ? 0x63806380u : 0x42004200u; /* 960, 32 */

            return {{twice_low(both)},
                    {twice_high(T::is_f16 && OWN ? T::sub(both, less) : T::sub(less, both))}};
        } else {
            constexpr uint32_t less[] = {0, T::is_f16 ? 0x63006300u : 0x42e042e0u, /* 896, 112 */
                                         0x63e063e0u};                             /* 1008 */
            const uint32_t both = widened(pair, T::is_f16 ? 0x64 : 0x43);
            const uint32_t last = T::sub(T::is_f16 ? 0x63206320u : 0x41804180u, both); /* 912, 16 */
            zero_terms to;

#pragma unroll
            for (int i = 0; i < PLACES; i++) {
                const uint32_t here = i == 0 ? both
                                      : OWN  ? T::sub(both, less[i])
                                             : T::sub(less[i], both);

                to.low[i] = twice_low(here);
                to.high[i] = twice_high(here);
            }
            to.last = twice_high(last);
            return to;
        }
    }

    /* Of a symmetric matrix, of 2^(BITS − 1): as unpack_zeros() would have it, but known when
     * compiled. */
    static __device__ __forceinline__ zero_terms middle_zeros() {
        constexpr uint32_t minus = OWN ? 0 : 0x80008000u;

        if constexpr (BITS == 8)
            return T::is_f16 ? zero_terms{{0x64806480u}, {0x64806480u}}
                             : zero_terms{{0xc000c000u}, {0xc000c000u}};
        else if constexpr (BITS == 4)
            return T::is_f16 ? zero_terms{{0x64086408u}, {0x54805480u | minus}}
                             : zero_terms{{0x42084208u}, {0xc000c000u}};
        else if constexpr (T::is_f16)
            return {{0x64046404u, 0x58205820u | minus, 0x4d004d00u | minus},
                    {0x64046404u, 0x58205820u | minus, 0x4d004d00u | minus},
                    0xd740d740u};
        else
            return {{0x43044304u, 0x41a041a0u | minus},
                    {0x43044304u, 0x41a041a0u | minus},
                    0xc2e8c2e8u};
    }

  private:
    /* Two numbers of two bytes, the lower of which is one of `pair`'s and the upper `top`. */
    static __device__ __forceinline__ uint32_t widened(uint32_t pair, uint32_t top) {
        return prmt(pair, top * 0x01010101u, 0x4140);
    }

    /* The power of two that a place is read under: 1024, 128 and 16 in fp16, 128 and 16 in bf16. */
    static __device__ __forceinline__ constexpr uint32_t int3_magic(int place) {
        constexpr uint32_t magic[] = {T::is_f16 ? 0x64006400u : 0x43004300u,
                                      T::is_f16 ? 0x58005800u : 0x41804180u, 0x4c004c00u};

        return magic[OWN ? place : 0];
    }
    /* Pair `index` (0 to 14) of a lane's 32 codes of int3, as code − zero. */
    static __device__ __forceinline__ uint32_t int3_pair(const lane_codes<3> &c, int index,
                                                         const uint32_t (&zero)[PLACES]) {
        constexpr uint32_t factors[] = {T::is_f16 ? 0x3c003c00u : 0x3f803f80u, /* 1, 1/8, 1/64 */
                                        T::is_f16 ? 0x30003000u : 0x3e003e00u, 0x24002400u};
        const int place = index % 5 % PLACES;
        const uint32_t word = c.words[index / 5] >> (3 * (index % 5 / PLACES * PLACES));
        const uint32_t field = lop3<0xea>(word, 0x00070007u << (3 * place), int3_magic(place));

        return OWN || place == 0 ? T::sub(field, zero[place])
                                 : T::fma(field, factors[place], zero[place]);
    }
    /* The sixteenth, whose bits are bit 15 of each half of the three words.  They are read where
     * the last pairs' shift leaves them, as 16 + bit, 32 + 2 bit and 64 + 4 bit: no shifts of their
     * own. */
    static __device__ __forceinline__ uint32_t last_int3_pair(const lane_codes<3> &c,
                                                              uint32_t last) {
        constexpr int SHIFT = 3 * (4 / PLACES * PLACES);
        constexpr uint32_t bit = 0x00010001u << (15 - SHIFT);
        constexpr uint32_t factors[] = {T::is_f16 ? 0x24002400u : 0x3e003e00u, /* 1/64, 1/8 */
                                        T::is_f16 ? 0x28002800u : 0x3e803e80u,
                                        T::is_f16 ? 0x2c002c00u : 0x3f003f00u};

#pragma unroll
        for (int i = 0; i < 3; i++)
            last = T::fma(lop3<0xea>(c.words[i] >> SHIFT, bit, int3_magic(0)), factors[i], last);
        return last;
    }
};

/* Scales of rows g and g+8, to multiply pairs of weights by. */
template <class T> struct row_scales {
    uint32_t low, high; /* twice each */

    row_scales() = default;
    /* pair: in the halves of a word. */
    __device__ __forceinline__ explicit row_scales(uint32_t pair)
        : low(twice_low(pair)), high(twice_high(pair)) {
    }
    /* A fragment, with one rounding. */
    __device__ __forceinline__ void multiply(uint32_t (&a)[4]) const {
        a[0] = T::mul(a[0], low);
        a[1] = T::mul(a[1], high);
        a[2] = T::mul(a[2], low);
        a[3] = T::mul(a[3], high);
    }
    /* By scales of which these are a part, and `rest` the other. */
    __device__ __forceinline__ void multiply(uint32_t (&a)[4], const row_scales &rest) const {
        a[0] = T::fma(a[0], low, T::mul(a[0], rest.low));
        a[1] = T::fma(a[1], high, T::mul(a[1], rest.high));
        a[2] = T::fma(a[2], low, T::mul(a[2], rest.low));
        a[3] = T::fma(a[3], high, T::mul(a[3], rest.high));
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
