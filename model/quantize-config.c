/* SPDX-License-Identifier: Apache-2.0 */
/*
 * config.json of the output: a config_groups entry for each distinct scheme, and
 * the list of what stays dense.  One scheme alone is said of the class "Linear".
 * Several are said by name only: vLLM looks at the class before it looks at the
 * parts of a fused layer, so that a class beside names would hide theirs.
 */
#include "quantize-plan.h"

#include <stdio.h>
#include <string.h>

struct scheme {
    int bits;
    int64_t group; /* 0: per channel */
    bool asymmetric;
};

/* Per channel where the group does not fit: then the readers need not divide K by it. */
static struct scheme scheme_of(const struct fq_plan_matrix *matrix) {
    return (struct scheme){.bits = matrix->bits,
                           .group = matrix->group < matrix->dense.k ? matrix->group : 0,
                           .asymmetric = matrix->asymmetric};
}

static json_t *config_group(const struct scheme *scheme, json_t *targets) {
    return json_pack("{s:o, s:{s:i, s:s, s:b, s:s, s:o, s:b, s:n}, s:n, s:n, s:s}", "targets",
                     targets, "weights", "num_bits", scheme->bits, "type", "int", "symmetric",
                     !scheme->asymmetric, "strategy", scheme->group ? "group" : "channel",
                     "group_size", scheme->group ? json_integer(scheme->group) : json_null(),
                     "dynamic", 0, "actorder", "input_activations", "output_activations", "format",
                     "pack-quantized");
}

static json_t *config_groups(const struct fq_plan *plan) {
    json_t *groups = json_object(), *targets = NULL;
    size_t distinct = 0;

    for (size_t m = 0; m < plan->count; m++) {
        struct scheme scheme = scheme_of(&plan->matrices[m]);
        char name[32] = "group_0";
        size_t earlier = 0;

        if (plan->matrices[m].kept_dense)
            continue;
        for (size_t g = 0; g < distinct; g++) { /* the entry that has this scheme, by its names */
            json_int_t group = 0;
            json_t *entry, *weights;
            int bits, symmetric;

            snprintf(name, sizeof name, "group_%zu", g);
            entry = json_object_get(groups, name);
            weights = json_object_get(entry, "weights");
            bits = (int)json_integer_value(json_object_get(weights, "num_bits"));
            group = json_integer_value(json_object_get(weights, "group_size"));
            symmetric = json_is_true(json_object_get(weights, "symmetric"));
            if (bits == scheme.bits && group == scheme.group && symmetric == !scheme.asymmetric)
                break;
            earlier++;
        }
        if (earlier == distinct) {
            snprintf(name, sizeof name, "group_%zu", distinct++);
            json_object_set_new(groups, name, config_group(&scheme, json_array()));
        }
        targets = json_object_get(json_object_get(groups, name), "targets");
        json_array_append_new(targets, json_string(plan->matrices[m].name));
    }
    if (distinct == 1)
        json_object_set_new(json_object_get(groups, "group_0"), "targets",
                            json_pack("[s]", "Linear"));
    return groups;
}

/*
 * Every module with a two- or three-dimensional weight that stays dense, and lm_head, which a
 * tied embedding hides from the file.
 */
static json_t *ignore_list(const struct fq_plan *plan) {
    json_t *ignore = json_array();
    bool has_head = false;

    for (size_t m = 0; m < plan->count; m++)
        has_head = has_head || strcmp(plan->matrices[m].name, "lm_head") == 0;
    if (!has_head)
        json_array_append_new(ignore, json_string("lm_head"));
    for (size_t t = 0; t < fq_checkpoint_tensor_count(plan->checkpoint); t++) {
        const struct fq_checkpoint_tensor *tensor = fq_checkpoint_tensor(plan->checkpoint, t);
        size_t length = strlen(tensor->name), cut = strlen(".weight"), first, count;
        bool weight = length > cut && strcmp(tensor->name + length - cut, ".weight") == 0;

        count = fq_plan_of_tensor(plan, tensor, &first);
        if ((tensor->rank != 2 && tensor->rank != 3) || (tensor->rank == 2 && !weight) ||
            strcmp(tensor->name, "lm_head.weight") == 0)
            continue;
        for (size_t m = first; m < first + count; m++)
            if (plan->matrices[m].kept_dense)
                json_array_append_new(ignore, json_string(plan->matrices[m].name));
        if (count == 0)
            json_array_append_new(ignore,
                                  json_stringn(tensor->name, weight ? length - cut : length));
    }
    return ignore;
}

json_t *fq_plan_config(const struct fq_plan *plan) {
    json_t *config = json_copy(plan->config), *quantization;

    quantization = json_pack(
        "{s:s, s:s, s:s, s:o, s:o, s:n, s:n}", "quant_method", "compressed-tensors", "format",
        "pack-quantized", "quantization_status", "compressed", "config_groups", config_groups(plan),
        "ignore", ignore_list(plan), "kv_cache_scheme", "global_compression_ratio");
    if (!config || !quantization ||
        json_object_set_new(config, "quantization_config", quantization) < 0) {
        json_decref(config);
        return NULL;
    }
    return config;
}
