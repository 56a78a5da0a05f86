/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Finding the matrices to quantize: the dense linear layers of the checkpoint
 * and the experts of three-dimensional tensors, less and more what the rules
 * say; and which of them have to share a scheme.
 */
#include "quantize-plan.h"

#include "compressed-tensors.h"

#include <ctype.h>
#include <fnmatch.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static int float_type(const struct fq_checkpoint_tensor *tensor) {
    return strcmp(tensor->dtype, "F32") == 0    ? FQ_F32
           : strcmp(tensor->dtype, "F16") == 0  ? FQ_F16
           : strcmp(tensor->dtype, "BF16") == 0 ? FQ_BF16
                                                : 0;
}

/* ---- rules -------------------------------------------------------------------------------- */

static bool matches(const struct fq_quantize_rule *rule, const char *name) {
    return fnmatch(rule->pattern, name, 0) == 0;
}

/* Whether to quantize the module, where BY_DEFAULT says what happens without a rule. */
static bool is_included(const struct fq_plan *plan, const char *name, bool by_default) {
    for (size_t i = plan->options->rule_count; i > 0; i--) {
        const struct fq_quantize_rule *rule = &plan->options->rules[i - 1];

        if (rule->kind != FQ_RULE_OVERRIDE && matches(rule, name))
            return rule->kind == FQ_RULE_INCLUDE;
    }
    return by_default;
}

static void apply_override(const struct fq_plan *plan, struct fq_plan_matrix *matrix) {
    for (size_t i = plan->options->rule_count; i > 0; i--) {
        const struct fq_quantize_rule *rule = &plan->options->rules[i - 1];

        if (rule->kind != FQ_RULE_OVERRIDE || !matches(rule, matrix->name))
            continue;
        matrix->overridden = true;
        matrix->bits = rule->bits;
        matrix->group = rule->group;
        return;
    }
}

/* ---- three-dimensional tensors ------------------------------------------------------------ */

/* Model types whose experts are [E, K, N]: transposed, so that groups along K are not rows. */
static bool experts_are_transposed(const struct fq_plan *plan) {
    static const char *const types[] = {"llama4",    "llama4_text",  "gpt_oss",          "aria",
                                        "aria_text", "qwen3_vl_moe", "qwen3_vl_moe_text"};
    const char *type =
        json_string_value(json_object_get(fq_checkpoint_config(plan->checkpoint), "model_type"));

    for (size_t i = 0; type && i < sizeof types / sizeof *types; i++)
        if (strcmp(type, types[i]) == 0)
            return true;
    return false;
}

/* "A.experts.down_proj" of expert 3 is "A.experts.3.down_proj", as checkpoints with a tensor an
 * expert have it.  NULL without memory. */
static char *expert_name(const char *module, const char *last, int64_t expert) {
    const char *dot = strrchr(module, '.');
    char *name = NULL;

    if (!dot)
        return asprintf(&name, "%lld.%s", (long long)expert, last ? last : module) < 0 ? NULL
                                                                                       : name;
    return asprintf(&name, "%.*s.%lld.%s", (int)(dot - module), module, (long long)expert,
                    last ? last : dot + 1) < 0
               ? NULL
               : name;
}

/* out->n rows of out->k weights from FIRST_ROW on; the tensor's rows come in ROWS at a time. */
static bool borrow(const struct fq_checkpoint *checkpoint, const char *name, int64_t rows,
                   int64_t first_row, struct fq_dense *out) {
    const struct fq_checkpoint_tensor *tensor = fq_checkpoint_find(checkpoint, name);
    int64_t there = 1;

    if (!tensor || !float_type(tensor) || (tensor->rank != 2 && tensor->rank != 3) ||
        tensor->shape[tensor->rank - 1] != out->k)
        return false;
    for (int i = 0; i + 1 < tensor->rank; i++)
        there *= tensor->shape[i];
    if (there % rows != 0 || first_row + out->n > there)
        return false;
    out->type = (enum fq_dtype)float_type(tensor);
    out->data = (const char *)tensor->data +
                (size_t)first_row * (size_t)out->k * fq_dtype_size((int)out->type);
    return true;
}

