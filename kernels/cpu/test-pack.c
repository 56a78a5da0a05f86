/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The prepacked layout of cpu.h, read back by a plain reading of its picture:
 * every code, scale and zero point of random matrices is where it should be,
 * the padding is zero weights, and the size is what was announced.  And X in
 * 16-bit limbs, likewise.
 */
#ifdef HAVE_CONFIG_H
#include <config.h>
#endif

#include "../matrix.h"
#include "cpu.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static uint64_t state = 1;

static uint8_t random_byte(void) {
    uint64_t z = state += 0x9e3779b97f4a7c15u; /* splitmix64 */

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint8_t)(z ^ (z >> 31));
}

static uint8_t *random_bytes(int64_t count) {
    uint8_t *bytes = malloc((size_t)count);

    assert_non_null(bytes);
    for (int64_t i = 0; i < count; i++)
        bytes[i] = random_byte();
    return bytes;
}

/* 32-bit word `word` of a row. */
static uint32_t word_at(const struct fq_cpu_weights *weights, int64_t row, int64_t word) {
    uint32_t value;

    memcpy(&value,
           weights->codes + row / FQ_CPU_BLOCK * weights->block_bytes +
               (word * FQ_CPU_BLOCK + row % FQ_CPU_BLOCK) * 4,
           sizeof value);
    return value;
}

/* Code less 2^(bits−1), in two's complement of `bits` bits, as the picture has it. */
static unsigned packed_code(const struct fq_cpu_weights *weights, int64_t row, int64_t k) {
    static const int place_of_4[] = {0, 2, 4, 6, 1, 3, 5, 7}; /* nibble of column 0, 1, ... */
    static const int bit_of_3[] = {0, 8, 16, 24, 3, 11, 19, 27};
    unsigned code = 0;

    switch (weights->base.info.bits) {
    case 8:
        return word_at(weights, row, k / 4) >> k % 4 * 8 & 0xff;
    case 4:
        return word_at(weights, row, k / 8) >> place_of_4[k % 8] * 4 & 0xf;
    default:
        if (k % 32 < 24)
            return word_at(weights, row, k / 32 * 3 + k % 32 / 8) >> bit_of_3[k % 8] & 7;
        /* the upper two bits of byte k % 4 of the three words: codes of k % 4 and of 4 more */
        for (int i = 2; i >= 0; i--)
            code = code << 2 | (word_at(weights, row, k / 32 * 3 + i) >> k % 4 * 8 >> 6 & 3);
        return (k % 8 < 4 ? code : code >> 3) & 7;
    }
}

static void check_codes(const struct fq_cpu_weights *weights, const struct fq_matrix *matrix) {
    const unsigned sign = 1u << (matrix->bits - 1);

    for (int64_t row = 0; row < weights->blocks * FQ_CPU_BLOCK; row++)
        for (int64_t k = 0; k < weights->k_padded; k++) {
            unsigned expected =
                row < matrix->n && k < matrix->k ? fq_matrix_code(matrix, row, k) ^ sign : 0;

            assert_int_equal(packed_code(weights, row, k), expected);
        }
}

static void check_groups(const struct fq_cpu_weights *weights, const struct fq_matrix *matrix) {
    const uint16_t *scales = matrix->scales;
    int64_t groups = fq_matrix_groups(matrix);

    assert_int_equal(weights->groups, groups);
    for (int64_t row = 0; row < matrix->n; row++)
        for (int64_t g = 0; g < groups; g++) {
            int64_t at = (row / FQ_CPU_BLOCK * groups + g) * FQ_CPU_BLOCK + row % FQ_CPU_BLOCK;

            assert_int_equal(weights->scales[at], scales[row * groups + g]);
            if (matrix->zeros)
                assert_int_equal(weights->zeros[at] + (1 << (matrix->bits - 1)),
                                 matrix->zeros[row * groups + g]);
        }
}

