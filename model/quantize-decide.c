/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Deciding bits, group size and zero points of every unit: by alpha from the
 * ranges of the groups, or under a budget from the errors of all candidates.
 * Reads every weight that has to be looked at, matrix by matrix.
 */
#include "quantize-plan.h"

#include "compressed-tensors.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define TRIALS_MAX (3 * 2 * FQ_CHOOSE_GROUPS_MAX)

/* Where the walk over the units stands. */
struct decision {
    struct fq_plan *plan;
    uint64_t done, total; /* bytes looked at */
    size_t layers_done, layers;
    size_t problems;
    struct fq_error first; /* of them */
};

static const char *const kept_words =
    "3-bit rows of this length are ambiguous in the layout, and no other width is allowed";

/* ---- what both ways need ------------------------------------------------------------------ */

/* Another matrix that cannot be quantized.  The first waits: if it stays alone, it is the error. */
static void add_problem(struct decision *decision, const struct fq_error *err) {
    const struct fq_quantize_options *options = decision->plan->options;

    if (++decision->problems == 1) {
        decision->first = *err;
    } else if (options->problem) {
        if (decision->problems == 2)
            options->problem(options->context, decision->first.message);
        options->problem(options->context, err->message);
    }
}

/* After a matrix was looked at: progress, pages, and what was wrong with it.  0 goes on. */
static int looked_at(struct decision *decision, struct fq_plan_matrix *matrix, int rc,
                     struct fq_error *err) {
    const struct fq_quantize_options *options = decision->plan->options;
    struct fq_quantize_progress progress = {.phase = FQ_QUANTIZE_MEASURE};

    fq_plan_drop(matrix);
    decision->done += matrix->bytes;
    progress.bytes_done = decision->done;
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

/* Candidates of a unit; coarsest first. */
static size_t unit_groups(const struct fq_plan *plan, const struct fq_plan_unit *unit,
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

static void explain(const struct fq_plan *plan, const struct fq_plan_unit *unit,
                    struct fq_quantize_explanation *explanation) {
    const char **names = malloc(unit->count * sizeof *names);

    for (size_t i = 0; names && i < unit->count; i++)
        names[i] = plan->matrices[unit->members[i]].name;
    explanation->names = names;
    explanation->count = names ? unit->count : 0;
    plan->options->explain(plan->options->context, explanation);
    free(names);
}

/* ---- alpha -------------------------------------------------------------------------------- */

/*
 * The error to expect of each candidate, from the ranges alone: crest·2/((2^bits − 1)·√12), see
 * quantize.h.  Over the unit, the mean by weights.
 */
static int expect(struct decision *decision, const struct fq_plan_unit *unit, const int64_t *groups,
                  size_t count, struct fq_choose_step *steps, struct fq_error *err) {
    const struct fq_quantize_options *options = decision->plan->options;
    double crest[FQ_CHOOSE_GROUPS_MAX], weights = 0;
    int64_t longest = 0;

    for (size_t i = 0; i < count; i++)
        steps[i] = (struct fq_choose_step){0};
    for (size_t i = 0; i < unit->count; i++) {
        struct fq_plan_matrix *matrix = &decision->plan->matrices[unit->members[i]];
        double own = (double)matrix->dense.n * (double)matrix->dense.k;
        double to_error = 2 / (((1 << matrix->bits) - 1) * sqrt(12));
        int rc;

        fq_plan_read_ahead(decision->plan, unit->members[i] + 1);
        rc = fq_quantize_crest(&matrix->dense, options->method.allow_nonfinite, groups, count,
                               crest, err);

        longest = matrix->dense.k > longest ? matrix->dense.k : longest;
        weights += own;
        for (size_t g = 0; rc == 0 && g < count; g++) {
            double group = (double)(groups[g] ? groups[g] : matrix->dense.k);

            steps[g].error += own * crest[g] * to_error;
            steps[g].bits += own * 16 / group;
        }
        if ((rc = looked_at(decision, matrix, rc, err)) < 0)
            return rc;
    }
    for (size_t g = 0; g < count; g++) {
        steps[g].error /= weights;
        steps[g].bits /= weights;
        steps[g].group = groups[g] ? groups[g] : longest;
    }
    return 0;
}

static int decide_by_alpha(struct decision *decision, const struct fq_plan_unit *unit,
                           struct fq_error *err) {
    struct fq_plan *plan = decision->plan;
    int64_t groups[FQ_CHOOSE_GROUPS_MAX];
    struct fq_choose_step steps[FQ_CHOOSE_GROUPS_MAX];
    struct fq_quantize_explanation explanation = {.bits = plan->matrices[unit->members[0]].bits};
    size_t count = unit_groups(plan, unit, groups, err), chosen;
    int rc;

    if (count == 0)
        return err->status;
    if ((rc = expect(decision, unit, groups, count, steps, err)) < 0)
        return rc;
    chosen = fq_choose_by_alpha(steps, count, plan->options->alpha, &explanation.stop);
    for (size_t i = 0; i < unit->count; i++) {
        plan->matrices[unit->members[i]].group = groups[chosen];
        plan->matrices[unit->members[i]].expected = steps[chosen].error;
    }
    if (plan->options->explain) {
        explanation.steps = steps;
        explanation.step_count = count;
        explanation.chosen = chosen;
        explain(plan, unit, &explanation);
    }
    return 0;
}

/* Zero points pay where they take away more error than as many bits in the codes would. */
static int decide_symmetry(struct decision *decision, const struct fq_plan_unit *unit,
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
        if ((rc = looked_at(decision, matrix, rc, err)) < 0)
            return rc;
    }
    pays = shifted < plain * exp2(-bits / weights);
    for (size_t i = 0; i < unit->count; i++) {
        plan->matrices[unit->members[i]].asymmetric = pays;
        plan->matrices[unit->members[i]].expected = (pays ? shifted : plain) / weights;
    }
    return 0;
}

/* ---- budget ------------------------------------------------------------------------------- */

/* Every way that this unit may be stored; a width that the layout cannot tell apart is left out. */
static size_t list_options(const struct fq_plan *plan, const struct fq_plan_unit *unit,
                           struct fq_choose_option *list, struct fq_error *err) {
    static const int widths[] = {3, 4, 8};
    int64_t groups[FQ_CHOOSE_GROUPS_MAX];
    size_t group_count = unit_groups(plan, unit, groups, err), count = 0;

    for (size_t w = 0; w < 3; w++) {
        bool plain = true;

        if (plan->options->bits && plan->options->bits != widths[w])
            continue;
        for (size_t i = 0; widths[w] == 3 && i < unit->count; i++)
            plain = plain && fq_ct_int3_is_plain(plan->matrices[unit->members[i]].dense.k);
        for (size_t g = 0; plain && g < group_count; g++)
            for (int zeros = 0; zeros <= plan->options->method.asymmetric; zeros++)
                list[count++] = (struct fq_choose_option){
                    .bits = widths[w], .group = groups[g], .asymmetric = zeros};
    }
    return count;
}

/*
 * Bytes, error and loss of every option, from trials on all of the unit's weights.
 *
 * The loss of a matrix of N by K with the relative error e is √(N·K)·e², if it is not to be e
 * itself.  Squared, because rounding errors of different matrices are independent, so that what
 * they do to the model's output adds up as variances do: with the plain sum a budget would rather
 * ruin one matrix than touch five. Weighted, because how much a matrix's error matters is not to be
 * had without data, but large matrices are the ones that most of the output passes through: the
 * mean, on a scale of factors, between counting each matrix alike and counting each weight alike.
 */
static int measure(struct decision *decision, const struct fq_plan_unit *unit,
                   struct fq_choose_option *options, size_t count, struct fq_error *err) {
    struct fq_quantize_trial trials[TRIALS_MAX];

    for (size_t o = 0; o < count; o++)
        trials[o] = (struct fq_quantize_trial){.bits = options[o].bits,
                                               .group = options[o].group,
                                               .asymmetric = options[o].asymmetric};
    for (size_t i = 0; i < unit->count; i++) {
        struct fq_plan_matrix *matrix = &decision->plan->matrices[unit->members[i]];
        int rc;

        fq_plan_read_ahead(decision->plan, unit->members[i] + 1);
        rc = fq_quantize_measure(&matrix->dense, &decision->plan->options->method, trials, count,
                                 err);

        for (size_t o = 0; rc == 0 && o < count; o++) {
            options[o].bytes +=
                fq_plan_bytes(matrix, options[o].bits, options[o].group, options[o].asymmetric);
            options[o].error += trials[o].error;
            options[o].loss += decision->plan->options->loss == FQ_LOSS_ERROR
                                   ? trials[o].error
                                   : sqrt((double)matrix->dense.n * (double)matrix->dense.k) *
                                         trials[o].error * trials[o].error;
        }
        if ((rc = looked_at(decision, matrix, rc, err)) < 0)
            return rc;
    }
    return 0;
}

/* Bytes of the tensors that are copied as they are. */
static uint64_t other_bytes(const struct fq_plan *plan) {
    uint64_t others = 0;

    for (size_t t = 0; t < fq_checkpoint_tensor_count(plan->checkpoint); t++)
        others += fq_checkpoint_tensor(plan->checkpoint, t)->bytes;
    for (size_t m = 0; m < plan->count; m++)
        others -= plan->matrices[m].bytes;
    return others;
}

/* What the budget leaves for the matrices that it decides on. */
static uint64_t allowance(const struct fq_plan *plan, struct fq_quantize_summary *summary) {
    const struct fq_quantize_options *options = plan->options;
    const uint64_t others = other_bytes(plan);
    uint64_t fixed = 0;
    double weights = 0, total;

    for (size_t m = 0; m < plan->count; m++) {
        const struct fq_plan_matrix *matrix = &plan->matrices[m];

        weights += (double)matrix->dense.n * (double)matrix->dense.k;
        if (matrix->overridden)
            fixed += fq_plan_bytes(matrix, matrix->bits, matrix->group, false);
    }
    total = options->budget ? (double)options->budget - (double)others
                            : weights * options->bits_per_weight / 8;
    summary->allowed = total > 0 ? (uint64_t)total : 0;
    return summary->allowed > fixed ? summary->allowed - fixed : 0;
}

static int decide_by_budget(struct decision *decision, struct fq_quantize_summary *summary,
                            struct fq_error *err) {
    struct fq_plan *plan = decision->plan;
    struct fq_choose_unit *units = calloc(plan->unit_count, sizeof *units);
    size_t *of = calloc(plan->unit_count, sizeof *of), count = 0;
    uint64_t allowed = allowance(plan, summary);
    int rc = units && of ? 0 : fq_fail(err, FQ_NO_MEMORY, "no memory to choose under a budget");

    for (size_t u = 0; u < plan->unit_count && rc == 0; u++) {
        const struct fq_plan_unit *unit = &plan->units[u];
        struct fq_choose_option *options;

        if (plan->matrices[unit->members[0]].overridden)
            continue;
        options = calloc(TRIALS_MAX, sizeof *options);
        if (!options) {
            rc = fq_fail(err, FQ_NO_MEMORY, "no memory to choose under a budget");
            break;
        }
        of[count] = u;
        units[count].options = options;
        units[count].count = list_options(plan, unit, options, err);
        for (size_t i = 0; i < unit->count; i++)
            if (plan->matrices[unit->members[i]].dense.k > units[count].k)
                units[count].k = plan->matrices[unit->members[i]].dense.k;
        count++;
        rc = units[count - 1].count == 0
                 ? fq_fail(err, FQ_UNSUPPORTED, "'%.200s': %s",
                           plan->matrices[unit->members[0]].name, kept_words)
                 : measure(decision, unit, options, units[count - 1].count, err);
    }
    if (rc == 0 && decision->problems == 0) {
        rc = fq_choose_by_budget(units, count, allowed, &summary->uniform, err);
        if (rc == -FQ_INVALID && plan->options->budget)
            fq_fail_in(err,
                       "%" PRIu64 " bytes, of which tensors that stay as they are take %" PRIu64,
                       plan->options->budget, other_bytes(plan));
    }
    for (size_t c = 0; c < count && rc == 0 && decision->problems == 0; c++) {
        const struct fq_plan_unit *unit = &plan->units[of[c]];
        const struct fq_choose_option *option = &units[c].options[units[c].chosen];

        summary->expected += option->error;
        for (size_t i = 0; i < unit->count; i++) {
            struct fq_plan_matrix *matrix = &plan->matrices[unit->members[i]];

            matrix->bits = option->bits;
            matrix->group = option->group;
            matrix->asymmetric = option->asymmetric;
            matrix->expected = option->error / (double)unit->count;
        }
        if (plan->options->explain) {
            struct fq_quantize_explanation explanation = {.options = units[c].options,
                                                          .option_count = units[c].count,
                                                          .chosen = units[c].chosen};

            explain(plan, unit, &explanation);
        }
    }
    summary->budgeted = true;
    for (size_t c = 0; units && c < count; c++)
        free((void *)units[c].options);
    free(units);
    free(of);
    return rc;
}

/* ---- all of it ---------------------------------------------------------------------------- */

/* Matrices that stay dense need no decision. */
static void keep_ambiguous(struct fq_plan *plan) {
    for (size_t m = 0; m < plan->count; m++)
        plan->matrices[m].kept_dense =
            plan->matrices[m].bits == 3 && !fq_ct_int3_is_plain(plan->matrices[m].dense.k);
}

int fq_plan_decide(struct fq_plan *plan, struct fq_quantize_summary *summary,
                   struct fq_error *err) {
    const struct fq_quantize_options *options = plan->options;
    bool budget = options->budget > 0 || options->bits_per_weight > 0;
    bool ranges = !budget && options->group == FQ_QUANTIZE_GROUP_AUTO;
    bool zeros = !budget && options->method.asymmetric;
    struct decision decision = {.plan = plan};
    int rc = 0;

    for (size_t m = 0; m < plan->count; m++) {
        if (plan->matrices[m].overridden)
            continue;
        decision.layers += (size_t)budget + ranges + zeros;
        decision.total += plan->matrices[m].bytes * ((uint64_t)budget + ranges + zeros);
    }
    if (budget)
        rc = decide_by_budget(&decision, summary, err);
    for (size_t u = 0; u < plan->unit_count && rc == 0; u++) {
        if (plan->matrices[plan->units[u].members[0]].overridden)
            continue;
        if (ranges)
            rc = decide_by_alpha(&decision, &plan->units[u], err);
        if (zeros && rc == 0 && decision.problems == 0)
            rc = decide_symmetry(&decision, &plan->units[u], err);
    }
    if (rc == 0 && decision.problems == 1) {
        *err = decision.first;
        rc = err->status;
    } else if (rc == 0 && decision.problems > 1) {
        rc = fq_fail(err, FQ_INVALID, "%zu matrices cannot be quantized", decision.problems);
    }
    keep_ambiguous(plan);
    return rc;
}
