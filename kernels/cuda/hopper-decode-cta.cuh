/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A CTA of hopper-decode.cuh: how large its parts are for so many rows of X and bits
 * (decode_shape), and which strips and tiles are its own, where they lie in shared memory, and its
 * barriers (decode_cta).  What its warps do is in hopper-decode-produce.cuh,
 * -consume.cuh, -sum.cuh, -weights.cuh and -store.cuh.
 */
#ifndef FQ_KERNELS_CUDA_HOPPER_DECODE_CTA_CUH
#define FQ_KERNELS_CUDA_HOPPER_DECODE_CTA_CUH

#include "hopper.cuh"

/*
 * What the compiler is to know of a launch's scales.  `exact`: the segments that a tile is summed
 * in are groups.  `wide`: groups hold two tiles, from an even one on, whose products are summed
 * before they are scaled.  `weights`: each step is a group, too few terms for sums to be scaled, so
 * that weights are, where K has as many terms as that wants (fq_cuda_exact_below()).  Of all three,
 * scales are of X's type.
 */
enum class scaling {
    any,
    exact,
    wide,
    weights
};

/* The loops of a kernel.  `usual`: for scales that are `exact` for whole tiles, or `wide`;
 * `weights`: for scaling::weights; `any`: for all others. */
enum class loops {
    any,
    usual,
    weights
};

/* Which of a launch's matrices have zero points; some: of a pair one. */
enum class zero_points {
    none,
    all,
    some
};

/*
 * Which warpgroup has what of a block.  `whole`: each strip is one's.  `in_turns`: each is all
 * warpgroups', a third of the CTA's tiles to each.  `in_order`: each is one's, which sums it third
 * by third; so from 33 rows of X on, where a warpgroup has registers for one strip's sums.
 * `any`: one of the first two, which the launch tells.
 */
enum class parting {
    any,
    whole,
    in_turns,
    in_order
};

