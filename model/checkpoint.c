/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The checkpoint directory: finds the shards, merges their tensors into one
 * sorted table, and picks out the linear layers.  What the bytes of a quantized
 * layer mean is compressed-tensors.c's; how a dense one is rounded, quantize.c's.
 */
#include "checkpoint.h"

#include "compressed-tensors.h"
#include "directory.h"
#include "half.h"
#include "quantize.h"
#include "safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <unistd.h>

/* A linear layer and the tensors it is made of. */
struct layer {
    struct fq_checkpoint_matrix public;
    struct fq_ct_parts parts;                  /* of a quantized one */
    const struct fq_checkpoint_tensor *weight; /* of a dense one, else NULL */
    const struct fq_checkpoint_tensor *bias;   /* or NULL */
    char *name;                                /* public.name */
};

struct fq_checkpoint {
    struct fq_safetensors **shards;
    size_t shard_count;
    struct fq_checkpoint_tensor *tensors; /* copies, sorted by name; names are the shards' */
    size_t tensor_count;
    struct layer *layers; /* sorted by name */
    size_t layer_count;
    struct fq_ct_config *config; /* NULL where config.json has no quantization_config */
    bool conv1d;                 /* GPT-2's Conv1D layers store [K, N] */
    int dense_bits;
    int64_t dense_group;
};

static int by_name(const void *left, const void *right) {
    const struct fq_checkpoint_tensor *a = left, *b = right;

    return strcmp(a->name, b->name);
}

static int by_layer_name(const void *left, const void *right) {
    const struct layer *a = left, *b = right;

    return strcmp(a->name, b->name);
}

/* ---- shards ------------------------------------------------------------------------------- */

static int open_shard(struct fq_checkpoint *checkpoint, int dirfd, const char *name,
                      struct fq_error *err) {
    struct fq_safetensors **shards;
    int rc;

    for (size_t i = 0; i < checkpoint->shard_count; i++)
        if (strcmp(checkpoint->shards[i]->name, name) == 0)
            return 0;
    shards = realloc(checkpoint->shards, (checkpoint->shard_count + 1) * sizeof *shards);
    if (!shards)
        return fq_fail(err, FQ_NO_MEMORY, "%s: no memory to open it", name);
    checkpoint->shards = shards;
    rc = fq_safetensors_new(dirfd, name, &shards[checkpoint->shard_count], err);
    if (rc == 0)
        checkpoint->shard_count++;
    return rc;
}

static int open_indexed(struct fq_checkpoint *checkpoint, int dirfd, const json_t *index,
                        struct fq_error *err) {
    json_t *map = json_object_get(index, "weight_map"), *shard;
    const char *tensor, *previous = NULL;

    if (!json_is_object(map))
        return fq_fail(err, FQ_FORMAT, FQ_INDEX_FILE ": weight_map is missing or not an object");
    json_object_foreach(map, tensor, shard) {
        const char *name = json_string_value(shard);
        int rc;

        if (!name)
            return fq_fail(err, FQ_FORMAT, FQ_INDEX_FILE ": the file of '%.200s' is not a string",
                           tensor);
        if (previous && strcmp(name, previous) == 0)
            continue;
        if (name[0] == '\0' || name[0] == '.' || strchr(name, '/') || strlen(name) > 255)
            return fq_fail(err, FQ_FORMAT,
                           FQ_INDEX_FILE
                           ": the file of '%.200s' is '%.100s', only plain names are allowed",
                           tensor, name);
        if ((rc = open_shard(checkpoint, dirfd, name, err)) < 0) {
            fq_fail_in(err, FQ_INDEX_FILE);
            return rc;
        }
        previous = name;
    }
    return 0;
}

