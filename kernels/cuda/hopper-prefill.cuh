/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The prefill path on Hopper, m > FQ_DECODE_ROWS: bound by the tensor cores.
 *
 * A CTA has two consumer warpgroups, each with one strip of W and all N rows of X of
 * the block, and a producer.  The other CTA of the worker (shares.h) has the next
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

template <int N_, int BITS_> struct prefill_shape {
    static constexpr int N = N_, BITS = BITS_;
    static constexpr int GROUPS = 2; /* consumer warpgroups, a strip of W each */
    static constexpr int CONSUMERS = 128 * GROUPS, THREADS = CONSUMERS + 128;
    /* A CTA starts with 168 a thread, and setmaxnreg only moves them.  Where the consumers' sums
     * leave some, the producer has enough to keep nothing in memory. */
    static constexpr int PRODUCER_REGISTERS = N == 128 ? 88 : N == 192 ? 72 : 40;
    static constexpr int CONSUMER_REGISTERS = N == 128 ? 208 : N == 192 ? 216 : 232;
    static constexpr int TILE = FQ_CUDA_TILE_BYTES(BITS);
    static constexpr int SENT = N / FQ_CUDA_CLUSTER; /* rows of X that a CTA sends to both */
    static constexpr int QUADS = N / 8;              /* float4 of sums that a thread has */
    /* Of those of all consumers, what has room where a stage has X. */
    static constexpr int STAGE_QUADS = N * 128 / (CONSUMERS * 16);
    static constexpr int STAGES = (N == 128 ? 8 : N == 192 ? 6 : 5) - (BITS == 8);
    /* Of a stage, one tile of K: X, the codes of each strip, then its scales, then its zeros. */
    static constexpr int CODES = N * 128, SCALES = CODES + GROUPS * TILE;
    /* Where results change their order on the way out, a warpgroup's: some rows of X by one strip,
     * in fp32, or twice as many rounded, half of them on their way. */
    static constexpr int OUT_ROWS = FQ_CUDA_OUT_ROWS, OUT_PITCH = FQ_CUDA_STRIP * 4;
    static constexpr int OUT = OUT_ROWS * OUT_PITCH, OUT_QUADS = OUT_ROWS / 8;
    static constexpr int OUT_PARTS = N / OUT_ROWS;
    /* Rows of X that find room there rounded; of any others the last stage is held for theirs. */
    static constexpr int BUFFER_ROWS = N < 2 * OUT_ROWS ? N : 2 * OUT_ROWS;
    static constexpr bool HOLDS = N > BUFFER_ROWS;
    static_assert((N - BUFFER_ROWS) * FQ_CUDA_STRIP * 2 * GROUPS <= N * 128, "room in a stage's X");

    static __host__ __device__ int stage_bytes(int slots, bool zeros) {
        int bytes = SCALES + GROUPS * slots * (FQ_CUDA_SCALE_BYTES + zeros * FQ_CUDA_ZERO_BYTES);

        return (bytes + 1023) / 1024 * 1024;
    }
};

#ifdef FQ_HOPPER_CODE

/* 2^e such that the largest scale times it lies in [8, 16), or below 8 with scales so small that
 * nothing else would be left of fp32's range; 1 where there is none. */
static __device__ __forceinline__ float scale_factor(const fq_cuda_matrix &w) {
    uint32_t bits = __ldg(&w.meta->largest_scale);
    int exponent = (int)(bits >> 23) - 127;

    if (bits == 0 || bits >= 0x7f800000u)
        return 1.0f;
    exponent = 3 - max(exponent, -114);
    return __uint_as_float((uint32_t)(127 + exponent) << 23);
}

