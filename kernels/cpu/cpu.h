/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Inside the cpu backend: the prepacked layout and the table of functions that
 * each instruction set provides.
 *
 * The layout.  Rows of W are taken in blocks of 64 (the last one padded with
 * zero weights), K is padded to a multiple of 32.  A vector lane is a row, so
 * that a weight is multiplied with a broadcast activation and nothing is summed
 * across lanes:
 *
 *     codes:         word 0 of rows 0..63 | word 1 of rows 0..63 | ...
 *     scales:        group 0 of rows 0..63 | group 1 of rows 0..63 | ...
 *     zero points:   likewise, as int8: zero − 2^(bits−1)
 *
 * The words of a row, codes by their column, highest bits left:
 *
 *     8 bits:  |   3   |   2   |   1   |   0   |     four columns of one row lie in
 *     4 bits:  | 7 | 3 | 6 | 2 | 5 | 1 | 4 | 0 |     the bytes of one lane
 *     3 bits:  |a 7 3|a 6 2|a 5 1|a 4 0|     three words hold 32 codes; the two bits
 *              |b . .|b . .|b . .|b . .|     c b a that each byte has left are, as
 *              |c . .|c . .|c . .|c . .|     one number, 31 27, 30 26, 29 25 and 28 24
 *
 * Codes are stored less 2^(bits−1), in two's complement of `bits` bits, so that
 * sign extension gives the weight over its scale exactly.
 */
#ifndef FQ_KERNELS_CPU_H
#define FQ_KERNELS_CPU_H

#include "../backend-impl.h"

#define FQ_CPU_BLOCK     64  /* rows of W in a block */
#define FQ_CPU_K_ALIGN   32  /* K is padded to this */
#define FQ_CPU_STEP      16  /* columns a kernel step takes; no group boundary lies inside */
#define FQ_CPU_ROWS_PASS 384 /* rows of X that a large-M pass takes at once */
#define FQ_CPU_PANEL_K   512 /* columns of W dequantized at once for large M */
#define FQ_CPU_UNITS     16  /* blocks, or blocks and parts of K, that are work for all threads */
#define FQ_CPU_SPLIT_K   512 /* columns that a part of K has at least */

struct fq_cpu_weights {
    struct fq_weights base;
    int64_t blocks; /* ceil(n / 64) */
    int64_t k_padded;
    int64_t groups;
    int64_t block_bytes;    /* codes of one block */
    const uint8_t *codes;   /* [blocks][block_bytes], 64-byte aligned */
    const uint16_t *scales; /* [blocks][groups][64] */
    const int8_t *zeros;    /* [blocks][groups][64], or NULL */
    void *mapping;          /* owns all three */
    size_t mapping_bytes;
};

/* A row of X in block fixed point, as fixed.c describes.  A chunk is the span of columns that share
 * a scale: a group, or FQ_CPU_SEGMENT columns of a longer one.  A segment is the chunks that share
 * a unit, at most FQ_CPU_SEGMENT columns. */
#define FQ_CPU_SEGMENT 256
#define FQ_CPU_LIMBS   3

struct fq_cpu_chunk {
    int32_t offset[2]; /* what an accumulator begins with, to make unsigned codes signed:
                          −2^(bits−1) times the sum of limbs 0 and 1 together, and of limb 2; or,
                          of 16-bit limbs, of either */
    float sum;         /* of the integers */
};

struct fq_cpu_segment {
    float unit;
    int32_t limbs; /* in use: 2 or 3, or 1 or 2 of 16 bits; the last is 0 otherwise */
};

struct fq_cpu_fixed {
    bool valid;                      /* else the row has to be computed in fp32 */
    int8_t *limbs;                   /* [k_padded / columns][FQ_CPU_LIMBS][columns], or in tiles,
                                        see fq_cpu_tile_rows(); or int16_t [k_padded / 16][2][16]
                                        (words-fixed.c) */
    int most_limbs;                  /* of a segment */
    int columns;                     /* a power of two, 16 to 64 */
    int64_t pitch, columns_pitch;    /* bytes from a limb to the next, and to the next columns */
    int64_t chunks_pitch;            /* chunks from one to the next */
    struct fq_cpu_chunk *chunks;     /* [fq_cpu_chunks] */
    struct fq_cpu_segment *segments; /* [fq_cpu_chunks] is enough */
};

/* Walks the chunks: start with {0}. */
struct fq_cpu_span {
    int64_t begin, end;       /* columns */
    int64_t group, group_end; /* the group they lie in, and where that ends */
    int64_t segment_begin;    /* likewise the segment */
    int64_t chunks, segments; /* begun so far, this one included */
};

static inline bool fq_cpu_next_span(const struct fq_cpu_weights *weights,
                                    struct fq_cpu_span *span) {
    span->begin = span->end;
    if (span->begin >= weights->k_padded)
        return false;
    if (span->begin == span->group_end) {
        span->group += span->chunks > 0;
        span->group_end += weights->base.info.group;
        /* Padding past k belongs to the last group: its weights are zero. */
        if (span->group == weights->groups - 1)
            span->group_end = weights->k_padded;
    }
    span->end = span->begin + FQ_CPU_SEGMENT;
    if (span->end > span->group_end)
        span->end = span->group_end;
    span->chunks++;
    if (span->segments == 0 || span->end > span->segment_begin + FQ_CPU_SEGMENT) {
        span->segment_begin = span->begin;
        span->segments++;
    }
    return true;
}