static void check_matrix(struct fq_matrix *matrix, bool zeros) {
    const int64_t groups = matrix->n * fq_matrix_groups(matrix);
    uint8_t *codes = random_bytes(matrix->n * fq_matrix_row_bytes(matrix));
    uint8_t *scales = random_bytes(groups * 2), *points = random_bytes(groups);
    struct fq_weights *weights = NULL;
    struct fq_error err;

    for (int64_t i = 0; i < groups; i++)
        points[i] &= (uint8_t)((1 << matrix->bits) - 1);
    matrix->codes = codes;
    matrix->scales = scales;
    matrix->zeros = zeros ? points : NULL;
    struct cpu_backend backend = {.threads = 2};
    assert_int_equal(fq_cpu_weights_new(&backend.base, matrix, &weights, &err), 0);
    assert_int_equal(weights->info.bytes, fq_cpu_weights_size(NULL, matrix));
    check_codes((const struct fq_cpu_weights *)weights, matrix);
    check_groups((const struct fq_cpu_weights *)weights, matrix);
    fq_cpu_weights_free(weights);
    free(codes);
    free(scales);
    free(points);
}

static void every_code_is_found_in_its_place(void **unused) {
    static const int bits[] = {8, 4, 3};
    static const int64_t groups[] = {16, 48, 64, 256, 0}; /* 0: per channel */

    (void)unused;
    for (size_t b = 0; b < sizeof bits / sizeof *bits; b++)
        for (size_t g = 0; g < sizeof groups / sizeof *groups; g++)
            for (int round = 0; round < 4; round++) {
                int64_t k = groups[g] + 1 + random_byte();
                struct fq_matrix matrix = {
                    .n = 1 + random_byte() % 150,
                    .k = k,
                    .bits = bits[b],
                    .group = groups[g] ? groups[g] : k,
                    .scale_type = round % 2 ? FQ_F16 : FQ_BF16,
                };

                check_matrix(&matrix, round >= 2);
            }
}

/* The chunks of the fixed-point form cover K once, in order, and none spans two groups or
 * segments. */
static void chunks_cover_k_within_groups(void **unused) {
    static const struct {
        int64_t k, group, chunks;
    } cases[] = {{16, 16, 1}, {4096, 64, 64}, {1000, 1000, 4}, {1000, 272, 7}, {33, 16, 3}};

    (void)unused;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct fq_cpu_weights weights = {
            .base.info = {.k = cases[i].k, .group = cases[i].group},
            .groups = (cases[i].k + cases[i].group - 1) / cases[i].group,
            .k_padded = (cases[i].k + FQ_CPU_K_ALIGN - 1) / FQ_CPU_K_ALIGN * FQ_CPU_K_ALIGN,
        };
        struct fq_cpu_span span = {0};
        int64_t at = 0, count = 0;

        while (fq_cpu_next_span(&weights, &span)) {
            int64_t last = span.end - 1 < cases[i].k ? span.end - 1 : cases[i].k - 1;

            assert_int_equal(span.begin, at);
            assert_int_equal(span.chunks, count + 1);
            assert_in_range(span.segment_begin, 0, span.begin);
            assert_in_range(span.end - span.segment_begin, 1, FQ_CPU_SEGMENT);
            assert_int_equal(span.end % FQ_CPU_STEP, 0);
            assert_int_equal(span.group, span.begin / cases[i].group);
            assert_int_equal(span.group, last / cases[i].group);
            at = span.end;
            count++;
        }
        assert_int_equal(at, weights.k_padded);
        assert_int_equal(count, fq_cpu_chunks(&weights));
    }
}

#ifdef FQ_CPU_X86
/* X in fixed point, as a set of kernels has it: a column is part[0] + 2^16 · part[1], in units. */
struct form {
    void (*to_fixed)(const struct fq_cpu_weights *weights, const float *x, enum fq_dtype type,
                     struct fq_cpu_fixed *fixed);
    void (*find)(const int8_t *limbs, int bits, int64_t k, int part[2]);
    int limbs;         /* of a segment, at most */
    bool signed_codes; /* of 8 bits, which want no offset then */
};

/* 16-bit limbs; words.c says how columns lie in pairs. */
static void find_in_words(const int8_t *limbs, int bits, int64_t k, int part[2]) {
    static const int place[][8] = {
        {0, 2, 1, 3, 4, 6, 5, 7}, /* of column 0, 1, ... of 8: 8 bits */
        {0, 4, 1, 5, 2, 6, 3, 7}, /* fewer */
    };
    const int at = place[bits == 8 ? 0 : 1][k % 8];
    int16_t low, high;

    limbs += k / 16 * 64 + (k % 16 / 8 * 8 + at) * 2;
    memcpy(&low, limbs, sizeof low);
    memcpy(&high, limbs + 32, sizeof high);
    part[0] = low;
    part[1] = high;
}

