/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The consumers of hopper-decode.cuh: from the stages of the ring to a CTA's sums of its strips,
 * over its half of K.  Sums of groups are scaled here; where weights are, hopper-decode-weights.cuh
 * takes over.
 */
#ifndef FQ_KERNELS_CUDA_HOPPER_DECODE_SUM_CUH
#define FQ_KERNELS_CUDA_HOPPER_DECODE_SUM_CUH

#include "hopper-decode-weights.cuh"

#ifdef FQ_HOPPER_CODE

template <class S, class T, zero_points ZEROS, loops LOOPS>
class decode_summer : decode_weights_summer<S, T, ZEROS> {
    using base = decode_weights_summer<S, T, ZEROS>;
    using codes_of = dequantizer<S::BITS, T, decode_reading(S::BITS, S::N)>;
    using zero_terms = typename codes_of::zero_terms;
    using block_place = typename decode_cta<S>::block_place;
    using strip_sums = typename decode_cta<S>::strip_sums;
    using slot_place = typename base::slot_place;
    using tile_weights = typename base::tile_weights;
    using walk = typename base::walk;
    template <int SEGMENTS, scaling KIND>
    using loaded_tile = typename base::template loaded_tile<SEGMENTS, KIND>;
    using base::clear;
    using base::cta;
    using base::end_third;
    using base::end_thirds;
    using base::release;
    using base::skip;
    using base::uniform;
    using base::x_place;
    /* int3 of up to 8 rows takes as long as its instructions do, and has registers to spare. */
    static constexpr bool ISSUE_BOUND = LOOPS == loops::usual && S::BITS == 3 && S::N == 8;

    __device__ __forceinline__ void add_scaled(strip_sums &sums, const strip_sums &part,
                                               float2 scale) const {
#pragma unroll
        for (int j = 0; j < S::SUMS; j++)
            sums[j] = fmaf(part[j], j & 2 ? scale.y : scale.x, sums[j]);
    }

    /* Behind the last tile. */
    static __device__ __forceinline__ void finish(strip_sums &sums) {
        if constexpr (fragment_factor<S::BITS, T> != 1)
            base::multiply_sums(sums, fragment_factor<S::BITS, T>);
    }
    /* Behind a third's that another one follows. */
    __device__ __forceinline__ void finish_third(strip_sums &all, strip_sums &sums,
                                                 int &thirds) const {
        finish(sums);
        end_third(all, sums, thirds);
    }

