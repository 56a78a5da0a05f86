/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The compressed-tensors tensors of one module.  Codes run along K, lowest
 * bits first, biased by 2^(bits−1); scales are [N, groups]; zero points are
 * packed along N.  Until 2026 the format put ten 3-bit codes in a word and left
 * two bits unused; since then 3-bit codes are a dense stream like the others.
 */
#include "compressed-tensors.h"

#include "half.h"

#include <stdlib.h>
#include <string.h>

#define CODES_A_PADDED_WORD 10

static int64_t dense_words(int64_t codes, int bits) {
    return (codes * bits + 31) / 32;
}

static int64_t padded_words(int64_t codes) {
    return (codes + CODES_A_PADDED_WORD - 1) / CODES_A_PADDED_WORD;
}

bool fq_ct_int3_is_plain(int64_t k) {
    /* a single padded word is also the dense one */
    return k <= CODES_A_PADDED_WORD || dense_words(k, 3) != padded_words(k);
}

static bool is_padded(const struct fq_checkpoint_tensor *packed, int64_t k, int bits) {
    return packed->shape[1] != dense_words(k, bits);
}

#define PART_FAIL(err, status, part, ...)                                                          \
    (fq_fail((err), (status), __VA_ARGS__),                                                        \
     fq_fail_in((err), "%s: tensor '%.200s'", (part)->file, (part)->name))

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

static int describe_shape(const struct fq_ct_parts *parts, struct fq_matrix *matrix,
                          struct fq_error *err) {
    const struct fq_checkpoint_tensor *packed = parts->packed, *shape = parts->shape;

    if (strcmp(packed->dtype, "I32") != 0 || packed->rank != 2)
        return PART_FAIL(err, FQ_FORMAT, packed, "is %s of rank %d, must be I32 of rank 2",
                         packed->dtype, packed->rank);
    if (!shape)
        return PART_FAIL(err, FQ_FORMAT, packed, "has no weight_shape beside it");
    if ((strcmp(shape->dtype, "I32") != 0 && strcmp(shape->dtype, "I64") != 0) ||
        shape->rank != 1 || shape->shape[0] != 2)
        return PART_FAIL(err, FQ_FORMAT, shape, "is not two integers, I32 or I64");
    matrix->n = load_integer(shape, 0);
    matrix->k = load_integer(shape, 1);
    if (matrix->n < 1 || matrix->n > FQ_MATRIX_DIM_MAX || matrix->k < 1 ||
        matrix->k > FQ_MATRIX_DIM_MAX)
        return PART_FAIL(err, FQ_FORMAT, shape, "says %lld by %lld, allowed is 1 to %lld",
                         (long long)matrix->n, (long long)matrix->k, (long long)FQ_MATRIX_DIM_MAX);
    if (packed->shape[0] != matrix->n)
        return PART_FAIL(err, FQ_FORMAT, packed, "has %lld rows, weight_shape says %lld",
                         (long long)packed->shape[0], (long long)matrix->n);
    return 0;
}

static int check_columns(const struct fq_checkpoint_tensor *packed, const struct fq_matrix *matrix,
                         struct fq_error *err) {
    int64_t words = packed->shape[1], dense = dense_words(matrix->k, matrix->bits);

    if (matrix->bits == 3) {
        if (!fq_ct_int3_is_plain(matrix->k))
            return PART_FAIL(err, FQ_UNSUPPORTED, packed,
                             "3 bits with K = %lld: the dense layout and that of ten codes a word "
                             "both have %lld columns, so they cannot be told apart",
                             (long long)matrix->k, (long long)dense);
        if (words == dense || words == padded_words(matrix->k))
            return 0;
        return PART_FAIL(err, FQ_FORMAT, packed,
                         "has %lld columns, 3 bits with K = %lld need %lld (dense) or %lld (ten a "
                         "word)",
                         (long long)words, (long long)matrix->k, (long long)dense,
                         (long long)padded_words(matrix->k));
    }
    if (words != dense)
        return PART_FAIL(err, FQ_FORMAT, packed,
                         "has %lld columns, %d bits with K = %lld need %lld", (long long)words,
                         matrix->bits, (long long)matrix->k, (long long)dense);
    return 0;
}