static inline int64_t fq_cpu_chunks(const struct fq_cpu_weights *weights) {
    struct fq_cpu_span span = {0};

    while (fq_cpu_next_span(weights, &span))
        ;
    return span.chunks;
}

/* Parts of K that a block's products are computed in, to be summed in order: few blocks alone would
 * leave threads idle.  By the shape alone, never by the threads, so that every machine and every
 * company of rows gives the same bits. */
static inline int64_t fq_cpu_splits(const struct fq_cpu_weights *weights) {
    const int64_t wanted = FQ_CPU_UNITS / weights->blocks;
    const int64_t most = weights->k_padded / FQ_CPU_SPLIT_K;

    return wanted < 2 || most < 2 ? 1 : wanted < most ? wanted : most;
}

/* One of a GEMM's matrices, with what its groups make of X. */
struct fq_cpu_operand {
    const struct fq_cpu_weights *weights;
    const float *x_sum; /* [rows][groups]: sums of x over each group; NULL when symmetric */
    const struct fq_cpu_fixed *fixed; /* [rows]; NULL where the kernels have no to_fixed */
};

enum {
    FQ_CPU_MAIN,
    FQ_CPU_GATE,
    FQ_CPU_OPERANDS
};

/* A GEMM with X converted: what the instruction sets compute. */
struct fq_cpu_job {
    const struct fq_gemm *gemm;
    int operands; /* 1, or 2 with a gate: of the same n, k and bits */
    struct fq_cpu_operand operand[FQ_CPU_OPERANDS];
    int64_t row;            /* first row of X and Y that this pass covers */
    int64_t rows;           /* and how many */
    const float *x;         /* [rows][k_padded], zero-padded */
    const uint16_t *x_bf16; /* likewise, for panel_bf16; x is NULL then */
    int threads;
    /* 64-byte aligned.  Many rows: [threads][fq_cpu_scratch_floats(rows, operands)].  Few, with
     * splits: [blocks][splits][rows][operands][64]. */
    float *scratch;
};

/* Floats that one thread needs for a pass of `rows` rows. */
size_t fq_cpu_scratch_floats(int64_t rows, int operands);

/* A block's rows of Y, the block being one of those up to `end` that a thread takes one after
 * another; or its products over part `split` of K, to part[rows][operands][64], of
 * which a tile of rows has its own order, and the end of it, where values[] is the sum of all
 * parts. */
typedef void fq_cpu_whole(const struct fq_cpu_job *job, int64_t block, int64_t end);
typedef void fq_cpu_part(const struct fq_cpu_job *job, int64_t block, int64_t split, int64_t splits,
                         float *part);
typedef void fq_cpu_join(const struct fq_cpu_job *job, int64_t block, float *values);

/* Decode by the job's threads: every block whole; or, where they are few, by parts of K, in any
 * order, and each block's sum in the order of K.  Rows that no part fills are summed as they are,
 * and for join() to leave alone.  (cpu.c) */
void fq_cpu_run_blocks(const struct fq_cpu_job *job, fq_cpu_whole *whole, fq_cpu_part *part,
                       fq_cpu_join *join);

struct fq_cpu_kernels {
    const char *name;
    /* Both compute all rows of the job and apply the epilogue.  decode: per-row results do not
     * depend on the other rows.  panel: dequantizes a panel at a time, for many rows; NULL: they go
     * to decode, FQ_DECODE_ROWS at a time. */
    void (*decode)(const struct fq_cpu_job *job);
    void (*panel)(const struct fq_cpu_job *job);
    /* panel for X of bf16, as it is.  NULL: it is converted and goes to panel. */
    void (*panel_bf16)(const struct fq_cpu_job *job);
    /* One row of X to float. */
    void (*to_f32)(float *out, const void *in, enum fq_dtype type, int64_t count);
    /* One row of X, [k_padded] floats of what was `type`, to what fixed->limbs and ->chunks point
     * to, and fixed->valid.  NULL: decode takes floats. */
    void (*to_fixed)(const struct fq_cpu_weights *weights, const float *x, enum fq_dtype type,
                     struct fq_cpu_fixed *fixed);
    /* `columns` columns of a block from column k on, both multiples of 16, to panel[columns][64];
     * aligned to 64 bytes.  Only kernels that others build on have it and finish. */
    void (*dequantize)(const struct fq_cpu_weights *weights, int64_t block, int64_t k,
                       int64_t columns, float *panel);
    /* Epilogue and rounding: values[operand][rows][64] to rows `row`.. and a block's columns of
     * Y. */
    void (*finish)(const struct fq_cpu_job *job, int64_t block, int64_t row, int64_t rows,
                   float *values);
    int limb_bytes; /* that a column takes in fixed->limbs */
    /* Not NULL: the limbs of all rows of X lie in tiles, as below, and all rows are valid.  A pass
     * that fq_cpu_wants_tiles() does not name, or with a row that is not valid, goes to `few`,
     * whose results are the same bit for bit. */
    const struct fq_cpu_kernels *few;
};

