/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a matrix would keep of itself at several group sizes and widths, without
 * writing a code: the ranges alone (fq_quantize_crest), or every rounding tried
 * (fq_quantize_measure).
 */
#include "quantize-row.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- whether it can be quantized --------------------------------------------------------- */

struct scheme {
    int bits;
    int64_t group; /* 0: per channel */
    struct fq_quantize_method method;
};

static int64_t group_of(const struct fq_row *row, int64_t group) {
    return group == 0 || group > row->k ? row->k : group;
}

static bool fit_row(struct fq_row *row, int64_t n, void *context, struct fq_row_fault *fault) {
    const struct scheme *scheme = context;
    int64_t group = group_of(row, scheme->group);

    (void)n;
    for (int64_t column = 0; column < row->k; column += group) {
        int64_t weights = row->k - column < group ? row->k - column : group;
        struct fq_fit fit;

        if (!fq_row_fit(row, column, weights, scheme->bits, &scheme->method, &fit, fault))
            return false;
    }
    return true;
}

int fq_quantize_check(const struct fq_dense *dense, const struct fq_quantize_method *method,
                      const struct fq_matrix *matrix, struct fq_error *err) {
    struct scheme scheme = {.bits = matrix->bits, .group = matrix->group, .method = *method};

    scheme.method.scale = FQ_SCALE_ABSMAX; /* what a search can fail on, this does as well */
    return fq_rows(dense, method->allow_nonfinite, fit_row, &scheme, err);
}

/* ---- what it would keep ------------------------------------------------------------------- */

/* Sums over a matrix, one for each of `count` questions, and Σw² after them; row by row first. */
struct sums {
    const void *questions;
    size_t count;
    double *rows; /* [n][count + 1] */
};

/* Asks every row, and adds up what they say in order. */
static int ask(const struct fq_dense *dense, bool allow_nonfinite, fq_row_body body,
               const void *questions, size_t count, double *totals, struct fq_error *err) {
    size_t width = count + 1;
    struct sums sums = {.questions = questions, .count = count};
    int rc;

    sums.rows = calloc((size_t)dense->n * width, sizeof *sums.rows);
    if (!sums.rows)
        return fq_fail(err, FQ_NO_MEMORY, "no memory to measure %lld by %lld weights",
                       (long long)dense->n, (long long)dense->k);
    rc = fq_rows(dense, allow_nonfinite, body, &sums, err);
    memset(totals, 0, width * sizeof *totals);
    for (size_t i = 0; rc == 0 && i < (size_t)dense->n * width; i++)
        totals[i % width] += sums.rows[i];
    free(sums.rows);
    return rc;
}

static bool sum_ranges(struct fq_row *row, int64_t n, void *context, struct fq_row_fault *fault) {
    const struct sums *all = context;
    const int64_t *groups = all->questions;
    double *sums = all->rows + (size_t)n * (all->count + 1);

    (void)fault;
    sums[all->count] = row->power;
    for (size_t i = 0; i < all->count; i++) {
        int64_t group = group_of(row, groups[i]);

        for (int64_t column = 0; column < row->k; column += group) {
            int64_t weights = row->k - column < group ? row->k - column : group;
            double absmax = (double)fq_row_absmax(row, column, weights);

            sums[i] += absmax * absmax * (double)weights;
        }
    }
    return true;
}

int fq_quantize_crest(const struct fq_dense *dense, bool allow_nonfinite, const int64_t *groups,
                      size_t count, double *crest, struct fq_error *err) {
    double *totals = malloc((count + 1) * sizeof *totals);
    int rc = totals ? ask(dense, allow_nonfinite, sum_ranges, groups, count, totals, err)
                    : fq_fail(err, FQ_NO_MEMORY, "no memory for %zu group sizes", count);

    for (size_t i = 0; rc == 0 && i < count; i++)
        crest[i] = totals[count] > 0 ? sqrt(totals[i] / totals[count]) : 0;
    free(totals);
    return rc;
}

struct trials {
    const struct fq_quantize_trial *trials;
    struct fq_quantize_method method;
};

static bool try_row(struct fq_row *row, int64_t n, void *context, struct fq_row_fault *fault) {
    const struct sums *all = context;
    const struct trials *trials = all->questions;
    double *sums = all->rows + (size_t)n * (all->count + 1);

    sums[all->count] = row->power;
    for (size_t i = 0; i < all->count; i++) {
        const struct fq_quantize_trial *trial = &trials->trials[i];
        struct fq_quantize_method method = trials->method;
        int64_t group = group_of(row, trial->group);

        method.asymmetric = trial->asymmetric;
        for (int64_t column = 0; column < row->k; column += group) {
            int64_t weights = row->k - column < group ? row->k - column : group;
            struct fq_fit fit;

            if (!fq_row_fit(row, column, weights, trial->bits, &method, &fit, fault))
                return false;
            sums[i] += fq_row_error(row, column, weights, &fit);
        }
    }
    return true;
}

int fq_quantize_measure(const struct fq_dense *dense, const struct fq_quantize_method *method,
                        struct fq_quantize_trial *trials, size_t count, struct fq_error *err) {
    struct trials questions = {.trials = trials, .method = *method};
    double *totals = malloc((count + 1) * sizeof *totals);
    int rc = totals ? ask(dense, method->allow_nonfinite, try_row, &questions, count, totals, err)
                    : fq_fail(err, FQ_NO_MEMORY, "no memory for %zu trials", count);

    for (size_t i = 0; rc == 0 && i < count; i++)
        trials[i].error = totals[count] > 0 ? sqrt(totals[i] / totals[count]) : 0;
    free(totals);
    return rc;
}
