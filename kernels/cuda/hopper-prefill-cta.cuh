/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A CTA of hopper-prefill.cuh: its shape, what its shared memory holds, the barriers of its ring,
 * and who each thread is.
 */
#ifndef FQ_KERNELS_CUDA_HOPPER_PREFILL_CTA_CUH
#define FQ_KERNELS_CUDA_HOPPER_PREFILL_CTA_CUH

#include "hopper.cuh"

/* N: rows of X of a block; GROUPS: consumer warpgroups, a strip of W each. */
template <int N_, int BITS_, int GROUPS_> struct prefill_shape {
    static constexpr int N = N_, BITS = BITS_, GROUPS = GROUPS_;
    static_assert(GROUPS == 2 || (GROUPS == 3 && N <= 160));
    static constexpr int CONSUMERS = 128 * GROUPS, THREADS = CONSUMERS + 128;
    /* A CTA starts with 168 a thread, or 128, and setmaxnreg only moves them.  Where the consumers'
     * sums leave some, the producer has enough to keep nothing in memory. */
    static constexpr int PRODUCER_REGISTERS = GROUPS == 3 ? (N < 160 ? 56 : 32)
                                              : N <= 128  ? 88
                                              : N <= 224  ? 72
                                                          : 40;
    static constexpr int CONSUMER_REGISTERS = GROUPS == 3 ? (N < 160 ? 152 : 160)
                                              : N <= 128  ? 208
                                              : N <= 224  ? 216
                                                          : 232;
    /* Whether the warpgroups queue their products in turns (await_turn()). */
    static constexpr bool TURNS = N == 256;
    static constexpr int TILE = FQ_CUDA_TILE_BYTES(BITS);
    static constexpr int SENT = N / FQ_CUDA_CLUSTER; /* rows of X that a CTA sends to both */
    static constexpr int QUADS = N / 8;              /* float4 of sums that a thread has */
    /* Of those of all consumers, what has room where a stage has X. */
    static constexpr int STAGE_QUADS = N * 128 / (CONSUMERS * 16);
    /* Of a stage, one tile of K: X, the codes of each strip, then its scales, then its zeros. */
    static constexpr int CODES = N * 128, SCALES = CODES + GROUPS * TILE;
    /* Where results change their order on the way out, a warpgroup's: some rows of X by one strip,
     * in fp32, or at least twice as many rounded, half of them on their way. */
    static constexpr int OUT_ROWS = FQ_CUDA_OUT_ROWS, OUT_PITCH = FQ_CUDA_STRIP * 4;
    static constexpr int OUT_QUADS = OUT_ROWS / 8, OUT_PARTS = (N + OUT_ROWS - 1) / OUT_ROWS;
    /* Rows of X that find room there rounded; of any others, where two warpgroups agree on it, the
     * last stage is held for theirs. */
    static constexpr int BUFFER_ROWS = GROUPS == 3 || N < 2 * OUT_ROWS ? N : 2 * OUT_ROWS;
    static constexpr int OUT = (BUFFER_ROWS < 2 * OUT_ROWS ? 2 * OUT_ROWS : BUFFER_ROWS) * 128;
    static constexpr bool HOLDS = N > BUFFER_ROWS;
    static_assert(OUT >= OUT_ROWS * OUT_PITCH);
    static_assert((N - BUFFER_ROWS) * FQ_CUDA_STRIP * 2 * GROUPS <= N * 128, "room in a stage's X");

    /* As many stages as find room, eight at most, if each step has a group, with a zero point. */
    static constexpr int LARGEST_STAGE =
        (SCALES + GROUPS * FQ_CUDA_STEPS * (FQ_CUDA_SCALE_BYTES + FQ_CUDA_ZERO_BYTES) + 1023) /
        1024 * 1024;
    static constexpr int ROOM = ((226 << 10) - GROUPS * OUT) / LARGEST_STAGE;
    static constexpr int STAGES = ROOM < 8 ? ROOM : 8;

    static __host__ __device__ int stage_bytes(int slots, bool zeros) {
        int bytes = SCALES + GROUPS * slots * (FQ_CUDA_SCALE_BYTES + zeros * FQ_CUDA_ZERO_BYTES);

        return (bytes + 1023) / 1024 * 1024;
    }
};

#ifdef FQ_HOPPER_CODE

template <class S> struct prefill_cta {
    using place_in_ring = known_ring_place<S::STAGES>;

    const fq_cuda_launch &launch;
    const uint32_t ring, out, full, empty; /* in shared memory */
    const int stage_bytes, zeros_at;
    const int worker, half, thread, lane, group;
    /* Of lanes 0 and 1, the first stage's empty barrier in either CTA; 0 of the others. */
    const uint32_t releases;

    __device__ __forceinline__ prefill_cta(const fq_cuda_launch &l, uint32_t shared)
        : launch(l), ring(shared), out(shared + S::STAGES * l.stage_bytes),
          full(out + S::GROUPS * S::OUT), empty(full + S::STAGES * 8), stage_bytes(l.stage_bytes),
          zeros_at(S::SCALES + S::GROUPS * l.slots * FQ_CUDA_SCALE_BYTES),
          worker(blockIdx.x / FQ_CUDA_CLUSTER), half(blockIdx.x % FQ_CUDA_CLUSTER),
          thread(threadIdx.x), lane(threadIdx.x % 32), group(threadIdx.x / 128),
          releases(lane < FQ_CUDA_CLUSTER ? cluster_address(empty, lane) : 0) {
    }

    /* By all warps, of which the first ones make the barriers of a stage each; the cluster's is to
     * be waited for. */
    __device__ __forceinline__ void init_barriers() const {
        const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);

        static_assert(S::STAGES <= S::THREADS / 32);
        if (warp < S::STAGES && elect_one()) {
            mbarrier_init(full + warp * 8, 1);
            mbarrier_init(empty + warp * 8,
                          S::CONSUMERS / 32 * FQ_CUDA_CLUSTER * FQ_CUDA_WARP_ARRIVALS);
            mbarrier_fence_init();
        }
        __syncwarp();
        cluster_arrive_relaxed();
    }

    /* A block's place: blocks go down W first, so that workers side by side share rows of X. */
    __device__ __forceinline__ int block_m0(int block) const {
        return block / launch.blocks_n * S::N;
    }

    __device__ __forceinline__ uint32_t full_of(const place_in_ring &place) const {
        return full + place.stage * 8;
    }
    __device__ __forceinline__ uint32_t empty_of(const place_in_ring &place) const {
        return empty + place.stage * 8;
    }

    /* By a warp that is done with a stage, for both CTAs. */
    __device__ __forceinline__ void release(uint32_t stage) const {
        __syncwarp();
        if (FQ_CUDA_WARP_ARRIVALS > 1) {
            mbarrier_arrive(empty + stage * 8);
            mbarrier_arrive_at(empty + stage * 8, half ^ 1);
        } else if (releases) {
            mbarrier_arrive_there(releases + stage * 8);
        }
    }

    __device__ __forceinline__ void meet_warpgroup() const {
        if (group == 0)
            named_barrier(FQ_CUDA_BARRIER_GROUPS, 128);
        else if (S::GROUPS == 2 || group == 1)
            named_barrier(FQ_CUDA_BARRIER_GROUPS + 1, 128);
        else
            named_barrier(FQ_CUDA_BARRIER_GROUPS + 2, 128);
    }
};

#endif /* FQ_HOPPER_CODE */
#endif
