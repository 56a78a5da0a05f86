/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The consumers of hopper-decode.cuh where each step of 16 is a group (scaling::weights): weights
 * are scaled, in X's type, and a sum is one chain of products.
 */
#ifndef FQ_KERNELS_CUDA_HOPPER_DECODE_WEIGHTS_CUH
#define FQ_KERNELS_CUDA_HOPPER_DECODE_WEIGHTS_CUH

#include "hopper-decode-consume.cuh"

#ifdef FQ_HOPPER_CODE

template <class S, class T, zero_points ZEROS>
class decode_weights_summer : protected decode_consumer<S, T, ZEROS> {
    using base = decode_consumer<S, T, ZEROS>;

  protected:
    using slot_place = typename base::slot_place;
    using strip_sums = typename base::strip_sums;
    using tile_weights = typename base::tile_weights;
    using walk = typename base::walk;
    using base::base;
    using base::clear;
    using base::cta;
    using base::end_third;
    using base::end_thirds;
    using base::multiply_sums;
    using base::release;
    using base::skip;
    using base::uniform;
    using base::x_place;

    /* A tile's codes and zero points, as they come from a stage, and its scales, a group to each
     * step, that weights are multiplied by: times a pair of `factor`. */
    struct loaded_weights {
        typename base::template loaded_tile<FQ_CUDA_STEPS, scaling::weights> loaded;
        uint32_t scale[FQ_CUDA_STEPS];

        __device__ __forceinline__ loaded_weights(const slot_place &from, uint32_t stage, int tile)
            : loaded(from, stage, tile) {
            base::template load_scales<FQ_CUDA_STEPS, scaling::weights>(scale, from, stage, tile);
        }
        __device__ __forceinline__ void dequantize(tile_weights &to, uint32_t factor) const {
            loaded.dequantize(to);
#pragma unroll
            for (int step = 0; step < FQ_CUDA_STEPS; step++)
                row_scales<T>(T::mul(scale[step], factor)).multiply(to[step]);
        }
    };

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
     * dequantized.  rest: what sums are to be multiplied by. */
    template <int SLOTS>
    __device__ __forceinline__ void
    sum_weights_ahead(strip_sums (&sums)[S::SLOTS], slot_place (&at)[SLOTS],
                      const uint32_t (&factors)[SLOTS], const float (&rest)[SLOTS], walk &w) const {
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
                        ends_third = this->template next<SLOTS, scaling::weights>(w, at);
                        of = 0;
                        tiles = w.tiles(cta);
                    }
                }
                this->template multiply<1>(sums[slot], a[i], 0, x_here, true);
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
                if (ends_third) {
                    multiply_sums(sums[0], rest[0]);
                    end_third(all, sums[0], thirds);
                }
            }
        }
#pragma unroll
        for (int s = 0; s < SLOTS; s++)
            multiply_sums(sums[s], rest[s]);
        if (S::IN_ORDER)
            end_thirds(all, sums[0], thirds);
        skip(w);
    }

    /* A walk whose weights are scaled. */
    template <int SLOTS>
    __device__ __forceinline__ void sum_weights(strip_sums (&sums)[S::SLOTS],
                                                slot_place (&at)[SLOTS], walk &w) const {
        uint32_t factors[SLOTS]; /* twice each, of T: what scales are multiplied by */
        float rest[SLOTS];

#pragma unroll
        for (int s = 0; s < SLOTS; s++) {
            const float factor = scale_factor<T>(at[s].matrix);
            const float by = factor * fragment_factor<S::BITS, T>;

            factors[s] = T::pack(by, by);
            rest[s] = 1.0f / factor;
        }
        if constexpr (S::DIRECT) {
            sum_weights_directly(sums, at, factors, w);
#pragma unroll
            for (int s = 0; s < SLOTS; s++)
                multiply_sums(sums[s], rest[s]);
        } else {
            sum_weights_ahead(sums, at, factors, rest, w);
        }
    }
};

#endif /* FQ_HOPPER_CODE */

#endif
