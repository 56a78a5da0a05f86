/* SPDX-License-Identifier: Apache-2.0 */
/* The histogram against the sorted values themselves. */
#include "metrics.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>

#include <cmocka.h>

static int compare(const void *a, const void *b) {
    uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;

    return (left > right) - (left < right);
}

static void quantiles_are_within_a_tenth(void **state) {
    static const double quantiles[] = {0, 0.01, 0.5, 0.9, 0.99, 0.999};
    static uint64_t values[20000];
    struct fq_histogram histogram = {0};
    uint64_t random = 1;

    (void)state;
    for (size_t i = 0; i < 20000; i++) { /* spread evenly over the magnitudes up to 2^44 */
        random = random * 6364136223846793005u + 1442695040888963407u;
        values[i] = (random >> 20) >> (random >> 8) % 44;
        fq_histogram_add(&histogram, values[i]);
    }
    qsort(values, 20000, sizeof *values, compare);
    assert_int_equal(histogram.count, 20000);
    assert_int_equal(histogram.min, values[0]);
    assert_int_equal(histogram.max, values[19999]);
    for (size_t i = 0; i < sizeof quantiles / sizeof *quantiles; i++) {
        uint64_t truth = values[(size_t)(quantiles[i] * 20000)];
        uint64_t found = fq_histogram_quantile(&histogram, quantiles[i]);
        uint64_t apart = found > truth ? found - truth : truth - found;

        assert_true(apart * 10 <= truth);
    }
}

static void an_empty_one_and_the_extremes_are_counted(void **state) {
    struct fq_histogram histogram = {0};

    (void)state;
    assert_int_equal(fq_histogram_quantile(&histogram, 0.5), 0);
    fq_histogram_add(&histogram, UINT64_MAX);
    assert_int_equal(fq_histogram_quantile(&histogram, 0.5), UINT64_MAX);
    fq_histogram_add(&histogram, 0);
    assert_int_equal(fq_histogram_quantile(&histogram, 0), 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(quantiles_are_within_a_tenth),
        cmocka_unit_test(an_empty_one_and_the_extremes_are_counted),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
