/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What every backend must do, whatever it is made of: results within the
 * documented bounds of float64, nothing written outside of Y, nothing read that
 * matters outside of X, and rows whose bits depend on their own inputs alone.
 *
 *     test-conformance            every backend of this build that opens, and
 *                                 every instruction set of the cpu backend
 *     test-conformance cuda       that one; exits 77 where it has no device
 *
 * The product of all parameters is too large: every combination of bits, group
 * size, scale type and zero points is run FINEQUANT_TEST_ROUNDS times with the
 * other parameters drawn from a generator seeded with FINEQUANT_TEST_SEED.  A
 * failure prints the seed and the case.  The expected values are computed here
 * from unpacked codes, not by the library.
 */
#include "backend.h"
#include "half.h"

#include <inttypes.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define COUNT(array) (sizeof(array) / sizeof *(array))
#define GUARD        64 /* elements before and after every buffer */
#define TARGETS_MAX  8

struct target {
    const char *backend;
    const char *kernels; /* FINEQUANT_CPU_KERNELS, or NULL */
    char label[32];
};

struct shape {
    int bits;
    int64_t group, n, k, m;
    enum fq_dtype scale_type, type;
    enum fq_dtype bias_type; /* 0: no bias */
    bool zeros, outliers, row_pointers;
    int64_t x_gap, y_gap; /* elements that the strides are larger than needed */
    enum fq_activation activation;
    enum fq_memory_kind kind;
};

static uint64_t seed = 1;
static unsigned rounds = 3;

/* ---- Random data ------------------------------------------------------------------------- */

static uint64_t state;

