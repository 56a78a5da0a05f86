/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Any number of rows where the processor multiplies tiles of bytes (AMX-INT8): up to
 * 16 rows of 64 bytes by as many of 16 columns, 16384 products in 16 cycles.  The
 * arithmetic is dot.c's, and its results are, bit for bit.
 *
 *     A    limbs of a block of rows of X, limb below limb: all three, or two and then
 *          the third (signed)
 *     B    16 rows of W: four columns of each in 64 bytes, as unpack() gives them; 8
 *          bits straight from where the codes lie
 *     C    sums of a chunk, int32, 16 rows of W wide
 *
 * What bounds it is what surrounds the products: codes become bytes in memory, which B
 * is loaded from, and C goes through memory to vectors.  Neither may be asked for right
 * after it was stored, or all waits some hundred cycles for the stores; and the work
 * between two products has to be little, so that the next one is within sight.  So of a
 * unit, a tile of 16 rows of W,
 *
 *     codes are unpacked     two units before
 *     B is multiplied        and C stored, where the chunk ends
 *     sums are put together  two units later, scaled and added up
 */
#include "dot.h"

#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define VECTORS (FQ_CPU_BLOCK / LANES) /* of rows of W in a block */
#define LAG     2                      /* units: of the four vectors, which are unrolled */

bool fq_cpu_amx_allowed(void) {
    enum {
        ARCH_REQ_XCOMP_PERM = 0x1023,
        XFEATURE_XTILEDATA = 18
    };

    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

/* ---- Tiles ------------------------------------------------------------------------------- */

/* Tile registers: B in 0 and 1, A in 2, C of the four vectors in 4 to 7.  What memory is read and
 * written is said by operands: a clobber of all of it would have every address fetched again. */
#define TILE_BYTES (FQ_CPU_TILE_ROWS * FQ_CPU_TILE)
#define TILE_LOAD(tile, from, pitch)                                                               \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile                                            \
                     :                                                                             \
                     : "r"(from), "r"((int64_t)(pitch)),                                           \
                       "m"(*(const uint8_t(*)[TILE_BYTES])(const void *)(from)))
#define TILE_STORE(tile, to)                                                                       \
    __asm__ volatile("tilestored %%tmm" #tile ", (%1,%2,1)"                                        \
                     : "=m"(*(uint8_t(*)[TILE_BYTES])(void *)(to))                                 \
                     : "r"(to), "r"((int64_t)LANES * 4))
