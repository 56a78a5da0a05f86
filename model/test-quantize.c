/* SPDX-License-Identifier: Apache-2.0 */
/* The quantizer against a plain float64 loop that shares no code with it but the fp16 rounding. */
#include "quantize.h"

#include "half.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const struct fq_quantize_method absmax = {.scale = FQ_SCALE_ABSMAX};

static float random_weight(uint32_t *state) {
    float sum = 0;

    for (int i = 0; i < 6; i++) {
        *state = *state * 1664525u + 1013904223u;
        sum += (float)(*state >> 8) / 16777216.0f - 0.5f;
    }
    return sum * 0.05f * ((*state >> 20 & 63) == 0 ? 30.0f : 1.0f); /* and outliers */
}

static void *make_weights(int64_t n, int64_t k, int type) {
    uint32_t seed = (uint32_t)(n * 131 + k);
    void *data = malloc((size_t)(n * k) * fq_dtype_size(type));

    for (int64_t i = 0; i < n * k; i++)
        fq_store(data, type, (size_t)i, random_weight(&seed));
    return data;
}

static double weight(const struct fq_dense *dense, int64_t n, int64_t k) {
    return (double)fq_load(dense->data, (int)dense->type, (size_t)(n * dense->k + k));
}

static void check_group(const struct fq_dense *dense, const struct fq_matrix *matrix, int64_t n,
                        int64_t begin, int64_t end) {
    double largest = 0, levels = pow(2, matrix->bits) - 1, half = pow(2, matrix->bits - 1), s;
    uint16_t stored;

    for (int64_t k = begin; k < end; k++)
        largest = fmax(largest, fabs(weight(dense, n, k)));
    memcpy(&stored,
           (const char *)matrix->scales +
               (n * fq_matrix_groups(matrix) + begin / matrix->group) * 2,
           2);
    assert_int_equal(stored, fq_f32_to_f16((float)(2 * largest / levels)));
    s = (double)fq_f16_to_f32(stored);
    for (int64_t k = begin; k < end; k++) {
        double q = s == 0 ? 0 : fmin(fmax(nearbyint(weight(dense, n, k) / s), -half), half - 1);

        assert_int_equal(fq_matrix_code(matrix, n, k), (int)(q + half));
    }
}

static void matches_a_float64_loop(void **state) {
    static const struct {
        int64_t n, k, group;
    } shapes[] = {{1, 1, 0}, {3, 64, 16}, {5, 100, 32}, {4, 257, 64}, {7, 130, 0}, {2, 33, 128}};
    static const int bits[] = {8, 4, 3};
    static const int types[] = {FQ_F32, FQ_F16, FQ_BF16};

    (void)state;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes * 9; i++) {
        int64_t n = shapes[i / 9].n, k = shapes[i / 9].k;
        struct fq_dense dense = {.n = n, .k = k, .type = (enum fq_dtype)types[i % 3]};
        struct fq_matrix matrix = {.bits = bits[i / 3 % 3], .group = shapes[i / 9].group};
        struct fq_error err;
        void *data = make_weights(n, k, types[i % 3]), *storage;

        dense.data = data;
        assert_int_equal(fq_quantize(&dense, &absmax, &matrix, &storage, NULL, &err), 0);
        assert_int_equal(matrix.group,
                         shapes[i / 9].group && shapes[i / 9].group < k ? shapes[i / 9].group : k);
        for (int64_t row = 0; row < n; row++)
            for (int64_t begin = 0; begin < k; begin += matrix.group)
                check_group(&dense, &matrix, row, begin,
                            begin + matrix.group < k ? begin + matrix.group : k);
        free(storage);
        free(data);
    }
}

static void int4_scale_is_absmax_over_7_5(void **state) {
    float weights[16] = {-7.5f, 7.5f, 3.4f, 0.5f, 1.5f};
    static const unsigned codes[5] = {0, 15, 11, 8, 10}; /* ties to even; +8 clips to +7 */
    struct fq_dense dense = {.n = 1, .k = 16, .type = FQ_F32, .data = weights};
    struct fq_matrix matrix = {.bits = 4, .group = 16};
    struct fq_error err;
    void *storage;
    uint16_t scale;

    (void)state;
    assert_int_equal(fq_quantize(&dense, &absmax, &matrix, &storage, NULL, &err), 0);
    memcpy(&scale, matrix.scales, 2);
    assert_int_equal(scale, 0x3c00); /* 1.0 */
    for (int i = 0; i < 5; i++)
        assert_int_equal(fq_matrix_code(&matrix, 0, i), codes[i]);
    free(storage);
}

