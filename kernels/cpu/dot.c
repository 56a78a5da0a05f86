/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The decode path where the processor has byte dot products (AVX512-VNNI with
 * VBMI).  fp32 arithmetic needs a conversion and an FMA for 16 weights; vpdpbusd
 * multiplies 64 codes as they are, so that int4 at M = 1 waits for memory.
 *
 * X becomes block fixed point first: the columns of a chunk (a group, or 256
 * columns of a longer one) share an exponent, and each element is an integer of
 * two or three signed bytes, its limbs:
 *
 *     x = unit · (limb0 + 2^8 · limb1 + 2^16 · limb2)
 *
 * Every product and sum of a chunk is then exact in int32, one accumulator a
 * limb, and the chunk's result goes to fp32 once.  Three limbs carry 23 bits and
 * sign, as fp32 does; bf16 rows whose largest element stands out little take
 * two.  A row's form is decided by that row alone, so its bits do not depend
 * on its company.  Rows with an infinity or NaN are left to the fp32 kernels.
 */
#include "cpu.h"

#include <immintrin.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#define LANES  16
#define MR     4 /* rows of X in a tile */

/* Bytes of codes that are asked for ahead of their use: a tile that takes one register of a block
 * at a time touches every fourth line, which the hardware does not follow. */
#define AHEAD 4096

/* A chunk's largest element may be 8 times its root mean square with two limbs: that bounds the
 * rounding error of a row by 2^-13 · 8 / √12 = 2.8e-4 of its norm, and half that on average. */
#define CREST_SQUARED 64.0f

/* ---- X to fixed point -------------------------------------------------------------------- */

/* Largest magnitude's bits, and the sum of squares, of a chunk. */
static uint32_t survey_chunk(const float *x, int64_t columns, float *squares) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i largest = _mm512_setzero_si512();
    __m512 sum = _mm512_setzero_ps();

    for (int64_t k = 0; k < columns; k += LANES) {
        __m512 v = _mm512_loadu_ps(x + k);

        largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(v), magnitude));
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    *squares = _mm512_reduce_add_ps(sum);
    return (uint32_t)_mm512_reduce_max_epi32(largest);
}

static float power_of_two(int exponent) {
    uint32_t bits = (uint32_t)(exponent + 127) << 23;
    float value;

    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE __m512i low_byte(__m512i v) {
    return _mm512_srai_epi32(_mm512_slli_epi32(v, 24), 24);
}

/* Rounds a chunk to integers below 2^top (which its limbs hold) and takes them apart. */
static void fix_chunk(const float *x, int64_t columns, int top, int bits, int8_t *limbs,
                      struct fq_cpu_chunk *chunk) {
    int exponent = (int)(chunk->largest >> 23) - 127;
    __m512i sum[FQ_CPU_LIMBS] = {_mm512_setzero_si512(), _mm512_setzero_si512(),
                                 _mm512_setzero_si512()};

    if (exponent < -100)
        exponent = -100; /* keeps both powers normal; what is lost is below 2^-122 */
    const __m512 up = _mm512_set1_ps(power_of_two(top - 1 - exponent));
    for (int64_t k = 0; k < columns; k += FQ_CPU_STEP, limbs += FQ_CPU_LIMBS * FQ_CPU_STEP) {
        __m512i rest = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + k), up));

        for (int l = 0; l < FQ_CPU_LIMBS; l++) {
            __m512i limb = low_byte(rest);

            rest = _mm512_srai_epi32(_mm512_sub_epi32(rest, limb), 8);
            sum[l] = _mm512_add_epi32(sum[l], limb);
            _mm_storeu_si128((__m128i *)(void *)(limbs + l * FQ_CPU_STEP),
                             _mm512_cvtepi32_epi8(limb));
        }
    }
    double total = 0;
    for (int l = FQ_CPU_LIMBS - 1; l >= 0; l--) {
        int32_t limb_sum = _mm512_reduce_add_epi32(sum[l]);

        chunk->offset[l] = -limb_sum * (1 << (bits - 1));
        total = total * 256 + limb_sum;
    }
    chunk->sum = (float)total;
    chunk->unit = power_of_two(exponent + 1 - top);
}