    /*
     * TILES tiles, from `of` and `more` on, of SLOTS strips by mma.sync: for few rows of X, half of
     * what the narrowest wgmma costs.  Products of different tiles and strips do not wait for each
     * other, unless the tiles are summed together.  more: even, and known when compiled.
     */
    template <int SLOTS, int TILES, int SEGMENTS, scaling KIND>
    __device__ __forceinline__ void
    sum_tiles_directly(strip_sums (&sums)[S::SLOTS], const slot_place (&at)[SLOTS], uint32_t stage,
                       int of, int more, uint32_t x_first) const {
        constexpr int STEPS = FQ_CUDA_STEPS / SEGMENTS; /* of a segment */
        /* tiles that are summed one after the other, and side by side */
        constexpr int ROUNDS = KIND == scaling::wide ? TILES : 1, ABREAST = TILES / ROUNDS;
        float part[ABREAST][SLOTS][S::N / 8][4];

        x_first += stage + of / 2 * S::X_PAIR + of % 2 * 128 + more / 2 * S::X_PAIR;
#pragma unroll
        for (int round = 0; round < ROUNDS; round++) {
            lane_codes<S::BITS> codes[ABREAST][SLOTS];
            uint32_t x[ABREAST][S::N / 8][4]; /* two steps */

#pragma unroll
            for (int t = 0; t < ABREAST; t++)
#pragma unroll
                for (int s = 0; s < SLOTS; s++)
                    codes[t][s] = at[s].load_codes(stage + of * S::TILE, more + round + t);
#pragma unroll
            for (int segment = 0; segment < SEGMENTS; segment++) {
                zero_terms zero[ABREAST][SLOTS];
                uint32_t scale[ABREAST][SLOTS];

#pragma unroll
                for (int t = 0; t < ABREAST; t++)
#pragma unroll
                    for (int s = 0; s < SLOTS; s++) {
                        const int slot =
                            at[s].template slot_of<SEGMENTS, KIND>(of + more + t, segment);

                        scale[t][s] = at[s].load_scales(stage, slot);
                        zero[t][s] = at[s].load_zeros(stage, slot);
                    }
#pragma unroll
                for (int i = 0; i < STEPS; i++) {
                    const int step = segment * STEPS + i;

#pragma unroll
                    for (int t = 0; t < ABREAST; t++)
#pragma unroll
                        for (int j = 0; j < S::N / 8; j++)
                            if (step % 2 == 0)
                                ldmatrix_x4(x[t][j], x_first + j * 8 * S::X_PITCH +
                                                         (round + t) * 128 + step * 32);
#pragma unroll
                    for (int t = 0; t < ABREAST; t++)
#pragma unroll
                        for (int s = 0; s < SLOTS; s++) {
                            uint32_t a[4];

                            codes_of::fragment(a, codes[t][s], step, zero[t][s]);
#pragma unroll
                            for (int j = 0; j < S::N / 8; j++) {
                                const uint32_t *two = x[t][j] + step % 2 * 2;

                                if (round == 0 && i == 0)
                                    T::mma_first(part[t][s][j], a, two[0], two[1]);
                                else
                                    T::mma(part[t][s][j], a, two[0], two[1]);
                            }
                        }
                }
                if (round < ROUNDS - 1)
                    continue;
#pragma unroll
                for (int t = 0; t < ABREAST; t++)
#pragma unroll
                    for (int s = 0; s < SLOTS; s++)
                        add_scaled(sums[s], reinterpret_cast<strip_sums &>(part[t][s]),
                                   at[s].template unpack<KIND>(scale[t][s]));
            }
        }
    }

