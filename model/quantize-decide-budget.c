/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Choosing bits and group sizes under a budget, from the errors of all candidates.
 *
 * With large matrices that is done twice: every candidate is estimated from some
 * of the rows and the choice made from that; then the choice, and the uniform
 * ones that might be as good, are measured on all weights, and the best of them
 * holds.  So the summed error is never larger than that of the best uniform
 * choice, and the numbers told are exact.
 */
#include "quantize-decide.h"

#include "compressed-tensors.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* So few options are measured at once. */
#define FEW_OPTIONS 3
/* Estimates are off by less than this, each; their sum by much less (quantize-measure.c). */
#define ESTIMATE_MARGIN 0.02
#define UNIFORMS_MAX    8

static const char *const kept_words =
    "3-bit rows of this length are ambiguous in the layout, and no other width is allowed";

/* The units that are decided on. */
struct allotment {
    struct fq_decision *decision;
    const struct fq_plan_unit **of;
    struct fq_choose_unit *units;
    struct fq_choose_option **options; /* the units', to be filled in */
    size_t count;
};

/* ---- what an earlier run measured --------------------------------------------------------- */

/* A unit's notes: {"options": [[bits, group, zero points, error, loss, estimated], ...],
 * "exact": {"7": [error, loss]}}, the latter of estimated options.  NULL where there are none. */
static json_t *notes_of(const struct fq_decision *decision, const struct fq_plan_unit *unit) {
    return decision->notes ? json_object_get(decision->notes->measured,
                                             decision->plan->matrices[unit->members[0]].name)
                           : NULL;
}

static bool recall_option(const json_t *noted, struct fq_choose_option *option) {
    json_int_t group;
    double error, loss;
    int bits, zeros, estimated;

    if (json_unpack((json_t *)noted, "[i, I, b, f, f, b]", &bits, &group, &zeros, &error, &loss,
                    &estimated) < 0 ||
        bits != option->bits || group != option->group || zeros != option->asymmetric)
        return false;
    option->error = error;
    option->loss = loss;
    option->estimated = estimated;
    return true;
}

/* False where not all of them are there: then they are to be measured. */
static bool recall(const struct fq_decision *decision, const struct fq_plan_unit *unit,
                   struct fq_choose_option *options, size_t count) {
    const json_t *list = json_object_get(notes_of(decision, unit), "options");
    bool all = json_array_size(list) == count;

    for (size_t o = 0; all && o < count; o++)
        all = recall_option(json_array_get(list, o), &options[o]);
    return all;
}

static void note(struct fq_decision *decision, const struct fq_plan_unit *unit,
                 const struct fq_choose_option *options, size_t count) {
    json_t *list = json_array();

    for (size_t o = 0; o < count; o++)
        json_array_append_new(list,
                              json_pack("[i, I, b, f, f, b]", options[o].bits,
                                        (json_int_t)options[o].group, options[o].asymmetric,
                                        options[o].error, options[o].loss, options[o].estimated));
    json_object_set_new(decision->notes->measured, decision->plan->matrices[unit->members[0]].name,
                        json_pack("{s:o, s:{}}", "options", list, "exact"));
    decision->notes->save(decision->notes->context);
}

static bool recall_exact(const struct fq_decision *decision, const struct fq_plan_unit *unit,
                         size_t number, struct fq_choose_option *option) {
    const json_t *exact = json_object_get(notes_of(decision, unit), "exact");
    char key[24];
    double error, loss;

    snprintf(key, sizeof key, "%zu", number);
    if (json_unpack(json_object_get(exact, key), "[f, f]", &error, &loss) < 0)
        return false;
    option->error = error;
    option->loss = loss;
    option->estimated = false;
    return true;
}

static void note_exact(struct fq_decision *decision, const struct fq_plan_unit *unit, size_t number,
                       const struct fq_choose_option *option) {
    char key[24];

    snprintf(key, sizeof key, "%zu", number);
    json_object_set_new(json_object_get(notes_of(decision, unit), "exact"), key,
                        json_pack("[f, f]", option->error, option->loss));
}

/* ---- candidates --------------------------------------------------------------------------- */

static bool is_allowed(const struct fq_quantize_options *options, int width) {
    if (options->bits)
        return options->bits == width;
    return !options->widths || (options->widths >> width & 1);
}