static bool to_fixed(const struct fq_cpu_weights *weights, const float *x, enum fq_dtype type,
                     struct fq_cpu_fixed *fixed) {
    bool two = type == FQ_BF16; /* fp16's bound is too near to two limbs' error */
    struct fq_cpu_chunk *chunk = fixed->chunks;
    struct fq_cpu_span span = {0};

    while (fq_cpu_next_span(weights, &span)) {
        int64_t columns = span.end - span.begin;
        float squares, largest;

        chunk->largest = survey_chunk(x + span.begin, columns, &squares);
        if (chunk->largest >= 0x7f800000u)
            return false;
        memcpy(&largest, &chunk->largest, sizeof largest);
        if (!(largest * largest * (float)columns <= CREST_SQUARED * squares))
            two = false;
        chunk++;
    }
    chunk = fixed->chunks;
    span = (struct fq_cpu_span){0};
    while (fq_cpu_next_span(weights, &span))
        fix_chunk(x + span.begin, span.end - span.begin, two ? 14 : 22, weights->base.info.bits,
                  fixed->limbs + span.begin * FQ_CPU_LIMBS, chunk++);
    fixed->count = two ? 2 : 3;
    return true;
}

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

INLINE __m512i load_codes(const uint8_t *codes) {
    _mm_prefetch((const char *)codes + AHEAD, _MM_HINT_T0);
    return _mm512_load_si512(codes);
}

/* The 16 columns of a step for 16 rows: four registers of four columns each. */
INLINE void unpack(const uint8_t *codes, int64_t step, int half, int bits, __m512i *out) {
    const int pitch = FQ_CPU_BLOCK * 4; /* bytes from a word to the next */

    if (bits == 8) {
        for (int i = 0; i < 4; i++)
            out[i] = unsigned_code(load_codes(codes + (step * 4 + i) * pitch), 8);
    } else if (bits == 4) {
        for (int i = 0; i < 2; i++) {
            __m512i words = load_codes(codes + (step * 2 + i) * pitch);

            out[2 * i] = unsigned_code(words, 4);
            out[2 * i + 1] = unsigned_code(_mm512_srli_epi32(words, 4), 4);
        }
    } else {
        const uint8_t *three = codes + step / 2 * 3 * pitch;
        __m512i first = load_codes(three), second = load_codes(three + pitch);

        if (half) { /* word 2, and the top bytes of all three */
            __m512i third = load_codes(three + 2 * pitch);

            out[0] = four_of_three(third, 0);
            out[1] = four_of_three(third, 12);
            first = _mm512_srli_epi32(first, 24);
            first = insert_byte(first, _mm512_srli_epi32(second, 16), 0xff00);
            first = insert_byte(first, _mm512_srli_epi32(third, 8), 0xff0000);
            out[2] = four_of_three(first, 0);
            out[3] = four_of_three(first, 12);
        } else {
            out[0] = four_of_three(first, 0);
            out[1] = four_of_three(first, 12);
            out[2] = four_of_three(second, 0);
            out[3] = four_of_three(second, 12);
        }
    }
}

/* ---- The product ------------------------------------------------------------------------- */

struct block {
    const struct fq_cpu_weights *weights;
    const uint8_t *codes;
    const uint16_t *scales;
    const int8_t *zeros;
    const struct fq_cpu_fixed *fixed; /* the tile's first row */
};

INLINE __m512i four_of_x(const int8_t *limbs) {
    int32_t four;

    memcpy(&four, limbs, sizeof four);
    return _mm512_set1_epi32(four);
}

INLINE __m512 scale_of(const uint16_t *scales, enum fq_dtype type) {
    __m256i bits = _mm256_loadu_si256((const __m256i *)(const void *)scales);

    if (type == FQ_BF16)
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    return _mm512_cvtph_ps(bits);
}