static uint64_t random_bits(void) {
    uint64_t z = state += 0x9e3779b97f4a7c15u; /* splitmix64 */

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static size_t random_below(size_t limit) {
    return (size_t)(random_bits() % limit);
}

static double random_unit(void) { /* [-1, 1) */
    return (double)(random_bits() >> 11) * 0x1p-52 - 1;
}

#define PICK(array) ((array)[random_below(COUNT(array))])

/* ---- One matrix, with its exact float64 form --------------------------------------------- */

struct problem {
    struct fq_matrix matrix;
    uint8_t *codes, *zeros;
    uint16_t *scales;
    double *w; /* [n][k] */
    struct fq_weights *weights;
};

static void *allocate(size_t bytes) {
    void *memory = calloc(1, bytes ? bytes : 1);

    assert_non_null(memory);
    return memory;
}

static void must(int status, const struct fq_error *err) {
    if (status)
        fail_msg("%s: %s", fq_status_name(status), err->message);
}

static void problem_init(struct problem *problem, struct fq_backend *backend,
                         const struct shape *shape) {
    struct fq_matrix *matrix = &problem->matrix;
    struct fq_weights_info info;
    struct fq_error err;

    *matrix = (struct fq_matrix){.n = shape->n,
                                 .k = shape->k,
                                 .bits = shape->bits,
                                 .group = shape->group,
                                 .scale_type = shape->scale_type};
    int64_t groups = fq_matrix_groups(matrix), row_bytes = fq_matrix_row_bytes(matrix);
    uint8_t *row = allocate((size_t)shape->k);
    problem->codes = allocate((size_t)(shape->n * row_bytes));
    problem->scales = allocate((size_t)(shape->n * groups) * sizeof *problem->scales);
    problem->zeros = allocate((size_t)(shape->n * groups));
    problem->w = allocate((size_t)(shape->n * shape->k) * sizeof *problem->w);
    for (int64_t n = 0; n < shape->n; n++) {
        for (int64_t g = 0; g < groups; g++) {
            double scale = (0.3 + fabs(random_unit())) / (double)(1 << (shape->bits - 1));

            if (shape->outliers && random_below(20) == 0)
                scale *= 16;
            if (random_below(16) == 0) /* GGUF has negative scales, empty groups have none */
                scale = random_below(2) ? -scale : 0;
            fq_store(problem->scales, shape->scale_type, (size_t)(n * groups + g), (float)scale);
            problem->zeros[n * groups + g] = (uint8_t)random_below((size_t)1 << shape->bits);
        }
        for (int64_t k = 0; k < shape->k; k++) {
            int64_t at = n * groups + k / shape->group;
            int zero = shape->zeros ? problem->zeros[at] : 1 << (shape->bits - 1);

            row[k] = (uint8_t)random_below((size_t)1 << shape->bits);
            problem->w[n * shape->k + k] =
                (row[k] - zero) * (double)fq_load(problem->scales, shape->scale_type, (size_t)at);
        }
        fq_matrix_pack_row(problem->codes + n * row_bytes, row, shape->k, shape->bits);
    }
    free(row);
    matrix->codes = problem->codes;
    matrix->scales = problem->scales;
    matrix->zeros = shape->zeros ? problem->zeros : NULL;

    uint64_t bytes = fq_weights_size(backend, matrix);
    must(fq_weights_new(backend, matrix, &problem->weights, &err), &err);
    fq_weights_info(problem->weights, &info);
    assert_true(info.n == shape->n && info.k == shape->k && info.group == shape->group);
    assert_true(info.bits == shape->bits && info.scale_type == shape->scale_type);
    assert_true(info.symmetric == !shape->zeros);
    assert_int_equal(info.bytes, bytes);
    /* the canonical form may go once the weights are made */
    memset(problem->codes, 0xa5, (size_t)(shape->n * row_bytes));
    memset(problem->scales, 0xa5, (size_t)(shape->n * groups) * sizeof *problem->scales);
    memset(problem->zeros, 0xa5, (size_t)(shape->n * groups));
}

static void problem_fini(struct problem *problem) {
    fq_weights_free(problem->weights);
    free(problem->w);
    free(problem->zeros);
    free(problem->scales);
    free(problem->codes);
}

/* ---- Inputs and outputs ------------------------------------------------------------------ */

/* `rows` rows of `width` elements, `stride` apart, between guards; everything else is NaN. */
struct plane {
    struct fq_memory *memory;
    uint8_t *image; /* what the region holds, or held before the GEMM */
    uint64_t bytes;
    enum fq_dtype type;
    int64_t rows, width, stride, start; /* start: elements before row 0 */
};

static void plane_init(struct plane *plane, struct fq_backend *backend, enum fq_memory_kind kind,
                       enum fq_dtype type, int64_t rows, int64_t width, int64_t gap) {
    struct fq_error err;

    plane->type = type;
    plane->rows = rows;
    plane->width = width;
    plane->stride = width + gap;
    plane->start = GUARD + (int64_t)random_below(4); /* aligned to an element and no more */
    plane->bytes = (uint64_t)(plane->start + rows * plane->stride + GUARD) * fq_dtype_size(type);
    plane->image = allocate(plane->bytes);
    memset(plane->image, 0xff, plane->bytes); /* NaN in all three types */
    must(fq_memory_new(backend, kind, plane->bytes, &plane->memory, &err), &err);
}

static void plane_fini(struct plane *plane) {
    fq_memory_free(plane->memory);
    free(plane->image);
}

static void plane_upload(struct plane *plane) {
    struct fq_error err;

    must(fq_memory_write(plane->memory, 0, plane->image, plane->bytes, &err), &err);
}

static void plane_download(struct plane *plane) {
    struct fq_error err;

    must(fq_memory_read(plane->memory, 0, plane->image, plane->bytes, &err), &err);
}

static size_t plane_index(const struct plane *plane, int64_t row, int64_t column) {
    return (size_t)(plane->start + row * plane->stride + column);
}

static void *plane_row(const struct plane *plane, int64_t row) {
    return (char *)fq_memory_address(plane->memory) +
           plane_index(plane, row, 0) * fq_dtype_size(plane->type);
}

static void *plane_row_image(const struct plane *plane, int64_t row) {
    return plane->image + plane_index(plane, row, 0) * fq_dtype_size(plane->type);
}

static void plane_fill(struct plane *plane, double scale, bool outliers) {
    for (int64_t m = 0; m < plane->rows; m++)
        for (int64_t k = 0; k < plane->width; k++) {
            double value = random_unit() * scale;

            if (outliers && random_below(100) == 0)
                value *= 60;
            fq_store(plane->image, plane->type, plane_index(plane, m, k), (float)value);
        }
    plane_upload(plane);
}

static void assert_only_rows_written(const struct plane *plane) {
    size_t size = fq_dtype_size(plane->type);
    const uint8_t *end = plane->image + plane->bytes;

    for (const uint8_t *at = plane->image; at < end; at++) {
        int64_t element = (int64_t)((size_t)(at - plane->image) / size) - plane->start;
        bool inside = element >= 0 && element < plane->rows * plane->stride &&
                      element % plane->stride < plane->width;

        if (!inside && *at != 0xff)
            fail_msg("wrote outside of Y: byte %td of %" PRIu64 ", element %" PRId64
                     " of rows of %" PRId64 " with stride %" PRId64,
                     at - plane->image, plane->bytes, element, plane->width, plane->stride);
    }
}

static void run(struct fq_backend *backend, const struct fq_gemm *gemm) {
    struct fq_stream *stream;
    struct fq_event *event;
    struct fq_error err;

    must(fq_stream_new(backend, &stream, &err), &err);
    must(fq_event_new(backend, &event, &err), &err);
    must(fq_gemm(stream, gemm, &err), &err);
    must(fq_event_record(event, stream, &err), &err);
    must(fq_event_wait(event, &err), &err);
    assert_int_equal(fq_event_query(event, &err), 1);
    fq_event_free(event);
    fq_stream_free(stream);
}

/* ---- Numbers ----------------------------------------------------------------------------- */

static double activate(double v, enum fq_activation activation) {
    switch (activation) {
    case FQ_ACTIVATION_RELU:
        return fmax(v, 0);
    case FQ_ACTIVATION_GELU:
        return v * erfc(-v * sqrt(0.5)) / 2;
    case FQ_ACTIVATION_GELU_TANH:
        return v / 2 * (1 + tanh(sqrt(2 / M_PI) * (v + 0.044715 * pow(v, 3))));
    case FQ_ACTIVATION_SILU:
        return v / (1 + exp(-v));
    default:
        return v;
    }
}

static double bound_of(enum fq_dtype type) {
    return type == FQ_F32 ? 1e-5 : type == FQ_F16 ? 1e-3 : 5e-3;
}

static void check_numbers(const struct shape *shape, const struct problem *problem,
                          const struct plane *x, const struct plane *y, const struct plane *bias) {
    double error = 0, norm = 0, terms = 0;
    double *line = allocate((size_t)shape->k * sizeof *line);

    for (int64_t m = 0; m < shape->m; m++) {
        for (int64_t k = 0; k < shape->k; k++)
            line[k] = (double)fq_load(x->image, x->type, plane_index(x, m, k));
        for (int64_t n = 0; n < shape->n; n++) {
            const double *w = problem->w + n * shape->k;
            double sum = 0, magnitude = 0;

            if (bias)
                sum = (double)fq_load(bias->image, bias->type, plane_index(bias, 0, n));
            magnitude = fabs(sum);
            for (int64_t k = 0; k < shape->k; k++) {
                sum += line[k] * w[k];
                magnitude += fabs(line[k] * w[k]);
            }
            double expected = activate(sum, shape->activation);
            double got = (double)fq_load(y->image, y->type, plane_index(y, m, n));
            if (!isfinite(got))
                fail_msg("Y[%" PRId64 "][%" PRId64 "] is %g, expected %g", m, n, got, expected);
            error += (got - expected) * (got - expected);
            norm += expected * expected;
            terms += magnitude * magnitude;
        }
    }
    free(line);
    /* A handful of outputs can cancel to almost nothing, where fp32 terms leave no such relative
     * error and fp16 has no such small number: those are held to the terms they are made of. */
    double allowed = bound_of(shape->type) * sqrt(norm);
    if (shape->m * shape->n < 64)
        allowed += 0x1p-20 * sqrt(terms) + 0x1p-24;
    if (sqrt(error) > allowed)
        fail_msg("error %g of norm %g: %g, allowed are %g", sqrt(error), sqrt(norm),
                 sqrt(error / norm), allowed / sqrt(norm));
}

/* ---- The properties ---------------------------------------------------------------------- */

static void shape_print(const struct shape *shape) {
    print_error("seed %" PRIu64 ": n %" PRId64 " k %" PRId64 " m %" PRId64 " bits %d group %" PRId64
                " scales %s zeros %d type %s bias %s activation %s outliers %d row pointers %d "
                "gaps %" PRId64 " %" PRId64 " memory %d\n",
                seed, shape->n, shape->k, shape->m, shape->bits, shape->group,
                fq_dtype_name(shape->scale_type), shape->zeros, fq_dtype_name(shape->type),
                shape->bias_type ? fq_dtype_name(shape->bias_type) : "none",
                fq_activation_name(shape->activation), shape->outliers, shape->row_pointers,
                shape->x_gap, shape->y_gap, shape->kind);
}

/* What is being checked: a copy, since a failed check leaves its stack frame by longjmp. */
static struct shape current;
static bool checking;

static void begin(const struct shape *shape) {
    current = *shape;
    checking = true;
}

static void check_shape(struct fq_backend *backend, const struct shape *shape) {
    const void *x_rows[FQ_DECODE_ROWS];
    void *y_rows[FQ_DECODE_ROWS];
    struct problem problem;
    struct plane x, y, bias;

    begin(shape);
    problem_init(&problem, backend, shape);
    plane_init(&x, backend, shape->kind, shape->type, shape->m, shape->k, shape->x_gap);
    plane_init(&y, backend, shape->kind, shape->type, shape->m, shape->n, shape->y_gap);
    plane_fill(&x, 2 / sqrt((double)shape->k), shape->outliers);
    plane_upload(&y);
    struct fq_gemm gemm = {.weights = problem.weights,
                           .type = shape->type,
                           .m = shape->m,
                           .host = shape->kind == FQ_MEMORY_HOST,
                           .activation = shape->activation};
    if (shape->bias_type) {
        plane_init(&bias, backend, shape->kind, shape->bias_type, 1, shape->n, 0);
        plane_fill(&bias, 1, false);
        gemm.bias = plane_row(&bias, 0);
        gemm.bias_type = shape->bias_type;
    }
    if (shape->row_pointers) {
        for (int64_t m = 0; m < shape->m; m++) { /* any order will do: here the reverse */
            x_rows[m] = plane_row(&x, shape->m - 1 - m);
            y_rows[m] = plane_row(&y, shape->m - 1 - m);
        }
        gemm.x_rows = x_rows;
        gemm.y_rows = y_rows;
    } else {
        gemm.x = plane_row(&x, 0);
        gemm.y = plane_row(&y, 0);
        gemm.x_stride = x.stride;
        gemm.y_stride = y.stride;
    }
    run(backend, &gemm);
    plane_download(&y);
    assert_only_rows_written(&y);
    check_numbers(shape, &problem, &x, &y, shape->bias_type ? &bias : NULL);
    if (shape->bias_type)
        plane_fini(&bias);
    plane_fini(&y);
    plane_fini(&x);
    problem_fini(&problem);
    checking = false;
}

static const int all_bits[] = {8, 4, 3};
static const int64_t all_groups[] = {16, 32, 64, 128, 256, 48, 0 /* per channel */};
static const enum fq_dtype scale_types[] = {FQ_F16, FQ_BF16};

static struct fq_device_info open_target(const struct target *target, int threads,
                                         struct fq_backend **backend) {
    struct fq_backend_options options = {.threads = threads};
    struct fq_device_info info;
    struct fq_error err;

    if (target->kernels)
        setenv("FINEQUANT_CPU_KERNELS", target->kernels, 1);
    must(fq_backend_new(target->backend, &options, backend, &err), &err);
    if (target->kernels)
        unsetenv("FINEQUANT_CPU_KERNELS");
    must(fq_backend_info(*backend, &info, &err), &err);
    state = seed;
    return info;
}

static int begin_test(void **context) {
    (void)context;
    checking = false;
    return 0;
}

static int end_test(void **context) {
    (void)context;
    if (checking)
        shape_print(&current);
    return 0;
}

static void draw(struct shape *shape, const struct fq_device_info *info) {
    static const int64_t ns[] = {1, 5, 64, 130, 200}, ks[] = {1, 15, 16, 100, 256, 300, 1000};
    static const int64_t ms[] = {1, 2, 3, 4, 7, 8, 16, 33, 64, 65, 129};
    static const enum fq_dtype types[] = {FQ_F16, FQ_BF16, FQ_F32};
    static const enum fq_dtype bias_types[] = {0, FQ_F16, FQ_BF16, FQ_F32};
    static const int64_t gaps[] = {0, 1, 8, 37};

    shape->n = PICK(ns);
    shape->k = PICK(ks);
    shape->m = PICK(ms);
    shape->type = types[random_below(info->f32_activations ? 3 : 2)];
    shape->bias_type = PICK(bias_types);
    shape->outliers = random_below(2);
    shape->row_pointers = shape->m <= FQ_DECODE_ROWS && random_below(2);
    shape->x_gap = PICK(gaps);
    shape->y_gap = PICK(gaps);
    shape->activation = (enum fq_activation)random_below(FQ_ACTIVATION_COUNT);
    shape->kind = info->device_memory && random_below(3) ? FQ_MEMORY_DEVICE : FQ_MEMORY_HOST;
    if (shape->group == 0 || shape->group > shape->k)
        shape->group = shape->k;
}

static void stays_within_the_bounds_of_float64(void **context) {
    struct fq_backend *backend;
    struct fq_device_info info = open_target(*context, 0, &backend);

    for (unsigned round = 0; round < rounds; round++)
        for (size_t i = 0; i < COUNT(all_bits) * COUNT(all_groups) * 4; i++) {
            struct shape shape = {.zeros = i % 2,
                                  .scale_type = scale_types[i / 2 % 2],
                                  .bits = all_bits[i / 4 % COUNT(all_bits)],
                                  .group = all_groups[i / 4 / COUNT(all_bits)]};

            draw(&shape, &info);
            check_shape(backend, &shape);
        }
    fq_backend_free(backend);
}

/* Sizes beyond every tile, pass and panel of the implementations. */
static void stays_within_the_bounds_on_larger_matrices(void **context) {
    static const int64_t sizes[][3] = {{513, 1500, 20}, {77, 1111, 500}};
    struct fq_backend *backend;
    struct fq_device_info info = open_target(*context, 0, &backend);

    for (size_t i = 0; i < COUNT(all_bits) * COUNT(sizes); i++) {
        struct shape shape = {.bits = all_bits[i % COUNT(all_bits)],
                              .scale_type = scale_types[i % 2],
                              .group = i % 2 ? 64 : 128,
                              .zeros = i % 2};

        draw(&shape, &info);
        shape.n = sizes[i / COUNT(all_bits)][0];
        shape.k = sizes[i / COUNT(all_bits)][1];
        shape.m = sizes[i / COUNT(all_bits)][2];
        shape.group = i % 2 ? 64 : 128;
        shape.row_pointers = false;
        check_shape(backend, &shape);
    }
    fq_backend_free(backend);
}

/* Runs `count` rows of x, those named in order[], into rows 0..count−1 of y. */
static void run_rows(struct fq_backend *backend, const struct problem *problem,
                     const struct shape *shape, const struct plane *x, struct plane *y,
                     const int64_t *order, int64_t count) {
    const void *x_rows[FQ_DECODE_ROWS];
    void *y_rows[FQ_DECODE_ROWS];
    struct fq_gemm gemm = {.weights = problem->weights,
                           .type = shape->type,
                           .m = count,
                           .host = shape->kind == FQ_MEMORY_HOST,
                           .activation = shape->activation};

    for (int64_t m = 0; m < count; m++) {
        x_rows[m] = plane_row(x, order[m]);
        y_rows[m] = plane_row(y, m);
    }
    gemm.x_rows = x_rows;
    gemm.y_rows = y_rows;
    memset(y->image, 0xff, y->bytes);
    plane_upload(y);
    run(backend, &gemm);
    plane_download(y);
}

static void check_invariance(struct fq_backend *backend, const struct shape *shape) {
    static const int64_t counts[] = {1, 2, 3, 4, 7, 8, 9, 16, 17, 33, 48, 63, 64};
    int64_t order[FQ_DECODE_ROWS];
    struct problem problem;
    struct plane x, all, some;

    begin(shape);
    problem_init(&problem, backend, shape);
    plane_init(&x, backend, shape->kind, shape->type, FQ_DECODE_ROWS, shape->k, shape->x_gap);
    plane_init(&all, backend, shape->kind, shape->type, FQ_DECODE_ROWS, shape->n, shape->y_gap);
    plane_init(&some, backend, shape->kind, shape->type, FQ_DECODE_ROWS, shape->n, 1);
    plane_fill(&x, 1, shape->outliers);
    for (int64_t m = 0; m < FQ_DECODE_ROWS; m++)
        order[m] = m;
    run_rows(backend, &problem, shape, &x, &all, order, FQ_DECODE_ROWS);
    for (size_t i = 0; i < COUNT(counts); i++) {
        for (size_t m = FQ_DECODE_ROWS - 1; m > 0; m--) { /* shuffle */
            size_t other = random_below(m + 1);
            int64_t row = order[m];

            order[m] = order[other];
            order[other] = row;
        }
        run_rows(backend, &problem, shape, &x, &some, order, counts[i]);
        for (int64_t m = 0; m < counts[i]; m++)
            if (memcmp(plane_row_image(&some, m), plane_row_image(&all, order[m]),
                       (size_t)shape->n * fq_dtype_size(shape->type)) != 0)
                fail_msg("row %" PRId64 " differs between place %" PRId64 " of %" PRId64
                         " and its own place of 64",
                         order[m], m, counts[i]);
    }
    plane_fini(&some);
    plane_fini(&all);
    plane_fini(&x);
    problem_fini(&problem);
    checking = false;
}

static void rows_do_not_depend_on_their_company(void **context) {
    struct fq_backend *backend;
    struct fq_device_info info = open_target(*context, 0, &backend);

    for (size_t i = 0; i < COUNT(all_bits) * 4; i++) {
        struct shape shape = {.bits = all_bits[i / 4],
                              .zeros = i % 2,
                              .group = i / 2 % 2 ? 0 : 64,
                              .scale_type = scale_types[i % 2]};

        draw(&shape, &info);
        shape.m = FQ_DECODE_ROWS;
        shape.n = i % 3 ? 130 : 33;
        shape.k = i % 2 ? 1000 : 640;
        shape.group = i / 2 % 2 ? shape.k : 64;
        shape.bias_type = 0;
        shape.row_pointers = true;
        check_invariance(backend, &shape);
    }
    fq_backend_free(backend);
}

/* The same inputs to the same bits: run after run, and on any number of threads. */
static void repeats_bit_for_bit(void **context) {
    struct fq_backend *backend[2];
    struct fq_device_info info = open_target(*context, 1, &backend[0]);

    open_target(*context, 3, &backend[1]);
    for (size_t i = 0; i < COUNT(all_bits) * 2; i++) {
        struct shape shape = {.bits = all_bits[i / 2], .scale_type = FQ_F16, .zeros = i % 2};
        struct plane x, y[4];

        draw(&shape, &info);
        shape.n = 200;
        shape.k = 1000;
        shape.group = 64;
        shape.m = i % 2 ? 129 : 33;
        shape.row_pointers = false;
        shape.bias_type = 0;
        begin(&shape);
        uint64_t start = state;
        for (int attempt = 0; attempt < 4; attempt++) {
            struct fq_backend *of = backend[attempt / 2];
            struct problem problem;

            state = start;
            problem_init(&problem, of, &shape);
            plane_init(&x, of, shape.kind, shape.type, shape.m, shape.k, 0);
            plane_init(&y[attempt], of, shape.kind, shape.type, shape.m, shape.n, 0);
            plane_fill(&x, 1, shape.outliers);
            plane_upload(&y[attempt]);
            run(of, &(struct fq_gemm){.weights = problem.weights,
                                      .type = shape.type,
                                      .m = shape.m,
                                      .host = shape.kind == FQ_MEMORY_HOST,
                                      .x = plane_row(&x, 0),
                                      .y = plane_row(&y[attempt], 0),
                                      .x_stride = x.stride,
                                      .y_stride = y[attempt].stride});
            plane_download(&y[attempt]);
            plane_fini(&x);
            problem_fini(&problem);
            assert_int_equal(y[attempt].start, y[0].start);
            assert_memory_equal(y[attempt].image, y[0].image, y[0].bytes);
        }
        for (int attempt = 0; attempt < 4; attempt++)
            plane_fini(&y[attempt]);
        checking = false;
    }
    fq_backend_free(backend[1]);
    fq_backend_free(backend[0]);
}

/* ---- Which backends ---------------------------------------------------------------------- */

/* Adds a backend if it opens; returns the status of opening. */
static int add_target(struct target *targets, size_t *count, const char *backend,
                      const char *kernels) {
    struct target *target = &targets[*count];
    struct fq_backend *opened;
    struct fq_error err;

    if (kernels)
        setenv("FINEQUANT_CPU_KERNELS", kernels, 1);
    int status = fq_backend_new(backend, NULL, &opened, &err);
    if (kernels)
        unsetenv("FINEQUANT_CPU_KERNELS");
    if (status) {
        print_message("%s %s skipped: %s\n", backend, kernels ? kernels : "", err.message);
        return status;
    }
    fq_backend_free(opened);
    target->backend = backend;
    target->kernels = kernels;
    snprintf(target->label, sizeof target->label, "%s%s%s", backend, kernels ? "-" : "",
             kernels ? kernels : "");
    (*count)++;
    return 0;
}

static int find_targets(const char *wanted, struct target *targets, size_t *count) {
    static const char *const sets[] = {"avx512vnni", "avx512", "avx2", "generic"};
    bool known = false;
    int status = 0;

    for (int i = 0; fq_backend_list(i); i++) {
        const char *backend = fq_backend_list(i);

        if (wanted && strcmp(wanted, backend) != 0)
            continue;
        known = true;
        if (strcmp(backend, "cpu") != 0)
            status = add_target(targets, count, backend, NULL);
        else
            for (size_t set = 0; set < COUNT(sets); set++)
                if (add_target(targets, count, backend, sets[set]) == 0)
                    status = 0;
        if (status && status != -FQ_UNAVAILABLE)
            return status; /* no device is a reason to skip, no memory is not */
    }
    return known ? status : add_target(targets, count, wanted, NULL);
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        CMUnitTestFunction body;
    } properties[] = {
        {"stays_within_the_bounds_of_float64", stays_within_the_bounds_of_float64},
        {"stays_within_the_bounds_on_larger_matrices", stays_within_the_bounds_on_larger_matrices},
        {"rows_do_not_depend_on_their_company", rows_do_not_depend_on_their_company},
        {"repeats_bit_for_bit", repeats_bit_for_bit},
    };
    static struct target targets[TARGETS_MAX];
    static char names[TARGETS_MAX * COUNT(properties)][96];
    static struct CMUnitTest tests[TARGETS_MAX * COUNT(properties)];
    const char *seed_text = getenv("FINEQUANT_TEST_SEED");
    const char *rounds_text = getenv("FINEQUANT_TEST_ROUNDS");
    size_t count = 0;

    if (seed_text)
        seed = strtoull(seed_text, NULL, 0);
    if (rounds_text)
        rounds = (unsigned)strtoul(rounds_text, NULL, 0);
    int status = find_targets(argc > 1 ? argv[1] : NULL, targets, &count);
    if (count == 0)
        return status == -FQ_UNAVAILABLE || status == -FQ_UNSUPPORTED ? 77 : 1;
    for (size_t i = 0; i < count * COUNT(properties); i++) {
        size_t target = i / COUNT(properties), property = i % COUNT(properties);

        snprintf(names[i], sizeof names[i], "%s: %s", targets[target].label,
                 properties[property].name);
        tests[i] = (struct CMUnitTest){names[i], properties[property].body, begin_test, end_test,
                                       &targets[target]};
    }
    print_message("seed %" PRIu64 ", %u rounds\n", seed, rounds);
    return _cmocka_run_group_tests("conformance", tests, count * COUNT(properties), NULL, NULL) !=
           0;
}
