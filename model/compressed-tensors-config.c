/* SPDX-License-Identifier: Apache-2.0 */
/*
 * config.json's quantization_config in compressed-tensors' terms: groups of
 * targets with one scheme each, and what is ignored.  Targets are module names,
 * Python regular expressions after "re:" (matched at the beginning of the name),
 * or the class "Linear".
 */
#include "compressed-tensors.h"

#include "pattern.h"

#include <stdlib.h>
#include <string.h>

enum target_kind {
    TARGET_NAME,
    TARGET_PATTERN,
    TARGET_CLASS
}; /* in the order of precedence */

struct target {
    enum target_kind kind;
    size_t order; /* in the list as it was given */
    char *text;
    struct fq_pattern *pattern; /* of TARGET_PATTERN */
    struct fq_ct_scheme scheme;
};

/* Names, of which a mixture of experts may have tens of thousands, can be looked up. */
struct list {
    struct target *items; /* by kind; names by text; by order */
    size_t count, names;
};

struct config {
    struct list targets, ignore;
};

static const char *text_of(const json_t *object, const char *key) {
    return json_string_value(json_object_get(object, key));
}

static bool is_set(const json_t *value) {
    return value && !json_is_null(value);
}

/* Appends the strings of an array; absent is empty. */
static int add_targets(struct list *list, const json_t *names, const char *what,
                       const struct fq_ct_scheme *scheme, struct fq_error *err) {
    size_t i;
    json_t *name;
    struct target *items;

    if (!is_set(names))
        return 0;
    if (!json_is_array(names))
        return fq_fail(err, FQ_FORMAT, "quantization_config: %s is not an array", what);
    items = realloc(list->items, (list->count + json_array_size(names) + 1) * sizeof *items);
    if (!items)
        return fq_fail(err, FQ_NO_MEMORY, "quantization_config: no memory for %s", what);
    list->items = items;
    json_array_foreach(names, i, name) {
        struct target *target = &list->items[list->count];
        int rc;

        if (!json_is_string(name))
            return fq_fail(err, FQ_FORMAT, "quantization_config: %s holds what is not a string",
                           what);
        *target = (struct target){.kind = TARGET_NAME,
                                  .order = list->count,
                                  .text = strdup(json_string_value(name)),
                                  .scheme = *scheme};
        if (!target->text)
            return fq_fail(err, FQ_NO_MEMORY, "quantization_config: no memory for %s", what);
        list->count++;
        if (strcmp(target->text, "Linear") == 0)
            target->kind = TARGET_CLASS;
        if (strncmp(target->text, "re:", 3) != 0)
            continue;
        target->kind = TARGET_PATTERN;
        if ((rc = fq_pattern_new(target->text + 3, &target->pattern, err)) < 0)
            return fq_fail_in(err, "quantization_config: %s", what);
    }
    return 0;
}

/* The group size: 0 for per channel.  compressed-tensors infers a missing strategy from it. */
static int read_group(const json_t *weights, int64_t *group, struct fq_error *err) {
    const json_t *size = json_object_get(weights, "group_size");
    const char *strategy = text_of(weights, "strategy");
    json_int_t value = json_integer_value(size);

    if (!strategy)
        strategy = !is_set(size) ? "tensor" : value == -1 ? "channel" : "group";
    *group = 0;
    if (strcmp(strategy, "channel") == 0)
        return 0;
    if (strcmp(strategy, "group") != 0)
        return fq_fail(err, FQ_UNSUPPORTED, "strategy '%.40s', served are group and channel",
                       strategy);
    if (!json_is_integer(size) || value < FQ_GROUP_MIN || value % 16 != 0 ||
        value > FQ_MATRIX_DIM_MAX)
        return fq_fail(err, FQ_UNSUPPORTED, "group_size %lld, served are multiples of 16",
                       (long long)value);
    *group = value;
    return 0;
}

static int read_scheme(const json_t *group, struct fq_ct_scheme *scheme, struct fq_error *err) {
    const json_t *weights = json_object_get(group, "weights");
    const json_t *bits = json_object_get(weights, "num_bits");
    const json_t *symmetric = json_object_get(weights, "symmetric");
    const char *type = text_of(weights, "type"), *format = text_of(group, "format");
    json_int_t value = json_integer_value(bits);

    if (!json_is_object(weights))
        return fq_fail(err, FQ_FORMAT, "weights is missing or not an object");
    if (format && strcmp(format, "pack-quantized") != 0)
        return fq_fail(err, FQ_UNSUPPORTED, "format '%.40s', served is pack-quantized", format);
    if (is_set(json_object_get(group, "input_activations")) ||
        is_set(json_object_get(group, "output_activations")))
        return fq_fail(err, FQ_UNSUPPORTED, "quantized activations are not served");
    if (type && strcmp(type, "int") != 0)
        return fq_fail(err, FQ_UNSUPPORTED, "type '%.40s', served is int", type);
    if (!json_is_integer(bits) || (value != 8 && value != 4 && value != 3))
        return fq_fail(err, FQ_UNSUPPORTED, "num_bits %lld, served are 8, 4 and 3",
                       (long long)value);
    scheme->bits = (int)value;
    if (symmetric && !json_is_boolean(symmetric))
        return fq_fail(err, FQ_FORMAT, "symmetric is not true or false");
    scheme->symmetric = !symmetric || json_is_true(symmetric);
    return read_group(weights, &scheme->group, err);
}