/* All tensors in one table; a name may be in one shard only. */
static int merge_tensors(struct fq_checkpoint *checkpoint, struct fq_error *err) {
    size_t total = 0, next = 0;

    for (size_t i = 0; i < checkpoint->shard_count; i++)
        total += checkpoint->shards[i]->count;
    checkpoint->tensors = calloc(total + 1, sizeof *checkpoint->tensors);
    if (!checkpoint->tensors)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for %zu tensors", total);
    for (size_t i = 0; i < checkpoint->shard_count; i++) {
        const struct fq_safetensors *shard = checkpoint->shards[i];

        if (shard->count > 0)
            memcpy(checkpoint->tensors + next, shard->tensors,
                   shard->count * sizeof *shard->tensors);
        next += shard->count;
    }
    checkpoint->tensor_count = total;
    qsort(checkpoint->tensors, total, sizeof *checkpoint->tensors, by_name);
    for (size_t i = 1; i < total; i++) {
        const struct fq_checkpoint_tensor *tensor = &checkpoint->tensors[i];

        if (by_name(tensor - 1, tensor) == 0)
            return fq_fail(err, FQ_FORMAT, "tensor '%.200s' is in both %s and %s", tensor->name,
                           (tensor - 1)->file, tensor->file);
    }
    return 0;
}

static int check_index(const struct fq_checkpoint *checkpoint, const json_t *index,
                       struct fq_error *err) {
    const char *name;
    json_t *shard;

    json_object_foreach(json_object_get(index, "weight_map"), name, shard) {
        const struct fq_checkpoint_tensor *tensor = fq_checkpoint_find(checkpoint, name);

        if (!tensor || strcmp(tensor->file, json_string_value(shard)) != 0)
            return fq_fail(err, FQ_FORMAT, FQ_INDEX_FILE ": tensor '%.200s' is not in %s", name,
                           json_string_value(shard));
    }
    return 0;
}

/* A single file goes before an index, as transformers has it. */
static int open_shards(struct fq_checkpoint *checkpoint, int dirfd, struct fq_error *err) {
    json_t *index = NULL;
    int rc;

    if (faccessat(dirfd, FQ_SINGLE_FILE, F_OK, 0) == 0) {
        rc = open_shard(checkpoint, dirfd, FQ_SINGLE_FILE, err);
        return rc < 0 ? rc : merge_tensors(checkpoint, err);
    }
    rc = fq_directory_json(dirfd, FQ_INDEX_FILE, &index, err);
    if (rc == -FQ_NOT_FOUND)
        return fq_fail(err, FQ_NOT_FOUND,
                       "neither " FQ_SINGLE_FILE " nor " FQ_INDEX_FILE " is there");
    if (rc == 0)
        rc = open_indexed(checkpoint, dirfd, index, err);
    if (rc == 0)
        rc = merge_tensors(checkpoint, err);
    if (rc == 0)
        rc = check_index(checkpoint, index, err);
    json_decref(index);
    return rc;
}

/* ---- layers ------------------------------------------------------------------------------- */

/* name with its suffix taken off, or NULL if it does not end so.  Heap. */
static char *strip(const char *name, const char *suffix) {
    size_t length = strlen(name), cut = strlen(suffix);

    if (length <= cut || strcmp(name + length - cut, suffix) != 0)
        return NULL;
    return strndup(name, length - cut);
}

static const struct fq_checkpoint_tensor *find_part(const struct fq_checkpoint *checkpoint,
                                                    const char *layer, const char *suffix) {
    const struct fq_checkpoint_tensor *found = NULL;
    char *name;

    if (asprintf(&name, "%s%s", layer, suffix) >= 0) {
        found = fq_checkpoint_find(checkpoint, name);
        free(name);
    }
    return found;
}

static int float_dtype(const struct fq_checkpoint_tensor *tensor) {
    return strcmp(tensor->dtype, "F32") == 0    ? FQ_F32
           : strcmp(tensor->dtype, "F16") == 0  ? FQ_F16
           : strcmp(tensor->dtype, "BF16") == 0 ? FQ_BF16
                                                : 0;
}

/* Two-dimensional weights that are looked up by row, or that models keep dense. */
static bool is_table(const char *name) {
    static const char *const parts[] = {"embed", "wte", "wpe", "lm_head"};

    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++)
        if (strcasestr(name, parts[i]))
            return true;
    return false;
}

