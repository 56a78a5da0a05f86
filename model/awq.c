/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The AWQ layout, version "gemm": four bits; qweight I32 [K, N/8] and qzeros
 * I32 [groups, N/8], whose nibble i of word c belongs to column 8·c + order[i];
 * scales [groups, N].  W[n][k] = (code − zero) · scale.
 */
#include "disk-layout.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

#define BITS         4
#define CODES_A_WORD 8

/* The parts, in the order of the suffixes at the end of this file. */
enum {
    WEIGHT,
    ZEROS,
    SCALES
};

typedef const struct fq_checkpoint_tensor *const *parts_t;

static const int column_of_nibble[CODES_A_WORD] = {0, 2, 4, 6, 1, 3, 5, 7};

struct config {
    int64_t group; /* 0: one a row */
};

/* ---- configuration ------------------------------------------------------------------------ */

/* AutoAWQ's own files use other names than config.json does. */
static const json_t *get(const json_t *json, const char *name, const char *other) {
    const json_t *value = json_object_get(json, name);

    return value ? value : json_object_get(json, other);
}

static int read_config(struct config *config, const json_t *json, struct fq_error *err) {
    const json_t *bits = get(json, "bits", "w_bit");
    const json_t *group = get(json, "group_size", "q_group_size");
    const json_t *zero = json_object_get(json, "zero_point");
    const json_t *version = json_object_get(json, "version");
    const char *name = version ? json_string_value(version) : "gemm";
    json_int_t value = json_integer_value(group);

    if (!name || strcasecmp(name, "gemm") != 0)
        return fq_fail(err, FQ_UNSUPPORTED, "version '%.40s', served is gemm", name ? name : "");
    if (!json_is_integer(bits) || json_integer_value(bits) != BITS)
        return fq_fail(err, FQ_UNSUPPORTED, "bits is %lld, served is %d",
                       (long long)json_integer_value(bits), BITS);
    if (zero && !json_is_true(zero))
        return fq_fail(err, FQ_UNSUPPORTED, "zero_point is not true, which is all that is served");
    if (!json_is_integer(group) || (value != -1 && (value < FQ_GROUP_MIN || value % FQ_GROUP_MIN ||
                                                    value > FQ_MATRIX_DIM_MAX)))
        return fq_fail(err, FQ_UNSUPPORTED,
                       "group_size is %lld, served are multiples of %d, and -1 for one a row",
                       (long long)value, FQ_GROUP_MIN);
    config->group = value == -1 ? 0 : value;
    return 0;
}

static int config_new(const json_t *json, void **out, struct fq_error *err) {
    struct config *config = calloc(1, sizeof *config);
    int rc = config ? read_config(config, json, err)
                    : fq_fail(err, FQ_NO_MEMORY, "no memory to read it");

    if (rc < 0) {
        free(config);
        return fq_fail_in(err, "quantization_config");
    }
    *out = config;
    return 0;
}

/* ---- describing --------------------------------------------------------------------------- */

