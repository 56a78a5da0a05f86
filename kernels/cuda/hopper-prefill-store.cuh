/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The way out of hopper-prefill.cuh: from a block's sums, in the consumers' registers, to rows of
 * Y.
 */
#ifndef FQ_KERNELS_CUDA_HOPPER_PREFILL_STORE_CUH
#define FQ_KERNELS_CUDA_HOPPER_PREFILL_STORE_CUH

#include "hopper-prefill-cta.cuh"

#ifdef FQ_HOPPER_CODE

template <class S, class T> class prefill_storer : public prefill_cta<S> {
    using cta = prefill_cta<S>;
    using place_in_ring = typename cta::place_in_ring;
    using cta::group;
    using cta::lane;
    using cta::launch;
    using cta::meet_warpgroup;
    using cta::out;
    using cta::release;
    using cta::ring;
    using cta::stage_bytes;
    using cta::thread;

  protected:
    using cta::cta;

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
        for (int row = 0; row < ROWS; row += FQ_CUDA_STORED_ROWS(S::N))
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
            const int row0 = m0 + part * S::OUT_ROWS, end = min(m0 + S::N, launch.m);

            if (row0 >= end)
                return;
            meet(); /* the last part is stored */
#pragma unroll
            for (int p = 0; p < S::OUT_PARTS; p++) {
                if (p != part)
                    continue;
#pragma unroll
                for (int q = 0; q < min(S::OUT_QUADS, S::QUADS - p * S::OUT_QUADS); q++) {
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
                if (m < end && n < launch.w.n)
                    store_run<T, 8, false>(
                        launch, v, gate, static_cast<uint16_t *>(launch.y) + m * launch.y_stride,
                        launch.residual ? static_cast<const uint16_t *>(launch.residual) +
                                              m * launch.residual_stride
                                        : nullptr,
                        n);
            }
        }
    }
};

#endif /* FQ_HOPPER_CODE */
#endif