/* values[m][lane..] += one chunk, for mr rows of X and nv registers of rows of W. */
INLINE void tile_chunk(const struct block *block, const struct fq_cpu_span *span, int lane,
                       float *values, int mr, int nv, int bits, int limbs) {
    const struct fq_cpu_fixed *fixed = block->fixed;
    __m512i sum[MR][4][FQ_CPU_LIMBS];

    UNROLL for (int m = 0; m < mr; m++) UNROLL for (int l = 0; l < limbs; l++) {
        __m512i offset = _mm512_set1_epi32(fixed[m].chunks[span->index].offset[l]);

        UNROLL for (int v = 0; v < nv; v++) sum[m][v][l] = offset;
    }
    for (int64_t step = span->begin / FQ_CPU_STEP; step < span->end / FQ_CPU_STEP; step++) {
        UNROLL for (int v = 0; v < nv; v++) {
            __m512i w[4];

            if (bits == 3 && step % 2)
                unpack(block->codes + (lane + v * LANES) * 4, step, 1, bits, w);
            else
                unpack(block->codes + (lane + v * LANES) * 4, step, 0, bits, w);
            UNROLL for (int i = 0; i < 4; i++) UNROLL for (int m = 0; m < mr; m++) {
                const int8_t *x = fixed[m].limbs + step * (FQ_CPU_STEP * FQ_CPU_LIMBS) + i * 4;

                UNROLL for (int l = 0; l < limbs; l++) sum[m][v][l] =
                    _mm512_dpbusd_epi32(sum[m][v][l], w[i], four_of_x(x + l * FQ_CPU_STEP));
            }
        }
    }
    UNROLL for (int v = 0; v < nv; v++) {
        const int64_t at = span->group * FQ_CPU_BLOCK + lane + v * LANES;
        __m512 scale = scale_of(block->scales + at, block->weights->base.info.scale_type);
        __m512 zero = _mm512_setzero_ps();

        if (block->zeros)
            zero = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
                _mm_loadu_si128((const __m128i *)(const void *)(block->zeros + at))));
        UNROLL for (int m = 0; m < mr; m++) {
            const struct fq_cpu_chunk *chunk = &fixed[m].chunks[span->index];
            float *out = values + m * FQ_CPU_BLOCK + lane + v * LANES;
            __m512 product = _mm512_cvtepi32_ps(sum[m][v][limbs - 1]);

            UNROLL for (int l = limbs - 2; l >= 0; l--) product =
                _mm512_fmadd_ps(product, _mm512_set1_ps(256), _mm512_cvtepi32_ps(sum[m][v][l]));
            if (block->zeros)
                product = _mm512_fnmadd_ps(zero, _mm512_set1_ps(chunk->sum), product);
            _mm512_store_ps(out, _mm512_fmadd_ps(_mm512_mul_ps(scale, _mm512_set1_ps(chunk->unit)),
                                                 product, _mm512_load_ps(out)));
        }
    }
}

/* One row of X is served by four registers of rows of W, four rows by one: the accumulators fill
 * the register file either way. */
INLINE void tile_run(const struct block *block, float *values, int mr, int bits, int limbs) {
    const int nv = 4 / mr;
    struct fq_cpu_span span = {0};

    memset(values, 0, (size_t)mr * FQ_CPU_BLOCK * sizeof *values);
    while (fq_cpu_next_span(block->weights, &span))
        for (int lane = 0; lane < FQ_CPU_BLOCK; lane += nv * LANES)
            tile_chunk(block, &span, lane, values, mr, nv, bits, limbs);
}

typedef void tile_function(const struct block *block, float *values);

#define TILE(bits, mr, limbs)                                                                      \
    static void tile_##bits##_##mr##_##limbs(const struct block *block, float *values) {           \
        tile_run(block, values, mr, bits, limbs);                                                  \
    }
#define TILES(bits)                                                                                \
    TILE(bits, 1, 2)                                                                               \
    TILE(bits, 2, 2) TILE(bits, 4, 2) TILE(bits, 1, 3) TILE(bits, 2, 3) TILE(bits, 4, 3)
