/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The compressed-tensors "pack-quantized" layout.  Codes run along K, lowest
 * bits first, biased by 2^(bits−1); scales are [N, groups]; zero points are
 * packed along N.  Until 2026 the format put ten 3-bit codes in a word and left
 * two bits unused; since then 3-bit codes are a dense stream like the others.
 */
#include "compressed-tensors.h"

#include "disk-layout.h"

#include <stdlib.h>
#include <string.h>

#define CODES_A_PADDED_WORD 10

/* The parts, in the order of the suffixes at the end of this file. */
enum {
    PACKED,
    SCALE,
    ZERO,
    SHAPE,
    ORDER
};

typedef const struct fq_checkpoint_tensor *const *parts_t;

static int64_t padded_words(int64_t codes) {
    return (codes + CODES_A_PADDED_WORD - 1) / CODES_A_PADDED_WORD;
}

bool fq_ct_int3_is_plain(int64_t k) {
    /* a single padded word is also the dense one */
    return k <= CODES_A_PADDED_WORD || fq_layout_words(k, 3) != padded_words(k);
}

static bool is_padded(const struct fq_checkpoint_tensor *packed, const struct fq_matrix *matrix) {
    return packed->shape[1] != fq_layout_words(matrix->k, matrix->bits);
}

static int64_t load_integer(const struct fq_checkpoint_tensor *tensor, int i) {
    int32_t narrow;
    int64_t wide;

    if (strcmp(tensor->dtype, "I64") == 0) {
        memcpy(&wide, (const char *)tensor->data + i * 8, 8);
        return wide;
    }
    memcpy(&narrow, (const char *)tensor->data + i * 4, 4);
    return narrow;
}

static int describe_shape(parts_t parts, struct fq_matrix *matrix, struct fq_error *err) {
    const struct fq_checkpoint_tensor *packed = parts[PACKED], *shape = parts[SHAPE];
    int rc = fq_layout_check_words(packed, "", packed, err);

    if (rc < 0)
        return rc;
    if (!shape)
        return FQ_TENSOR_FAIL(err, FQ_FORMAT, packed, "has no weight_shape beside it");
    if ((strcmp(shape->dtype, "I32") != 0 && strcmp(shape->dtype, "I64") != 0) ||
        shape->rank != 1 || shape->shape[0] != 2)
        return FQ_TENSOR_FAIL(err, FQ_FORMAT, shape, "is not two integers, I32 or I64");
    matrix->n = load_integer(shape, 0);
    matrix->k = load_integer(shape, 1);
    if (matrix->n < 1 || matrix->n > FQ_MATRIX_DIM_MAX || matrix->k < 1 ||
        matrix->k > FQ_MATRIX_DIM_MAX)
        return FQ_TENSOR_FAIL(err, FQ_FORMAT, shape, "says %lld by %lld, allowed is 1 to %lld",
                              (long long)matrix->n, (long long)matrix->k,
                              (long long)FQ_MATRIX_DIM_MAX);
    if (packed->shape[0] != matrix->n)
        return FQ_TENSOR_FAIL(err, FQ_FORMAT, packed, "has %lld rows, weight_shape says %lld",
                              (long long)packed->shape[0], (long long)matrix->n);
    return 0;
}

static int check_columns(const struct fq_checkpoint_tensor *packed, const struct fq_matrix *matrix,
                         struct fq_error *err) {
    int64_t words = packed->shape[1], dense = fq_layout_words(matrix->k, matrix->bits);

    if (matrix->bits == 3) {
        if (!fq_ct_int3_is_plain(matrix->k))
            return FQ_TENSOR_FAIL(err, FQ_UNSUPPORTED, packed,
                                  "3 bits with K = %lld: the dense layout and that of ten codes a "
                                  "word both have %lld columns, so they cannot be told apart",
                                  (long long)matrix->k, (long long)dense);
        if (words == dense || words == padded_words(matrix->k))
            return 0;
        return FQ_TENSOR_FAIL(err, FQ_FORMAT, packed,
                              "has %lld columns, 3 bits with K = %lld need %lld (dense) or %lld "
                              "(ten a word)",
                              (long long)words, (long long)matrix->k, (long long)dense,
                              (long long)padded_words(matrix->k));
    }
    if (words != dense)
        return FQ_TENSOR_FAIL(err, FQ_FORMAT, packed,
                              "has %lld columns, %d bits with K = %lld need %lld", (long long)words,
                              matrix->bits, (long long)matrix->k, (long long)dense);
    return 0;
}

/* A scale a row may come without its axis of groups. */
static int describe_scale(parts_t parts, struct fq_matrix *matrix, struct fq_error *err) {
    const struct fq_checkpoint_tensor *scale = parts[SCALE];
    int64_t groups = fq_matrix_groups(matrix);
    struct fq_checkpoint_tensor column;
    int rc;

    if (scale && scale->rank == 1 && groups == 1) {
        column = *scale;
        column.rank = 2;
        column.shape[1] = 1;
        scale = &column;
    }
    rc = fq_layout_check_scales(scale, ".weight_scale", parts[PACKED], &matrix->scale_type, err);
    return rc < 0 ? rc : fq_layout_check_shape(scale, matrix->n, groups, matrix, err);
}

/* Whether the zero points, packed along N, have ten codes a word, as older 3-bit ones do. */
static bool zeros_are_padded(parts_t parts, const struct fq_matrix *matrix) {
    if (matrix->bits != 3)
        return false;
    if (fq_layout_words(matrix->n, 3) != padded_words(matrix->n))
        return parts[ZERO]->shape[0] != fq_layout_words(matrix->n, 3);
    return is_padded(parts[PACKED], matrix); /* the same writer wrote both */
}

