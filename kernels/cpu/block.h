/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A block of 64 rows of W, or a part of its columns, as decode in fixed point takes it.
 */
#ifndef FQ_KERNELS_CPU_BLOCK_H
#define FQ_KERNELS_CPU_BLOCK_H

#include "cpu.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

/* A block of W, and the rows of X that it is multiplied with. */
struct block {
    const struct fq_cpu_weights *weights;
    const uint8_t *codes, *codes_end; /* the latter: of the last block that the thread takes next */
    const uint16_t *scales;
    const int8_t *zeros;
    const struct fq_cpu_fixed *fixed; /* of the first row */
    int64_t begin, end;               /* columns, rounded up to whole segments */
};

/* Codes are asked for before their use a line of each of PAGES pages in turn.  A processor reads
 * ahead by itself where lines of a page are asked for in their order, but not beyond the page: so
 * it reads four at the same time. */
#define LINE   64
#define PAGE   4096
#define PAGES  4
#define WINDOW (PAGE * PAGES)
#define TURN   (LINE * PAGES) /* bytes, for which a line of each page is asked for */

/* For so many bytes of codes, less than a turn or whole turns, as many lines of the window behind
 * theirs, unless it is behind `end`: who takes all bytes of a window, part by part, asks for each
 * line of the next one. */
INLINE void prefetch(const uint8_t *codes, int bytes, const uint8_t *end) {
    const uintptr_t at = (uintptr_t)codes % WINDOW;
    const uint8_t *next = codes - at + WINDOW, *line = next + at / PAGES;

    if ((bytes < TURN && at % TURN >= (uintptr_t)bytes) || next >= end)
        return;
    UNROLL for (int i = 0; i < bytes; i += TURN) UNROLL for (int page = 0; page < PAGES; page++)
        __builtin_prefetch(line + i / PAGES + page * PAGE);
}

/* A GEMM's operand i: block `index` of it, one of those up to `end` that a thread takes one after
 * another, part `split` of K, and X from `row` on. */
INLINE struct block block_of(const struct fq_cpu_job *job, int i, int64_t index, int64_t end,
                             int64_t row, int64_t split, int64_t splits) {
    const struct fq_cpu_weights *weights = job->operand[i].weights;
    const int64_t groups_at = index * weights->groups * FQ_CPU_BLOCK;

    return (struct block){
        .weights = weights,
        .codes = weights->codes + index * weights->block_bytes,
        .codes_end = weights->codes + end * weights->block_bytes,
        .scales = weights->scales + groups_at,
        .zeros = weights->zeros ? weights->zeros + groups_at : NULL,
        .fixed = job->operand[i].fixed + row,
        .begin = weights->k_padded * split / splits,
        .end = weights->k_padded * (split + 1) / splits,
    };
}

#endif
