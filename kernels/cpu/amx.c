/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Eight rows of X and more, any number of them, where the processor multiplies tiles of
 * bytes (AMX-INT8): up to 16 rows of 64 bytes by as many of 16 columns, 16384 products
 * in 16 cycles.  The arithmetic is dot.c's, and its results are, bit for bit.
 *
 *     A    a limb of 16 rows of X; where a pass is of eight, two limbs, one below the
 *          other (signed)
 *     B    16 rows of W: four columns of each in 64 bytes, as unpack() gives them; 8
 *          bits straight from where the codes lie
 *     C    sums of a chunk, int32, 16 rows of W wide
 *
 * A chunk's C is stored, its limbs are put together, scaled and added in vectors,
 * which is most of the work: it goes on beside the next tiles.
 */
#include "dot.h"

#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define AHEAD   16384                  /* bytes of codes that are asked for before their use */
#define VECTORS (FQ_CPU_BLOCK / LANES) /* of rows of W in a block */
#define ROWS    FQ_CPU_TILE_ROWS       /* of a tile */

bool fq_cpu_amx_allowed(void) {
    enum {
        ARCH_REQ_XCOMP_PERM = 0x1023,
        XFEATURE_XTILEDATA = 18
    };

    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

/* ---- Tiles ------------------------------------------------------------------------------- */

/* Tile registers: B in 0 and 1, A in 2 and 3, C in 4 to 7. */
#define TILE_LOAD(tile, from, pitch)                                                               \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile                                            \
                     :                                                                             \
                     : "r"(from), "r"((int64_t)(pitch))                                            \
                     : "memory")
#define TILE_STORE(tile, to)                                                                       \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)"                                        \
                     :                                                                             \
                     : "r"(to), "r"((int64_t)LANES * 4)                                            \
                     : "memory")
