/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The decode path on Hopper, m ≤ FQ_DECODE_ROWS: bound by reading W once.
 *
 * A CTA sums 256 rows of W: four consumer warpgroups of one strip each, or, for a
 * gated pair, two of the gate's strips and two of the same rows of W.  The other
 * CTA of the worker (shares.h) has the next 256 rows and the same units of K.  W is
 * the register operand of the tensor cores, rows of X are columns of theirs.  Sums of
 * a group are scaled in fp32.  mma.sync and wgmma of any width sum a column alike, and
 * shares do not depend on m: a row's bits are the same alone and among 63 others.
 *
 * Up to 32 rows, X comes straight from the rows and mma.sync multiplies; up to 16 the
 * kernel takes half of a multiprocessor, so that the next one of the stream can fill
 * its stages while this one ends.  With more rows, X would be read from L2 as often as
 * there are CTAs, and that would take as long as W does: it is first arranged
 * (rows.cu), then sent to both CTAs of the cluster at once, and multiplied by wgmma.
 */
#ifndef FQ_KERNELS_CUDA_HOPPER_DECODE_CUH
#define FQ_KERNELS_CUDA_HOPPER_DECODE_CUH

#include "hopper.cuh"

/* N: rows of X, rounded up; the constants are host code's too. */
template <int N_, int BITS_> struct decode_shape {
    static constexpr int N = N_, BITS = BITS_;
    static constexpr bool DIRECT = N <= 32;      /* X straight from its rows, mma.sync */
    static constexpr int KT = BITS == 8 ? 1 : 2; /* tiles of K in a stage, a unit of the shares */
    static constexpr int GROUPS = 4;             /* consumer warpgroups, a strip each */
    static constexpr int CONSUMERS = 128 * GROUPS;
    /* One warp produces; where X comes row by row, another one does that.  Where registers are
     * scarce producers are a warpgroup, for the consumers to be given their registers: a CTA starts
     * with 96 a thread, and setmaxnreg only moves them. */
    static constexpr int THREADS = CONSUMERS + (DIRECT ? 64 : 128);
    static constexpr int PRODUCER_REGISTERS = 32, CONSUMER_REGISTERS = 112;
    static constexpr int CTAS = N <= 16 ? 2 : 1;                     /* that fit a multiprocessor */
    static constexpr int SHARED = CTAS == 2 ? 112 << 10 : 226 << 10; /* bytes of each, at most */
    static constexpr int QUADS = N / 8; /* float4 of sums that a thread has */
    static constexpr int TOGETHER =
        N == 8 ? KT : 1; /* tiles at a time, by the registers there are */
    static constexpr int STRIP = KT * FQ_CUDA_TILE_BYTES(BITS); /* codes of a strip in a stage */
    /* Of a stage: X, the codes of each strip, then its scales, then its zero points.  X is rows,
     * by which ldmatrix hits all banks, or tiles as wgmma wants them. */
    static constexpr int X_PITCH = KT * 128 + 16, X_TILE = N * 128;
    static constexpr int CODES = DIRECT ? N * X_PITCH : KT * X_TILE;
    static constexpr int SCALES = CODES + GROUPS * STRIP;
    /* Where sums change their order on the way out: 8 rows of X by the CTA's rows of W. */
    static constexpr int OUT_PITCH = GROUPS * FQ_CUDA_STRIP * 4 + 16, OUT = 8 * OUT_PITCH;

    static __host__ __device__ int stage_bytes(int slots, bool zeros) {
        int bytes = SCALES + GROUPS * slots * (FQ_CUDA_SCALE_BYTES + zeros * FQ_CUDA_ZERO_BYTES);

        return (bytes + 1023) / 1024 * 1024;
    }
};

#ifdef FQ_HOPPER_CODE

/* A walk over the units of a worker: of all its segments, one after the other. */
struct unit_cursor {
    const fq_cuda_shares &shares;
    int worker, index, unit;
    fq_cuda_segment segment;
    bool valid;

