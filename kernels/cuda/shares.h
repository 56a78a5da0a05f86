/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How the Hopper kernels deal a GEMM out: which part of which block of the
 * output each worker sums.  Plain integers, used by the host to size the
 * workspace and by the kernels to find their work.
 *
 * Decode: the strips of W are dealt out evenly to clusters, each of which takes as many as it has
 * room for at a time, a block, and whose CTAs part K.  That depends on the matrix and the device
 * alone, never on m: batch invariance rests on it.
 *
 * Prefill: the output is cut into blocks; a block takes `units` steps along K.  A worker
 * is a cluster of two CTAs, one for each half of a block's rows of W.  `whole`
 * blocks are dealt out in turn, and all units of the rest, one block after the
 * other, are cut into as many equal runs as there are workers (stream-K):
 *
 *     blocks   |   0   |   1   |   2   |   3   |   4   |  5 blocks, whole = 3, 3 workers
 *     worker   |   0   |   1   |   2   | 0 . .1|1 . .2 |
 *
 * so that all workers end together whatever the shape.  A worker takes the blocks of
 * its run from the last one back.  Where a run ends inside a block, the worker
 * leaves its sums in memory, the first thing it does; the worker whose run has the
 * block's end adds them to its own, the last thing it does.  So hardly anybody waits,
 * and only for workers of lower number, which the device starts first: a launch ends
 * even where not all of its CTAs fit the device at a time.
 *
 * Where there is room for several workers to each block, a block is cut into as many parts.  The
 * last one is the longest: its worker adds the others', which are on their way meanwhile.
 */
#ifndef FQ_KERNELS_CUDA_SHARES_H
#define FQ_KERNELS_CUDA_SHARES_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __CUDACC__
#define FQ_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FQ_HOST_DEVICE inline
#endif

/* ---- Decode --------------------------------------------------------------------------------- */

#define FQ_CUDA_DECODE_SPLIT  2 /* CTAs of a cluster, which part K */
#define FQ_CUDA_DECODE_GROUPS 3 /* consumer warpgroups of a CTA */
#define FQ_CUDA_DECODE_SLOTS  2 /* strips of each, up to FQ_CUDA_SLOTS_ROWS rows of X; beyond, 1 */
#define FQ_CUDA_SLOTS_ROWS    32
#define FQ_CUDA_DIRECT_ROWS   16 /* of X, that are taken as they lie */

/*
 * Where a cluster has so few strips, in all, all consumer warpgroups have each of them, and a third
 * of the CTA's tiles: with a warpgroup to each strip, one at least would have nothing to do.  Two
 * strips of int8, or of a pair, would leave the ring too few stages, and so do many scales and zero
 * points (has_room_for_thirds()).  Thirds, like strips, do not depend on m.
 */
#define FQ_CUDA_THIRDS_STRIPS 2
#define FQ_CUDA_THIRDS        FQ_CUDA_DECODE_GROUPS

/* Rows of X that the decode kernel for m has room for. */
static FQ_HOST_DEVICE int fq_cuda_decode_rows(int m) {
    return m <= 8 ? 8 : (m + 15) / 16 * 16;
}

/* Rows of X that a box of its tensor map has, in eights, which is how wgmma has them (just those
 * there are was not tried).  What a tile has room for behind them is not written; its sums are
 * nobody's. */
static FQ_HOST_DEVICE int fq_cuda_decode_mapped_rows(int m) {
    return (m + 7) / 8 * 8;
}

/* The first tile of K that is the part-th CTA's: an even one. */
static FQ_HOST_DEVICE int fq_cuda_decode_tile(int tiles, int part) {
    int pairs = (tiles + 1) / 2, tile = pairs * part / FQ_CUDA_DECODE_SPLIT * 2;

    return tile < tiles ? tile : tiles;
}

/* Tiles of the CTA that has most of them, an even number. */
static inline int fq_cuda_decode_most_tiles(int tiles) {
    return (tiles + 1) / 2 * 2 - fq_cuda_decode_tile(tiles, FQ_CUDA_DECODE_SPLIT - 1);
}

/*
 * How many tiles a third of a CTA's has, the last ones perhaps fewer, or none: as many for both
 * CTAs, and a multiple of `unit`, so that each third starts at the same place of a group.
 */
static inline int fq_cuda_decode_third(int tiles, int unit) {
    const int third = (fq_cuda_decode_most_tiles(tiles) + FQ_CUDA_THIRDS - 1) / FQ_CUDA_THIRDS;

    return (third + unit - 1) / unit * unit;
}

/*
 * How many strips the block-th of `blocks` blocks of a cluster has, of which *first is the first. A
 * cluster has `each` of them, the first `longer` clusters one more.  Every CTA begins with this,
 * and the divisions of the general case take longer than all else that it does before its first
 * copy.
 */
