/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the two files of the conformance test share: the backend that is being tested, the case that
 * is being checked, and how the parameters of a case are drawn.  test-conformance.c has the
 * properties of the contract and main(), test-conformance-sizes.c the sizes that reach what the
 * implementations do with large matrices.
 */
#ifndef FQ_KERNELS_TEST_CONFORMANCE_H
#define FQ_KERNELS_TEST_CONFORMANCE_H

#include "test-case.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))
#define PICK(array)  ((array)[random_below(COUNT(array))])

static const int all_bits[] = {8, 4, 3};
static const int64_t all_groups[] = {16, 32, 64, 128, 256, 48, 0 /* per channel */};
static const enum fq_dtype scale_types[] = {FQ_F16, FQ_BF16};

/* What a property gets as its context. */
struct target {
    const char *backend;
    const char *kernels; /* FINEQUANT_CPU_KERNELS, or NULL */
    char label[32];
};

/* Opens it, 0 threads: as many as it likes, and starts the generator from the test's seed. */
struct fq_device_info open_target(const struct target *target, int threads,
                                  struct fq_backend **backend);

/* Parameters of a case: all but bits, zeros and scale_type, and group where it fits k. */
void draw(struct shape *shape, const struct fq_device_info *info);

/* One GEMM of such a case: its results within the bounds, and nothing else written. */
void check_shape(struct fq_backend *backend, const struct shape *shape);

/* Properties of test-conformance-sizes.c. */
void stays_within_the_bounds_on_larger_matrices(void **context);
void stays_within_the_bounds_however_it_is_dealt_out(void **context);
void stays_within_the_bounds_on_many_rows_of_weights(void **context);
void stays_within_the_bounds_in_full_stages(void **context);
void stays_within_the_bounds_on_two_strips_a_worker(void **context);
void stays_within_the_bounds_on_deep_weights(void **context);
void stays_within_the_bounds_on_weights_loaded_in_pieces(void **context);

#endif