    __device__ __forceinline__ unit_cursor(const fq_cuda_shares &s, int w)
        : shares(s), worker(w), index(0), unit(0) {
        enter();
    }
    __device__ __forceinline__ void enter() {
        valid = fq_cuda_segment_at(&shares, worker, index, &segment);
        if (valid)
            unit = segment.begin;
    }
    /* True where a new segment begins. */
    __device__ __forceinline__ bool next() {
        if (++unit < segment.end)
            return false;
        index++;
        enter();
        return true;
    }
};

template <class S, class T> class decoder {
    const fq_cuda_launch &launch;
    const uint32_t ring, full, empty, out; /* in shared memory */
    const int stage_bytes, zeros_at;
    const int worker, half, thread, lane;

    /* ---- The producer's warp ---------------------------------------------------------------- */

    /* Which matrix and strip a warpgroup has; false: none. */
    __device__ __forceinline__ bool find_strip(int block, int group, const fq_cuda_matrix *&w,
                                               int &strip) const {
        bool gated = launch.gate.codes != nullptr;

        w = gated && group < S::GROUPS / 2 ? &launch.gate : &launch.w;
        strip = gated ? (block * FQ_CUDA_CLUSTER + half) * (S::GROUPS / 2) + group % (S::GROUPS / 2)
                      : (block * FQ_CUDA_CLUSTER + half) * S::GROUPS + group;
        return strip < w->strips;
    }

    __device__ __forceinline__ int tiles_of(int unit) const {
        return min(S::KT, launch.w.tiles - unit * S::KT);
    }

    /* A lane's copies: lanes 0 to 3 codes of a strip each, then its scales, then its zero points.
     * The lane after them has X, where it is arranged. */
    static constexpr int X_LANE = 3 * S::GROUPS;

    __device__ __forceinline__ strip_copies find_copies(const unit_cursor &at) const {
        const int kind = lane / S::GROUPS, group = lane % S::GROUPS;
        const fq_cuda_matrix *w = &launch.w;
        int strip = 0;
        bool present = at.valid && kind < 3 && find_strip(at.segment.block, group, w, strip);

        return strip_copies(*w, strip, at.unit * S::KT, kind, present);
    }

    /* Where in a stage they go. */
    __device__ __forceinline__ uint32_t place_of_copies() const {
        const int kind = lane / S::GROUPS, group = lane % S::GROUPS;

        return kind == 0   ? S::CODES + group * S::STRIP
               : kind == 1 ? S::SCALES + group * launch.slots * FQ_CUDA_SCALE_BYTES
                           : zeros_at + group * launch.slots * FQ_CUDA_ZERO_BYTES;
    }

    __device__ __forceinline__ void put_weights(const ring_place &place, strip_copies &copies,
                                                uint32_t to, int tiles) const {
        const uint32_t barrier = full_of(place);
        const uint32_t bytes = copies.bytes(tiles, FQ_CUDA_TILE_BYTES(S::BITS));
        const uint32_t x = !S::DIRECT && lane == X_LANE ? tiles * S::X_TILE : 0;
        const uint32_t all = __reduce_add_sync(0xffffffffu, bytes + x);

        if (lane == 0)
            mbarrier_expect(barrier, all);
        __syncwarp();
        if (bytes)
            bulk_copy(ring + place.stage * stage_bytes + to, copies.from, bytes, barrier);
        copies.advance(tiles, FQ_CUDA_TILE_BYTES(S::BITS));
    }

    /* The arranged X of a unit: both CTAs of the cluster send one half to both. */
    __device__ __forceinline__ void put_arranged(const ring_place &place, int unit,
                                                 int tiles) const {
        const uint32_t bytes = tiles * (S::X_TILE / FQ_CUDA_CLUSTER);

        if (lane == X_LANE)
            bulk_copy_multicast(ring + place.stage * stage_bytes + half * bytes,
                                static_cast<const uint8_t *>(launch.arranged) +
                                    (int64_t)unit * S::KT * S::X_TILE + half * bytes,
                                bytes, full_of(place), (1 << FQ_CUDA_CLUSTER) - 1);
    }

    /* X straight from its rows, on 16 bytes, by a warp of its own: a lane has the same 16-byte
     * piece of every second or fourth row. */
    static constexpr int PIECES = S::KT * 8, ROWS_AT_ONCE = 32 / PIECES;
    static constexpr int ROW_LOADS = S::N / ROWS_AT_ONCE;

    __device__ __forceinline__ void put_rows(const ring_place &place, int k,
                                             const uint16_t *const (&rows)[ROW_LOADS],
                                             uint32_t to) const {
        const int bytes = max(0, min(16, (launch.w.k - k) * 2));

        to += place.stage * stage_bytes;
#pragma unroll
        for (int i = 0; i < ROW_LOADS; i++)
            if (i * ROWS_AT_ONCE + lane / PIECES < launch.m)
                cp_async_16(to + i * ROWS_AT_ONCE * S::X_PITCH, rows[i] + (bytes ? k : 0), bytes);
        mbarrier_arrive_copies(full_of(place));
    }

    __device__ __forceinline__ uint32_t full_of(const ring_place &place) const {
        return full + place.stage * 8;
    }
    __device__ __forceinline__ uint32_t empty_of(const ring_place &place) const {
        return empty + place.stage * 8;
    }

    /* ---- A consumer warpgroup --------------------------------------------------------------- */

    /* What a thread needs to find its part of a stage: addresses in the first one. */
    struct lane_place {
        uint32_t codes, scales, zeros, x;

        __device__ __forceinline__ explicit lane_place(const decoder &d) {
            const int group = d.thread / 128, warp = d.thread / 32 % 4;
            const int pair = warp * 8 + d.lane / 4;

            codes = d.ring + S::CODES + group * S::STRIP + warp * FQ_CUDA_QUARTER_BYTES(S::BITS) +
                    lane_offset<S::BITS>(d.lane);
            scales = d.ring + S::SCALES + group * d.launch.slots * FQ_CUDA_SCALE_BYTES + pair * 4;
            zeros = d.ring + d.zeros_at + group * d.launch.slots * FQ_CUDA_ZERO_BYTES + pair * 2;
            x = S::DIRECT ? d.ring + d.lane % 8 * S::X_PITCH + d.lane / 8 * 16 : wgmma_tile(d.ring);
        }
    };

    /* Zero points and scales of a slot, in the stage that starts `stage` bytes behind the first. */
    template <bool ZEROS>
    __device__ __forceinline__ zero_terms<S::BITS, T> load_zeros(const lane_place &at,
                                                                 uint32_t stage, int slot) const {
        if (!ZEROS)
            return middle_zeros<S::BITS, T>();
        return unpack_zeros<S::BITS, T>(lds_16(at.zeros + stage + slot * FQ_CUDA_ZERO_BYTES));
    }

    __device__ __forceinline__ float2 load_scales(const lane_place &at, uint32_t stage, int slot,
                                                  bool bf16_scales) const {
        return unpack_scales(lds_32(at.scales + stage + slot * FQ_CUDA_SCALE_BYTES), bf16_scales);
    }

    __device__ __forceinline__ void
    add_scaled(float (&sums)[S::QUADS * 4], const float (&part)[S::QUADS * 4], float2 scale) const {
#pragma unroll
        for (int j = 0; j < S::QUADS * 4; j++)
            sums[j] = fmaf(part[j], j & 2 ? scale.y : scale.x, sums[j]);
    }

    /*
     * TILES tiles from `of` on by mma.sync: for few rows of X, half of what the narrowest wgmma
     * costs.  What comes from shared memory is asked for ahead of its use, and the products of
     * several tiles do not wait for each other.
     */
    template <int TILES, int SEGMENTS, bool ZEROS>
    __device__ __forceinline__ void
    sum_tiles_directly(float (&sums)[S::QUADS * 4], const lane_place &at, uint32_t stage, int of,
                       const group_phase &groups, bool bf16_scales) const {
        constexpr int STEPS = FQ_CUDA_STEPS / SEGMENTS; /* of a segment */
        lane_codes<S::BITS> codes[TILES];
        uint32_t x[TILES][S::QUADS][4]; /* two steps */
        float part[TILES][S::QUADS][4];

#pragma unroll
        for (int t = 0; t < TILES; t++)
            codes[t] =
                load_codes<S::BITS>(at.codes + stage + (of + t) * FQ_CUDA_TILE_BYTES(S::BITS));
#pragma unroll
        for (int segment = 0; segment < SEGMENTS; segment++) {
            zero_terms<S::BITS, T> zero[TILES];
            uint32_t scale[TILES];

#pragma unroll
            for (int t = 0; t < TILES; t++) {
                const int slot = groups.slot((of + t) * FQ_CUDA_STEPS + segment * STEPS);

                scale[t] = lds_32(at.scales + stage + slot * FQ_CUDA_SCALE_BYTES);
                zero[t] = load_zeros<ZEROS>(at, stage, slot);
            }
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                const int step = segment * STEPS + s;

#pragma unroll
                for (int t = 0; t < TILES; t++)
#pragma unroll
                    for (int j = 0; j < S::QUADS; j++)
                        if (step % 2 == 0)
                            ldmatrix_x4(x[t][j], at.x + stage + j * 8 * S::X_PITCH +
                                                     (of + t) * 128 + step * 32);
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    uint32_t a[4];

                    fragment<S::BITS, T>(a, codes[t], step, zero[t]);
#pragma unroll
                    for (int j = 0; j < S::QUADS; j++) {
                        const uint32_t low = x[t][j][step % 2 * 2],
                                       high = x[t][j][step % 2 * 2 + 1];

                        if (s == 0)
                            T::mma_first(part[t][j], a, low, high);
                        else
                            T::mma(part[t][j], a, low, high);
                    }
                }
            }
#pragma unroll
            for (int t = 0; t < TILES; t++)
                add_scaled(sums, reinterpret_cast<float(&)[S::QUADS * 4]>(part[t]),
                           unpack_scales(scale[t], bf16_scales));
        }
    }

    /* One tile by wgmma, a segment after the other. */
    template <int SEGMENTS, bool ZEROS>
    __device__ __forceinline__ void sum_tile(float (&sums)[S::QUADS * 4], const lane_place &at,
                                             uint32_t stage, int of, const group_phase &groups,
                                             bool bf16_scales) const {
        constexpr int STEPS = FQ_CUDA_STEPS / SEGMENTS;
        const uint32_t x = at.x + stage / 16 + of * (S::X_TILE / 16);
        const lane_codes<S::BITS> codes =
            load_codes<S::BITS>(at.codes + stage + of * FQ_CUDA_TILE_BYTES(S::BITS));

#pragma unroll
        for (int segment = 0; segment < SEGMENTS; segment++) {
            const int slot = groups.slot(of * FQ_CUDA_STEPS + segment * STEPS);
            const zero_terms<S::BITS, T> zero = load_zeros<ZEROS>(at, stage, slot);
            float part[S::QUADS * 4];
            uint32_t a[STEPS][4];

#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                fragment<S::BITS, T>(a[s], codes, segment * STEPS + s, zero);
                settle(a[s]);
            }
            wgmma_fence();
#pragma unroll
            for (int s = 0; s < STEPS; s++)
                wgmma<S::N>::template mma<T>(
                    part, a[s], wgmma_descriptor(x + (segment * STEPS + s) * WGMMA_STEP), s > 0);
            wgmma_commit();
            wgmma_wait<0>();
            settle(part);
            add_scaled(sums, part, load_scales(at, stage, slot, bf16_scales));
        }
    }

    /* All units of a segment. */
    template <int SEGMENTS, bool ZEROS>
    __device__ __forceinline__ void sum_units(float (&sums)[S::QUADS * 4],
                                              const fq_cuda_segment &segment,
                                              const fq_cuda_matrix &w, ring_place &place) const {
        const lane_place at(*this);
        const bool bf16_scales = w.scale_bf16;
        group_phase groups(w, segment.begin * S::KT);
        int tiles = w.tiles - segment.begin * S::KT; /* from here to the end of K */

        for (int unit = segment.begin; unit < segment.end; unit++) {
            const uint32_t stage = place.stage * stage_bytes;

            mbarrier_wait(full_of(place), place.parity);
            if constexpr (S::DIRECT) {
                if (S::TOGETHER > 1 && SEGMENTS == 1 && tiles >= S::TOGETHER)
                    sum_tiles_directly<S::TOGETHER, SEGMENTS, ZEROS>(sums, at, stage, 0, groups,
                                                                     bf16_scales);
                else
                    for (int of = 0; of < S::KT && of < tiles; of++)
                        sum_tiles_directly<1, SEGMENTS, ZEROS>(sums, at, stage, of, groups,
                                                               bf16_scales);
            } else {
                for (int of = 0; of < S::KT && of < tiles; of++)
                    sum_tile<SEGMENTS, ZEROS>(sums, at, stage, of, groups, bf16_scales);
            }
            release(place);
            groups.advance(S::KT * FQ_CUDA_STEPS);
            tiles -= S::KT;
            place.next();
        }
    }

    /* The same where a tile has one scale a row: the next tile is dequantized while the tensor
     * cores are at this one. */
    template <bool ZEROS>
    __device__ __forceinline__ void sum_tiles(float (&sums)[S::QUADS * 4],
                                              const fq_cuda_segment &segment,
                                              const fq_cuda_matrix &w, ring_place &place) const {
        const lane_place at(*this);
        const bool bf16_scales = w.scale_bf16;
        const int end = min(segment.end * S::KT, w.tiles);
        group_phase groups(w, segment.begin * S::KT);
        uint32_t stage = place.stage * stage_bytes;
        uint32_t a[2][FQ_CUDA_STEPS][4];
        int of = 0;
        auto dequantize = [&](uint32_t(&to)[FQ_CUDA_STEPS][4]) {
            const zero_terms<S::BITS, T> zero =
                load_zeros<ZEROS>(at, stage, groups.slot(of * FQ_CUDA_STEPS));
            const lane_codes<S::BITS> codes =
                load_codes<S::BITS>(at.codes + stage + of * FQ_CUDA_TILE_BYTES(S::BITS));

#pragma unroll
            for (int step = 0; step < FQ_CUDA_STEPS; step++)
                fragment<S::BITS, T>(to[step], codes, step, zero);
        };

        mbarrier_wait(full_of(place), place.parity);
        dequantize(a[0]);
        for (int tile = segment.begin * S::KT; tile < end; tile += 2) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (tile + i >= end)
                    break;
                const uint32_t x = at.x + stage / 16 + of * (S::X_TILE / 16);
                const float2 scale =
                    load_scales(at, stage, groups.slot(of * FQ_CUDA_STEPS), bf16_scales);
                const ring_place here = place;
                const bool done = of + 1 == S::KT || tile + i + 1 == end; /* with this stage */
                float part[S::QUADS * 4];

#pragma unroll
                for (int step = 0; step < FQ_CUDA_STEPS; step++)
                    settle(a[i][step]);
                wgmma_fence();
#pragma unroll
                for (int step = 0; step < FQ_CUDA_STEPS; step++)
                    wgmma<S::N>::template mma<T>(part, a[i][step],
                                                 wgmma_descriptor(x + step * WGMMA_STEP), step > 0);
                wgmma_commit();
                of++;
                if (done) {
                    of = 0;
                    place.next();
                    stage = place.stage * stage_bytes;
                    groups.advance(S::KT * FQ_CUDA_STEPS);
                }
                if (tile + i + 1 < end) {
                    if (done)
                        mbarrier_wait(full_of(place), place.parity);
                    dequantize(a[1 - i]);
                }
                wgmma_wait<0>();
                settle(part);
                if (done)
                    release(here);
                add_scaled(sums, part, scale);
            }
        }
    }

    template <bool ZEROS>
    __device__ __forceinline__ void sum_segment(float (&sums)[S::QUADS * 4],
                                                const fq_cuda_segment &segment,
                                                const fq_cuda_matrix &w, ring_place &place) const {
        if (w.slots_log2 == 0 && S::DIRECT)
            sum_units<1, ZEROS>(sums, segment, w, place);
        else if (w.slots_log2 == 0)
            sum_tiles<ZEROS>(sums, segment, w, place);
        else if (w.slots_log2 == 1)
            sum_units<2, ZEROS>(sums, segment, w, place);
        else
            sum_units<4, ZEROS>(sums, segment, w, place);
    }

    /* A warpgroup without a strip only lets the stages go. */
    __device__ __forceinline__ void skip_segment(const fq_cuda_segment &segment,
                                                 ring_place &place) const {
        for (int unit = segment.begin; unit < segment.end; unit++, place.next()) {
            mbarrier_wait(full_of(place), place.parity);
            release(place);
        }
    }

    __device__ __forceinline__ void release(const ring_place &place) const {
        __syncwarp();
        if (lane == 0) {
            mbarrier_arrive(empty_of(place));
            if (!S::DIRECT)
                mbarrier_arrive_at(empty_of(place), half ^ 1);
        }
    }

    /* Eight rows of X at a time go through shared memory, so that results lie side by side. */
    __device__ __forceinline__ void store(const float (&sums)[S::QUADS * 4], int block) const {
        const bool gated = launch.gate.codes != nullptr;
        const int width = S::GROUPS * FQ_CUDA_STRIP / (gated ? 2 : 1); /* rows of W in Y */
        const int first = (block * FQ_CUDA_CLUSTER + half) * width;
        const uint32_t mine =
            out + lane % 4 * 2 * S::OUT_PITCH + (thread / 32 * FQ_CUDA_QUARTER + lane / 4) * 4;

        for (int eight = 0; eight * 8 < launch.m; eight++) {
            named_barrier(FQ_CUDA_BARRIER_CONSUMERS, S::CONSUMERS); /* the last eight are stored */
#pragma unroll
            for (int q = 0; q < S::QUADS; q++) {
                if (q != eight)
                    continue;
                sts_32(mine, sums[4 * q]);
                sts_32(mine + S::OUT_PITCH, sums[4 * q + 1]);
                sts_32(mine + 32, sums[4 * q + 2]);
                sts_32(mine + S::OUT_PITCH + 32, sums[4 * q + 3]);
            }
            named_barrier(FQ_CUDA_BARRIER_CONSUMERS, S::CONSUMERS);
            for (int i = thread; i < 8 * width / 4; i += S::CONSUMERS) {
                int row = i / (width / 4), column = i % (width / 4) * 4, m = eight * 8 + row;
                uint32_t at = out + row * S::OUT_PITCH + column * 4;

                if (m < launch.m && first + column < launch.w.n)
                    store_run<T, 4>(launch, gated ? at + width * 4 : at, at, launch.y_rows[m],
                                    launch.residual_rows[m], first + column);
            }
        }
    }

  public:
    __device__ __forceinline__ decoder(const fq_cuda_launch &l, uint32_t shared)
        : launch(l), ring(shared), full(shared + l.stages * l.stage_bytes),
          empty(full + l.stages * 8), out(empty + l.stages * 8), stage_bytes(l.stage_bytes),
          zeros_at(S::SCALES + S::GROUPS * l.slots * FQ_CUDA_SCALE_BYTES),
          worker(blockIdx.x / FQ_CUDA_CLUSTER), half(blockIdx.x % FQ_CUDA_CLUSTER),
          thread(threadIdx.x), lane(threadIdx.x % 32) {
    }

    __device__ __forceinline__ void init_barriers() const {
        for (int i = 0; i < launch.stages; i++) {
            mbarrier_init(full + i * 8, S::DIRECT ? 1 + 32 : 1);
            mbarrier_init(empty + i * 8, S::CONSUMERS / 32 * (S::DIRECT ? 1 : FQ_CUDA_CLUSTER));
        }
        mbarrier_fence_init();
    }

    /* Weights fill the ring before the kernels that made X are done. */
    __device__ __forceinline__ void produce() {
        const uint32_t to = place_of_copies();
        unit_cursor at(launch.shares, worker), of_x(launch.shares, worker);
        ring_place place(launch.stages), x_place(launch.stages);
        strip_copies copies = find_copies(at);
        auto put_next_weights = [&]() {
            put_weights(place, copies, to, tiles_of(at.unit));
            place.next();
            if (at.next())
                copies = find_copies(at);
        };
        auto put_next_x = [&]() {
            put_arranged(x_place, of_x.unit, tiles_of(of_x.unit));
            x_place.next();
            of_x.next();
        };

        for (int i = 0; i < launch.stages && at.valid; i++)
            put_next_weights();
        if (!S::DIRECT) {
            grid_wait();
            for (int i = 0; i < launch.stages && of_x.valid; i++)
                put_next_x();
        }
        while (at.valid) {
            mbarrier_wait(empty_of(place), place.parity ^ 1);
            put_next_weights();
            if (!S::DIRECT)
                put_next_x();
        }
    }

    __device__ __forceinline__ void produce_rows() {
        const uint32_t to = ring + lane / PIECES * S::X_PITCH + lane % PIECES * 16;
        const uint16_t *rows[ROW_LOADS];
        unit_cursor at(launch.shares, worker);
        ring_place place(launch.stages);

        grid_wait();
#pragma unroll
        for (int i = 0; i < ROW_LOADS; i++)
            rows[i] = static_cast<const uint16_t *>(
                launch.x_rows[min(i * ROWS_AT_ONCE + lane / PIECES, launch.m - 1)]);
        for (; at.valid; at.next(), place.next()) {
            mbarrier_wait(empty_of(place), place.parity ^ 1);
            put_rows(place, at.unit * (S::KT * FQ_CUDA_TILE) + lane % PIECES * 8, rows, to);
        }
    }

    __device__ __forceinline__ void consume() {
        const int group = thread / 128;
        const auto needed = [&](int q) { return q * 8 < launch.m; };
        ring_place place(launch.stages);
        fq_cuda_segment segment;

        for (int index = 0; fq_cuda_segment_at(&launch.shares, worker, index, &segment); index++) {
            const fq_cuda_matrix *w;
            float sums[S::QUADS * 4] = {};
            int strip;
            const bool present = find_strip(segment.block, group, w, strip);

            if (!present)
                skip_segment(segment, place);
            else if (w->zeros)
                sum_segment<true>(sums, segment, *w, place);
            else
                sum_segment<false>(sums, segment, *w, place);
            grid_wait(); /* the workspace and Y may be in use by the kernels before */
            if (segment.end < launch.shares.units) {
                leave_part<S::QUADS, S::CONSUMERS>({launch, worker, half, thread}, sums, thread,
                                                   needed);
                continue;
            }
            if (segment.begin > 0)
                add_parts<S::QUADS, S::CONSUMERS>(
                    launch, fq_cuda_first_worker(&launch.shares, segment.block), worker, half, sums,
                    thread, needed);
            store(sums, segment.block);
        }
    }
};

