/* SPDX-License-Identifier: Apache-2.0 */
/* The canonical form: what is refused, and that codes come back as they were packed. */
#include "half.h"
#include "matrix.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define COUNT(array) (sizeof(array) / sizeof *(array))

static void accepts_every_documented_shape(void **context) {
    static const int bits[] = {8, 4, 3};
    static const int64_t groups[] = {16, 32, 48, 64, 128, 256, 1000};

    (void)context;
    for (size_t b = 0; b < COUNT(bits); b++)
        for (size_t g = 0; g < COUNT(groups); g++)
            for (int type = FQ_F16; type <= FQ_BF16; type++) {
                struct fq_matrix matrix = {.n = 7,
                                           .k = 1000,
                                           .bits = bits[b],
                                           .group = groups[g],
                                           .scale_type = (enum fq_dtype)type};

                assert_int_equal(fq_matrix_check(&matrix, NULL), 0);
            }
}

static void refuses_each_field_by_name_and_value(void **context) {
    static const struct {
        struct fq_matrix matrix;
        const char *names, *value;
    } cases[] = {
        {{0, 64, 4, 16, FQ_F16}, "n is", "0"},
        {{-5, 64, 4, 16, FQ_F16}, "n is", "-5"},
        {{FQ_MATRIX_DIM_MAX + 1, 64, 4, 16, FQ_F16}, "n is", "16777217"},
        {{8, 0, 4, 16, FQ_F16}, "k is", "0"},
        {{8, INT64_MAX, 4, 16, FQ_F16}, "k is", "9223372036854775807"},
        {{8, 64, 5, 16, FQ_F16}, "bits is", "5"},
        {{8, 64, 0, 16, FQ_F16}, "bits is", "0"},
        {{8, 64, 4, 0, FQ_F16}, "group", "0"},
        {{8, 64, 4, -16, FQ_F16}, "group", "-16"},
        {{8, 64, 4, 8, FQ_F16}, "group", "8"},
        {{8, 64, 4, 24, FQ_F16}, "group", "24"},
        {{8, 64, 4, 128, FQ_F16}, "group", "128"},
        {{8, 64, 4, 16, FQ_F32}, "scale type", "1"},
        {{8, 64, 4, 16, (enum fq_dtype)9}, "scale type", "9"},
    };

    (void)context;
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct fq_error err;

        assert_int_equal(fq_matrix_check(&cases[i].matrix, &err), -FQ_INVALID);
        assert_non_null(strstr(err.message, cases[i].names));
        assert_non_null(strstr(err.message, cases[i].value));
        assert_non_null(strstr(err.message, "allowed"));
    }
}

static void counts_bytes_of_packed_rows_groups_and_scales(void **context) {
    static const uint8_t some_zeros[1];
    static const struct {
        struct fq_matrix matrix;
        int64_t groups, row_bytes, bytes;
    } cases[] = {
        {{3, 1, 8, 1, FQ_F16}, 1, 4, 3 * (4 + 2)},
        {{3, 5, 8, 5, FQ_F16}, 1, 8, 3 * (8 + 2)},
        {{2, 9, 4, 9, FQ_F16}, 1, 8, 2 * (8 + 2)},
        {{2, 10, 3, 10, FQ_F16}, 1, 4, 2 * (4 + 2)},
        {{2, 11, 3, 11, FQ_F16}, 1, 8, 2 * (8 + 2)},
        {{1, 32, 3, 16, FQ_F16}, 2, 12, 12 + 4},
        {{1, 100, 4, 48, FQ_BF16, NULL, NULL, some_zeros}, 3, 52, 52 + 9},
    };

    (void)context;
    for (size_t i = 0; i < COUNT(cases); i++) {
        assert_int_equal(fq_matrix_groups(&cases[i].matrix), cases[i].groups);
        assert_int_equal(fq_matrix_row_bytes(&cases[i].matrix), cases[i].row_bytes);
        assert_int_equal(fq_matrix_bytes(&cases[i].matrix), cases[i].bytes);
    }
}

