/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Synthetic weights: the same on every backend of this build that opens (on a
 * GPU machine that is cuda too), any row computable alone, and spread as
 * synthetic.h promises.  Multiplying with the identity shows the weights
 * themselves.
 */
#include "backend.h"
#include "half.h"
#include "synthetic.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define COUNT(array) (sizeof(array) / sizeof *(array))
#define SEED         77

static const uint8_t with_zeros;

static const struct fq_matrix shapes[] = {
    {.n = 37, .k = 100, .bits = 4, .group = 16, .scale_type = FQ_F16, .zeros = &with_zeros},
    {.n = 64, .k = 128, .bits = 4, .group = 64, .scale_type = FQ_BF16},
    {.n = 5, .k = 77, .bits = 3, .group = 77, .scale_type = FQ_F16},
    {.n = 130, .k = 200, .bits = 3, .group = 48, .scale_type = FQ_F16, .zeros = &with_zeros},
    {.n = 33, .k = 96, .bits = 8, .group = 32, .scale_type = FQ_BF16, .zeros = &with_zeros},
    {.n = 200, .k = 70, .bits = 8, .group = 16, .scale_type = FQ_F16},
};

static void must(int status, const struct fq_error *err) {
    if (status)
        fail_msg("%s: %s", fq_status_name(status), err->message);
}

static void *allocate(size_t bytes) {
    void *memory = calloc(1, bytes);

    assert_non_null(memory);
    return memory;
}

/* Y = I · Wᵀ in fp16, so Y[k][n] is W[n][k] rounded. */
static uint16_t *weights_of(struct fq_backend *backend, const struct fq_matrix *shape) {
    size_t bytes = (size_t)(shape->k * shape->k) * 2, y_bytes = (size_t)(shape->k * shape->n) * 2;
    uint16_t *identity = allocate(bytes), *out = allocate(y_bytes);
    struct fq_weights *weights;
    struct fq_stream *stream;
    struct fq_event *event;
    struct fq_memory *x, *y;
    struct fq_error err;

    for (int64_t k = 0; k < shape->k; k++)
        identity[k * shape->k + k] = fq_f32_to_f16(1);
    must(fq_weights_synthetic(backend, shape, SEED, &weights, &err), &err);
    must(fq_stream_new(backend, &stream, &err), &err);
    must(fq_event_new(backend, &event, &err), &err);
    must(fq_memory_new(backend, FQ_MEMORY_HOST, bytes, &x, &err), &err);
    must(fq_memory_new(backend, FQ_MEMORY_HOST, y_bytes, &y, &err), &err);
    must(fq_memory_write(x, 0, identity, bytes, &err), &err);
    struct fq_gemm gemm = {.weights = weights,
                           .type = FQ_F16,
                           .m = shape->k,
                           .x = fq_memory_address(x),
                           .y = fq_memory_address(y),
                           .x_stride = shape->k,
                           .y_stride = shape->n,
                           .host = true};
    must(fq_gemm(stream, &gemm, &err), &err);
    must(fq_event_record(event, stream, &err), &err);
    must(fq_event_wait(event, &err), &err);
    must(fq_memory_read(y, 0, out, y_bytes, &err), &err);
    fq_memory_free(y);
    fq_memory_free(x);
    fq_event_free(event);
    fq_stream_free(stream);
    fq_weights_free(weights);
    free(identity);
    return out;
}

static void expect_weights(const char *name, const struct fq_matrix *shape, const uint16_t *got) {
    double *row = allocate((size_t)shape->k * sizeof *row);

    for (int64_t n = 0; n < shape->n; n++) {
        struct fq_matrix *matrix;
        struct fq_error err;

        must(fq_synthetic_new(shape, SEED, n, 1, &matrix, &err), &err);
        fq_matrix_dequantize_row(matrix, 0, row);
        fq_synthetic_free(matrix);
        for (int64_t k = 0; k < shape->k; k++) {
            double w = (double)fq_f16_to_f32(got[k * shape->n + n]);

            if (fabs(w - row[k]) > fabs(row[k]) * 0x1p-10 + 0x1p-24)
                fail_msg("%s, %d bits, %lld by %lld: weight [%lld][%lld] is %g, expected %g", name,
                         shape->bits, (long long)shape->n, (long long)shape->k, (long long)n,
                         (long long)k, w, row[k]);
        }
    }
    free(row);
}

