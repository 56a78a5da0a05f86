/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which launches a GEMM of many rows becomes on Hopper: how many rows of X each takes, and how its
 * blocks are cut.  Plain integers; times are of the model in plan.c.
 */
#ifndef FQ_KERNELS_CUDA_PLAN_H
#define FQ_KERNELS_CUDA_PLAN_H

#include <stdbool.h>
#include <stdint.h>

/* What the choice depends on, besides the rows of X. */
struct fq_cuda_gemm_size {
    int bits;
    bool gated;  /* a pair of matrices */
    int strips;  /* of 64 rows of W, those of a gate included */
    int tiles;   /* of 64 columns */
    int workers; /* clusters of two multiprocessors */
};

/* A prefill launch.  fq_cuda_share_out() deals it out. */
struct fq_cuda_prefill_plan {
    int rows;        /* of X in a block: 96, 128, and so on to 256 */
    int strips;      /* of W in a block: 4, or 6 */
    int blocks_n;    /* blocks along W */
    int blocks;      /* in all */
    int parts, more; /* that a block is cut into, units by which the last is longer */
    int64_t time;    /* ns */
};

/* The fastest launch for m rows of X, 1 or more. */
struct fq_cuda_prefill_plan fq_cuda_plan_prefill(const struct fq_cuda_gemm_size *size, int m);

/* About what one launch for m rows of X takes, in ns; up to FQ_DECODE_ROWS go to decode. */
int64_t fq_cuda_launch_time(const struct fq_cuda_gemm_size *size, int m);

/* Of m rows of X, more than FQ_DECODE_ROWS, how many the first launch takes: all of them, or a
 * multiple of FQ_DECODE_ROWS or of a block's rows, so that further ones do the rest sooner. */
int fq_cuda_plan_rows(const struct fq_cuda_gemm_size *size, int m);

#endif
