/* SPDX-License-Identifier: Apache-2.0 */
/* The rules for group sizes and budgets, against lists written by hand and exhaustive search. */
#include "quantize-choose.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

static void candidates_divide_every_k(void **state) {
    static const struct {
        int64_t k[2];
        size_t count;
        int64_t min_group;
        int64_t groups[12]; /* 0 begins the list, a negative number ends it */
    } cases[] = {
        {{4096}, 1, 16, {0, 2048, 1024, 512, 256, 128, 64, 32, 16, -1}},
        {{384}, 1, 16, {0, 192, 128, 64, 32, 16, -1}},
        {{1536}, 1, 64, {0, 768, 384, 192, 128, 64, -1}},
        {{14336}, 1, 32, {0, 7168, 3584, 1792, 896, 448, 224, 128, 64, 32, -1}},
        {{100}, 1, 16, {0, -1}},
        {{16}, 1, 16, {0, -1}},
        {{32}, 1, 16, {0, 16, -1}},
        {{96}, 1, 16, {0, 48, 32, 16, -1}},
        {{2048, 768}, 2, 16, {0, 256, 128, 64, 32, 16, -1}},
        {{4096, 100}, 2, 16, {0, -1}},
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int64_t groups[FQ_CHOOSE_GROUPS_MAX];
        size_t count = fq_choose_groups(cases[i].k, cases[i].count, cases[i].min_group, groups);

        for (size_t j = 0; j < count; j++)
            if (groups[j] != cases[i].groups[j])
                fail_msg("case %zu: group %zu is %lld", i, j, (long long)groups[j]);
        assert_true(cases[i].groups[count] < 0);
    }
}

static void alpha_stops_where_the_rule_says(void **state) {
    static const struct {
        const char *what;
        double alpha;
        double errors[6]; /* of groups 1024, 512, ... */
        size_t chosen;
        enum fq_choose_stop stop;
    } cases[] = {
        {"halves do not help", 0.05, {0.1, 0.1, 0.1, 0.1, 0.1, 0.1}, 0, FQ_CHOOSE_ALPHA},
        {"every halving gains a tenth",
         0.05,
         {0.1, 0.09, 0.081, 0.0729, 0.06561, 0.059049},
         4, /* 0.15 bits of gain pay for 0.125 of scales at 64, not for 0.25 at 32 */
         FQ_CHOOSE_PRICE},
        {"the same, alpha too high",
         0.2,
         {0.1, 0.09, 0.081, 0.0729, 0.06561, 0.059049},
         0,
         FQ_CHOOSE_ALPHA},
        {"outliers in every eighth column: no gain, no gain, then all of it",
         0.1,
         {0.8, 0.8, 0.8, 0.1, 0.1, 0.1},
         3,
         FQ_CHOOSE_ALPHA},
        {"always worth it", 0.05, {0.8, 0.4, 0.2, 0.1, 0.05, 0.025}, 5, FQ_CHOOSE_FINEST},
        {"nothing to gain", 0, {0, 0, 0, 0, 0, 0}, 0, FQ_CHOOSE_ALPHA},
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct fq_choose_step steps[6];
        enum fq_choose_stop stop;
        size_t chosen;

        for (int j = 0; j < 6; j++)
            steps[j] = (struct fq_choose_step){
                .group = 1024 >> j, .bits = 16.0 / (1024 >> j), .error = cases[i].errors[j]};
        chosen = fq_choose_by_alpha(steps, 6, cases[i].alpha, &stop);
        if (chosen != cases[i].chosen || stop != cases[i].stop)
            fail_msg("%s: %zu, stop %d", cases[i].what, chosen, (int)stop);
    }
}

#define UNITS   4
#define OPTIONS 6

