/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a multiprocessor takes for the arithmetic of Hopper's decode kernels alone: the same
 * instructions out of kernels/cuda, in a loop that waits for no copy and no other warpgroup.
 */
#ifndef FQ_BENCH_FLOORS_H
#define FQ_BENCH_FLOORS_H

#ifdef __cplusplus
extern "C" {
#endif

/* Of what a tile of a strip takes, in any combination. */
enum fq_floor_part {
    FQ_FLOOR_PRODUCTS = 1, /* rows of X from shared memory, and the tensor cores */
    FQ_FLOOR_WEIGHTS = 2,  /* codes from shared memory, dequantized */
    FQ_FLOOR_SCALES = 4    /* scales from shared memory, and what was summed times them */
};

struct fq_floor {
    int bits;  /* 8, 4 or 3, symmetric, a scale a row and tile */
    int bf16;  /* activations and scales are bf16, else fp16 */
    int rows;  /* of X: 8, 16, 32 or 64 */
    int parts; /* enum fq_floor_part */
};

/* Cycles for one tile, 64 rows of W by 64 of K, by three warpgroups at once on one multiprocessor:
 * their time over the tiles of all.  Returns 0, or a CUDA error's number, whose name is *error. */
int fq_floor_measure(const struct fq_floor *floor, double *cycles, const char **error);

#ifdef __cplusplus
}
#endif
#endif
