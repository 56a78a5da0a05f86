/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The consumers of hopper-decode.cuh: from the stages of the ring to a CTA's sums of its strips,
 * over its half of K.
 */
#ifndef FQ_KERNELS_CUDA_HOPPER_DECODE_SUM_CUH
#define FQ_KERNELS_CUDA_HOPPER_DECODE_SUM_CUH

#include "hopper-decode-cta.cuh"

#ifdef FQ_HOPPER_CODE

template <class S, class T, zero_points ZEROS, loops LOOPS> class decode_summer {
    using codes_of = dequantizer<S::BITS, T, decode_reading(S::BITS, S::N)>;
    using zero_terms = typename codes_of::zero_terms;
    static constexpr bool SYMMETRIC = ZEROS == zero_points::none;
    /* int3 of up to 8 rows takes as long as its instructions do, and has registers to spare. */
    static constexpr bool ISSUE_BOUND = LOOPS == loops::usual && S::BITS == 3 && S::N == 8;
    using block_place = typename decode_cta<S>::block_place;
    using strip_sums = typename decode_cta<S>::strip_sums;
    const decode_cta<S> &cta;
    int arrives; /* 1: this lane counts its warp in at a barrier */

    /* Whether the segments of a tile are groups. */
    template <scaling KIND> static __device__ __forceinline__ constexpr bool has_groups() {
        return KIND == scaling::exact || KIND == scaling::weights;
    }

    /* Where a thread finds the codes and scales of one of its strips: addresses in the first stage;
     * and how to read them. */
    struct slot_place {
        uint32_t codes, scales, zeros;
        bool bf16_scales, has_zeros;
        group_phase groups;
        const fq_cuda_matrix &matrix;

        __device__ __forceinline__ slot_place(const decode_cta<S> &d, const block_place &block,
                                              int slot, const fq_cuda_matrix &w)
            : bf16_scales(w.scale_bf16 != 0),
              has_zeros(ZEROS == zero_points::all || w.zeros != nullptr), groups(w, here(d.begin)),
              matrix(w) {
            const int index = (d.parted() ? slot : d.group + slot * block.first),
                      warp = d.thread / 32 % 4;
            const int pair = warp * 8 + d.lane / 4;

            codes = d.codes_of(index) + warp * FQ_CUDA_QUARTER_BYTES(S::BITS) +
                    lane_offset<S::BITS>(d.lane);
            scales = d.scales_of(index) + pair * 4;
            zeros = d.zeros_of(index) + pair * 2;
            if (!S::DIRECT) { /* up to 16 rows registers are for other things: here() */
                kept(codes);
                kept(scales);
                if (!SYMMETRIC)
                    kept(zeros);
            }
        }

        /* Which of the stage's groups a segment of a tile of it belongs to. */
        template <int SEGMENTS, scaling KIND>
        __device__ __forceinline__ int slot_of(int tile, int segment) const {
            return has_groups<KIND>()
                       ? tile * SEGMENTS + segment
                       : groups.slot(tile * FQ_CUDA_STEPS + segment * (FQ_CUDA_STEPS / SEGMENTS));
        }
        /* Of such a group; the stage starts `stage` bytes behind the first. */
        __device__ __forceinline__ zero_terms load_zeros(uint32_t stage, int slot) const {
            uint32_t pair;

            if (SYMMETRIC)
                return codes_of::middle_zeros();
            /* of a pair one may have none: no branch, which would part the loop */
            pair = lds_16(zeros + stage + slot * FQ_CUDA_ZERO_BYTES);
            return codes_of::unpack_zeros(has_zeros ? pair : 0x101u << (S::BITS - 1));
        }
        __device__ __forceinline__ uint32_t load_scales(uint32_t stage, int slot) const {
            return lds_32(scales + stage + slot * FQ_CUDA_SCALE_BYTES);
        }
        template <scaling KIND> __device__ __forceinline__ float2 unpack(uint32_t loaded) const {
            return unpack_scales(loaded, KIND != scaling::any ? !T::is_f16 : bf16_scales);
        }
        __device__ __forceinline__ lane_codes<S::BITS> load_codes(uint32_t stage, int tile) const {
            return ::load_codes<S::BITS>(codes + stage + tile * FQ_CUDA_TILE_BYTES(S::BITS));
        }
    };

    /* A walk over the stages that this warpgroup has of a block: of a parted one, of its third. */
    struct walk {
        int left; /* tiles, the stage's counted; none or fewer: the stage is empty */
        int stop; /* what is left behind the last stage */
        int rest; /* where thirds are summed in order: tiles of those that follow */
        ring_place place;

        __device__ __forceinline__ walk(const decode_cta<S> &d, const ring_place &from)
            : left(d.end - d.begin), stop(0), rest(0), place(from) {
            if (d.parted()) {
                left = min(left - d.group * d.launch.third, d.launch.third);
                stop = left - d.launch.turns * d.tiles;
            }
            if (S::IN_ORDER)
                begin_third(d, left);
        }
        __device__ __forceinline__ bool goes_on() const {
            return left > stop;
        }
        /* Of the stage. */
        __device__ __forceinline__ int tiles(const decode_cta<S> &d) const {
            return min(d.tiles, left);
        }
        /* True where a third has ended and another one begins. */
        __device__ __forceinline__ bool next(const decode_cta<S> &d) {
            left -= d.tiles;
            place.next(d.stages_apart());
            if (!S::IN_ORDER || left > 0 || rest == 0)
                return false;
            begin_third(d, rest);
            return true;
        }

      private:
        __device__ __forceinline__ void begin_third(const decode_cta<S> &d, int all) {
            left = min(all, d.launch.third);
            rest = all - left;
        }
    };

    /* Past a stage; what is known of the strips goes along. */
    template <int SLOTS, scaling KIND>
    __device__ __forceinline__ bool next(walk &at, slot_place (&strips)[SLOTS]) const {
        const int tiles = S::IN_ORDER ? at.tiles(cta) : cta.tiles;

#pragma unroll
        for (int s = 0; s < SLOTS; s++)
            if (!has_groups<KIND>())
                strips[s].groups.advance(tiles * FQ_CUDA_STEPS);
        return at.next(cta);
    }

    /* A strip's sums before its first tile. */
    __device__ __forceinline__ void clear(strip_sums &sums) const {
#pragma unroll
        for (int j = 0; j < S::SUMS; j++)
            sums[j] = 0;
    }

    /* Behind its last one. */
    __device__ __forceinline__ void finish(strip_sums &sums) const {
        if constexpr (fragment_factor<S::BITS, T> != 1) {
#pragma unroll
            for (int j = 0; j < S::SUMS; j++)
                sums[j] *= fragment_factor<S::BITS, T>;
        }
    }

    /* A third has ended, the n-th from 0 on: its sums are added to `all`. */
    __device__ __forceinline__ void end_third(strip_sums &all, strip_sums &sums, int &n) const {
#pragma unroll
        for (int j = 0; j < S::SUMS; j++) {
            all[j] = n == 0 ? sums[j] : all[j] + sums[j];
            sums[j] = 0;
        }
        n++;
    }
    /* The same of the last one that has tiles: the sums become those of all.  If others have none,
     * their zeros are added, too, for what that makes of -0. */
    __device__ __forceinline__ void end_thirds(const strip_sums &all, strip_sums &sums,
                                               int n) const {
#pragma unroll
        for (int j = 0; j < S::SUMS; j++) {
            sums[j] = n == 0 ? sums[j] : all[j] + sums[j];
            sums[j] = n < FQ_CUDA_THIRDS - 1 ? sums[j] + 0.0f : sums[j];
        }
    }

    __device__ __forceinline__ void add_scaled(strip_sums &sums, const strip_sums &part,
                                               float2 scale) const {
#pragma unroll
        for (int j = 0; j < S::SUMS; j++)
            sums[j] = fmaf(part[j], j & 2 ? scale.y : scale.x, sums[j]);
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

    using tile_weights = uint32_t[FQ_CUDA_STEPS][4]; /* of a thread: the fragments of a tile */

    /* A tile's codes and zero points, as they come from a stage. */
    template <int SEGMENTS, scaling KIND> struct loaded_tile {
        lane_codes<S::BITS> codes;
        zero_terms zero[SEGMENTS];

        __device__ __forceinline__ loaded_tile(const slot_place &from, uint32_t stage, int tile)
            : codes(from.load_codes(stage, tile)) {
#pragma unroll
            for (int segment = 0; segment < SEGMENTS; segment++)
                zero[segment] =
                    from.load_zeros(stage, from.template slot_of<SEGMENTS, KIND>(tile, segment));
        }
        __device__ __forceinline__ void dequantize(tile_weights &to) const {
#pragma unroll
            for (int step = 0; step < FQ_CUDA_STEPS; step++)
                codes_of::fragment(to[step], codes, step, zero[step * SEGMENTS / FQ_CUDA_STEPS]);
        }
    };
    /* And its scales, a group to each step, that weights are multiplied by: times a pair of
     * `factor`. */
    struct loaded_weights {
        loaded_tile<FQ_CUDA_STEPS, scaling::weights> loaded;
        uint32_t scale[FQ_CUDA_STEPS];

        __device__ __forceinline__ loaded_weights(const slot_place &from, uint32_t stage, int tile)
            : loaded(from, stage, tile) {
            load_scales<FQ_CUDA_STEPS, scaling::weights>(scale, from, stage, tile);
        }
        __device__ __forceinline__ void dequantize(tile_weights &to, uint32_t factor) const {
            loaded.dequantize(to);
#pragma unroll
            for (int step = 0; step < FQ_CUDA_STEPS; step++)
                row_scales<T>(T::mul(scale[step], factor)).multiply(to[step]);
        }
    };

    /* The scales of a tile's segments, as they lie in a stage. */
    template <int SEGMENTS, scaling KIND>
    static __device__ __forceinline__ void
    load_scales(uint32_t (&to)[SEGMENTS], const slot_place &from, uint32_t stage, int tile) {
#pragma unroll
        for (int segment = 0; segment < SEGMENTS; segment++)
            to[segment] =
                from.load_scales(stage, from.template slot_of<SEGMENTS, KIND>(tile, segment));
    }

    /* Queues the products of a segment of a tile, the first of them to be added to `part`, or
     * not. */
    template <int SEGMENTS>
    __device__ __forceinline__ void multiply(strip_sums &part, tile_weights &a, int segment,
                                             uint32_t x_first, bool add) const {
        constexpr int STEPS = FQ_CUDA_STEPS / SEGMENTS;

        if (segment == 0)
#pragma unroll
            for (int step = 0; step < FQ_CUDA_STEPS; step++)
                settle(a[step]);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const int step = segment * STEPS + i;

            wgmma<S::N>::template mma<T>(
                part, a[step], wgmma_descriptor(x_first + step * WGMMA_STEP), add || i > 0);
        }
        wgmma_commit();
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

            load_scales<SEGMENTS, KIND>(scale, at, stage, of + t);
            loaded_tile<SEGMENTS, KIND>(at, stage, of + t).dequantize(a);
#pragma unroll
            for (int segment = 0; segment < SEGMENTS; segment++) {
                multiply<SEGMENTS>(parts[segment % 2], a, segment, x_first + t * (S::X_TILE / 16),
                                   t > 0);
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
            if (next<SLOTS, KIND>(w, at))
                end_third(all, sums[0], thirds);
        }
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
                end_third(all, sums[0], thirds);
            ends_third = false;
#pragma unroll
            for (int i = 0; i < ITEMS; i++) {
                const bool last = i == ITEMS - 1;

                if (!WIDE || i < SLOTS)
                    load_scales<SEGMENTS, KIND>(scale[i], at[i % SLOTS], stage, of + i / SLOTS);
                if (last) {
                    of += 2;
                    if (ends) {
                        ends_third = next<SLOTS, KIND>(w, at);
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

                    multiply<SEGMENTS>(parts[WIDE ? i % SLOTS : n % 2], a[i % 2], segment,
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
            end_third(all, sums[0], thirds);
        if (of < tiles) { /* the last one */
            sum_together<SLOTS, 1, SEGMENTS, KIND>(sums, at, stage, of, x);
            release(cta.empty_of(w.place));
            w.next(cta);
        }
        if (S::IN_ORDER)
            end_thirds(all, sums[0], thirds);
        skip(w);
    }

    /* One tile of each strip, whose weights are scaled: a sum is one chain of products. */
    template <int SLOTS>
    __device__ __forceinline__ void
    sum_tile_of_weights(strip_sums (&sums)[S::SLOTS], const slot_place (&at)[SLOTS],
                        const uint32_t (&factors)[SLOTS], uint32_t stage, int of,
                        uint32_t x_first) const {
        tile_weights a[SLOTS];

        x_first += stage + of / 2 * S::X_PAIR + of % 2 * 128;
#pragma unroll
        for (int s = 0; s < SLOTS; s++)
            loaded_weights(at[s], stage, of).dequantize(a[s], factors[s]);
#pragma unroll
        for (int step = 0; step < FQ_CUDA_STEPS; step += 2)
#pragma unroll
            for (int j = 0; j < S::N / 8; j++) {
                uint32_t x[4]; /* two steps */

                ldmatrix_x4(x, x_first + j * 8 * S::X_PITCH + step * 32);
#pragma unroll
                for (int s = 0; s < SLOTS; s++) {
                    float(&sum)[4] = reinterpret_cast<float(&)[4]>(sums[s][j * 4]);

                    T::mma(sum, a[s][step], x[0], x[1]);
                    T::mma(sum, a[s][step + 1], x[2], x[3]);
                }
            }
    }

    /* The tiles of a walk, weights scaled, by mma.sync.  Whether the next stage is there is asked
     * when one begins: see sum_tiles(). */
    template <int SLOTS>
    __device__ __forceinline__ void
    sum_weights_directly(strip_sums (&sums)[S::SLOTS], slot_place (&at)[SLOTS],
                         const uint32_t (&factors)[SLOTS], walk &w) const {
        bool there = false;

        while (w.goes_on()) {
            const uint32_t stage = w.place.stage * cta.stage_bytes, x = x_place();
            const int tiles = w.tiles(cta);
            ring_place following = w.place;
            int of = 0;

            if (!there)
                mbarrier_wait(cta.full_of(w.place), w.place.parity);
            following.next(cta.stages_apart());
            there = mbarrier_is_over(cta.full_of(following), following.parity);
            for (; of + 2 <= tiles; of += 2)
#pragma unroll
                for (int more = 0; more < 2; more++)
                    sum_tile_of_weights(sums, at, factors, stage, of + more, x);
            if (of < tiles)
                sum_tile_of_weights(sums, at, factors, stage, of, x);
            release(cta.empty_of(w.place));
            w.next(cta);
        }
    }

    /* The same by wgmma.  While the tensor cores are at one tile of a strip, the next one is
     * dequantized. */
    template <int SLOTS>
    __device__ __forceinline__ void
    sum_weights_ahead(strip_sums (&sums)[S::SLOTS], slot_place (&at)[SLOTS],
                      const uint32_t (&factors)[SLOTS], walk &w) const {
        constexpr int ITEMS = 2; /* of a round: two tiles, or one of two strips */
        const uint32_t x = x_place();
        uint32_t stage = w.place.stage * cta.stage_bytes;
        int of = 0, tiles = w.tiles(cta); /* of the stage; none: of the walk */
        tile_weights a[ITEMS];
        strip_sums all; /* as in sum_tiles() */
        int thirds = 0;

        if (tiles > 0) {
            mbarrier_wait(cta.full_of(w.place), w.place.parity);
            loaded_weights(at[0], stage, 0).dequantize(a[0], factors[0]);
        }
        while (tiles > 0) {
#pragma unroll
            for (int i = 0; i < ITEMS; i++) {
                const int slot = i % SLOTS, following = (i + 1) % SLOTS;
                const uint32_t x_here = uniform(x + stage / 16 + of * (S::X_TILE / 16));
                const uint32_t empty = cta.empty_of(w.place);
                bool ends_stage = false, ends_third = false;

                if (SLOTS == 1 && i > 0 && tiles <= 0)
                    break;
                if (following == 0) { /* another tile */
                    ends_stage = ++of == tiles;
                    if (ends_stage) {
                        ends_third = next<SLOTS, scaling::weights>(w, at);
                        of = 0;
                        tiles = w.tiles(cta);
                    }
                }
                multiply<1>(sums[slot], a[i], 0, x_here, true);
                if (ends_stage && tiles > 0) {
                    stage = w.place.stage * cta.stage_bytes;
                    mbarrier_wait(cta.full_of(w.place), w.place.parity);
                }
                if (tiles > 0)
                    loaded_weights(at[following], stage, of)
                        .dequantize(a[1 - i], factors[following]);
                wgmma_wait<0>();
                settle(sums[slot]);
                if (ends_stage)
                    release(empty);
                if (ends_third)
                    end_third(all, sums[0], thirds);
            }
        }
        if (S::IN_ORDER)
            end_thirds(all, sums[0], thirds);
        skip(w);
    }

    /* A walk whose weights are scaled. */
    template <int SLOTS>
    __device__ __forceinline__ void sum_weights(strip_sums (&sums)[S::SLOTS],
                                                slot_place (&at)[SLOTS], walk &w) const {
        float factor[SLOTS];
        uint32_t factors[SLOTS]; /* twice each, of T */

#pragma unroll
        for (int s = 0; s < SLOTS; s++) {
            factor[s] = scale_factor<T>(at[s].matrix);
            factors[s] = T::pack(factor[s], factor[s]);
        }
        if constexpr (S::DIRECT)
            sum_weights_directly(sums, at, factors, w);
        else
            sum_weights_ahead(sums, at, factors, w);
#pragma unroll
        for (int s = 0; s < SLOTS; s++)
#pragma unroll
            for (int j = 0; j < S::SUMS; j++)
                sums[s][j] *= 1.0f / factor[s];
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
            sum_weights(sums, at, w);
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

    /* The stages that are left are only let go: this warpgroup has no strip, or they are empty. */
    __device__ __forceinline__ void skip(walk &w) const {
        for (; w.goes_on(); w.next(cta)) {
            mbarrier_wait(cta.full_of(w.place), w.place.parity);
            release(cta.empty_of(w.place));
        }
    }

    /* Where this thread takes X from, in the first stage. */
    __device__ __forceinline__ uint32_t x_place() const {
        const int lane = here(cta.lane);

        return S::DIRECT ? cta.ring + lane % 8 * S::X_PITCH + lane / 8 * 16 : wgmma_tile(cta.ring);
    }

    /* By a warp that is done with a stage. */
    __device__ __forceinline__ void release(uint32_t barrier) const {
        __syncwarp();
        if (arrives)
            mbarrier_arrive(barrier);
    }

    /* v, which all lanes have alike, in a register that the compiler knows for that. */
    static __device__ __forceinline__ uint32_t uniform(uint32_t v) {
        return __shfl_sync(~0u, v, 0);
    }

    /* True, but the compiler cannot tell: what depends on it is not put off past the next wait,
     * where it would no longer run beside the tensor cores. */
    static __device__ __forceinline__ bool not_known(int positive) {
        asm volatile("" : "+r"(positive));
        return positive >= 0;
    }

  public:
    __device__ __forceinline__ explicit decode_summer(const decode_cta<S> &of)
        : cta(of), arrives(of.lane < FQ_CUDA_WARP_ARRIVALS) {
        kept(arrives); /* where it comes from takes long */
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
                finish(sums[0]);
                finish(sums[1]);
                place = w.place;
                return;
            }
        slot_place at[1] = {{cta, block, 0, *of[0]}};
        walk w(cta, place);

        clear(sums[0]);
        sum_block<1>(sums, at, w);
        finish(sums[0]);
        place = w.place;
    }
};

#endif /* FQ_HOPPER_CODE */

#endif
