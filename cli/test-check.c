/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The judge of finequant-bench's results: it accepts what a backend computes
 * from the same seeds, for every kind of product, and sees what is wrong.
 */
#include "bench-check.h"

#include "half.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>

#include <cmocka.h>

#define COUNT(array) (sizeof(array) / sizeof *(array))

static const uint8_t with_zeros;

static const struct bench_product_kind kinds[] = {
    {.shape = {.n = 100, .k = 96, .bits = 4, .group = 32}, .dtype = FQ_F16},
    {.shape = {.n = 9, .k = 80, .bits = 8, .group = 80, .zeros = &with_zeros},
     .dtype = FQ_BF16,
     .bias = true,
     .activation = FQ_ACTIVATION_GELU},
    {.shape = {.n = 64, .k = 64, .bits = 3, .group = 16},
     .dtype = FQ_F16,
     .gate = true,
     .activation = FQ_ACTIVATION_SILU},
    {.shape = {.n = 48, .k = 100, .bits = 4, .group = 16, .zeros = &with_zeros},
     .dtype = FQ_BF16,
     .gate = true,
     .bias = true,
     .residual = true,
     .activation = FQ_ACTIVATION_SILU},
    {.shape = {.n = 40, .k = 64, .bits = 8, .group = 64}, .dtype = FQ_F16, .residual = true},
};

static const int64_t rows[] = {1, 3, 70};

static void must(int status, const struct fq_error *err) {
    if (status)
        fail_msg("%s: %s", fq_status_name(status), err->message);
}

/* Memory of the backend with [count][columns] synthetic values of a type. */
static struct fq_memory *values(struct fq_backend *backend, uint64_t seed, int64_t count,
                                int64_t columns, enum fq_dtype dtype) {
    struct fq_memory *memory;
    struct fq_error err;

    must(fq_memory_new(backend, FQ_MEMORY_HOST,
                       (uint64_t)(count * columns) * fq_dtype_size((int)dtype), &memory, &err),
         &err);
    for (int64_t i = 0; i < count * columns; i++)
        fq_store(fq_memory_host(memory), (int)dtype, (size_t)i,
                 fq_synthetic_value(seed, i / columns, i % columns, dtype));
    return memory;
}

struct run {
    struct fq_backend *backend;
    struct fq_weights *weights, *gate;
    struct fq_memory *x, *y, *bias, *residual;
};

/* Y of the cpu backend, from the seeds that the check knows. */
static void run_init(struct run *run, const struct bench_product_kind *kind, int64_t m) {
    struct fq_stream *stream;
    struct fq_error err;
    int64_t n = kind->shape.n, k = kind->shape.k;

    *run = (struct run){0};
    must(fq_backend_new("cpu", NULL, &run->backend, &err), &err);
    must(fq_stream_new(run->backend, &stream, &err), &err);
    must(fq_weights_synthetic(run->backend, &kind->shape, BENCH_SEED_WEIGHTS, &run->weights, &err),
         &err);
    if (kind->gate)
        must(fq_weights_synthetic(run->backend, &kind->shape, BENCH_SEED_GATE, &run->gate, &err),
             &err);
    run->x = values(run->backend, BENCH_SEED_X, m, k, kind->dtype);
    run->y = values(run->backend, BENCH_SEED_OTHER, m, n, kind->dtype);
    run->bias = values(run->backend, BENCH_SEED_BIAS, 2, n, FQ_F32);
    run->residual = values(run->backend, BENCH_SEED_RESIDUAL, m, n, kind->dtype);
    const float *bias = fq_memory_address(run->bias);
    struct fq_gemm gemm = {.weights = run->weights,
                           .gate = run->gate,
                           .type = kind->dtype,
                           .m = m,
                           .x = fq_memory_address(run->x),
                           .y = fq_memory_address(run->y),
                           .x_stride = k,
                           .y_stride = n,
                           .host = true,
                           .bias = kind->bias ? bias : NULL,
                           .gate_bias = kind->bias && kind->gate ? bias + n : NULL,
                           .bias_type = FQ_F32,
                           .activation = kind->activation,
                           .residual = kind->residual ? fq_memory_address(run->residual) : NULL,
                           .residual_stride = n};
    must(fq_gemm(stream, &gemm, &err), &err);
    fq_stream_free(stream);
}

static void run_fini(struct run *run) {
    fq_memory_free(run->residual);
    fq_memory_free(run->bias);
    fq_memory_free(run->y);
    fq_memory_free(run->x);
    fq_weights_free(run->gate);
    fq_weights_free(run->weights);
    fq_backend_free(run->backend);
}

static double error_of(const struct bench_product_kind *kind, struct run *run, int64_t m) {
    struct bench_check *check;
    struct fq_error err;
    double error;

    must(bench_check_new(kind, &check, &err), &err);
    must(bench_check_error(check, run->y, m, &error, &err), &err);
    bench_check_free(check);
    return error;
}

static struct bench_product_kind with_scales(size_t i) {
    struct bench_product_kind kind = kinds[i];

    kind.shape.scale_type = kind.dtype;
    return kind;
}

static void accepts_what_a_backend_computes(void **context) {
    (void)context;
    for (size_t i = 0; i < COUNT(kinds); i++) {
        for (size_t j = 0; j < COUNT(rows); j++) {
            struct bench_product_kind kind = with_scales(i);
            struct run run;

            run_init(&run, &kind, rows[j]);
            double error = error_of(&kind, &run, rows[j]);
            if (!(error > 0 && error < (kind.dtype == FQ_BF16 ? 5e-3 : 1e-3)))
                fail_msg("kind %zu, m %lld: error %g", i, (long long)rows[j], error);
            run_fini(&run);
        }
    }
}

/* Every part of a kind: judged without it, or with what it has not, the same Y is wrong. */
static void sees_a_part_that_is_missing(void **context) {
    (void)context;
    for (size_t i = 0; i < COUNT(kinds); i++) {
        struct bench_product_kind kind = with_scales(i), others[] = {kind, kind, kind, kind};
        struct run run;

        others[0].gate = !kind.gate;
        others[1].bias = !kind.bias;
        others[2].residual = !kind.residual;
        others[3].activation =
            kind.activation == FQ_ACTIVATION_RELU ? FQ_ACTIVATION_NONE : FQ_ACTIVATION_RELU;
        run_init(&run, &kind, 5);
        for (size_t j = 0; j < COUNT(others); j++)
            if (error_of(&others[j], &run, 5) < 0.05)
                fail_msg("kind %zu, judged as other %zu, is right", i, j);
        run_fini(&run);
    }
}

static void sees_rows_and_columns_that_are_wrong(void **context) {
    struct bench_product_kind kind = with_scales(0);
    struct run run;

    (void)context;
    run_init(&run, &kind, 70);
    uint16_t *y = fq_memory_address(run.y);
    uint16_t saved = y[69 * 100 + 99];
    y[69 * 100 + 99] = fq_f32_to_f16(100); /* the last element */
    assert_true(error_of(&kind, &run, 70) > 0.1);
    y[69 * 100 + 99] = 0x7e00; /* no number */
    assert_true(isnan(error_of(&kind, &run, 70)));
    y[69 * 100 + 99] = saved;
    assert_true(error_of(&kind, &run, 70) < 1e-3);
    run_fini(&run);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(accepts_what_a_backend_computes),
        cmocka_unit_test(sees_a_part_that_is_missing),
        cmocka_unit_test(sees_rows_and_columns_that_are_wrong),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