static void packs_lowest_bits_first(void **context) {
    static const uint8_t codes[] = {1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3};
    uint8_t packed[12];

    (void)context;
    fq_matrix_pack_row(packed, codes, 11, 8);
    assert_memory_equal(packed, ((const uint8_t[]){1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 0}), 12);
    fq_matrix_pack_row(packed, codes, 11, 4);
    assert_memory_equal(packed, ((const uint8_t[]){0x21, 0x43, 0x65, 0x07, 0x21, 0x03, 0, 0}), 8);
    /* 1 2 3 4 5 6 7 0 is octal 07654321, then 1 2 3 */
    fq_matrix_pack_row(packed, codes, 11, 3);
    assert_memory_equal(packed, ((const uint8_t[]){0xd1, 0x58, 0x1f, 0xd1, 0, 0, 0, 0}), 8);
}

static void gives_back_the_codes_that_were_packed(void **context) {
    static const int bits[] = {8, 4, 3};
    static const int64_t ks[] = {1, 10, 11, 31, 32, 33, 100};

    (void)context;
    for (size_t b = 0; b < COUNT(bits); b++)
        for (size_t i = 0; i < COUNT(ks); i++) {
            struct fq_matrix matrix = {
                .n = 3, .k = ks[i], .bits = bits[b], .group = ks[i], .scale_type = FQ_F16};
            size_t row_bytes = (size_t)fq_matrix_row_bytes(&matrix);
            uint8_t *packed = malloc(3 * row_bytes); /* exact: a sanitizer sees reads beyond */
            uint8_t codes[3][100];

            for (int row = 0; row < 3; row++) {
                for (int64_t k = 0; k < ks[i]; k++)
                    codes[row][k] = (uint8_t)((k * 37 + row * 11 + 5) & ((1 << bits[b]) - 1));
                fq_matrix_pack_row(packed + (size_t)row * row_bytes, codes[row], ks[i], bits[b]);
            }
            matrix.codes = packed;
            for (int row = 0; row < 3; row++)
                for (int64_t k = 0; k < ks[i]; k++)
                    assert_int_equal(fq_matrix_code(&matrix, row, k), codes[row][k]);
            free(packed);
        }
}

/* Two rows, groups of 16 with a short last one, scales and zeros all different. */
static void dequantizes_each_group_with_its_own_scale_and_zero(void **context) {
    enum {
        N = 2,
        K = 40,
        GROUPS = 3
    };
    static const uint8_t zeros[N * GROUPS] = {0, 3, 15, 8, 1, 7};
    uint8_t codes[N][K], packed[N * K / 2];

    (void)context;
    for (int type = FQ_F16; type <= FQ_BF16; type++)
        for (int symmetric = 0; symmetric < 2; symmetric++) {
            uint16_t scales[N * GROUPS];
            double w[K];

            for (size_t i = 0; i < N * GROUPS; i++)
                fq_store(scales, type, i, 0.25F * (float)(i + 1) * (i % 2 ? -1 : 1));
            for (int row = 0; row < N; row++) {
                for (int k = 0; k < K; k++)
                    codes[row][k] = (uint8_t)((k * 7 + row) & 15);
                fq_matrix_pack_row(packed + row * K / 2, codes[row], K, 4);
            }
            struct fq_matrix matrix = {.n = N,
                                       .k = K,
                                       .bits = 4,
                                       .group = 16,
                                       .scale_type = (enum fq_dtype)type,
                                       .codes = packed,
                                       .scales = scales,
                                       .zeros = symmetric ? NULL : zeros};
            for (int row = 0; row < N; row++) {
                fq_matrix_dequantize_row(&matrix, row, w);
                for (int k = 0; k < K; k++) {
                    int group = row * GROUPS + k / 16;
                    int zero = symmetric ? 8 : zeros[group];
                    double scale = 0.25 * (group + 1) * (group % 2 ? -1 : 1);

                    assert_true(w[k] == (codes[row][k] - zero) * scale);
                }
            }
        }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(accepts_every_documented_shape),
        cmocka_unit_test(refuses_each_field_by_name_and_value),
        cmocka_unit_test(counts_bytes_of_packed_rows_groups_and_scales),
        cmocka_unit_test(packs_lowest_bits_first),
        cmocka_unit_test(gives_back_the_codes_that_were_packed),
        cmocka_unit_test(dequantizes_each_group_with_its_own_scale_and_zero),
    };

    return cmocka_run_group_tests_name("matrix", tests, NULL, NULL) != 0;
}