int fq_quantize_original(const struct fq_checkpoint *checkpoint, const char *name, int64_t n,
                         int64_t k, struct fq_dense *out) {
    const char *last = strrchr(name, '.'), *number = last;
    char text[1024];
    bool up, found;
    int64_t expert;

    *out = (struct fq_dense){.n = n, .k = k};
    snprintf(text, sizeof text, "%s.weight", name);
    if (borrow(checkpoint, text, n, 0, out))
        return 0;
    while (number > name && number[-1] != '.')
        number--;
    if (!last || number == last || number < name + 2 ||
        strspn(number, "0123456789") != (size_t)(last - number))
        return -FQ_NOT_FOUND;
    expert = strtoll(number, NULL, 10);
    snprintf(text, sizeof text, "%.*s%s", (int)(number - name), name, last + 1);
    found = borrow(checkpoint, text, n, expert * n, out);
    snprintf(text, sizeof text, "%.*s%s.weight", (int)(number - name), name, last + 1);
    found = found || borrow(checkpoint, text, n, expert * n, out);
    up = strcmp(last + 1, "up_proj") == 0;
    snprintf(text, sizeof text, "%.*sgate_up_proj", (int)(number - name), name);
    if (!found && (up || strcmp(last + 1, "gate_proj") == 0))
        found = borrow(checkpoint, text, 2 * n, (2 * expert + up) * n, out);
    return found ? 0 : -FQ_NOT_FOUND;
}

/* ---- collecting --------------------------------------------------------------------------- */

static int add(struct fq_plan *plan, char *name, const struct fq_checkpoint_tensor *source,
               int64_t n, int64_t k, int64_t first_row, struct fq_error *err) {
    struct fq_plan_matrix *matrix = &plan->matrices[plan->count];
    size_t item = fq_dtype_size(float_type(source));

    if (!name)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for the names of matrices");
    *matrix = (struct fq_plan_matrix){
        .name = name,
        .source = source,
        .dense = {.n = n,
                  .k = k,
                  .type = (enum fq_dtype)float_type(source),
                  .data = (const char *)source->data + (size_t)first_row * (size_t)k * item},
        .bytes = (uint64_t)n * (uint64_t)k * item,
        .bits = plan->options->bits ? plan->options->bits : 4,
        .group = plan->options->group == FQ_QUANTIZE_GROUP_AUTO ? 0 : plan->options->group,
        .expected = NAN,
    };
    plan->count++;
    apply_override(plan, matrix);
    return 0;
}

static int grow(struct fq_plan *plan, size_t more, struct fq_error *err) {
    struct fq_plan_matrix *matrices =
        realloc(plan->matrices, (plan->count + more) * sizeof *matrices);

    if (!matrices)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for %zu matrices", plan->count + more);
    plan->matrices = matrices;
    return 0;
}

/* Every expert a matrix; gate and up, fused as [E, 2·I, H], two. */
static int add_experts(struct fq_plan *plan, const char *module,
                       const struct fq_checkpoint_tensor *tensor, struct fq_error *err) {
    int64_t experts = tensor->shape[0], n = tensor->shape[1], k = tensor->shape[2];
    const char *last = strrchr(module, '.');
    bool two = strcmp(last ? last + 1 : module, "gate_up_proj") == 0 && n % 2 == 0;
    int rc = grow(plan, (size_t)experts * 2, err);

    for (int64_t e = 0; e < experts && rc == 0; e++) {
        if (!two) {
            rc = add(plan, expert_name(module, NULL, e), tensor, n, k, e * n, err);
            continue;
        }
        rc = add(plan, expert_name(module, "gate_proj", e), tensor, n / 2, k, e * n, err);
        if (rc == 0)
            rc = add(plan, expert_name(module, "up_proj", e), tensor, n / 2, k, e * n + n / 2, err);
    }
    return rc;
}

/* The module that a tensor is the weight of: a borrowed length of its name, 0 for none. */
static size_t module_length(const struct fq_checkpoint_tensor *tensor) {
    size_t length = strlen(tensor->name), cut = strlen(".weight");

    if (length > cut && strcmp(tensor->name + length - cut, ".weight") == 0)
        return length - cut;
    return tensor->rank == 3 ? length : 0;
}

static bool fits(const struct fq_checkpoint_tensor *tensor) {
    if ((tensor->rank != 2 && tensor->rank != 3) || !float_type(tensor))
        return false;
    for (int i = 0; i < tensor->rank; i++)
        if (tensor->shape[i] < 1 || tensor->shape[i] > FQ_MATRIX_DIM_MAX)
            return false;
    return true;
}

/*
 * Layers that models keep dense and that engines refuse packed: what chooses the experts, heads of
 * classifiers, and the tables of T5, which are not called embeddings.
 */
static bool stays_dense(const char *module) {
    static const char *const names[] = {
        "gate",   "shared_expert_gate",     "router", "score", "classifier",
        "shared", "relative_attention_bias"};
    const char *last = strrchr(module, '.');

    last = last ? last + 1 : module;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(last, names[i]) == 0)
            return true;
    return false;
}

