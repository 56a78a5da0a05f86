/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The loops that quantize-kernel.h describes, in plain C that the compiler turns
 * into vectors: built once for each instruction set, with FQ_QUANTIZE_ISA as the
 * suffix of the table's name.  -ffp-contract=off keeps a product and a sum two
 * roundings everywhere, so that all sets agree bit for bit.
 */
#include "quantize-kernel.h"

#include <string.h>

#define LANES FQ_QUANTIZE_BLOCK
/* Adding and taking it away rounds to an integer, to nearest even, where |x| < 2^22. */
#define TO_INTEGER 0x1.8p23f
/* Blocks that are summed in float before the sum goes on in double. */
#define RUN 32

static void widen_bf16(const void *from, size_t count, float *to) {
    const char *next = from;

    for (size_t i = 0; i < count; i++) {
        uint16_t half;
        uint32_t bits;

        memcpy(&half, next + 2 * i, 2);
        bits = (uint32_t)half << 16;
        memcpy(to + i, &bits, 4);
    }
}

/* 2^112 moves the exponent from one bias to the other, and makes subnormals normal. */
static void widen_f16(const void *from, size_t count, float *to) {
    const char *next = from;

    for (size_t i = 0; i < count; i++) {
        uint16_t half;
        uint32_t bits, special, sign;
        float value;

        memcpy(&half, next + 2 * i, 2);
        sign = (uint32_t)(half & 0x8000) << 16;
        special = (half & 0x7c00) == 0x7c00 ? 0x7f800000u : 0;
        bits = (uint32_t)(half & 0x7fff) << 13;
        memcpy(&value, &bits, 4);
        value *= 0x1p112f;
        memcpy(&bits, &value, 4);
        bits |= special | sign;
        memcpy(to + i, &bits, 4);
    }
}

/* Sixteen lanes lie in one, two or four registers of the instruction set's own width. */
#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX2__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define PARTS (LANES / WIDTH)

typedef float vf __attribute__((vector_size(WIDTH * 4)));
typedef int32_t vi __attribute__((vector_size(WIDTH * 4)));
typedef uint8_t vb __attribute__((vector_size(WIDTH)));

static inline vf load(const float *weights, size_t block, int part) {
    vf v;

    memcpy(&v, weights + block * LANES + part * WIDTH, sizeof v);
    return v;
}

static inline vf lesser(vf a, vf b) {
    vi first = a < b;

    return (vf)(((vi)a & first) | ((vi)b & ~first));
}

static inline vf greater(vf a, vf b) {
    vi first = a > b;

    return (vf)(((vi)a & first) | ((vi)b & ~first));
}

typedef float v4 __attribute__((vector_size(16)));