static uint32_t load_word(const struct fq_checkpoint_tensor *tensor, int64_t row, int64_t column) {
    const uint8_t *bytes = (const uint8_t *)tensor->data + (row * tensor->shape[1] + column) * 4;

    return bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

static bool is_symmetric(const struct fq_checkpoint_tensor *zeros) {
    for (int64_t g = 0; g < zeros->shape[0]; g++)
        for (int64_t c = 0; c < zeros->shape[1]; c++)
            if (load_word(zeros, g, c) != 0x88888888u)
                return false;
    return true;
}

static int describe(const void *opaque, const char *module, parts_t parts,
                    struct fq_checkpoint_matrix *out, struct fq_error *err) {
    const struct config *config = opaque;
    const struct fq_checkpoint_tensor *weight = parts[WEIGHT], *zeros = parts[ZEROS];
    struct fq_matrix *matrix = &out->matrix;
    int64_t groups;
    int rc;

    (void)module;
    if ((rc = fq_layout_check_words(weight, "", weight, err)) < 0 ||
        (rc = fq_layout_check_words(zeros, ".qzeros", weight, err)) < 0 ||
        (rc = fq_layout_check_scales(parts[SCALES], ".scales", weight, &matrix->scale_type, err)) <
            0)
        return rc;
    matrix->n = weight->shape[1] > FQ_MATRIX_DIM_MAX ? 0 : weight->shape[1] * CODES_A_WORD;
    matrix->k = weight->shape[0];
    matrix->bits = BITS;
    matrix->group = config->group == 0 || config->group > matrix->k ? matrix->k : config->group;
    if ((rc = fq_layout_check_matrix(weight, matrix, err)) < 0)
        return rc;
    groups = fq_matrix_groups(matrix);
    if ((rc = fq_layout_check_shape(zeros, groups, weight->shape[1], matrix, err)) < 0 ||
        (rc = fq_layout_check_shape(parts[SCALES], groups, matrix->n, matrix, err)) < 0)
        return rc;
    out->symmetric = is_symmetric(zeros);
    return 0;
}

/* ---- loading ------------------------------------------------------------------------------ */

/* Eight columns by eight rows of words: nibble i of the eight words makes one word of our row. */
static void load_codes(const struct fq_checkpoint_tensor *weight, const struct fq_matrix *matrix,
                       uint8_t *codes) {
    int64_t row_bytes = fq_matrix_row_bytes(matrix);

    for (int64_t c = 0; c < weight->shape[1]; c++)
        for (int64_t k = 0; k < matrix->k; k += CODES_A_WORD) {
            uint32_t words[CODES_A_WORD] = {0};

            for (int64_t j = 0; j < CODES_A_WORD && k + j < matrix->k; j++)
                words[j] = load_word(weight, k + j, c);
            for (int i = 0; i < CODES_A_WORD; i++) {
                uint8_t *to = codes + (c * CODES_A_WORD + column_of_nibble[i]) * row_bytes +
                              k / CODES_A_WORD * 4;

                for (int j = 0; j < CODES_A_WORD; j += 2)
                    to[j / 2] =
                        (uint8_t)((words[j] >> 4 * i & 15u) | (words[j + 1] >> 4 * i & 15u) << 4);
            }
        }
}

static void load_zeros(const struct fq_checkpoint_tensor *zeros, uint8_t *out) {
    int64_t groups = zeros->shape[0];

    for (int64_t g = 0; g < groups; g++)
        for (int64_t c = 0; c < zeros->shape[1]; c++)
            for (int i = 0; i < CODES_A_WORD; i++)
                out[(c * CODES_A_WORD + column_of_nibble[i]) * groups + g] =
                    (uint8_t)(load_word(zeros, g, c) >> 4 * i & 15u);
}

static int load(const void *config, parts_t parts, const struct fq_checkpoint_matrix *described,
                struct fq_loaded_matrix *out, struct fq_error *err) {
    const struct fq_matrix *matrix = &described->matrix;
    struct fq_layout_storage storage;
    int rc = fq_layout_check_finite(parts[SCALES], matrix->scale_type, err);

    (void)config;
    if (rc < 0 || (rc = fq_layout_allocate(parts[WEIGHT], described, out, &storage, err)) < 0)
        return rc;
    load_codes(parts[WEIGHT], matrix, storage.codes);
    fq_layout_transpose_scales(parts[SCALES]->data, fq_matrix_groups(matrix), matrix->n,
                               storage.scales);
    if (storage.zeros)
        load_zeros(parts[ZEROS], storage.zeros);
    return 0;
}

const struct fq_layout_ops fq_layout_awq = {
    .name = "awq",
    .suffixes = {".qweight", ".qzeros", ".scales"},
    .config_new = config_new,
    .config_free = free,
    .describe = describe,
    .load = load,
};
