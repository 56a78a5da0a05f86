/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The decode path on Hopper, m ≤ FQ_DECODE_ROWS: bound by reading W once.
 *
 * A CTA sums 256 rows of W: four consumer warpgroups of one strip each, or, for a
 * gated pair, two of the gate's strips and two of the same rows of W.  The other
 * CTA of the worker (shares.h) has the next 256 rows and the same units of K.  W is
 * wgmma's register operand, X its shared one, so that the rows of X are columns and
 * a narrow wgmma costs no more than its rows are worth.  Sums of a group are
 * scaled in fp32.  A wgmma of any width sums a column alike, and shares do not
 * depend on m: a row's bits are the same alone and among 63 others.
 *
 * Up to 16 rows, X comes straight from the rows by the producer's cp.async, and the
 * kernel takes half of a multiprocessor, so that the next one of the stream can
 * fill its stages while this one ends.  With more rows, X would be read from L2 as
 * often as there are CTAs, and that would take as long as W does: it is first
 * arranged (rows.cu) and then sent to both CTAs of the cluster at once.
 */
#ifndef FQ_KERNELS_CUDA_HOPPER_DECODE_CUH
#define FQ_KERNELS_CUDA_HOPPER_DECODE_CUH

#include "hopper.cuh"

/* N: rows of X, rounded up; the constants are host code's too. */
template <int N_, int BITS_> struct decode_shape {
    static constexpr int N = N_, BITS = BITS_;
    static constexpr bool DIRECT = N <= 16;      /* X straight from its rows */
    static constexpr int KT = BITS == 8 ? 1 : 2; /* tiles of K in a stage, a unit of the shares */
    static constexpr int GROUPS = 4;             /* consumer warpgroups, a strip each */
    static constexpr int CONSUMERS = 128 * GROUPS, THREADS = CONSUMERS + 32;
    static constexpr int CTAS = DIRECT ? 2 : 1; /* that fit a multiprocessor */
    static constexpr int QUADS = N / 8;         /* float4 of sums that a thread has */
    static constexpr int STRIP = KT * FQ_CUDA_TILE_BYTES(BITS); /* codes of a strip in a stage */
    /* Of a stage: X, the codes of each strip, then its scales, then its zero points. */
    static constexpr int X_TILE = N * 128;
    static constexpr int CODES = KT * X_TILE, SCALES = CODES + GROUPS * STRIP;
    /* Where sums change their order on the way out: 8 rows of X by the CTA's rows of W. */
    static constexpr int OUT_PITCH = GROUPS * FQ_CUDA_STRIP * 4 + 16, OUT = 8 * OUT_PITCH;
    /* Segments of a tile whose sums are kept apart at a time, by the registers there are. */
    static constexpr int PARTS = N == 8 ? 2 : 1;

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
    bool &last;

    /* ---- The producer's warp ------------------------------------------------------------------
     */

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

    /* A lane's copy of each stage: 0 to 3 codes of a strip, then its scales, then its zeros; the
     * lane after them X. */
    struct lane_copy {
        const uint8_t *from; /* of the strip or of X; NULL: none */
        const fq_cuda_matrix *w;
        uint32_t to; /* in a stage */
        int kind;    /* 0 codes, 1 scales, 2 zeros, 3 X */
    };

    __device__ __forceinline__ lane_copy find_copy(int block) const {
        lane_copy copy = {nullptr, &launch.w, 0, lane / S::GROUPS};
        int group = lane % S::GROUPS, strip;

        if (copy.kind < 3) {
            bool present = find_strip(block, group, copy.w, strip);
            strip_source source(*copy.w, strip, present);

            copy.from = copy.kind == 0   ? source.codes
                        : copy.kind == 1 ? source.scales
                                         : source.zeros;
            copy.to = copy.kind == 0   ? S::CODES + group * S::STRIP
                      : copy.kind == 1 ? S::SCALES + group * launch.slots * FQ_CUDA_SCALE_BYTES
                                       : zeros_at + group * launch.slots * FQ_CUDA_ZERO_BYTES;
        } else if (!S::DIRECT && lane == 3 * S::GROUPS) {
            copy.from = static_cast<const uint8_t *>(launch.arranged);
        }
        return copy;
    }

    __device__ __forceinline__ void put_weights(const ring_place &place, const lane_copy &copy,
                                                int unit) const {
        const uint32_t to = ring + place.stage * stage_bytes + copy.to, barrier = full_of(place);
        const int tiles = tiles_of(unit);
        uint32_t bytes = 0, expected = 0;
        const uint8_t *from = copy.from;

        if (from && copy.kind == 0) {
            expected = bytes = tiles * FQ_CUDA_TILE_BYTES(S::BITS);
            from += (int64_t)unit * S::STRIP;
        } else if (from && copy.kind < 3) {
            group_span span(*copy.w, unit * S::KT, tiles);
            int size = copy.kind == 1 ? FQ_CUDA_SCALE_BYTES : FQ_CUDA_ZERO_BYTES;

            expected = bytes = span.count * size;
            from += (int64_t)span.first * size;
        } else if (from) {
            expected = tiles * S::X_TILE; /* of which this CTA sends one half */
        }
        expected = __reduce_add_sync(0xffffffffu, expected);
        if (lane == 0)
            mbarrier_expect(barrier, expected);
        __syncwarp();
        if (bytes)
            bulk_copy(to, from, bytes, barrier);
    }

    /* The arranged X of a unit: both CTAs of the cluster send one half to both. */
    __device__ __forceinline__ void put_arranged(const ring_place &place, const lane_copy &copy,
                                                 int unit) const {
        uint32_t bytes = tiles_of(unit) * (S::X_TILE / FQ_CUDA_CLUSTER);

        if (lane == 3 * S::GROUPS)
            bulk_copy_multicast(ring + place.stage * stage_bytes + half * bytes,
                                copy.from + (int64_t)unit * S::KT * S::X_TILE + half * bytes, bytes,
                                full_of(place), (1 << FQ_CUDA_CLUSTER) - 1);
    }

    /* X of a unit by cp.async: a lane has the same 16-byte piece of every second or fourth row. */
    static constexpr int PIECES = S::KT * 8, ROWS_AT_ONCE = 32 / PIECES;

    __device__ __forceinline__ void put_rows(const ring_place &place, int unit) const {
        const int piece = lane % PIECES, row = lane / PIECES;
        const int k = unit * (S::KT * FQ_CUDA_TILE) + piece * 8;
        const int bytes = max(0, min(16, (launch.w.k - k) * 2));
        const uint32_t to = ring + place.stage * stage_bytes + piece / 8 * S::X_TILE;

        for (int m = row; m < launch.m; m += ROWS_AT_ONCE)
            cp_async_16(to + wgmma_piece(m, piece % 8),
                        static_cast<const uint16_t *>(launch.x_rows[m]) + (bytes ? k : 0), bytes);
        mbarrier_arrive_copies(full_of(place));
    }

    __device__ __forceinline__ uint32_t full_of(const ring_place &place) const {
        return full + place.stage * 8;
    }
    __device__ __forceinline__ uint32_t empty_of(const ring_place &place) const {
        return empty + place.stage * 8;
    }

    /* ---- A consumer warpgroup ------------------------------------------------------------------
     */

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
            x = wgmma_tile(d.ring);
        }
    };

    /* One tile: its SEGMENTS parts of equal scale are summed apart, then scaled.  stage: bytes from
     * the first stage to this one; step0: the tile's first step, counted from the stage's. */
    template <int SEGMENTS, bool ZEROS>
    __device__ __forceinline__ void
    sum_tile(float (&sums)[S::QUADS * 4], const lane_codes<S::BITS> &codes, const lane_place &at,
             uint32_t stage, int step0, const group_phase &groups, bool bf16_scales) const {
        constexpr int STEPS = FQ_CUDA_STEPS / SEGMENTS; /* of a segment */
        constexpr int PARTS = S::PARTS < SEGMENTS ? S::PARTS : SEGMENTS;
        const uint32_t x = at.x + stage / 16 + step0 / FQ_CUDA_STEPS * (S::X_TILE / 16);

#pragma unroll
        for (int segment = 0; segment < SEGMENTS; segment += PARTS) {
            float part[PARTS][S::QUADS * 4];
            uint32_t a[PARTS * STEPS][4];
            float2 scale[PARTS];

#pragma unroll
            for (int i = 0; i < PARTS; i++) {
                const int slot = groups.slot(step0 + (segment + i) * STEPS);
                zero_terms<S::BITS, T> zero = middle_zeros<S::BITS, T>();

                scale[i] = unpack_scales(lds_32(at.scales + stage + slot * FQ_CUDA_SCALE_BYTES),
                                         bf16_scales);
                if (ZEROS)
                    zero = unpack_zeros<S::BITS, T>(
                        lds_16(at.zeros + stage + slot * FQ_CUDA_ZERO_BYTES));
#pragma unroll
                for (int s = 0; s < STEPS; s++)
                    fragment<S::BITS, T>(a[i * STEPS + s], codes, (segment + i) * STEPS + s, zero);
            }
#pragma unroll
            for (int i = 0; i < PARTS * STEPS; i++)
                settle(a[i]);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < PARTS; i++)
#pragma unroll
                for (int s = 0; s < STEPS; s++)
                    wgmma<S::N>::template mma<T>(
                        part[i], a[i * STEPS + s],
                        wgmma_descriptor(x + ((segment + i) * STEPS + s) * WGMMA_STEP), s > 0);
            wgmma_commit();
            wgmma_wait<0>();
#pragma unroll
            for (int i = 0; i < PARTS; i++)
                settle(part[i]);
#pragma unroll
            for (int i = 0; i < PARTS; i++)
#pragma unroll
                for (int j = 0; j < S::QUADS * 4; j++)
                    sums[j] = fmaf(part[i][j], j & 2 ? scale[i].y : scale[i].x, sums[j]);
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
            if (S::DIRECT)
                fence_async_proxy();
#pragma unroll
            for (int of = 0; of < S::KT; of++)
                if (of == 0 || of < tiles)
                    sum_tile<SEGMENTS, ZEROS>(
                        sums,
                        load_codes<S::BITS>(at.codes + stage + of * FQ_CUDA_TILE_BYTES(S::BITS)),
                        at, stage, of * FQ_CUDA_STEPS, groups, bf16_scales);
            release(place);
            groups.advance(S::KT * FQ_CUDA_STEPS);
            tiles -= S::KT;
            place.next();
        }
    }

    template <bool ZEROS>
    __device__ __forceinline__ void sum_segment(float (&sums)[S::QUADS * 4],
                                                const fq_cuda_segment &segment,
                                                const fq_cuda_matrix &w, ring_place &place) const {
        if (w.slots_log2 == 0)
            sum_units<1, ZEROS>(sums, segment, w, place);
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
    __device__ __forceinline__ decoder(const fq_cuda_launch &l, uint32_t shared, bool &l_last)
        : launch(l), ring(shared), full(shared + l.stages * l.stage_bytes),
          empty(full + l.stages * 8), out(empty + l.stages * 8), stage_bytes(l.stage_bytes),
          zeros_at(S::SCALES + S::GROUPS * l.slots * FQ_CUDA_SCALE_BYTES),
          worker(blockIdx.x / FQ_CUDA_CLUSTER), half(blockIdx.x % FQ_CUDA_CLUSTER),
          thread(threadIdx.x), lane(threadIdx.x % 32), last(l_last) {
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
        unit_cursor of_w(launch.shares, worker), of_x(launch.shares, worker);
        ring_place w_place(launch.stages), x_place(launch.stages);
        lane_copy copy = find_copy(of_w.valid ? of_w.segment.block : 0);
        auto put_next_weights = [&]() {
            put_weights(w_place, copy, of_w.unit);
            w_place.next();
            if (of_w.next() && of_w.valid)
                copy = find_copy(of_w.segment.block);
        };

        for (int i = 0; i < launch.stages && of_w.valid; i++)
            put_next_weights();
        grid_wait();
        for (int i = 0; of_x.valid; i++, of_x.next(), x_place.next()) {
            if (i >= launch.stages) {
                mbarrier_wait(empty_of(w_place), w_place.parity ^ 1);
                put_next_weights();
            }
            if constexpr (S::DIRECT)
                put_rows(x_place, of_x.unit);
            else
                put_arranged(x_place, copy, of_x.unit);
        }
    }

    __device__ __forceinline__ void consume() {
        const int group = thread / 128;
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
            if (segment.end - segment.begin < launch.shares.units &&
                !add_parts<S::QUADS, S::CONSUMERS>(launch, worker, half, segment, sums, thread,
                                                   last, [&](int q) { return q * 8 < launch.m; }))
                continue;
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
    __shared__ bool last;
    decoder<S, T> d(args, (smem_address(shared) + 1023) / 1024 * 1024, last);

    grid_launch_dependents();
    if (threadIdx.x == 0)
        d.init_barriers();
    __syncthreads();
    if (!S::DIRECT)
        cluster_sync();
    if (threadIdx.x >= S::CONSUMERS)
        d.produce();
    else
        d.consume();
    if (!S::DIRECT) {
        __syncwarp();
        cluster_sync(); /* the other CTA may still send to this one's shared memory */
    }
#endif
}

template <class S, class T>
static cudaError_t queue_decode(fq_cuda_launch args, cudaStream_t stream) {
    const int budget = S::DIRECT ? 112 << 10 : 226 << 10;
    bool zeros = args.w.zeros || (args.gate.codes && args.gate.zeros);
    const int fixed = 1024 + S::OUT;

    args.stage_bytes = S::stage_bytes(args.slots, zeros);
    args.stages = (budget - fixed) / (args.stage_bytes + 16);
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
