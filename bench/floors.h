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

struct fq_floor {
    int bits;          /* 8, 4 or 3, symmetric, a scale a row and tile */
    int bf16;          /* activations and scales are bf16, else fp16 */
    int rows;          /* of X: 8, 16, 32 or 64 */
    int products_only; /* of fragments that stay as they are: no codes, no scales */
};

/* Cycles for one tile, 64 rows of W by 64 of K, by three warpgroups at once on one multiprocessor:
 * their time over the tiles of all.  Returns 0, or a CUDA error's number, whose text is *error. */
int fq_floor_measure(const struct fq_floor *floor, double *cycles, const char **error);

#ifdef __cplusplus
}
#endif
#endif