/* N: rows of X, rounded up; the constants are host code's too. */
template <int N_, int BITS_, parting PARTING_> struct decode_shape {
    static constexpr int N = N_, BITS = BITS_;
    static constexpr parting PARTING = PARTING_;
    static constexpr bool IN_ORDER = PARTING == parting::in_order;
    static constexpr bool DIRECT = N <= FQ_CUDA_DIRECT_ROWS; /* X from its rows, mma.sync */
    /* Consumer warpgroups: three; where thirds are summed in order, two, which then have registers
     * for the sums of the thirds before, too. */
    static constexpr int GROUPS = IN_ORDER ? FQ_CUDA_THIRDS_STRIPS : FQ_CUDA_DECODE_GROUPS;
    static constexpr int SLOTS =
        N <= FQ_CUDA_SLOTS_ROWS ? FQ_CUDA_DECODE_SLOTS : 1; /* strips of each */
    static constexpr int CONSUMERS = 128 * GROUPS;
    /* A warp produces weights.  Where X comes row by row, one or two others do that; else the next
     * one.  Where registers are scarce producers are a warpgroup, some of it idle, for the
     * consumers to be given its registers: a CTA starts with as many for each thread, and
     * setmaxnreg only moves them. */
    static constexpr int ROW_WARPS = N <= 8 ? 1 : 2;
    static constexpr bool MOVES_REGISTERS = N > 8;
    static constexpr int THREADS = CONSUMERS + (MOVES_REGISTERS ? 128 : 32 + 32 * ROW_WARPS);
    /* One thread of each warpgroup, summed; the producers' part as measured. */
    static constexpr int REGISTERS = 65536 / THREADS / 8 * 8 * (THREADS / 128);
    static constexpr int PRODUCER_REGISTERS = IN_ORDER               ? 40
                                              : N <= 16              ? 80
                                              : N <= 32 && BITS != 8 ? 56
                                                                     : 32;
    static constexpr int CONSUMER_REGISTERS = (REGISTERS - PRODUCER_REGISTERS) / GROUPS;
    static_assert(!MOVES_REGISTERS || CONSUMER_REGISTERS % 8 == 0);
    static constexpr int SHARED = 226 << 10;              /* bytes, at most: a multiprocessor's */
    static constexpr int MOST_STAGES = CONSUMERS / 32;    /* see init_barriers() */
    static constexpr int ENOUGH_STAGES = N >= 32 ? 3 : 4; /* as measured */
    static constexpr int ENOUGH_IN_TURNS = 2 * GROUPS;    /* one is kept until the next is there */
    static constexpr int MOST_TILES = 8, MOST_IN_TURNS = 4; /* of a stage */
    static constexpr int SUMS = N / 2;                      /* of a thread and strip */
    /* Of a stage: X, the codes of each strip, then its scales, then its zero points.  X is rows of
     * two tiles, by whose pitch ldmatrix hits all banks, or tiles as wgmma wants them. */
    static constexpr int TILE = FQ_CUDA_TILE_BYTES(BITS); /* codes of a strip */
    static constexpr int X_PITCH = 2 * 128 + 16, X_PAIR = N * X_PITCH;
    static constexpr int X_TILE = N * 128;
    /* On the way out: where a CTA's rows of W, KEPT of each strip, lie side by side in fp32, for
     * some rows of X; and the other CTA's sums of them, N columns of each. */
    static constexpr int KEPT = FQ_CUDA_STRIP / FQ_CUDA_DECODE_SPLIT;
    static constexpr int OUT_ROWS = N < 32 ? N : 32;
    /* Or sums of other warpgroups, of so many strips at a time: see join_sums(). */
    static constexpr int JOINED_STRIPS = N < 32 ? 2 : 1;
    static constexpr int JOINED =
        PARTING == parting::any ? (GROUPS - 1) * JOINED_STRIPS * FQ_CUDA_STRIP * N * 4 : 0;

    /* Of blocks of so many strips, a pair's counted both. */
    static constexpr __host__ __device__ int out_pitch(int strips) {
        return strips * KEPT * 4 + 16;
    }
    static constexpr __host__ __device__ int out_bytes(int strips) {
        const int rows = OUT_ROWS * out_pitch(strips);

        return strips <= FQ_CUDA_THIRDS_STRIPS && JOINED > rows ? JOINED : rows;
    }
    static constexpr __host__ __device__ int in_bytes(int strips) {
        return strips * KEPT * N * 4;
    }
    /* Sums of a gate's strips, all rows of X, until those of W are there. */
    static constexpr __host__ __device__ int gate_bytes(int strips) {
        return N * out_pitch(strips);
    }
    static constexpr __host__ __device__ int codes_at(int tiles) {
        return DIRECT ? tiles / 2 * X_PAIR : tiles * X_TILE;
    }
    static constexpr __host__ __device__ int scales_at(int tiles, int strips) {
        return codes_at(tiles) + strips * tiles * TILE;
    }
    static constexpr __host__ __device__ int zeros_at(int tiles, int strips, int slots) {
        return scales_at(tiles, strips) + strips * slots * FQ_CUDA_SCALE_BYTES;
    }
    static constexpr __host__ __device__ int stage_bytes(int tiles, int strips, int slots,
                                                         bool zeros) {
        int bytes = zeros_at(tiles, strips, slots) + strips * slots * zeros * FQ_CUDA_ZERO_BYTES;
        int align = DIRECT ? 128 : 1024;

        return (bytes + align - 1) / align * align;
    }
    /* Bytes beside the ring; gate_out: with room for a gate's sums. */
    static constexpr __host__ __device__ int fixed_bytes(int strips, bool gate_out) {
        return 1024 + 16 + out_bytes(strips) + in_bytes(strips) +
               (gate_out ? gate_bytes(strips) : 0);
    }
    /* How many stages find room. */
    static constexpr __host__ __device__ int stages_of(int bytes, int fixed) {
        return (SHARED - fixed) / (bytes + 16);
    }
};

#ifdef FQ_HOPPER_CODE

