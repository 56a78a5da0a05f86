/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The prefill path on Hopper, m > FQ_DECODE_ROWS: bound by the tensor cores.
 *
 * A CTA has two or three consumer warpgroups, each with one strip of W and all N rows of X
 * of the block, and a producer.  The other CTA of the worker (shares.h) has the next
 * strips and the same rows of X, of which each loads one half for both:
 *
 *                     N rows of X
 *                  +---------------+
 *      CTA 0       |  warpgroup 0  |  64 rows of W
 *                  |  warpgroup 1  |
 *                  +---------------+
 *      CTA 1       |      ...      |
 *
 * W is dequantized into wgmma's register operand, scale and all: sums of a group
 * cannot be kept apart here, for want of registers.  So that a weight does not
 * leave the range of fp16, all scales are multiplied by a power of two that brings
 * the largest near 8, and the sums by its inverse.  The next step's weights are
 * dequantized while the tensor cores are at this one's.
 *
 * A gated pair: warpgroup 0 has strips of the gate, warpgroup 1 the same of W.
 */
#ifndef FQ_KERNELS_CUDA_HOPPER_PREFILL_CUH
#define FQ_KERNELS_CUDA_HOPPER_PREFILL_CUH

#include "hopper-parts.cuh"
#include "hopper-prefill-store.cuh"

#ifdef FQ_HOPPER_CODE

