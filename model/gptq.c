/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The GPTQ layout: qweight I32 [ceil(K·bits/32), N], a dense stream of codes
 * down each column, lowest bits first; qzeros I32 [groups, ceil(N·bits/32)],
 * the same along N; scales [groups, N]; g_idx I32 [K], each column's group.
 * Checkpoint format "gptq" keeps each zero point less one, modulo 2^bits;
 * "gptq_v2" keeps it as it is.  W[n][k] = (code − zero) · scale.
 *
 * A column of words is our row of words, so that codes are only transposed.
 */
#include "disk-layout.h"

#include "pattern.h"

#include <stdlib.h>
#include <string.h>

/* The parts, in the order of the suffixes at the end of this file. */
enum {
    WEIGHT,
    ZEROS,
    SCALES,
    ORDER
};

typedef const struct fq_checkpoint_tensor *const *parts_t;

struct scheme {
    int bits;
    int64_t group; /* 0: one a row */
    bool ordered;  /* desc_act: g_idx says which group a column is in, and must be there */
};

/* One entry of "dynamic": the first that matches a module decides. */
struct rule {
    struct fq_pattern *pattern;
    bool excludes; /* "-:": the module is not quantized */
    struct scheme scheme;
};

struct config {
    struct scheme base;
    unsigned zero_offset; /* what is to be added to a stored zero point */
    struct rule *rules;
    size_t rule_count;
};

/* ---- configuration ------------------------------------------------------------------------ */

/* Reads bits, group_size and desc_act where they are there. */
static int read_scheme(const json_t *json, struct scheme *scheme, struct fq_error *err) {
    const json_t *bits = json_object_get(json, "bits");
    const json_t *group = json_object_get(json, "group_size");
    json_int_t value = json_integer_value(bits);

    if (bits && (!json_is_integer(bits) || (value != 8 && value != 4 && value != 3)))
        return fq_fail(err, FQ_UNSUPPORTED, "bits is %lld, served are 8, 4 and 3",
                       (long long)value);
    if (bits)
        scheme->bits = (int)value;
    value = json_integer_value(group);
    if (group && (!json_is_integer(group) ||
                  (value != -1 && (value < FQ_GROUP_MIN || value % FQ_GROUP_MIN != 0 ||
                                   value > FQ_MATRIX_DIM_MAX))))
        return fq_fail(err, FQ_UNSUPPORTED,
                       "group_size is %lld, served are multiples of %d, and -1 for one a row",
                       (long long)value, FQ_GROUP_MIN);
    if (group)
        scheme->group = value == -1 ? 0 : value;
    if (json_object_get(json, "desc_act"))
        scheme->ordered = json_is_true(json_object_get(json, "desc_act"));
    return 0;
}

static int read_dynamic(struct config *config, const json_t *dynamic, struct fq_error *err) {
    const char *text;
    json_t *overrides;
    int rc;

    if (!dynamic || json_is_null(dynamic) || json_is_false(dynamic))
        return 0;
    if (!json_is_object(dynamic))
        return fq_fail(err, FQ_FORMAT, "dynamic is not an object");
    config->rules = calloc(json_object_size(dynamic) + 1, sizeof *config->rules);
    if (!config->rules)
        return fq_fail(err, FQ_NO_MEMORY, "dynamic: no memory to read it");
    json_object_foreach((json_t *)dynamic, text, overrides) {
        struct rule *rule = &config->rules[config->rule_count];

        if (!json_is_object(overrides))
            return fq_fail(err, FQ_FORMAT, "dynamic: '%.100s' is not an object", text);
        rule->excludes = strncmp(text, "-:", 2) == 0;
        rule->scheme = config->base;
        if ((rc = read_scheme(overrides, &rule->scheme, err)) == 0)
            rc = fq_pattern_new(text + (rule->excludes || strncmp(text, "+:", 2) == 0 ? 2 : 0),
                                &rule->pattern, err);
        if (rc < 0)
            return fq_fail_in(err, "dynamic: '%.100s'", text);
        config->rule_count++;
    }
    return 0;
}

