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

#define LINE 64
#define PAGE 4096

/* Bytes of codes for which a line of each of so many pages is asked for. */
INLINE int turn(int pages) {
    return pages * LINE;
}

/* Codes are asked for before their use: a page ahead, line after line, or a line of each of four
 * pages in turn, of the four behind those in use.  Intel's processors read ahead by themselves
 * where lines of a page are asked for in their order, but not beyond the page: in turns they read
 * four at the same time.  AMD's are slower so (NOTES.md).
 *
 * For so many bytes of codes, as many lines; pages: 1 or 4, and with 4 the bytes are less than a
 * turn or whole turns, and nothing is asked for in a window that begins behind `end`. */
INLINE void prefetch(const uint8_t *codes, int bytes, const uint8_t *end, int pages) {
    const uintptr_t window = (uintptr_t)(pages * PAGE), at = (uintptr_t)codes % window;
    const uint8_t *next = codes - at + window, *line = next + at / (uintptr_t)pages;

    if (pages > 1 &&
        ((bytes < turn(pages) && at % (uintptr_t)turn(pages) >= (uintptr_t)bytes) || next >= end))
        return;
    UNROLL for (int i = 0; i < bytes; i += turn(pages))
        UNROLL for (int page = 0; page < pages; page++)
            __builtin_prefetch(line + i / pages + page * PAGE);
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