static void names_the_first_weight_that_is_not_finite(void **state) {
    static const struct {
        uint32_t bits;
        const char *words;
    } cases[] = {{0x7fc00000, "row 2, column 17 is NaN"},
                 {0x7f800000, "row 2, column 17 is infinite"},
                 {0xff800000, "row 2, column 17 is infinite"},
                 {0x7f000000,
                  "row 2, column 17 has magnitude 1.70141e+38; a scale in fp16, 65504 "
                  "at most, reaches 8351760 with 8 bits, 491280 with 4 and 229264 with 3"}};

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        float weights[5 * 32] = {0};
        struct fq_dense dense = {.n = 5, .k = 32, .type = FQ_F32, .data = weights};
        struct fq_matrix matrix = {.bits = 4, .group = 16};
        struct fq_error err;
        void *storage = NULL;

        weights[2 * 32 + 17] = weights[4 * 32 + 1] = fq_f32_from_bits(cases[i].bits);
        assert_int_equal(fq_quantize(&dense, &absmax, &matrix, &storage, NULL, &err), -FQ_INVALID);
        if (!strstr(err.message, cases[i].words))
            fail_msg("%s", err.message);
    }
}

/* A group that no width or only a wider one has a scale for; the check finds what rounding does. */
static void names_a_weight_too_large_for_its_width(void **state) {
    static const struct {
        int bits;
        float most;
    } widths[] = {{8, 8351760.0f}, {4, 491280.0f}, {3, 229264.0f}};

    (void)state;
    for (int i = 0; i < 3 * 2 * 2 * 2; i++) {
        const bool over = i & 1;
        float weights[3 * 32] = {0};
        struct fq_dense dense = {.n = 3, .k = 32, .type = FQ_F32, .data = weights};
        struct fq_matrix matrix = {.bits = widths[i / 8].bits, .group = 16};
        struct fq_quantize_method method = {.scale = i & 2 ? FQ_SCALE_MSE : FQ_SCALE_ABSMAX,
                                            .asymmetric = i & 4};
        struct fq_error err;
        void *storage = NULL;
        double left;
        int rc;

        weights[32 + 20] = -widths[i / 8].most * (over ? 1.01f : 1);
        weights[32 + 21] = -weights[32 + 20];
        rc = fq_quantize(&dense, &method, &matrix, &storage, &left, &err);
        assert_int_equal(rc, over ? -FQ_INVALID : 0);
        assert_int_equal(fq_quantize_check(&dense, &method, &matrix, &err), rc);
        if (over && !strstr(err.message, "row 1, column 20 has magnitude"))
            fail_msg("%s", err.message);
        assert_true(over || left < 0.2);
        free(storage);
    }
}

/* Scales in fp16 end at 2^-24: what they tell from 0 is kept, and all that is lost is counted. */
static void tiny_weights_keep_what_a_scale_can_tell(void **state) {
    static const struct {
        float magnitude;
        double least, most; /* of the error */
    } cases[] = {{1e-6f, 0, 0.2},          {1e-7f, 0.05, 0.25},    {0x1.8p-25f, 0.2, 0.5},
                 {0x1p-25f, 0.999, 1.001}, {1e-15f, 0.999, 1.001}, {1e-30f, 0.999, 1.001},
                 {1e-42f, 0.999, 1.001}};
    static const int bits[] = {8, 4, 3};

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases * 3 * 4; i++) {
        const float magnitude = cases[i / 12].magnitude;
        float weights[64];
        struct fq_dense dense = {.n = 2, .k = 32, .type = FQ_F32, .data = weights};
        struct fq_matrix matrix = {.bits = bits[i / 4 % 3], .group = 16};
        struct fq_quantize_method method = {.scale = i & 1 ? FQ_SCALE_MSE : FQ_SCALE_ABSMAX,
                                            .asymmetric = i & 2};
        struct fq_quantize_trial trial = {
            .bits = matrix.bits, .group = 16, .asymmetric = method.asymmetric};
        struct fq_error err;
        void *storage;
        double left;

        for (int w = 0; w < 64; w++)
            weights[w] = magnitude * (w % 2 ? -1 : 1) * (w % 16 == 0 || w % 3 ? 1 : 0.96875f);
        assert_int_equal(fq_quantize(&dense, &method, &matrix, &storage, &left, &err), 0);
        if (left < cases[i / 12].least || left > cases[i / 12].most)
            fail_msg("%g with %d bits: %g", (double)magnitude, matrix.bits, left);
        assert_true(fabs(fq_quantize_error(&dense, &matrix) - left) < 1e-6);
        assert_int_equal(fq_quantize_measure(&dense, &method, &trial, 1, &err), 0);
        assert_true(fabs(trial.error - left) < 1e-6);
        free(storage);
    }
}

static void zero_weights_have_no_error(void **state) {
    float weights[64] = {0};
    struct fq_dense dense = {.n = 2, .k = 32, .type = FQ_F32, .data = weights};
    struct fq_matrix matrix = {.bits = 3, .group = 16};
    struct fq_error err;
    void *storage;

    (void)state;
    assert_int_equal(fq_quantize(&dense, &absmax, &matrix, &storage, NULL, &err), 0);
    assert_true(fq_quantize_error(&dense, &matrix) == 0);
    free(storage);
}