static bool is_conv1d(const char *name) {
    const char *last = strrchr(name, '.');

    last = last ? last + 1 : name;
    return strcmp(last, "c_attn") == 0 || strcmp(last, "c_proj") == 0 ||
           strcmp(last, "c_fc") == 0 || strcmp(last, "q_attn") == 0;
}

static bool is_dense_linear(const struct fq_checkpoint *checkpoint, const char *layer,
                            const struct fq_checkpoint_tensor *weight) {
    return weight->rank == 2 && float_dtype(weight) && weight->shape[0] >= 1 &&
           weight->shape[1] >= 1 && weight->shape[0] <= FQ_MATRIX_DIM_MAX &&
           weight->shape[1] <= FQ_MATRIX_DIM_MAX && !is_table(layer) &&
           !(checkpoint->conv1d && is_conv1d(layer));
}

static void describe_dense(const struct fq_checkpoint *checkpoint, struct layer *layer) {
    struct fq_matrix *matrix = &layer->public.matrix;

    matrix->n = layer->weight->shape[0];
    matrix->k = layer->weight->shape[1];
    matrix->bits = checkpoint->dense_bits;
    matrix->group = checkpoint->dense_group == 0 || checkpoint->dense_group > matrix->k
                        ? matrix->k
                        : checkpoint->dense_group;
    matrix->scale_type = FQ_F16;
    layer->public.symmetric = true;
    layer->public.dense = true;
    layer->public.stored = layer->weight->bytes;
}

static int describe_packed(const struct fq_checkpoint *checkpoint, struct layer *layer,
                           struct fq_error *err) {
    const char *name = layer->name;
    struct fq_ct_scheme scheme;
    int rc;

    if (!checkpoint->config)
        return fq_fail(err, FQ_FORMAT,
                       "%s: tensor '%.200s': config.json has no "
                       "quantization_config that says how it is packed",
                       layer->parts.packed->file, layer->parts.packed->name);
    if ((rc = fq_ct_config_match(checkpoint->config, name, &scheme, err)) < 0)
        return rc;
    layer->parts.scale = find_part(checkpoint, name, ".weight_scale");
    layer->parts.zero = find_part(checkpoint, name, ".weight_zero_point");
    layer->parts.shape = find_part(checkpoint, name, ".weight_shape");
    layer->parts.g_idx = find_part(checkpoint, name, ".weight_g_idx");
    return fq_ct_describe(&layer->parts, &scheme, &layer->public, err);
}

static int describe_bias(const struct fq_checkpoint *checkpoint, struct layer *layer,
                         struct fq_error *err) {
    const struct fq_checkpoint_tensor *bias = find_part(checkpoint, layer->name, ".bias");

    if (!bias)
        return 0;
    if (bias->rank != 1 || bias->shape[0] != layer->public.matrix.n || !float_dtype(bias))
        return fq_fail(err, FQ_FORMAT, "%s: tensor '%.200s': is not F32, F16 or BF16 of [%lld]",
                       bias->file, bias->name, (long long)layer->public.matrix.n);
    layer->bias = bias;
    layer->public.has_bias = true;
    return 0;
}

/*
 * Packed weights are layers; without a quantization_config dense linear weights are too.  A
 * checkpoint that says how it is quantized is taken at its word: what it kept dense stays so.
 */
static int find_layers(struct fq_checkpoint *checkpoint, struct fq_error *err) {
    checkpoint->layers = calloc(checkpoint->tensor_count + 1, sizeof *checkpoint->layers);
    if (!checkpoint->layers)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for %zu layers", checkpoint->tensor_count);
    for (size_t i = 0; i < checkpoint->tensor_count; i++) {
        const struct fq_checkpoint_tensor *tensor = &checkpoint->tensors[i];
        struct layer *layer = &checkpoint->layers[checkpoint->layer_count];
        char *name = strip(tensor->name, ".weight_packed");
        int rc = 0;

        if (name) {
            *layer = (struct layer){.name = name, .parts.packed = tensor};
            checkpoint->layer_count++;
            rc = describe_packed(checkpoint, layer, err);
        } else if (!checkpoint->config && (name = strip(tensor->name, ".weight"))) {
            if (!is_dense_linear(checkpoint, name, tensor)) {
                free(name);
                continue;
            }
            *layer = (struct layer){.name = name, .weight = tensor};
            checkpoint->layer_count++;
            describe_dense(checkpoint, layer);
        } else {
            continue;
        }
        layer->public.name = name;
        if (rc < 0 || (rc = describe_bias(checkpoint, layer, err)) < 0)
            return rc;
    }
    qsort(checkpoint->layers, checkpoint->layer_count, sizeof *checkpoint->layers, by_layer_name);
    return 0;
}

