/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The decode path on Hopper, m ≤ FQ_DECODE_ROWS: bound by reading W once.
 *
 * A cluster of two CTAs has a run of strips of W and takes up to six of them, a block, at a time:
 * each CTA sums half of K, and the halves are added through shared memory.  No sums pass through
 * global memory, and no CTA waits for one that does not run beside it.
 *
 *                       K →
 *      strip 0   +-------+-------+
 *        ...     | CTA 0 | CTA 1 |   then CTA i adds and stores rows 32 i to 32 i + 31
 *      strip 5   +-------+-------+   of every strip
 *
 * A CTA has three consumer warpgroups of up to two strips each, `first` strips in slot 0 and the
 * others in slot 1; of a gated pair, slot 0 is the gate and slot 1 the same rows of W.  From 33
 * rows of X on, whose sums leave registers for one slot, a block has strips of a pair's gate, and
 * the next one those of W.  Where a cluster has one strip (or pair), or of int4 and int3 two, all
 * three warpgroups have each, if the ring has room for it: a third of the CTA's tiles to each
 * (sliced K), whose stages come in turn; then a warpgroup for each strip adds the thirds.  Beyond
 * 32 rows such a strip is one warpgroup's, too, of two, which sums it third by third.
 *
 * W is the register operand of the tensor cores, rows of X are columns of theirs.  Sums of a group,
 * or of up to two tiles of it, are scaled in fp32; in groups of 16 the weights are, as the
 * prefill's.  mma.sync and wgmma of any width sum a column alike, and which tiles are summed
 * together does not depend on m: a row's bits are the same alone and among 63 others.
 *
 * Up to 16 rows, X comes straight from the rows, and mma.sync multiplies.  More rows are multiplied
 * by wgmma, and come by a tensor map where they are equally far apart; else they are arranged
 * first (rows.cu).  A CTA has a multiprocessor to itself: of
 * two of half the size, the next kernel of the stream could fill its stages while this one ends,
 * but half the registers and stages cost more than that brings (NOTES.md).
 */
#ifndef FQ_KERNELS_CUDA_HOPPER_DECODE_CUH
#define FQ_KERNELS_CUDA_HOPPER_DECODE_CUH

#include "hopper-decode-produce.cuh"
#include "hopper-decode-store.cuh"
#include "hopper-decode-sum.cuh"

/* A launch takes the kernel of the loops that it needs: where one kernel had all loops, launches of
 * 17 to 32 rows took some 5% longer, in much the same instructions (NOTES.md). */
template <class S, class T, zero_points ZEROS, loops LOOPS>
__global__ void FQ_CLUSTER(FQ_CUDA_DECODE_SPLIT) __launch_bounds__(S::THREADS, 1)
    hopper_decode(const __grid_constant__ fq_cuda_launch args,
                  const __grid_constant__ CUtensorMap x) {
#ifdef FQ_HOPPER_CODE
    extern __shared__ uint8_t shared[];
    const decode_cta<S> cta(args, (smem_address(shared) + 1023) / 1024 * 1024);

    grid_launch_dependents();
    cta.init_barriers();
    if (cta.group >= S::GROUPS) {
        const decode_producer<S> producer(cta, &x);

        if (S::MOVES_REGISTERS)
            registers_give<S::PRODUCER_REGISTERS>();
        if (cta.parted())
            producer.template produce<parting::in_turns>();
        else
            producer.template produce<S::IN_ORDER ? parting::in_order : parting::whole>();
        __syncwarp();
        cluster_wait();
    } else {
        const decode_summer<S, T, ZEROS, LOOPS> summer(cta);
        const decode_storer<S, T> storer(cta);
        ring_place place(args.stages, cta.parted() ? cta.group : 0);

        if (S::MOVES_REGISTERS)
            registers_take<S::CONSUMER_REGISTERS>();
        cluster_wait(); /* the barriers of both CTAs are there */
        for (int i = 0; i < cta.blocks; i++) {
            const typename decode_cta<S>::block_place block(cta, i);
            typename decode_cta<S>::strip_sums sums[S::SLOTS];

            summer.sum(sums, block, place);
            storer.store(sums, block, i);
        }
    }
#endif
}

/* How a matrix's scales are, where a tile is summed in 2^segments_log2 segments. */
template <class T> static scaling scaling_of(const fq_cuda_matrix &w, int segments_log2) {
    if (w.scale_bf16 == T::is_f16)
        return scaling::any;
    if (w.group_steps == FQ_CUDA_STEPS >> segments_log2) {
        if (w.group_steps > 1)
            return scaling::exact;
        return w.k >= fq_cuda_exact_below(T::is_f16 ? FQ_F16 : FQ_BF16) ? scaling::weights
                                                                        : scaling::any;
    }
    return w.groups == 1 || w.group_steps % (2 * FQ_CUDA_STEPS) == 0 ? scaling::wide : scaling::any;
}