template <class S, class T> class prefiller : prefill_storer<S, T> {
    using codes_of = dequantizer<S::BITS, T, reading::own>;
    using cta = prefill_cta<S>;
    using storer = prefill_storer<S, T>;
    using place_in_ring = typename cta::place_in_ring;
    static constexpr bool PAIRS = S::GROUPS == 2; /* of matrices, a warpgroup to each */
    using cta::block_m0;
    using cta::empty_of;
    using cta::full_of;
    using cta::group;
    using cta::half;
    using cta::lane;
    using cta::launch;
    using cta::release;
    using cta::ring;
    using cta::stage_bytes;
    using cta::thread;
    using cta::worker;
    using cta::zeros_at;
    using storer::prefetch_residual;
    using storer::release_held;
    using storer::store;
    using storer::store_by_copy;

    __device__ __forceinline__ bool find_strip(int block, int index, const fq_cuda_matrix *&w,
                                               int &strip) const {
        int first = block % launch.blocks_n * FQ_CUDA_CLUSTER + half;

        if (PAIRS && launch.gate.codes) {
            w = index == 0 ? &launch.gate : &launch.w;
            strip = first;
        } else {
            w = &launch.w;
            strip = first * S::GROUPS + index;
        }
        return strip < w->strips;
    }

    using copies = strip_copies<S::BITS, S::GROUPS>;

    /* Of the strips of a CTA's part of a block, from a tile on; of a gated pair, of the gate (slot
     * 0) or of W (slot 1). */
    __device__ __forceinline__ copies copies_of(const fq_cuda_segment &segment, int slot) const {
        const bool gated = PAIRS && launch.gate.codes != nullptr;
        const fq_cuda_matrix *w = &launch.w;
        int strip = 0, count = find_strip(segment.block, slot, w, strip);

        if (!gated && count)
            count = min(S::GROUPS, w->strips - strip);
        return copies(*w, strip, count, segment.begin, ring + S::CODES + slot * S::TILE, S::TILE,
                      ring + S::SCALES + slot * launch.slots * FQ_CUDA_SCALE_BYTES,
                      ring + zeros_at + slot * launch.slots * FQ_CUDA_ZERO_BYTES, launch.slots);
    }

    /* The stages of a segment, a tile of K each; by a thread. */
    template <bool GATED>
    __device__ __forceinline__ void put_segment(const fq_cuda_segment &segment, const void *map,
                                                place_in_ring &place) const {
        const int m0 = block_m0(segment.block);
        /* Where the second half of the rows are none, the stage keeps what it held, for sums that
         * nobody asks for.  Zeros for them would come as copies do, but slowly: 640 rows of
         * 12288 x 12288 took 359 us, where 768 take 297. */
        const uint32_t x_bytes = (m0 + S::SENT < launch.m ? S::N : S::SENT) * 128;
        copies one = copies_of(segment, 0), two = copies_of(segment, GATED);

        for (int tile = segment.begin; tile < segment.end; tile++, place.next()) {
            const uint32_t barrier = full_of(place), stage = place.stage * stage_bytes;
            const uint32_t groups_one = one.groups_of(1), groups_two = two.groups_of(1);

            mbarrier_wait(empty_of(place), place.parity ^ 1);
            mbarrier_expect(barrier,
                            x_bytes + one.code_bytes(1) + one.scale_bytes(groups_one) +
                                (GATED ? two.code_bytes(1) + two.scale_bytes(groups_two) : 0));
            if (half == 0 || x_bytes == S::N * 128)
                tensor_copy_multicast(ring + stage + half * (S::SENT * 128), map,
                                      tile * FQ_CUDA_TILE, m0 + half * S::SENT, barrier,
                                      (1 << FQ_CUDA_CLUSTER) - 1);
            one.put_codes(stage, 1, barrier);
            one.put_scales(stage, groups_one, barrier);
            one.advance(1);
            if (GATED) {
                two.put_codes(stage, 1, barrier);
                two.put_scales(stage, groups_two, barrier);
                two.advance(1);
            }
        }
    }

    /* How many float4 of a thread's sums are of rows that there are. */
    __device__ __forceinline__ int quads_of(int block) const {
        return min(S::QUADS, (launch.m - block_m0(block) + 7) / 8);
    }

    using part = part_place<S::QUADS, S::CONSUMERS>;

    /* The stages of the sums that others left of a block, in their order; by a thread. */
    __device__ __forceinline__ void put_parts(int block, place_in_ring &place) const {
        const int quads = quads_of(block);

        for (int of = fq_cuda_first_worker(&launch.shares, block); of < worker; of++) {
            const part from(launch, of, half, 0);

            await_part(from);
            for (int q = 0; q < quads; q += S::STAGE_QUADS, place.next()) {
                const int bytes = min(S::STAGE_QUADS, quads - q) * S::CONSUMERS * 16;

                mbarrier_wait(empty_of(place), place.parity ^ 1);
                mbarrier_expect(full_of(place), bytes);
                bulk_copy(ring + place.stage * stage_bytes, from.sums + q * S::CONSUMERS, bytes,
                          full_of(place));
            }
        }
    }

    /* ---- Consumers -------------------------------------------------------------------------- */

    /* What the codes of one strip become weights by: of one group. */
    struct group_terms {
        row_scales<T> scales, rest; /* rest: see SCALE_PARTS */
        typename codes_of::zero_terms zero;
    };

    /* What a thread needs to find its part of a stage: addresses in the first one. */
    struct lane_place {
        uint32_t codes, scales, zeros, x;

        __device__ __forceinline__ explicit lane_place(const prefiller &p) {
            const int warp = p.thread / 32 % 4, pair = warp * 8 + p.lane / 4;

            codes = p.ring + S::CODES + p.group * S::TILE + warp * FQ_CUDA_QUARTER_BYTES(S::BITS) +
                    lane_offset<S::BITS>(p.lane);
            scales = p.ring + S::SCALES + p.group * p.launch.slots * FQ_CUDA_SCALE_BYTES + pair * 4;
            zeros = p.ring + p.zeros_at + p.group * p.launch.slots * FQ_CUDA_ZERO_BYTES + pair * 2;
            x = wgmma_tile(p.ring);
        }
    };

    /* How a matrix's scales are to be read, and by what to multiply them. */
    struct scale_kind {
        bool of_t;
        float factor;
        uint32_t factors; /* twice, of T; of use where scales are of T */
    };

    /*
     * stage: bytes from the first stage to this one.  SCALE_PARTS: 0, scales are of T; or they are
     * of the other type, which fp16 holds in one part where the factor brings them into its range,
     * and of whose eleven bits bf16 holds eight, and the others in a second one.
     */
    template <bool ZEROS, int SCALE_PARTS>
    __device__ __forceinline__ void load_terms(group_terms &terms, const lane_place &at,
                                               uint32_t stage, int slot,
                                               const scale_kind &kind) const {
        const uint32_t loaded = lds_32(at.scales + stage + slot * FQ_CUDA_SCALE_BYTES);

        if constexpr (SCALE_PARTS == 0) {
            terms.scales = row_scales<T>(T::mul(loaded, kind.factors));
        } else {
            const float2 scale = unpack_scales(loaded, T::is_f16);
            const float low = scale.x * kind.factor, high = scale.y * kind.factor;
            const uint32_t pair = T::pack(low, high);

            terms.scales = row_scales<T>(pair);
            if constexpr (SCALE_PARTS == 2)
                terms.rest = row_scales<T>(T::pack(low - __uint_as_float(pair << 16),
                                                   high - __uint_as_float(pair & 0xffff0000u)));
        }
        if (ZEROS)
            terms.zero =
                codes_of::unpack_zeros(lds_16(at.zeros + stage + slot * FQ_CUDA_ZERO_BYTES));
    }

    /* The weights of a strip and tile, ready for wgmma. */
    using fragments = uint32_t[FQ_CUDA_STEPS][4];

    /* From the codes and scales in a stage.  SEGMENTS: parts of the tile that may differ in scale.
     */
    template <int SEGMENTS, bool ZEROS>
    __device__ __forceinline__ void dequantize(fragments &a, const lane_place &at, uint32_t stage,
                                               const scale_kind &kind,
                                               const group_phase &groups) const {
        if (kind.of_t)
            dequantize_by<SEGMENTS, ZEROS, 0>(a, at, stage, kind, groups);
        else
            dequantize_by<SEGMENTS, ZEROS, T::is_f16 ? 1 : 2>(a, at, stage, kind, groups);
    }

    template <int SEGMENTS, bool ZEROS, int SCALE_PARTS>
    __device__ __forceinline__ void dequantize_by(fragments &a, const lane_place &at,
                                                  uint32_t stage, const scale_kind &kind,
                                                  const group_phase &groups) const {
        const lane_codes<S::BITS> codes = load_codes<S::BITS>(at.codes + stage);
        group_terms terms;

        terms.zero = codes_of::middle_zeros();
#pragma unroll
        for (int step = 0; step < FQ_CUDA_STEPS; step++) {
            if (step % (FQ_CUDA_STEPS / SEGMENTS) == 0)
                load_terms<ZEROS, SCALE_PARTS>(terms, at, stage,
                                               SEGMENTS == 1 ? 0 : groups.slot(step), kind);
            codes_of::fragment(a[step], codes, step, terms.zero);
            if constexpr (SCALE_PARTS == 2)
                terms.scales.multiply(a[step], terms.rest);
            else
                terms.scales.multiply(a[step]);
        }
    }

    /*
     * Where the tensor cores are the limit the warpgroups queue their products in turns, a tile
     * each, so that one dequantizes while the tensor cores are at the other's.  In narrower blocks
     * dequantization takes longer, and they had better not wait for each other.
     */
    __device__ __forceinline__ void await_turn() const {
        if (!S::TURNS)
            return;
        if (group == 0)
            named_barrier(FQ_CUDA_BARRIER_TURNS, S::CONSUMERS);
        else
            named_barrier(FQ_CUDA_BARRIER_TURNS + 1, S::CONSUMERS);
    }
    __device__ __forceinline__ void pass_turn() const {
        if (!S::TURNS)
            return;
        if (group == 0)
            named_barrier_arrive(FQ_CUDA_BARRIER_TURNS + 1, S::CONSUMERS);
        else
            named_barrier_arrive(FQ_CUDA_BARRIER_TURNS, S::CONSUMERS);
    }

    /* Queues a tile's products; add: to what is in the sums. */
    __device__ __forceinline__ void multiply(float (&sums)[S::QUADS * 4], fragments &a, uint32_t x,
                                             bool add) const {
#pragma unroll
        for (int step = 0; step < FQ_CUDA_STEPS; step++)
            settle(a[step]);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < FQ_CUDA_STEPS; step++)
            wgmma<S::N>::template mma<T>(sums, a[step], wgmma_descriptor(x + step * WGMMA_STEP),
                                         add || step > 0);
        wgmma_commit();
    }

    /*
     * All tiles of a segment.  While the tensor cores are at one tile, the next one is dequantized.
     * Between two of this warpgroup's tiles they have nothing but the other's, so that time is kept
     * short: nothing happens in it but the wait, and a stage is released once the next tile is
     * queued.
     */
    template <int SEGMENTS, bool ZEROS>
    __device__ __forceinline__ void
    sum_tiles(float (&sums)[S::QUADS * 4], const fq_cuda_segment &segment, const fq_cuda_matrix &w,
              float factor, place_in_ring &place, bool &held, bool hold) const {
        group_phase groups(w, segment.begin);
        fragments a[2];
        const lane_place at(*this);
        const float by = factor * fragment_factor<S::BITS, T>;
        const scale_kind kind = {w.scale_bf16 != T::is_f16, by, T::pack(by, by)};
        int left = segment.end - segment.begin;
        bool at_first = true;

        mbarrier_wait(full_of(place), place.parity);
        dequantize<SEGMENTS, ZEROS>(a[0], at, place.stage * stage_bytes, kind, groups);
        while (left > 0) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (i == 1 && left == 0)
                    break;
                await_turn();
                multiply(sums, a[i], at.x + place.stage * (stage_bytes / 16), i == 1 || !at_first);
                pass_turn();
                if (i == 1 || !at_first)
                    release(place.stage_before());
                else
                    release_held(place, held);
                at_first = false;
                left--;
                place.next();
                if (left > 0) {
                    mbarrier_wait(full_of(place), place.parity);
                    if (SEGMENTS > 1)
                        groups.advance(FQ_CUDA_STEPS);
                    dequantize<SEGMENTS, ZEROS>(a[1 - i], at, place.stage * stage_bytes, kind,
                                                groups);
                }
                wgmma_wait<0>();
            }
        }
        held = S::HOLDS && hold;
        if (!held)
            release(place.stage_before());
        settle(sums);
    }

    template <bool ZEROS>
    __device__ __forceinline__ void
    sum_any_tiles(float (&sums)[S::QUADS * 4], const fq_cuda_segment &segment,
                  const fq_cuda_matrix &w, float factor, place_in_ring &place, bool &held,
                  bool hold) const {
        if (w.slots_log2 == 0)
            sum_tiles<1, ZEROS>(sums, segment, w, factor, place, held, hold);
        else if (w.slots_log2 == 1)
            sum_tiles<2, ZEROS>(sums, segment, w, factor, place, held, hold);
        else
            sum_tiles<4, ZEROS>(sums, segment, w, factor, place, held, hold);
    }

    /* held: whether the stage before `place` still is this warpgroup's; hold: whether the last one
     * shall be. */
    __device__ __forceinline__ void sum_segment(float (&sums)[S::QUADS * 4],
                                                const fq_cuda_segment &segment,
                                                const fq_cuda_matrix &w, bool present, float factor,
                                                place_in_ring &place, bool &held, bool hold) const {
        if (!present) {
            for (int tile = segment.begin; tile < segment.end; tile++) {
                mbarrier_wait(full_of(place), place.parity);
                await_turn();
                pass_turn();
                release_held(place, held);
                held = S::HOLDS && hold && tile == segment.end - 1;
                if (!held)
                    release(place.stage);
                place.next();
            }
        } else if (w.zeros) {
            sum_any_tiles<true>(sums, segment, w, factor, place, held, hold);
        } else {
            sum_any_tiles<false>(sums, segment, w, factor, place, held, hold);
        }
    }

    /* Adds what others left of a block, stage by stage; hold: as of sum_segment(). */
    __device__ __forceinline__ void add_parts(float (&sums)[S::QUADS * 4], int block,
                                              place_in_ring &place, bool &held, bool hold) const {
        const int quads = quads_of(block);

        for (int left = worker - fq_cuda_first_worker(&launch.shares, block); left > 0; left--) {
#pragma unroll
            for (int q0 = 0; q0 < S::QUADS; q0 += S::STAGE_QUADS) {
                if (q0 >= quads)
                    break;
                const uint32_t from = ring + place.stage * stage_bytes + thread * 16;

                mbarrier_wait(full_of(place), place.parity);
                /* perhaps of rows that there are not */
#pragma unroll
                for (int q = 0; q < min(S::STAGE_QUADS, S::QUADS - q0); q++)
                    add_f4(sums + (q0 + q) * 4, lds_f4(from + q * (S::CONSUMERS * 16)));
                settle(sums);
                held = S::HOLDS && hold && left == 1 && q0 + S::STAGE_QUADS >= quads;
                if (!held)
                    release(place.stage);
                place.next();
            }
        }
    }

  public:
    __device__ __forceinline__ prefiller(const fq_cuda_launch &l, uint32_t shared)
        : storer(l, shared) {
    }
    using cta::init_barriers;

    /* By a thread. */
    __device__ __forceinline__ void produce(const void *x_map, const void *y_map) const {
        place_in_ring place;
        fq_cuda_segment segment;

        prefetch_tensor_map(x_map);
        if (launch.y_mapped)
            prefetch_tensor_map(y_map);
        grid_wait();
        for (int i = 0; fq_cuda_segment_at(&launch.shares, worker, i, &segment); i++) {
            if (PAIRS && launch.gate.codes)
                put_segment<true>(segment, x_map, place);
            else
                put_segment<false>(segment, x_map, place);
            if (segment.begin > 0 && segment.end == launch.shares.units)
                put_parts(segment.block, place);
        }
        /* the other CTA still counts itself out of this one's barriers */
        for (int i = 0; i < S::STAGES; i++, place.next())
            mbarrier_wait(empty_of(place), place.parity ^ 1);
    }

    __device__ __forceinline__ void consume(const void *y_map) {
        place_in_ring place;
        fq_cuda_segment segment;
        bool held = false;

        /* of the matrix that all strips of this warpgroup are of */
        const float factor =
            scale_factor<T>(PAIRS && launch.gate.codes && group == 0 ? launch.gate : launch.w);

        grid_wait();
        if (group == 1)
            pass_turn();
        for (int index = 0; fq_cuda_segment_at(&launch.shares, worker, index, &segment); index++) {
            float sums[S::QUADS * 4];
            const fq_cuda_matrix *w;
            int strip, m0 = block_m0(segment.block);
            bool present = find_strip(segment.block, group, w, strip);

            const bool ends = segment.end == launch.shares.units; /* the block */
            const bool adds = ends && segment.begin > 0, copies = ends && launch.y_mapped;
            float rest = 1.0f / factor;

            if (ends && launch.residual)
                prefetch_residual(m0, strip);
            no_matter(sums); /* the first products are not added to them */
            sum_segment(sums, segment, *w, present, factor, place, held, copies && !adds);
            if (!ends || adds || !launch.y_mapped) {
#pragma unroll
                for (int i = 0; i < S::QUADS * 4; i++)
                    sums[i] *= rest;
                rest = 1.0f;
            }
            if (!ends) {
                leave_part(part(launch, worker, half, thread), sums, thread,
                           [&](int q) { return m0 + q * 8 < launch.m; });
                continue;
            }
            if (adds)
                add_parts(sums, segment.block, place, held, copies);
            if (copies)
                store_by_copy(sums, rest, y_map, m0, strip, place);
            else
                store(sums, m0, strip);
        }
        release_held(place, held);
        tensor_store_wait_read<0>();
    }
};