/* The limbs of the rows of a pass in tiles (amx.c), rows in blocks of fq_cpu_tile_rows():
 *
 *     [k / columns][rows / block][FQ_CPU_LIMBS][block][columns]
 *
 * Rows are rounded up to whole blocks, K to FQ_CPU_TILE, and FQ_CPU_TILE_SLACK bytes behind it may
 * be read.  The chunks of all rows lie side by side. */
#define FQ_CPU_TILE       64
#define FQ_CPU_TILE_ROWS  16
#define FQ_CPU_TILE_SLACK (FQ_CPU_TILE_ROWS * FQ_CPU_TILE)

/* As many columns as have every chunk begin at a tile. */
static inline int fq_cpu_tile_columns(const struct fq_cpu_weights *weights) {
    const int64_t group = weights->base.info.group;

    if (weights->groups == 1 || group % FQ_CPU_TILE == 0)
        return FQ_CPU_TILE;
    return group % (FQ_CPU_TILE / 2) == 0 ? FQ_CPU_TILE / 2 : FQ_CPU_STEP;
}

/* Limbs of a row that lie in one tile: fp32 has always all. */
static inline int fq_cpu_tile_limbs(enum fq_dtype type) {
    return type == FQ_F32 ? FQ_CPU_LIMBS : FQ_CPU_LIMBS - 1;
}

/* Rows of a block: as few blocks as can be, of as many rows each. */
static inline int fq_cpu_tile_rows(int64_t rows, enum fq_dtype type) {
    const int64_t most = FQ_CPU_TILE_ROWS / fq_cpu_tile_limbs(type);
    const int64_t blocks = (rows + most - 1) / most;

    return (int)((rows + blocks - 1) / blocks);
}

/* Where tiles are faster than byte dot products: by how many limbs share a tile's costs, as
 * measured (NOTES.md). */
static inline bool fq_cpu_wants_tiles(const struct fq_cpu_weights *weights, int64_t rows,
                                      enum fq_dtype type) {
    const int columns = fq_cpu_tile_columns(weights);
    const int64_t limbs = rows * fq_cpu_tile_limbs(type);

    if (columns < FQ_CPU_TILE / 2)
        return weights->base.info.bits != 4 && limbs >= 64;
    if (columns < FQ_CPU_TILE)
        return limbs >= 16;
    return limbs >= (weights->base.info.bits == 8 ? 4 : 8);
}

extern const struct fq_cpu_kernels fq_cpu_generic;
extern const struct fq_cpu_kernels fq_cpu_avx2;
extern const struct fq_cpu_kernels fq_cpu_avx2_float; /* what avx2 and avxvnni build on */
extern const struct fq_cpu_kernels fq_cpu_avxvnni;
extern const struct fq_cpu_kernels fq_cpu_avx512;
extern const struct fq_cpu_kernels fq_cpu_avx512vnni;
extern const struct fq_cpu_kernels fq_cpu_avx512gfni;
extern const struct fq_cpu_kernels fq_cpu_avx512bf16;
extern const struct fq_cpu_kernels fq_cpu_amx;

/* The faster here of avx512vnni and avx512gfni, whose results are the same. */
const struct fq_cpu_kernels *fq_cpu_byte_products(void);

/* Asks the kernel for AMX's registers, which a process has not got unasked. */
bool fq_cpu_amx_allowed(void);

/* What comes after the products, in place: values[i] is column `column + i` of row m of Y, gate
 * NULL or the gate's product, which is lost.  (epilogue.c) */
void fq_cpu_epilogue(const struct fq_gemm *gemm, int64_t m, int64_t column, float *values,
                     float *gate, int64_t count);

/* X to block fixed point of bytes (fixed.c, bytes-fixed.c) and of 16-bit integers (words-fixed.c).
 */
void fq_cpu_to_fixed(const struct fq_cpu_weights *weights, const float *x, enum fq_dtype type,
                     struct fq_cpu_fixed *fixed);
void fq_cpu_to_fixed_words(const struct fq_cpu_weights *weights, const float *x, enum fq_dtype type,
                           struct fq_cpu_fixed *fixed);
void fq_cpu_to_fixed_bytes(const struct fq_cpu_weights *weights, const float *x, enum fq_dtype type,
                           struct fq_cpu_fixed *fixed);

/* The backend itself (cpu.c). */
struct cpu_backend {
    struct fq_backend base;
    const struct fq_cpu_kernels *kernels;
    int threads;
};

/* Prepacking (pack.c). */
uint64_t fq_cpu_weights_size(struct fq_backend *backend, const struct fq_matrix *matrix);
int fq_cpu_weights_new(struct fq_backend *backend, const struct fq_matrix *matrix,
                       struct fq_weights **out, struct fq_error *err);
void fq_cpu_weights_free(struct fq_weights *weights);

#endif
