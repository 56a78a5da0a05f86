/* SPDX-License-Identifier: Apache-2.0 */
/* How prefills are dealt out on Hopper: plain integers, which need no GPU to be tested. */
#include "backend.h"
#include "plan.h"
#include "shares.h"
#include "test-sizes.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define MOST_BLOCKS  220
#define MOST_UNITS   96
#define COUNT(array) (sizeof(array) / sizeof *(array))

static int between(unsigned *seed, int least, int most) {
    return least + rand_r(seed) % (most - least + 1);
}

/* Walks over all segments as the kernel does, and checks each unit's and each part's sum. */
static void check_shares(const struct fq_cuda_shares *shares, int workers) {
    static unsigned char summed[MOST_BLOCKS][MOST_UNITS];
    static int first[MOST_BLOCKS], last[MOST_BLOCKS];

    memset(summed, 0, sizeof summed);
    memset(last, -1, sizeof last);
    assert_in_range(shares->workers, 1, workers);
    for (int worker = 0; worker < shares->workers; worker++) {
        struct fq_cuda_segment segment;
        int left = 0;

        for (int i = 0; fq_cuda_segment_at(shares, worker, i, &segment); i++) {
            struct fq_cuda_segment next;

            assert_in_range(segment.block, 0, shares->blocks - 1);
            assert_true(segment.begin >= 0 && segment.begin < segment.end);
            assert_true(segment.end <= shares->units);
            for (int unit = segment.begin; unit < segment.end; unit++)
                assert_int_equal(summed[segment.block][unit]++, 0);
            if (segment.begin == 0)
                first[segment.block] = worker;
            if (segment.end == shares->units)
                last[segment.block] = worker;
            else
                left++;
            /* it waits for others, so nobody may wait for what it would do afterwards */
            if (segment.end == shares->units && segment.begin > 0)
                assert_false(fq_cuda_segment_at(shares, worker, i + 1, &next));
        }
        assert_in_range(left, 0, 1); /* there is room for one part */
    }
    for (int block = 0; block < shares->blocks; block++) {
        for (int unit = 0; unit < shares->units; unit++)
            assert_int_equal(summed[block][unit], 1);
        assert_true(first[block] <= last[block]); /* who waits, waits for lower numbers */
        if (first[block] < last[block])
            assert_int_equal(fq_cuda_first_worker(shares, block), first[block]);
    }
}

static void each_unit_is_summed_once(void **context) {
    unsigned seed = 1;

    (void)context;
    for (int round = 0; round < 4000; round++) {
        const int workers = between(&seed, 1, 70), parts = between(&seed, 1, 4);
        const int blocks = between(&seed, 1, between(&seed, 1, MOST_BLOCKS));
        const int units = between(&seed, 1, between(&seed, 1, MOST_UNITS));
        const struct fq_cuda_shares shares =
            fq_cuda_share_out(blocks, units, workers, parts, between(&seed, 0, 8));

        check_shares(&shares, workers);
    }
}

static void the_last_part_is_longer(void **context) {
    const struct fq_cuda_shares shares = fq_cuda_share_out(3, 64, 66, 4, 8);
    struct fq_cuda_segment segment = {0};

    (void)context;
    for (int worker = 0; worker < 12; worker++) {
        assert_true(fq_cuda_segment_at(&shares, worker, 0, &segment));
        assert_int_equal(segment.end - segment.begin, worker % 4 == 3 ? 22 : 14);
    }
    assert_int_equal(shares.workers, 12);
}

static int64_t planned_time(const struct fq_cuda_gemm_size *size, int m, int *launches) {
    int64_t time = 0;

    for (*launches = 0; m > 0; ++*launches) {
        const int rows = m > FQ_DECODE_ROWS ? fq_cuda_plan_rows(size, m) : m;

        assert_in_range(rows, 1, m);
        time += fq_cuda_launch_time(size, rows);
        m -= rows;
    }
    return time;
}