#endif /* FQ_HOPPER_CODE */

/* Tensor maps of two dimensions with boxes of 64 columns: x of SENT rows; y, where
 * launch.y_mapped, of FQ_CUDA_STORED_ROWS. */
template <class S, class T>
__global__ void FQ_CLUSTER(FQ_CUDA_CLUSTER) __launch_bounds__(S::THREADS, 1)
    hopper_prefill(const __grid_constant__ fq_cuda_launch args,
                   const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap y) {
#ifdef FQ_HOPPER_CODE
    extern __shared__ __align__(1024) uint8_t shared[]; /* as tiles want to start */
    prefiller<S, T> p(args, smem_address(shared));

    grid_launch_dependents();
    p.init_barriers();
    cluster_wait(); /* the barriers of both CTAs are there */
    if (threadIdx.x >= S::CONSUMERS) {
        registers_give<S::PRODUCER_REGISTERS>();
        if (threadIdx.x < S::CONSUMERS + 32 && elect_one())
            p.produce(&x, &y);
    } else {
        registers_take<S::CONSUMER_REGISTERS>();
        p.consume(&y);
    }
#endif
}

template <class S, class T>
static cudaError_t queue_prefill(fq_cuda_launch args, const CUtensorMap *maps,
                                 cudaStream_t stream) {
    bool zeros = args.w.zeros || (args.gate.codes && args.gate.zeros);

    args.slots = slots_within(args, 1, 1);
    args.stage_bytes = S::stage_bytes(args.slots, zeros);
    return launch_overlapped(hopper_prefill<S, T>, dim3(args.shares.workers * FQ_CUDA_CLUSTER),
                             S::THREADS, S::GROUPS * S::OUT + S::STAGES * (args.stage_bytes + 16),
                             FQ_CUDA_CLUSTER, stream, args, maps[0], maps[1]);
}