static uint32_t next_random(uint32_t *state) {
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

/* Random units; errors fall with the bytes, not convexly.  Their squares weigh from 1 to 4. */
static void make_units(uint32_t seed, struct fq_choose_unit units[UNITS],
                       struct fq_choose_option options[UNITS][OPTIONS]) {
    static const int bits[OPTIONS] = {3, 3, 4, 4, 8, 8};
    static const int64_t groups[OPTIONS] = {0, 64, 0, 64, 0, 64};

    for (size_t u = 0; u < UNITS; u++) {
        uint64_t bytes = 50 + next_random(&seed) % 100;
        double error = 0.5 + next_random(&seed) % 100 * 0.01;

        for (size_t i = 0; i < OPTIONS; i++) {
            options[u][i] = (struct fq_choose_option){.bits = bits[i],
                                                      .group = groups[i],
                                                      .bytes = bytes,
                                                      .error = error,
                                                      .loss = (double)(u + 1) * error * error};
            bytes += 1 + next_random(&seed) % 40;
            error *= 0.3 + next_random(&seed) % 70 * 0.01;
        }
        units[u] = (struct fq_choose_unit){.k = 256, .options = options[u], .count = OPTIONS};
    }
}

static void sum(const struct fq_choose_unit units[UNITS], uint64_t *bytes, double *error,
                double *loss) {
    *bytes = 0;
    *error = *loss = 0;
    for (size_t u = 0; u < UNITS; u++) {
        *bytes += units[u].options[units[u].chosen].bytes;
        *error += units[u].options[units[u].chosen].error;
        *loss += units[u].options[units[u].chosen].loss;
    }
}

/* The least loss of any choice in the budget whose error is at most MOST. */
static double exhaustive(struct fq_choose_option options[UNITS][OPTIONS], uint64_t budget,
                         double most) {
    double best = INFINITY;

    for (int code = 0; code < OPTIONS * OPTIONS * OPTIONS * OPTIONS; code++) {
        uint64_t bytes = 0;
        double error = 0, loss = 0;

        for (int u = 0, rest = code; u < UNITS; u++, rest /= OPTIONS) {
            bytes += options[u][rest % OPTIONS].bytes;
            error += options[u][rest % OPTIONS].error;
            loss += options[u][rest % OPTIONS].loss;
        }
        if (bytes <= budget && error <= most && loss < best)
            best = loss;
    }
    return best;
}

static void budget_is_kept_and_nearly_optimal(void **state) {
    double ours = 0, optimal = 0;

    (void)state;
    for (uint32_t seed = 1; seed <= 300; seed++) {
        struct fq_choose_unit units[UNITS];
        struct fq_choose_option options[UNITS][OPTIONS];
        struct fq_choose_uniform uniform;
        struct fq_error err;
        uint64_t least = 0, most = 0, budget, bytes;
        double error, loss, best;

        make_units(seed, units, options);
        for (size_t u = 0; u < UNITS; u++) {
            least += options[u][0].bytes;
            most += options[u][OPTIONS - 1].bytes;
        }
        budget = least + (most - least) * (seed % 21) / 20;
        assert_int_equal(fq_choose_by_budget(units, UNITS, budget, &uniform, &err), 0);
        sum(units, &bytes, &error, &loss);
        assert_true(bytes <= budget);
        best = exhaustive(options, budget, uniform.bits ? uniform.error : INFINITY);
        assert_true(loss >= best - 1e-12);
        if (uniform.bits)
            assert_true(error <= uniform.error && uniform.bytes <= budget);
        for (size_t i = 0; i < OPTIONS; i++) { /* and against each uniform choice, summed here */
            uint64_t same_bytes = 0;
            double same_error = 0;

            for (size_t u = 0; u < UNITS; u++) {
                same_bytes += options[u][i].bytes;
                same_error += options[u][i].error;
            }
            if (same_bytes <= budget)
                assert_true(error <= same_error);
        }
        ours += loss;
        optimal += best;
    }
    assert_true(ours <= 1.01 * optimal);
}

static void budget_too_small_is_refused_with_the_least(void **state) {
    struct fq_choose_unit units[UNITS];
    struct fq_choose_option options[UNITS][OPTIONS];
    struct fq_choose_uniform uniform;
    struct fq_error err;
    uint64_t least = 0;
    char words[32];

    (void)state;
    make_units(5, units, options);
    for (size_t u = 0; u < UNITS; u++)
        least += options[u][0].bytes;
    assert_int_equal(fq_choose_by_budget(units, UNITS, least - 1, &uniform, &err), -FQ_INVALID);
    snprintf(words, sizeof words, "need %llu at least", (unsigned long long)least);
    if (!strstr(err.message, words))
        fail_msg("%s", err.message);
}

/* Where a walk might leave the units: one size for all, or sizes at random. */
static void walk_somewhere(uint32_t seed, struct fq_choose_unit units[UNITS]) {
    for (size_t u = 0; u < UNITS; u++)
        units[u].chosen = seed % 3 ? next_random(&seed) % OPTIONS : seed % OPTIONS;
}

static void sharing_out_anew_costs_no_more_and_loses_nothing(void **state) {
    double before = 0, after = 0;

    (void)state;
    for (uint32_t seed = 1; seed <= 300; seed++) {
        struct fq_choose_unit units[UNITS];
        struct fq_choose_option options[UNITS][OPTIONS];
        struct fq_error err;
        uint64_t walked_bytes, bytes;
        double walked_error, walked_loss, error, loss;

        make_units(seed, units, options);
        walk_somewhere(seed, units);
        sum(units, &walked_bytes, &walked_error, &walked_loss);
        assert_int_equal(fq_choose_again(units, UNITS, &err), 0);
        sum(units, &bytes, &error, &loss);
        assert_true(bytes <= walked_bytes);
        assert_true(loss <= walked_loss + 1e-12 || error < walked_error);
        for (size_t i = 0; i < OPTIONS; i++) { /* no uniform choice in those bytes is better */
            for (size_t u = 0; u < UNITS; u++)
                units[u].chosen = i;
            sum(units, &bytes, &walked_error, &(double){0});
            if (bytes <= walked_bytes && error > walked_error + 1e-12)
                fail_msg("seed %u: %g, uniform choice %zu has %g", seed, error, i, walked_error);
        }
        before += walked_loss;
        after += loss;
    }
    assert_true(after < 0.8 * before); /* else it does nothing */
}

/* Two units whose groups gain alike, the one with four times the error: the walk, which sees gains
 * alone, leaves both at the middle, and the bytes are better spent on the one. */
static void bytes_go_where_they_take_away_more(void **state) {
    static const struct fq_choose_option large[] = {
        {.bits = 4, .group = 0, .bytes = 100, .error = 0.8, .loss = 0.64},
        {.bits = 4, .group = 64, .bytes = 110, .error = 0.6, .loss = 0.36},
        {.bits = 4, .group = 32, .bytes = 120, .error = 0.45, .loss = 0.2025}};
    static const struct fq_choose_option small[] = {
        {.bits = 4, .group = 0, .bytes = 100, .error = 0.2, .loss = 0.04},
        {.bits = 4, .group = 64, .bytes = 110, .error = 0.15, .loss = 0.0225},
        {.bits = 4, .group = 32, .bytes = 120, .error = 0.1125, .loss = 0.01265625}};
    struct fq_choose_unit units[] = {{.k = 256, .options = large, .count = 3, .chosen = 1},
                                     {.k = 256, .options = small, .count = 3, .chosen = 1}};
    struct fq_error err;

    (void)state;
    assert_int_equal(fq_choose_again(units, 2, &err), 0);
    assert_int_equal(units[0].chosen, 2);
    assert_int_equal(units[1].chosen, 0);
    assert_int_equal(fq_choose_again(units, 0, &err), 0);
}

static void uniform_choices_come_best_first(void **state) {
    (void)state;
    for (uint32_t seed = 1; seed <= 100; seed++) {
        struct fq_choose_unit units[UNITS];
        struct fq_choose_option options[UNITS][OPTIONS];
        struct fq_choose_uniform list[3];
        double errors[OPTIONS], best = INFINITY;
        size_t within = 0, found;

        make_units(seed, units, options);
        for (size_t i = 0; i < OPTIONS; i++) {
            errors[i] = 0;
            for (size_t u = 0; u < UNITS; u++)
                errors[i] += options[u][i].error;
            best = errors[i] < best ? errors[i] : best;
        }
        for (size_t i = 0; i < OPTIONS; i++)
            within += errors[i] <= best * 3;
        found = fq_choose_uniforms(units, UNITS, UINT64_MAX, 2, list, 3);
        assert_int_equal(found, within < 3 ? within : 3);
        assert_true(fabs(list[0].error - best) < 1e-12);
        for (size_t i = 0; i < found; i++) {
            uint64_t bytes;
            double error;

            assert_true(i == 0 || list[i - 1].error <= list[i].error);
            fq_choose_take_uniform(units, UNITS, &list[i]);
            sum(units, &bytes, &error, &(double){0});
            assert_true(bytes == list[i].bytes && fabs(error - list[i].error) < 1e-12);
        }
        assert_int_equal(fq_choose_uniforms(units, UNITS, 0, 2, list, 3), 0);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(candidates_divide_every_k),
        cmocka_unit_test(alpha_stops_where_the_rule_says),
        cmocka_unit_test(budget_is_kept_and_nearly_optimal),
        cmocka_unit_test(budget_too_small_is_refused_with_the_least),
        cmocka_unit_test(sharing_out_anew_costs_no_more_and_loses_nothing),
        cmocka_unit_test(bytes_go_where_they_take_away_more),
        cmocka_unit_test(uniform_choices_come_best_first),
    };

    return cmocka_run_group_tests(tests, NULL, NULL) ? 1 : 0;
}
