/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the two Hopper kernels, decode and prefill, have in common: the ring of
 * stages in shared memory, where a matrix's tiles and scales lie, and the adding
 * up of a block that several workers summed.  Compiled for sm_90a only; for other
 * architectures the kernels are empty, and the host does not choose them.
 *
 * A CTA has a producer warp and warpgroups of consumers, each with strips of 64
 * rows of W of its own.  The producer fills stages by bulk copies: codes, scales
 * and zero points of every strip, and X.  Each stage has two mbarriers: `full`
 * (the copies are there) and `empty` (every consumer warp is done with it).
 */
#ifndef FQ_KERNELS_CUDA_HOPPER_CUH
#define FQ_KERNELS_CUDA_HOPPER_CUH

#include "cuda-impl.h"
#include "dequant.cuh"
#include "epilogue.cuh"
#include "launch.cuh"
#include "ptx-hopper.cuh"
#include "wgmma.cuh"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FQ_HOPPER_CODE 1 /* the host compiler's pass, or sm_90a's */
#endif

#define FQ_CUDA_BARRIER_CONSUMERS 1 /* ids of named barriers */
#define FQ_CUDA_BARRIER_GATE      2
#define FQ_CUDA_BARRIER_GROUPS    3 /* and one more for each warpgroup */

/*
 * A register that a wgmma reads or writes on its own time must be final before, and not be read
 * before the wait is over.  The compiler does not know that: this tells it that something happens
 * to the registers here.
 */
template <int COUNT> static __device__ __forceinline__ void settle(float (&v)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        asm volatile("" : "+f"(v[i])::"memory");
}

static __device__ __forceinline__ void settle(uint32_t (&v)[4]) {
    asm volatile("" : "+r"(v[0]), "+r"(v[1]), "+r"(v[2]), "+r"(v[3])::"memory");
}

/* The place in a ring, counted on by producer and consumers alike. */
struct ring_place {
    int stage;
    uint32_t parity; /* of the phase that `full` ends when this stage is there */
    int stages;