#define TILE_CLEAR(tile) __asm__ volatile("tilezero %%tmm" #tile :::)
/* C += A · B; B of unsigned bytes, or, 8 bits, of signed ones. */
#define TILE_DOT(c, a, b, bits)                                                                    \
    do {                                                                                           \
        if ((bits) == 8)                                                                           \
            __asm__ volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #c :::);                    \
        else                                                                                       \
            __asm__ volatile("tdpbsud %%tmm" #b ", %%tmm" #a ", %%tmm" #c :::);                    \
    } while (0)

/* A of so many rows of `columns` bytes.  Tile operations take a cycle or two a row. */
static void configure(int a_rows, int columns) {
    struct {
        uint8_t palette, start;
        uint8_t reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};

    for (int i = 0; i < 8; i++) {
        config.rows[i] = (uint8_t)(i < 2 ? columns / 4 : a_rows);
        config.row_bytes[i] = (uint16_t)(i == 2 ? columns : LANES * 4);
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

static void release(void) {
    __asm__ volatile("tilerelease");
}

/* C of a vector: A times B, added to what is there unless it is the chunk's first. */
INLINE void multiply(const uint8_t *b, int64_t pitch, int vector, bool first, int bits) {
#define UNIT(b_tile, c_tile)                                                                       \
    do {                                                                                           \
        TILE_LOAD(b_tile, b, pitch);                                                               \
        if (first)                                                                                 \
            TILE_CLEAR(c_tile);                                                                    \
        TILE_DOT(c_tile, 2, b_tile, bits);                                                         \
    } while (0)
    if (vector == 0)
        UNIT(0, 4);
    else if (vector == 1)
        UNIT(1, 5);
    else if (vector == 2)
        UNIT(0, 6);
    else
        UNIT(1, 7);
#undef UNIT
}

INLINE void store_c(int vector, int32_t (*to)[LANES]) {
    if (vector == 0)
        TILE_STORE(4, to);
    else if (vector == 1)
        TILE_STORE(5, to);
    else if (vector == 2)
        TILE_STORE(6, to);
    else
        TILE_STORE(7, to);
}

/* What a pass is.  bits, columns and limbs are known when compiled. */
struct plan {
    int64_t rows;
    int batch;   /* rows that are multiplied together: fq_cpu_tile_rows() */
    int a_rows;  /* of a tile of A: two or three limbs of a batch */
    int bits;    /* of the codes */
    int columns; /* of a tile of A */
    int limbs;   /* what every row has, where all rows are one batch and all limbs one tile; or 0:
                    as each chunk says */
};

/* ---- B ----------------------------------------------------------------------------------- */

/* Columns that share a scale, and where B of them is. */
struct chunk {
    struct fq_cpu_span span;
    int limbs;                /* in use */
    int count, tiles;         /* columns, and tiles of them; the last may reach beyond */
    const uint8_t *codes;     /* of the first step; 3 bits: of the first pair of steps */
    const uint8_t *codes_end; /* as of a block */
    uint8_t *bytes;           /* [tiles][VECTORS][columns / 4][64]: unpacked, or copied */
};

INLINE uint8_t *bytes_of(struct plan plan, const struct chunk *chunk, int tile, int vector) {
    return chunk->bytes + (tile * VECTORS + vector) * plan.columns * LANES;
}

#define PAGES 4 /* that are asked for in turn */

/* Asks for what lies behind a tile: each vector for its part, in whole turns. */
INLINE void prefetch_unit(struct plan plan, const struct chunk *chunk, int tile, int vector) {
    const int part = plan.columns * LANES * plan.bits / 8;
    const int begin = (vector * part + turn(PAGES) - 1) / turn(PAGES) * turn(PAGES);
    const int end = ((vector + 1) * part + turn(PAGES) - 1) / turn(PAGES) * turn(PAGES);

    prefetch(chunk->codes + tile * VECTORS * part + begin, end - begin, chunk->codes_end, PAGES);
}

INLINE void unpack_step(struct plan plan, const uint8_t *codes, int step, int half, uint8_t *to) {
    UNROLL for (int i = 0; i < 4; i++)
        _mm512_store_si512(to + i * LANES * 4, unpack(codes, step, half, i, plan.bits));
}

/* A unit's codes to bytes.  Behind the last columns of K bytes stay what they were: X is zero
 * there. */
INLINE void unpack_unit(struct plan plan, const struct chunk *chunk, int tile, int vector) {
    const int left = chunk->count - tile * plan.columns;
    const uint8_t *codes = chunk->codes + vector * LANES * 4;
    uint8_t *to = bytes_of(plan, chunk, tile, vector);

    prefetch_unit(plan, chunk, tile, vector);
    if (plan.bits == 3 && plan.columns == FQ_CPU_STEP) { /* a pair of steps may begin outside */
        const int step = tile + (int)(chunk->span.begin / FQ_CPU_STEP % 2);

        if (step % 2)
            unpack_step(plan, codes, step, 1, to);
        else
            unpack_step(plan, codes, step, 0, to);
        return;
    }
    codes += tile * plan.columns * FQ_CPU_BLOCK * plan.bits / 8;
    UNROLL for (int step = 0; step < plan.columns / FQ_CPU_STEP; step++) {
        if (step * FQ_CPU_STEP == left)
            break;
        unpack_step(plan, codes, step, step % 2, to + step * FQ_CPU_STEP * LANES);
    }
}

/* Unpacks the unit LAG behind this one, of this chunk or, if there is one, the next. */
INLINE void unpack_ahead(struct plan plan, const struct chunk *chunk, const struct chunk *next,
                         bool more, int tile, int vector) {
    if (vector < VECTORS - LAG)
        unpack_unit(plan, chunk, tile, vector + LAG);
    else if (tile + 1 < chunk->tiles)
        unpack_unit(plan, chunk, tile + 1, vector + LAG - VECTORS);
    else if (more)
        unpack_unit(plan, next, 0, vector + LAG - VECTORS);
}

/* 8 bits: B straight from the codes, but for the last columns of K, which a tile would reach
 * beyond. */
INLINE const uint8_t *codes_of_8(struct plan plan, const struct chunk *chunk, int tile, int vector,
                                 int64_t *pitch) {
    const int left = chunk->count - tile * plan.columns;
    const uint8_t *codes = chunk->codes + tile * plan.columns * FQ_CPU_BLOCK + vector * LANES * 4;
    uint8_t *to;

    *pitch = FQ_CPU_BLOCK * 4;
    if (left >= plan.columns)
        return codes;
    to = bytes_of(plan, chunk, tile, vector);
    for (int k = 0; k < left; k += 4)
        memcpy(to + k * LANES, codes + k * FQ_CPU_BLOCK, LANES * 4);
    *pitch = LANES * 4;
    return to;
}

/* The limbs that the rows' segment needs. */
static int limbs_of(const struct fq_cpu_fixed *fixed, int64_t rows, int64_t segment) {
    for (int64_t m = 0; m < rows; m++)
        if (fixed[m].segments[segment].limbs == LIMBS_ALL)
            return LIMBS_ALL;
    return LIMBS_FEW;
}

/* Goes to the next chunk; false: there is none. */
INLINE bool next_chunk(struct plan plan, const struct block *block, struct chunk *chunk) {
    const int64_t segment = chunk->span.segments;
    int64_t begin;

    do {
        if (!fq_cpu_next_span(block->weights, &chunk->span) ||
            chunk->span.segment_begin >= block->end)
            return false;
    } while (chunk->span.segment_begin < block->begin);
    begin = chunk->span.begin;
    if (plan.bits == 3)
        begin -= begin % (2 * FQ_CPU_STEP);
    chunk->codes = block->codes + begin * FQ_CPU_BLOCK * plan.bits / 8;
    chunk->count = (int)(chunk->span.end - chunk->span.begin);
    chunk->tiles = (chunk->count + plan.columns - 1) / plan.columns;
    if (plan.limbs)
        chunk->limbs = plan.limbs;
    else if (chunk->span.segments != segment)
        chunk->limbs = limbs_of(block->fixed, plan.rows, chunk->span.segments - 1);
    return true;
}

/* ---- C ----------------------------------------------------------------------------------- */

/* Rows of X that are multiplied together, in a chunk. */
struct batch {
    const struct fq_cpu_chunk *x; /* [count] */
    int64_t segment, group, row;
    int count, limbs; /* count: 0: none */
};

/* What has been summed of a block. */
struct sums {
    _Alignas(64) float part[FQ_DECODE_ROWS * FQ_CPU_BLOCK]; /* of a segment, over its unit */
    int64_t segment;
    float *values; /* [rows][64]: of the segments before */
};

/* part[count][lane..], 16 rows of W, += C, its limbs put together, over the unit. */
INLINE void add_limbs(struct plan plan, const struct block *block, const struct batch *batch,
                      int32_t (*c)[LANES], int lane, float *part, int limbs, bool zeros) {
    const struct fq_cpu_chunk *x = batch->x;
    const int64_t at = batch->group * FQ_CPU_BLOCK + lane;
    const __m512 scale = scale_of(block->scales + at, block->weights->base.info.scale_type);
    __m512 zero = _mm512_setzero_ps();

    if (zeros)
        zero = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
            _mm_loadu_si128((const __m128i *)(const void *)(block->zeros + at))));
    part += batch->row * FQ_CPU_BLOCK + lane;
    for (int m = 0; m < batch->count; m++, x++, part += FQ_CPU_BLOCK) {
        __m512i low = _mm512_add_epi32(_mm512_load_si512(c[m]),
                                       _mm512_slli_epi32(_mm512_load_si512(c[plan.batch + m]), 8));
        __m512 sum;

        if (plan.bits != 8)
            low = _mm512_add_epi32(low, _mm512_set1_epi32(x->offset[0]));
        sum = _mm512_cvtepi32_ps(low);
        if (limbs == LIMBS_ALL) {
            __m512i high = _mm512_load_si512(c[2 * plan.batch + m]);

            if (plan.bits != 8)
                high = _mm512_add_epi32(high, _mm512_set1_epi32(x->offset[1]));
            sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(65536), sum);
        }
        if (zeros)
            sum = _mm512_fnmadd_ps(zero, _mm512_set1_ps(x->sum), sum);
        _mm512_store_ps(part, _mm512_fmadd_ps(sum, scale, _mm512_load_ps(part)));
    }
}

