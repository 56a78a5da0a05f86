/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Decode in fixed point: what dot.c, bytes.c and words.c do alike.  Tiles of 1 to 4 rows
 * of X go through a block of W chunk by chunk, and a segment's sums are scaled
 * by its unit; rows that have no fixed-point form go to the kernels of floats.
 *
 * The including file defines LANES (rows of W in a register), LIMBS_FEW and
 * LIMBS_ALL (the limbs of a segment that stands for few bits, and of any other),
 * FALLBACK (the kernels of floats), and the two functions declared below.
 */
#ifndef FQ_KERNELS_CPU_FIXED_DECODE_H
#define FQ_KERNELS_CPU_FIXED_DECODE_H

#include "block.h"

#include <string.h>

#define MR 4 /* rows of X in a tile */

/* values[mr][64] += one chunk over its unit. */
INLINE void tile_chunk(const struct block *block, const struct fq_cpu_span *span, float *values,
                       int mr, int bits, int limbs);
/* values[mr][64] += part · unit, and part = 0: the end of a segment. */
INLINE void end_segment(const struct block *block, int64_t segment, float *part, float *values,
                        int mr);

INLINE void tile_run(const struct block *block, float *values, int mr, int bits) {
    _Alignas(64) float part[MR * FQ_CPU_BLOCK];
    struct fq_cpu_span span = {0};
    int64_t segments = 0;
    int limbs = LIMBS_FEW;

    memset(part, 0, (size_t)mr * FQ_CPU_BLOCK * sizeof *part);
    memset(values, 0, (size_t)mr * FQ_CPU_BLOCK * sizeof *values);
    while (fq_cpu_next_span(block->weights, &span) && span.segment_begin < block->end) {
        if (span.segment_begin < block->begin)
            continue;
        if (span.segments > segments) {
            if (segments)
                end_segment(block, segments - 1, part, values, mr);
            segments = span.segments;
            limbs = LIMBS_FEW;
            for (int m = 0; m < mr; m++)
                if (block->fixed[m].segments[segments - 1].limbs == LIMBS_ALL)
                    limbs = LIMBS_ALL;
        }
        if (limbs == LIMBS_FEW)
            tile_chunk(block, &span, part, mr, bits, LIMBS_FEW);
        else
            tile_chunk(block, &span, part, mr, bits, LIMBS_ALL);
    }
    if (segments)
        end_segment(block, segments - 1, part, values, mr);
}

typedef void tile_function(const struct block *block, float *values);

#define TILE(bits, mr)                                                                             \
    static void tile_##bits##_##mr(const struct block *block, float *values) {                     \
        tile_run(block, values, mr, bits);                                                         \
    }
#define TILES(bits) TILE(bits, 1) TILE(bits, 2) TILE(bits, 3) TILE(bits, 4)
#define TILE_NAMES(bits)                                                                           \
    { tile_##bits##_1, tile_##bits##_2, tile_##bits##_3, tile_##bits##_4 }
TILES(8)
TILES(4)
TILES(3)

static tile_function *tile_for(int bits, int mr) {
    static tile_function *const table[3][MR] = {TILE_NAMES(8), TILE_NAMES(4), TILE_NAMES(3)};

    return table[bits == 8 ? 0 : bits == 4 ? 1 : 2][mr - 1];
}

/* In fixed point for every operand. */
static bool is_valid(const struct fq_cpu_job *job, int64_t row) {
    for (int i = 0; i < job->operands; i++)
        if (!job->operand[i].fixed[row].valid)
            return false;
    return true;
}

/* The next tile: sets *row to its first row, returns its rows, 0 past the last. */
static int next_tile(const struct fq_cpu_job *job, int64_t *row) {
    int mr = 0;

    while (*row < job->rows && !is_valid(job, *row))
        ++*row;
    while (mr < MR && *row + mr < job->rows && is_valid(job, *row + mr))
        mr++;
    return mr;
}

/* values[operand][mr][64]: a tile's products with a block, over part `split` of K. */
static void run_tile(const struct fq_cpu_job *job, int64_t index, int64_t end, int64_t row, int mr,
                     int64_t split, int64_t splits, float *values) {
    for (int i = 0; i < job->operands; i++) {
        const struct block block = block_of(job, i, index, end, row, split, splits);

        tile_for(block.weights->base.info.bits, mr)(&block, values + i * mr * FQ_CPU_BLOCK);
    }
}

static void decode_block(const struct fq_cpu_job *job, int64_t index, int64_t end) {
    _Alignas(64) float values[FQ_CPU_OPERANDS * MR * FQ_CPU_BLOCK];
    int mr;

    for (int64_t row = 0; (mr = next_tile(job, &row)); row += mr) {
        run_tile(job, index, end, row, mr, 0, 1, values);
        FALLBACK.finish(job, index, row, mr, values);
    }
}

/* A part's products, every tile at its first row's place. */
static void decode_part(const struct fq_cpu_job *job, int64_t index, int64_t split, int64_t splits,
                        float *part) {
    int mr;

    for (int64_t row = 0; (mr = next_tile(job, &row)); row += mr)
        run_tile(job, index, index + 1, row, mr, split, splits,
                 part + row * job->operands * FQ_CPU_BLOCK);
}

static void join_parts(const struct fq_cpu_job *job, int64_t index, float *values) {
    int mr;

    for (int64_t row = 0; (mr = next_tile(job, &row)); row += mr)
        FALLBACK.finish(job, index, row, mr, values + row * job->operands * FQ_CPU_BLOCK);
}

static void decode(const struct fq_cpu_job *job) {
    fq_cpu_run_blocks(job, decode_block, decode_part, join_parts);
    for (int64_t row = 0; row < job->rows; row++) {
        struct fq_cpu_job one = *job;

        if (is_valid(job, row))
            continue;
        one.row += row;
        one.rows = 1;
        one.x += row * job->operand[FQ_CPU_MAIN].weights->k_padded;
        for (int i = 0; i < one.operands; i++)
            if (one.operand[i].x_sum)
                one.operand[i].x_sum += row * one.operand[i].weights->groups;
        FALLBACK.decode(&one);
    }
}

#endif
