/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The decode path on Hopper, m ≤ FQ_DECODE_ROWS: bound by reading W once.
 *
 * A cluster of two CTAs has a run of strips of W and takes up to six of them, a block, at a time:
 * each CTA sums half of K, and the halves are added through shared memory.  No sums pass through
 * global memory, and no CTA waits for one that does not run beside it.
 *
 *                       K →
 *      strip 0   +-------+-------+
 *        ...     | CTA 0 | CTA 1 |   then CTA i adds and stores rows 32 i to 32 i + 31
 *      strip 5   +-------+-------+   of every strip
 *
 * A CTA has three consumer warpgroups of up to two strips each, `first` strips in slot 0 and the
 * others in slot 1; of a gated pair, slot 0 is the gate and slot 1 the same rows of W.  W is the
 * register operand of the tensor cores, rows of X are columns of theirs.  Sums of a group are
 * scaled in fp32.  mma.sync and wgmma of any width sum a column alike, and which CTA sums what does
 * not depend on m: a row's bits are the same alone and among 63 others.
 *
 * Up to 32 rows, X comes straight from the rows, and mma.sync multiplies.  With more rows, X is
 * first arranged (rows.cu), and multiplied by wgmma.  A CTA has a
 * multiprocessor to itself: of two of half the size, the next kernel of the stream could fill its
 * stages while this one ends; but after a kernel that leaves no room for one, two start on one
 * multiprocessor and none on another.
 */
#ifndef FQ_KERNELS_CUDA_HOPPER_DECODE_CUH
#define FQ_KERNELS_CUDA_HOPPER_DECODE_CUH

#include "hopper.cuh"

/* N: rows of X, rounded up; the constants are host code's too. */
template <int N_, int BITS_> struct decode_shape {
    static constexpr int N = N_, BITS = BITS_;
    static constexpr bool DIRECT = N <= FQ_CUDA_DIRECT_ROWS; /* X from its rows, mma.sync */
    static constexpr int GROUPS = FQ_CUDA_DECODE_GROUPS;     /* consumer warpgroups */
    static constexpr int SLOTS = FQ_CUDA_DECODE_SLOTS;       /* strips of each */
    static constexpr int CONSUMERS = 128 * GROUPS;
    /* A warp produces weights.  Where X comes row by row, one or two others do that; else the next
     * one.  Where registers are scarce producers are a warpgroup, for the consumers to be given its
     * registers: a CTA starts with 128 a thread, and setmaxnreg only moves them. */
    static constexpr int ROW_WARPS = N <= 8 ? 1 : 2;
    static constexpr int THREADS = CONSUMERS + (DIRECT ? 32 + 32 * ROW_WARPS : 128);
    static constexpr int PRODUCER_REGISTERS = 32, CONSUMER_REGISTERS = 160;
    static constexpr int SHARED = 226 << 10; /* bytes, at most: a multiprocessor's */
    static constexpr int SUMS = N / 2;       /* of a thread and strip */
    static constexpr int KT = FQ_CUDA_DECODE_STAGE_TILES(BITS); /* tiles of K in a stage */
    static constexpr int STRIP = KT * FQ_CUDA_TILE_BYTES(BITS); /* codes of a strip in a stage */
    /* Of a stage: X, the codes of each strip, then its scales, then its zero points.  X is rows, by
     * which ldmatrix hits all banks, or a tile as wgmma wants it. */
    static constexpr int X_PITCH = KT * 128 + 16;
    static constexpr int X_TILE = N * 128;
    static constexpr int CODES = DIRECT ? N * X_PITCH : KT * X_TILE;
    /* On the way out: where a CTA's rows of W, KEPT of each strip, lie side by side in fp32, for
     * some rows of X; and the other CTA's sums of them, N columns of each. */
    static constexpr int KEPT = FQ_CUDA_STRIP / FQ_CUDA_DECODE_SPLIT;
    static constexpr int OUT_PITCH = GROUPS * SLOTS * KEPT * 4 + 16;
    static constexpr int OUT_ROWS = N < 32 ? N : 32, OUT = OUT_ROWS * OUT_PITCH;
    static constexpr int IN = GROUPS * SLOTS * KEPT * N * 4;

    static __host__ __device__ int scales_at(int strips) {
        return CODES + strips * STRIP;
    }
    static __host__ __device__ int zeros_at(int strips, int slots) {
        return scales_at(strips) + strips * slots * FQ_CUDA_SCALE_BYTES;
    }
    static __host__ __device__ int stage_bytes(int strips, int slots, bool zeros) {
        int bytes = zeros_at(strips, slots) + strips * slots * zeros * FQ_CUDA_ZERO_BYTES;
        int align = DIRECT ? 128 : 1024;

        return (bytes + align - 1) / align * align;
    }
};