    __device__ __forceinline__ explicit ring_place(int count) : stage(0), parity(0), stages(count) {
    }
    __device__ __forceinline__ void next() {
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

/* The groups that tiles [tile, tile + count) of a matrix meet. */
struct group_span {
    int first, count;

    __device__ __forceinline__ group_span(const fq_cuda_matrix &w, int tile, int tiles)
        : first(tile * FQ_CUDA_STEPS / w.group_steps),
          count(((tile + tiles) * FQ_CUDA_STEPS - 1) / w.group_steps - first + 1) {
    }
};

/*
 * Where a walk along K is within its group.  A stage's scales start with those of the group that
 * its first step is in, slot 0.
 */
struct group_phase {
    int phase, steps; /* steps into the group, of so many */
    uint32_t inverse; /* of steps: what is divided here is less than steps + 16, hence exact */

    __device__ __forceinline__ group_phase(const fq_cuda_matrix &w, int tile)
        : phase(tile * FQ_CUDA_STEPS % w.group_steps), steps(w.group_steps),
          inverse(w.group_inverse) {
    }
    /* Of the step-th step from here. */
    __device__ __forceinline__ int slot(int step) const {
        return __umulhi(2 * (phase + step), inverse);
    }
    __device__ __forceinline__ void advance(int by) {
        phase += by;
        phase -= __umulhi(2 * phase, inverse) * steps;
    }
};

/* One strip's part of a stage: which copies bring it. */
struct strip_source {
    const uint8_t *codes, *scales, *zeros; /* of the strip; NULL: no such strip, no zero points */

    __device__ __forceinline__ strip_source(const fq_cuda_matrix &w, int strip, bool present)
        : codes(nullptr), scales(nullptr), zeros(nullptr) {
        if (!present)
            return;
        codes = w.codes + (int64_t)strip * w.tiles * FQ_CUDA_TILE_BYTES(w.bits);
        scales = w.scales + (int64_t)strip * w.groups * FQ_CUDA_SCALE_BYTES;
        if (w.zeros)
            zeros = w.zeros + (int64_t)strip * w.groups * FQ_CUDA_ZERO_BYTES;
    }
};

/*
 * Sums of a block that several workers had a part in.  Each leaves its own in launch.partials; true
 * for the CTA that comes last, whose `sums` are then the total, added in the order of the workers.
 * Called by all `THREADS` consumers; QUADS float4 a thread, of which those that `needed` tells are
 * of use.
 */
template <int QUADS, int THREADS, class NEEDED>
static __device__ __forceinline__ bool
add_parts(const fq_cuda_launch &launch, int worker, int half, const fq_cuda_segment &segment,
          float (&sums)[QUADS * 4], int thread, bool &last, NEEDED needed) {
    constexpr int BATCH = QUADS < 8 ? QUADS : 8;     /* float4 that are asked for at a time */
    constexpr int AHEAD = QUADS < 4 ? 4 / QUADS : 1; /* and parts */
    const int first = fq_cuda_first_worker(&launch.shares, segment.block);
    const int parts = fq_cuda_last_worker(&launch.shares, segment.block) - first + 1;
    auto part = [&](int of) {
        int slot = fq_cuda_part_slot(&launch.shares, of, segment.block) * FQ_CUDA_CLUSTER + half;

        return reinterpret_cast<float4 *>(launch.partials) + (int64_t)slot * QUADS * THREADS +
               thread;
    };
    float4 *mine = part(worker);
    unsigned *counter = launch.counters + first * FQ_CUDA_CLUSTER + half;

#pragma unroll
    for (int q = 0; q < QUADS; q++)
        if (needed(q))
            __stcg(mine + q * THREADS,
                   make_float4(sums[4 * q], sums[4 * q + 1], sums[4 * q + 2], sums[4 * q + 3]));
    named_barrier(FQ_CUDA_BARRIER_CONSUMERS, THREADS);
    if (thread == 0) {
        last = count_up(counter) == parts - 1;
        if (last)
            *counter = 0; /* for the next launch */
    }
    named_barrier(FQ_CUDA_BARRIER_CONSUMERS, THREADS);
    if (!last)
        return false;
#pragma unroll
    for (int i = 0; i < QUADS * 4; i++)
        sums[i] = 0.0f;
    for (int of = first; of < first + parts; of += AHEAD) {
#pragma unroll
        for (int q0 = 0; q0 < QUADS; q0 += BATCH) {
            float4 p[AHEAD][BATCH];

#pragma unroll
            for (int i = 0; i < AHEAD; i++)
#pragma unroll
                for (int q = 0; q < BATCH; q++)
                    if (of + i < first + parts && needed(q0 + q))
                        p[i][q] = __ldcg(part(of + i) + (q0 + q) * THREADS);
#pragma unroll
            for (int i = 0; i < AHEAD; i++)
#pragma unroll
                for (int q = 0; q < BATCH; q++)
                    if (of + i < first + parts && needed(q0 + q)) {
                        float *sum = sums + (q0 + q) * 4;

                        sum[0] += p[i][q].x;
                        sum[1] += p[i][q].y;
                        sum[2] += p[i][q].z;
                        sum[3] += p[i][q].w;
                    }
        }
    }
    return true;
}

/*
 * COUNT (4 or 8) results of one row of X, from n on: finished from their sums in shared memory, and
 * stored.  gate: where the sums of the gate's rows are; of no use without a gate.
 */
template <class T, int COUNT>
static __device__ __forceinline__ void store_run(const fq_cuda_launch &launch, uint32_t sums,
                                                 uint32_t gate, void *y_row, const void *residual,
                                                 int n) {
    typename T::type *y = static_cast<typename T::type *>(y_row) + n;
    float v[COUNT], g[COUNT];
    uint32_t packed[COUNT / 2];

#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
        *reinterpret_cast<float4 *>(v + i) = lds_f4(sums + i * 4);
        *reinterpret_cast<float4 *>(g + i) = lds_f4(gate + i * 4);
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        v[i] = n + i < launch.w.n ? finish(launch, v[i], g[i], n + i) : 0.0f;
    if (residual)
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            if (n + i < launch.w.n)
                v[i] += T::widen(static_cast<const typename T::type *>(residual)[n + i]);
#pragma unroll
    for (int i = 0; i < COUNT; i += 2)
        packed[i / 2] = T::pack(v[i], v[i + 1]);
    if (n + COUNT <= launch.w.n && (reinterpret_cast<uintptr_t>(y) & (COUNT * 2 - 1)) == 0) {
        if constexpr (COUNT == 8)
            *reinterpret_cast<uint4 *>(y) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
        else
            *reinterpret_cast<uint2 *>(y) = make_uint2(packed[0], packed[1]);
        return;
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        if (n + i < launch.w.n)
            reinterpret_cast<uint16_t *>(y)[i] = (uint16_t)(packed[i / 2] >> (16 * (i & 1)));
}

#endif