template <int BITS, class T>
static cudaError_t queue_prefill_by_rows(const fq_cuda_launch &args, const CUtensorMap *maps,
                                         cudaStream_t stream) {
    const bool three = args.block_strips == 3 * FQ_CUDA_CLUSTER; /* warpgroups */

    switch (args.block_m) {
    case 96:
        return three ? queue_prefill<prefill_shape<96, BITS, 3>, T>(args, maps, stream)
                     : queue_prefill<prefill_shape<96, BITS, 2>, T>(args, maps, stream);
    case 128:
        return three ? queue_prefill<prefill_shape<128, BITS, 3>, T>(args, maps, stream)
                     : queue_prefill<prefill_shape<128, BITS, 2>, T>(args, maps, stream);
    case 160:
        return queue_prefill<prefill_shape<160, BITS, 3>, T>(args, maps, stream);
    case 192:
        return queue_prefill<prefill_shape<192, BITS, 2>, T>(args, maps, stream);
    case 224:
        return queue_prefill<prefill_shape<224, BITS, 2>, T>(args, maps, stream);
    default:
        return queue_prefill<prefill_shape<256, BITS, 2>, T>(args, maps, stream);
    }
}

template <int BITS>
static cudaError_t queue_prefill_any(const fq_cuda_launch &args, const CUtensorMap *maps,
                                     cudaStream_t stream) {
    return args.type == FQ_F16 ? queue_prefill_by_rows<BITS, f16>(args, maps, stream)
                               : queue_prefill_by_rows<BITS, bf16>(args, maps, stream);
}

