/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The way out of hopper-decode.cuh: from the sums that the two CTAs of a cluster have of a block to
 * rows of Y.
 */
#ifndef FQ_KERNELS_CUDA_HOPPER_DECODE_STORE_CUH
#define FQ_KERNELS_CUDA_HOPPER_DECODE_STORE_CUH

#include "hopper-decode-cta.cuh"

#ifdef FQ_HOPPER_CODE

template <class S, class T> class decode_storer {
    using block_place = typename decode_cta<S>::block_place;
    using strip_sums = typename decode_cta<S>::strip_sums;
    const decode_cta<S> &cta;

    /* The warps whose rows this CTA stores: two of each warpgroup, 32 rows of every strip.  The
     * other CTA's same warps send their sums, thread by thread. */
    static constexpr int KEEPERS = S::CONSUMERS / FQ_CUDA_DECODE_SPLIT;

    __device__ __forceinline__ bool keeps() const {
        return cta.thread / 64 % FQ_CUDA_DECODE_SPLIT == cta.rank;
    }
    /* Of KEEPERS; of those that send, the one in the other CTA. */
    __device__ __forceinline__ int keeper() const {
        return cta.thread / 128 * 64 + cta.thread % 64;
    }
    /* A keeper's way through a block's results, runs of four rows of W for a row of X.  It is found
     * out while the other CTA's sums are on their way: nothing else runs beside what follows them,
     * and divisions take long. */
    struct output_walk {
        static constexpr int RUNS = S::KEPT / 4; /* of a strip */
        static constexpr int ABREAST = KEEPERS / RUNS;
        static_assert(32 % RUNS == 0); /* so that lanes know their run */
        int strips;                    /* of Y, that the block has: one at least */
        int m, strip;                  /* row of X, from row0 on, and strip */
        int further_m, further_strip;  /* to the next */

        __device__ __forceinline__ output_walk(const decode_cta<S> &d, const block_place &block,
                                               int keeper)
            : strips(d.paired ? block.first : block.strips), m(keeper / RUNS / strips),
              strip(keeper / RUNS % strips), further_m(ABREAST / strips),
              further_strip(ABREAST % strips) {
            kept(m);
            kept(strip);
            kept(further_m);
            kept(further_strip);
        }
        __device__ __forceinline__ void next() {
            m += further_m;
            strip += further_strip;
            if (strip >= strips) {
                strip -= strips;
                m++;
            }
        }
    };

    /* How many warpgroups have a strip in slot 0, behind join_sums(). */
    __device__ __forceinline__ int holders(const block_place &block) const {
        return cta.parted() ? block.strips : block.first;
    }
    __device__ __forceinline__ bool has_strip(const block_place &block, int slot) const {
        return cta.thread / 128 < holders(block) &&
               cta.thread / 128 + slot * holders(block) < block.strips;
    }
    /* Where the other CTA's four sums are, of eight columns of a strip. */
    __device__ __forceinline__ uint32_t parcel(const block_place &block, int slot, int quad) const {
        const int index = cta.thread / 128 + slot * holders(block);

        return cta.in() + ((index * (S::N / 8) + quad) * 64 + cta.thread % 64) * 16;
    }

    /*
     * Where strips are all warpgroups', the first one adds what they have of the first strip, the
     * second one of the second, and then has it in slot 0: the first third and the second, in
     * whichever order, and then the last.
     */
    __device__ __forceinline__ void join_sums(strip_sums (&sums)[S::SLOTS],
                                              const block_place &block) const {
        static_assert(S::GROUPS == FQ_CUDA_THIRDS && S::SLOTS <= 2, "the order of the thirds");
        const int group = cta.thread / 128;
        /* of the s-th strip, where `from` leaves its sums */
        const auto place = [&](int s, int from, int quad) {
            const int index = s % S::JOINED_STRIPS * (S::GROUPS - 1) + (from > s ? from - 1 : from);

            return cta.out + ((index * (S::N / 8) + quad) * 128 + cta.thread % 128) * 16;
        };

#pragma unroll
        for (int s0 = 0; s0 < S::SLOTS; s0 += S::JOINED_STRIPS) {
            if (s0 >= block.strips)
                continue;
#pragma unroll
            for (int s = s0; s < s0 + S::JOINED_STRIPS; s++)
                if (s < block.strips && group != s)
#pragma unroll
                    for (int q = 0; q < S::N / 8; q++)
                        sts_f4(place(s, group, q), sums[s] + 4 * q);
            named_barrier(FQ_CUDA_BARRIER_CONSUMERS, S::CONSUMERS);
#pragma unroll
            for (int s = s0; s < s0 + S::JOINED_STRIPS; s++)
                if (s < block.strips && group == s) {
#pragma unroll
                    for (int j = 0; j < S::SUMS; j++)
                        sums[0][j] = sums[s][j];
#pragma unroll
                    for (int from = 0; from < S::GROUPS; from++)
#pragma unroll
                        for (int q = 0; q < S::N / 8; q++)
                            if (from != s)
                                add_f4(sums[0] + 4 * q, lds_f4(place(s, from, q)));
                }
            named_barrier(FQ_CUDA_BARRIER_CONSUMERS, S::CONSUMERS);
        }
    }

    __device__ __forceinline__ void send_sums(const strip_sums (&sums)[S::SLOTS],
                                              const block_place &block) const {
        const uint32_t barrier = cluster_address(cta.ready, cta.rank ^ 1);

#pragma unroll
        for (int s = 0; s < S::SLOTS; s++)
#pragma unroll
            for (int q = 0; q < S::N / 8; q++)
                if (has_strip(block, s) && q * 8 < cta.launch.m)
                    cluster_send(cluster_address(parcel(block, s, q), cta.rank ^ 1),
                                 sums[s] + 4 * q, barrier);
    }

    /* Bytes that the other CTA sends for a block. */
    __device__ __forceinline__ uint32_t parcel_bytes(const block_place &block) const {
        return block.strips * 64 * ((cta.launch.m + 7) / 8) * 16;
    }

    /* Adds what the other CTA sent, for rows row0.. of X, and puts the sums where they lie side by
     * side. */
    __device__ __forceinline__ void add_sums(const strip_sums (&sums)[S::SLOTS],
                                             const block_place &block, int row0,
                                             uint32_t out) const {
        const uint32_t mine =
            out + cta.lane % 4 * 2 * cta.out_pitch() +
            (cta.thread / 128 * S::KEPT + cta.thread / 32 % 2 * FQ_CUDA_QUARTER + cta.lane / 4) * 4;

#pragma unroll
        for (int s = 0; s < S::SLOTS; s++)
#pragma unroll
            for (int q = 0; q < S::N / 8; q++) {
                const uint32_t to =
                    mine + s * holders(block) * S::KEPT * 4 + (q * 8 - row0) * cta.out_pitch();
                float4 other;

                if (!has_strip(block, s) || q * 8 < row0 || q * 8 >= row0 + S::OUT_ROWS ||
                    q * 8 >= cta.launch.m)
                    continue;
                other = lds_f4(parcel(block, s, q));
                sts_32(to, sums[s][4 * q] + other.x);
                sts_32(to + cta.out_pitch(), sums[s][4 * q + 1] + other.y);
                sts_32(to + 32, sums[s][4 * q + 2] + other.z);
                sts_32(to + cta.out_pitch() + 32, sums[s][4 * q + 3] + other.w);
            }
    }

    /* This CTA's rows of a block, for rows row0.. of X. */
    template <bool PLAIN>
    __device__ __forceinline__ void store_rows(const block_place &block, int row0,
                                               output_walk walk) const {
        const bool gated = !PLAIN && cta.launch.gate.codes != nullptr;
        const bool paired = !PLAIN && cta.paired;
        const int row = cta.lane % output_walk::RUNS * 4; /* of the strip's that are kept */
        const int rows = min(S::OUT_ROWS, cta.launch.m - row0);

        for (; walk.m < rows; walk.next()) {
            const int m = row0 + walk.m;
            const int n = (block.strip + walk.strip) * FQ_CUDA_STRIP + cta.rank * S::KEPT + row;
            const uint32_t from = (walk.strip * S::KEPT + row) * 4;
            const uint32_t at = cta.out + walk.m * cta.out_pitch() + from;
            float v[4], gate[4];

            if (n >= cta.launch.w.n)
                continue;
            if (gated)
                *reinterpret_cast<float4 *>(gate) =
                    lds_f4(paired ? at : cta.gate_out() + m * cta.out_pitch() + from);
            *reinterpret_cast<float4 *>(v) = lds_f4(paired ? at + block.first * S::KEPT * 4 : at);
            store_run<T, 4, PLAIN>(cta.launch, v, gate, cta.launch.y_rows[m],
                                   cta.launch.residual_rows[m], n);
        }
    }

  public:
    __device__ __forceinline__ explicit decode_storer(const decode_cta<S> &of) : cta(of) {
    }

    /* The sums of the cluster's i-th block, by all consumers. */
    __device__ __forceinline__ void store(strip_sums (&sums)[S::SLOTS], const block_place &block,
                                          int i) const {
        if constexpr (S::PARTING == parting::any)
            if (cta.parted())
                join_sums(sums, block);
        if (!keeps()) {
            if (i > 0)
                mbarrier_wait(cta.taken, (i - 1) & 1);
            send_sums(sums, block);
            return;
        }
        if (keeper() == 0)
            mbarrier_expect(cta.ready, parcel_bytes(block));
        /* all that can be done while the other CTA's sums are on their way */
        const output_walk walk(cta, block, keeper());
        int plain = is_plain(cta.launch, cta.launch.residual_rows[0]);

        kept(plain);
        grid_wait(); /* the kernels before may use Y, and make the residual */
        mbarrier_wait(cta.ready, i & 1);
        for (int row0 = 0; row0 < S::N && row0 < cta.launch.m; row0 += S::OUT_ROWS) {
            if (row0 > 0 || i > 0) /* the last rows are stored */
                named_barrier(FQ_CUDA_BARRIER_KEEPERS, KEEPERS);
            add_sums(sums, block, row0,
                     block.of_gate ? cta.gate_out() + row0 * cta.out_pitch() : cta.out);
            named_barrier(FQ_CUDA_BARRIER_KEEPERS, KEEPERS);
            if (block.of_gate)
                continue;
            if (plain)
                store_rows<true>(block, row0, walk);
            else
                store_rows<false>(block, row0, walk);
        }
        /* after the last block the other CTA may be gone */
        if (i + 1 < cta.blocks && keeper() == 0)
            mbarrier_arrive_at(cta.taken, cta.rank ^ 1);
    }
};

#endif /* FQ_HOPPER_CODE */

#endif