#endif /* FQ_HOPPER_CODE */

template <class S, class T>
__global__ void __launch_bounds__(S::THREADS, S::CTAS)
    hopper_decode(const __grid_constant__ fq_cuda_launch args) {
#ifdef FQ_HOPPER_CODE
    extern __shared__ uint8_t shared[];
    decoder<S, T> d(args, (smem_address(shared) + 1023) / 1024 * 1024);

    grid_launch_dependents();
    if (threadIdx.x == 0)
        d.init_barriers();
    __syncthreads();
    if (!S::DIRECT)
        cluster_sync();
    if (threadIdx.x >= S::CONSUMERS) {
        if (!S::DIRECT)
            registers_give<S::PRODUCER_REGISTERS>();
        if (threadIdx.x < S::CONSUMERS + 32)
            d.produce();
        else if (S::DIRECT)
            d.produce_rows();
    } else {
        if (!S::DIRECT)
            registers_take<S::CONSUMER_REGISTERS>();
        d.consume();
    }
    if (!S::DIRECT) {
        __syncwarp();
        cluster_sync(); /* the other CTA may still send to this one's shared memory */
    }
#endif
}

template <class S, class T>
static cudaError_t queue_decode(fq_cuda_launch args, cudaStream_t stream) {
    bool zeros = args.w.zeros || (args.gate.codes && args.gate.zeros);
    const int fixed = 1024 + S::OUT;

    args.stage_bytes = S::stage_bytes(args.slots, zeros);
    args.stages = (S::SHARED - fixed) / (args.stage_bytes + 16);
    args.stages = args.stages > 16 ? 16 : args.stages;
    return launch_overlapped(hopper_decode<S, T>, dim3(args.shares.workers * FQ_CUDA_CLUSTER),
                             S::THREADS, fixed + args.stages * (args.stage_bytes + 16),
                             S::DIRECT ? 1 : FQ_CUDA_CLUSTER, stream, args);
}