template <int BITS, class T> static cudaError_t prepare_prefill() {
    const void *kernels[] = {
        reinterpret_cast<const void *>(hopper_prefill<prefill_shape<96, BITS, 2>, T>),
        reinterpret_cast<const void *>(hopper_prefill<prefill_shape<96, BITS, 3>, T>),
        reinterpret_cast<const void *>(hopper_prefill<prefill_shape<128, BITS, 2>, T>),
        reinterpret_cast<const void *>(hopper_prefill<prefill_shape<128, BITS, 3>, T>),
        reinterpret_cast<const void *>(hopper_prefill<prefill_shape<160, BITS, 3>, T>),
        reinterpret_cast<const void *>(hopper_prefill<prefill_shape<192, BITS, 2>, T>),
        reinterpret_cast<const void *>(hopper_prefill<prefill_shape<224, BITS, 2>, T>),
        reinterpret_cast<const void *>(hopper_prefill<prefill_shape<256, BITS, 2>, T>),
    };

    for (const void *kernel : kernels) {
        cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 << 10);

        if (error != cudaSuccess)
            return error;
    }
    return cudaSuccess;
}

template <int BITS> static cudaError_t prepare_prefill_any() {
    cudaError_t error = prepare_prefill<BITS, f16>();

    return error == cudaSuccess ? prepare_prefill<BITS, bf16>() : error;
}

#endif