static void plans_have_room_for_all_rows(void **context) {
    unsigned seed = 2;

    (void)context;
    for (int round = 0; round < 2000; round++) {
        static const int bits[] = {3, 4, 8};
        const struct fq_cuda_gemm_size size = {
            .bits = bits[between(&seed, 0, 2)],
            .gated = between(&seed, 0, 1),
            .strips = between(&seed, 1, 2000),
            .tiles = between(&seed, 1, 2000),
            .workers = between(&seed, 1, 70),
        };
        const int m = between(&seed, FQ_DECODE_ROWS + 1, between(&seed, FQ_DECODE_ROWS + 1, 65536));
        const struct fq_cuda_prefill_plan plan = fq_cuda_plan_prefill(&size, m);
        int launches;

        assert_true(plan.rows >= 96 && plan.rows <= 256 && plan.rows % 32 == 0);
        assert_true(plan.strips == 4 || (plan.strips == 6 && !size.gated));
        assert_true(plan.rows <= 128 || plan.strips == (plan.rows == 160 ? 6 : 4));
        assert_true(plan.blocks_n * plan.strips >= size.strips);
        assert_true((int64_t)plan.blocks / plan.blocks_n * plan.rows >= m);
        assert_true(planned_time(&size, m, &launches) <= plan.time);
        assert_in_range(launches, 1, 3);
    }
}

/* One row more than fills a block is another launch, and does not cost a block. */
static void a_row_more_costs_no_block(void **context) {
    static const int rows[] = {256, 512, 768, 1024, 2048};
    const struct fq_cuda_gemm_size size = {
        .bits = 4, .strips = 12288 / 64, .tiles = 12288 / 64, .workers = 66};
    int launches;

    (void)context;
    for (size_t i = 0; i < COUNT(rows); i++) {
        assert_int_equal(fq_cuda_plan_rows(&size, rows[i]), rows[i]);
        assert_int_equal(fq_cuda_plan_rows(&size, rows[i] + 1), rows[i]);
        (void)planned_time(&size, rows[i] + 1, &launches);
        assert_int_equal(launches, 2);
    }
    for (int m = 193; m <= 256; m++) /* nor do rows that fill most of one leave it */
        assert_int_equal(fq_cuda_plan_rows(&size, m), m);
    assert_int_equal(fq_cuda_plan_rows(&size, 384), 384);
}

/* Each size of test-sizes.h is dealt out as it says, and each shape in every way. */
static void sizes_are_what_they_are_for(void **context) {
    static const int shapes[][2] = {{96, 4},  {96, 6},  {128, 4}, {128, 6},
                                    {160, 6}, {192, 4}, {224, 4}, {256, 4}};
    bool found[COUNT(shapes)][TEST_FEW + 1] = {0};

    (void)context;
    for (size_t i = 0; i < COUNT(prefill_sizes); i++) {
        const struct prefill_size *wanted = &prefill_sizes[i];
        const struct fq_cuda_gemm_size size = {.bits = wanted->size.bits,
                                               .strips = (int)(wanted->size.n + 63) / 64,
                                               .tiles = (int)(wanted->size.k + 63) / 64,
                                               .workers = 66};
        const int m = (int)wanted->size.m;
        const struct fq_cuda_prefill_plan plan = fq_cuda_plan_prefill(&size, m);
        const bool fits = plan.blocks * plan.parts <= size.workers;
        const enum test_dealing dealing = plan.parts == 1 ? fits ? TEST_WHOLE : TEST_SEVERAL
                                          : fits          ? TEST_FEW
                                                          : TEST_SHARED;

        if (fq_cuda_plan_rows(&size, m) != m || plan.rows != wanted->rows ||
            plan.strips != wanted->strips || dealing != wanted->dealing)
            fail_msg(
                "%d x %d with %d rows: %d of them in blocks of %d by %d strips, dealt out as %d",
                (int)wanted->size.n, (int)wanted->size.k, m, fq_cuda_plan_rows(&size, m), plan.rows,
                plan.strips, (int)dealing);
        assert_true(dealing != TEST_FEW || plan.parts > 2);
        /* gemm.c has other kernels for fewer columns of bf16 */
        assert_true(wanted->size.type == FQ_F16 || wanted->size.k >= 512);
        for (size_t s = 0; s < COUNT(shapes); s++)
            if (plan.rows == shapes[s][0] && plan.strips == shapes[s][1])
                found[s][dealing] = true;
    }
    for (size_t s = 0; s < COUNT(shapes); s++)
        for (int dealing = 0; dealing <= TEST_FEW; dealing++)
            assert_true(found[s][dealing]);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_unit_is_summed_once),     cmocka_unit_test(the_last_part_is_longer),
        cmocka_unit_test(plans_have_room_for_all_rows), cmocka_unit_test(a_row_more_costs_no_block),
        cmocka_unit_test(sizes_are_what_they_are_for),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
