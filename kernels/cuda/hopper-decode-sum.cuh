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
    int arrives;      /* 1: this lane counts its warp in at a barrier */

    /* Where a thread finds the codes and scales of one of its strips: addresses in the first stage;
     * and how to read them.  USUAL: groups are of 64 and scales of X's type, as the compiler is to
     * know. */
    struct slot_place {
        uint32_t codes, scales, zeros;
        bool bf16_scales, has_zeros;
        group_phase groups;

        __device__ __forceinline__ slot_place(const decode_cta<S> &d, const block_place &block,
                                              int slot, const fq_cuda_matrix &w)
            : bf16_scales(w.scale_bf16 != 0), has_zeros(w.zeros != nullptr), groups(w, d.begin) {
            const int index = (d.parted ? 0 : d.group) + slot * block.first,
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
        template <bool USUAL>
        __device__ __forceinline__ uint32_t load_scales(uint32_t stage, int step) const {
            const int slot = USUAL ? step / FQ_CUDA_STEPS : groups.slot(step);

            return lds_32(scales + stage + slot * FQ_CUDA_SCALE_BYTES);
        }
        template <bool USUAL> __device__ __forceinline__ float2 unpack(uint32_t loaded) const {
            return unpack_scales(loaded, USUAL ? !T::is_f16 : bf16_scales);
        }
        __device__ __forceinline__ lane_codes<S::BITS> load_codes(uint32_t stage, int tile) const {
            return ::load_codes<S::BITS>(codes + stage + tile * FQ_CUDA_TILE_BYTES(S::BITS));
        }
    };

    /* A walk over the stages that this warpgroup sums of a block: all; or, where a strip is all
     * warpgroups', every third. */
    struct walk {
        int tile; /* the stage's first */
        ring_place place;

        __device__ __forceinline__ walk(const decode_cta<S> &d, const ring_place &from)
            : tile(d.begin), place(from) {
        }
        __device__ __forceinline__ void pass(const decode_cta<S> &d) {
            tile += d.tiles;
            place.next();
        }
    };

    /* Past a stage; what is known of the strips goes along. */
    template <int SLOTS, bool USUAL>
    __device__ __forceinline__ void pass(walk &at, slot_place (&strips)[SLOTS]) const {
        at.pass(cta);
#pragma unroll
        for (int s = 0; s < SLOTS; s++)
            if (!USUAL)
                strips[s].groups.advance(cta.tiles * FQ_CUDA_STEPS);
    }
    /* Past so many stages of the other warpgroups, if there are. */
    template <int SLOTS, bool USUAL>
    __device__ __forceinline__ void pass_others(walk &at, slot_place (&strips)[SLOTS],
                                                int stages) const {
        for (int i = 0; i < stages && at.tile < cta.end; i++) {
            if (!cta.owned) {
                mbarrier_wait(cta.full_of(at.place), at.place.parity);
                release(cta.empty_of(at.place));
            }
            pass<SLOTS, USUAL>(at, strips);
        }
    }
    /* At this warpgroup's first stage. */
    template <int SLOTS, bool USUAL>
    __device__ __forceinline__ walk start(slot_place (&strips)[SLOTS],
                                          const ring_place &place) const {
        walk at(cta, place);

        if (cta.parted)
            pass_others<SLOTS, USUAL>(at, strips, cta.group);
        return at;
    }
    /* To its next one, or behind the last. */
    template <int SLOTS, bool USUAL>
    __device__ __forceinline__ void next(walk &at, slot_place (&strips)[SLOTS]) const {
        pass<SLOTS, USUAL>(at, strips);
        if (cta.parted)
            pass_others<SLOTS, USUAL>(at, strips, S::GROUPS - 1);
    }

    /* A strip's sums before its first tile. */
    __device__ __forceinline__ void clear(strip_sums &sums) const {
#pragma unroll
        for (int j = 0; j < S::SUMS; j++)
            sums[j] = 0;
    }

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
    template <int SLOTS, int TILES, int SEGMENTS, bool ZEROS, bool USUAL>
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

                    scale[t][s] = at[s].template load_scales<USUAL>(stage, step);
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
                               at[s].template unpack<USUAL>(scale[t][s]));
        }
    }

    /* One tile of a strip by wgmma, a segment after the other. */
    template <int SEGMENTS, bool ZEROS, bool USUAL>
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
            add_scaled(
                sums, part,
                at.template unpack<USUAL>(at.template load_scales<USUAL>(stage, first_step)));
        }
    }

    /* The tiles of a stage. */
    template <int SLOTS, int SEGMENTS, bool ZEROS, bool USUAL>
    __device__ __forceinline__ void sum_stage(strip_sums (&sums)[S::SLOTS],
                                              const slot_place (&at)[SLOTS], uint32_t stage,
                                              int tiles) const {
        /* tiles at a time: by the registers there are, and as measured */
        constexpr bool PAIRS = S::BITS != 8;
        constexpr int TOGETHER = PAIRS && SEGMENTS == 1 ? 2 : 1;
        int of = 0;

        if constexpr (!S::DIRECT) {
            for (; of < tiles; of++)
#pragma unroll
                for (int s = 0; s < SLOTS; s++)
                    sum_tile<SEGMENTS, ZEROS, USUAL>(sums[s], at[s], stage, of, x);
        } else {
            for (; of + TOGETHER <= tiles; of += TOGETHER)
                sum_tiles_directly<SLOTS, TOGETHER, SEGMENTS, ZEROS, USUAL>(sums, at, stage, of, x);
            if (of < tiles)
                sum_tiles_directly<SLOTS, 1, SEGMENTS, ZEROS, USUAL>(sums, at, stage, of, x);
        }
    }

    /* All tiles of a block. */
    template <int SLOTS, int SEGMENTS, bool ZEROS, bool USUAL>
    __device__ __forceinline__ void sum_tiles(strip_sums (&sums)[S::SLOTS], slot_place (&at)[SLOTS],
                                              ring_place &place) const {
        walk w = start<SLOTS, USUAL>(at, place);

        while (w.tile < cta.end) {
            const uint32_t stage = w.place.stage * cta.stage_bytes;

            mbarrier_wait(cta.full_of(w.place), w.place.parity);
            sum_stage<SLOTS, SEGMENTS, ZEROS, USUAL>(sums, at, stage,
                                                     min(cta.tiles, cta.end - w.tile));
            release(cta.empty_of(w.place));
            next<SLOTS, USUAL>(w, at);
        }
        place = w.place;
    }

    using tile_weights = uint32_t[FQ_CUDA_STEPS][4]; /* of a thread: the fragments of a tile */

    /* A tile's codes and zero points, as they come from a stage. */
    template <bool ZEROS> struct loaded_tile {
        lane_codes<S::BITS> codes;
        zero_terms<S::BITS, T> zero;

        __device__ __forceinline__ loaded_tile(const slot_place &from, uint32_t stage, int tile)
            : codes(from.load_codes(stage, tile)),
              zero(from.template load_zeros<ZEROS>(stage, tile * FQ_CUDA_STEPS)) {
        }
        __device__ __forceinline__ void dequantize(tile_weights &to) const {
#pragma unroll
            for (int step = 0; step < FQ_CUDA_STEPS; step++)
                fragment<S::BITS, T, !ZEROS>(to[step], codes, step, zero);
        }
    };

    /* Queues a tile's products. */
    __device__ __forceinline__ void multiply(strip_sums &part, tile_weights &a,
                                             uint32_t x_place) const {
#pragma unroll
        for (int step = 0; step < FQ_CUDA_STEPS; step++)
            settle(a[step]);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < FQ_CUDA_STEPS; step++)
            wgmma<S::N>::template mma<T>(part, a[step],
                                         wgmma_descriptor(x_place + step * WGMMA_STEP), step > 0);
        wgmma_commit();
    }

    /*
     * The same by wgmma, where a tile has one scale a row: two tiles, of each strip, a round. While
     * the tensor cores are at a tile, the products of the one before are added, and the next one is
     * dequantized.
     */
    template <int SLOTS, bool ZEROS, bool USUAL>
    __device__ __forceinline__ void sum_tiles_ahead(strip_sums (&sums)[S::SLOTS],
                                                    slot_place (&at)[SLOTS],
                                                    ring_place &place) const {
        constexpr int ITEMS = 2 * SLOTS; /* tiles of strips, in a round */
        walk w = start<SLOTS, USUAL>(at, place);
        uint32_t stage = w.place.stage * cta.stage_bytes;
        int of = 0, tiles = min(cta.tiles, cta.end - w.tile); /* of the stage */
        tile_weights a[2];

        if (tiles > 0)
            mbarrier_wait(cta.full_of(w.place), w.place.parity);
        if (tiles > 1)
            loaded_tile<ZEROS>(at[0], stage, 0).dequantize(a[0]);
        while (of + 2 <= tiles) {
            const uint32_t x_here = uniform(x + stage / 16 + of * (S::X_TILE / 16));
            const uint32_t here = cta.empty_of(w.place);
            const bool ends = of + 2 == tiles; /* the stage */
            strip_sums parts[ITEMS];           /* of which two are alive at a time */
            uint32_t scale[ITEMS];

#pragma unroll
            for (int i = 0; i < ITEMS; i++) {
                const bool last = i == ITEMS - 1;

                scale[i] = at[i % SLOTS].template load_scales<USUAL>(stage, (of + i / SLOTS) *
                                                                                FQ_CUDA_STEPS);
                if (last) {
                    of += 2;
                    if (ends) {
                        next<SLOTS, USUAL>(w, at);
                        stage = w.place.stage * cta.stage_bytes;
                        of = 0;
                        tiles = min(cta.tiles, cta.end - w.tile);
                        if (tiles > 0)
                            mbarrier_wait(cta.full_of(w.place), w.place.parity);
                    }
                }
                /* behind the last tile of no use, and of no harm */
                const loaded_tile<ZEROS> following(at[last ? 0 : (i + 1) % SLOTS], stage,
                                                   of + (last ? 0 : (i + 1) / SLOTS));
                multiply(parts[i], a[i % 2], x_here + i / SLOTS * (S::X_TILE / 16));
                if (i > 0) {
                    wgmma_wait<1>();
                    settle(parts[i - 1]);
                    add_scaled(sums[(i - 1) % SLOTS], parts[i - 1],
                               at[(i - 1) % SLOTS].template unpack<USUAL>(scale[i - 1]));
                }
                if (!last || not_known(tiles + 2))
                    following.dequantize(a[1 - i % 2]);
                if (last) {
                    wgmma_wait<0>();
                    if (ends)
                        release(here);
                    settle(parts[i]);
                    add_scaled(sums[i % SLOTS], parts[i],
                               at[i % SLOTS].template unpack<USUAL>(scale[i]));
                }
            }
        }
        if (of < tiles) {
#pragma unroll
            for (int s = 0; s < SLOTS; s++)
                sum_tile<1, ZEROS, USUAL>(sums[s], at[s], stage, of, x);
            release(cta.empty_of(w.place));
            w.pass(cta);
        }
        place = w.place;
    }

    template <int SLOTS, bool ZEROS, bool USUAL>
    __device__ __forceinline__ void sum_whole_tiles(strip_sums (&sums)[S::SLOTS],
                                                    slot_place (&at)[SLOTS],
                                                    ring_place &place) const {
        /* with a scale a tile and two slots, there always is room */
        static_assert(S::SLOTS == 1 || S::stages_of(S::stage_bytes(FQ_CUDA_PARTED_TILES, 2,
                                                                   FQ_CUDA_PARTED_TILES, true),
                                                    S::fixed_bytes(2, false)) > S::GROUPS);

        if (S::DIRECT || (S::SLOTS == 1 && !cta.roomy))
            sum_tiles<SLOTS, 1, ZEROS, USUAL>(sums, at, place);
        else if constexpr (!S::DIRECT)
            sum_tiles_ahead<SLOTS, ZEROS, USUAL>(sums, at, place);
    }

    template <int SLOTS, bool ZEROS>
    __device__ __forceinline__ void sum_block(strip_sums (&sums)[S::SLOTS], slot_place (&at)[SLOTS],
                                              bool usual, ring_place &place) const {
        if (cta.segments_log2 == 0 && usual)
            sum_whole_tiles<SLOTS, ZEROS, true>(sums, at, place);
        else if (cta.segments_log2 == 0)
            sum_whole_tiles<SLOTS, ZEROS, false>(sums, at, place);
        else if (cta.segments_log2 == 1)
            sum_tiles<SLOTS, 2, ZEROS, false>(sums, at, place);
        else
            sum_tiles<SLOTS, 4, ZEROS, false>(sums, at, place);
    }

    /* A warpgroup without a strip only lets the stages go. */
    __device__ __forceinline__ void skip_block(ring_place &place) const {
        for (int tile = cta.begin; tile < cta.end; tile += cta.tiles, place.next()) {
            mbarrier_wait(cta.full_of(place), place.parity);
            release(cta.empty_of(place));
        }
    }

    /* By a warp that is done with a stage. */
    __device__ __forceinline__ void release(uint32_t barrier) const {
        __syncwarp();
        if (arrives)
            mbarrier_arrive(barrier);
    }

    /* v, which all lanes have alike, in a register that the compiler knows for that. */
    static __device__ __forceinline__ uint32_t uniform(uint32_t v) {
        return __reduce_or_sync(~0u, v);
    }

    /* True, but the compiler cannot tell: what depends on it is not put off past the next wait,
     * where it would no longer run beside the tensor cores. */
    static __device__ __forceinline__ bool not_known(int positive) {
        asm volatile("" : "+r"(positive));
        return positive >= 0;
    }

    static __device__ __forceinline__ bool is_usual(const fq_cuda_matrix &w) {
        return w.group_steps == FQ_CUDA_STEPS && w.scale_bf16 == !T::is_f16;
    }

  public:
    __device__ __forceinline__ explicit decode_summer(const decode_cta<S> &of)
        : cta(of), x(S::DIRECT ? of.ring + of.lane % 8 * S::X_PITCH + of.lane / 8 * 16
                               : wgmma_tile(of.ring)),
          arrives(of.lane < FQ_CUDA_WARP_ARRIVALS) {
        asm volatile("" : "+r"(arrives)); /* to be kept: where it comes from takes long */
    }

    /* This thread's sums of the strips that it has of a block, and nothing else of `sums`; place:
     * where the block begins in the ring, and afterwards the next one. */
    __device__ __forceinline__ void sum(strip_sums (&sums)[S::SLOTS], const block_place &block,
                                        ring_place &place) const {
        const int group = cta.parted ? 0 : cta.group;
        const fq_cuda_matrix *w[2];
        int strip;
        const bool one = cta.find_strip(block, group, w[0], strip) && group < block.first;
        const bool two =
            S::SLOTS > 1 && cta.find_strip(block, group + block.first, w[1], strip) && one;

        /* each case with places of its own: what one has no registers for, the other may have */
        if (!one) {
            skip_block(place);
            return;
        }
        if constexpr (S::SLOTS > 1)
            if (two) {
                slot_place at[2] = {{cta, block, 0, *w[0]}, {cta, block, 1, *w[1]}};
                const bool usual = is_usual(*w[0]) && is_usual(*w[1]);

                clear(sums[0]);
                clear(sums[1]);
                if (w[0]->zeros || w[1]->zeros)
                    sum_block<2, true>(sums, at, usual, place);
                else
                    sum_block<2, false>(sums, at, usual, place);
                return;
            }
        slot_place at[1] = {{cta, block, 0, *w[0]}};

        clear(sums[0]);
        if (w[0]->zeros)
            sum_block<1, true>(sums, at, is_usual(*w[0]), place);
        else
            sum_block<1, false>(sums, at, is_usual(*w[0]), place);
    }
};

#endif /* FQ_HOPPER_CODE */

#endif