static int read_format(struct config *config, const json_t *json, struct fq_error *err) {
    const json_t *format = json_object_get(json, "checkpoint_format");
    const json_t *words = json_object_get(json, "pack_dtype");
    const char *name;

    if (!format)
        format = json_object_get(json, "format");
    name = format ? json_string_value(format) : "gptq";
    if (!name || (strcmp(name, "gptq") != 0 && strcmp(name, "gptq_v2") != 0))
        return fq_fail(err, FQ_UNSUPPORTED,
                       "checkpoint_format '%.40s', served are gptq and gptq_v2", name ? name : "");
    config->zero_offset = strcmp(name, "gptq") == 0;
    if (words && (!json_is_string(words) || strcmp(json_string_value(words), "int32") != 0))
        return fq_fail(err, FQ_UNSUPPORTED, "pack_dtype '%.40s', served is int32",
                       json_is_string(words) ? json_string_value(words) : "");
    if (json_is_true(json_object_get(json, "is_marlin_format")))
        return fq_fail(err, FQ_UNSUPPORTED, "is_marlin_format: served are gptq and gptq_v2");
    return 0;
}

static void config_free(void *opaque) {
    struct config *config = opaque;

    if (!config)
        return;
    for (size_t i = 0; i < config->rule_count; i++)
        fq_pattern_free(config->rules[i].pattern);
    free(config->rules);
    free(config);
}

static int config_new(const json_t *json, void **out, struct fq_error *err) {
    struct config *config = calloc(1, sizeof *config);
    int rc = config ? 0 : fq_fail(err, FQ_NO_MEMORY, "no memory to read it");

    if (rc == 0 && !json_object_get(json, "bits"))
        rc = fq_fail(err, FQ_FORMAT, "bits is missing");
    if (rc == 0 && !json_object_get(json, "group_size"))
        rc = fq_fail(err, FQ_FORMAT, "group_size is missing");
    if (rc == 0)
        rc = read_scheme(json, &config->base, err);
    if (rc == 0)
        rc = read_format(config, json, err);
    if (rc == 0)
        rc = read_dynamic(config, json_object_get(json, "dynamic"), err);
    if (rc < 0) {
        config_free(config);
        return fq_fail_in(err, "quantization_config");
    }
    *out = config;
    return 0;
}

static int match(const struct config *config, const struct fq_checkpoint_tensor *weight,
                 const char *module, struct scheme *out, struct fq_error *err) {
    *out = config->base;
    for (size_t i = 0; i < config->rule_count; i++) {
        int found = fq_pattern_match(config->rules[i].pattern, module, err);

        if (found < 0)
            return fq_fail_in(err, "quantization_config: dynamic");
        if (found == 0)
            continue;
        if (config->rules[i].excludes)
            return FQ_TENSOR_FAIL(err, FQ_FORMAT, weight,
                                  "is there, but dynamic excludes the module");
        *out = config->rules[i].scheme;
        break;
    }
    return 0;
}

/* ---- describing --------------------------------------------------------------------------- */

static unsigned zero_at(const struct config *config, const struct fq_checkpoint_tensor *zeros,
                        const struct fq_matrix *matrix, int64_t n, int64_t group) {
    unsigned stored = fq_layout_code(zeros->data, group * zeros->shape[1], 1, n, matrix->bits);

    return (stored + config->zero_offset) & ((1u << matrix->bits) - 1);
}

/* Whatever the configuration says of symmetry, the zero points decide. */
static bool is_symmetric(const struct config *config, const struct fq_checkpoint_tensor *zeros,
                         const struct fq_matrix *matrix) {
    for (int64_t g = 0; g < fq_matrix_groups(matrix); g++)
        for (int64_t n = 0; n < matrix->n; n++)
            if (zero_at(config, zeros, matrix, n, g) != 1u << (matrix->bits - 1))
                return false;
    return true;
}