#ifdef FQ_HOPPER_CODE

template <class S, class T> class decoder {
    const fq_cuda_launch &launch;
    const uint32_t ring, full, empty, out; /* in shared memory */
    const uint32_t in;                     /* the other CTA's sums of this one's rows */
    const uint32_t ready, taken; /* barriers: they are there; the other CTA took this one's */
    const int stage_bytes;
    const int strips;     /* that a stage has room for */
    const int begin, end; /* this CTA's tiles of every block */
    const int cluster, rank;
    const int thread, lane;

    /* A block of this cluster. */
    struct block_place {
        int strip;         /* its first, of Y */
        int strips, first; /* how many, both of a pair's counted; those in slot 0 */

        __device__ __forceinline__ block_place(const decoder &d, int block) {
            const fq_cuda_launch &l = d.launch;
            const int count =
                fq_cuda_decode_strips(l.w.strips, l.clusters, l.blocks, d.cluster, block, &strip);

            strips = l.gate.codes ? 2 * count : count;
            first = l.gate.codes ? count : min(count, S::GROUPS);
        }
    };

    /* Which matrix and strip is the index-th of a block; false: there is none. */
    __device__ __forceinline__ bool find_strip(const block_place &block, int index,
                                               const fq_cuda_matrix *&w, int &strip) const {
        const bool gated = launch.gate.codes != nullptr;

        w = gated && index < block.first ? &launch.gate : &launch.w;
        strip = block.strip + (gated && index >= block.first ? index - block.first : index);
        return index < block.strips;
    }

    __device__ __forceinline__ uint32_t full_of(const ring_place &place) const {
        return full + place.stage * 8;
    }
    __device__ __forceinline__ uint32_t empty_of(const ring_place &place) const {
        return empty + place.stage * 8;
    }

    /* ---- Producers -------------------------------------------------------------------------- */

    /* A walk over the tiles of this CTA, block after block. */
    struct cursor {
        int block, tile;
        ring_place place;

        __device__ __forceinline__ explicit cursor(const decoder &d)
            : block(0), tile(d.begin), place(d.launch.stages) {
            if (d.begin == d.end)
                block = d.launch.blocks;
        }
        __device__ __forceinline__ bool valid(const decoder &d) const {
            return block < d.launch.blocks;
        }
        /* True where a new block begins. */
        __device__ __forceinline__ bool next(const decoder &d) {
            place.next();
            tile += S::KT;
            if (tile < d.end)
                return false;
            tile = d.begin;
            block++;
            return true;
        }
    };

    using copies = strip_copies<S::BITS, S::GROUPS * S::SLOTS, S::STRIP>;

    /* Of the strips of a block; of a gated pair, of the gate (slot 0) or of W (slot 1). */
    __device__ __forceinline__ copies copies_of(int of, int slot) const {
        const block_place block(*this, of);
        const bool gated = launch.gate.codes != nullptr;
        const int index = slot * block.first;

        return copies(gated && slot == 0 ? launch.gate : launch.w, block.strip,
                      gated ? block.first : block.strips, begin, ring + S::CODES + index * S::STRIP,
                      ring + S::scales_at(strips) + index * launch.slots * FQ_CUDA_SCALE_BYTES,
                      ring + S::zeros_at(strips, launch.slots) +
                          index * launch.slots * FQ_CUDA_ZERO_BYTES,
                      launch.slots);
    }

    /* X straight from its rows, on 16 bytes: a lane has the same 16-byte piece of every few rows,
     * ROW_STEP of them apart. */
    static constexpr int PIECES = S::KT * 8, ROWS_AT_ONCE = 32 / PIECES;
    static constexpr int ROW_STEP = ROWS_AT_ONCE * S::ROW_WARPS;
    static constexpr int ROW_LOADS = S::DIRECT ? S::N / ROW_STEP : 1;

    __device__ __forceinline__ void
    put_rows(const cursor &at, const uint16_t *const (&rows)[ROW_LOADS], uint32_t to) const {
        const int k = at.tile * FQ_CUDA_TILE + lane % PIECES * 8;

        to += at.place.stage * stage_bytes;
        if ((at.tile + S::KT) * FQ_CUDA_TILE <= launch.w.k) {
#pragma unroll
            for (int i = 0; i < ROW_LOADS; i++)
                if (i * ROW_STEP < launch.m)
                    cp_async_16(to + i * ROW_STEP * S::X_PITCH, rows[i] + k);
        } else {
            const int bytes = max(0, min(16, (launch.w.k - k) * 2));

#pragma unroll
            for (int i = 0; i < ROW_LOADS; i++)
                if (i * ROW_STEP < launch.m)
                    cp_async_16(to + i * ROW_STEP * S::X_PITCH, rows[i] + (bytes ? k : 0), bytes);
        }
        mbarrier_arrive_copies(full_of(at.place));
    }

    /* The arranged X of a stage. */
    __device__ __forceinline__ void put_arranged(const cursor &at) const {
        bulk_copy(ring + at.place.stage * stage_bytes,
                  static_cast<const uint8_t *>(launch.arranged) + (int64_t)at.tile * S::X_TILE,
                  min(S::KT, end - at.tile) * S::X_TILE, full_of(at.place));
    }

    /* ---- Consumers -------------------------------------------------------------------------- */

    /* Where a thread finds the codes and scales of one of its strips: addresses in the first stage;
     * and how to read them. */
    struct slot_place {
        uint32_t codes, scales, zeros;
        bool bf16_scales, has_zeros;
        group_phase groups;

        __device__ __forceinline__ slot_place(const decoder &d, const block_place &block, int slot,
                                              const fq_cuda_matrix &w)
            : bf16_scales(w.scale_bf16 != 0), has_zeros(w.zeros != nullptr), groups(w, d.begin) {
            const int index = d.thread / 128 + slot * block.first, warp = d.thread / 32 % 4;
            const int pair = warp * 8 + d.lane / 4, slots = d.launch.slots;

            codes = d.ring + S::CODES + index * S::STRIP + warp * FQ_CUDA_QUARTER_BYTES(S::BITS) +
                    lane_offset<S::BITS>(d.lane);
            scales =
                d.ring + S::scales_at(d.strips) + index * slots * FQ_CUDA_SCALE_BYTES + pair * 4;
            zeros = d.ring + S::zeros_at(d.strips, slots) + index * slots * FQ_CUDA_ZERO_BYTES +
                    pair * 2;
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

    using strip_sums = float[S::SUMS];

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
    sum_tiles_directly(strip_sums (&sums)[S::SLOTS], const slot_place (&at)[S::SLOTS],
                       uint32_t stage, int of, uint32_t x_place) const {
        constexpr int STEPS = FQ_CUDA_STEPS / SEGMENTS; /* of a segment */
        lane_codes<S::BITS> codes[TILES][SLOTS];
        uint32_t x[TILES][S::N / 8][4]; /* two steps */
        float part[TILES][SLOTS][S::N / 8][4];

        x_place += stage + of * 128;
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

                        fragment<S::BITS, T>(a, codes[t][s], step, zero[t][s]);
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
                fragment<S::BITS, T>(a[s], codes, segment * STEPS + s, zero);
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

    /* All tiles of a block. */
    template <int SLOTS, int SEGMENTS, bool ZEROS>
    __device__ __forceinline__ void sum_tiles(strip_sums (&sums)[S::SLOTS],
                                              slot_place (&at)[S::SLOTS], uint32_t x,
                                              ring_place &place) const {
        /* tiles at a time, by the registers there are */
        constexpr int TOGETHER = S::N <= 16 && SEGMENTS == 1 ? S::KT : 1;

        for (int tile = begin; tile < end; tile += S::KT, place.next()) {
            const uint32_t stage = place.stage * stage_bytes;

            mbarrier_wait(full_of(place), place.parity);
            if constexpr (!S::DIRECT) {
                for (int of = 0; of < S::KT && tile + of < end; of++)
#pragma unroll
                    for (int s = 0; s < SLOTS; s++)
                        sum_tile<SEGMENTS, ZEROS>(sums[s], at[s], stage, of, x);
            } else if (TOGETHER > 1 && tile + TOGETHER <= end) {
                sum_tiles_directly<SLOTS, TOGETHER, SEGMENTS, ZEROS>(sums, at, stage, 0, x);
            } else {
                for (int of = 0; of < S::KT && tile + of < end; of++)
                    sum_tiles_directly<SLOTS, 1, SEGMENTS, ZEROS>(sums, at, stage, of, x);
            }
            release(place);
#pragma unroll
            for (int s = 0; s < SLOTS; s++)
                at[s].groups.advance(S::KT * FQ_CUDA_STEPS);
        }
    }

    /*
     * The same by wgmma where a tile has one scale a row.  The next strip, of this tile or the next
     * one, is dequantized while the tensor cores are at this one.
     */
    template <int SLOTS, bool ZEROS>
    __device__ __forceinline__ void sum_tiles_ahead(strip_sums (&sums)[S::SLOTS],
                                                    slot_place (&at)[S::SLOTS], uint32_t x,
                                                    ring_place &place) const {
        const int items = (end - begin) * SLOTS;
        uint32_t stage = place.stage * stage_bytes;
        uint32_t a[2][FQ_CUDA_STEPS][4];
        int of = 0; /* tile of the stage */
        auto dequantize = [&](uint32_t(&to)[FQ_CUDA_STEPS][4], const slot_place &from) {
            const zero_terms<S::BITS, T> zero =
                from.template load_zeros<ZEROS>(stage, of * FQ_CUDA_STEPS);
            const lane_codes<S::BITS> codes = from.load_codes(stage, of);

#pragma unroll
            for (int step = 0; step < FQ_CUDA_STEPS; step++)
                fragment<S::BITS, T>(to[step], codes, step, zero);
        };

        if (items == 0)
            return;
        mbarrier_wait(full_of(place), place.parity);
        dequantize(a[0], at[0]);
        for (int item = 0; item < items; item += 2) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                constexpr int LAST = SLOTS - 1;
                const int slot = SLOTS == 2 ? i : 0; /* known when compiled */
                const ring_place here = place;
                strip_sums part;

                if (item + i >= items)
                    break;
                const uint32_t scale = at[slot].load_scales(stage, of * FQ_CUDA_STEPS);
                const uint32_t x_place = x + stage / 16 + of * (S::X_TILE / 16);
                /* with this stage: its last tile, or K's */
                const bool done = slot == LAST && (of + 1 == S::KT || item + i + 1 == items);

#pragma unroll
                for (int step = 0; step < FQ_CUDA_STEPS; step++)
                    settle(a[i][step]);
                wgmma_fence();
#pragma unroll
                for (int step = 0; step < FQ_CUDA_STEPS; step++)
                    wgmma<S::N>::template mma<T>(
                        part, a[i][step], wgmma_descriptor(x_place + step * WGMMA_STEP), step > 0);
                wgmma_commit();
                if (slot == LAST)
                    of++;
                if (done) {
                    of = 0;
                    place.next();
                    stage = place.stage * stage_bytes;
#pragma unroll
                    for (int s = 0; s < SLOTS; s++)
                        at[s].groups.advance(S::KT * FQ_CUDA_STEPS);
                }
                if (item + i + 1 < items) {
                    if (done)
                        mbarrier_wait(full_of(place), place.parity);
                    dequantize(a[1 - i], at[slot == LAST ? 0 : LAST]);
                }
                wgmma_wait<0>();
                settle(part);
                if (done)
                    release(here);
                add_scaled(sums[slot], part, unpack_scales(scale, at[slot].bf16_scales));
            }
        }
    }

    template <int SLOTS, bool ZEROS>
    __device__ __forceinline__ void sum_block(strip_sums (&sums)[S::SLOTS],
                                              slot_place (&at)[S::SLOTS], int segments_log2,
                                              uint32_t x, ring_place &place) const {
        if (segments_log2 == 0) {
            if constexpr (S::DIRECT)
                sum_tiles<SLOTS, 1, ZEROS>(sums, at, x, place);
            else
                sum_tiles_ahead<SLOTS, ZEROS>(sums, at, x, place);
        } else if (segments_log2 == 1) {
            sum_tiles<SLOTS, 2, ZEROS>(sums, at, x, place);
        } else {
            sum_tiles<SLOTS, 4, ZEROS>(sums, at, x, place);
        }
    }

    /* A warpgroup without a strip only lets the stages go. */
    __device__ __forceinline__ void skip_block(ring_place &place) const {
        for (int tile = begin; tile < end; tile += S::KT, place.next()) {
            mbarrier_wait(full_of(place), place.parity);
            release(place);
        }
    }

    __device__ __forceinline__ void release(const ring_place &place) const {
        __syncwarp();
        if (lane == 0)
            mbarrier_arrive(empty_of(place));
    }

    /* ---- The way out ------------------------------------------------------------------------ */

    /* The warps whose rows this CTA stores: two of each warpgroup, 32 rows of every strip.  The
     * other CTA's same warps send their sums, thread by thread. */
    static constexpr int KEEPERS = S::CONSUMERS / FQ_CUDA_DECODE_SPLIT;

    __device__ __forceinline__ bool keeps() const {
        return thread / 64 % FQ_CUDA_DECODE_SPLIT == rank;
    }
    /* Of KEEPERS; of those that send, the one in the other CTA. */
    __device__ __forceinline__ int keeper() const {
        return thread / 128 * 64 + thread % 64;
    }
    __device__ __forceinline__ bool has_strip(const block_place &block, int slot) const {
        return thread / 128 < block.first && thread / 128 + slot * block.first < block.strips;
    }
    __device__ __forceinline__ uint32_t parcel(int slot, int quad) const {
        return in + ((slot * (S::N / 8) + quad) * KEEPERS + keeper()) * 16;
    }

    __device__ __forceinline__ void send_sums(const strip_sums (&sums)[S::SLOTS],
                                              const block_place &block) const {
        const uint32_t barrier = cluster_address(ready, rank ^ 1);

#pragma unroll
        for (int s = 0; s < S::SLOTS; s++)
#pragma unroll
            for (int q = 0; q < S::N / 8; q++)
                if (has_strip(block, s) && q * 8 < launch.m)
                    cluster_send(cluster_address(parcel(s, q), rank ^ 1), sums[s] + 4 * q, barrier);
    }

    /* Bytes that the other CTA sends for a block. */
    __device__ __forceinline__ uint32_t parcel_bytes(const block_place &block) const {
        return block.strips * 64 * ((launch.m + 7) / 8) * 16;
    }

    /* Adds what the other CTA sent, and puts the sums where they lie side by side. */
    __device__ __forceinline__ void add_sums(const strip_sums (&sums)[S::SLOTS],
                                             const block_place &block, int row0) const {
        const uint32_t mine =
            out + lane % 4 * 2 * S::OUT_PITCH +
            (thread / 128 * S::KEPT + thread / 32 % 2 * FQ_CUDA_QUARTER + lane / 4) * 4;

#pragma unroll
        for (int s = 0; s < S::SLOTS; s++)
#pragma unroll
            for (int q = 0; q < S::N / 8; q++) {
                const uint32_t to =
                    mine + s * block.first * S::KEPT * 4 + (q * 8 - row0) * S::OUT_PITCH;
                float4 other;

                if (!has_strip(block, s) || q * 8 < row0 || q * 8 >= row0 + S::OUT_ROWS ||
                    q * 8 >= launch.m)
                    continue;
                other = lds_f4(parcel(s, q));
                sts_32(to, sums[s][4 * q] + other.x);
                sts_32(to + S::OUT_PITCH, sums[s][4 * q + 1] + other.y);
                sts_32(to + 32, sums[s][4 * q + 2] + other.z);
                sts_32(to + S::OUT_PITCH + 32, sums[s][4 * q + 3] + other.w);
            }
    }

    /* This CTA's rows of a block, for rows row0.. of X. */
    __device__ __forceinline__ void store_rows(const block_place &block, int row0) const {
        constexpr int RUNS = S::KEPT / 4; /* of four rows of W, in a strip */
        const bool gated = launch.gate.codes != nullptr;
        const int of_y = gated ? block.first : block.strips; /* strips of Y */
        const int rows = min(S::OUT_ROWS, launch.m - row0);

        for (int i = keeper(); i < rows * of_y * RUNS; i += KEEPERS) {
            const int run = i % (of_y * RUNS), m = row0 + i / (of_y * RUNS);
            const int strip = run / RUNS, row = run % RUNS * 4;
            const int n = (block.strip + strip) * FQ_CUDA_STRIP + rank * S::KEPT + row;
            const uint32_t at = out + (m - row0) * S::OUT_PITCH + (strip * S::KEPT + row) * 4;
            float v[4], gate[4];

            if (n >= launch.w.n)
                continue;
            *reinterpret_cast<float4 *>(gate) = lds_f4(at);
            *reinterpret_cast<float4 *>(v) = lds_f4(gated ? at + block.first * S::KEPT * 4 : at);
            store_run<T, 4>(launch, v, gate, launch.y_rows[m], launch.residual_rows[m], n);
        }
    }

    /* i: of the cluster's blocks. */
    __device__ __forceinline__ void combine(const strip_sums (&sums)[S::SLOTS],
                                            const block_place &block, int i) const {
        if (!keeps()) {
            if (i > 0)
                mbarrier_wait(taken, (i - 1) & 1);
            send_sums(sums, block);
            return;
        }
        if (keeper() == 0)
            mbarrier_expect(ready, parcel_bytes(block));
        mbarrier_wait(ready, i & 1);
        for (int row0 = 0; row0 < launch.m; row0 += S::OUT_ROWS) {
            named_barrier(FQ_CUDA_BARRIER_CONSUMERS, KEEPERS); /* the last rows are stored */
            add_sums(sums, block, row0);
            named_barrier(FQ_CUDA_BARRIER_CONSUMERS, KEEPERS);
            store_rows(block, row0);
        }
        /* after the last block the other CTA may be gone */
        if (i + 1 < launch.blocks && keeper() == 0)
            mbarrier_arrive_at(taken, rank ^ 1);
    }

  public:
    __device__ __forceinline__ decoder(const fq_cuda_launch &l, uint32_t shared)
        : launch(l), ring(shared), full(shared + l.stages * l.stage_bytes),
          empty(full + l.stages * 8), out(empty + l.stages * 8 + 16), in(out + S::OUT),
          ready(empty + l.stages * 8), taken(ready + 8), stage_bytes(l.stage_bytes),
          strips(l.block_strips * (l.gate.codes ? 2 : 1)),
          begin(fq_cuda_decode_tile(l.w.tiles, blockIdx.x % FQ_CUDA_DECODE_SPLIT)),
          end(fq_cuda_decode_tile(l.w.tiles, blockIdx.x % FQ_CUDA_DECODE_SPLIT + 1)),
          cluster(blockIdx.x / FQ_CUDA_DECODE_SPLIT), rank(blockIdx.x % FQ_CUDA_DECODE_SPLIT),
          thread(threadIdx.x), lane(threadIdx.x % 32) {
    }

    __device__ __forceinline__ void init_barriers() const {
        for (int i = 0; i < launch.stages; i++) {
            mbarrier_init(full + i * 8, S::DIRECT ? 1 + 32 * S::ROW_WARPS : 2);
            mbarrier_init(empty + i * 8, S::CONSUMERS / 32);
        }
        mbarrier_init(ready, 1);
        mbarrier_init(taken, 1);
        mbarrier_fence_init();
    }

    /*
     * The two producers part the work by what it costs them: where X comes row by row, a warp has
     * that, and a thread the weights; where it is arranged, a thread has the codes and another one
     * the scales and X.  Weights fill the ring before the kernels that made X are done.
     */
    template <bool CODES, bool SCALES, bool GATED> struct weights_producer {
        const decoder &d;
        cursor at;
        copies one, two; /* two: of W, where one is the gate */

        __device__ __forceinline__ explicit weights_producer(const decoder &of)
            : d(of), at(of), one(of.copies_of(0, 0)), two(of.copies_of(0, GATED)) {
        }
        /* The next stage, and, by the thread that puts scales, X beside it. */
        __device__ __forceinline__ void put() {
            const int tiles = min(S::KT, d.end - at.tile);
            const uint32_t barrier = d.full_of(at.place);
            const uint32_t stage = at.place.stage * d.stage_bytes;
            const uint32_t groups_one = one.groups_of(tiles), groups_two = two.groups_of(tiles);
            uint32_t all = SCALES && !S::DIRECT ? tiles * S::X_TILE : 0;

            if (CODES)
                all += one.code_bytes(tiles) + (GATED ? two.code_bytes(tiles) : 0);
            if (SCALES)
                all += one.scale_bytes(groups_one) + (GATED ? two.scale_bytes(groups_two) : 0);
            mbarrier_expect(barrier, all);
            if (CODES) {
                one.put_codes(stage, tiles, barrier);
                if (GATED)
                    two.put_codes(stage, tiles, barrier);
            }
            if (SCALES) {
                one.put_scales(stage, tiles, groups_one, barrier);
                if (GATED)
                    two.put_scales(stage, tiles, groups_two, barrier);
            }
            if (at.next(d) && at.valid(d)) {
                one = d.copies_of(at.block, 0);
                if (GATED)
                    two = d.copies_of(at.block, 1);
            }
        }
    };

    template <bool GATED> __device__ __forceinline__ void put_all_weights() const {
        weights_producer<true, S::DIRECT, GATED> weights(*this);

        while (weights.at.valid(*this)) {
            mbarrier_wait(empty_of(weights.at.place), weights.at.place.parity ^ 1);
            weights.put();
        }
    }

    template <bool GATED> __device__ __forceinline__ void put_all_scales_and_x() const {
        weights_producer<false, true, GATED> weights(*this);
        cursor of_x(*this);

        for (int i = 0; i < launch.stages && weights.at.valid(*this); i++)
            weights.put();
        grid_wait();
        for (int i = 0; i < launch.stages && of_x.valid(*this); i++, of_x.next(*this))
            put_arranged(of_x);
        while (weights.at.valid(*this)) {
            mbarrier_wait(empty_of(of_x.place), of_x.place.parity ^ 1);
            weights.put();
            put_arranged(of_x);
            of_x.next(*this);
        }
    }

    /* By a thread. */
    __device__ __forceinline__ void produce_weights() const {
        if (launch.gate.codes)
            put_all_weights<true>();
        else
            put_all_weights<false>();
    }

    /* By a thread. */
    __device__ __forceinline__ void produce_scales_and_x() const {
        if (launch.gate.codes)
            put_all_scales_and_x<true>();
        else
            put_all_scales_and_x<false>();
    }

    /* By a warp, or by two. */
    __device__ __forceinline__ void produce_rows() const {
        const int first = (thread - S::CONSUMERS - 32) / 32 * ROWS_AT_ONCE + lane / PIECES;
        const uint32_t to = ring + first * S::X_PITCH + lane % PIECES * 16;
        const uint16_t *rows[ROW_LOADS];
        cursor at(*this);

        grid_wait();
#pragma unroll
        for (int i = 0; i < ROW_LOADS; i++)
            rows[i] = static_cast<const uint16_t *>(
                launch.x_rows[min(i * ROW_STEP + first, launch.m - 1)]);
        for (; at.valid(*this); at.next(*this)) {
            mbarrier_wait(empty_of(at.place), at.place.parity ^ 1);
            put_rows(at, rows, to);
        }
    }

    __device__ __forceinline__ void consume() const {
        const int group = thread / 128;
        const uint32_t x =
            S::DIRECT ? ring + lane % 8 * S::X_PITCH + lane / 8 * 16 : wgmma_tile(ring);
        ring_place place(launch.stages);

        cluster_wait(); /* the barriers of all its CTAs are there */
        for (int i = 0; i < launch.blocks; i++) {
            const block_place block(*this, i);
            const fq_cuda_matrix *w[S::SLOTS];
            strip_sums sums[S::SLOTS] = {};
            int strip;
            const bool one = find_strip(block, group, w[0], strip) && group < block.first;
            const bool two = find_strip(block, group + block.first, w[1], strip) && one;
            slot_place at[S::SLOTS] = {{*this, block, 0, *w[0]}, {*this, block, 1, *w[1]}};
            const int segments = max(w[0]->slots_log2, w[1]->slots_log2);
            const bool zeros = w[0]->zeros || w[1]->zeros;

            if (!one)
                skip_block(place);
            else if (two && zeros)
                sum_block<2, true>(sums, at, segments, x, place);
            else if (two)
                sum_block<2, false>(sums, at, segments, x, place);
            else if (zeros)
                sum_block<1, true>(sums, at, segments, x, place);
            else
                sum_block<1, false>(sums, at, segments, x, place);
            grid_wait(); /* Y may be in use by the kernels before */
            combine(sums, block, i);
        }
    }
};

#endif /* FQ_HOPPER_CODE */

template <class S, class T>
__global__ void __launch_bounds__(S::THREADS, 1)
    hopper_decode(const __grid_constant__ fq_cuda_launch args) {
#ifdef FQ_HOPPER_CODE
    extern __shared__ uint8_t shared[];
    decoder<S, T> d(args, (smem_address(shared) + 1023) / 1024 * 1024);

    grid_launch_dependents();
    if (threadIdx.x == 0)
        d.init_barriers();
    __syncthreads();
    cluster_arrive();
    if (threadIdx.x >= S::CONSUMERS) {
        if (!S::DIRECT)
            registers_give<S::PRODUCER_REGISTERS>();
        if (threadIdx.x < S::CONSUMERS + 32) {
            if (elect_one())
                d.produce_weights();
        } else if (S::DIRECT) {
            d.produce_rows();
        } else if (threadIdx.x < S::CONSUMERS + 64) {
            if (elect_one())
                d.produce_scales_and_x();
        }
        __syncwarp();
        cluster_wait();
    } else {
        if (!S::DIRECT)
            registers_take<S::CONSUMER_REGISTERS>();
        d.consume();
    }
#endif
}

template <class S, class T>
static cudaError_t queue_decode(fq_cuda_launch args, cudaStream_t stream) {
    const bool gated = args.gate.codes != nullptr;
    const bool zeros = args.w.zeros || (gated && args.gate.zeros);
    const int fixed = 1024 + 16 + S::OUT + S::IN;

    args.stage_bytes = S::stage_bytes(args.block_strips * (gated ? 2 : 1), args.slots, zeros);
    args.stages = (S::SHARED - fixed) / (args.stage_bytes + 16);
    args.stages = args.stages > 16 ? 16 : args.stages;
    return launch_overlapped(hopper_decode<S, T>, dim3(args.clusters * FQ_CUDA_DECODE_SPLIT),
                             S::THREADS, fixed + args.stages * (args.stage_bytes + 16),
                             FQ_CUDA_DECODE_SPLIT, stream, args);
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