template <int BITS, class T>
static cudaError_t queue_decode_by_rows(const fq_cuda_launch &args, cudaStream_t stream) {
    if (args.m <= 8)
        return queue_decode<decode_shape<8, BITS>, T>(args, stream);
    if (args.m <= 16)
        return queue_decode<decode_shape<16, BITS>, T>(args, stream);
    if (args.m <= 32)
        return queue_decode<decode_shape<32, BITS>, T>(args, stream);
    return queue_decode<decode_shape<64, BITS>, T>(args, stream);
}

template <int BITS>
static cudaError_t queue_decode_any(const fq_cuda_launch &args, cudaStream_t stream) {
    return args.type == FQ_F16 ? queue_decode_by_rows<BITS, f16>(args, stream)
                               : queue_decode_by_rows<BITS, bf16>(args, stream);
}

template <int BITS, class T> static cudaError_t prepare_decode() {
    const void *kernels[] = {
        reinterpret_cast<const void *>(hopper_decode<decode_shape<8, BITS>, T>),
        reinterpret_cast<const void *>(hopper_decode<decode_shape<16, BITS>, T>),
        reinterpret_cast<const void *>(hopper_decode<decode_shape<32, BITS>, T>),
        reinterpret_cast<const void *>(hopper_decode<decode_shape<64, BITS>, T>),
    };

    for (const void *kernel : kernels) {
        cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 226 << 10);

        if (error != cudaSuccess)
            return error;
    }
    return cudaSuccess;
}

template <int BITS> static cudaError_t prepare_decode_any() {
    cudaError_t error = prepare_decode<BITS, f16>();

    return error == cudaSuccess ? prepare_decode<BITS, bf16>() : error;
}

#endif