/* K is g_idx's length, or what the words hold: the format wants a multiple of 32 with 3 bits. */
static int64_t columns_of(parts_t parts, int bits) {
    const struct fq_checkpoint_tensor *order = parts[ORDER];

    if (order && order->rank == 1)
        return order->shape[0];
    if (parts[WEIGHT]->shape[0] > FQ_MATRIX_DIM_MAX)
        return 0;
    return bits == 3 ? parts[WEIGHT]->shape[0] / 3 * 32 : parts[WEIGHT]->shape[0] * (32 / bits);
}

static int describe(const void *opaque, const char *module, parts_t parts,
                    struct fq_checkpoint_matrix *out, struct fq_error *err) {
    const struct config *config = opaque;
    const struct fq_checkpoint_tensor *weight = parts[WEIGHT], *zeros = parts[ZEROS];
    struct fq_matrix *matrix = &out->matrix;
    struct scheme scheme;
    int64_t groups;
    int rc;

    if ((rc = match(config, weight, module, &scheme, err)) < 0 ||
        (rc = fq_layout_check_words(weight, "", weight, err)) < 0 ||
        (rc = fq_layout_check_words(zeros, ".qzeros", weight, err)) < 0 ||
        (rc = fq_layout_check_scales(parts[SCALES], ".scales", weight, &matrix->scale_type, err)) <
            0)
        return rc;
    matrix->n = weight->shape[1];
    matrix->k = columns_of(parts, scheme.bits);
    matrix->bits = scheme.bits;
    matrix->group = scheme.group == 0 || scheme.group > matrix->k ? matrix->k : scheme.group;
    if ((rc = fq_layout_check_matrix(weight, matrix, err)) < 0)
        return rc;
    groups = fq_matrix_groups(matrix);
    if (scheme.ordered && groups > 1 && !parts[ORDER])
        return FQ_TENSOR_FAIL(err, FQ_UNSUPPORTED, weight,
                              "activation order (desc_act) without a g_idx that tells it");
    if ((rc = fq_layout_check_shape(weight, fq_layout_words(matrix->k, matrix->bits), matrix->n,
                                    matrix, err)) < 0 ||
        (rc = fq_layout_check_shape(zeros, groups, fq_layout_words(matrix->n, matrix->bits), matrix,
                                    err)) < 0 ||
        (rc = fq_layout_check_shape(parts[SCALES], groups, matrix->n, matrix, err)) < 0 ||
        (rc = fq_layout_check_order(parts[ORDER], matrix, err)) < 0)
        return rc;
    out->symmetric = is_symmetric(config, zeros, matrix);
    return 0;
}

/* ---- loading ------------------------------------------------------------------------------ */

static int load(const void *opaque, parts_t parts, const struct fq_checkpoint_matrix *described,
                struct fq_loaded_matrix *out, struct fq_error *err) {
    const struct fq_matrix *matrix = &described->matrix;
    int64_t groups = fq_matrix_groups(matrix);
    struct fq_layout_storage storage;
    int rc = fq_layout_check_finite(parts[SCALES], matrix->scale_type, err);

    if (rc < 0 || (rc = fq_layout_allocate(parts[WEIGHT], described, out, &storage, err)) < 0)
        return rc;
    fq_layout_transpose_words(parts[WEIGHT]->data, parts[WEIGHT]->shape[0], matrix->n,
                              storage.codes);
    fq_layout_transpose_scales(parts[SCALES]->data, groups, matrix->n, storage.scales);
    for (int64_t n = 0; storage.zeros && n < matrix->n; n++)
        for (int64_t g = 0; g < groups; g++)
            storage.zeros[n * groups + g] = (uint8_t)zero_at(opaque, parts[ZEROS], matrix, n, g);
    return 0;
}

const struct fq_layout_ops fq_layout_gptq = {
    .name = "gptq",
    .suffixes = {".qweight", ".qzeros", ".scales", ".g_idx"},
    .config_new = config_new,
    .config_free = config_free,
    .describe = describe,
    .load = load,
};
