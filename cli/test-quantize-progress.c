/* SPDX-License-Identifier: Apache-2.0 */
/* Fraction and time left of a job in two phases. */
#include "quantize-progress.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

static void close_to(double value, double wanted) {
    if (fabs(value - wanted) > 1e-9 * (1 + fabs(wanted)))
        fail_msg("%g instead of %g", value, wanted);
}

/* Looking at 100 bytes costs 3 passes each, writing 200 one each: 300 and 200 of 500. */
static void looking_counts_what_is_to_be_written(void **state) {
    const struct fq_quantize_progress half = {
        .bytes_done = 50, .bytes_total = 100, .work_a_byte = 3, .work_after = 200};
    struct fq_quantize_progress end = half;

    (void)state;
    close_to(quantize_progress_part(&half), 0.3);
    close_to(quantize_progress_rate(&half, 10), 5);
    close_to(quantize_progress_left(&half, 10), 10 + 200.0 / 3 / 5); /* 15 passes a second */
    end.bytes_done = 100;
    close_to(quantize_progress_part(&end), 0.6);
    close_to(quantize_progress_left(&end, 20), 200.0 / 15);
}

static void writing_goes_on_where_looking_ended(void **state) {
    struct fq_quantize_progress progress = {
        .bytes_total = 200, .work_before = 300, .work_a_byte = 1};

    (void)state;
    close_to(quantize_progress_part(&progress), 0.6);
    close_to(quantize_progress_left(&progress, 0), 0); /* not known yet */
    close_to(quantize_progress_left(&progress, 1), 0);
    progress.bytes_done = 50;
    close_to(quantize_progress_part(&progress), 0.7);
    close_to(quantize_progress_left(&progress, 5), 15);
    progress.bytes_done = 200;
    close_to(quantize_progress_part(&progress), 1);
    close_to(quantize_progress_left(&progress, 20), 0);
}

/* Half of it was there: that took no time, and says nothing of the rest. */
static void what_was_kept_makes_no_rate(void **state) {
    const struct fq_quantize_progress progress = {
        .bytes_done = 120, .bytes_kept = 100, .bytes_total = 200, .work_a_byte = 1};

    (void)state;
    close_to(quantize_progress_part(&progress), 0.6);
    close_to(quantize_progress_rate(&progress, 4), 5);
    close_to(quantize_progress_left(&progress, 4), 16);
}

static void nothing_to_do_is_done(void **state) {
    const struct fq_quantize_progress progress = {.work_a_byte = 1};

    (void)state;
    close_to(quantize_progress_part(&progress), 1);
    close_to(quantize_progress_left(&progress, 3), 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(looking_counts_what_is_to_be_written),
        cmocka_unit_test(writing_goes_on_where_looking_ended),
        cmocka_unit_test(what_was_kept_makes_no_rate),
        cmocka_unit_test(nothing_to_do_is_done),
    };

    return cmocka_run_group_tests(tests, NULL, NULL) ? 1 : 0;
}