/* ---- opening ------------------------------------------------------------------------------ */

static int read_config(struct fq_checkpoint *checkpoint, int dirfd, struct fq_error *err) {
    json_t *json = NULL, *quantization;
    const char *type;
    int rc = fq_directory_json(dirfd, FQ_CONFIG_FILE, &json, err);

    if (rc == -FQ_NOT_FOUND)
        return 0; /* bare weights: dense ones need no configuration */
    if (rc < 0)
        return rc;
    type = json_string_value(json_object_get(json, "model_type"));
    checkpoint->conv1d = type && (strcmp(type, "gpt2") == 0 || strcmp(type, "openai-gpt") == 0);
    quantization = json_object_get(json, "quantization_config");
    if (!quantization || json_is_null(quantization))
        quantization = json_object_get(json, "compression_config"); /* its older name */
    if (quantization && !json_is_null(quantization) &&
        (rc = fq_ct_config_new(quantization, &checkpoint->config, err)) < 0)
        fq_fail_in(err, FQ_CONFIG_FILE);
    json_decref(json);
    return rc;
}

int fq_checkpoint_new(const char *directory, struct fq_checkpoint **out, struct fq_error *err) {
    struct fq_error local;
    struct fq_checkpoint *checkpoint = calloc(1, sizeof *checkpoint);
    int dirfd, rc;

    err = err ? err : &local; /* fq_fail_in needs one */
    if (!checkpoint)
        return fq_fail(err, FQ_NO_MEMORY, "%.200s: no memory to open it", directory);
    checkpoint->dense_bits = 4;
    checkpoint->dense_group = 64;
    dirfd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (dirfd < 0) {
        rc = fq_fail_errno(err, "%.200s", directory);
        fq_checkpoint_free(checkpoint);
        return rc;
    }
    if ((rc = read_config(checkpoint, dirfd, err)) == 0 &&
        (rc = open_shards(checkpoint, dirfd, err)) == 0)
        rc = find_layers(checkpoint, err);
    close(dirfd);
    if (rc < 0) {
        fq_fail_in(err, "%.200s", directory);
        fq_checkpoint_free(checkpoint);
        return rc;
    }
    *out = checkpoint;
    return 0;
}

void fq_checkpoint_free(struct fq_checkpoint *checkpoint) {
    if (!checkpoint)
        return;
    for (size_t i = 0; i < checkpoint->layer_count; i++)
        free(checkpoint->layers[i].name);
    free(checkpoint->layers);
    free(checkpoint->tensors);
    for (size_t i = 0; i < checkpoint->shard_count; i++)
        fq_safetensors_free(checkpoint->shards[i]);
    free(checkpoint->shards);
    fq_ct_config_free(checkpoint->config);
    free(checkpoint);
}

/* ---- what is there ------------------------------------------------------------------------ */

size_t fq_checkpoint_tensor_count(const struct fq_checkpoint *checkpoint) {
    return checkpoint->tensor_count;
}

const struct fq_checkpoint_tensor *fq_checkpoint_tensor(const struct fq_checkpoint *checkpoint,
                                                        size_t i) {
    return &checkpoint->tensors[i];
}

const struct fq_checkpoint_tensor *fq_checkpoint_find(const struct fq_checkpoint *checkpoint,
                                                      const char *name) {
    struct fq_checkpoint_tensor key = {.name = name};

    return bsearch(&key, checkpoint->tensors, checkpoint->tensor_count, sizeof key, by_name);
}

size_t fq_checkpoint_matrix_count(const struct fq_checkpoint *checkpoint) {
    return checkpoint->layer_count;
}