/* Every way that this unit may be stored, and its bytes; a width that the layout cannot tell apart
 * is left out. */
static size_t list_options(const struct fq_plan *plan, const struct fq_plan_unit *unit,
                           struct fq_choose_option *list, struct fq_error *err) {
    static const int widths[] = {3, 4, 8};
    int64_t groups[FQ_CHOOSE_GROUPS_MAX];
    size_t group_count = fq_decision_groups(plan, unit, groups, err), count = 0;

    for (size_t w = 0; w < 3; w++) {
        bool plain = true;

        if (!is_allowed(plan->options, widths[w]))
            continue;
        for (size_t i = 0; widths[w] == 3 && i < unit->count; i++)
            plain = plain && fq_ct_int3_is_plain(plan->matrices[unit->members[i]].dense.k);
        for (size_t g = 0; plain && g < group_count; g++)
            for (int zeros = 0; zeros <= plan->options->method.asymmetric; zeros++)
                list[count++] = (struct fq_choose_option){
                    .bits = widths[w], .group = groups[g], .asymmetric = zeros};
    }
    for (size_t o = 0; o < count; o++)
        for (size_t i = 0; i < unit->count; i++)
            list[o].bytes += fq_plan_bytes(&plan->matrices[unit->members[i]], list[o].bits,
                                           list[o].group, list[o].asymmetric);
    return count;
}

/* Whether not all of the unit's weights are tried with every option. */
static bool is_estimated(const struct fq_plan *plan, const struct fq_plan_unit *unit,
                         size_t options) {
    bool sampled = false;

    for (size_t i = 0; i < unit->count; i++)
        sampled = sampled || fq_quantize_is_sampled(&plan->matrices[unit->members[i]].dense);
    return sampled && options > FEW_OPTIONS;
}

static int add_unit(struct allotment *allotment, const struct fq_plan_unit *unit,
                    struct fq_error *err) {
    const struct fq_plan *plan = allotment->decision->plan;
    struct fq_choose_option *options = calloc(FQ_DECISION_OPTIONS_MAX, sizeof *options);
    struct fq_choose_unit *added = &allotment->units[allotment->count];

    if (!options)
        return fq_fail(err, FQ_NO_MEMORY, "no memory to choose under a budget");
    allotment->of[allotment->count] = unit;
    allotment->options[allotment->count++] = options;
    *added = (struct fq_choose_unit){.options = options,
                                     .count = list_options(plan, unit, options, err)};
    if (added->count == 0)
        return fq_fail(err, FQ_UNSUPPORTED, "'%.200s': %s", plan->matrices[unit->members[0]].name,
                       kept_words);
    for (size_t i = 0; i < unit->count; i++)
        if (plan->matrices[unit->members[i]].dense.k > added->k)
            added->k = plan->matrices[unit->members[i]].dense.k;
    fq_decision_foresee(allotment->decision, unit, 1 + is_estimated(plan, unit, added->count));
    return 0;
}

static int add_units(struct allotment *allotment, struct fq_error *err) {
    const struct fq_plan *plan = allotment->decision->plan;
    int rc = 0;

    allotment->of = calloc(plan->unit_count, sizeof *allotment->of);
    allotment->units = calloc(plan->unit_count, sizeof *allotment->units);
    allotment->options = calloc(plan->unit_count, sizeof *allotment->options);
    if (!allotment->of || !allotment->units || !allotment->options)
        return fq_fail(err, FQ_NO_MEMORY, "no memory to choose under a budget");
    for (size_t u = 0; u < plan->unit_count && rc == 0; u++)
        if (!fq_decision_is_made(plan, &plan->units[u]))
            rc = add_unit(allotment, &plan->units[u], err);
    return rc;
}

static void allotment_fini(struct allotment *allotment) {
    for (size_t u = 0; u < allotment->count; u++)
        free(allotment->options[u]);
    free(allotment->options);
    free(allotment->units);
    free((void *)allotment->of);
}

/* ---- the first look ----------------------------------------------------------------------- */

