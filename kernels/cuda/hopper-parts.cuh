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
 * tells are of use.  Called by all consumers, of whom one warp waits for the others' stores. */
template <int QUADS, int THREADS, class NEEDED>
static __device__ __forceinline__ void leave_part(const part_place<QUADS, THREADS> &mine,
                                                  const float (&sums)[QUADS * 4], int thread,
                                                  NEEDED needed) {
#pragma unroll
    for (int q = 0; q < QUADS; q++)
        if (needed(q))
            __stcg(mine.sums + q * THREADS,
                   make_float4(sums[4 * q], sums[4 * q + 1], sums[4 * q + 2], sums[4 * q + 3]));
    if (thread >= 32) {
        named_barrier_arrive(FQ_CUDA_BARRIER_PART, THREADS);
        return;
    }
    named_barrier(FQ_CUDA_BARRIER_PART, THREADS);
    if (thread == 0)
        store_release(mine.ready, 1);
    __syncwarp();
}

/* Adds what workers [first, worker) left to this one's sums, in their order. */
template <int QUADS, int THREADS, class NEEDED>
static __device__ __forceinline__ void add_parts(const fq_cuda_launch &launch, int first,
                                                 int worker, int half, float (&sums)[QUADS * 4],
                                                 int thread, NEEDED needed) {
    constexpr int MANY = QUADS <= 16 ? 8 : 4; /* float4 that are asked for at a time */
    constexpr int BATCH = QUADS < MANY ? QUADS : MANY;

    for (int of = first + thread; of < worker; of += THREADS) {
        part_place<QUADS, THREADS> part(launch, of, half, 0);

        while (!load_acquire(part.ready))
            __nanosleep(20);
        *part.ready = 0; /* for the next launch */
    }
    named_barrier(FQ_CUDA_BARRIER_CONSUMERS, THREADS);
    for (int of = first; of < worker; of++) {
        const part_place<QUADS, THREADS> part(launch, of, half, thread);

#pragma unroll
        for (int q0 = 0; q0 < QUADS; q0 += BATCH) {
            float4 p[BATCH];

#pragma unroll
            for (int q = 0; q < BATCH; q++)
                if (needed(q0 + q))
                    p[q] = __ldcg(part.sums + (q0 + q) * THREADS);
#pragma unroll
            for (int q = 0; q < BATCH; q++) {
                float *sum = sums + (q0 + q) * 4;

                if (needed(q0 + q)) {
                    sum[0] += p[q].x;
                    sum[1] += p[q].y;
                    sum[2] += p[q].z;
                    sum[3] += p[q].w;
                }
            }
        }
    }
}

#endif
