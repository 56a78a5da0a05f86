/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Choosing group sizes: by alpha from the ranges of the groups, which units are
 * refined and how much that may cost; by errors of those units, measured or
 * estimated, what of it goes where.  quantize-choose.h derives both.
 */
#include "quantize-decide.h"

#include <math.h>
#include <stdlib.h>

/* What is known of a unit at each of its group sizes. */
struct prospect {
    const struct fq_plan_unit *unit;
    size_t count;
    struct fq_choose_step steps[FQ_CHOOSE_GROUPS_MAX]; /* from the ranges */
    enum fq_choose_stop stop;
    bool takes_part; /* in the second step: its options are measured */
    struct fq_choose_option options[FQ_CHOOSE_GROUPS_MAX];
    size_t walked, chosen;
};

/* Adds what a matrix has to expect: crest·2/((2^bits − 1)·√12), see quantize.h. */
static void add_expected(const struct fq_plan_matrix *matrix, const double *crest,
                         struct prospect *prospect) {
    double own = (double)matrix->dense.n * (double)matrix->dense.k;
    double to_error = 2 / (((1 << matrix->bits) - 1) * sqrt(12));

    for (size_t g = 0; g < prospect->count; g++) {
        struct fq_choose_step *step = &prospect->steps[g];
        int64_t group = prospect->options[g].group;

        step->error += own * crest[g] * to_error;
        step->bits += own * 16 / (double)(group ? group : matrix->dense.k);
        prospect->options[g].bytes += fq_plan_bytes(matrix, matrix->bits, group, false);
    }
}

/* One pass over the unit's weights.  Over its matrices a step's numbers are the mean by weights. */
static int expect(struct fq_decision *decision, struct prospect *prospect, struct fq_error *err) {
    struct fq_plan *plan = decision->plan;
    const struct fq_plan_unit *unit = prospect->unit;
    int64_t groups[FQ_CHOOSE_GROUPS_MAX], longest = 0;
    double crest[FQ_CHOOSE_GROUPS_MAX], weights = 0;

    if ((prospect->count = fq_decision_groups(plan, unit, groups, err)) == 0)
        return err->status;
    for (size_t g = 0; g < prospect->count; g++)
        prospect->options[g] = (struct fq_choose_option){
            .bits = plan->matrices[unit->members[0]].bits, .group = groups[g]};
    for (size_t i = 0; i < unit->count; i++) {
        struct fq_plan_matrix *matrix = &plan->matrices[unit->members[i]];
        int rc;

        fq_plan_read_ahead(plan, unit->members[i] + 1);
        rc = fq_quantize_crest(&matrix->dense, plan->options->method.allow_nonfinite, groups,
                               prospect->count, crest, err);
        if (rc == 0)
            add_expected(matrix, crest, prospect);
        longest = matrix->dense.k > longest ? matrix->dense.k : longest;
        weights += (double)matrix->dense.n * (double)matrix->dense.k;
        if ((rc = fq_decision_looked_at(decision, matrix, rc, err)) < 0)
            return rc;
    }
    for (size_t g = 0; g < prospect->count; g++) {
        prospect->steps[g].error /= weights;
        prospect->steps[g].bits /= weights;
        prospect->steps[g].group = groups[g] ? groups[g] : longest;
    }
    return 0;
}

/* Whether groups help the unit by more than chance, and none of it stays dense. */
static bool takes_part(const struct fq_plan *plan, const struct prospect *prospect) {
    enum fq_choose_stop stop;

    for (size_t i = 0; i < prospect->unit->count; i++)
        if (fq_plan_stays_dense(&plan->matrices[prospect->unit->members[i]]))
            return false;
    return prospect->walked > 0 || fq_choose_by_alpha(prospect->steps, prospect->count,
                                                      FQ_CHOOSE_ALPHA_OF_CHANCE, &stop) > 0;
}

/* The first step for a unit, and what the second has to know of it. */
static int walk(struct fq_decision *decision, struct prospect *prospect, struct fq_error *err) {
    const struct fq_plan *plan = decision->plan;
    const size_t problems = decision->problems;
    int rc = expect(decision, prospect, err);

    if (rc < 0 || decision->problems > problems)
        return rc;
    prospect->walked = prospect->chosen =
        fq_choose_by_alpha(prospect->steps, prospect->count, plan->options->alpha, &prospect->stop);
    prospect->takes_part = takes_part(plan, prospect);
    if (!prospect->takes_part)
        return 0;
    fq_decision_foresee(decision, prospect->unit, 1);
    return fq_decision_measure(decision, prospect->unit, prospect->options, prospect->count, true,
                               err);
}

/* Gives the bytes of the units that gain by groups to those of them that gain the most. */
static int redistribute(struct prospect *prospects, size_t count, struct fq_error *err) {
    struct fq_choose_unit *units = calloc(count + 1, sizeof *units);
    size_t *of = calloc(count + 1, sizeof *of), taking_part = 0;
    int rc = units && of ? 0 : fq_fail(err, FQ_NO_MEMORY, "no memory to choose group sizes");

    for (size_t p = 0; p < count && rc == 0; p++) {
        const struct prospect *prospect = &prospects[p];

        if (!prospect->takes_part)
            continue;
        of[taking_part] = p;
        units[taking_part++] = (struct fq_choose_unit){.k = prospect->steps[0].group,
                                                       .options = prospect->options,
                                                       .count = prospect->count,
                                                       .chosen = prospect->walked};
    }
    if (rc == 0)
        rc = fq_choose_again(units, taking_part, err);
    for (size_t i = 0; i < taking_part && rc == 0; i++)
        prospects[of[i]].chosen = units[i].chosen;
    free(units);
    free(of);
    return rc;
}

/* Into the plan, and to the user. */
static void settle(struct fq_plan *plan, const struct prospect *prospect) {
    const struct fq_plan_unit *unit = prospect->unit;
    const struct fq_choose_option *option = &prospect->options[prospect->chosen];
    struct fq_quantize_explanation explanation = {
        .steps = prospect->steps,
        .step_count = prospect->count,
        .stop = prospect->stop,
        .walked = prospect->walked,
        .options = prospect->takes_part ? prospect->options : NULL,
        .option_count = prospect->takes_part ? prospect->count : 0,
        .chosen = prospect->chosen};

    for (size_t i = 0; i < unit->count; i++) {
        struct fq_plan_matrix *matrix = &plan->matrices[unit->members[i]];

        matrix->group = option->group;
        matrix->expected = prospect->takes_part ? option->error / (double)unit->count
                                                : prospect->steps[prospect->chosen].error;
    }
    if (plan->options->explain)
        fq_decision_explain(plan, unit, &explanation);
}

int fq_decide_by_alpha(struct fq_decision *decision, struct fq_error *err) {
    struct fq_plan *plan = decision->plan;
    struct prospect *prospects = calloc(plan->unit_count, sizeof *prospects);
    size_t count = 0;
    int rc = prospects ? 0 : fq_fail(err, FQ_NO_MEMORY, "no memory to choose group sizes");

    for (size_t u = 0; u < plan->unit_count && rc == 0; u++) {
        struct prospect *prospect = &prospects[count];

        if (fq_decision_is_made(plan, &plan->units[u]))
            continue;
        prospect->unit = &plan->units[u];
        rc = walk(decision, prospect, err);
        count++;
    }
    if (rc == 0 && decision->problems == 0)
        rc = redistribute(prospects, count, err);
    for (size_t p = 0; p < count && rc == 0 && decision->problems == 0; p++)
        settle(plan, &prospects[p]);
    free(prospects);
    return rc;
}
