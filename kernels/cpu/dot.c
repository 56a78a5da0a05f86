/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The decode path where the processor has byte dot products (AVX512-VNNI with
 * VBMI).  fp32 arithmetic needs a conversion and an FMA for 16 weights; vpdpbusd
 * multiplies 64 codes as they are.  X is in block fixed point (fixed.c): an
 * accumulator a limb, and limbs 0 and 1 are put together in int32.
 *
 * A tile is 1 to 4 rows of X times some registers of rows of W: each register of
 * codes is unpacked once and multiplied with every limb of every row.
 */
#define LANES     16
#define LIMBS_FEW 2
#define LIMBS_ALL FQ_CPU_LIMBS
#define FALLBACK  fq_cpu_avx512
#include "fixed-decode.h"

#include <immintrin.h>

/* Bytes of codes that are asked for ahead of their use. */
#define AHEAD 4096

/* ---- Codes to bytes ---------------------------------------------------------------------- */

/* One register of bytes is four columns of 16 rows: 0 ≤ code < 2^bits, from two's complement. */
INLINE __m512i unsigned_code(__m512i bytes, int bits) {
    const __m512i mask = _mm512_set1_epi8((char)((1 << bits) - 1));
    const __m512i sign = _mm512_set1_epi8((char)(1 << (bits - 1)));

    return _mm512_ternarylogic_epi32(bytes, mask, sign, 0x6a); /* (bytes & mask) ^ sign */
}

/* rest with the bits of `mask` taken from `from` besides. */
INLINE __m512i insert_byte(__m512i rest, __m512i from, int mask) {
    return _mm512_ternarylogic_epi32(from, rest, _mm512_set1_epi32(mask), 0xec);
}

/* The 3-bit codes at bits first, +3, +6 and +9 of each 32-bit lane. */
INLINE __m512i four_of_three(__m512i words, int first) {
    const uint64_t at = 0x2926232009060300u + 0x0101010101010101u * (uint64_t)first;

    return unsigned_code(_mm512_multishift_epi64_epi8(_mm512_set1_epi64((long long)at), words), 3);
}

INLINE __m512i load(const uint8_t *codes) {
    return _mm512_load_si512(codes);
}

/* Columns 4·i to 4·i + 3 of a step for 16 rows; 3 bits: `half` is which step of a pair it is. */
INLINE __m512i unpack(const uint8_t *codes, int64_t step, int half, int i, int bits) {
    const int pitch = FQ_CPU_BLOCK * 4; /* bytes from a word to the next */

    if (bits == 8)
        return unsigned_code(load(codes + (step * 4 + i) * pitch), 8);
    if (bits == 4) {
        const __m512i words = load(codes + (step * 2 + i / 2) * pitch);

        return unsigned_code(i % 2 ? _mm512_srli_epi32(words, 4) : words, 4);
    }
    codes += step / 2 * 3 * pitch;
    if (!half)
        return four_of_three(load(codes + i / 2 * pitch), i % 2 * 12);
    if (i < 2)
        return four_of_three(load(codes + 2 * pitch), i * 12);
    /* the top bytes of all three */
    __m512i top = _mm512_srli_epi32(load(codes), 24);
    top = insert_byte(top, _mm512_srli_epi32(load(codes + pitch), 16), 0xff00);
    top = insert_byte(top, _mm512_srli_epi32(load(codes + 2 * pitch), 8), 0xff0000);
    return four_of_three(top, i % 2 * 12);
}

/* Asks for the lines of a step AHEAD of it. */
INLINE void prefetch(const uint8_t *codes, int64_t step, int half, int bits) {
    const int pitch = FQ_CPU_BLOCK * 4, words = bits == 3 ? 1 + (half == 0) : 2;
    const int64_t first = bits == 3 ? step / 2 * 3 + half * 2 : step * words;

    for (int i = 0; i < words; i++)
        _mm_prefetch((const char *)codes + (first + i) * pitch + AHEAD, _MM_HINT_T0);
}

/* The same for a whole block of 8 bits, whose lines are asked for in their order: by the pass-th of
 * so many passes over them its part, so that memory is never idle. */
INLINE void prefetch_part(const uint8_t *codes, int64_t step, int pass, int passes) {
    const int bytes = FQ_CPU_BLOCK * FQ_CPU_STEP, part = bytes / passes;

    for (int i = 0; i < part; i += 64)
        _mm_prefetch((const char *)codes + step * bytes + pass * part + i + AHEAD, _MM_HINT_T0);
}

/* ---- The product ------------------------------------------------------------------------- */

/* sum + w · the four bytes at x, in every lane.  GCC 12 broadcasts x to a register of its own, and
 * the accumulators of a tile leave none to spare. */
INLINE __m512i dot(__m512i sum, __m512i w, const int8_t *x) {
    struct four {
        int8_t bytes[4];
    };

    __asm__("vpdpbusd %2%{1to16%}, %1, %0"
            : "+v"(sum)
            : "v"(w), "m"(*(const struct four *)(const void *)x));
    return sum;
}

INLINE __m512 scale_of(const uint16_t *scales, enum fq_dtype type) {
    __m256i bits = _mm256_loadu_si256((const __m256i *)(const void *)scales);

    if (type == FQ_BF16)
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    return _mm512_cvtph_ps(bits);
}