/* Both lists are sorted by name, but the suffix may change the order. */
static bool is_dense_layer(const struct fq_plan *plan, const char *module) {
    size_t low = 0, high = fq_checkpoint_matrix_count(plan->checkpoint);

    while (low < high) {
        size_t middle = low + (high - low) / 2;
        int order = strcmp(module, fq_checkpoint_matrix(plan->checkpoint, middle)->name);

        if (order == 0)
            return true;
        if (order > 0)
            low = middle + 1;
        else
            high = middle;
    }
    return false;
}

static int collect_tensor(struct fq_plan *plan, const struct fq_checkpoint_tensor *tensor,
                          struct fq_error *err) {
    size_t length = fits(tensor) ? module_length(tensor) : 0;
    char *module = length ? strndup(tensor->name, length) : NULL;
    bool wanted, transposed;
    int rc;

    if (!float_type(tensor) && tensor->dtype[0] == 'F' && tensor->rank == 2 &&
        module_length(tensor) > 0) /* F64, F8 */
        plan->unsuited++;
    if (!module)
        return length ? fq_fail(err, FQ_NO_MEMORY, "no memory for names") : 0;
    if (tensor->rank == 3) {
        wanted = strstr(module, "expert") != NULL;
        transposed = experts_are_transposed(plan);
    } else {
        wanted = is_dense_layer(plan, module) && !stays_dense(module);
        transposed = fq_checkpoint_is_transposed(plan->checkpoint, module);
    }
    if (transposed || !is_included(plan, module, wanted)) {
        plan->unsuited += transposed && is_included(plan, module, tensor->rank == 2 || wanted);
        free(module);
        return 0;
    }
    if (tensor->rank == 3) {
        rc = add_experts(plan, module, tensor, err);
        free(module);
        return rc;
    }
    rc = grow(plan, 1, err);
    if (rc == 0)
        return add(plan, module, tensor, tensor->shape[0], tensor->shape[1], 0, err);
    free(module);
    return rc;
}

/* A rule that matches nothing is a slip of the pen. */
static int check_rules(const struct fq_plan *plan, struct fq_error *err) {
    static const char *const words[] = {"include", "exclude", "override"};

    for (size_t i = 0; i < plan->options->rule_count; i++) {
        const struct fq_quantize_rule *rule = &plan->options->rules[i];
        bool used = false;

        for (size_t m = 0; m < plan->count && !used; m++)
            used = matches(rule, plan->matrices[m].name);
        for (size_t t = 0; t < fq_checkpoint_tensor_count(plan->checkpoint) &&
                           rule->kind != FQ_RULE_OVERRIDE && !used;
             t++) {
            const struct fq_checkpoint_tensor *tensor = fq_checkpoint_tensor(plan->checkpoint, t);
            size_t length = fits(tensor) ? module_length(tensor) : 0;
            char *module = length ? strndup(tensor->name, length) : NULL;

            used = module && matches(rule, module);
            free(module);
        }
        if (!used)
            return fq_fail(err, FQ_INVALID, "--%s '%.200s' matches no weight matrix",
                           words[rule->kind], rule->pattern);
    }
    return 0;
}

/* Without a matrix there is nothing to do: because none is there, or because the rules leave none.
 */
static int check_count(const struct fq_plan *plan, const char *in, struct fq_error *err) {
    if (plan->count > 0)
        return 0;
    for (size_t i = 0; i < plan->options->rule_count; i++)
        if (plan->options->rules[i].kind == FQ_RULE_EXCLUDE)
            return fq_fail(err, FQ_INVALID,
                           "%.200s: --exclude '%.200s' leaves no matrix to quantize", in,
                           plan->options->rules[i].pattern);
    return fq_fail(err, FQ_INVALID,
                   "%.200s: no linear layer with an F32, F16 or BF16 weight to quantize", in);
}

/* ---- units -------------------------------------------------------------------------------- */

/* What vLLM fuses: the last components that become one layer, and the layer's name. */
static const struct {
    const char *part, *whole;
} fused[] = {
    {"q_proj", "qkv_proj"},
    {"k_proj", "qkv_proj"},
    {"v_proj", "qkv_proj"},
    {"query", "qkv"},
    {"key", "qkv"},
    {"value", "qkv"},
    {"wq", "wqkv"},
    {"wk", "wqkv"},
    {"wv", "wqkv"},
    {"gate_proj", "gate_up_proj"},
    {"up_proj", "gate_up_proj"},
    {"w1", "w13"},
    {"w3", "w13"},
    {"q_a_proj", "fused_qkv_a_proj"},
    {"kv_a_proj_with_mqa", "fused_qkv_a_proj"},
};

