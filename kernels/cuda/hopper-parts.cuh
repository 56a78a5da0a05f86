/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The adding up of a prefill block that several workers summed (shares.h), through the stream's
 * workspace in global memory.
 */
#ifndef FQ_KERNELS_CUDA_HOPPER_PARTS_CUH
#define FQ_KERNELS_CUDA_HOPPER_PARTS_CUH

#include "hopper.cuh"

/*
 * Where a worker's sums of a part of a block are, if another one wants them: QUADS float4 of each
 * of THREADS consumers, and whether they are there.
 */
template <int QUADS, int THREADS> struct part_place {
    float4 *sums;    /* this thread's first */
    unsigned *ready; /* 0 between launches */

    __device__ __forceinline__ part_place(const fq_cuda_launch &launch, int worker, int half,
                                          int thread)
        : sums(reinterpret_cast<float4 *>(launch.partials) +
               (int64_t)(worker * FQ_CUDA_CLUSTER + half) * QUADS * THREADS + thread),
          ready(launch.counters + worker * FQ_CUDA_CLUSTER + half) {
    }
};

/* Leaves a part's sums for the worker that has the block's end.  Of the float4, those that `needed`
 * tells are of use.  Called by all consumers, of whom one warp waits for the others' stores.  They
 * will be read by the copy engine. */
template <int QUADS, int THREADS, class NEEDED>
static __device__ __forceinline__ void leave_part(const part_place<QUADS, THREADS> &mine,
                                                  const float (&sums)[QUADS * 4], int thread,
                                                  NEEDED needed) {
#pragma unroll
    for (int q = 0; q < QUADS; q++)
        if (needed(q))
            __stcg(mine.sums + q * THREADS,
                   make_float4(sums[4 * q], sums[4 * q + 1], sums[4 * q + 2], sums[4 * q + 3]));
    fence_copy_engine_global();
    if (thread >= 32) {
        named_barrier_arrive(FQ_CUDA_BARRIER_PART, THREADS);
        return;
    }
    named_barrier(FQ_CUDA_BARRIER_PART, THREADS);
    if (thread == 0)
        store_release(mine.ready, 1);
    __syncwarp();
}

/* Waits for the sums of a part, which copies of this thread may then read; by one thread. */
template <int QUADS, int THREADS>
static __device__ __forceinline__ void await_part(const part_place<QUADS, THREADS> &part) {
    while (!load_acquire(part.ready))
        __nanosleep(20);
    *part.ready = 0; /* for the next launch */
    fence_copy_engine_global();
}

#endif
