/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The host-side choice of tiles for the kernels without Hopper's instructions: how
 * many CTAs a GEMM becomes.  (Hopper's: shares.h.)
 *
 * On the decode path (m ≤ FQ_DECODE_ROWS) the slices of K depend on the matrix
 * and the device alone.  Every kernel shape sums the same slices in the same
 * order, so a row's bits depend neither on m nor on its place: the rest of the
 * shape (rows of W in a CTA) may then follow m freely.
 */
#ifndef FQ_KERNELS_CUDA_TILES_H
#define FQ_KERNELS_CUDA_TILES_H

#include "layout.h"

#define FQ_CUDA_DECODE_BLOCK  256 /* rows of W in the largest decode CTA */
#define FQ_CUDA_PREFILL_BLOCK 128 /* rows of W, and of X, in a prefill CTA */
#define FQ_CUDA_SLICE_TILES   8   /* tiles along K that a slice has at least */

/* fp32 sums of the largest CTA, of any kernel: 256 × 128 (Hopper's prefill). */
#define FQ_CUDA_PARTIAL_BYTES ((uint64_t)256 * 128 * 4)

/* CTAs a split launch has at most: two a multiprocessor, the largest kind; also the partials. */
static inline int fq_cuda_slots(int processors) {
    return 2 * processors;
}

/* Counters a stream needs: the smallest decode CTA has a quarter of the largest one's rows. */
static inline int fq_cuda_counters(int processors) {
    return 4 * fq_cuda_slots(processors) + 4;
}

static inline int fq_cuda_splits(int blocks, int tiles, int processors) {
    int by_device = fq_cuda_slots(processors) / blocks;
    int by_depth = tiles / FQ_CUDA_SLICE_TILES;
    int splits = by_device < by_depth ? by_device : by_depth;

    return splits > 1 ? splits : 1;
}

static inline int fq_cuda_decode_splits(int n, int tiles, int processors) {
    return fq_cuda_splits((n + FQ_CUDA_DECODE_BLOCK - 1) / FQ_CUDA_DECODE_BLOCK, tiles, processors);
}

static inline int fq_cuda_prefill_splits(int n, int m, int tiles, int processors) {
    int64_t blocks = (int64_t)((n + FQ_CUDA_PREFILL_BLOCK - 1) / FQ_CUDA_PREFILL_BLOCK) *
                     ((m + FQ_CUDA_PREFILL_BLOCK - 1) / FQ_CUDA_PREFILL_BLOCK);

    return blocks > fq_cuda_slots(processors) ? 1 : fq_cuda_splits((int)blocks, tiles, processors);
}

#endif