/* A tree: lane i with i + 8, then + 4, + 2, + 1. */
static inline float sum_lanes(const vf lanes[PARTS]) {
    v4 quarters[4], sum;

    memcpy(quarters, lanes, sizeof quarters);
    sum = (quarters[0] + quarters[2]) + (quarters[1] + quarters[3]);
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

static inline vf to_code(vf q, float low, float high) {
    vf lows = (vf){0} + low, highs = (vf){0} + high;

    return (lesser(greater(q, lows), highs) + TO_INTEGER) - TO_INTEGER;
}

static double magnitudes(const float *weights, size_t blocks, uint32_t *out) {
    double total = 0;

    for (size_t begin = 0; begin < blocks; begin += RUN) {
        size_t end = begin + RUN < blocks ? begin + RUN : blocks;
        vf squares[PARTS] = {0};

        for (size_t b = begin; b < end; b++) {
            int32_t largest = 0;

            for (int i = 0; i < LANES; i++) {
                int32_t bits;

                memcpy(&bits, weights + b * LANES + i, 4);
                bits &= 0x7fffffff;
                largest = bits > largest ? bits : largest;
            }
            out[b] = (uint32_t)largest;
            for (int p = 0; p < PARTS; p++)
                squares[p] += load(weights, b, p) * load(weights, b, p);
        }
        total += (double)sum_lanes(squares);
    }
    return total;
}

static void bounds(const float *weights, size_t blocks, float *low, float *high) {
    vf lows[PARTS] = {0}, highs[PARTS] = {0}; /* zero must stay representable */

    float ends[2][LANES];

    for (size_t b = 0; b < blocks; b++)
        for (int p = 0; p < PARTS; p++) {
            vf w = load(weights, b, p);

            lows[p] = lesser(w, lows[p]);
            highs[p] = greater(w, highs[p]);
        }
    memcpy(ends[0], lows, sizeof ends[0]);
    memcpy(ends[1], highs, sizeof ends[1]);
    *low = *high = 0;
    for (int i = 0; i < LANES; i++) {
        *low = ends[0][i] < *low ? ends[0][i] : *low;
        *high = ends[1][i] > *high ? ends[1][i] : *high;
    }
}

/* Scales that are tried side by side: as many as the accumulators find registers for. */
#define BESIDE (WIDTH == 16 ? 4 : 2)

static void correlate(const float *weights, size_t blocks, const float *inverses, size_t count,
                      float low, float high, float *wq, float *qq) {
    for (size_t first = 0; first < count; first += BESIDE) {
        vf products[BESIDE][PARTS] = {0}, squares[BESIDE][PARTS] = {0};

        for (size_t b = 0; b < blocks; b++)
            for (int p = 0; p < PARTS; p++) {
                vf w = load(weights, b, p);

                for (int i = 0; i < BESIDE; i++) {
                    vf q = to_code(w * inverses[first + (size_t)i], low, high);

                    products[i][p] += w * q;
                    squares[i][p] += q * q;
                }
            }
        for (size_t i = 0; i < BESIDE; i++) {
            wq[first + i] = sum_lanes(products[i]);
            qq[first + i] = sum_lanes(squares[i]);
        }
    }
}

static double error(const float *weights, size_t blocks, float scale, float low, float high) {
    double total = 0;

    for (size_t begin = 0; begin < blocks; begin += RUN) {
        size_t end = begin + RUN < blocks ? begin + RUN : blocks;
        vf squares[PARTS] = {0};

        for (size_t b = begin; b < end; b++)
            for (int p = 0; p < PARTS; p++) {
                vf w = load(weights, b, p), d = w - to_code(w / scale, low, high) * scale;

                squares[p] += d * d;
            }
        total += (double)sum_lanes(squares);
    }
    return total;
}

static double round_codes(const float *weights, size_t blocks, float scale, float low, float high,
                          uint8_t *codes) {
    double total = 0;

    for (size_t begin = 0; begin < blocks; begin += RUN) {
        size_t end = begin + RUN < blocks ? begin + RUN : blocks;
        vf squares[PARTS] = {0};

        for (size_t b = begin; b < end; b++)
            for (int p = 0; p < PARTS; p++) {
                vf w = load(weights, b, p), q = to_code(w / scale, low, high), d = w - q * scale;
                vb bytes = __builtin_convertvector(__builtin_convertvector(q - low, vi), vb);

                squares[p] += d * d;
                memcpy(codes + b * LANES + p * WIDTH, &bytes, sizeof bytes);
            }
        total += (double)sum_lanes(squares);
    }
    return total;
}

static void pack4(const uint8_t *codes, size_t count, uint8_t *out) {
    for (size_t i = 0; i < count / 2; i++)
        out[i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
}

/* Eight bytes of three bits close up in three steps: pairs, fours, all eight. */
static void pack3(const uint8_t *codes, size_t count, uint8_t *out) {
    for (size_t i = 0; i < count; i += 8) {
        uint64_t x = 0;

        for (int j = 0; j < 8; j++)
            x |= (uint64_t)codes[i + (size_t)j] << (8 * j);
        x = (x | x >> 5) & 0x003f003f003f003fu;
        x = (x | x >> 10) & 0x00000fff00000fffu;
        x = x | x >> 20;
        out[i / 8 * 3] = (uint8_t)x;
        out[i / 8 * 3 + 1] = (uint8_t)(x >> 8);
        out[i / 8 * 3 + 2] = (uint8_t)(x >> 16);
    }
}

#define NAME_OF(isa)    NAME_OF_(isa)
#define NAME_OF_(isa)   fq_quantize_##isa
#define STRING_OF(isa)  STRING_OF_(isa)
#define STRING_OF_(isa) #isa

const struct fq_quantize_kernels NAME_OF(FQ_QUANTIZE_ISA) = {
    .name = STRING_OF(FQ_QUANTIZE_ISA),
    .widen_f16 = widen_f16,
    .widen_bf16 = widen_bf16,
    .magnitudes = magnitudes,
    .bounds = bounds,
    .correlate = correlate,
    .error = error,
    .round = round_codes,
    .pack3 = pack3,
    .pack4 = pack4,
};