static int read_config(struct config *config, const json_t *json, struct fq_error *err) {
    const char *format = text_of(json, "format");
    json_t *groups = json_object_get(json, "config_groups"), *group;
    const char *name;
    struct fq_ct_scheme none = {0};
    int rc;

    /* "mixed-precision": each group names its own format, which read_scheme looks at */
    if (!format ||
        (strcmp(format, "pack-quantized") != 0 && strcmp(format, "mixed-precision") != 0))
        return fq_fail(err, FQ_UNSUPPORTED,
                       "quantization_config: format '%.40s', served is pack-quantized",
                       format ? format : "");
    if (!json_is_object(groups))
        return fq_fail(err, FQ_FORMAT, "quantization_config: config_groups is not an object");
    json_object_foreach(groups, name, group) {
        struct fq_ct_scheme scheme = {0};

        if ((rc = read_scheme(group, &scheme, err)) < 0)
            return fq_fail_in(err, "quantization_config: %.80s", name);
        if ((rc = add_targets(&config->targets, json_object_get(group, "targets"), "targets",
                              &scheme, err)) < 0)
            return rc;
    }
    return add_targets(&config->ignore, json_object_get(json, "ignore"), "ignore", &none, err);
}

static int by_precedence(const void *left, const void *right) {
    const struct target *a = left, *b = right;
    int order = a->kind == TARGET_NAME && b->kind == TARGET_NAME ? strcmp(a->text, b->text) : 0;

    if (a->kind != b->kind)
        return a->kind < b->kind ? -1 : 1;
    return order ? order : a->order < b->order ? -1 : 1;
}

static void sort(struct list *list) {
    if (list->count > 0)
        qsort(list->items, list->count, sizeof *list->items, by_precedence);
    while (list->names < list->count && list->items[list->names].kind == TARGET_NAME)
        list->names++;
}

int fq_ct_config_new(const json_t *json, void **out, struct fq_error *err) {
    struct config *config = calloc(1, sizeof *config);
    int rc;

    if (!config)
        return fq_fail(err, FQ_NO_MEMORY, "quantization_config: no memory to read it");
    rc = read_config(config, json, err);
    if (rc < 0) {
        fq_ct_config_free(config);
        return rc;
    }
    sort(&config->targets);
    sort(&config->ignore);
    *out = config;
    return 0;
}

static void list_fini(struct list *list) {
    for (size_t i = 0; i < list->count; i++) {
        fq_pattern_free(list->items[i].pattern);
        free(list->items[i].text);
    }
    free(list->items);
}

void fq_ct_config_free(void *opaque) {
    struct config *config = opaque;

    if (!config)
        return;
    list_fini(&config->targets);
    list_fini(&config->ignore);
    free(config);
}

/* The first of those with that name, or NULL. */
static const struct target *find_name(const struct list *list, const char *module) {
    size_t low = 0, high = list->names;

    while (low < high) {
        size_t middle = low + (high - low) / 2;

        if (strcmp(list->items[middle].text, module) < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low < list->names && strcmp(list->items[low].text, module) == 0 ? &list->items[low]
                                                                           : NULL;
}

/* The best match in a list: its target in *out, or NULL.  0 or a negative status. */
static int find(const struct list *list, const char *module, const struct target **out,
                struct fq_error *err) {
    *out = find_name(list, module);
    for (size_t i = list->names; i < list->count && !*out; i++) {
        const struct target *target = &list->items[i];
        int found =
            target->kind == TARGET_CLASS ? 1 : fq_pattern_match(target->pattern, module, err);

        if (found < 0)
            return found;
        if (found)
            *out = target;
    }
    return 0;
}

int fq_ct_config_match(const void *opaque, const char *module, struct fq_ct_scheme *out,
                       struct fq_error *err) {
    const struct config *config = opaque;
    const struct target *target;
    int rc = find(&config->ignore, module, &target, err);

    if (rc < 0)
        return rc;
    if (target)
        return fq_fail(err, FQ_FORMAT,
                       "'%.200s' has packed weights, but quantization_config ignores it ('%.100s')",
                       module, target->text);
    if ((rc = find(&config->targets, module, &target, err)) < 0)
        return rc;
    if (!target)
        return fq_fail(err, FQ_FORMAT,
                       "'%.200s' has packed weights, but no target of quantization_config matches",
                       module);
    *out = target->scheme;
    return 0;
}