const struct fq_checkpoint_matrix *fq_checkpoint_matrix(const struct fq_checkpoint *checkpoint,
                                                        size_t i) {
    return &checkpoint->layers[i].public;
}

int fq_checkpoint_quantize_as(struct fq_checkpoint *checkpoint, int bits, int64_t group,
                              struct fq_error *err) {
    if (bits != 8 && bits != 4 && bits != 3)
        return fq_fail(err, FQ_INVALID, "bits is %d, allowed are 8, 4 and 3", bits);
    if (group < 0 || group % 16 != 0 || group > FQ_MATRIX_DIM_MAX)
        return fq_fail(err, FQ_INVALID,
                       "group is %lld, allowed are multiples of 16 to %lld, and 0 for per channel",
                       (long long)group, (long long)FQ_MATRIX_DIM_MAX);
    checkpoint->dense_bits = bits;
    checkpoint->dense_group = group;
    for (size_t i = 0; i < checkpoint->layer_count; i++)
        if (checkpoint->layers[i].weight)
            describe_dense(checkpoint, &checkpoint->layers[i]);
    return 0;
}

/* ---- reading ------------------------------------------------------------------------------ */

int fq_checkpoint_dense(const struct fq_checkpoint *checkpoint, size_t i, struct fq_dense *out) {
    const struct fq_checkpoint_tensor *weight = checkpoint->layers[i].weight;

    if (!weight)
        return -FQ_NOT_FOUND;
    *out = (struct fq_dense){.n = weight->shape[0],
                             .k = weight->shape[1],
                             .type = (enum fq_dtype)float_dtype(weight),
                             .data = weight->data};
    return 0;
}

int fq_checkpoint_load(struct fq_checkpoint *checkpoint, size_t i, struct fq_loaded_matrix *out,
                       struct fq_error *err) {
    const struct layer *layer = &checkpoint->layers[i];
    struct fq_error local;
    struct fq_dense dense;
    int rc;

    err = err ? err : &local;
    *out = (struct fq_loaded_matrix){0};
    if (!layer->weight)
        return fq_ct_load(&layer->parts, &layer->public, out, err);
    fq_checkpoint_dense(checkpoint, i, &dense);
    out->matrix = layer->public.matrix;
    rc = fq_quantize(&dense, &out->matrix, &out->owned, err);
    if (rc < 0)
        fq_fail_in(err, "%s: tensor '%.200s'", layer->weight->file, layer->weight->name);
    return rc;
}

void fq_loaded_matrix_fini(struct fq_loaded_matrix *loaded) {
    free(loaded->owned);
    loaded->owned = NULL;
}

int fq_checkpoint_bias(struct fq_checkpoint *checkpoint, size_t i, float *out,
                       struct fq_error *err) {
    const struct layer *layer = &checkpoint->layers[i];

    if (!layer->bias)
        return fq_fail(err, FQ_NOT_FOUND, "'%.200s' has no bias", layer->name);
    for (int64_t n = 0; n < layer->public.matrix.n; n++)
        out[n] = fq_load(layer->bias->data, float_dtype(layer->bias), (size_t)n);
    return 0;
}

void fq_checkpoint_drop_tensor(const struct fq_checkpoint_tensor *tensor) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t begin = ((uintptr_t)tensor->data + page - 1) / page * page;
    uintptr_t end = ((uintptr_t)tensor->data + tensor->bytes) / page * page;

    if (end > begin) /* clean pages of a file: they come back when touched */
        madvise((void *)begin, end - begin, MADV_DONTNEED);
}

void fq_checkpoint_drop(struct fq_checkpoint *checkpoint, size_t i) {
    const struct layer *layer = &checkpoint->layers[i];
    const struct fq_checkpoint_tensor *parts[] = {layer->weight, layer->parts.packed,
                                                  layer->parts.scale, layer->parts.zero};

    for (size_t part = 0; part < sizeof parts / sizeof parts[0]; part++)
        if (parts[part])
            fq_checkpoint_drop_tensor(parts[part]);
}
