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
    const uint8_t *codes;
    const uint16_t *scales;
    const int8_t *zeros;
    const struct fq_cpu_fixed *fixed; /* of the first row */
    int64_t begin, end;               /* columns, rounded up to whole segments */
};

/* A GEMM's operand i: block `index` of it, part `split` of K, and X from `row` on. */
INLINE struct block block_of(const struct fq_cpu_job *job, int i, int64_t index, int64_t row,
                             int64_t split, int64_t splits) {
    const struct fq_cpu_weights *weights = job->operand[i].weights;
    const int64_t groups_at = index * weights->groups * FQ_CPU_BLOCK;

    return (struct block){
        .weights = weights,
        .codes = weights->codes + index * weights->block_bytes,
        .scales = weights->scales + groups_at,
        .zeros = weights->zeros ? weights->zeros + groups_at : NULL,
        .fixed = job->operand[i].fixed + row,
        .begin = weights->k_padded * split / splits,
        .end = weights->k_padded * (split + 1) / splits,
    };
}

#endif
