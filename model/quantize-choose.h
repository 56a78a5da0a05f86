/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Choosing group sizes and widths from numbers alone: the rule that stops at
 * alpha, and the allocation under a budget.  Knows nothing of tensors; internal
 * to model/.  Pure functions, any thread.
 */
#ifndef FQ_MODEL_QUANTIZE_CHOOSE_H
#define FQ_MODEL_QUANTIZE_CHOOSE_H

#include "error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Halvings of 2^24 down to 256, 128 where it is no halving, and so on to 16. */
#define FQ_CHOOSE_GROUPS_MAX 32

/*
 * The group sizes worth trying for matrices of these K, which are to share one, the coarsest
 * first: 0 (per channel), the smallest K halved, and again while that is more than 256, and the
 * powers of two below.  Each is a multiple of 16, at least MIN_GROUP, and divides every K, as
 * compressed-tensors and the kernels of vLLM ask.  Returns how many there are.
 */
size_t fq_choose_groups(const int64_t *k, size_t count, int64_t min_group,
                        int64_t groups[FQ_CHOOSE_GROUPS_MAX]);

/* A granularity: what it costs and what it leaves. */
struct fq_choose_step {
    int64_t group; /* weights; per channel is K here */
    double bits;   /* of scales (and zero points) a weight */
    double error;  /* to be expected, relative */
};

enum fq_choose_stop {
    FQ_CHOOSE_FINEST, /* no finer candidate is there */
    FQ_CHOOSE_ALPHA,  /* none gains alpha a halving */
    FQ_CHOOSE_PRICE   /* one does, but its scales cost more than they are worth */
};

/*
 * --group auto chooses in two steps.
 *
 * The first is the paper's rule with a statistic that works, the error that the ranges of the
 * groups predict (fq_quantize_crest): from the coarsest granularity on, take the next one that
 * pays, until none does.  A step from error e to e' pays where
 *   - it gains ALPHA for each halving of the group: e'/e ≤ (1 − ALPHA)^halvings, and
 *   - the bits that its scales add are worth it: log2(e/e') ≥ added bits a weight.  A bit more in
 *     every code would halve the error (6 dB a bit); a bit more in scales has to do that, too.
 * Where the next candidate does not pay, a finer one still may: outliers in every eighth column
 * make the first three halvings useless and the fourth a cure.
 * Returns the index of the choice; *stop says why it went no further.
 */
size_t fq_choose_by_alpha(const struct fq_choose_step *steps, size_t count, double alpha,
                          enum fq_choose_stop *stop);

/* One way to store a unit (the matrices that share a scheme). */
struct fq_choose_option {
    int bits;
    int64_t group; /* 0: per channel */
    bool asymmetric;
    uint64_t bytes;
    double error; /* summed over the unit's matrices */
    double loss;  /* what a budget minimises the sum of; the smaller the error, the smaller it is */
    bool estimated; /* error and loss are, from some of the weights */
};

struct fq_choose_unit {
    int64_t k; /* the largest of the unit, for what "per channel" compares as */
    const struct fq_choose_option *options;
    size_t count;  /* at least 1 */
    size_t chosen; /* out */
};

/* The best choice of one width and one group size for all units within the budget. */
struct fq_choose_uniform {
    int bits;      /* 0: none fits */
    int64_t group; /* 0: per channel */
    uint64_t bytes;
    double error;
};

/* Whether the smallest options fit in BUDGET: 0, or -FQ_INVALID, which names the least possible.
 * Asks for bytes alone, so that it can be called before anything is measured. */
int fq_choose_check(const struct fq_choose_unit *units, size_t count, uint64_t budget,
                    struct fq_error *err);

/*
 * Minimises the summed loss with Σ bytes ≤ BUDGET: along the lower convex hulls of the units'
 * options by gain a byte (which is optimal for every budget it exactly reaches), then whatever
 * still fits, best gain a byte first, then exchanges between two units; the uniform choice of the
 * least summed error is tried as a start too.  Where that leaves a summed error no smaller than the
 * uniform choice's, the summed error is minimised in the loss's place: it is never larger.
 * -FQ_INVALID as fq_choose_check().
 */
int fq_choose_by_budget(struct fq_choose_unit *units, size_t count, uint64_t budget,
                        struct fq_choose_uniform *uniform, struct fq_error *err);

/*
 * The uniform choices within the budget: the one of the least summed error first, then those that
 * are worse by up to MARGIN, relative, ROOM at most.  Returns how many.  The units' own choices are
 * lost.
 */
size_t fq_choose_uniforms(struct fq_choose_unit *units, size_t count, uint64_t budget,
                          double margin, struct fq_choose_uniform *list, size_t room);
/* Makes a uniform choice the units'.  Where a unit has no such option it gets the nearest one that
 * is neither narrower nor, if possible, coarser. */
void fq_choose_take_uniform(struct fq_choose_unit *units, size_t count,
                            const struct fq_choose_uniform *uniform);

/*
 * Normal weights have E max² of g of them under a group's scale, whose root falls by 0.065 to 0.071
 * a halving from 4096, 2048 and 1024 columns to 32: what gains no more gains by chance, not by
 * structure.
 */
#define FQ_CHOOSE_ALPHA_OF_CHANCE 0.075

/*
 * The second step.  The walk tells structure from chance, and what scales are worth; but it judges
 * each unit by itself, and gains relative to the unit's own error end at another price a byte in
 * each: where one stops at the edge of alpha, the next goes on for less.  For a given sum of bytes
 * the loss is least where the last byte takes away as much everywhere, which is how a budget
 * chooses.
 *
 * So: UNITS are those in which the walk finds more than chance, at ALPHA or at that of chance, and
 * CHOSEN is where it left each.  The bytes that they have there together are a budget for them, in
 * which each may get any option, its coarsest included.  The result is kept where its loss or its
 * summed error is the smaller; the bytes are never more.  Units without structure stay out, so
 * that bytes for a few spoilt matrices do not trickle into a hundred sound ones.
 *
 * The errors are to be those of the scale rule (fq_quantize_estimate).  With what the ranges
 * predict the choice was worse: a searched scale takes away the more the coarser the group, so that
 * the ranges promise too much of refining outliers.  all-MiniLM-L6-v2 at alpha 0.075, int4, against
 * uniform groups in as many bytes: summed error 2.8% less with measured errors, 0.5% with predicted
 * ones, 0.7% more without this step.
 */
int fq_choose_again(struct fq_choose_unit *units, size_t count, struct fq_error *err);

#endif