static void same_seed_same_weights_on_every_backend(void **context) {
    const char *name;

    (void)context;
    for (int i = 0; (name = fq_backend_list(i)) != NULL; i++) {
        struct fq_backend *backend;
        struct fq_error err;
        int status = fq_backend_new(name, NULL, &backend, &err);

        if (status == -FQ_UNAVAILABLE) {
            print_message("%s: %s\n", name, err.message);
            continue;
        }
        must(status, &err);
        for (size_t s = 0; s < COUNT(shapes); s++) {
            uint16_t *got = weights_of(backend, &shapes[s]);

            expect_weights(name, &shapes[s], got);
            free(got);
        }
        fq_backend_free(backend);
    }
}

static void rows_alone_equal_rows_of_the_whole(void **context) {
    (void)context;
    for (size_t s = 0; s < COUNT(shapes); s++) {
        const struct fq_matrix *shape = &shapes[s];
        size_t bytes = (size_t)fq_matrix_row_bytes(shape), groups = (size_t)fq_matrix_groups(shape);
        struct fq_matrix *whole, *part;
        struct fq_error err;

        must(fq_synthetic_new(shape, SEED, 0, shape->n, &whole, &err), &err);
        must(fq_synthetic_new(shape, SEED, 2, 3, &part, &err), &err);
        assert_int_equal(part->n, 3);
        assert_memory_equal((const uint8_t *)whole->codes + 2 * bytes, part->codes, 3 * bytes);
        assert_memory_equal((const uint8_t *)whole->scales + 4 * groups, part->scales, 6 * groups);
        assert_int_equal(!whole->zeros, !shape->zeros);
        if (whole->zeros)
            assert_memory_equal(whole->zeros + 2 * groups, part->zeros, 3 * groups);
        fq_synthetic_free(part);
        fq_synthetic_free(whole);
    }
}

static void seeds_differ(void **context) {
    struct fq_matrix *one, *two;
    struct fq_error err;

    (void)context;
    must(fq_synthetic_new(&shapes[1], 1, 0, 64, &one, &err), &err);
    must(fq_synthetic_new(&shapes[1], 2, 0, 64, &two, &err), &err);
    assert_memory_not_equal(one->codes, two->codes, 64 * 64);
    assert_memory_not_equal(one->scales, two->scales, 64 * 4);
    fq_synthetic_free(two);
    fq_synthetic_free(one);
}

/* Mean 0 and variance 1 / k, to what 2^19 samples allow; scales exact in bf16. */
static void products_are_as_large_as_what_goes_in(void **context) {
    (void)context;
    for (int bits = 3; bits <= 8; bits += bits == 3 ? 1 : 4) {
        struct fq_matrix shape = {
            .n = 256, .k = 2048, .bits = bits, .group = 64, .scale_type = FQ_F16};
        double *row = allocate((size_t)shape.k * sizeof *row), sum = 0, squares = 0;
        struct fq_matrix *matrix;
        struct fq_error err;

        must(fq_synthetic_new(&shape, SEED, 0, shape.n, &matrix, &err), &err);
        for (int64_t n = 0; n < shape.n; n++) {
            fq_matrix_dequantize_row(matrix, n, row);
            for (int64_t k = 0; k < shape.k; k++) {
                sum += row[k];
                squares += row[k] * row[k];
            }
        }
        for (size_t i = 0; i < (size_t)(shape.n * fq_matrix_groups(&shape)); i++) {
            float scale = fq_load(matrix->scales, FQ_F16, i);

            assert_true(scale == fq_bf16_to_f32(fq_f32_to_bf16(scale)));
        }
        double count = (double)(shape.n * shape.k);
        assert_true(fabs(sum / count) < 4 / sqrt((double)shape.k * count));
        assert_true(fabs(squares / count * (double)shape.k - 1) < 0.02);
        fq_synthetic_free(matrix);
        free(row);
    }
}

static void refuses_a_wrong_shape(void **context) {
    struct fq_matrix shape = {.n = 4, .k = 64, .bits = 5, .group = 64, .scale_type = FQ_F16};
    struct fq_backend *backend;
    struct fq_weights *weights;
    struct fq_error err;

    (void)context;
    must(fq_backend_new("reference", NULL, &backend, &err), &err);
    assert_int_equal(fq_weights_synthetic(backend, &shape, SEED, &weights, &err), -FQ_INVALID);
    assert_non_null(strstr(err.message, "bits is 5"));
    assert_null(weights);
    fq_backend_free(backend);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(same_seed_same_weights_on_every_backend),
        cmocka_unit_test(rows_alone_equal_rows_of_the_whole),
        cmocka_unit_test(seeds_differ),
        cmocka_unit_test(products_are_as_large_as_what_goes_in),
        cmocka_unit_test(refuses_a_wrong_shape),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
