/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What all consumers of hopper-decode.cuh do: where codes, scales and X lie in the stages of the
 * ring, and the walk over those; a tile's codes to fragments, and those to products; thirds of K.
 * What is done with products, and when, is in hopper-decode-sum.cuh and -weights.cuh.
 */
#ifndef FQ_KERNELS_CUDA_HOPPER_DECODE_CONSUME_CUH
#define FQ_KERNELS_CUDA_HOPPER_DECODE_CONSUME_CUH

#include "hopper-decode-cta.cuh"

#ifdef FQ_HOPPER_CODE

template <class S, class T, zero_points ZEROS> class decode_consumer {
    using codes_of = dequantizer<S::BITS, T, decode_reading(S::BITS, S::N)>;
    using zero_terms = typename codes_of::zero_terms;
    static constexpr bool SYMMETRIC = ZEROS == zero_points::none;

  protected:
    using block_place = typename decode_cta<S>::block_place;
    using strip_sums = typename decode_cta<S>::strip_sums;
    const decode_cta<S> &cta;
    int arrives; /* 1: this lane counts its warp in at a barrier */

    __device__ __forceinline__ explicit decode_consumer(const decode_cta<S> &of)
        : cta(of), arrives(of.lane < FQ_CUDA_WARP_ARRIVALS) {
        kept(arrives); /* where it comes from takes long */
    }

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

    /* A walk's sums, or a third's, times a power of two: before anything is added to them, so that
     * they leave fp32's range, or do not, alike however a block is parted. */
    static __device__ __forceinline__ void multiply_sums(strip_sums &sums, float by) {
#pragma unroll
        for (int j = 0; j < S::SUMS; j++)
            sums[j] = __fmul_rn(sums[j], by);
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
};

#endif /* FQ_HOPPER_CODE */

#endif
