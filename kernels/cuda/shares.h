/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How the Hopper kernels deal a GEMM out: which part of which block of the
 * output each worker sums.  Plain integers, used by the host to size the
 * workspace and by the kernels to find their work.
 *
 * The output is cut into blocks; a block takes `units` steps along K.  A worker
 * is a cluster of two CTAs, one for each half of a block's rows of W.  `whole`
 * blocks are dealt out in turn, and all units of the rest, one block after the
 * other, are cut into as many equal runs as there are workers (stream-K):
 *
 *     blocks   |   0   |   1   |   2   |   3   |   4   |  5 blocks, whole = 3, 3 workers
 *     worker   |   0   |   1   |   2   | 0 . .1|1 . .2 |
 *
 * so that all workers end together whatever the shape.  Where a run ends inside a
 * block, the block's workers leave their sums in memory, and the one that comes
 * last adds them up in the order of the workers: who is last changes nothing.
 *
 * On the decode path a share depends on the matrix and the device alone, never
 * on m: batch invariance rests on that.
 */
#ifndef FQ_KERNELS_CUDA_SHARES_H
#define FQ_KERNELS_CUDA_SHARES_H

#include <stdint.h>

#ifdef __CUDACC__
#define FQ_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FQ_HOST_DEVICE inline
#endif

#define FQ_CUDA_CLUSTER 2 /* CTAs of a worker */

struct fq_cuda_shares {
    int blocks, units; /* of the output, and along K in each */
    int workers;
    int whole; /* blocks that are not split: the first ones */
};

/* Some units of one block, summed by one worker. */
struct fq_cuda_segment {
    int block;
    int begin, end; /* units */
};

/* The first unit, counted over all split blocks, of a worker's run. */
static FQ_HOST_DEVICE int64_t fq_cuda_run_begin(const struct fq_cuda_shares *shares, int worker) {
    return (int64_t)(shares->blocks - shares->whole) * shares->units * worker / shares->workers;
}

/* The worker whose run holds a unit. */
static FQ_HOST_DEVICE int fq_cuda_run_of(const struct fq_cuda_shares *shares, int64_t unit) {
    int64_t total = (int64_t)(shares->blocks - shares->whole) * shares->units;

    return (int)(((unit + 1) * shares->workers - 1) / total);
}

/* The index-th segment of a worker; false past its last. */
static FQ_HOST_DEVICE bool fq_cuda_segment_at(const struct fq_cuda_shares *shares, int worker,
                                              int index, struct fq_cuda_segment *segment) {
    int dealt = worker < shares->whole ? (shares->whole - worker - 1) / shares->workers + 1 : 0;
    int64_t begin, end, first;

    if (index < dealt) {
        segment->block = worker + index * shares->workers;
        segment->begin = 0;
        segment->end = shares->units;
        return true;
    }
    begin = fq_cuda_run_begin(shares, worker);
    end = fq_cuda_run_begin(shares, worker + 1);
    first = (begin / shares->units + (index - dealt)) * shares->units; /* of the segment's block */
    if (first >= end || begin == end)
        return false;
    segment->block = shares->whole + (int)(first / shares->units);
    segment->begin = begin > first ? (int)(begin - first) : 0;
    segment->end = end - first < shares->units ? (int)(end - first) : shares->units;
    return true;
}

/*
 * Of a split block: the workers that sum a part of it.  A worker has at most two such parts, at the
 * begin and at the end of its run; `second` tells whether this one is not the first of its run.
 */
static FQ_HOST_DEVICE int fq_cuda_first_worker(const struct fq_cuda_shares *shares, int block) {
    return fq_cuda_run_of(shares, (int64_t)(block - shares->whole) * shares->units);
}

static FQ_HOST_DEVICE int fq_cuda_last_worker(const struct fq_cuda_shares *shares, int block) {
    return fq_cuda_run_of(shares, (int64_t)(block - shares->whole + 1) * shares->units - 1);
}

static FQ_HOST_DEVICE int fq_cuda_part_slot(const struct fq_cuda_shares *shares, int worker,
                                            int block) {
    int first = (int)(fq_cuda_run_begin(shares, worker) / shares->units);

    return 2 * worker + (block - shares->whole != first);
}

/* Blocks that are dealt out whole: all but what would leave some workers idle at the end. */
static inline int fq_cuda_whole_blocks(int blocks, int workers) {
    if (blocks % workers == 0)
        return blocks;
    return blocks < 2 * workers ? 0 : (blocks / workers - 1) * workers;
}

#endif
