/* SPDX-License-Identifier: Apache-2.0 */
/* The cases of the conformance test: see test-case.h. */
#include "test-case.h"
#include "half.h"

#include <inttypes.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define GUARD 64 /* elements before and after every buffer */

/* ---- Random data ------------------------------------------------------------------------- */

uint64_t random_state;

static uint64_t random_bits(void) {
    uint64_t z = random_state += 0x9e3779b97f4a7c15u; /* splitmix64 */

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

size_t random_below(size_t limit) {
    return (size_t)(random_bits() % limit);
}

static double random_unit(void) { /* [-1, 1) */
    return (double)(random_bits() >> 11) * 0x1p-52 - 1;
}

/* ---- One matrix, with its exact float64 form --------------------------------------------- */

static void *allocate(size_t bytes) {
    void *memory = calloc(1, bytes ? bytes : 1);

    assert_non_null(memory);
    return memory;
}

void must(int status, const struct fq_error *err) {
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
            double scale = ldexp(0.3 + fabs(random_unit()), shape->scale_log2 - (shape->bits - 1));

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

void plane_init(struct plane *plane, struct fq_backend *backend, enum fq_memory_kind kind,
                enum fq_dtype type, int64_t rows, int64_t width, int64_t gap, bool aligned) {
    const int64_t even = 16 / (int64_t)fq_dtype_size(type); /* elements of 16 bytes */
    struct fq_error err;

    plane->type = type;
    plane->rows = rows;
    plane->width = width;
    plane->stride = width + gap;
    plane->start = GUARD;
    if (aligned)
        plane->stride = (plane->stride + even - 1) / even * even;
    else
        plane->start += (int64_t)random_below(4); /* aligned to an element and no more */
    plane->bytes = (uint64_t)(plane->start + rows * plane->stride + GUARD) * fq_dtype_size(type);
    plane->image = allocate(plane->bytes);
    memset(plane->image, 0xff, plane->bytes); /* NaN in all three types */
    must(fq_memory_new(backend, kind, plane->bytes, &plane->memory, &err), &err);
}

void plane_fini(struct plane *plane) {
    fq_memory_free(plane->memory);
    free(plane->image);
}

void plane_upload(struct plane *plane) {
    struct fq_error err;

    must(fq_memory_write(plane->memory, 0, plane->image, plane->bytes, &err), &err);
}

void plane_download(struct plane *plane) {
    struct fq_error err;

    must(fq_memory_read(plane->memory, 0, plane->image, plane->bytes, &err), &err);
}

static size_t plane_index(const struct plane *plane, int64_t row, int64_t column) {
    return (size_t)(plane->start + row * plane->stride + column);
}

void *plane_row(const struct plane *plane, int64_t row) {
    return (char *)fq_memory_address(plane->memory) +
           plane_index(plane, row, 0) * fq_dtype_size(plane->type);
}

const void *plane_row_image(const struct plane *plane, int64_t row) {
    return plane->image + plane_index(plane, row, 0) * fq_dtype_size(plane->type);
}

double plane_element(const struct plane *plane, int64_t row, int64_t column) {
    return (double)fq_load(plane->image, plane->type, plane_index(plane, row, column));
}

void plane_set(struct plane *plane, int64_t row, int64_t column, float value) {
    fq_store(plane->image, plane->type, plane_index(plane, row, column), value);
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

void assert_only_rows_written(const struct plane *plane) {
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

/* ---- A GEMM ------------------------------------------------------------------------------ */

static const struct shape *gate_shape(const struct shape *shape, struct shape *gate) {
    *gate = *shape;
    gate->group = shape->gate_group;
    gate->scale_type = shape->gate_scale_type;
    gate->zeros = shape->gate_zeros;
    gate->outliers = false; /* a product of outliers would leave the range of fp16 */
    return gate;
}

static void vector_init(const struct instance *instance, struct plane *plane) {
    const struct shape *shape = &instance->shape;

    plane_init(plane, instance->backend, shape->kind, shape->bias_type, 1, shape->n, 0, false);
    plane_fill(plane, 1, false);
}

void instance_init(struct instance *instance, struct fq_backend *backend,
                   const struct shape *shape) {
    struct shape gate;

    *instance = (struct instance){.backend = backend, .shape = *shape};
    problem_init(&instance->main, backend, shape);
    if (shape->gate_group)
        problem_init(&instance->gate, backend, gate_shape(shape, &gate));
    plane_init(&instance->x, backend, shape->kind, shape->type, shape->m, shape->k, shape->x_gap,
               shape->x_aligned);
    plane_fill(&instance->x,
               ldexp(2 / sqrt((double)shape->k + 16), shape->x_log2 - shape->scale_log2),
               shape->outliers);
    if (shape->bias_type)
        vector_init(instance, &instance->bias);
    if (shape->bias_type && shape->gate_group && shape->gate_bias)
        vector_init(instance, &instance->gate_bias);
    if (shape->residual != RESIDUAL_NONE) {
        plane_init(&instance->residual, backend, shape->kind, shape->type, shape->m, shape->n,
                   shape->x_gap, false);
        plane_fill(&instance->residual, 1, false);
    }
}

void instance_fini(struct instance *instance) {
    plane_fini(&instance->residual);
    plane_fini(&instance->gate_bias);
    plane_fini(&instance->bias);
    plane_fini(&instance->x);
    problem_fini(&instance->gate);
    problem_fini(&instance->main);
}

void instance_init_y(const struct instance *instance, struct plane *y, int64_t gap) {
    const struct shape *shape = &instance->shape;

    plane_init(y, instance->backend, shape->kind, shape->type, shape->m, shape->n, gap,
               shape->y_aligned);
}

/* NaN everywhere, or the residual's rows where the GEMM works in place. */
static void prepare_y(const struct instance *instance, struct plane *y, const int64_t *order,
                      int64_t count) {
    memset(y->image, 0xff, y->bytes);
    for (int64_t m = 0; m < count && instance->shape.residual == RESIDUAL_IN_PLACE; m++)
        memcpy(y->image + plane_index(y, m, 0) * fq_dtype_size(y->type),
               plane_row_image(&instance->residual, order ? order[m] : m),
               (size_t)y->width * fq_dtype_size(y->type));
    plane_upload(y);
}

/* All but m and the rows. */
static struct fq_gemm gemm_of(const struct instance *instance) {
    const struct shape *shape = &instance->shape;
    struct fq_gemm gemm = {.weights = instance->main.weights,
                           .type = shape->type,
                           .host = shape->kind == FQ_MEMORY_HOST,
                           .activation = shape->activation,
                           .gate = instance->gate.weights};

    if (instance->bias.memory) {
        gemm.bias = plane_row(&instance->bias, 0);
        gemm.bias_type = shape->bias_type;
    }
    if (instance->gate_bias.memory)
        gemm.gate_bias = plane_row(&instance->gate_bias, 0);
    return gemm;
}

static void run_gemm(struct fq_backend *backend, const struct fq_gemm *gemm) {
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

/* place[m]: the row of y for row order[m] of X; NULL: m. */
static void run_by_pointers(const struct instance *instance, struct plane *y, const int64_t *order,
                            const int64_t *place, int64_t count) {
    const bool in_place = instance->shape.residual == RESIDUAL_IN_PLACE;
    const void *x_rows[FQ_DECODE_ROWS], *residual_rows[FQ_DECODE_ROWS];
    void *y_rows[FQ_DECODE_ROWS];
    struct fq_gemm gemm = gemm_of(instance);

    for (int64_t m = 0; m < count; m++) {
        x_rows[m] = plane_row(&instance->x, order[m]);
        y_rows[m] = plane_row(y, place ? place[m] : m);
        if (instance->shape.residual != RESIDUAL_NONE)
            residual_rows[m] = in_place ? y_rows[m] : plane_row(&instance->residual, order[m]);
    }
    gemm.m = count;
    gemm.x_rows = x_rows;
    gemm.y_rows = y_rows;
    if (instance->shape.residual != RESIDUAL_NONE)
        gemm.residual_rows = residual_rows;
    run_gemm(instance->backend, &gemm);
    plane_download(y);
}

void instance_run_rows(const struct instance *instance, struct plane *y, const int64_t *order,
                       int64_t count) {
    prepare_y(instance, y, order, count);
    run_by_pointers(instance, y, order, NULL, count);
}

void instance_run(const struct instance *instance, struct plane *y) {
    const struct shape *shape = &instance->shape;
    int64_t order[FQ_DECODE_ROWS];
    struct fq_gemm gemm = gemm_of(instance);

    prepare_y(instance, y, NULL, shape->m);
    if (shape->row_pointers) { /* any order will do: here the reverse */
        for (int64_t m = 0; m < shape->m; m++)
            order[m] = shape->m - 1 - m;
        run_by_pointers(instance, y, order, order, shape->m);
        return;
    }
    gemm.m = shape->m;
    gemm.x = plane_row(&instance->x, 0);
    gemm.x_stride = instance->x.stride;
    gemm.y = plane_row(y, 0);
    gemm.y_stride = y->stride;
    if (shape->residual != RESIDUAL_NONE) {
        const struct plane *residual =
            shape->residual == RESIDUAL_IN_PLACE ? y : &instance->residual;

        gemm.residual = plane_row(residual, 0);
        gemm.residual_stride = residual->stride;
    }
    run_gemm(instance->backend, &gemm);
    plane_download(y);
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

/* A value, and the sum of the magnitudes of the terms that it is made of. */
struct value {
    double is, terms;
};

static struct value product(const struct problem *problem, const double *x,
                            const struct plane *bias, int64_t n) {
    const int64_t k = problem->matrix.k;
    const double *w = problem->w + n * k;
    struct value sum = {0};

    if (bias->memory) {
        sum.is = plane_element(bias, 0, n);
        sum.terms = fabs(sum.is);
    }
    for (int64_t i = 0; i < k; i++) {
        sum.is += x[i] * w[i];
        sum.terms += fabs(x[i] * w[i]);
    }
    return sum;
}

/* No activation is steeper than 1.13: its argument's terms bound its own. */
static struct value expected_value(const struct instance *instance, const double *x, int64_t m,
                                   int64_t n) {
    const enum fq_activation activation = instance->shape.activation;
    struct value value = product(&instance->main, x, &instance->bias, n);

    if (instance->gate.weights) {
        struct value gate = product(&instance->gate, x, &instance->gate_bias, n);

        value.is *= activate(gate.is, activation);
        value.terms *= gate.terms;
    } else {
        value.is = activate(value.is, activation);
    }
    if (instance->residual.memory) {
        double residual = plane_element(&instance->residual, m, n);

        value.is += residual;
        value.terms += fabs(residual);
    }
    return value;
}

void instance_check(const struct instance *instance, const struct plane *y) {
    const struct shape *shape = &instance->shape;
    double error = 0, norm = 0, terms = 0;
    double *x = allocate((size_t)shape->k * sizeof *x);

    for (int64_t m = 0; m < shape->m; m++) {
        for (int64_t k = 0; k < shape->k; k++)
            x[k] = plane_element(&instance->x, m, k);
        for (int64_t n = 0; n < shape->n; n++) {
            struct value expected = expected_value(instance, x, m, n);
            double got = plane_element(y, m, n);

            if (!isfinite(got))
                fail_msg("Y[%" PRId64 "][%" PRId64 "] is %g, expected %g", m, n, got, expected.is);
            error += (got - expected.is) * (got - expected.is);
            norm += expected.is * expected.is;
            terms += expected.terms * expected.terms;
        }
    }
    free(x);
    /* A handful of outputs can cancel to almost nothing, where fp32 terms leave no such relative
     * error and fp16 has no such small number: those are held to the terms they are made of. */
    double allowed = bound_of(shape->type) * sqrt(norm);
    if (shape->m * shape->n < 64)
        allowed += 0x1p-20 * sqrt(terms) + 0x1p-24;
    if (sqrt(error) > allowed)
        fail_msg("error %g of norm %g: %g, allowed are %g", sqrt(error), sqrt(norm),
                 sqrt(error / norm), allowed / sqrt(norm));
}

void shape_print(uint64_t seed, const struct shape *shape) {
    static const char *const residuals[] = {"none", "apart", "in place"};

    print_error(
        "seed %" PRIu64 ": n %" PRId64 " k %" PRId64 " m %" PRId64 " bits %d group %" PRId64
        " scales %s times 2^%d X times 2^%d zeros %d type %s bias %s activation %s outliers %d "
        "row pointers %d "
        "gaps %" PRId64 " %" PRId64 " X aligned %d memory %d gate group %" PRId64
        " scales %s zeros %d bias %d residual %s\n",
        seed, shape->n, shape->k, shape->m, shape->bits, shape->group,
        fq_dtype_name(shape->scale_type), shape->scale_log2, shape->x_log2, shape->zeros,
        fq_dtype_name(shape->type), shape->bias_type ? fq_dtype_name(shape->bias_type) : "none",
        fq_activation_name(shape->activation), shape->outliers, shape->row_pointers, shape->x_gap,
        shape->y_gap, shape->x_aligned, shape->kind, shape->gate_group,
        fq_dtype_name(shape->gate_scale_type), shape->gate_zeros, shape->gate_bias,
        residuals[shape->residual]);
}