/* Errors and losses of all options, some of them estimates. */
static int look(struct allotment *allotment, struct fq_quantize_summary *summary,
                struct fq_error *err) {
    struct fq_decision *decision = allotment->decision;
    int rc = 0;

    for (size_t u = 0; u < allotment->count && rc == 0; u++) {
        const struct fq_plan_unit *unit = allotment->of[u];
        const size_t count = allotment->units[u].count, problems = decision->problems;

        if (recall(decision, unit, allotment->options[u], count)) {
            summary->measured_before += unit->count;
            fq_decision_skip(decision, unit);
            continue;
        }
        rc = fq_decision_measure(decision, unit, allotment->options[u], count,
                                 is_estimated(decision->plan, unit, count), err);
        if (rc == 0 && decision->notes && decision->problems == problems)
            note(decision, unit, allotment->options[u], count);
    }
    return rc;
}

/* ---- the second look ---------------------------------------------------------------------- */

/* Makes the options that any of the choices takes exact.  CHOICES: [how many][units]. */
static int look_again(struct allotment *allotment, size_t u, const size_t *choices, size_t count,
                      struct fq_error *err) {
    struct fq_decision *decision = allotment->decision;
    struct fq_choose_option wanted[1 + UNIFORMS_MAX], *options = allotment->options[u];
    const struct fq_plan_unit *unit = allotment->of[u];
    size_t numbers[1 + UNIFORMS_MAX], missing = 0;
    int rc;

    for (size_t c = 0; c < count; c++) {
        size_t number = choices[c * allotment->count + u];
        bool listed =
            !options[number].estimated || recall_exact(decision, unit, number, &options[number]);

        for (size_t m = 0; m < missing && !listed; m++)
            listed = numbers[m] == number;
        if (listed)
            continue;
        wanted[missing] = options[number];
        numbers[missing++] = number;
    }
    if (missing == 0) {
        fq_decision_skip(decision, unit);
        return 0;
    }
    if ((rc = fq_decision_measure(decision, unit, wanted, missing, false, err)) < 0)
        return rc;
    for (size_t m = 0; m < missing; m++) {
        options[numbers[m]] = wanted[m];
        if (decision->notes)
            note_exact(decision, unit, numbers[m], &wanted[m]);
    }
    if (decision->notes)
        decision->notes->save(decision->notes->context);
    return 0;
}

static double error_of(const struct allotment *allotment, const size_t *choice) {
    double error = 0;

    for (size_t u = 0; u < allotment->count; u++)
        error += allotment->options[u][choice[u]].error;
    return error;
}

static void take(struct allotment *allotment, const size_t *choice) {
    for (size_t u = 0; u < allotment->count; u++)
        allotment->units[u].chosen = choice[u];
}

static void save_choice(const struct allotment *allotment, size_t *choice) {
    for (size_t u = 0; u < allotment->count; u++)
        choice[u] = allotment->units[u].chosen;
}

/* Holds the choice to exact numbers, its own and those of the uniform choices that may be best. */
static int verify(struct allotment *allotment, uint64_t allowed, struct fq_choose_uniform *uniform,
                  struct fq_error *err) {
    const size_t units = allotment->count;
    struct fq_choose_uniform uniforms[UNIFORMS_MAX];
    size_t *choices = malloc((1 + UNIFORMS_MAX) * units * sizeof *choices + 1), count, best = 0;
    int rc = choices ? 0 : fq_fail(err, FQ_NO_MEMORY, "no memory to choose under a budget");

    if (rc < 0)
        return rc;
    save_choice(allotment, choices);
    count = 1 + fq_choose_uniforms(allotment->units, units, allowed, ESTIMATE_MARGIN, uniforms,
                                   UNIFORMS_MAX);
    for (size_t c = 1; c < count; c++) {
        fq_choose_take_uniform(allotment->units, units, &uniforms[c - 1]);
        save_choice(allotment, choices + c * units);
    }
    for (size_t u = 0; u < units && rc == 0; u++)
        if (is_estimated(allotment->decision->plan, allotment->of[u], allotment->units[u].count))
            rc = look_again(allotment, u, choices, count, err);
    for (size_t c = 1; c < count && rc == 0; c++) {
        uniforms[c - 1].error = error_of(allotment, choices + c * units);
        if (c == 1 || uniforms[c - 1].error < uniform->error)
            *uniform = uniforms[c - 1];
        if (uniforms[c - 1].error < error_of(allotment, choices + best * units))
            best = c;
    }
    take(allotment, choices + best * units);
    free(choices);
    return rc;
}

/* ---- all of it ---------------------------------------------------------------------------- */

