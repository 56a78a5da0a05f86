/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the two ways to decide a plan's schemes share: quantize-decide-alpha.c and
 * quantize-decide-budget.c, called by quantize-decide.c alone.  One thread.
 */
#ifndef FQ_MODEL_QUANTIZE_DECIDE_H
#define FQ_MODEL_QUANTIZE_DECIDE_H

#include "quantize-plan.h"

/* Three widths, with and without zero points. */
#define FQ_DECISION_OPTIONS_MAX (3 * 2 * FQ_CHOOSE_GROUPS_MAX)

/* Where the walk over the units stands. */
struct fq_decision {
    struct fq_plan *plan;
    uint64_t done, total; /* bytes looked at */
    uint64_t kept;        /* of those done: without looking */
    size_t layers_done, layers;
    size_t problems;             /* matrices that cannot be quantized */
    struct fq_error first;       /* what is wrong with the first of them */
    struct fq_plan_notes *notes; /* of what was measured, or NULL */
};

/* Whether the user has said what the unit gets. */
bool fq_decision_is_made(const struct fq_plan *plan, const struct fq_plan_unit *unit);
/* The candidates of a unit, the coarsest first; 0 without memory. */
size_t fq_decision_groups(const struct fq_plan *plan, const struct fq_plan_unit *unit,
                          int64_t groups[FQ_CHOOSE_GROUPS_MAX], struct fq_error *err);
/* What a matrix with the relative error ERROR adds to the sum that is minimised. */
double fq_decision_loss(const struct fq_plan *plan, const struct fq_plan_matrix *matrix,
                        double error);
/* That every matrix of the unit will be looked at so many times more. */
void fq_decision_foresee(struct fq_decision *decision, const struct fq_plan_unit *unit, int times);
/* That one of these times is not needed. */
void fq_decision_skip(struct fq_decision *decision, const struct fq_plan_unit *unit);
/* After a matrix was looked at, with the status RC: progress, pages, and what was wrong with it.  0
 * goes on. */
int fq_decision_looked_at(struct fq_decision *decision, struct fq_plan_matrix *matrix, int rc,
                          struct fq_error *err);
/* Tries the options on the unit's weights, all of them, or some of the rows of a large matrix where
 * ESTIMATE says so; fills in error, loss and estimated. */
int fq_decision_measure(struct fq_decision *decision, const struct fq_plan_unit *unit,
                        struct fq_choose_option *options, size_t count, bool estimate,
                        struct fq_error *err);
/* Tells the user's callback, with the names of the unit's matrices. */
void fq_decision_explain(const struct fq_plan *plan, const struct fq_plan_unit *unit,
                         struct fq_quantize_explanation *explanation);

/* Each decides all units that are not decided; the caller looks at decision->problems. */
int fq_decide_by_alpha(struct fq_decision *decision, struct fq_error *err);
int fq_decide_by_budget(struct fq_decision *decision, struct fq_quantize_summary *summary,
                        struct fq_error *err);

#endif