/* Adds a vector's C to the sums; what they hold of another segment goes to the values first. */
INLINE void add(struct plan plan, const struct block *block, const struct batch *batch,
                int32_t (*c)[LANES], int vector, struct sums *sums) {
    const int limbs = plan.limbs ? plan.limbs : batch->limbs, lane = vector * LANES;

    if (batch->segment != sums->segment) {
        end_segment(block, sums->segment, sums->part, sums->values, (int)plan.rows);
        sums->segment = batch->segment;
    }
    if (block->zeros && limbs == LIMBS_ALL)
        add_limbs(plan, block, batch, c, lane, sums->part, LIMBS_ALL, true);
    else if (block->zeros)
        add_limbs(plan, block, batch, c, lane, sums->part, LIMBS_FEW, true);
    else if (limbs == LIMBS_ALL)
        add_limbs(plan, block, batch, c, lane, sums->part, LIMBS_ALL, false);
    else
        add_limbs(plan, block, batch, c, lane, sums->part, LIMBS_FEW, false);
}

/* ---- A block ----------------------------------------------------------------------------- */

/* values[rows][64]: all rows' products. */
INLINE void run_block(struct plan plan, const struct block *block, float *values) {
    /* in turns, since the last rows of a chunk want its bytes while the next one's are unpacked */
    _Alignas(64) uint8_t bytes[2][FQ_CPU_SEGMENT * FQ_CPU_BLOCK];
    _Alignas(64) int32_t c[VECTORS * 2 * FQ_CPU_TILE_ROWS][LANES];
    const int c_rows = (plan.limbs ? 1 : 2) * FQ_CPU_TILE_ROWS; /* of a vector */
    const struct fq_cpu_fixed *fixed = block->fixed;
    struct sums sums;
    struct chunk next = {.codes_end = block->codes_end, .bytes = bytes[0]};
    struct batch rest = {0}; /* whose last LAG vectors are still in C */
    bool more = next_chunk(plan, block, &next);

    memset(values, 0, (size_t)plan.rows * FQ_CPU_BLOCK * sizeof *values);
    if (!more)
        return;
    memset(sums.part, 0, (size_t)plan.rows * FQ_CPU_BLOCK * sizeof *sums.part);
    sums.segment = next.span.segments - 1;
    sums.values = values;
    configure(plan.a_rows, plan.columns);
    if (plan.bits != 8)
        UNROLL for (int v = 0; v < LAG; v++) unpack_unit(plan, &next, 0, v);
    while (more) {
        const struct chunk chunk = next;
        const int8_t *a = fixed->limbs + chunk.span.begin / plan.columns * fixed->columns_pitch;
        const int pieces = /* tiles of A */
            !plan.limbs && chunk.limbs * plan.batch > plan.a_rows ? 2 : 1;
        struct batch batch = {
            .x = fixed->chunks + (chunk.span.chunks - 1) * fixed->chunks_pitch,
            .segment = chunk.span.segments - 1,
            .group = chunk.span.group,
            .limbs = chunk.limbs,
        };

        more = next_chunk(plan, block, &next);
        if (!plan.limbs)
            next.bytes = chunk.bytes == bytes[0] ? bytes[1] : bytes[0];
        do {
            const int64_t left = plan.rows - batch.row;

            batch.count = plan.limbs || left > plan.batch ? plan.batch : (int)left;
            for (int piece = 0; piece < pieces; piece++)
                for (int tile = 0; tile < chunk.tiles; tile++) {
                    const bool first = plan.limbs || (batch.row == 0 && piece == 0);
                    const bool last = tile == chunk.tiles - 1;

                    TILE_LOAD(2,
                              a + tile * fixed->columns_pitch + piece * plan.a_rows * plan.columns,
                              plan.columns);
                    UNROLL for (int v = 0; v < VECTORS; v++) {
                        const uint8_t *b = bytes_of(plan, &chunk, tile, v);
                        int64_t pitch = LANES * 4;

                        if (plan.bits == 8)
                            b = codes_of_8(plan, &chunk, tile, v, &pitch);
                        if (first && plan.bits == 8)
                            prefetch_unit(plan, &chunk, tile, v);
                        else if (first)
                            unpack_ahead(plan, &chunk, &next, more, tile, v);
                        multiply(b, pitch, v, tile == 0, plan.bits);
                        if (v < LAG && rest.count)
                            add(plan, block, &rest, c + (VECTORS - LAG + v) * c_rows,
                                VECTORS - LAG + v, &sums);
                        if (last)
                            store_c(v, c + v * c_rows + piece * plan.a_rows);
                        if (v >= LAG && last && piece == pieces - 1)
                            add(plan, block, &batch, c + (v - LAG) * c_rows, v - LAG, &sums);
                    }
                    rest.count = 0;
                }
            rest = batch;
            a += FQ_CPU_LIMBS * fixed->pitch;
            batch.row += plan.batch;
            batch.x += plan.batch;
        } while (!plan.limbs && batch.row < plan.rows);
    }
    UNROLL for (int v = VECTORS - LAG; v < VECTORS; v++)
        add(plan, block, &rest, c + v * c_rows, v, &sums);
    end_segment(block, sums.segment, sums.part, values, (int)plan.rows);
    release();
}

