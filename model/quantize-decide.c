/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Deciding bits, group size and zero points of every unit: by alpha, from the
 * ranges of the groups and then the errors of those that gain, or under a budget
 * from the errors of all candidates.  Reads every weight that has to be looked
 * at, matrix by matrix.
 */
#include "quantize-decide.h"

#include <math.h>
#include <stdlib.h>

/* ---- what both ways need ------------------------------------------------------------------ */

/* Another matrix that cannot be quantized.  The first waits: if it stays alone, it is the error. */
static void add_problem(struct fq_decision *decision, const struct fq_error *err) {
    const struct fq_quantize_options *options = decision->plan->options;

    if (++decision->problems == 1) {
        decision->first = *err;
    } else if (options->problem) {
        if (decision->problems == 2)
            options->problem(options->context, decision->first.message);
        options->problem(options->context, err->message);
    }
}

int fq_decision_looked_at(struct fq_decision *decision, struct fq_plan_matrix *matrix, int rc,
                          struct fq_error *err) {
    const struct fq_quantize_options *options = decision->plan->options;
    struct fq_quantize_progress progress = {.phase = FQ_QUANTIZE_MEASURE};

    fq_plan_drop(matrix);
    decision->done += matrix->bytes;
    progress.bytes_done = decision->done;
    progress.bytes_kept = decision->kept;
    progress.bytes_total = decision->total;
    progress.layers_done = ++decision->layers_done;
    progress.layers = decision->layers;
    fq_plan_looked(decision->plan, &progress);
    if (rc == -FQ_INVALID) {
        fq_fail_in(err, "%s: tensor '%.200s'", matrix->source->file, matrix->source->name);
        add_problem(decision, err);
        rc = 0;
    }
    if (rc == 0 && options->progress && options->progress(options->context, &progress) != 0)
        rc = fq_fail(err, FQ_CANCELLED, "stopped after looking at %zu of %zu layers",
                     decision->layers_done, decision->layers);
    return rc;
}

void fq_decision_foresee(struct fq_decision *decision, const struct fq_plan_unit *unit, int times) {
    for (size_t i = 0; i < unit->count; i++)
        decision->total += decision->plan->matrices[unit->members[i]].bytes * (uint64_t)times;
    decision->layers += unit->count * (size_t)times;
}

void fq_decision_skip(struct fq_decision *decision, const struct fq_plan_unit *unit) {
    for (size_t i = 0; i < unit->count; i++) {
        const uint64_t bytes = decision->plan->matrices[unit->members[i]].bytes;

        decision->done += bytes;
        decision->kept += bytes;
    }
    decision->layers_done += unit->count;
}

bool fq_decision_is_made(const struct fq_plan *plan, const struct fq_plan_unit *unit) {
    return plan->matrices[unit->members[0]].overridden;
}

/*
 * The loss of a matrix of N by K with the relative error e is √(N·K)·e², if it is not to be e
 * itself.  Squared, because rounding errors of different matrices are independent, so that what
 * they do to the model's output adds up as variances do: with the plain sum a budget would rather
 * ruin one matrix than touch five. Weighted, because how much a matrix's error matters is not to be
 * had without data, but large matrices are the ones that most of the output passes through: the
 * mean, on a scale of factors, between counting each matrix alike and counting each weight alike.
 */
double fq_decision_loss(const struct fq_plan *plan, const struct fq_plan_matrix *matrix,
                        double error) {
    if (plan->options->loss == FQ_LOSS_ERROR)
        return error;
    return sqrt((double)matrix->dense.n * (double)matrix->dense.k) * error * error;
}

int fq_decision_measure(struct fq_decision *decision, const struct fq_plan_unit *unit,
                        struct fq_choose_option *options, size_t count, bool estimate,
                        struct fq_error *err) {
    struct fq_quantize_trial trials[FQ_DECISION_OPTIONS_MAX];
    struct fq_plan *plan = decision->plan;

    for (size_t o = 0; o < count; o++) {
        trials[o] = (struct fq_quantize_trial){.bits = options[o].bits,
                                               .group = options[o].group,
                                               .asymmetric = options[o].asymmetric};
        options[o].error = options[o].loss = 0;
        options[o].estimated = false;
    }
    for (size_t i = 0; i < unit->count; i++) {
        struct fq_plan_matrix *matrix = &plan->matrices[unit->members[i]];
        bool sampled = estimate && fq_quantize_is_sampled(&matrix->dense);
        int rc;

        fq_plan_read_ahead(plan, unit->members[i] + 1);
        rc = (sampled ? fq_quantize_estimate : fq_quantize_measure)(
            &matrix->dense, &plan->options->method, trials, count, err);
        for (size_t o = 0; rc == 0 && o < count; o++) {
            options[o].error += trials[o].error;
            options[o].loss += fq_decision_loss(plan, matrix, trials[o].error);
            options[o].estimated = options[o].estimated || sampled;
        }
        if ((rc = fq_decision_looked_at(decision, matrix, rc, err)) < 0)
            return rc;
    }
    return 0;
}