static int describe_zero(parts_t parts, const struct fq_matrix *matrix, bool symmetric,
                         struct fq_error *err) {
    const struct fq_checkpoint_tensor *zero = parts[ZERO];
    int64_t rows = fq_layout_words(matrix->n, matrix->bits);
    int rc;

    if (symmetric)
        return zero ? FQ_TENSOR_FAIL(err, FQ_FORMAT, zero,
                                     "is there, but quantization_config says symmetric")
                    : 0;
    if ((rc = fq_layout_check_words(zero, ".weight_zero_point", parts[PACKED], err)) < 0)
        return rc;
    if (matrix->bits == 3 && zero->shape[0] == padded_words(matrix->n))
        rows = padded_words(matrix->n);
    return fq_layout_check_shape(zero, rows, fq_matrix_groups(matrix), matrix, err);
}

static int describe(const void *config, const char *module, parts_t parts,
                    struct fq_checkpoint_matrix *out, struct fq_error *err) {
    struct fq_matrix *matrix = &out->matrix;
    struct fq_ct_scheme scheme;
    int rc = fq_ct_config_match(config, module, &scheme, err);

    if (rc < 0)
        return rc;
    if ((rc = describe_shape(parts, matrix, err)) < 0)
        return rc;
    matrix->bits = scheme.bits;
    matrix->group = scheme.group == 0 || scheme.group > matrix->k ? matrix->k : scheme.group;
    if ((rc = check_columns(parts[PACKED], matrix, err)) < 0 ||
        (rc = describe_scale(parts, matrix, err)) < 0 ||
        (rc = describe_zero(parts, matrix, scheme.symmetric, err)) < 0 ||
        (rc = fq_layout_check_order(parts[ORDER], matrix, err)) < 0)
        return rc;
    out->symmetric = scheme.symmetric;
    return 0;
}

static unsigned load_code(const void *words, int64_t first, int64_t stride, int64_t i, int bits,
                          bool padded) {
    if (!padded)
        return fq_layout_code(words, first, stride, i, bits);
    return fq_layout_code(words, first + i / CODES_A_PADDED_WORD * stride, stride,
                          i % CODES_A_PADDED_WORD, bits);
}

static void repack_rows(parts_t parts, const struct fq_matrix *matrix, uint8_t *codes,
                        uint8_t *row) {
    const struct fq_checkpoint_tensor *packed = parts[PACKED];

    for (int64_t n = 0; n < matrix->n; n++) {
        for (int64_t k = 0; k < matrix->k; k++)
            row[k] =
                (uint8_t)load_code(packed->data, n * packed->shape[1], 1, k, matrix->bits, true);
        fq_matrix_pack_row(codes + n * fq_matrix_row_bytes(matrix), row, matrix->k, matrix->bits);
    }
}

static void unpack_zeros(parts_t parts, const struct fq_matrix *matrix, uint8_t *zeros) {
    int64_t groups = fq_matrix_groups(matrix);
    bool padded = zeros_are_padded(parts, matrix);

    for (int64_t n = 0; n < matrix->n; n++)
        for (int64_t g = 0; g < groups; g++)
            zeros[n * groups + g] =
                (uint8_t)load_code(parts[ZERO]->data, g, groups, n, matrix->bits, padded);
}

/* Codes are borrowed unless they are padded, scales always. */
static int load(const void *config, parts_t parts, const struct fq_checkpoint_matrix *described,
                struct fq_loaded_matrix *out, struct fq_error *err) {
    struct fq_matrix matrix = described->matrix;
    bool padded = is_padded(parts[PACKED], &matrix);
    size_t code_bytes = padded ? (size_t)matrix.n * (size_t)fq_matrix_row_bytes(&matrix) : 0;
    size_t zero_bytes =
        described->symmetric ? 0 : (size_t)matrix.n * (size_t)fq_matrix_groups(&matrix);
    size_t scratch = padded ? (size_t)matrix.k : 0;
    uint8_t *owned = NULL;
    int rc = fq_layout_check_finite(parts[SCALE], matrix.scale_type, err);

    (void)config;
    if (rc < 0)
        return rc;
    if (code_bytes + zero_bytes > 0) {
        owned = malloc(code_bytes + zero_bytes + scratch);
        if (!owned)
            return FQ_TENSOR_FAIL(err, FQ_NO_MEMORY, parts[PACKED], "no memory for %zu bytes",
                                  code_bytes + zero_bytes);
    }
    matrix.codes = parts[PACKED]->data;
    matrix.scales = parts[SCALE]->data;
    if (padded) {
        repack_rows(parts, &matrix, owned, owned + code_bytes + zero_bytes);
        matrix.codes = owned;
    }
    if (!described->symmetric) {
        unpack_zeros(parts, &matrix, owned + code_bytes);
        matrix.zeros = owned + code_bytes;
    }
    *out = (struct fq_loaded_matrix){.matrix = matrix, .owned = owned};
    return 0;
}

const struct fq_layout_ops fq_layout_compressed_tensors = {
    .name = "compressed-tensors",
    .suffixes = {".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape",
                 ".weight_g_idx"},
    .config_new = fq_ct_config_new,
    .config_free = fq_ct_config_free,
    .describe = describe,
    .load = load,
};