#define TILE_CLEAR(tile) __asm__ volatile("tilezero %%tmm" #tile :::)
/* C += A · B; B of unsigned bytes, or, 8 bits, of signed ones. */
#define TILE_DOT(c, a, b, bits)                                                                    \
    do {                                                                                           \
        if ((bits) == 8)                                                                           \
            __asm__ volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #c :::);                    \
        else                                                                                       \
            __asm__ volatile("tdpbsud %%tmm" #b ", %%tmm" #a ", %%tmm" #c :::);                    \
    } while (0)

/* Gives A so many columns. */
static void configure(int columns) {
    struct {
        uint8_t palette, start;
        uint8_t reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};

    for (int i = 0; i < 8; i++) {
        config.rows[i] = (uint8_t)(i < 2 ? columns / 4 : ROWS);
        config.row_bytes[i] = (uint16_t)(i == 2 || i == 3 ? columns : LANES * 4);
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

static void release(void) {
    __asm__ volatile("tilerelease");
}

/* ---- Codes to bytes ---------------------------------------------------------------------- */

/* A chunk's bytes that B is loaded from. */
struct bytes {
    const uint8_t *at;
    int pitch;  /* from four columns to the next four */
    int vector; /* from 16 rows of W to the next 16 */
    int tile;   /* from the columns of a tile to those of the next one */
};

typedef uint8_t unpacked[FQ_CPU_SEGMENT * FQ_CPU_BLOCK];

/* Asks for as many bytes of codes, AHEAD of these. */
INLINE void prefetch(const uint8_t *codes, int bytes) {
    for (int at = 0; at < bytes; at += 64)
        _mm_prefetch((const char *)codes + at + AHEAD, _MM_HINT_T1);
}

INLINE void unpack_step(const uint8_t *codes, int64_t step, int half, uint8_t *to, int vector,
                        int bits) {
    const int bytes = FQ_CPU_BLOCK * FQ_CPU_STEP * bits / 8;

    prefetch(codes + step * bytes, bytes);
    UNROLL for (int i = 0; i < 4; i++) UNROLL for (int v = 0; v < VECTORS; v++) _mm512_store_si512(
        to + v * vector + i * 64, unpack(codes + v * LANES * 4, step, half, i, bits));
}

/* 8 bits: the last columns of K, where a tile would reach beyond them. */
static void copy_codes(const uint8_t *codes, int columns, const struct bytes *layout, uint8_t *to) {
    for (int k = 0; k < columns; k += 4, codes += FQ_CPU_BLOCK * 4)
        for (int v = 0; v < VECTORS; v++)
            memcpy(to + v * layout->vector + k / 4 * layout->pitch, codes + v * LANES * 4,
                   LANES * 4);
}

/* The codes of a chunk as bytes. */
INLINE struct bytes unpack_chunk(const struct block *block, const struct fq_cpu_span *span,
                                 uint8_t *to, int bits) {
    const int columns = block->fixed->columns, columns_log2 = __builtin_ctz((unsigned)columns);
    const int count = (int)(span->end - span->begin);
    const int64_t first = span->begin / FQ_CPU_STEP;
    struct bytes bytes = {to, LANES * 4, columns * LANES, columns * FQ_CPU_BLOCK};

    if (bits == 8) {
        const uint8_t *codes = block->codes + span->begin * FQ_CPU_BLOCK;

        prefetch(codes, count * FQ_CPU_BLOCK);
        if ((count & (columns - 1)) == 0)
            return (struct bytes){codes, FQ_CPU_BLOCK * 4, LANES * 4, columns * FQ_CPU_BLOCK};
        for (int k = 0; k < count; k += columns)
            copy_codes(codes + k * FQ_CPU_BLOCK, count - k < columns ? count - k : columns, &bytes,
                       to + k * FQ_CPU_BLOCK);
        return bytes;
    }
    for (int k = 0; k < count; k += FQ_CPU_STEP) {
        uint8_t *out =
            to + (k >> columns_log2) * bytes.tile + (k & (columns - 1)) / 4 * bytes.pitch;

        if (bits == 3 && (first + k / FQ_CPU_STEP) % 2)
            unpack_step(block->codes, first + k / FQ_CPU_STEP, 1, out, bytes.vector, bits);
        else
            unpack_step(block->codes, first + k / FQ_CPU_STEP, 0, out, bytes.vector, bits);
    }
    return bytes;
}

/* ---- A chunk ----------------------------------------------------------------------------- */

struct chunk {
    struct fq_cpu_span span;
    struct bytes b;
    int tiles; /* of its columns */
    int limbs;
};

/* C of a block of rows of X and 32 rows of W, limb below limb. */
typedef int32_t product[2][FQ_CPU_LIMBS * ROWS][LANES];

/* a: the first limbs of the rows.  known: B of one tile is still there, from other rows. */
INLINE void multiply(const struct fq_cpu_fixed *fixed, const int8_t *a, const struct chunk *chunk,
                     int pair, bool known, product c, int rows, int bits) {
    const int pieces = (chunk->limbs * rows + ROWS - 1) / ROWS; /* tiles of A */
    const int64_t piece = (int64_t)ROWS * fixed->columns;
    const uint8_t *const first = chunk->b.at + 2 * pair * chunk->b.vector;

    for (int p = 0; p < pieces; p += 2) {
        const bool two = p + 1 < pieces, has_b = (known || p > 0) && chunk->tiles == 1;
        const int8_t *from = a + p * piece;
        const uint8_t *b = first;

        TILE_CLEAR(4);
        TILE_CLEAR(5);
        TILE_CLEAR(6);
        TILE_CLEAR(7);
        for (int i = 0; i < chunk->tiles; i++, from += fixed->columns_pitch, b += chunk->b.tile) {
            TILE_LOAD(2, from, fixed->columns);
            if (!has_b) {
                TILE_LOAD(0, b, chunk->b.pitch);
                TILE_LOAD(1, b + chunk->b.vector, chunk->b.pitch);
            }
            TILE_DOT(4, 2, 0, bits);
            TILE_DOT(5, 2, 1, bits);
            if (two) {
                TILE_LOAD(3, from + piece, fixed->columns);
                TILE_DOT(6, 3, 0, bits);
                TILE_DOT(7, 3, 1, bits);
            }
        }
        TILE_STORE(4, c[0][p * ROWS]);
        TILE_STORE(5, c[1][p * ROWS]);
        if (two) {
            TILE_STORE(6, c[0][(p + 1) * ROWS]);
            TILE_STORE(7, c[1][(p + 1) * ROWS]);
        }
    }
}

/* part[count][lane..], 32 rows of W, += C, its limbs put together, over the unit. */
INLINE void add_limbs(const struct block *block, const struct fq_cpu_chunk *chunk, int64_t group,
                      product c, int lane, float *part, int count, int rows, int bits, int limbs,
                      bool zeros) {
    __m512 scale[2], zero[2];

    UNROLL for (int v = 0; v < 2; v++) {
        const int64_t at = group * FQ_CPU_BLOCK + lane + v * LANES;

        scale[v] = scale_of(block->scales + at, block->weights->base.info.scale_type);
        if (zeros)
            zero[v] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
                _mm_loadu_si128((const __m128i *)(const void *)(block->zeros + at))));
    }
    for (int m = 0; m < count; m++, part += FQ_CPU_BLOCK) {
        UNROLL for (int v = 0; v < 2; v++) {
            float *out = part + lane + v * LANES;
            __m512i low = _mm512_add_epi32(_mm512_load_si512(c[v][m]),
                                           _mm512_slli_epi32(_mm512_load_si512(c[v][rows + m]), 8));
            __m512 sum;

            if (bits != 8)
                low = _mm512_add_epi32(low, _mm512_set1_epi32(chunk[m].offset[0]));
            sum = _mm512_cvtepi32_ps(low);
            if (limbs == LIMBS_ALL) {
                __m512i high = _mm512_load_si512(c[v][2 * rows + m]);

                if (bits != 8)
                    high = _mm512_add_epi32(high, _mm512_set1_epi32(chunk[m].offset[1]));
                sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(65536), sum);
            }
            if (zeros)
                sum = _mm512_fnmadd_ps(zero[v], _mm512_set1_ps(chunk[m].sum), sum);
            _mm512_store_ps(out, _mm512_fmadd_ps(sum, scale[v], _mm512_load_ps(out)));
        }
    }
}

