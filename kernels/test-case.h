/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the conformance test feeds a backend: random matrices with their exact
 * float64 form, planes of rows between guards, and one GEMM made of them, with
 * every part of struct fq_gemm.  The expected values are computed from unpacked
 * codes, not by the library.  For the conformance test alone; a failed
 * check fails the cmocka test that runs it.
 */
#ifndef FQ_KERNELS_TEST_CASE_H
#define FQ_KERNELS_TEST_CASE_H

#include "backend.h"

enum residual {
    RESIDUAL_NONE,
    RESIDUAL_APART,
    RESIDUAL_IN_PLACE, /* the rows of Y */
};

/* A case's parameters, all of them. */
struct shape {
    int bits;
    int64_t group, n, k, m;
    enum fq_dtype scale_type, type;
    enum fq_dtype bias_type; /* 0: no bias */
    bool zeros, outliers, row_pointers;
    int scale_log2;       /* scales are so many powers of two larger, and X smaller */
    int x_log2;           /* X is so many powers of two larger */
    int64_t x_gap, y_gap; /* elements that the strides are larger than needed */
    bool x_aligned;       /* X's rows begin on 16 bytes */
    bool y_aligned;       /* the same of Y */
    enum fq_activation activation;
    enum fq_memory_kind kind;
    int64_t gate_group; /* 0: no gate */
    enum fq_dtype gate_scale_type;
    bool gate_zeros, gate_bias;
    enum residual residual;
};

void shape_print(uint64_t seed, const struct shape *shape);

/* ---- Random data: one generator, splitmix64, for all of a test ---------------------------- */

extern uint64_t random_state;

size_t random_below(size_t limit);

/* ---- Planes ------------------------------------------------------------------------------ */

/* `rows` rows of `width` elements, `stride` apart, between guards; everything else is NaN. */
struct plane {
    struct fq_memory *memory;
    uint8_t *image; /* what the region holds, or held before the GEMM */
    uint64_t bytes;
    enum fq_dtype type;
    int64_t rows, width, stride, start; /* start: elements before row 0 */
};

/* gap: elements that the stride is larger than the width, at least; aligned: rows begin on 16
 * bytes. */
void plane_init(struct plane *plane, struct fq_backend *backend, enum fq_memory_kind kind,
                enum fq_dtype type, int64_t rows, int64_t width, int64_t gap, bool aligned);
void plane_fini(struct plane *plane);
void plane_upload(struct plane *plane);
void plane_download(struct plane *plane);
void *plane_row(const struct plane *plane, int64_t row);             /* where a GEMM finds it */
const void *plane_row_image(const struct plane *plane, int64_t row); /* here */
double plane_element(const struct plane *plane, int64_t row, int64_t column);
void plane_set(struct plane *plane, int64_t row, int64_t column, float value); /* here alone */
void assert_only_rows_written(const struct plane *plane);

/* ---- Cases ------------------------------------------------------------------------------- */

/* One matrix, with its exact float64 form. */
struct problem {
    struct fq_matrix matrix;
    uint8_t *codes, *zeros;
    uint16_t *scales;
    double *w; /* [n][k] */
    struct fq_weights *weights;
};

/* A shape with everything drawn for it: shape.m rows of X and of the residual. */
struct instance {
    struct fq_backend *backend;
    struct shape shape;
    struct problem main, gate;
    struct plane x, bias, gate_bias, residual;
};

void instance_init(struct instance *instance, struct fq_backend *backend,
                   const struct shape *shape);
void instance_fini(struct instance *instance);

/* A plane for shape.m rows of Y. */
void instance_init_y(const struct instance *instance, struct plane *y, int64_t gap);

/* Runs it whole into y, by row pointers where the shape says so, and brings y back. */
void instance_run(const struct instance *instance, struct plane *y);
/* Runs `count` rows, those named in order[], into rows 0..count−1 of y. */
void instance_run_rows(const struct instance *instance, struct plane *y, const int64_t *order,
                       int64_t count);

/* Fails unless y is within the bounds of float64. */
void instance_check(const struct instance *instance, const struct plane *y);

void must(int status, const struct fq_error *err);

#endif