#define TILE_NAMES(bits)                                                                           \
    {                                                                                              \
        {tile_##bits##_1_2, tile_##bits##_2_2, tile_##bits##_4_2}, {                               \
            tile_##bits##_1_3, tile_##bits##_2_3, tile_##bits##_4_3                                \
        }                                                                                          \
    }
TILES(8)
TILES(4)
TILES(3)

static tile_function *tile_for(int bits, int mr, int limbs) {
    static tile_function *const table[3][2][3] = {TILE_NAMES(8), TILE_NAMES(4), TILE_NAMES(3)};

    return table[bits == 8 ? 0 : bits == 4 ? 1 : 2][limbs - 2][mr / 2];
}

/* Limbs that a row takes with every operand; 0: it is left to fp32. */
static int limbs_of(const struct fq_cpu_job *job, int64_t row) {
    int limbs = job->operand[FQ_CPU_MAIN].fixed[row].count;

    if (job->operands > FQ_CPU_GATE) {
        int other = job->operand[FQ_CPU_GATE].fixed[row].count;

        limbs = !limbs || !other ? 0 : limbs > other ? limbs : other;
    }
    return limbs;
}

static void decode_block(const struct fq_cpu_job *job, int64_t index) {
    _Alignas(64) float values[FQ_CPU_OPERANDS * MR * FQ_CPU_BLOCK];

    for (int64_t row = 0; row < job->rows;) {
        int mr = 0, limbs = 2;

        for (int next; mr < MR && row + mr < job->rows && (next = limbs_of(job, row + mr)); mr++)
            if (next > limbs)
                limbs = next;
        if (mr == 0) {
            row++;
            continue;
        }
        if (mr == 3)
            mr = 2;
        for (int i = 0; i < job->operands; i++) {
            const struct fq_cpu_weights *weights = job->operand[i].weights;
            const int64_t groups_at = index * weights->groups * FQ_CPU_BLOCK;
            struct block block = {
                .weights = weights,
                .codes = weights->codes + index * weights->block_bytes,
                .scales = weights->scales + groups_at,
                .zeros = weights->zeros ? weights->zeros + groups_at : NULL,
                .fixed = job->operand[i].fixed + row,
            };

            tile_for(weights->base.info.bits, mr, limbs)(&block, values + i * mr * FQ_CPU_BLOCK);
        }
        fq_cpu_avx512.finish(job, index, row, mr, values);
        row += mr;
    }
}

static void decode(const struct fq_cpu_job *job) {
    const int64_t blocks = job->operand[FQ_CPU_MAIN].weights->blocks;

#pragma omp parallel for schedule(static) num_threads(job->threads) if (job->threads > 1)
    for (int64_t block = 0; block < blocks; block++)
        decode_block(job, block);

    for (int64_t row = 0; row < job->rows; row++) {
        struct fq_cpu_job one = *job;

        if (limbs_of(job, row))
            continue;
        one.row += row;
        one.rows = 1;
        one.x += row * job->operand[FQ_CPU_MAIN].weights->k_padded;
        for (int i = 0; i < one.operands; i++)
            if (one.operand[i].x_sum)
                one.operand[i].x_sum += row * one.operand[i].weights->groups;
        fq_cpu_avx512.decode(&one);
    }
}

static void panel(const struct fq_cpu_job *job) {
    fq_cpu_avx512.panel(job);
}

static void to_f32(float *out, const void *in, enum fq_dtype type, int64_t count) {
    fq_cpu_avx512.to_f32(out, in, type, count);
}

static void finish(const struct fq_cpu_job *job, int64_t block, int64_t row, int64_t rows,
                   float *values) {
    fq_cpu_avx512.finish(job, block, row, rows, values);
}

const struct fq_cpu_kernels fq_cpu_avx512vnni = {
    .name = "avx512vnni",
    .decode = decode,
    .panel = panel,
    .to_f32 = to_f32,
    .to_fixed = to_fixed,
    .finish = finish,
};
