/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The consumers of hopper-decode.cuh: from the stages of the ring to a CTA's sums of its strips,
 * over its half of K.
 */
#ifndef FQ_KERNELS_CUDA_HOPPER_DECODE_SUM_CUH
#define FQ_KERNELS_CUDA_HOPPER_DECODE_SUM_CUH

#include "hopper-decode-cta.cuh"

#ifdef FQ_HOPPER_CODE

template <class S, class T> class decode_summer {
    using block_place = typename decode_cta<S>::block_place;
    using strip_sums = typename decode_cta<S>::strip_sums;
    const decode_cta<S> &cta;
    const uint32_t x; /* where this thread takes X from, in the first stage */

    /* Where a thread finds the codes and scales of one of its strips: addresses in the first stage;
     * and how to read them. */
    struct slot_place {
        uint32_t codes, scales, zeros;
        bool bf16_scales, has_zeros;
        group_phase groups;

        __device__ __forceinline__ slot_place(const decode_cta<S> &d, const block_place &block,
                                              int slot, const fq_cuda_matrix &w)
            : bf16_scales(w.scale_bf16 != 0), has_zeros(w.zeros != nullptr), groups(w, d.begin) {
            const int index = (d.parted ? 0 : d.thread / 128) + slot * block.first,
                      warp = d.thread / 32 % 4;
            const int pair = warp * 8 + d.lane / 4;

            codes = d.codes_of(index) + warp * FQ_CUDA_QUARTER_BYTES(S::BITS) +
                    lane_offset<S::BITS>(d.lane);
            scales = d.scales_of(index) + pair * 4;
            zeros = d.zeros_of(index) + pair * 2;
        }

        /* Of the group that a step of the stage belongs to; the stage starts `stage` bytes behind
         * the first. */
        template <bool ZEROS>
        __device__ __forceinline__ zero_terms<S::BITS, T> load_zeros(uint32_t stage,
                                                                     int step) const {
            if (!ZEROS || !has_zeros)
                return middle_zeros<S::BITS, T>();
            return unpack_zeros<S::BITS, T>(
                lds_16(zeros + stage + groups.slot(step) * FQ_CUDA_ZERO_BYTES));
        }
        __device__ __forceinline__ uint32_t load_scales(uint32_t stage, int step) const {
            return lds_32(scales + stage + groups.slot(step) * FQ_CUDA_SCALE_BYTES);
        }
        __device__ __forceinline__ lane_codes<S::BITS> load_codes(uint32_t stage, int tile) const {
            return ::load_codes<S::BITS>(codes + stage + tile * FQ_CUDA_TILE_BYTES(S::BITS));
        }
    };

    __device__ __forceinline__ void add_scaled(strip_sums &sums, const strip_sums &part,
                                               float2 scale) const {
#pragma unroll
        for (int j = 0; j < S::SUMS; j++)
            sums[j] = fmaf(part[j], j & 2 ? scale.y : scale.x, sums[j]);
    }

    /*
     * TILES tiles, from `of` on, of SLOTS strips by mma.sync: for few rows of X, half of what the
     * narrowest wgmma costs.  Products of different tiles and strips do not wait for each other.
     */
    template <int SLOTS, int TILES, int SEGMENTS, bool ZEROS>
    __device__ __forceinline__ void
    sum_tiles_directly(strip_sums (&sums)[S::SLOTS], const slot_place (&at)[SLOTS], uint32_t stage,
                       int of, uint32_t x_place) const {
        constexpr int STEPS = FQ_CUDA_STEPS / SEGMENTS; /* of a segment */
        lane_codes<S::BITS> codes[TILES][SLOTS];
        uint32_t x[TILES][S::N / 8][4]; /* two steps */
        float part[TILES][SLOTS][S::N / 8][4];

        x_place += stage + of / 2 * S::X_PAIR + of % 2 * 128;
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int s = 0; s < SLOTS; s++)
                codes[t][s] = at[s].load_codes(stage, of + t);
#pragma unroll
        for (int segment = 0; segment < SEGMENTS; segment++) {
            zero_terms<S::BITS, T> zero[TILES][SLOTS];
            uint32_t scale[TILES][SLOTS];

#pragma unroll
            for (int t = 0; t < TILES; t++)
#pragma unroll
                for (int s = 0; s < SLOTS; s++) {
                    const int step = (of + t) * FQ_CUDA_STEPS + segment * STEPS;

                    scale[t][s] = at[s].load_scales(stage, step);
                    zero[t][s] = at[s].template load_zeros<ZEROS>(stage, step);
                }
#pragma unroll
            for (int i = 0; i < STEPS; i++) {
                const int step = segment * STEPS + i;

#pragma unroll
                for (int t = 0; t < TILES; t++)
#pragma unroll
                    for (int j = 0; j < S::N / 8; j++)
                        if (step % 2 == 0)
                            ldmatrix_x4(x[t][j],
                                        x_place + j * 8 * S::X_PITCH + t * 128 + step * 32);
#pragma unroll
                for (int t = 0; t < TILES; t++)
#pragma unroll
                    for (int s = 0; s < SLOTS; s++) {
                        uint32_t a[4];

                        fragment<S::BITS, T, !ZEROS>(a, codes[t][s], step, zero[t][s]);
#pragma unroll
                        for (int j = 0; j < S::N / 8; j++) {
                            const uint32_t low = x[t][j][step % 2 * 2],
                                           high = x[t][j][step % 2 * 2 + 1];

                            if (i == 0)
                                T::mma_first(part[t][s][j], a, low, high);
                            else
                                T::mma(part[t][s][j], a, low, high);
                        }
                    }
            }
#pragma unroll
            for (int t = 0; t < TILES; t++)
#pragma unroll
                for (int s = 0; s < SLOTS; s++)
                    add_scaled(sums[s], reinterpret_cast<strip_sums &>(part[t][s]),
                               unpack_scales(scale[t][s], at[s].bf16_scales));
        }
    }

    /* One tile of a strip by wgmma, a segment after the other. */
    template <int SEGMENTS, bool ZEROS>
    __device__ __forceinline__ void sum_tile(strip_sums &sums, const slot_place &at, uint32_t stage,
                                             int of, uint32_t x_place) const {
        constexpr int STEPS = FQ_CUDA_STEPS / SEGMENTS;
        const lane_codes<S::BITS> codes = at.load_codes(stage, of);

        x_place += stage / 16 + of * (S::X_TILE / 16);
#pragma unroll
        for (int segment = 0; segment < SEGMENTS; segment++) {
            const int first_step = of * FQ_CUDA_STEPS + segment * STEPS;
            const zero_terms<S::BITS, T> zero = at.template load_zeros<ZEROS>(stage, first_step);
            strip_sums part;
            uint32_t a[STEPS][4];

#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                fragment<S::BITS, T, !ZEROS>(a[s], codes, segment * STEPS + s, zero);
                settle(a[s]);
            }
            wgmma_fence();
#pragma unroll
            for (int s = 0; s < STEPS; s++)
                wgmma<S::N>::template mma<T>(
                    part, a[s], wgmma_descriptor(x_place + (segment * STEPS + s) * WGMMA_STEP),
                    s > 0);
            wgmma_commit();
            wgmma_wait<0>();
            settle(part);
            add_scaled(sums, part,
                       unpack_scales(at.load_scales(stage, first_step), at.bf16_scales));
        }
    }

    /* The tiles of a stage. */
    template <int SLOTS, int SEGMENTS, bool ZEROS>
    __device__ __forceinline__ void sum_stage(strip_sums (&sums)[S::SLOTS],
                                              const slot_place (&at)[SLOTS], uint32_t stage,
                                              int tiles) const {
        /* tiles at a time: by the registers there are, and as measured */
        constexpr bool PAIRS = S::N == 8    ? S::BITS != 8
                               : S::N == 16 ? true
                                            : S::BITS == 3 && SLOTS == 1;
        constexpr int TOGETHER = PAIRS && SEGMENTS == 1 ? 2 : 1;
        int of = 0;

        if constexpr (!S::DIRECT) {
            for (; of < tiles; of++)
#pragma unroll
                for (int s = 0; s < SLOTS; s++)
                    sum_tile<SEGMENTS, ZEROS>(sums[s], at[s], stage, of, x);
        } else {
            for (; of + TOGETHER <= tiles; of += TOGETHER)
                sum_tiles_directly<SLOTS, TOGETHER, SEGMENTS, ZEROS>(sums, at, stage, of, x);
            if (of < tiles)
                sum_tiles_directly<SLOTS, 1, SEGMENTS, ZEROS>(sums, at, stage, of, x);
        }
    }

    /* All tiles of a block. */
    template <int SLOTS, int SEGMENTS, bool ZEROS>
    __device__ __forceinline__ void sum_tiles(strip_sums (&sums)[S::SLOTS], slot_place (&at)[SLOTS],
                                              ring_place &place) const {
        int turns = cta.parted ? cta.thread / 128 : 0; /* stages until this warpgroup's next */

        for (int tile = cta.begin; tile < cta.end; tile += cta.tiles, place.next()) {
            const uint32_t stage = place.stage * cta.stage_bytes;
            const int tiles = min(cta.tiles, cta.end - tile);

            mbarrier_wait(cta.full_of(place), place.parity);
            if (turns == 0)
                sum_stage<SLOTS, SEGMENTS, ZEROS>(sums, at, stage, tiles);
            cta.release(place);
            if (cta.parted)
                turns = turns > 0 ? turns - 1 : S::GROUPS - 1;
#pragma unroll
            for (int s = 0; s < SLOTS; s++)
                at[s].groups.advance(cta.tiles * FQ_CUDA_STEPS);
        }
    }

    /*
     * The same by wgmma where a tile has one scale a row.  The next strip, of this tile or the next
     * one, is dequantized while the tensor cores are at this one.
     */
    template <int SLOTS, bool ZEROS>
    __device__ __forceinline__ void sum_tiles_ahead(strip_sums (&sums)[S::SLOTS],
                                                    slot_place (&at)[SLOTS],
                                                    ring_place &place) const {
        const int items = (cta.end - cta.begin) * SLOTS;
        uint32_t stage = place.stage * cta.stage_bytes;
        uint32_t a[2][FQ_CUDA_STEPS][4];
        int of = 0; /* tile of the stage */
        /* Codes come from shared memory while products are queued, unless they take the registers
         * that these want. */
        constexpr bool EARLY = S::BITS != 8;
        lane_codes<S::BITS> codes;
        zero_terms<S::BITS, T> zero;
        auto load = [&](const slot_place &from) {
            codes = from.load_codes(stage, of);
            zero = from.template load_zeros<ZEROS>(stage, of * FQ_CUDA_STEPS);
        };
        auto dequantize = [&](uint32_t(&to)[FQ_CUDA_STEPS][4]) {
#pragma unroll
            for (int step = 0; step < FQ_CUDA_STEPS; step++)
                fragment<S::BITS, T, !ZEROS>(to[step], codes, step, zero);
        };

        if (items == 0)
            return;
        mbarrier_wait(cta.full_of(place), place.parity);
        load(at[0]);
        dequantize(a[0]);
        for (int item = 0; item < items; item += 2) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                constexpr int LAST = SLOTS - 1;
                const int slot = SLOTS == 2 ? i : 0; /* known when compiled */
                const ring_place here = place;
                strip_sums part;

                if (item + i >= items)
                    break;
                const bool more = item + i + 1 < items;
                const uint32_t scale = at[slot].load_scales(stage, of * FQ_CUDA_STEPS);
                const uint32_t x_place = x + stage / 16 + of * (S::X_TILE / 16);
                /* with this stage: its last tile, or K's */
                const bool done = slot == LAST && (of + 1 == cta.tiles || !more);

                if (slot == LAST)
                    of++;
                if (done) {
                    of = 0;
                    place.next();
                    stage = place.stage * cta.stage_bytes;
#pragma unroll
                    for (int s = 0; s < SLOTS; s++)
                        at[s].groups.advance(cta.tiles * FQ_CUDA_STEPS);
                }
                const slot_place &following = at[slot == LAST ? 0 : LAST];

                if (more && done)
                    mbarrier_wait(cta.full_of(place), place.parity);
                if (more && EARLY)
                    load(following);
#pragma unroll
                for (int step = 0; step < FQ_CUDA_STEPS; step++)
                    settle(a[i][step]);
                wgmma_fence();
#pragma unroll
                for (int step = 0; step < FQ_CUDA_STEPS; step++)
                    wgmma<S::N>::template mma<T>(
                        part, a[i][step], wgmma_descriptor(x_place + step * WGMMA_STEP), step > 0);
                wgmma_commit();
                if (more && !EARLY)
                    load(following);
                if (more)
                    dequantize(a[1 - i]);
                wgmma_wait<0>();
                settle(part);
                if (done)
                    cta.release(here);
                add_scaled(sums[slot], part, unpack_scales(scale, at[slot].bf16_scales));
            }
        }
    }

    template <int SLOTS, bool ZEROS>
    __device__ __forceinline__ void sum_block(strip_sums (&sums)[S::SLOTS], slot_place (&at)[SLOTS],
                                              int segments_log2, ring_place &place) const {
        if (segments_log2 == 0) {
            if (S::DIRECT || cta.parted)
                sum_tiles<SLOTS, 1, ZEROS>(sums, at, place);
            else if constexpr (!S::DIRECT)
                sum_tiles_ahead<SLOTS, ZEROS>(sums, at, place);
        } else if (segments_log2 == 1) {
            sum_tiles<SLOTS, 2, ZEROS>(sums, at, place);
        } else {
            sum_tiles<SLOTS, 4, ZEROS>(sums, at, place);
        }
    }

    /* A warpgroup without a strip only lets the stages go. */
    __device__ __forceinline__ void skip_block(ring_place &place) const {
        for (int tile = cta.begin; tile < cta.end; tile += cta.tiles, place.next()) {
            mbarrier_wait(cta.full_of(place), place.parity);
            cta.release(place);
        }
    }

  public:
    __device__ __forceinline__ explicit decode_summer(const decode_cta<S> &of)
        : cta(of), x(S::DIRECT ? of.ring + of.lane % 8 * S::X_PITCH + of.lane / 8 * 16
                               : wgmma_tile(of.ring)) {
    }

    /* This thread's sums of a block, zero before; place: where the block begins in the ring, and
     * afterwards the next one. */
    __device__ __forceinline__ void sum(strip_sums (&sums)[S::SLOTS], const block_place &block,
                                        ring_place &place) const {
        const int group = cta.parted ? 0 : cta.thread / 128;
        const fq_cuda_matrix *w[S::SLOTS];
        int strip;
        const bool one = cta.find_strip(block, group, w[0], strip) && group < block.first;
        const bool two = cta.find_strip(block, group + block.first, w[1], strip) && one;

        /* each case with places of its own: what one has no registers for, the other may have */
        if (!one) {
            skip_block(place);
        } else if (two) {
            slot_place at[2] = {{cta, block, 0, *w[0]}, {cta, block, 1, *w[1]}};
            const int segments = max(w[0]->slots_log2, w[1]->slots_log2);

            if (w[0]->zeros || w[1]->zeros)
                sum_block<2, true>(sums, at, segments, place);
            else
                sum_block<2, false>(sums, at, segments, place);
        } else {
            slot_place at[1] = {{cta, block, 0, *w[0]}};

            if (w[0]->zeros)
                sum_block<1, true>(sums, at, w[0]->slots_log2, place);
            else
                sum_block<1, false>(sums, at, w[0]->slots_log2, place);
        }
    }
};

#endif /* FQ_HOPPER_CODE */

#endif