/* Registers are live as short as can be: one of codes a row vector. */
INLINE void tile_step(const uint8_t *codes, const struct fq_cpu_fixed *fixed, int64_t step,
                      int half, __m512i (*sum)[4][FQ_CPU_LIMBS], int mr, int nv, int bits,
                      int limbs) {
    if (bits < 8)
        UNROLL for (int v = 0; v < nv; v++) prefetch(codes + v * LANES * 4, step, half, bits);
    UNROLL for (int i = 0; i < 4; i++) {
        __m512i w[4];

        UNROLL for (int v = 0; v < nv; v++) w[v] =
            unpack(codes + v * LANES * 4, step, half, i, bits);
        UNROLL for (int m = 0; m < mr; m++) {
            const int8_t *x = fixed[m].limbs + step * (FQ_CPU_STEP * FQ_CPU_LIMBS) + i * 4;

            UNROLL for (int l = 0; l < limbs; l++) UNROLL for (int v = 0; v < nv; v++)
                sum[m][v][l] = dot(sum[m][v][l], w[v], x + l * FQ_CPU_STEP);
        }
    }
}

/* values[m][lane..] += one chunk over its unit, for mr rows of X from `first` on and nv registers
 * of rows of W: the pass-th of so many passes over the chunk. */
INLINE void tile_part(const struct block *block, const struct fq_cpu_span *span, int first,
                      int lane, float *values, int mr, int nv, int bits, int limbs, int pass,
                      int passes) {
    const struct fq_cpu_fixed *fixed = block->fixed + first;
    __m512i sum[MR][4][FQ_CPU_LIMBS];

    values += first * FQ_CPU_BLOCK;
    UNROLL for (int m = 0; m < mr; m++) UNROLL for (int v = 0; v < nv; v++) {
        const struct fq_cpu_chunk *chunk = &fixed[m].chunks[span->chunks - 1];

        sum[m][v][0] = _mm512_set1_epi32(chunk->offset[0]);
        sum[m][v][1] = _mm512_setzero_si512();
        sum[m][v][2] = _mm512_set1_epi32(chunk->offset[1]);
    }
    for (int64_t step = span->begin / FQ_CPU_STEP; step < span->end / FQ_CPU_STEP; step++) {
        if (bits == 8)
            prefetch_part(block->codes, step, pass, passes);
        if (bits == 3 && step % 2)
            tile_step(block->codes + lane * 4, fixed, step, 1, sum, mr, nv, bits, limbs);
        else
            tile_step(block->codes + lane * 4, fixed, step, 0, sum, mr, nv, bits, limbs);
    }
    UNROLL for (int v = 0; v < nv; v++) {
        const int64_t at = span->group * FQ_CPU_BLOCK + lane + v * LANES;
        __m512 scale = scale_of(block->scales + at, block->weights->base.info.scale_type);
        __m512 zero = _mm512_setzero_ps();

        if (block->zeros)
            zero = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
                _mm_loadu_si128((const __m128i *)(const void *)(block->zeros + at))));
        UNROLL for (int m = 0; m < mr; m++) {
            const struct fq_cpu_chunk *chunk = &fixed[m].chunks[span->chunks - 1];
            float *out = values + m * FQ_CPU_BLOCK + lane + v * LANES;
            __m512 product = _mm512_cvtepi32_ps(
                _mm512_add_epi32(sum[m][v][0], _mm512_slli_epi32(sum[m][v][1], 8)));

            if (limbs == 3)
                product = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m][v][2]), _mm512_set1_ps(65536),
                                          product);
            if (block->zeros)
                product = _mm512_fnmadd_ps(zero, _mm512_set1_ps(chunk->sum), product);
            _mm512_store_ps(out, _mm512_fmadd_ps(product, scale, _mm512_load_ps(out)));
        }
    }
}

/* values += part · unit, and part = 0: the end of a segment. */
INLINE void end_segment(const struct block *block, int64_t segment, float *part, float *values,
                        int mr) {
    for (int m = 0; m < mr; m++) {
        const __m512 unit = _mm512_set1_ps(block->fixed[m].segments[segment].unit);

        for (int lane = 0; lane < FQ_CPU_BLOCK; lane += LANES) {
            float *out = values + m * FQ_CPU_BLOCK + lane, *in = part + m * FQ_CPU_BLOCK + lane;

            _mm512_store_ps(out, _mm512_fmadd_ps(_mm512_load_ps(in), unit, _mm512_load_ps(out)));
            _mm512_store_ps(in, _mm512_setzero_ps());
        }
    }
}

/* values[mr][64] += one chunk over its unit.  The accumulators of three rows of two limbs, or two
 * of three, and a whole block fill the register file.  Of more rows, either half of the rows goes
 * first, and the others find the codes in the first-level cache: 8 bits, whose lines are then read
 * in their order.  Or half of the block: the fewer bits, where unpacking twice costs more. */
INLINE void tile_chunk(const struct block *block, const struct fq_cpu_span *span, float *values,
                       int mr, int bits, int limbs) {
    if (mr <= (limbs == 2 ? 3 : 2)) {
        tile_part(block, span, 0, 0, values, mr, 4, bits, limbs, 0, 1);
    } else if (bits == 8) {
        tile_part(block, span, 0, 0, values, 2, 4, bits, limbs, 0, 2);
        tile_part(block, span, 2, 0, values, mr - 2, 4, bits, limbs, 1, 2);
    } else {
        tile_part(block, span, 0, 0, values, mr, 2, bits, limbs, 0, 2);
        tile_part(block, span, 0, 2 * LANES, values, mr, 2, bits, limbs, 1, 2);
    }
}

static void panel(const struct fq_cpu_job *job) {
    fq_cpu_avx512.panel(job);
}

static void to_f32(float *out, const void *in, enum fq_dtype type, int64_t count) {
    fq_cpu_avx512.to_f32(out, in, type, count);
}

const struct fq_cpu_kernels fq_cpu_avx512vnni = {
    .name = "avx512vnni",
    .decode = decode,
    .panel = panel,
    .to_f32 = to_f32,
    .to_fixed = fq_cpu_to_fixed,
    .limb_bytes = FQ_CPU_LIMBS,
};