static void error_is_the_relative_frobenius_norm(void **state) {
    struct fq_dense dense = {.n = 6, .k = 96, .type = FQ_BF16};
    struct fq_matrix matrix = {.bits = 4, .group = 32};
    double row[96], difference = 0, norm = 0;
    struct fq_error err;
    void *data = make_weights(6, 96, FQ_BF16), *storage;

    (void)state;
    dense.data = data;
    assert_int_equal(fq_quantize(&dense, &absmax, &matrix, &storage, NULL, &err), 0);
    for (int64_t n = 0; n < 6; n++) {
        fq_matrix_dequantize_row(&matrix, n, row);
        for (int64_t k = 0; k < 96; k++) {
            difference += pow(weight(&dense, n, k) - row[k], 2);
            norm += pow(weight(&dense, n, k), 2);
        }
    }
    assert_true(fabs(fq_quantize_error(&dense, &matrix) - sqrt(difference / norm)) < 1e-12);
    free(storage);
    free(data);
}

/* Sums of three uniform numbers, which lie like normal ones; the same every time. */
static void fill(float *weights, size_t count) {
    uint32_t seed = 17;

    for (size_t i = 0; i < count; i++) {
        weights[i] = -1.5f;
        for (int j = 0; j < 3; j++) {
            seed = seed * 1664525u + 1013904223u;
            weights[i] += (float)(seed >> 8) / 16777216.0f;
        }
    }
}

static struct fq_quantize_trial estimated[12], measured[12];

/* The largest relative difference of an estimate. */
static double furthest(const struct fq_dense *dense) {
    static const int64_t groups[] = {0, 128, 32, 16};
    static const int bits[] = {3, 4, 8};
    const struct fq_quantize_method method = {.scale = FQ_SCALE_MSE};
    struct fq_error err;
    double most = 0;

    for (size_t i = 0; i < 12; i++)
        estimated[i] = measured[i] =
            (struct fq_quantize_trial){.bits = bits[i / 4], .group = groups[i % 4]};
    assert_int_equal(fq_quantize_measure(dense, &method, measured, 12, &err), 0);
    assert_int_equal(fq_quantize_estimate(dense, &method, estimated, 12, &err), 0);
    for (size_t i = 0; i < 12; i++)
        most = fmax(most, fabs(estimated[i].error / measured[i].error - 1));
    return most;
}

static void estimates_are_near_what_is_measured(void **state) {
    const int64_t n = 2048, k = 512;
    float *weights = malloc((size_t)(n * k) * sizeof *weights);
    struct fq_dense dense = {.n = n, .k = k, .type = FQ_F32, .data = weights};

    (void)state;
    assert_non_null(weights);
    fill(weights, (size_t)(n * k));
    assert_true(fq_quantize_is_sampled(&dense));
    assert_true(furthest(&dense) < 0.005);
    weights[1234 * k + 99] = 300; /* most of the error per channel is this row's */
    for (int64_t i = 0; i < k; i++)
        weights[77 * k + i] *= 40;
    assert_true(furthest(&dense) < 0.005);
    for (int64_t row = 0; row < n; row++) /* every eighth row, as heads might be, is larger */
        for (int64_t i = 0; row % 8 == 3 && i < k; i++)
            weights[row * k + i] *= 5;
    assert_true(furthest(&dense) < 0.01);
    for (int64_t row = 0; row < n; row++)
        weights[row * k + 200] *= 30;
    assert_true(furthest(&dense) < 0.02);
    assert_true(furthest(&dense) > 0); /* else nothing was estimated */
    dense.n = 1000;
    assert_false(fq_quantize_is_sampled(&dense));
    assert_true(furthest(&dense) == 0);
    free(weights);
}

static void estimates_name_what_is_not_finite(void **state) {
    const int64_t n = 2048, k = 512;
    float *weights = calloc((size_t)(n * k), sizeof *weights);
    struct fq_dense dense = {.n = n, .k = k, .type = FQ_F32, .data = weights};
    struct fq_quantize_trial trial = {.bits = 4, .group = 64};
    struct fq_error err;

    (void)state;
    assert_non_null(weights);
    assert_int_equal(fq_quantize_estimate(&dense, &absmax, &trial, 1, &err), 0);
    assert_true(trial.error == 0);
    weights[1999 * k + 7] = NAN;
    assert_int_equal(fq_quantize_estimate(&dense, &absmax, &trial, 1, &err), -FQ_INVALID);
    if (!strstr(err.message, "row 1999, column 7 is NaN"))
        fail_msg("%s", err.message);
    free(weights);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(matches_a_float64_loop),
        cmocka_unit_test(int4_scale_is_absmax_over_7_5),
        cmocka_unit_test(names_the_first_weight_that_is_not_finite),
        cmocka_unit_test(names_a_weight_too_large_for_its_width),
        cmocka_unit_test(tiny_weights_keep_what_a_scale_can_tell),
        cmocka_unit_test(zero_weights_have_no_error),
        cmocka_unit_test(error_is_the_relative_frobenius_norm),
        cmocka_unit_test(estimates_are_near_what_is_measured),
        cmocka_unit_test(estimates_name_what_is_not_finite),
    };

    return cmocka_run_group_tests(tests, NULL, NULL) ? 1 : 0;
}