template <class S> struct decode_cta {
    using strip_sums = float[S::SUMS]; /* of a thread, of a strip */

    const fq_cuda_launch &launch;
    const uint32_t ring, full, empty, out; /* in shared memory */
    const uint32_t ready, taken; /* barriers: they are there; the other CTA took this one's */
    const int stage_bytes;
    const int tiles;      /* of K in a stage */
    const int strips;     /* that a stage has room for */
    const int begin, end; /* this CTA's tiles of every block */
    /* Of a pair, a block has strips of the gate and the same ones of W; or, where a warpgroup has
     * one slot, the gate's are one block and W's the next. */
    const bool paired, gate_first;
    const int blocks; /* of this cluster, a gate's counted */
    const int cluster, rank;
    const int thread, lane;
    const int group; /* warpgroup; that a warp's threads have the same, the compiler knows */

    /* A block of this cluster. */
    struct block_place {
        int strip;         /* its first, of Y */
        int strips, first; /* how many, both of a pair's counted; those in slot 0 */
        bool of_gate;      /* the gate's alone */

        __device__ __forceinline__ block_place(const decode_cta &d, int block) {
            const fq_cuda_launch &l = d.launch;
            const int count =
                fq_cuda_decode_strips(l.strips_each, l.strips_longer, l.blocks, d.cluster,
                                      d.gate_first ? block / 2 : block, &strip);

            strips = d.paired ? 2 * count : count;
            first = d.paired ? count : min(count, S::GROUPS);
            of_gate = d.gate_first && block % 2 == 0;
        }
    };

    /* Which matrix and strip is the index-th of a block; false: there is none. */
    __device__ __forceinline__ bool find_strip(const block_place &block, int index,
                                               const fq_cuda_matrix *&w, int &strip) const {
        w = block.of_gate || (paired && index < block.first) ? &launch.gate : &launch.w;
        strip = block.strip + (paired && index >= block.first ? index - block.first : index);
        return index < block.strips;
    }

    /* Where the codes of the block's index-th strip are in the first stage, and its scales and zero
     * points. */
    __device__ __forceinline__ uint32_t codes_of(int index) const {
        return ring + S::codes_at(tiles) + index * tiles * S::TILE;
    }
    __device__ __forceinline__ uint32_t scales_of(int index) const {
        return ring + S::scales_at(tiles, strips) + index * launch.slots * FQ_CUDA_SCALE_BYTES;
    }
    __device__ __forceinline__ uint32_t zeros_of(int index) const {
        return ring + S::zeros_at(tiles, strips, launch.slots) +
               index * launch.slots * FQ_CUDA_ZERO_BYTES;
    }

    /* From one row of X to the next at `out`; where the other CTA's sums of this one's rows are;
     * and a gate's sums. */
    __device__ __forceinline__ int out_pitch() const {
        return S::out_pitch(strips);
    }
    __device__ __forceinline__ uint32_t in() const {
        return out + S::out_bytes(strips);
    }
    __device__ __forceinline__ uint32_t gate_out() const {
        return in() + S::in_bytes(strips);
    }

    __device__ __forceinline__ uint32_t full_of(const ring_place &place) const {
        return full + place.stage * 8;
    }
    __device__ __forceinline__ uint32_t empty_of(const ring_place &place) const {
        return empty + place.stage * 8;
    }

    __device__ __forceinline__ decode_cta(const fq_cuda_launch &l, uint32_t shared)
        : launch(l), ring(shared), full(shared + l.stages * l.stage_bytes),
          empty(full + l.stages * 8), out(empty + l.stages * 8 + 16), ready(empty + l.stages * 8),
          taken(ready + 8), stage_bytes(l.stage_bytes), tiles(l.stage_tiles),
          strips(l.block_strips * (l.gate.codes && S::SLOTS > 1 ? 2 : 1)),
          begin(fq_cuda_decode_tile(l.w.tiles, blockIdx.x % FQ_CUDA_DECODE_SPLIT)),
          end(fq_cuda_decode_tile(l.w.tiles, blockIdx.x % FQ_CUDA_DECODE_SPLIT + 1)),
          paired(l.gate.codes && S::SLOTS > 1), gate_first(l.gate.codes && S::SLOTS == 1),
          blocks(gate_first ? 2 * l.blocks : l.blocks), cluster(blockIdx.x / FQ_CUDA_DECODE_SPLIT),
          rank(blockIdx.x % FQ_CUDA_DECODE_SPLIT), thread(threadIdx.x), lane(threadIdx.x % 32),
          group(__shfl_sync(~0u, threadIdx.x / 128, 0)) {
    }

    /* What the launcher has found out is asked for where it is wanted: a register for it would be
     * one that something else is pushed out of. */

    /* Where a block's strips are all warpgroups', stages are theirs in turn, as many for each, of
     * which the last ones may be empty; and so are the places of the ring, whose number is a
     * multiple of theirs.  Otherwise all wait for all stages: who waits for a barrier's next phase
     * but one goes on at once. */
    __device__ __forceinline__ bool parted() const {
        return S::PARTING == parting::any && launch.parted != 0;
    }
    /* From one stage of a warpgroup in the ring to its next. */
    __device__ __forceinline__ int stages_apart() const {
        return parted() ? S::GROUPS : 1;
    }

    /* By all warps.  Those of the consumers make the barriers of a stage each, since the first copy
     * waits for it and one thread would take some 40 cycles a stage; the producers' meanwhile find
     * out what to copy. */
    __device__ __forceinline__ void init_barriers() const {
        const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);

        if (warp < S::CONSUMERS / 32) {
            if (elect_one()) {
                if (warp < launch.stages) {
                    mbarrier_init(full + warp * 8, S::DIRECT ? 1 + 32 * S::ROW_WARPS : 2);
                    mbarrier_init(empty + warp * 8,
                                  (parted() ? 4 : S::CONSUMERS / 32) * FQ_CUDA_WARP_ARRIVALS);
                }
                if (warp == S::CONSUMERS / 32 - 1) {
                    mbarrier_init(ready, 1);
                    mbarrier_init(taken, 1);
                }
                mbarrier_fence_init();
            }
            __syncwarp();
            named_barrier_arrive(FQ_CUDA_BARRIER_STARTED, S::THREADS);
        }
        cluster_arrive_relaxed();
    }
    /* By all warps of the producers, before their first copy; consumers wait for the cluster. */
    __device__ __forceinline__ void await_barriers() const {
        named_barrier(FQ_CUDA_BARRIER_STARTED, S::THREADS);
    }
};

#endif /* FQ_HOPPER_CODE */

#endif
