/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the two Hopper kernels, decode and prefill, have in common: the ring of
 * stages in shared memory, the copies of a matrix's strips into it, and the last step to a
 * row of Y.  Compiled for sm_90a only; for other architectures the kernels are empty, and
 * the host does not choose them.
 *
 * A CTA has producers and warpgroups of consumers, which have strips of 64 rows of W, or
 * runs of K of them.  Producers fill stages by bulk copies: codes, scales and zero points of every
 * strip, and X; in the prefill others' sums of a block, too.  Each stage has two mbarriers: `full`
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
/* A kernel's size of clusters, which the launch gives, too: known when compiled, it saves a branch
 * at every barrier of the cluster. */
#define FQ_CLUSTER(ctas) __cluster_dims__(ctas)
#else
#define FQ_CLUSTER(ctas) /* an error before sm_90 */
#endif

#define FQ_CUDA_BARRIER_CONSUMERS 1 /* ids of named barriers */
#define FQ_CUDA_BARRIER_GATE      2
#define FQ_CUDA_BARRIER_PART      3
#define FQ_CUDA_BARRIER_GROUPS    4  /* and one more for each warpgroup */
#define FQ_CUDA_BARRIER_TURNS     7  /* of warpgroup 0, and 1 */
#define FQ_CUDA_BARRIER_KEEPERS   9  /* of the consumers that store */
#define FQ_CUDA_BARRIER_STARTED   10 /* a CTA's barriers are there */
#define FQ_CUDA_BARRIER_DONE      11 /* with a block's last tile, warpgroup 0, and 1 */

/*
 * Lanes of a warp that count it in where it is done with a stage.  One is enough, behind
 * __syncwarp(); but compute-sanitizer's racecheck orders only what the lane itself did.  For it,
 * a build with -DFQ_CUDA_WARP_ARRIVALS=32 has every lane arrive.
 */
#ifndef FQ_CUDA_WARP_ARRIVALS
#define FQ_CUDA_WARP_ARRIVALS 1
#endif

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

/* Registers of which it does not matter what they hold. */
template <int COUNT> static __device__ __forceinline__ void no_matter(float (&v)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        asm volatile("" : "=f"(v[i]));
}

/* v in a register from here on: found out by now, and not where it is wanted, or anew in each round
 * of a loop. */
template <class V> static __device__ __forceinline__ void kept(V &v) {
    asm volatile("" : "+r"(v));
}

/* The opposite: v, computed where it is wanted and not before; what is kept from the kernel's start
 * on takes a register that something is pushed out to memory for. */
static __device__ __forceinline__ int here(int v) {
    asm volatile("" : "+r"(v));
    return v;
}

/* The groups that a row of a matrix has within `tiles` tiles, at most, where they start at a
 * multiple of `aligned` tiles. */
static inline int slots_within(const fq_cuda_matrix &w, int tiles, int aligned) {
    const int steps = tiles * FQ_CUDA_STEPS;
    int common = aligned * FQ_CUDA_STEPS, latest; /* the latest start within a group */

    if (w.groups == 1)
        return 1;
    for (int a = w.group_steps; a;) { /* the greatest common divisor */
        const int rest = common % a;

        common = a;
        a = rest;
    }
    latest = w.group_steps - common;
    return (latest + steps - 1) / w.group_steps + 1;
}

/* Of a launch's one or two matrices. */
static inline int slots_within(const fq_cuda_launch &launch, int tiles, int aligned) {
    const int slots = slots_within(launch.w, tiles, aligned);
    const int gate = launch.gate.codes ? slots_within(launch.gate, tiles, aligned) : 0;

    return slots > gate ? slots : gate;
}

/*
 * 2^e such that the largest scale times it lies in [8, 16), or below 8 with scales so small that
 * nothing else would be left of fp32's range; 1 where there is none.  Weights whose scales are
 * multiplied by it do not leave the range of T.  Where scales are of T, so is the factor: of fp16
 * 2^15 is enough, times which the least scale that there can be is 2^-9.  Where the largest is 16
 * or more, fp16 scales below 2^-17 of it lose bits.
 */
template <class T> static __device__ __forceinline__ float scale_factor(const fq_cuda_matrix &w) {
    const uint32_t bits = __ldg(&w.meta->largest_scale);
    const int most = T::is_f16 && !w.scale_bf16 ? 15 : 117;
    const int exponent = (int)(bits >> 23) - 127;

    if (bits == 0 || bits >= 0x7f800000u)
        return 1.0f;
    return __uint_as_float((uint32_t)(127 + min(3 - exponent, most)) << 23);
}

/* The place in a ring, counted on by producer and consumers alike. */
struct ring_place {
    int stage;
    uint32_t parity; /* of the phase that `full` ends when this stage is there */
    int stages;