    /* TILES tiles of a strip by wgmma, each waited for; of several the sums are scaled together. */
    template <int TILES, int SEGMENTS, scaling KIND>
    __device__ __forceinline__ void sum_tiles_singly(strip_sums &sums, const slot_place &at,
                                                     uint32_t stage, int of,
                                                     uint32_t x_first) const {
        strip_sums parts[SEGMENTS > 1 ? 2 : 1]; /* a segment's, and those of the one before it */

        static_assert(TILES == 1 || KIND == scaling::wide);
        x_first += stage / 16 + of * (S::X_TILE / 16);
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            tile_weights a;
            uint32_t scale[SEGMENTS] = {};
            const auto add = [&](int segment) {
                settle(parts[segment % 2]);
                if (t == TILES - 1)
                    add_scaled(sums, parts[segment % 2], at.template unpack<KIND>(scale[segment]));
            };

            base::template load_scales<SEGMENTS, KIND>(scale, at, stage, of + t);
            loaded_tile<SEGMENTS, KIND>(at, stage, of + t).dequantize(a);
#pragma unroll
            for (int segment = 0; segment < SEGMENTS; segment++) {
                this->template multiply<SEGMENTS>(parts[segment % 2], a, segment,
                                                  x_first + t * (S::X_TILE / 16), t > 0);
                if (segment > 0) {
                    wgmma_wait<1>();
                    add(segment - 1);
                }
            }
            wgmma_wait<0>();
            add(SEGMENTS - 1);
        }
    }

    /* The tiles of a stage. */
    template <int SLOTS, int SEGMENTS, scaling KIND>
    __device__ __forceinline__ void sum_stage(strip_sums (&sums)[S::SLOTS],
                                              const slot_place (&at)[SLOTS], uint32_t stage,
                                              int tiles, uint32_t x) const {
        /* Tiles at a time: as they are summed, and by the registers there are.  One more that is
         * pushed out to memory, on however rare a path, costs every launch of up to 16 rows time,
         * at M=1 some 0.8 us (NOTES.md). */
        constexpr bool PAIRS =
            S::DIRECT && S::BITS != 8 && SEGMENTS == 1 && (SLOTS == 1 || KIND != scaling::any);
        constexpr int TOGETHER = KIND == scaling::wide || PAIRS ? 2 : 1;
        int of = 0;

        /* The tiles of a stage that has MOST_TILES one behind the other: addresses and constants
         * are found once.  (With `if` and `return` for this loop: 12288 x 12288 2% faster, 14336 x
         * 4096 4% slower.) */
        if constexpr (ISSUE_BOUND && SLOTS == 1)
            for (; of + S::MOST_TILES <= tiles; of += S::MOST_TILES)
#pragma unroll
                for (int more = 0; more < S::MOST_TILES; more += TOGETHER)
                    sum_tiles_directly<SLOTS, TOGETHER, SEGMENTS, KIND>(sums, at, stage, of, more,
                                                                        x);
        for (; of + TOGETHER <= tiles; of += TOGETHER)
            sum_together<SLOTS, TOGETHER, SEGMENTS, KIND>(sums, at, stage, of, x);
        if (of < tiles)
            sum_together<SLOTS, 1, SEGMENTS, KIND>(sums, at, stage, of, x);
    }
    template <int SLOTS, int TILES, int SEGMENTS, scaling KIND>
    __device__ __forceinline__ void sum_together(strip_sums (&sums)[S::SLOTS],
                                                 const slot_place (&at)[SLOTS], uint32_t stage,
                                                 int of, uint32_t x) const {
        if constexpr (S::DIRECT) {
            sum_tiles_directly<SLOTS, TILES, SEGMENTS, KIND>(sums, at, stage, of, 0, x);
        } else {
#pragma unroll
            for (int s = 0; s < SLOTS; s++)
                sum_tiles_singly<TILES, SEGMENTS, KIND>(sums[s], at[s], stage, of, x);
        }
    }

    /* The tiles of a walk. */
    template <int SLOTS, int SEGMENTS, scaling KIND>
    __device__ __forceinline__ void sum_tiles(strip_sums (&sums)[S::SLOTS], slot_place (&at)[SLOTS],
                                              walk &w) const {
        strip_sums all; /* the thirds before, if it is third by third, which are so many */
        int thirds = 0;
        /* Whether the next stage is there is asked when one begins: asked only at the wait, the
         * answer itself holds the warp up.  int3 of up to 8 rows is 2% slower with it. */
        constexpr bool ASKS = S::DIRECT && !(S::BITS == 3 && S::N == 8);
        bool there = false;
        uint32_t x = x_place();

        if (ISSUE_BOUND)
            kept(x);

        while (w.goes_on()) {
            const uint32_t stage = w.place.stage * cta.stage_bytes;

            if (!there)
                mbarrier_wait(cta.full_of(w.place), w.place.parity);
            if (ASKS) {
                ring_place following = w.place;

                following.next(cta.stages_apart());
                there = mbarrier_is_over(cta.full_of(following), following.parity);
            }
            sum_stage<SLOTS, SEGMENTS, KIND>(sums, at, stage, w.tiles(cta),
                                             ISSUE_BOUND ? x : x_place());
            release(cta.empty_of(w.place));
            if (this->template next<SLOTS, KIND>(w, at))
                finish_third(all, sums[0], thirds);
        }
#pragma unroll
        for (int s = 0; s < SLOTS; s++)
            finish(sums[s]);
        if (S::IN_ORDER)
            end_thirds(all, sums[0], thirds);
    }

    /*
     * The same by wgmma, two tiles, of each strip, a round.  While the tensor cores are at a
     * segment, the products of the one before are added, and the next tile is dequantized.
     */
    template <int SLOTS, int SEGMENTS, scaling KIND>
    __device__ __forceinline__ void sum_tiles_ahead(strip_sums (&sums)[S::SLOTS],
                                                    slot_place (&at)[SLOTS], walk &w) const {
        constexpr int ITEMS = 2 * SLOTS; /* tiles of strips, in a round */
        constexpr bool WIDE = KIND == scaling::wide;
        using loaded = loaded_tile<SEGMENTS, KIND>;
        uint32_t stage = w.place.stage * cta.stage_bytes;
        int of = 0, tiles = w.tiles(cta); /* of the stage */
        const uint32_t x = x_place();
        tile_weights a[2];
        strip_sums all; /* as in sum_tiles() */
        int thirds = 0;
        bool ends_third = false;

        if (tiles > 0)
            mbarrier_wait(cta.full_of(w.place), w.place.parity);
        if (tiles > 1)
            loaded(at[0], stage, 0).dequantize(a[0]);
        while (of + 2 <= tiles) {
            const uint32_t x_here = uniform(x + stage / 16 + of * (S::X_TILE / 16));
            const uint32_t empty = cta.empty_of(w.place);
            const bool ends = of + 2 == tiles;  /* the stage */
            strip_sums parts[WIDE ? SLOTS : 2]; /* two, or SLOTS, alive at a time */
            uint32_t scale[ITEMS][SEGMENTS] = {};
            /* Adds the n-th segment's products, which are there. */
            const auto add = [&](int n) {
                const int item = n / SEGMENTS, slot = item % SLOTS;
                strip_sums &part = parts[WIDE ? slot : n % 2];

                if (WIDE && item < SLOTS) /* to be added to */
                    return;
                settle(part);
                add_scaled(sums[slot], part,
                           at[slot].template unpack<KIND>(scale[WIDE ? slot : item][n % SEGMENTS]));
            };

            if (ends_third)
                finish_third(all, sums[0], thirds);
            ends_third = false;
#pragma unroll
            for (int i = 0; i < ITEMS; i++) {
                const bool last = i == ITEMS - 1;

                if (!WIDE || i < SLOTS)
                    base::template load_scales<SEGMENTS, KIND>(scale[i], at[i % SLOTS], stage,
                                                               of + i / SLOTS);
                if (last) {
                    of += 2;
                    if (ends) {
                        ends_third = this->template next<SLOTS, KIND>(w, at);
                        of = 0;
                        tiles = w.tiles(cta);
                        if (tiles > 0) {
                            stage = w.place.stage * cta.stage_bytes;
                            mbarrier_wait(cta.full_of(w.place), w.place.parity);
                        }
                    }
                }
                /* behind the last tile the stage's first again: of no use, and of no harm */
                const loaded following(at[last ? 0 : (i + 1) % SLOTS], stage,
                                       of + (last ? 0 : (i + 1) / SLOTS));
#pragma unroll
                for (int segment = 0; segment < SEGMENTS; segment++) {
                    const int n = i * SEGMENTS + segment;

                    this->template multiply<SEGMENTS>(
                        parts[WIDE ? i % SLOTS : n % 2], a[i % 2], segment,
                        x_here + i / SLOTS * (S::X_TILE / 16), WIDE && i >= SLOTS);
                    if (n > 0) {
                        wgmma_wait<1>();
                        add(n - 1);
                    }
                }
                if (!last || not_known((int)stage))
                    following.dequantize(a[1 - i % 2]);
                if (last) {
                    wgmma_wait<0>();
                    if (ends)
                        release(empty);
                    add(ITEMS * SEGMENTS - 1);
                }
            }
        }
        if (ends_third) /* and one tile follows */
            finish_third(all, sums[0], thirds);
        if (of < tiles) { /* the last one */
            sum_together<SLOTS, 1, SEGMENTS, KIND>(sums, at, stage, of, x);
            release(cta.empty_of(w.place));
            w.next(cta);
        }
#pragma unroll
        for (int s = 0; s < SLOTS; s++)
            finish(sums[s]);
        if (S::IN_ORDER)
            end_thirds(all, sums[0], thirds);
        skip(w);
    }

    template <int SLOTS, int SEGMENTS, scaling KIND>
    __device__ __forceinline__ void sum_block(strip_sums (&sums)[S::SLOTS], slot_place (&at)[SLOTS],
                                              walk &w) const {
        /* Of several segments only where there are registers for it, and one strip: the compiler
         * takes long. */
        constexpr bool AHEAD =
            !S::DIRECT && (SEGMENTS == 1 || (SLOTS == 1 && (S::N < 64 || S::BITS != 8)));

        if constexpr (AHEAD)
            sum_tiles_ahead<SLOTS, SEGMENTS, KIND>(sums, at, w);
        else
            sum_tiles<SLOTS, SEGMENTS, KIND>(sums, at, w);
    }

    template <int SLOTS>
    __device__ __forceinline__ void sum_block(strip_sums (&sums)[S::SLOTS], slot_place (&at)[SLOTS],
                                              walk &w) const {
        const int segments_log2 = cta.launch.segments_log2;
        const scaling kind = static_cast<scaling>(cta.launch.scaling);

        if constexpr (LOOPS == loops::weights) {
            this->sum_weights(sums, at, w);
        } else if constexpr (LOOPS == loops::usual) {
            if (kind == scaling::exact)
                sum_block<SLOTS, 1, scaling::exact>(sums, at, w);
            else
                sum_block<SLOTS, 1, scaling::wide>(sums, at, w);
        } else if (segments_log2 == 0) {
            sum_block<SLOTS, 1, scaling::any>(sums, at, w);
        } else if (ZEROS == zero_points::some || kind != scaling::exact) {
            sum_tiles<SLOTS, 4, scaling::any>(sums, at, w);
        } else if constexpr (ZEROS != zero_points::some) { /* groups of 32 */
            sum_block<SLOTS, 2, scaling::exact>(sums, at, w);
        }
    }

    /* True, but the compiler cannot tell: what depends on it is not put off past the next wait,
     * where it would no longer run beside the tensor cores. */
    static __device__ __forceinline__ bool not_known(int positive) {
        asm volatile("" : "+r"(positive));
        return positive >= 0;
    }

  public:
    __device__ __forceinline__ explicit decode_summer(const decode_cta<S> &of) : base(of) {
    }

    /* This thread's sums of the strips that it has of a block, and nothing else of `sums`; place:
     * where the block begins in the ring, and afterwards the next one. */
    __device__ __forceinline__ void sum(strip_sums (&sums)[S::SLOTS], const block_place &block,
                                        ring_place &place) const {
        const int first = cta.parted() ? 0 : cta.group;
        const int second = cta.parted() ? 1 : cta.group + block.first;
        const fq_cuda_matrix *of[2];
        int strip;
        const bool one = cta.find_strip(block, first, of[0], strip) && first < block.first;
        const bool two = S::SLOTS > 1 && cta.find_strip(block, second, of[1], strip) && one;

        /* each case with places of its own: what one has no registers for, the other may have */
        if (!one) {
            walk w(cta, place);

            skip(w);
            place = w.place;
            return;
        }
        if constexpr (S::SLOTS > 1)
            if (two) {
                slot_place at[2] = {{cta, block, 0, *of[0]}, {cta, block, 1, *of[1]}};
                walk w(cta, place);

                clear(sums[0]);
                clear(sums[1]);
                sum_block<2>(sums, at, w);
                place = w.place;
                return;
            }
        slot_place at[1] = {{cta, block, 0, *of[0]}};
        walk w(cta, place);

        clear(sums[0]);
        sum_block<1>(sums, at, w);
        place = w.place;
    }
};

#endif /* FQ_HOPPER_CODE */

#endif