INLINE void add(const struct block *block, const struct chunk *chunk, int64_t row, int pair,
                product c, float *part, int count, int rows, int bits) {
    const struct fq_cpu_fixed *fixed = block->fixed;
    const struct fq_cpu_chunk *first =
        fixed->chunks + (chunk->span.chunks - 1) * fixed->chunks_pitch + row;
    const int64_t group = chunk->span.group;
    const int lane = pair * 2 * LANES;

    part += row * FQ_CPU_BLOCK;
    if (block->zeros && chunk->limbs == LIMBS_ALL)
        add_limbs(block, first, group, c, lane, part, count, rows, bits, LIMBS_ALL, true);
    else if (block->zeros)
        add_limbs(block, first, group, c, lane, part, count, rows, bits, LIMBS_FEW, true);
    else if (chunk->limbs == LIMBS_ALL)
        add_limbs(block, first, group, c, lane, part, count, rows, bits, LIMBS_ALL, false);
    else
        add_limbs(block, first, group, c, lane, part, count, rows, bits, LIMBS_FEW, false);
}

/* ---- A block ----------------------------------------------------------------------------- */

/* The limbs that the rows' segment needs. */
static int limbs_of(const struct fq_cpu_fixed *fixed, int64_t rows, int64_t segment) {
    for (int64_t m = 0; m < rows; m++)
        if (fixed[m].segments[segment].limbs == LIMBS_ALL)
            return LIMBS_ALL;
    return LIMBS_FEW;
}

/* The chunk behind `chunk`, unpacked to `to`; false: there is none. */
INLINE bool next_chunk(const struct block *block, struct chunk *chunk, int64_t rows, uint8_t *to,
                       int bits) {
    const int columns_log2 = __builtin_ctz((unsigned)block->fixed->columns);
    const int64_t segment = chunk->span.segments;

    do {
        if (!fq_cpu_next_span(block->weights, &chunk->span) ||
            chunk->span.segment_begin >= block->end)
            return false;
    } while (chunk->span.segment_begin < block->begin);
    if (chunk->span.segments != segment)
        chunk->limbs = limbs_of(block->fixed, rows, chunk->span.segments - 1);
    chunk->tiles =
        (int)((chunk->span.end - chunk->span.begin + block->fixed->columns - 1) >> columns_log2);
    chunk->b = unpack_chunk(block, &chunk->span, to, bits);
    return true;
}

/* A step of a chunk: some rows of X times 32 rows of W. */
struct step {
    int pair;        /* which 32 */
    int64_t row;     /* of X, the first */
    const int8_t *a; /* its limbs */
};