/* Bytes: sixteen columns, limb after limb. */
static void find_in_bytes(const int8_t *limbs, int bits, int64_t k, int part[2]) {
    (void)bits;
    limbs += k / 16 * 48 + k % 16;
    part[0] = limbs[0] + 256 * limbs[16];
    part[1] = limbs[32];
}

/* Every element of X comes back within the rounding of its segment's form, however small it is. */
static void check_form(const struct form *form, int bits, enum fq_dtype type, int64_t group,
                       float largest) {
    enum {
        K = 512
    };
    struct fq_cpu_weights weights = {
        .base.info = {.k = K, .group = group, .bits = bits},
        .groups = (K + group - 1) / group,
        .k_padded = K,
    };
    static int8_t limbs[K * 4];
    static struct fq_cpu_chunk chunks[K / 16];
    static struct fq_cpu_segment segments[K / 16];
    struct fq_cpu_fixed fixed = {
        .limbs = limbs, .chunks_pitch = 1, .chunks = chunks, .segments = segments};
    struct fq_cpu_span span = {0};
    float x[K];

    for (int k = 0; k < K; k++)
        x[k] = largest * (float)(random_byte() - 128) / 128;
    x[300] = 40 * largest; /* stands out: its segment takes all limbs */
    form->to_fixed(&weights, x, type, &fixed);
    assert_true(fixed.valid);
    while (fq_cpu_next_span(&weights, &span)) {
        const struct fq_cpu_segment *segment = &segments[span.segments - 1];
        const bool has_largest = span.segment_begin <= 300 && 300 < span.segment_begin + 256;
        const struct fq_cpu_chunk *chunk = &chunks[span.chunks - 1];
        int64_t sum[2] = {0, 0};

        /* bf16's squares vanish below 1e-23: 15 bits are enough for it whatever stands out. */
        if (type == FQ_F32 || (has_largest && group == K && largest > 1e-23f))
            assert_int_equal(segment->limbs, form->limbs);
        assert_true(segment->unit > 0 && segment->unit < 1e30f);
        for (int64_t k = span.begin; k < span.end; k++) {
            int part[2];

            form->find(limbs, bits, k, part);
            const double error = (part[0] + 65536.0 * part[1]) * segment->unit - x[k];

            assert_true(error <= 0.5 * segment->unit && error >= -0.5 * segment->unit);
            sum[0] += part[0];
            sum[1] += part[1];
        }
        assert_true(chunk->sum == (float)(sum[0] + 65536 * sum[1]));
        for (int i = 0; i < 2; i++) {
            const int64_t offset =
                bits == 8 && form->signed_codes ? 0 : -sum[i] * (1 << (bits - 1));

            assert_int_equal(chunk->offset[i], (int32_t)offset);
        }
    }
}

static void check_forms(const struct form *form) {
    static const int bits[] = {8, 4, 3};
    static const enum fq_dtype types[] = {FQ_F16, FQ_BF16, FQ_F32};
    static const int64_t groups[] = {16, 64, 512};
    static const float largest[] = {1, 1e4f, 1e-20f, 1e-30f};

    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        skip();
    for (size_t i = 0; i < 3 * 3 * 3 * 4; i++)
        check_form(form, bits[i % 3], types[i / 3 % 3], groups[i / 9 % 3], largest[i / 27]);
}

static void words_of_x_come_back(void **unused) {
    (void)unused;
    check_forms(&(struct form){fq_cpu_to_fixed_words, find_in_words, 2, true});
}

#ifdef FQ_CPU_AVXVNNI
static void bytes_of_x_come_back(void **unused) {
    (void)unused;
    check_forms(&(struct form){fq_cpu_to_fixed_bytes, find_in_bytes, 3, false});
}
#endif
#endif

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_code_is_found_in_its_place),
        cmocka_unit_test(chunks_cover_k_within_groups),
#ifdef FQ_CPU_X86
        cmocka_unit_test(words_of_x_come_back),
#ifdef FQ_CPU_AVXVNNI
        cmocka_unit_test(bytes_of_x_come_back),
#endif
#endif
    };

    return cmocka_run_group_tests(tests, NULL, NULL) != 0;
}