static int describe_scale(const struct fq_ct_parts *parts, struct fq_matrix *matrix,
                          struct fq_error *err) {
    const struct fq_checkpoint_tensor *scale = parts->scale;
    int64_t groups = fq_matrix_groups(matrix);

    if (!scale)
        return PART_FAIL(err, FQ_FORMAT, parts->packed, "has no weight_scale beside it");
    if (strcmp(scale->dtype, "F16") == 0)
        matrix->scale_type = FQ_F16;
    else if (strcmp(scale->dtype, "BF16") == 0)
        matrix->scale_type = FQ_BF16;
    else
        return PART_FAIL(err, FQ_UNSUPPORTED, scale, "is %s, only F16 and BF16 scales are served",
                         scale->dtype);
    if (scale->rank == 1 && scale->shape[0] == matrix->n && groups == 1)
        return 0;
    if (scale->rank != 2 || scale->shape[0] != matrix->n || scale->shape[1] != groups)
        return PART_FAIL(err, FQ_FORMAT, scale,
                         "is not [%lld, %lld], which K = %lld in groups of "
                         "%lld needs",
                         (long long)matrix->n, (long long)groups, (long long)matrix->k,
                         (long long)matrix->group);
    return 0;
}

/* Whether the zero points, packed along N, have ten codes a word, as older 3-bit ones do. */
static bool zeros_are_padded(const struct fq_ct_parts *parts, const struct fq_matrix *matrix) {
    if (matrix->bits != 3)
        return false;
    if (dense_words(matrix->n, 3) != padded_words(matrix->n))
        return parts->zero->shape[0] != dense_words(matrix->n, 3);
    return is_padded(parts->packed, matrix->k, 3); /* the same writer wrote both */
}

static int describe_zero(const struct fq_ct_parts *parts, const struct fq_matrix *matrix,
                         bool symmetric, struct fq_error *err) {
    const struct fq_checkpoint_tensor *zero = parts->zero;
    int64_t dense = dense_words(matrix->n, matrix->bits);
    int64_t other = matrix->bits == 3 ? padded_words(matrix->n) : dense;

    if (symmetric)
        return zero ? PART_FAIL(err, FQ_FORMAT, zero, "is there, but config.json says symmetric")
                    : 0;
    if (!zero)
        return PART_FAIL(err, FQ_FORMAT, parts->packed,
                         "has no weight_zero_point beside it, and config.json says asymmetric");
    if (strcmp(zero->dtype, "I32") != 0 || zero->rank != 2 ||
        (zero->shape[0] != dense && zero->shape[0] != other) ||
        zero->shape[1] != fq_matrix_groups(matrix))
        return PART_FAIL(err, FQ_FORMAT, zero, "is not I32 of [%lld, %lld]", (long long)dense,
                         (long long)fq_matrix_groups(matrix));
    return 0;
}

int fq_ct_describe(const struct fq_ct_parts *parts, const struct fq_ct_scheme *scheme,
                   struct fq_checkpoint_matrix *out, struct fq_error *err) {
    struct fq_matrix *matrix = &out->matrix;
    int rc;

    if (parts->g_idx)
        return PART_FAIL(err, FQ_UNSUPPORTED, parts->g_idx,
                         "activation order (weight_g_idx) is not served");
    if ((rc = describe_shape(parts, matrix, err)) < 0)
        return rc;
    matrix->bits = scheme->bits;
    matrix->group = scheme->group == 0 || scheme->group > matrix->k ? matrix->k : scheme->group;
    if ((rc = check_columns(parts->packed, matrix, err)) < 0 ||
        (rc = describe_scale(parts, matrix, err)) < 0 ||
        (rc = describe_zero(parts, matrix, scheme->symmetric, err)) < 0)
        return rc;
    out->symmetric = scheme->symmetric;
    out->dense = false;
    out->stored = parts->packed->bytes + parts->scale->bytes + parts->shape->bytes +
                  (parts->zero ? parts->zero->bytes : 0);
    return 0;
}