/* values[rows][64]: all rows' products.  What is multiplied is added a step later. */
INLINE void run_block(const struct block *block, int64_t rows, float *values, int bits) {
    _Alignas(64) float part[FQ_DECODE_ROWS * FQ_CPU_BLOCK];
    _Alignas(64) unpacked codes[2];
    _Alignas(64) product c[2];
    const struct fq_cpu_fixed *fixed = block->fixed;
    const int tile_rows = fq_cpu_tile_rows(rows);
    const int columns_log2 = __builtin_ctz((unsigned)fixed->columns);
    const int steps = 2 * (int)((rows + tile_rows - 1) / tile_rows);
    struct chunk chunk = {0};
    bool more = next_chunk(block, &chunk, rows, codes[0], bits);

    memset(part, 0, (size_t)rows * FQ_CPU_BLOCK * sizeof *part);
    memset(values, 0, (size_t)rows * FQ_CPU_BLOCK * sizeof *values);
    configure(fixed->columns);
    for (int turn = 1; more; turn ^= 1) {
        const struct chunk this = chunk;
        const int8_t *a = fixed->limbs + (this.span.begin >> columns_log2) * fixed->columns_pitch;
        struct step here = {.a = a}, before = here;

        for (int i = 0; i <= steps; i++) {
            if (i < steps)
                multiply(fixed, here.a, &this, here.pair, here.row > 0, c[i % 2], tile_rows, bits);
            else
                more = next_chunk(block, &chunk, rows, codes[turn], bits);
            if (i > 0)
                add(block, &this, before.row, before.pair, c[1 - i % 2], part,
                    (int)(rows - before.row < tile_rows ? rows - before.row : tile_rows), tile_rows,
                    bits);
            before = here;
            here.row += tile_rows;
            here.a += FQ_CPU_LIMBS * fixed->pitch;
            if (here.row >= rows)
                here = (struct step){.pair = 1, .a = a};
        }
        if (!more || chunk.span.segments != this.span.segments)
            end_segment(block, this.span.segments - 1, part, values, (int)rows);
    }
    release();
}

/* values[operand][rows][64], over part `split` of K. */
static void run(const struct fq_cpu_job *job, int64_t index, int64_t split, int64_t splits,
                float *values) {
    for (int i = 0; i < job->operands; i++, values += job->rows * FQ_CPU_BLOCK) {
        const struct block block = block_of(job, i, index, 0, split, splits);

        if (block.weights->base.info.bits == 8)
            run_block(&block, job->rows, values, 8);
        else if (block.weights->base.info.bits == 4)
            run_block(&block, job->rows, values, 4);
        else
            run_block(&block, job->rows, values, 3);
    }
}

static void run_whole(const struct fq_cpu_job *job, int64_t index) {
    _Alignas(64) float values[FQ_CPU_OPERANDS * FQ_DECODE_ROWS * FQ_CPU_BLOCK];

    run(job, index, 0, 1, values);
    FALLBACK.finish(job, index, 0, job->rows, values);
}

static void join_parts(const struct fq_cpu_job *job, int64_t index, float *values) {
    FALLBACK.finish(job, index, 0, job->rows, values);
}

static void decode(const struct fq_cpu_job *job) {
    fq_cpu_run_blocks(job, run_whole, run, join_parts);
}

/* ---- X ----------------------------------------------------------------------------------- */

static void to_fixed(const struct fq_cpu_weights *weights, const float *x, enum fq_dtype type,
                     struct fq_cpu_fixed *fixed) {
    int8_t *last = fixed->limbs + weights->k_padded / fixed->columns * fixed->columns_pitch;

    if (weights->k_padded % fixed->columns) /* columns of the last tile that are none of X's */
        for (int l = 0; l < FQ_CPU_LIMBS; l++)
            memset(last + l * fixed->pitch, 0, (size_t)fixed->columns);
    fq_cpu_to_fixed(weights, x, type, fixed);
}

const struct fq_cpu_kernels fq_cpu_amx = {
    .name = "amx",
    .decode = decode,
    .to_f32 = to_f32,
    .to_fixed = to_fixed,
    .limb_bytes = FQ_CPU_LIMBS,
    .few = &fq_cpu_avx512vnni,
};