    __device__ __forceinline__ explicit ring_place(int count, int first = 0)
        : stage(first), parity(0), stages(count) {
    }
    __device__ __forceinline__ void next(int by = 1) {
        stage += by;
        if (stage >= stages) {
            stage -= stages;
            parity ^= 1;
        }
    }
};

/* The same of a ring whose number of stages the compiler knows. */
template <int STAGES> struct known_ring_place {
    uint32_t stage, parity;

    __device__ __forceinline__ known_ring_place() : stage(0), parity(0) {
    }
    __device__ __forceinline__ void next() {
        parity ^= stage == STAGES - 1;
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }
    __device__ __forceinline__ uint32_t stage_before() const {
        return stage == 0 ? STAGES - 1 : stage - 1;
    }
};

/*
 * Where a walk along K is within its group.  A stage's scales start with those of the group that
 * its first step is in, slot 0.
 */
struct group_phase {
    int phase, steps; /* steps into the group, of so many */
    uint32_t inverse; /* of steps: what is divided here is less than steps + 32, hence exact */

    __device__ __forceinline__ group_phase(const fq_cuda_matrix &w, int tile)
        : phase(tile * FQ_CUDA_STEPS - group_of(w, tile) * w.group_steps), steps(w.group_steps),
          inverse(w.group_inverse) {
    }
    /* The group that a tile starts in.  Without a division where there is another way: every kernel
     * starts with this. */
    static __device__ __forceinline__ int group_of(const fq_cuda_matrix &w, int tile) {
        const int step = tile * FQ_CUDA_STEPS;

        return w.group_shift >= 0 ? step >> w.group_shift : step / w.group_steps;
    }
    /* Of the step-th step from here. */
    __device__ __forceinline__ int slot(int step) const {
        return __umulhi(2 * (phase + step), inverse);
    }
    /* Returns how many groups further that is. */
    __device__ __forceinline__ int advance(int by) {
        int groups = slot(by);

        phase += by - groups * steps;
        return groups;
    }
};

/*
 * The copies of some strips of a matrix, MOST at most, whose codes are `pitch` bytes apart in a
 * stage: queued stage after stage by one thread.  What a stage costs here, all of it costs: a
 * kernel cannot be faster than this, so nothing is computed that the last stage could leave behind.
 */
template <int BITS, int MOST> struct strip_copies {
    const uint8_t *codes, *scales, *zeros; /* of the first strip and the next stage */
    int count;
    uint64_t codes_stride, scales_stride, zeros_stride; /* bytes to the next strip */
    uint32_t to_codes, to_scales, to_zeros;             /* in a stage, `slots` groups a strip */
    uint32_t pitch, slots;
    group_phase groups;

    /* Strips strip.. of a matrix, from a tile on. */
    __device__ __forceinline__ strip_copies(const fq_cuda_matrix &w, int strip, int strips,
                                            int tile, uint32_t codes_to, uint32_t codes_pitch,
                                            uint32_t scales_to, uint32_t zeros_to, int group_slots)
        : codes(w.codes + ((int64_t)strip * w.tiles + tile) * FQ_CUDA_TILE_BYTES(BITS)),
          scales(w.scales), zeros(w.zeros), count(strips),
          codes_stride((uint32_t)(w.tiles * FQ_CUDA_TILE_BYTES(BITS))),
          scales_stride((uint32_t)(w.groups * FQ_CUDA_SCALE_BYTES)),
          zeros_stride((uint32_t)(w.groups * FQ_CUDA_ZERO_BYTES)), to_codes(codes_to),
          to_scales(scales_to), to_zeros(zeros_to), pitch(codes_pitch), slots(group_slots),
          groups(w, tile) {
        const int64_t group = (int64_t)strip * w.groups + group_phase::group_of(w, tile);

        scales += group * FQ_CUDA_SCALE_BYTES;
        if (zeros)
            zeros += group * FQ_CUDA_ZERO_BYTES;
    }

    __device__ __forceinline__ uint32_t code_bytes(int tiles) const {
        return count * tiles * FQ_CUDA_TILE_BYTES(BITS);
    }
    /* Groups that the next stage needs, if it has so many tiles. */
    __device__ __forceinline__ uint32_t groups_of(int tiles) const {
        return groups.slot(tiles * FQ_CUDA_STEPS - 1) + 1;
    }
    __device__ __forceinline__ uint32_t scale_bytes(uint32_t held) const {
        return count * held * (FQ_CUDA_SCALE_BYTES + (zeros ? FQ_CUDA_ZERO_BYTES : 0));
    }

    /* stage: bytes from the first stage to this one.  Addresses are added up: of base + (stride <<
     * i), ptxas 13.0 left the upper half out where it had them in uniform registers. */
    __device__ __forceinline__ void put_codes(uint32_t stage, int tiles, uint32_t barrier) const {
        put(to_codes + stage, pitch, codes, codes_stride, tiles * FQ_CUDA_TILE_BYTES(BITS),
            barrier);
    }
    __device__ __forceinline__ void put_scales(uint32_t stage, uint32_t held,
                                               uint32_t barrier) const {
        put(to_scales + stage, slots * FQ_CUDA_SCALE_BYTES, scales, scales_stride,
            held * FQ_CUDA_SCALE_BYTES, barrier);
        if (zeros) {
            const uint8_t *from = zeros;

            for (int i = 0; i < count; i++, from += zeros_stride)
                bulk_copy(to_zeros + stage + i * slots * FQ_CUDA_ZERO_BYTES, from,
                          held * FQ_CUDA_ZERO_BYTES, barrier);
        }
    }

    /* On to the tile that is so many further on. */
    __device__ __forceinline__ void advance(int tiles) {
        skip(tiles, groups.advance(tiles * FQ_CUDA_STEPS));
    }
    /* The same, also back, where those are so many groups, whole ones. */
    __device__ __forceinline__ void skip(int tiles, int whole) {
        codes += tiles * FQ_CUDA_TILE_BYTES(BITS);
        scales += whole * FQ_CUDA_SCALE_BYTES;
        if (zeros)
            zeros += whole * FQ_CUDA_ZERO_BYTES;
    }

  private:
    /* Of every strip so many bytes, which are to lie `apart` bytes from each other. */
    __device__ __forceinline__ void put(uint32_t to, uint32_t apart, const uint8_t *from,
                                        uint64_t stride, uint32_t bytes, uint32_t barrier) const {
#pragma unroll
        for (int i = 0; i < MOST; i++) {
            if (i >= count)
                break;
            bulk_copy(to + i * apart, from, bytes, barrier);
            from += stride;
        }
    }
};

