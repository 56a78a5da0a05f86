/* SPDX-License-Identifier: Apache-2.0 */
#include "plan.h"
#include "backend.h"
#include "shares.h"

#include <stddef.h>

#define MOST_ROWS  256 /* of a prefill's block; there are blocks of 96, 128 and so on */
#define MOST_PARTS 4   /* that a block is cut into where blocks are few */
/* What it costs, in units of K, that all workers end together: leaving and adding, and a clock that
 * is lower the more of them are busy.  With less than a block to each, nothing else is done
 * meanwhile. */
#define SPLIT_UNITS     6
#define SPLIT_FEW_UNITS 10
/* What another launch costs, in ns, and what it has to gain, as a fraction of the time: the
 * estimates are no better than that. */
#define ANOTHER_LAUNCH 3000
#define LEAST_GAIN     25

/*
 * Shapes of a prefill's block, in rows of X and strips of W, two for each consumer warpgroup, and
 * about what it takes, in ns, as measured at 4096 x 4096, 6144 x 4096 and 4096 x 14336 (of those of
 * six strips, at the shapes of bench/results/kernels-h200.csv): a unit, which is a tile of K (in
 * the narrow ones dequantization, not the tensor cores, is the limit), a launch's start and end,
 * and of a block in parts, whose sums are 48 to 128 KiB a CTA: from the end of a part until they
 * are there to be added, and adding them (of 96 rows, 160 and 224 from those beside them; of six
 * strips as of four).  test-sizes.h has sizes that are dealt out in each of them.
 */
static const struct prefill_shape {
    int rows, strips, unit, launch, leave, add;
} prefill_shapes[] = {{96, 4, 390, 4000, 1540, 600},   {96, 6, 515, 4000, 1540, 600},
                      {128, 4, 440, 4000, 1760, 680},  {128, 6, 600, 4000, 1760, 680},
                      {160, 6, 700, 4100, 2200, 840},  {192, 4, 520, 4200, 2600, 1000},
                      {224, 4, 580, 4300, 2900, 1140}, {256, 4, 640, 4400, 3200, 1280}};

/* What decode takes, likewise: of up to so many rows, a launch's start and end, and a tile of a
 * strip in int3, int4 and int8.  Fitted to bench/results/kernels-h200.csv: most rows are within
 * 10%. */
static const struct decode_rows {
    int rows, launch, tile3, tile4, tile8;
} decode_rows[] = {{8, 3200, 56, 66, 120},
                   {16, 3900, 76, 75, 123},
                   {32, 4700, 90, 91, 125},
                   {48, 5900, 109, 106, 140},
                   {FQ_DECODE_ROWS, 6800, 125, 124, 156}};

static int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

static int64_t decode_time(const struct fq_cuda_gemm_size *size, int m) {
    const struct decode_rows *rows = decode_rows;
    int tile;

    while (m > rows->rows)
        rows++;
    tile = size->bits == 8 ? rows->tile8 : size->bits == 4 ? rows->tile4 : rows->tile3;
    return rows->launch + divide_up(size->strips, size->workers) *
                              divide_up(size->tiles, FQ_CUDA_DECODE_SPLIT) * tile;
}

static int64_t prefill_time(const struct fq_cuda_prefill_plan *plan,
                            const struct prefill_shape *shape, int units, int workers) {
    const int64_t all = (int64_t)plan->blocks * units;
    const int each = fq_cuda_part_units(units, plan->parts, plan->more);
    int64_t longest; /* units of the worker that ends last */

    if ((int64_t)plan->blocks * plan->parts <= workers)
        return (units - (plan->parts - 1) * each) * (int64_t)shape->unit +
               (plan->parts - 1) * shape->add + shape->launch;
    if (plan->parts == 1)
        longest = divide_up(plan->blocks, workers) * units;
    else
        longest =
            divide_up(all, workers) + (plan->blocks < workers ? SPLIT_FEW_UNITS : SPLIT_UNITS);
    return longest * shape->unit + shape->launch;
}

struct fq_cuda_prefill_plan fq_cuda_plan_prefill(const struct fq_cuda_gemm_size *size, int m) {
    struct fq_cuda_prefill_plan best = {.time = INT64_MAX};

    for (size_t i = 0; i < sizeof prefill_shapes / sizeof *prefill_shapes; i++) {
        const struct prefill_shape *shape = &prefill_shapes[i];
        const int blocks_n = (int)divide_up(size->strips, shape->strips);
        struct fq_cuda_prefill_plan plan = {
            .rows = shape->rows,
            .strips = shape->strips,
            .blocks_n = blocks_n,
            .blocks = blocks_n * (int)divide_up(m, shape->rows),
            .more = shape->leave / shape->unit,
        };

        if (size->gated && shape->strips != 4) /* one warpgroup has the gate, one W */
            continue;
        for (plan.parts = 1; plan.parts <= MOST_PARTS && plan.parts <= size->tiles; plan.parts++) {
            if (plan.parts > 2 && (int64_t)plan.blocks * plan.parts > size->workers)
                break;
            plan.time = prefill_time(&plan, shape, size->tiles, size->workers);
            if (plan.time <= best.time)
                best = plan;
        }
    }
    return best;
}

int64_t fq_cuda_launch_time(const struct fq_cuda_gemm_size *size, int m) {
    return m <= FQ_DECODE_ROWS ? decode_time(size, m) : fq_cuda_plan_prefill(size, m).time;
}

int fq_cuda_plan_rows(const struct fq_cuda_gemm_size *size, int m) {
    int64_t least = fq_cuda_launch_time(size, m);
    int best = m, tried = 0;

    for (int unit = FQ_DECODE_ROWS; unit <= MOST_ROWS; unit += 32) {
        const int first = (m - 1) / unit * unit;
        int64_t time;

        if (first == tried) /* or 0 */
            continue;
        tried = first;
        time = fq_cuda_launch_time(size, first) + ANOTHER_LAUNCH;
        if (time >= least)
            continue;
        time += fq_cuda_launch_time(size, m - first);
        time += time / (LEAST_GAIN - 1);
        if (time < least) {
            least = time;
            best = first;
        }
    }
    return best;
}