/* Bytes of the tensors that are copied as they are. */
static uint64_t other_bytes(const struct fq_plan *plan) {
    uint64_t others = 0;

    for (size_t t = 0; t < fq_checkpoint_tensor_count(plan->checkpoint); t++)
        others += fq_checkpoint_tensor(plan->checkpoint, t)->bytes;
    for (size_t m = 0; m < plan->count; m++)
        others -= plan->matrices[m].bytes;
    return others;
}

/* What the budget leaves for the matrices that it decides on, after *FIXED for the overridden. */
static uint64_t allowance(const struct fq_plan *plan, struct fq_quantize_summary *summary,
                          uint64_t *fixed) {
    const struct fq_quantize_options *options = plan->options;
    const uint64_t others = other_bytes(plan);
    double weights = 0, total;

    *fixed = 0;
    for (size_t m = 0; m < plan->count; m++) {
        const struct fq_plan_matrix *matrix = &plan->matrices[m];

        weights += (double)matrix->dense.n * (double)matrix->dense.k;
        if (matrix->overridden)
            *fixed += fq_plan_bytes(matrix, matrix->bits, matrix->group, false);
    }
    total = options->budget ? (double)options->budget - (double)others
                            : weights * options->bits_per_weight / 8;
    summary->allowed = total > 0 ? (uint64_t)total : 0;
    return summary->allowed > *fixed ? summary->allowed - *fixed : 0;
}

/* Into the plan, the summary, and to the user. */
static void settle(const struct allotment *allotment, size_t u,
                   struct fq_quantize_summary *summary) {
    struct fq_plan *plan = allotment->decision->plan;
    const struct fq_plan_unit *unit = allotment->of[u];
    const struct fq_choose_option *option = &allotment->options[u][allotment->units[u].chosen];
    struct fq_quantize_explanation explanation = {.options = allotment->options[u],
                                                  .option_count = allotment->units[u].count,
                                                  .chosen = allotment->units[u].chosen};

    summary->expected += option->error;
    for (size_t i = 0; i < unit->count; i++) {
        struct fq_plan_matrix *matrix = &plan->matrices[unit->members[i]];

        matrix->bits = option->bits;
        matrix->group = option->group;
        matrix->asymmetric = option->asymmetric;
        matrix->expected = option->error / (double)unit->count;
    }
    if (plan->options->explain)
        fq_decision_explain(plan, unit, &explanation);
}

/* Refuses a budget that cannot be kept, before a weight is read. */
static int check_allowance(const struct allotment *allotment, uint64_t allowed, uint64_t fixed,
                           struct fq_error *err) {
    const struct fq_plan *plan = allotment->decision->plan;
    int rc = fq_choose_check(allotment->units, allotment->count, allowed, err);

    if (rc < 0 && fixed > 0)
        fq_fail_in(err, "--override fixes %" PRIu64 " bytes", fixed);
    if (rc < 0 && plan->options->budget)
        fq_fail_in(err, "%" PRIu64 " bytes, of which tensors that stay as they are take %" PRIu64,
                   plan->options->budget, other_bytes(plan));
    else if (rc < 0)
        fq_fail_in(err, "%g bits a weight", plan->options->bits_per_weight);
    return rc;
}

int fq_decide_by_budget(struct fq_decision *decision, struct fq_quantize_summary *summary,
                        struct fq_error *err) {
    const struct fq_plan *plan = decision->plan;
    struct allotment allotment = {.decision = decision};
    uint64_t fixed, allowed = allowance(plan, summary, &fixed);
    int rc = add_units(&allotment, err);

    if (rc == 0)
        rc = check_allowance(&allotment, allowed, fixed, err);
    if (rc == 0)
        rc = look(&allotment, summary, err);
    if (rc == 0 && decision->problems == 0) {
        rc = fq_choose_by_budget(allotment.units, allotment.count, allowed, &summary->uniform, err);
        if (rc == 0)
            rc = verify(&allotment, allowed, &summary->uniform, err);
        if (summary->uniform.bits) /* with what --override fixes, as all that is told of bytes */
            summary->uniform.bytes += fixed;
    }
    for (size_t u = 0; u < allotment.count && rc == 0 && decision->problems == 0; u++)
        settle(&allotment, u, summary);
    summary->budgeted = true;
    allotment_fini(&allotment);
    return rc;
}