static uint32_t load_word(const void *words, int64_t i) {
    const uint8_t *bytes = (const uint8_t *)words + i * 4;

    return bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

/* Code i of a packed column (or row) whose words lie `stride` words apart, from word `first` on. */
static uint8_t load_code(const void *words, int64_t first, int64_t stride, int64_t i, int bits,
                         bool padded) {
    int64_t word = padded ? i / CODES_A_PADDED_WORD : i * bits / 32;
    int shift = padded ? (int)(i % CODES_A_PADDED_WORD) * bits : (int)(i * bits % 32);
    uint32_t code = load_word(words, first + word * stride) >> shift;

    if (shift + bits > 32)
        code |= load_word(words, first + (word + 1) * stride) << (32 - shift);
    return (uint8_t)(code & ((1u << bits) - 1));
}

static void repack_rows(const struct fq_ct_parts *parts, const struct fq_matrix *matrix,
                        uint8_t *codes, uint8_t *row) {
    int64_t columns = parts->packed->shape[1];

    for (int64_t n = 0; n < matrix->n; n++) {
        for (int64_t k = 0; k < matrix->k; k++)
            row[k] = load_code(parts->packed->data, n * columns, 1, k, matrix->bits, true);
        fq_matrix_pack_row(codes + n * fq_matrix_row_bytes(matrix), row, matrix->k, matrix->bits);
    }
}

static void unpack_zeros(const struct fq_ct_parts *parts, const struct fq_matrix *matrix,
                         uint8_t *zeros) {
    int64_t groups = fq_matrix_groups(matrix);
    bool padded = zeros_are_padded(parts, matrix);

    for (int64_t n = 0; n < matrix->n; n++)
        for (int64_t g = 0; g < groups; g++)
            zeros[n * groups + g] =
                load_code(parts->zero->data, g, groups, n, matrix->bits, padded);
}

/* A scale that is no number would poison every result of its row. */
static int check_scales(const struct fq_ct_parts *parts, const struct fq_matrix *matrix,
                        struct fq_error *err) {
    int64_t groups = fq_matrix_groups(matrix);
    uint16_t exponent = matrix->scale_type == FQ_F16 ? 0x7c00 : 0x7f80;

    for (int64_t i = 0; i < matrix->n * groups; i++) {
        uint16_t bits;

        memcpy(&bits, (const char *)parts->scale->data + i * 2, 2);
        if ((bits & exponent) == exponent)
            return PART_FAIL(err, FQ_FORMAT, parts->scale, "row %lld, group %lld is not finite",
                             (long long)(i / groups), (long long)(i % groups));
    }
    return 0;
}

int fq_ct_load(const struct fq_ct_parts *parts, const struct fq_checkpoint_matrix *described,
               struct fq_loaded_matrix *out, struct fq_error *err) {
    struct fq_matrix matrix = described->matrix;
    bool padded = is_padded(parts->packed, matrix.k, matrix.bits);
    size_t code_bytes = padded ? (size_t)matrix.n * (size_t)fq_matrix_row_bytes(&matrix) : 0;
    size_t zero_bytes = parts->zero ? (size_t)matrix.n * (size_t)fq_matrix_groups(&matrix) : 0;
    size_t scratch = padded ? (size_t)matrix.k : 0;
    uint8_t *owned = NULL;
    int rc = check_scales(parts, &matrix, err);

    if (rc < 0)
        return rc;
    if (code_bytes + zero_bytes > 0) {
        owned = malloc(code_bytes + zero_bytes + scratch);
        if (!owned)
            return PART_FAIL(err, FQ_NO_MEMORY, parts->packed, "no memory for %zu bytes",
                             code_bytes + zero_bytes);
    }
    matrix.codes = parts->packed->data;
    matrix.scales = parts->scale->data;
    if (padded) {
        repack_rows(parts, &matrix, owned, owned + code_bytes + zero_bytes);
        matrix.codes = owned;
    }
    if (parts->zero) {
        unpack_zeros(parts, &matrix, owned + code_bytes);
        matrix.zeros = owned + code_bytes;
    }
    *out = (struct fq_loaded_matrix){.matrix = matrix, .owned = owned};
    return 0;
}
