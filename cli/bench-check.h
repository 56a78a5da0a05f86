/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the Y of a measured product must be: everything that goes into it is a
 * hash of its place (synthetic.h), so a few rows and columns of it are computed
 * again on the host, by the reference backend, from the same seeds.
 */
#ifndef FQ_CLI_BENCH_CHECK_H
#define FQ_CLI_BENCH_CHECK_H

#include "backend.h"
#include "synthetic.h"

/* Whose seed is whose. */
enum {
    BENCH_SEED_WEIGHTS = 1,
    BENCH_SEED_GATE,
    BENCH_SEED_X,
    BENCH_SEED_RESIDUAL,
    BENCH_SEED_BIAS, /* row 0 for the weights', row 1 for the gate's */
    BENCH_SEED_OTHER /* what no result depends on */
};

struct bench_product_kind {
    struct fq_matrix shape; /* its zeros other than NULL: with zero points; no data */
    enum fq_dtype dtype;    /* of X, Y and the residual */
    bool gate, bias, residual;
    enum fq_activation activation;
};

struct bench_check;

int bench_check_new(const struct bench_product_kind *kind, struct bench_check **out,
                    struct fq_error *err);
void bench_check_free(struct bench_check *check); /* NULL is fine */
/* ‖y − ref‖ / ‖ref‖ on some rows and columns of y, [m][n] without gaps; NAN where y is no number.
 */
int bench_check_error(struct bench_check *check, struct fq_memory *y, int64_t m, double *error,
                      struct fq_error *err);

#endif
