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

    /* Asks for a block's part of the residual, long before store() wants it: a line a row, the
     * first of two where a strip's part of one does not begin with a line. */
    __device__ __forceinline__ void prefetch_residual(int m0, int strip) const {
        const typename T::type *from = residual_at(m0 + thread % 128, strip * FQ_CUDA_STRIP);

        if (strip * FQ_CUDA_STRIP >= launch.w.n)
            return;
        for (int row = m0 + thread % 128; row < min(m0 + S::N, launch.m); row += 128) {
            prefetch_l2(from);
            from += 128 * launch.residual_stride;
        }
    }

    /* Any others.  Some rows of X at a time go through shared memory, so that results lie side by
     * side: a thread has eight, from the same n on, of some rows.  Of a gated pair, warpgroup 0
     * brings the gate's sums and 1 those of W. */
    __device__ __forceinline__ void store(const float (&sums)[S::QUADS * 4], int m0,
                                          int strip) const {
        const bool gated = S::GROUPS == 2 && launch.gate.codes != nullptr;
        const int threads = gated ? S::CONSUMERS : 128, among = thread & (threads - 1);
        const int n = strip * FQ_CUDA_STRIP + among % 8 * 8, end = min(m0 + S::N, launch.m);
        const int rows = threads / 8; /* from one of a thread's to its next */
        auto meet = [&]() {           /* with all who bring sums or take them */
                            if (gated)
                                named_barrier(FQ_CUDA_BARRIER_GATE, S::CONSUMERS);
                            else
                                meet_warpgroup();
        };
        const uint32_t buffer = out + group * S::OUT;
        const uint32_t mine = buffer + wide_piece(lane % 4 * 2, thread / 32 % 4 * 2) + lane / 4 * 4;
        float bias[8] = {}, gate_bias[8] = {};
        eight residual = {}; /* of the next row of this thread's */

        if (launch.bias)
            add_bias(launch, bias, launch.bias, n);
        if (gated && launch.gate_bias)
            add_bias(launch, gate_bias, launch.gate_bias, n);
        if (launch.residual)
            load_residual(residual, m0 + among / 8, end, n);
        for (int part = 0; part < S::OUT_PARTS; part++) {
            const int row0 = m0 + part * S::OUT_ROWS;

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
            for (int row = among / 8; row < S::OUT_ROWS; row += rows) {
                const int m = row0 + row;
                const uint32_t at = wide_piece(row, among % 8);
                const eight added = residual;
                float v[8], gate[8];

                if (launch.residual)
                    load_residual(residual, m + rows, end, n);
                load_sums(v, (gated ? out + S::OUT : buffer) + at);
                add(v, bias);
                if (gated) {
                    load_sums(gate, out + at);
                    add(gate, gate_bias);
                    apply_gate(v, gate, launch.activation);
                } else {
                    activate(v, launch.activation);
                }
                if (launch.residual)
#pragma unroll
                    for (int i = 0; i < 8; i++)
                        v[i] += T::widen(added.of[i]);
                if (m < end && n < launch.w.n)
                    store_rounded<T>(
                        v, static_cast<typename T::type *>(launch.y) + m * launch.y_stride + n,
                        launch.w.n - n);
            }
        }
    }

  private:
    /* Elements of a row, side by side. */
    union eight {
        uint4 all;
        typename T::type of[8];

        __device__ eight() : all() {
        }
    };

    static __device__ __forceinline__ void add(float (&v)[8], const float (&other)[8]) {
#pragma unroll
        for (int i = 0; i < 8; i++)
            v[i] += other[i];
    }

    __device__ __forceinline__ const typename T::type *residual_at(int m, int n) const {
        return static_cast<const typename T::type *>(launch.residual) + m * launch.residual_stride +
               n;
    }
    /* Those of the residual from n on, as far as there are, if row m is before `end`. */
    __device__ __forceinline__ void load_residual(eight &to, int m, int end, int n) const {
        const typename T::type *from = residual_at(m, n);
        const int count = launch.w.n - n;

        if (m >= end || count <= 0)
            return;
        if (count >= 8 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
            to.all = *reinterpret_cast<const uint4 *>(from);
            return;
        }
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < count)
                to.of[i] = from[i];
    }
};

#endif /* FQ_HOPPER_CODE */
#endif