size_t fq_decision_groups(const struct fq_plan *plan, const struct fq_plan_unit *unit,
                          int64_t groups[FQ_CHOOSE_GROUPS_MAX], struct fq_error *err) {
    int64_t *k;
    size_t count;

    if (plan->options->group != FQ_QUANTIZE_GROUP_AUTO) {
        groups[0] = plan->options->group;
        return 1;
    }
    k = malloc(unit->count * sizeof *k);
    if (!k) {
        fq_fail(err, FQ_NO_MEMORY, "no memory for %zu matrices", unit->count);
        return 0;
    }
    for (size_t i = 0; i < unit->count; i++)
        k[i] = plan->matrices[unit->members[i]].dense.k;
    count = fq_choose_groups(k, unit->count, plan->options->min_group, groups);
    free(k);
    return count;
}

void fq_decision_explain(const struct fq_plan *plan, const struct fq_plan_unit *unit,
                         struct fq_quantize_explanation *explanation) {
    const char **names = malloc(unit->count * sizeof *names);

    for (size_t i = 0; names && i < unit->count; i++)
        names[i] = plan->matrices[unit->members[i]].name;
    explanation->names = names;
    explanation->count = names ? unit->count : 0;
    plan->options->explain(plan->options->context, explanation);
    free(names);
}

/* ---- zero points --------------------------------------------------------------------------- */

/* Zero points pay where they take away more error than as many bits in the codes would. */
static int decide_symmetry(struct fq_decision *decision, const struct fq_plan_unit *unit,
                           struct fq_error *err) {
    struct fq_plan *plan = decision->plan;
    double plain = 0, shifted = 0, bits = 0, weights = 0;
    bool pays;

    for (size_t i = 0; i < unit->count; i++) {
        struct fq_plan_matrix *matrix = &plan->matrices[unit->members[i]];
        double own = (double)matrix->dense.n * (double)matrix->dense.k;
        struct fq_quantize_trial trials[] = {
            {.bits = matrix->bits, .group = matrix->group},
            {.bits = matrix->bits, .group = matrix->group, .asymmetric = true},
        };
        int rc = fq_quantize_measure(&matrix->dense, &plan->options->method, trials, 2, err);

        plain += trials[0].error * own;
        shifted += trials[1].error * own;
        bits += 8 * (double)(fq_plan_bytes(matrix, matrix->bits, matrix->group, true) -
                             fq_plan_bytes(matrix, matrix->bits, matrix->group, false));
        weights += own;
        if ((rc = fq_decision_looked_at(decision, matrix, rc, err)) < 0)
            return rc;
    }
    pays = shifted < plain * exp2(-bits / weights);
    for (size_t i = 0; i < unit->count; i++) {
        plan->matrices[unit->members[i]].asymmetric = pays;
        plan->matrices[unit->members[i]].expected = (pays ? shifted : plain) / weights;
    }
    return 0;
}

/* ---- all of it ---------------------------------------------------------------------------- */

int fq_plan_decide(struct fq_plan *plan, struct fq_quantize_summary *summary,
                   struct fq_plan_notes *notes, struct fq_error *err) {
    const struct fq_quantize_options *options = plan->options;
    bool budget = options->budget > 0 || options->bits_per_weight > 0;
    bool ranges = !budget && options->group == FQ_QUANTIZE_GROUP_AUTO;
    bool zeros = !budget && options->method.asymmetric;
    struct fq_decision decision = {.plan = plan, .notes = notes};
    int rc = 0;

    for (size_t u = 0; u < plan->unit_count; u++)
        if (!fq_decision_is_made(plan, &plan->units[u]))
            fq_decision_foresee(&decision, &plan->units[u], ranges + zeros);
    if (budget)
        rc = fq_decide_by_budget(&decision, summary, err);
    else if (ranges)
        rc = fq_decide_by_alpha(&decision, err);
    for (size_t u = 0; zeros && u < plan->unit_count && rc == 0 && decision.problems == 0; u++)
        if (!fq_decision_is_made(plan, &plan->units[u]))
            rc = decide_symmetry(&decision, &plan->units[u], err);
    if (rc == 0 && decision.problems == 1) {
        *err = decision.first;
        rc = err->status;
    } else if (rc == 0 && decision.problems > 1) {
        rc = fq_fail(err, FQ_INVALID, "%zu matrices cannot be quantized", decision.problems);
    }
    for (size_t m = 0; m < plan->count; m++)
        plan->matrices[m].kept_dense = fq_plan_stays_dense(&plan->matrices[m]);
    return rc;
}