/* The key that matrices of one unit have in common.  All experts of a layer are one. */
static char *unit_key(const struct fq_plan_matrix *matrix) {
    const char *experts = strstr(matrix->name, ".experts."), *last = strrchr(matrix->name, '.');
    char *key = NULL;

    if (matrix->overridden)
        return strdup(matrix->name);
    if (experts && isdigit((unsigned char)experts[strlen(".experts.")]))
        return strndup(matrix->name, (size_t)(experts - matrix->name) + strlen(".experts"));
    for (size_t i = 0; last && i < sizeof fused / sizeof *fused; i++)
        if (strcmp(last + 1, fused[i].part) == 0)
            return asprintf(&key, "%.*s.%s", (int)(last - matrix->name), matrix->name,
                            fused[i].whole) < 0
                       ? NULL
                       : key;
    return strdup(matrix->name);
}

struct keyed {
    char *key;
    size_t matrix;
};

static int by_key(const void *left, const void *right) {
    const struct keyed *a = left, *b = right;
    int order = strcmp(a->key, b->key);

    return order ? order : a->matrix < b->matrix ? -1 : 1;
}

static int make_units(struct fq_plan *plan, struct fq_error *err) {
    struct keyed *keyed = calloc(plan->count + 1, sizeof *keyed);
    size_t *members = malloc((plan->count + 1) * sizeof *members);
    bool complete = keyed && members;

    plan->units = calloc(plan->count + 1, sizeof *plan->units);
    complete = complete && plan->units;
    for (size_t m = 0; complete && m < plan->count; m++) {
        keyed[m] = (struct keyed){.key = unit_key(&plan->matrices[m]), .matrix = m};
        complete = keyed[m].key != NULL;
    }
    if (complete)
        qsort(keyed, plan->count, sizeof *keyed, by_key);
    for (size_t i = 0; complete && i < plan->count; i++) {
        if (i == 0 || strcmp(keyed[i].key, keyed[i - 1].key) != 0)
            plan->units[plan->unit_count++].members = members + i;
        members[i] = keyed[i].matrix;
        plan->units[plan->unit_count - 1].count++;
        plan->matrices[keyed[i].matrix].unit = plan->unit_count - 1;
    }
    for (size_t m = 0; keyed && m < plan->count; m++)
        free(keyed[m].key);
    free(keyed);
    if (plan->unit_count == 0) /* else the first unit holds on to it */
        free(members);
    return complete ? 0 : fq_fail(err, FQ_NO_MEMORY, "no memory for %zu matrices", plan->count);
}

/* ---- all of it ---------------------------------------------------------------------------- */

int fq_plan_init(struct fq_plan *plan, const char *in, const struct fq_quantize_options *options,
                 struct fq_error *err) {
    int rc;

    *plan = (struct fq_plan){.options = options};
    if ((rc = fq_checkpoint_new(in, &plan->checkpoint, err)) < 0)
        goto out;
    for (size_t i = 0; i < fq_checkpoint_matrix_count(plan->checkpoint); i++)
        if (!fq_checkpoint_matrix(plan->checkpoint, i)->dense) {
            rc = fq_fail(err, FQ_INVALID, "%.200s: already quantized ('%.200s')", in,
                         fq_checkpoint_matrix(plan->checkpoint, i)->name);
            goto out;
        }
    for (size_t t = 0; t < fq_checkpoint_tensor_count(plan->checkpoint); t++) {
        plan->bytes += fq_checkpoint_tensor(plan->checkpoint, t)->bytes;
        if ((rc = collect_tensor(plan, fq_checkpoint_tensor(plan->checkpoint, t), err)) < 0)
            goto out;
    }
    if ((rc = check_rules(plan, err)) < 0 || (rc = check_count(plan, in, err)) < 0)
        goto out;
    rc = make_units(plan, err);
out:
    if (rc < 0)
        fq_plan_fini(plan);
    return rc;
}

void fq_plan_fini(struct fq_plan *plan) {
    for (size_t m = 0; m < plan->count; m++)
        free(plan->matrices[m].name);
    free(plan->matrices);
    if (plan->unit_count > 0)
        free(plan->units[0].members);
    free(plan->units);
    fq_checkpoint_free(plan->checkpoint);
    *plan = (struct fq_plan){0};
}

