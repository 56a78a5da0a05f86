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

/* One row's sums: what for each of `count` questions, and Σw² after them. */
typedef bool (*row_body)(const struct fq_row *row, const void *questions, size_t count,
                         double *sums, struct fq_row_fault *fault);

/* Runs the body over all rows and adds up the sums in order. */
static int for_rows(const struct fq_dense *dense, bool allow_nonfinite, row_body body,
                    const void *questions, size_t count, double *totals, struct fq_error *err) {
    struct fq_row_fault first = {.kind = FQ_ROW_FINE};
    size_t width = count + 1;
    double *sums = calloc((size_t)dense->n * width, sizeof *sums);
    int rc = 0;

    if (!sums)
        return fq_fail(err, FQ_NO_MEMORY, "no memory to measure %lld by %lld weights",
                       (long long)dense->n, (long long)dense->k);
#pragma omp parallel
    {
        struct fq_row row;
        int ready = fq_row_init(&row, dense->k, NULL);

#pragma omp for schedule(static)
        for (int64_t n = 0; n < dense->n; n++) {
            struct fq_row_fault fault = {.kind = FQ_ROW_FINE};
            double *mine = sums + (size_t)n * width;

            if (ready == 0 && fq_row_load(&row, dense, n, allow_nonfinite, &fault) &&
                body(&row, questions, count, mine, &fault)) {
                mine[count] = row.power;
                continue;
            }
            fault.row = n;
#pragma omp critical(fq_quantize_fault)
            if (ready < 0)
                rc = ready;
            else
                fq_row_fault_merge(&first, &fault);
        }
        fq_row_fini(&row);
    }
    if (rc < 0)
        rc = fq_fail(err, FQ_NO_MEMORY, "no memory for a row of %lld weights", (long long)dense->k);
    else if (first.kind != FQ_ROW_FINE)
        rc = fq_row_fault_report(&first, err);
    memset(totals, 0, width * sizeof *totals);
    for (size_t i = 0; rc == 0 && i < (size_t)dense->n * width; i++)
        totals[i % width] += sums[i];
    free(sums);
    return rc;
}

static int64_t group_of(const struct fq_row *row, int64_t group) {
    return group == 0 || group > row->k ? row->k : group;
}

static bool sum_ranges(const struct fq_row *row, const void *questions, size_t count, double *sums,
                       struct fq_row_fault *fault) {
    const int64_t *groups = questions;

    (void)fault;
    for (size_t i = 0; i < count; i++) {
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
    int rc = totals ? for_rows(dense, allow_nonfinite, sum_ranges, groups, count, totals, err)
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

static bool try_row(const struct fq_row *row, const void *questions, size_t count, double *sums,
                    struct fq_row_fault *fault) {
    const struct trials *trials = questions;

    for (size_t i = 0; i < count; i++) {
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
    int rc = totals
                 ? for_rows(dense, method->allow_nonfinite, try_row, &questions, count, totals, err)
                 : fq_fail(err, FQ_NO_MEMORY, "no memory for %zu trials", count);

    for (size_t i = 0; rc == 0 && i < count; i++)
        trials[i].error = totals[count] > 0 ? sqrt(totals[i] / totals[count]) : 0;
    free(totals);
    return rc;
}