static FQ_HOST_DEVICE int fq_cuda_decode_strips(int each, int longer, int blocks, int cluster,
                                                int block, int *first) {
    const int begin = each * cluster + (cluster < longer ? cluster : longer);
    const int count = each + (cluster < longer);

    *first = begin;
    if (blocks == 1)
        return count;
    *first += count * block / blocks;
    return begin + count * (block + 1) / blocks - *first;
}

/* ---- Prefill -------------------------------------------------------------------------------- */

#define FQ_CUDA_CLUSTER  2  /* CTAs of a worker */
#define FQ_CUDA_OUT_ROWS 64 /* of a block of Y, that go through shared memory at a time */
/* Of those, that a box of Y's tensor map has: a block of so many rows is some whole boxes. */
#define FQ_CUDA_STORED_ROWS(rows)                                                                  \
    ((rows) % FQ_CUDA_OUT_ROWS ? FQ_CUDA_OUT_ROWS / 2 : FQ_CUDA_OUT_ROWS)

struct fq_cuda_shares {
    int blocks, units; /* of the output, and along K in each: their product fits an int */
    int workers;
    int whole;       /* blocks that are not split: the first ones */
    int run, longer; /* units of a run; so many of the first runs have one more */
    int parts;       /* if not 0: each block has so many runs, of which the last one has the rest */
};

/* Some units of one block, summed by one worker. */
struct fq_cuda_segment {
    int block;
    int begin, end; /* units */
};

/* The first unit, counted over all split blocks, of a worker's run. */
static FQ_HOST_DEVICE int fq_cuda_run_begin(const struct fq_cuda_shares *shares, int worker) {
    if (shares->parts)
        return worker / shares->parts * shares->units + worker % shares->parts * shares->run;
    return shares->run * worker + (worker < shares->longer ? worker : shares->longer);
}

/* Of a split block: the first of the workers that sum a part of it.  All but the last of them leave
 * their sums in memory, at most one part each. */
static FQ_HOST_DEVICE int fq_cuda_first_worker(const struct fq_cuda_shares *shares, int block) {
    const int in_longer = shares->longer * (shares->run + 1);
    const int unit = (block - shares->whole) * shares->units;

    if (shares->parts)
        return block * shares->parts;
    return unit < in_longer ? unit / (shares->run + 1)
                            : shares->longer + (unit - in_longer) / shares->run;
}

/* The index-th segment of a worker; false past its last. */
static FQ_HOST_DEVICE bool fq_cuda_segment_at(const struct fq_cuda_shares *shares, int worker,
                                              int index, struct fq_cuda_segment *segment) {
    int dealt = worker < shares->whole ? (shares->whole - worker - 1) / shares->workers + 1 : 0;
    int begin, end, first;

    if (index < dealt) {
        segment->block = worker + index * shares->workers;
        segment->begin = 0;
        segment->end = shares->units;
        return true;
    }
    begin = fq_cuda_run_begin(shares, worker);
    end = fq_cuda_run_begin(shares, worker + 1);
    if (begin == end) /* nothing is split */
        return false;
    first = ((end - 1) / shares->units - (index - dealt)) * shares->units; /* of the block */
    if (first + shares->units <= begin)
        return false;
    segment->block = shares->whole + first / shares->units;
    segment->begin = begin > first ? begin - first : 0;
    segment->end = end - first < shares->units ? end - first : shares->units;
    return true;
}

/* Units of each part but the last of a block that is cut into `parts`: of the last one, `more` more
 * at least, if there are as many. */
static inline int fq_cuda_part_units(int units, int parts, int more) {
    return units - more > parts ? (units - more) / parts : 1;
}

/*
 * Deals `blocks` blocks of `units` units to at most so many workers: in `parts` parts each where
 * the workers have room for all of them, the last one, to which the others are added, `more` units
 * longer than they are; otherwise whole, if parts is 1, or so that all workers end together.
 */
static inline struct fq_cuda_shares fq_cuda_share_out(int blocks, int units, int workers, int parts,
                                                      int more) {
    struct fq_cuda_shares shares = {blocks, units, workers, 0, 0, 0, 0};
    int split;

    if (parts > units)
        parts = units;
    if ((int64_t)blocks * parts <= workers) {
        shares.workers = blocks * parts;
        shares.parts = parts;
        shares.run = fq_cuda_part_units(units, parts, more);
        return shares;
    }
    if (parts == 1)
        shares.whole = blocks; /* workers that are idle at the end cost less */
    else if (blocks >= 2 * workers)
        shares.whole = (blocks / workers - 1) * workers;
    split = (blocks - shares.whole) * units;
    shares.run = split / workers;
    shares.longer = split % workers;
    return shares;
}

#endif
