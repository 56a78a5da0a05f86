/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The producers of hopper-decode.cuh: what fills the stages of the ring, as many ahead as there
 * are.
 */
#ifndef FQ_KERNELS_CUDA_HOPPER_DECODE_PRODUCE_CUH
#define FQ_KERNELS_CUDA_HOPPER_DECODE_PRODUCE_CUH

#include "hopper-decode-cta.cuh"

#ifdef FQ_HOPPER_CODE

template <class S> class decode_producer {
    using block_place = typename decode_cta<S>::block_place;
    const decode_cta<S> &cta;
    const void *const x_map; /* the tensor map of X, where launch.x_mapped */

    /* A walk over the stages of this CTA, block after block.  WAY is none of parting::any. */
    template <parting WAY> struct cursor {
        static constexpr bool PARTED = WAY == parting::in_turns;
        int block, tile; /* the stage's first */
        int bound;       /* unless parted: the first tile that the stage must not have */
        int turn, into;  /* parted: whose third it is, and how many tiles of each are behind */
        ring_place place;

        __device__ __forceinline__ explicit cursor(const decode_cta<S> &d)
            : block(0), place(d.launch.stages) {
            begin(d);
            if (!PARTED && d.begin == d.end)
                block = d.blocks;
        }
        __device__ __forceinline__ bool valid(const decode_cta<S> &d) const {
            return block < d.blocks;
        }
        /* Of the stage; none: it is empty, and counted all the same. */
        __device__ __forceinline__ int tiles(const decode_cta<S> &d) const {
            if (PARTED)
                return max(0, min(min(d.tiles, d.launch.third - into), d.end - tile));
            return min(d.tiles, bound - tile);
        }
        /* True where a new block begins. */
        __device__ __forceinline__ bool next(const decode_cta<S> &d) {
            const int behind = tile + tiles(d);

            place.next();
            if (PARTED) {
                if (++turn < S::GROUPS) {
                    tile += d.launch.third;
                    return false;
                }
                turn = 0;
                tile += d.tiles - (S::GROUPS - 1) * d.launch.third;
                into += d.tiles;
                if (into < d.launch.third)
                    return false;
            } else {
                tile = behind;
                if (WAY == parting::in_order && tile == bound)
                    next_third(d);
                if (tile < d.end)
                    return false;
            }
            begin(d);
            block++;
            return true;
        }

      private:
        __device__ __forceinline__ void begin(const decode_cta<S> &d) {
            tile = d.begin;
            bound = WAY == parting::in_order ? d.begin : d.end;
            turn = into = 0;
            if (WAY == parting::in_order)
                next_third(d);
        }
        __device__ __forceinline__ void next_third(const decode_cta<S> &d) {
            bound = min(bound + d.launch.third, d.end);
        }
    };

    /* Of a matrix. */
    template <parting WAY>
    using copies =
        strip_copies<S::BITS, WAY == parting::whole ? S::GROUPS * S::SLOTS : FQ_CUDA_THIRDS_STRIPS>;

    /* Whether a block is the gate's alone. */
    __device__ __forceinline__ bool is_gate(int of) const {
        return cta.gate_first && of % 2 == 0;
    }
    /* Of the strips of a block; where it is a pair's, of the gate (slot 0) or of W (slot 1). */
    template <parting WAY>
    __device__ __forceinline__ copies<WAY> copies_of(int of, int slot) const {
        const block_place block(cta, of);
        const int index = slot * block.first;

        return copies<WAY>(
            block.of_gate || (cta.paired && slot == 0) ? cta.launch.gate : cta.launch.w,
            block.strip, cta.paired ? block.first : block.strips, cta.begin, cta.codes_of(index),
            cta.tiles * S::TILE, cta.scales_of(index), cta.zeros_of(index), cta.launch.slots);
    }

    /* X straight from its rows, on 16 bytes: of two tiles, a lane has the same 16-byte piece of
     * every few rows, ROW_STEP of them apart. */
    static constexpr int PIECES = 2 * 8, ROWS_AT_ONCE = 32 / PIECES;
    static constexpr int ROW_STEP = ROWS_AT_ONCE * S::ROW_WARPS;
    static constexpr int ROW_LOADS = S::DIRECT ? S::N / ROW_STEP : 1;

    /* Of two tiles, from one on. */
    __device__ __forceinline__ void put_rows(int tile, const uint16_t *const (&rows)[ROW_LOADS],
                                             uint32_t to) const {
        const int k = tile * FQ_CUDA_TILE + cta.lane % PIECES * 8;

        if ((tile + 2) * FQ_CUDA_TILE <= cta.launch.w.k) {
#pragma unroll
            for (int i = 0; i < ROW_LOADS; i++)
                if (i * ROW_STEP < cta.launch.m)
                    cp_async_16(to + i * ROW_STEP * S::X_PITCH, rows[i] + k);
        } else {
            const int bytes = max(0, min(16, (cta.launch.w.k - k) * 2));

#pragma unroll
            for (int i = 0; i < ROW_LOADS; i++)
                if (i * ROW_STEP < cta.launch.m)
                    cp_async_16(to + i * ROW_STEP * S::X_PITCH, rows[i] + (bytes ? k : 0), bytes);
        }
    }

    /* Bytes of a tile of X that are copied. */
    __device__ __forceinline__ uint32_t x_bytes() const {
        return cta.launch.x_mapped ? fq_cuda_decode_mapped_rows(cta.launch.m) * 128 : S::X_TILE;
    }
    /* X of a stage, as wgmma wants it: by its tensor map, or arranged so already. */
    template <parting WAY> __device__ __forceinline__ void put_x(const cursor<WAY> &at) const {
        const uint32_t to = cta.ring + at.place.stage * cta.stage_bytes;
        const int tiles = at.tiles(cta);

        if (cta.launch.x_mapped) {
            for (int i = 0; i < tiles; i++)
                tensor_copy(to + i * S::X_TILE, x_map, (at.tile + i) * FQ_CUDA_TILE, 0,
                            cta.full_of(at.place));
            return;
        }
        if (tiles == 0)
            return;
        bulk_copy(to,
                  static_cast<const uint8_t *>(cta.launch.arranged) + (int64_t)at.tile * S::X_TILE,
                  tiles * S::X_TILE, cta.full_of(at.place));
    }

    /*
     * The two producers part the work by what it costs them: where X comes row by row, a warp has
     * that, and a thread the weights; with more rows, a thread has the codes and another one
     * the scales and X.  Weights fill the ring before the kernels that made X are done.
     */
    template <bool CODES, bool SCALES, bool PAIRED, parting WAY> struct weights_producer {
        const decode_producer &producer;
        const decode_cta<S> &d;
        cursor<WAY> at;
        copies<WAY> one, two; /* two: of W, where one is the gate */

        __device__ __forceinline__ explicit weights_producer(const decode_producer &of)
            : producer(of), d(of.cta), at(of.cta), one(of.template copies_of<WAY>(0, 0)),
              two(of.template copies_of<WAY>(0, PAIRED)) {
        }
        /* The next stage, and, by the thread that puts scales, X beside it. */
        __device__ __forceinline__ void put() {
            const int tiles = at.tiles(d);

            if (WAY != parting::in_turns || tiles > 0)
                copy(tiles);
            else
                mbarrier_expect(d.full_of(at.place), 0);
            if (at.next(d)) {
                if (at.valid(d)) {
                    one = producer.template copies_of<WAY>(at.block, 0);
                    if (PAIRED)
                        two = producer.template copies_of<WAY>(at.block, 1);
                }
                return;
            }
            follow(one, tiles,
                   PAIRED || producer.is_gate(at.block) ? d.launch.gate_third_groups
                                                        : d.launch.third_groups);
            if (PAIRED)
                follow(two, tiles, d.launch.third_groups);
        }

      private:
        /* Of a matrix, behind a stage of so many tiles.  A third has `groups` groups. */
        __device__ __forceinline__ void follow(copies<WAY> &of, int tiles, int groups) {
            if (WAY != parting::in_turns)
                of.advance(WAY == parting::in_order ? tiles : d.tiles);
            else if (at.turn > 0)
                of.skip(d.launch.third, groups);
            else {
                of.skip(-(S::GROUPS - 1) * d.launch.third, -(S::GROUPS - 1) * groups);
                of.advance(d.tiles);
            }
        }
        __device__ __forceinline__ void copy(int tiles) {
            const uint32_t barrier = d.full_of(at.place);
            const uint32_t stage = at.place.stage * d.stage_bytes;
            const uint32_t groups_one = one.groups_of(tiles), groups_two = two.groups_of(tiles);
            uint32_t all = SCALES && !S::DIRECT ? tiles * producer.x_bytes() : 0;

            if (CODES)
                all += one.code_bytes(tiles) + (PAIRED ? two.code_bytes(tiles) : 0);
            if (SCALES)
                all += one.scale_bytes(groups_one) + (PAIRED ? two.scale_bytes(groups_two) : 0);
            mbarrier_expect(barrier, all);
            if (CODES) {
                one.put_codes(stage, tiles, barrier);
                if (PAIRED)
                    two.put_codes(stage, tiles, barrier);
            }
            if (SCALES) {
                one.put_scales(stage, groups_one, barrier);
                if (PAIRED)
                    two.put_scales(stage, groups_two, barrier);
            }
        }
    };

    template <bool PAIRED, parting WAY> __device__ __forceinline__ void put_all_weights() const {
        weights_producer<true, S::DIRECT, PAIRED, WAY> weights(*this);

        cta.await_barriers();
        if (!elect_one())
            return;
        while (weights.at.valid(cta)) {
            mbarrier_wait(cta.empty_of(weights.at.place), weights.at.place.parity ^ 1);
            weights.put();
        }
    }

    template <bool PAIRED, parting WAY>
    __device__ __forceinline__ void put_all_scales_and_x() const {
        weights_producer<false, true, PAIRED, WAY> weights(*this);
        cursor<WAY> of_x(cta);

        cta.await_barriers();
        if (!elect_one())
            return;
        for (int i = 0; i < cta.launch.stages && weights.at.valid(cta); i++)
            weights.put();
        grid_wait();
        for (int i = 0; i < cta.launch.stages && of_x.valid(cta); i++, of_x.next(cta))
            put_x(of_x);
        while (weights.at.valid(cta)) {
            mbarrier_wait(cta.empty_of(of_x.place), of_x.place.parity ^ 1);
            weights.put();
            put_x(of_x);
            of_x.next(cta);
        }
    }

    /* By a warp, of which a thread goes on.  Each way has code of its own: together they take more
     * registers than there are. */
    template <parting WAY> __device__ __forceinline__ void produce_weights() const {
        if (S::SLOTS > 1 && cta.paired)
            put_all_weights<S::SLOTS != 1, WAY>();
        else
            put_all_weights<false, WAY>();
    }

    /* The same. */
    template <parting WAY> __device__ __forceinline__ void produce_scales_and_x() const {
        if (S::SLOTS > 1 && cta.paired)
            put_all_scales_and_x<S::SLOTS != 1, WAY>();
        else
            put_all_scales_and_x<false, WAY>();
    }

    /* By a warp, or by two. */
    template <parting WAY> __device__ __forceinline__ void produce_rows() const {
        const int first = (cta.thread - S::CONSUMERS - 32) / 32 * ROWS_AT_ONCE + cta.lane / PIECES;
        const uint32_t to = cta.ring + first * S::X_PITCH + cta.lane % PIECES * 16;
        const uint16_t *rows[ROW_LOADS];
        cursor<WAY> at(cta);

        cta.await_barriers();
        grid_wait();
#pragma unroll
        for (int i = 0; i < ROW_LOADS; i++)
            rows[i] = static_cast<const uint16_t *>(
                cta.launch.x_rows[min(i * ROW_STEP + first, cta.launch.m - 1)]);
        for (; at.valid(cta); at.next(cta)) {
            const uint32_t stage = to + at.place.stage * cta.stage_bytes;
            const int tiles = at.tiles(cta);

            mbarrier_wait(cta.empty_of(at.place), at.place.parity ^ 1);
            for (int i = 0; i < tiles; i += 2)
                put_rows(at.tile + i, rows, stage + i / 2 * S::X_PAIR);
            mbarrier_arrive_copies(cta.full_of(at.place));
        }
    }

  public:
    __device__ __forceinline__ decode_producer(const decode_cta<S> &of, const void *map)
        : cta(of), x_map(map) {
    }

    /* By all threads behind the consumers'. */
    template <parting WAY> __device__ __forceinline__ void produce() const {
        const int thread = cta.thread - S::CONSUMERS;

        if (thread < 32)
            produce_weights<WAY>();
        else if (S::DIRECT && thread < 32 + 32 * S::ROW_WARPS)
            produce_rows<WAY>();
        else if (!S::DIRECT && thread < 64)
            produce_scales_and_x<WAY>();
        else
            cta.await_barriers();
    }
};

#endif /* FQ_HOPPER_CODE */

#endif