template <class S, class T> class prefiller {
    using codes_of = dequantizer<S::BITS, T, reading::own>;

    const fq_cuda_launch &launch;
    const uint32_t ring, out, full, empty; /* in shared memory */
    const int stage_bytes, zeros_at;
    const int worker, half, thread, lane, group;
    /* Of lanes 0 and 1, the first stage's empty barrier in either CTA; 0 of the others. */
    const uint32_t releases;
    using place_in_ring = known_ring_place<S::STAGES>;

    /* A block's place: blocks go down W first, so that workers side by side share rows of X. */
    __device__ __forceinline__ int block_m0(int block) const {
        return block / launch.blocks_n * S::N;
    }

    __device__ __forceinline__ bool find_strip(int block, int index, const fq_cuda_matrix *&w,
                                               int &strip) const {
        int cta = block % launch.blocks_n * FQ_CUDA_CLUSTER + half;

        if (launch.gate.codes) {
            w = index == 0 ? &launch.gate : &launch.w;
            strip = cta;
        } else {
            w = &launch.w;
            strip = cta * S::GROUPS + index;
        }
        return strip < w->strips;
    }

    __device__ __forceinline__ uint32_t full_of(const place_in_ring &place) const {
        return full + place.stage * 8;
    }
    __device__ __forceinline__ uint32_t empty_of(const place_in_ring &place) const {
        return empty + place.stage * 8;
    }

    using copies = strip_copies<S::BITS, S::GROUPS>;

    /* Of the strips of a CTA's part of a block, from a tile on; of a gated pair, of the gate (slot
     * 0) or of W (slot 1). */
    __device__ __forceinline__ copies copies_of(const fq_cuda_segment &segment, int slot) const {
        const bool gated = launch.gate.codes != nullptr;
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
        scale_pair<T> low, high; /* of rows g and g+8 */
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
        bool bf16;
        float factor;
    };

    /* stage: bytes from the first stage to this one. */
    template <bool ZEROS>
    __device__ __forceinline__ void load_terms(group_terms &terms, const lane_place &at,
                                               uint32_t stage, int slot,
                                               const scale_kind &kind) const {
        const float2 scale =
            unpack_scales(lds_32(at.scales + stage + slot * FQ_CUDA_SCALE_BYTES), kind.bf16);

        terms.low = scale_pair<T>(scale.x * kind.factor);
        terms.high = scale_pair<T>(scale.y * kind.factor);
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
        if (T::is_f16 || kind.bf16)
            dequantize_by<SEGMENTS, ZEROS, 1>(a, at, stage, kind, groups);
        else
            dequantize_by<SEGMENTS, ZEROS, 2>(a, at, stage, kind, groups);
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
                load_terms<ZEROS>(terms, at, stage, SEGMENTS == 1 ? 0 : groups.slot(step), kind);
            codes_of::fragment(a[step], codes, step, terms.zero);
            a[step][0] = terms.low.template times<SCALE_PARTS>(a[step][0]);
            a[step][1] = terms.high.template times<SCALE_PARTS>(a[step][1]);
            a[step][2] = terms.low.template times<SCALE_PARTS>(a[step][2]);
            a[step][3] = terms.high.template times<SCALE_PARTS>(a[step][3]);
        }
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

    /*
     * The warpgroups queue their products in turns, a tile each, so that one dequantizes while the
     * tensor cores are at the other's.
     */
    __device__ __forceinline__ void await_turn() const {
        if (group == 0)
            named_barrier(FQ_CUDA_BARRIER_TURNS, S::CONSUMERS);
        else
            named_barrier(FQ_CUDA_BARRIER_TURNS + 1, S::CONSUMERS);
    }
    __device__ __forceinline__ void pass_turn() const {
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
        const scale_kind kind = {w.scale_bf16 != 0, factor * fragment_factor<S::BITS, T>};
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
#pragma unroll
                for (int q = 0; q < S::STAGE_QUADS; q++) /* perhaps of rows that there are not */
                    add_f4(sums + (q0 + q) * 4, lds_f4(from + q * (S::CONSUMERS * 16)));
                settle(sums);
                held = S::HOLDS && hold && left == 1 && q0 + S::STAGE_QUADS >= quads;
                if (!held)
                    release(place.stage);
                place.next();
            }
        }
    }

    __device__ __forceinline__ void meet_warpgroup() const {
        if (group == 0)
            named_barrier(FQ_CUDA_BARRIER_GROUPS, 128);
        else
            named_barrier(FQ_CUDA_BARRIER_GROUPS + 1, 128);
    }

    /* Where eight sums of a row of X are, by their place in the strip: the rows that a warp writes
     * at a time keep out of each other's banks. */
    static __device__ __forceinline__ uint32_t wide_piece(int row, int eight) {
        return row * S::OUT_PITCH + ((eight ^ (row / 2 & 3)) << 5);
    }
    static __device__ __forceinline__ void load_sums(float (&v)[8], uint32_t address) {
        *reinterpret_cast<float4 *>(v) = lds_f4(address);
        *reinterpret_cast<float4 *>(v + 4) = lds_f4(address + 16);
    }

    /* The part of the strips' bias that a thread's sums want: of rows g and g+8. */
    __device__ __forceinline__ float2 bias_of(int strip) const {
        const int n = strip * FQ_CUDA_STRIP + thread / 32 % 4 * FQ_CUDA_QUARTER + lane / 4;
        float2 bias = {};

        if (launch.bias && n < launch.w.n)
            bias.x = load_bias(launch.bias, launch.bias_type, n);
        if (launch.bias && n + 8 < launch.w.n)
            bias.y = load_bias(launch.bias, launch.bias_type, n + 8);
        return bias;
    }

    /* Rounds `ROWS` rows of X of a block, from the FIRST on, turns them on their way to `buffer`,
     * and has them copied to Y. */
    template <int FIRST, int ROWS>
    __device__ __forceinline__ void copy_rows(const float (&sums)[S::QUADS * 4], float factor,
                                              float2 bias, const void *map, int m0, int strip,
                                              uint32_t buffer) const {
        const int warp = thread / 32 % 4;
        const uint32_t mine =
            buffer + lane / 16 * 1024 + wgmma_piece(lane % 8, warp * 2 + lane / 8 % 2);

#pragma unroll
        for (int q = 0; q < ROWS / 8; q += 2) {
            const float *v = sums + (FIRST / 8 + q) * 4;
            const uint32_t rounded[4] = {
                T::pack(fmaf(v[0], factor, bias.x), fmaf(v[1], factor, bias.x)),
                T::pack(fmaf(v[2], factor, bias.y), fmaf(v[3], factor, bias.y)),
                T::pack(fmaf(v[4], factor, bias.x), fmaf(v[5], factor, bias.x)),
                T::pack(fmaf(v[6], factor, bias.y), fmaf(v[7], factor, bias.y))};

            store_turned(mine + q * 1024, rounded);
        }
        fence_copy_engine();
        meet_warpgroup();
        if (thread % 128 != 0)
            return;
#pragma unroll
        for (int row = 0; row < ROWS; row += S::OUT_ROWS)
            if (m0 + FIRST + row < launch.m)
                tensor_store(map, strip * FQ_CUDA_STRIP, m0 + FIRST + row,
                             buffer + row * FQ_CUDA_STRIP * 2);
        tensor_store_commit();
    }

    /*
     * Sums of which nothing is wanted but a factor, a bias and a rounding: they are rounded in
     * registers, and stored by the copy engine, which leaves out what lies past the ends of Y.
     * While it is at it, the warpgroup goes on to the next block.  What there is no buffer for goes
     * where the block's last stage was (X, or others' sums), the one before `place`: both
     * warpgroups must be done with it, and it is given back once the next block has begun
     * (release_held()).
     */
    __device__ __forceinline__ void store_by_copy(const float (&sums)[S::QUADS * 4], float factor,
                                                  const void *map, int m0, int strip,
                                                  const place_in_ring &place) const {
        const float2 bias = bias_of(strip);

        /* Either may be done with the last stage first.  Each waits for the other before it lets
         * that go on: of blocks of one tile, one would be a block ahead. */
        if (S::HOLDS && group == 0) {
            named_barrier_arrive(FQ_CUDA_BARRIER_DONE, S::CONSUMERS);
        } else if (S::HOLDS) {
            named_barrier(FQ_CUDA_BARRIER_DONE, S::CONSUMERS);
            named_barrier_arrive(FQ_CUDA_BARRIER_DONE + 1, S::CONSUMERS);
        }
        if (thread % 128 == 0) /* of the block before */
            tensor_store_wait_read<0>();
        meet_warpgroup();
        copy_rows<0, S::BUFFER_ROWS>(sums, factor, bias, map, m0, strip, out + group * S::OUT);
        if constexpr (S::HOLDS) {
            if (group == 0)
                named_barrier(FQ_CUDA_BARRIER_DONE + 1, S::CONSUMERS);
            copy_rows<S::BUFFER_ROWS, S::N - S::BUFFER_ROWS>(
                sums, factor, bias, map, m0, strip,
                ring + place.stage_before() * stage_bytes +
                    group * ((S::N - S::BUFFER_ROWS) * FQ_CUDA_STRIP * 2));
        }
    }

    /* Gives the stage before `place` back if it was kept for store_by_copy(). */
    __device__ __forceinline__ void release_held(const place_in_ring &place, bool &held) const {
        if (!S::HOLDS || !held)
            return;
        if (thread % 128 == 0)
            tensor_store_wait_read<0>();
        release(place.stage_before());
        held = false;
    }

    /* Any others.  Some rows of X at a time go through shared memory, so that results lie side by
     * side.  Of a gated pair, warpgroup 0 brings the gate's sums and 1 those of W. */
    __device__ __forceinline__ void store(const float (&sums)[S::QUADS * 4], int m0,
                                          int strip) const {
        const int n0 = strip * FQ_CUDA_STRIP;
        const bool gated = launch.gate.codes != nullptr;
        const int threads = gated ? S::CONSUMERS : 128;
        auto meet = [&]() { /* with all who bring sums or take them */
                            if (gated)
                                named_barrier(FQ_CUDA_BARRIER_GATE, S::CONSUMERS);
                            else
                                meet_warpgroup();
        };
        const uint32_t buffer = out + group * S::OUT;
        const uint32_t mine = buffer + wide_piece(lane % 4 * 2, thread / 32 % 4 * 2) + lane / 4 * 4;

        for (int part = 0; part < S::OUT_PARTS; part++) {
            const int row0 = m0 + part * S::OUT_ROWS;

            if (row0 >= launch.m)
                return;
            meet(); /* the last part is stored */
#pragma unroll
            for (int p = 0; p < S::OUT_PARTS; p++) {
                if (p != part)
                    continue;
#pragma unroll
                for (int q = 0; q < S::OUT_QUADS; q++) {
                    const float *v = sums + (p * S::OUT_QUADS + q) * 4;
                    uint32_t to = mine + q * 8 * S::OUT_PITCH;

                    sts_32(to, v[0]);
                    sts_32(to + S::OUT_PITCH, v[1]);
                    sts_32(to ^ 32, v[2]);
                    sts_32((to ^ 32) + S::OUT_PITCH, v[3]);
                }
            }
            meet();
            for (int i = thread & (threads - 1); i < S::OUT_ROWS * 8; i += threads) {
                int row = i / 8, n = n0 + i % 8 * 8;
                int64_t m = row0 + row;
                uint32_t at = wide_piece(row, i % 8);
                float v[8], gate[8];

                load_sums(v, (gated ? out + S::OUT : buffer) + at);
                if (gated)
                    load_sums(gate, out + at);
                if (m < launch.m && n < launch.w.n)
                    store_run<T, 8, false>(
                        launch, v, gate, static_cast<uint16_t *>(launch.y) + m * launch.y_stride,
                        launch.residual ? static_cast<const uint16_t *>(launch.residual) +
                                              m * launch.residual_stride
                                        : nullptr,
                        n);
            }
        }
    }

  public:
    __device__ __forceinline__ prefiller(const fq_cuda_launch &l, uint32_t shared)
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

    /* By a thread. */
    __device__ __forceinline__ void produce(const void *x_map, const void *y_map) const {
        place_in_ring place;
        fq_cuda_segment segment;

        prefetch_tensor_map(x_map);
        if (launch.y_mapped)
            prefetch_tensor_map(y_map);
        grid_wait();
        for (int i = 0; fq_cuda_segment_at(&launch.shares, worker, i, &segment); i++) {
            if (launch.gate.codes)
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
        const float factor = scale_factor(launch.gate.codes && group == 0 ? launch.gate : launch.w);

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
 * launch.y_mapped, of OUT_ROWS. */
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

template <int BITS> using prefill_128 = prefill_shape<128, BITS>;
template <int BITS> using prefill_192 = prefill_shape<192, BITS>;
template <int BITS> using prefill_256 = prefill_shape<256, BITS>;

template <int BITS, class T>
static cudaError_t queue_prefill_by_rows(const fq_cuda_launch &args, const CUtensorMap *maps,
                                         cudaStream_t stream) {
    return args.block_m == 128   ? queue_prefill<prefill_128<BITS>, T>(args, maps, stream)
           : args.block_m == 192 ? queue_prefill<prefill_192<BITS>, T>(args, maps, stream)
                                 : queue_prefill<prefill_256<BITS>, T>(args, maps, stream);
}

template <int BITS>
static cudaError_t queue_prefill_any(const fq_cuda_launch &args, const CUtensorMap *maps,
                                     cudaStream_t stream) {
    return args.type == FQ_F16 ? queue_prefill_by_rows<BITS, f16>(args, maps, stream)
                               : queue_prefill_by_rows<BITS, bf16>(args, maps, stream);
}

template <int BITS> static cudaError_t prepare_prefill_any() {
    const void *kernels[] = {
        reinterpret_cast<const void *>(hopper_prefill<prefill_128<BITS>, f16>),
        reinterpret_cast<const void *>(hopper_prefill<prefill_192<BITS>, f16>),
        reinterpret_cast<const void *>(hopper_prefill<prefill_192<BITS>, bf16>),
        reinterpret_cast<const void *>(hopper_prefill<prefill_256<BITS>, f16>),
        reinterpret_cast<const void *>(hopper_prefill<prefill_128<BITS>, bf16>),
        reinterpret_cast<const void *>(hopper_prefill<prefill_256<BITS>, bf16>),
    };

    for (const void *kernel : kernels) {
        cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 << 10);

        if (error != cudaSuccess)
            return error;
    }
    return cudaSuccess;
}

#endif