static __device__ __forceinline__ void add_f4(float *to, float4 v) {
    to[0] += v.x;
    to[1] += v.y;
    to[2] += v.z;
    to[3] += v.w;
}

/* v += the first `count` of COUNT (4 or 8) elements. */
template <class T, int COUNT>
static __device__ __forceinline__ void add_residual(float (&v)[COUNT],
                                                    const typename T::type *residual, int count) {
    if (count >= COUNT && (reinterpret_cast<uintptr_t>(residual) & (COUNT * 2 - 1)) == 0) {
        uint2 all[COUNT / 4];

#pragma unroll
        for (int i = 0; i < COUNT / 4; i++)
            all[i] = reinterpret_cast<const uint2 *>(residual)[i];
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            v[i] += T::widen(reinterpret_cast<const typename T::type *>(all)[i]);
        return;
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        if (i < count)
            v[i] += T::widen(residual[i]);
}

/* True where results are their sums, rounded. */
static __device__ __forceinline__ bool is_plain(const fq_cuda_launch &launch,
                                                const void *residual) {
    return !launch.gate.codes && !launch.bias && !residual &&
           launch.activation == FQ_ACTIVATION_NONE;
}

/* The first `count` of COUNT results, which are finished. */
template <class T, int COUNT>
static __device__ __forceinline__ void store_rounded(const float (&v)[COUNT], typename T::type *y,
                                                     int count) {
    uint32_t packed[COUNT / 2];

#pragma unroll
    for (int i = 0; i < COUNT; i += 2)
        packed[i / 2] = T::pack(v[i], v[i + 1]);
    if (count >= COUNT && (reinterpret_cast<uintptr_t>(y) & (COUNT * 2 - 1)) == 0) {
        if constexpr (COUNT == 8)
            *reinterpret_cast<uint4 *>(y) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
        else
            *reinterpret_cast<uint2 *>(y) = make_uint2(packed[0], packed[1]);
        return;
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        if (i < count)
            reinterpret_cast<uint16_t *>(y)[i] = (uint16_t)(packed[i / 2] >> (16 * (i & 1)));
}

/*
 * COUNT (4 or 8) results of one row of X, from n on: finished from their sums, and stored.  gate:
 * the sums of the gate's rows; of no use without a gate.  PLAIN: is_plain().  What the code of the
 * other case would spread over memory, the plain one has together: fetching it is what a short
 * loop waits for.
 */
template <class T, int COUNT, bool PLAIN>
static __device__ __forceinline__ void store_run(const fq_cuda_launch &launch, float (&v)[COUNT],
                                                 float (&gate)[COUNT], void *y_row,
                                                 const void *residual, int n) {
    const int count = launch.w.n - n; /* that there are; perhaps more than COUNT */

    if (!PLAIN)
        finish(launch, v, gate, n);
    if (!PLAIN && residual)
        add_residual<T>(v, static_cast<const typename T::type *>(residual) + n, count);
    store_rounded<T>(v, static_cast<typename T::type *>(y_row) + n, count);
}

#endif