using decode_kernel = void (*)(fq_cuda_launch, CUtensorMap);

template <class S, class T, zero_points ZEROS> static decode_kernel choose_kernel(loops wanted) {
    switch (wanted) {
    case loops::usual:
        return hopper_decode<S, T, ZEROS, loops::usual>;
    case loops::weights:
        return hopper_decode<S, T, ZEROS, loops::weights>;
    default:
        return hopper_decode<S, T, ZEROS, loops::any>;
    }
}

/* Where some have zero points there is one kernel. */
template <class S, class T> static decode_kernel choose_kernel(zero_points zeros, loops wanted) {
    switch (zeros) {
    case zero_points::none:
        return choose_kernel<S, T, zero_points::none>(wanted);
    case zero_points::all:
        return choose_kernel<S, T, zero_points::all>(wanted);
    default:
        return hopper_decode<S, T, zero_points::some, loops::any>;
    }
}

template <class S, class T>
static cudaError_t queue_decode(fq_cuda_launch args, const CUtensorMap &x, cudaStream_t stream) {
    const bool gated = args.gate.codes != nullptr;
    const int with_zeros = (args.w.zeros != nullptr) + (gated && args.gate.zeros);
    const zero_points zeros = with_zeros == 0           ? zero_points::none
                              : with_zeros == 1 + gated ? zero_points::all
                                                        : zero_points::some;
    const int strips = args.block_strips * (gated && S::SLOTS > 1 ? 2 : 1);
    const int fixed = S::fixed_bytes(strips, gated && S::SLOTS == 1);
    const bool parted = args.third != 0 && S::PARTING == parting::any;
    const int enough = parted ? S::ENOUGH_IN_TURNS : S::ENOUGH_STAGES;
    scaling kind;
    loops wanted = loops::any;

    static_assert(S::SLOTS == 1 ||
                  S::stages_of(S::stage_bytes(2, S::SLOTS, 2 * FQ_CUDA_STEPS, true),
                               S::fixed_bytes(S::SLOTS, false)) >= S::ENOUGH_IN_TURNS);
    static_assert(S::MOST_STAGES % S::GROUPS == 0);
    /* a warpgroup keeps a stage until its next one is there */
    static_assert(S::stages_of(S::stage_bytes(2, S::GROUPS * S::SLOTS, 2 * FQ_CUDA_STEPS, true),
                               S::fixed_bytes(S::GROUPS * S::SLOTS, S::SLOTS == 1)) >= 2);
    /* Long stages are few copies, each of which costs the producer some 100 cycles, and few waits
     * of the consumers. */
    for (args.stage_tiles = parted ? S::MOST_IN_TURNS : S::MOST_TILES;; args.stage_tiles -= 2) {
        args.slots = slots_within(args, args.stage_tiles, 2);
        args.stage_bytes =
            S::stage_bytes(args.stage_tiles, strips, args.slots, zeros != zero_points::none);
        args.stages = S::stages_of(args.stage_bytes, fixed);
        if (args.stage_tiles == 2 || args.stages >= enough)
            break;
    }
    args.stages = args.stages > S::MOST_STAGES ? S::MOST_STAGES : args.stages;
    if (parted)
        args.stages -= args.stages % S::GROUPS; /* each warpgroup has places of its own */
    args.parted = parted;
    args.turns = (args.third + args.stage_tiles - 1) / args.stage_tiles;
    /* of a pair, how both are: sums must not depend on which of them a block has */
    args.segments_log2 = gated && args.gate.slots_log2 > args.w.slots_log2 ? args.gate.slots_log2
                                                                           : args.w.slots_log2;
    kind = scaling_of<T>(args.w, args.segments_log2);
    if (zeros == zero_points::some ||
        (gated && scaling_of<T>(args.gate, args.segments_log2) != kind))
        kind = scaling::any;
    args.scaling = static_cast<int>(kind);
    if (kind == scaling::weights)
        wanted = loops::weights;
    else if (kind == scaling::wide || (kind == scaling::exact && args.segments_log2 == 0))
        wanted = loops::usual;
    return launch_overlapped(
        choose_kernel<S, T>(zeros, wanted), dim3(args.clusters * FQ_CUDA_DECODE_SPLIT), S::THREADS,
        fixed + args.stages * (args.stage_bytes + 16), FQ_CUDA_DECODE_SPLIT, stream, args, x);
}