/* plan.limbs: of rows that are one batch, if a tile holds all limbs that they have. */
static int limbs_of_all(const struct fq_cpu_fixed *fixed, int64_t rows, int batch, int in_tile) {
    if (batch < rows)
        return 0;
    for (int64_t m = 0; m < rows; m++)
        if (fixed[m].most_limbs > in_tile)
            return 0;
    return in_tile;
}

INLINE void run_bits(const struct block *block, int64_t rows, float *values, enum fq_dtype type,
                     int bits) {
    const int batch = fq_cpu_tile_rows(rows, type), in_tile = fq_cpu_tile_limbs(type);
    const int limbs = limbs_of_all(block->fixed, rows, batch, in_tile);
    struct plan plan = {rows, batch, in_tile * batch, bits, FQ_CPU_TILE, 0};

    /* what is constant here is so in all of run_block() */
    if (block->fixed->columns == FQ_CPU_STEP) {
        plan.columns = FQ_CPU_STEP;
        run_block(plan, block, values);
    } else if (block->fixed->columns == FQ_CPU_TILE / 2) {
        plan.columns = FQ_CPU_TILE / 2;
        run_block(plan, block, values);
    } else if (limbs == LIMBS_FEW) {
        plan.limbs = LIMBS_FEW;
        run_block(plan, block, values);
    } else if (limbs == LIMBS_ALL) {
        plan.limbs = LIMBS_ALL;
        run_block(plan, block, values);
    } else {
        run_block(plan, block, values);
    }
}