size_t fq_plan_of_tensor(const struct fq_plan *plan, const struct fq_checkpoint_tensor *tensor,
                         size_t *first) {
    size_t low = 0, high = plan->count, count = 0;

    while (low < high) { /* sources lie in one table: in the order of their addresses */
        size_t middle = low + (high - low) / 2;

        if (plan->matrices[middle].source < tensor)
            low = middle + 1;
        else
            high = middle;
    }
    *first = low;
    while (low + count < plan->count && plan->matrices[low + count].source == tensor)
        count++;
    return count;
}

struct fq_checkpoint_matrix fq_plan_describe(const struct fq_plan_matrix *matrix) {
    int64_t k = matrix->dense.k;

    return (struct fq_checkpoint_matrix){
        .name = matrix->name,
        .matrix = {.n = matrix->dense.n,
                   .k = k,
                   .bits = matrix->bits,
                   .group = matrix->group && matrix->group < k ? matrix->group : k,
                   .scale_type = FQ_F16},
        .symmetric = !matrix->asymmetric,
    };
}

uint64_t fq_plan_bytes(const struct fq_plan_matrix *matrix, int bits, int64_t group,
                       bool asymmetric) {
    struct fq_plan_matrix as = *matrix;
    struct fq_matrix scheme;
    uint64_t n = (uint64_t)matrix->dense.n, groups;

    as.bits = bits;
    as.group = group;
    scheme = fq_plan_describe(&as).matrix;
    groups = (uint64_t)fq_matrix_groups(&scheme);
    return n * (uint64_t)fq_matrix_row_bytes(&scheme) + n * groups * 2 + 16 +
           (asymmetric ? (n * (uint64_t)bits + 31) / 32 * 4 * groups : 0);
}

bool fq_plan_stays_dense(const struct fq_plan_matrix *matrix) {
    return matrix->bits == 3 && !fq_ct_int3_is_plain(matrix->dense.k);
}

void fq_plan_read_ahead(const struct fq_plan *plan, size_t matrix) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), begin;
    const struct fq_dense *dense;

    if (matrix >= plan->count)
        return;
    dense = &plan->matrices[matrix].dense;
    begin = (uintptr_t)dense->data / page * page;
    madvise((void *)begin, (uintptr_t)dense->data + plan->matrices[matrix].bytes - begin,
            MADV_WILLNEED);
}

void fq_plan_drop(const struct fq_plan_matrix *matrix) {
    struct fq_checkpoint_tensor part = *matrix->source;

    part.data = matrix->dense.data;
    part.bytes = matrix->bytes;
    fq_checkpoint_drop_tensor(&part);
}

/*
 * What looking at a byte once costs beside writing it: ranges and samples are read as fast as the
 * weights are; without them, and for zero points, every weight is rounded in both ways.
 */
static double look_cost(const struct fq_quantize_options *options) {
    const bool ranges =
        options->group == FQ_QUANTIZE_GROUP_AUTO || options->budget || options->bits_per_weight > 0;

    return !ranges ? 2 : options->method.asymmetric ? 1.5 : 1;
}

void fq_plan_looked(struct fq_plan *plan, struct fq_quantize_progress *progress) {
    progress->work_a_byte = look_cost(plan->options);
    progress->work_after = (double)plan->bytes;
    plan->looked = (double)progress->bytes_done * progress->work_a_byte;
}

json_t *fq_plan_choices(const struct fq_plan *plan) {
    json_t *choices = json_array();

    for (size_t m = 0; choices && m < plan->count; m++)
        json_array_append_new(
            choices, json_pack("[s, i, I, b]", plan->matrices[m].name, plan->matrices[m].bits,
                               (json_int_t)plan->matrices[m].group, plan->matrices[m].asymmetric));
    return choices;
}

int fq_plan_take_choices(struct fq_plan *plan, const json_t *choices) {
    if (json_array_size(choices) != plan->count)
        return -FQ_FORMAT;
    for (size_t m = 0; m < plan->count; m++) {
        struct fq_plan_matrix *matrix = &plan->matrices[m];
        const char *name;
        json_int_t group;
        int bits, asymmetric;

        if (json_unpack(json_array_get(choices, m), "[s, i, I, b]", &name, &bits, &group,
                        &asymmetric) < 0 ||
            strcmp(name, matrix->name) != 0)
            return -FQ_FORMAT;
        matrix->bits = bits;
        matrix->group = group;
        matrix->asymmetric = asymmetric;
        matrix->kept_dense = fq_plan_stays_dense(matrix);
    }
    return 0;
}