/* Whether there is room for the thirds of a launch's matrices: stages of four tiles for 17 to 32
 * rows of X, which want most.  With stages of two, thirds took longer than a warpgroup to each
 * strip where both were measured (NOTES.md).  The same for every m. */
template <class S> static bool has_room_for_thirds(const fq_cuda_launch &args) {
    const bool gated = args.gate.codes != nullptr;
    const bool zeros = args.w.zeros || (gated && args.gate.zeros);
    const int strips = args.block_strips * (gated ? 2 : 1);
    const int bytes =
        S::stage_bytes(S::MOST_IN_TURNS, strips, slots_within(args, S::MOST_IN_TURNS, 2), zeros);

    return S::stages_of(bytes, S::fixed_bytes(strips, false)) >= S::ENOUGH_IN_TURNS;
}

/* For launches of up to ROWS rows.  Beyond 32, each way of parting has a kernel of its own. */
template <int ROWS, int BITS> using decode_rows = decode_shape<ROWS, BITS, parting::any>;
template <int ROWS, int BITS> using decode_whole = decode_shape<ROWS, BITS, parting::whole>;
template <int ROWS, int BITS> using decode_thirds = decode_shape<ROWS, BITS, parting::in_order>;

template <int ROWS, int BITS, class T>
static cudaError_t queue_decode_parted(const fq_cuda_launch &args, const CUtensorMap &x,
                                       cudaStream_t stream) {
    return args.third != 0 ? queue_decode<decode_thirds<ROWS, BITS>, T>(args, x, stream)
                           : queue_decode<decode_whole<ROWS, BITS>, T>(args, x, stream);
}

template <int BITS, class T>
static cudaError_t queue_decode_by_rows(fq_cuda_launch args, const CUtensorMap &x,
                                        cudaStream_t stream) {
    if (!has_room_for_thirds<decode_rows<32, BITS>>(args))
        args.third = 0;
    switch (fq_cuda_decode_rows(args.m)) {
    case 8:
        return queue_decode<decode_rows<8, BITS>, T>(args, x, stream);
    case 16:
        return queue_decode<decode_rows<16, BITS>, T>(args, x, stream);
    case 32:
        return queue_decode<decode_rows<32, BITS>, T>(args, x, stream);
    case 48:
        return queue_decode_parted<48, BITS, T>(args, x, stream);
    default:
        return queue_decode_parted<64, BITS, T>(args, x, stream);
    }
}

template <int BITS>
static cudaError_t queue_decode_any(const fq_cuda_launch &args, const CUtensorMap &x,
                                    cudaStream_t stream) {
    return args.type == FQ_F16 ? queue_decode_by_rows<BITS, f16>(args, x, stream)
                               : queue_decode_by_rows<BITS, bf16>(args, x, stream);
}

template <class S, class T> static cudaError_t prepare_decode() {
    for (zero_points zeros : {zero_points::none, zero_points::all, zero_points::some})
        for (loops wanted : {loops::any, loops::usual, loops::weights}) {
            const void *kernel = reinterpret_cast<const void *>(choose_kernel<S, T>(zeros, wanted));
            cudaError_t error = cudaFuncSetAttribute(
                kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::SHARED);

            if (error != cudaSuccess)
                return error;
        }
    return cudaSuccess;
}

template <int ROWS, int BITS, class T> static cudaError_t prepare_decode_parted() {
    cudaError_t error = prepare_decode<decode_thirds<ROWS, BITS>, T>();

    return error == cudaSuccess ? prepare_decode<decode_whole<ROWS, BITS>, T>() : error;
}

template <int BITS, class T> static cudaError_t prepare_decode_by_rows() {
    cudaError_t error = prepare_decode<decode_rows<8, BITS>, T>();

    if (error == cudaSuccess)
        error = prepare_decode<decode_rows<16, BITS>, T>();
    if (error == cudaSuccess)
        error = prepare_decode<decode_rows<32, BITS>, T>();
    if (error == cudaSuccess)
        error = prepare_decode_parted<48, BITS, T>();
    return error == cudaSuccess ? prepare_decode_parted<64, BITS, T>() : error;
}

template <int BITS> static cudaError_t prepare_decode_any() {
    cudaError_t error = prepare_decode_by_rows<BITS, f16>();

    return error == cudaSuccess ? prepare_decode_by_rows<BITS, bf16>() : error;
}

#endif