static void run_any(const struct block *block, int64_t rows, float *values, enum fq_dtype type) {
    if (block->weights->base.info.bits == 8)
        run_bits(block, rows, values, type, 8);
    else if (block->weights->base.info.bits == 4)
        run_bits(block, rows, values, type, 4);
    else
        run_bits(block, rows, values, type, 3);
}

/* values[operand][rows][64], over part `split` of K. */
static void run(const struct fq_cpu_job *job, int64_t index, int64_t end, int64_t split,
                int64_t splits, float *values) {
    for (int i = 0; i < job->operands; i++, values += job->rows * FQ_CPU_BLOCK) {
        const struct block block = block_of(job, i, index, end, 0, split, splits);

        run_any(&block, job->rows, values, job->gemm->type);
    }
}

static void run_whole(const struct fq_cpu_job *job, int64_t index, int64_t end) {
    _Alignas(64) float values[FQ_CPU_OPERANDS * FQ_DECODE_ROWS * FQ_CPU_BLOCK];

    run(job, index, end, 0, 1, values);
    FALLBACK.finish(job, index, 0, job->rows, values);
}

static void run_part(const struct fq_cpu_job *job, int64_t index, int64_t split, int64_t splits,
                     float *values) {
    run(job, index, index + 1, split, splits, values);
}

static void join_parts(const struct fq_cpu_job *job, int64_t index, float *values) {
    FALLBACK.finish(job, index, 0, job->rows, values);
}

static void decode(const struct fq_cpu_job *job) {
    fq_cpu_run_blocks(job, run_whole, run_part, join_parts);
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
    .few = &fq_cpu_avx512gfni,
};
