/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The checkpoint: opens the files, finds out which layout they have, merges
 * their tensors into one sorted table, and picks out the linear layers.  What the
 * bytes of a quantized layer mean is its layout's; how a dense one is rounded,
 * quantize.c's.
 */
#include "checkpoint.h"

#include "directory.h"
#include "disk-layout.h"
#include "gguf.h"
#include "half.h"
#include "quantize.h"
#include "shards.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* A linear layer and the tensors it is made of. */
struct layer {
    struct fq_checkpoint_matrix public;
    const struct fq_checkpoint_tensor *parts[FQ_LAYOUT_PARTS]; /* of a quantized one */
    const struct fq_checkpoint_tensor *weight;                 /* of a dense one, else NULL */
    const struct fq_checkpoint_tensor *bias;                   /* or NULL */
    char *name;                                                /* public.name */
};

struct fq_checkpoint {
    struct fq_shards shards; /* of a directory */
    struct fq_gguf *gguf;    /* of a file, else NULL */
    const void *map;         /* of the file, NULL where its bytes are the caller's */
    size_t map_bytes;
    struct fq_checkpoint_tensor *tensors; /* copies, sorted by name; names are the files' */
    size_t *owners;                       /* for each tensor, its layer or SIZE_MAX */
    size_t tensor_count;
    struct layer *layers; /* sorted by name */
    size_t layer_count;
    json_t *json;                       /* config.json or NULL */
    const struct fq_layout_ops *layout; /* NULL where nothing says that it is quantized */
    void *config;                       /* the layout's */
    bool conv1d;                        /* GPT-2's Conv1D layers store [K, N] */
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

/* ---- tensors ------------------------------------------------------------------------------ */

/* All tensors in one table; a name may be there once only. */
static int merge_tensors(struct fq_checkpoint *checkpoint, struct fq_error *err) {
    const struct fq_shards *shards = &checkpoint->shards;
    size_t total = checkpoint->gguf ? checkpoint->gguf->count : 0, next = 0;

    for (size_t i = 0; i < shards->count; i++)
        total += shards->files[i]->count;
    checkpoint->tensors = calloc(total + 1, sizeof *checkpoint->tensors);
    if (!checkpoint->tensors)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for %zu tensors", total);
    if (checkpoint->gguf)
        memcpy(checkpoint->tensors, checkpoint->gguf->tensors, total * sizeof *checkpoint->tensors);
    for (size_t i = 0; i < shards->count; i++) {
        const struct fq_safetensors *shard = shards->files[i];

        memcpy(checkpoint->tensors + next, shard->tensors, shard->count * sizeof *shard->tensors);
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
static bool is_table(const struct fq_checkpoint *checkpoint, const char *name) {
    static const char *const parts[] = {"embed", "embd", "wte", "wpe", "lm_head"};

    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++)
        if (strcasestr(name, parts[i]))
            return true;
    return checkpoint->gguf && strcmp(name, "output") == 0; /* llama.cpp's lm_head */
}

static bool is_conv1d(const char *name) {
    const char *last = strrchr(name, '.');

    last = last ? last + 1 : name;
    return strcmp(last, "c_attn") == 0 || strcmp(last, "c_proj") == 0 ||
           strcmp(last, "c_fc") == 0 || strcmp(last, "q_attn") == 0;
}

bool fq_checkpoint_is_transposed(const struct fq_checkpoint *checkpoint, const char *layer) {
    return checkpoint->conv1d && is_conv1d(layer);
}

static bool is_dense_linear(const struct fq_checkpoint *checkpoint, const char *layer,
                            const struct fq_checkpoint_tensor *weight) {
    return weight->rank == 2 && float_dtype(weight) && weight->shape[0] >= 1 &&
           weight->shape[1] >= 1 && weight->shape[0] <= FQ_MATRIX_DIM_MAX &&
           weight->shape[1] <= FQ_MATRIX_DIM_MAX && !is_table(checkpoint, layer) &&
           !fq_checkpoint_is_transposed(checkpoint, layer);
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
    const struct fq_layout_ops *layout = checkpoint->layout;
    int rc;

    for (int part = 1; part < FQ_LAYOUT_PARTS && layout->suffixes[part]; part++)
        layer->parts[part] = find_part(checkpoint, layer->name, layout->suffixes[part]);
    rc = layout->describe(checkpoint->config, layer->name, layer->parts, &layer->public, err);
    if (rc < 0)
        return rc;
    layer->public.dense = false;
    for (int part = 0; part < FQ_LAYOUT_PARTS; part++)
        layer->public.stored += layer->parts[part] ? layer->parts[part]->bytes : 0;
    return 0;
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

/* A packed weight of this checkpoint's layout: the module's name, on the heap.  *rc says whether it
 * is one of another layout. */
static char *packed_name(const struct fq_checkpoint *checkpoint,
                         const struct fq_checkpoint_tensor *tensor, int *rc, struct fq_error *err) {
    const struct fq_layout_ops *layout = checkpoint->layout;
    char *name = layout ? strip(tensor->name, layout->suffixes[0]) : NULL;

    if (name && layout->claims && !layout->claims(tensor)) {
        free(name);
        name = NULL;
    }
    if (!name && !checkpoint->gguf && fq_layout_by_tensor(tensor->name))
        *rc = layout ? FQ_TENSOR_FAIL(err, FQ_FORMAT, tensor,
                                      "quantization_config says %s, which has no such tensors",
                                      layout->name)
                     : FQ_TENSOR_FAIL(err, FQ_FORMAT, tensor,
                                      "config.json has no quantization_config that says how it is "
                                      "packed");
    return name;
}

/* The layer that a tensor makes, if any, into *layer; its name is NULL where it makes none. */
static int find_layer(const struct fq_checkpoint *checkpoint,
                      const struct fq_checkpoint_tensor *tensor, struct layer *layer,
                      struct fq_error *err) {
    int rc = 0;

    *layer = (struct layer){.name = packed_name(checkpoint, tensor, &rc, err)};
    if (rc < 0)
        return rc;
    if (layer->name) {
        layer->parts[0] = tensor;
        return describe_packed(checkpoint, layer, err);
    }
    if (checkpoint->layout)
        return 0; /* it is taken at its word: what it kept dense stays so */
    layer->name = strip(tensor->name, ".weight");
    if (layer->name && is_dense_linear(checkpoint, layer->name, tensor)) {
        layer->weight = tensor;
        describe_dense(checkpoint, layer);
        return 0;
    }
    free(layer->name);
    layer->name = NULL;
    return 0;
}

/* Scales without their codes are what is left of a layer that was lost. */
static int check_remains(const struct fq_checkpoint *checkpoint, struct fq_error *err) {
    const char *suffix = checkpoint->layout ? checkpoint->layout->suffixes[1] : NULL;

    for (size_t i = 0; suffix && i < checkpoint->tensor_count; i++) {
        const struct fq_checkpoint_tensor *tensor = &checkpoint->tensors[i];
        char *name = checkpoint->owners[i] == SIZE_MAX ? strip(tensor->name, suffix) : NULL;
        bool remains = name != NULL;

        free(name);
        if (remains)
            return FQ_TENSOR_FAIL(err, FQ_FORMAT, tensor, "has no %s beside it",
                                  checkpoint->layout->suffixes[0] + 1);
    }
    return 0;
}

static void own(struct fq_checkpoint *checkpoint, const struct fq_checkpoint_tensor *tensor,
                size_t layer) {
    if (tensor)
        checkpoint->owners[tensor - checkpoint->tensors] = layer;
}

/* Packed weights are layers; where nothing says that any is packed, dense linear weights are too.
 */
static int find_layers(struct fq_checkpoint *checkpoint, struct fq_error *err) {
    checkpoint->layers = calloc(checkpoint->tensor_count + 1, sizeof *checkpoint->layers);
    checkpoint->owners = calloc(checkpoint->tensor_count + 1, sizeof *checkpoint->owners);
    if (!checkpoint->layers || !checkpoint->owners)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for %zu layers", checkpoint->tensor_count);
    for (size_t i = 0; i < checkpoint->tensor_count; i++) {
        struct layer *layer = &checkpoint->layers[checkpoint->layer_count];
        int rc = find_layer(checkpoint, &checkpoint->tensors[i], layer, err);

        checkpoint->owners[i] = SIZE_MAX;
        if (layer->name)
            checkpoint->layer_count++; /* so that its name is freed, whatever comes */
        layer->public.name = layer->name;
        if (rc < 0 || (layer->name && (rc = describe_bias(checkpoint, layer, err)) < 0))
            return rc;
    }
    qsort(checkpoint->layers, checkpoint->layer_count, sizeof *checkpoint->layers, by_layer_name);
    for (size_t i = 0; i < checkpoint->layer_count; i++) {
        own(checkpoint, checkpoint->layers[i].weight, i);
        for (int part = 0; part < FQ_LAYOUT_PARTS; part++)
            own(checkpoint, checkpoint->layers[i].parts[part], i);
    }
    return check_remains(checkpoint, err);
}

/* ---- opening ------------------------------------------------------------------------------ */

static bool is_set(const json_t *value) {
    return value && !json_is_null(value);
}

/* quantization_config: in config.json, under its older name, or in a file of its own. */
static int find_quantization(const json_t *config, const struct fq_directory *directory,
                             json_t **out, const char **file, const char **method,
                             struct fq_error *err) {
    static const struct {
        const char *file, *method; /* the method where the file names none */
    } own_files[] = {{"quantize_config.json", "gptq"}, {"quant_config.json", "awq"}};
    json_t *found = json_object_get(config, "quantization_config");

    *file = FQ_CONFIG_FILE;
    *method = NULL;
    if (!is_set(found))
        found = json_object_get(config, "compression_config");
    *out = is_set(found) ? json_incref(found) : NULL;
    for (size_t i = 0; !*out && i < sizeof own_files / sizeof *own_files; i++) {
        int rc = fq_directory_read(directory, own_files[i].file, out, err);

        *file = own_files[i].file;
        *method = own_files[i].method;
        if (rc < 0 && rc != -FQ_NOT_FOUND)
            return rc;
    }
    return 0;
}

static int read_quantization(struct fq_checkpoint *checkpoint, const struct fq_directory *directory,
                             struct fq_error *err) {
    json_t *json = NULL;
    const json_t *named;
    const char *file, *method;
    int rc = find_quantization(checkpoint->json, directory, &json, &file, &method, err);

    if (rc < 0 || !json)
        return rc;
    named = json_object_get(json, "quant_method");
    if (named)
        method = json_string_value(named);
    if (!json_is_object(json))
        rc = fq_fail(err, FQ_FORMAT, "quantization_config is not an object");
    else if (!method)
        rc = fq_fail(err, FQ_FORMAT, "quantization_config: quant_method is missing or no string");
    else if (!(checkpoint->layout = fq_layout_by_method(method, err)))
        rc = fq_fail_in(err, "quantization_config");
    else
        rc = checkpoint->layout->config_new(json, &checkpoint->config, err);
    json_decref(json);
    return rc < 0 ? fq_fail_in(err, "%s", file) : 0;
}

static int open_directory(struct fq_checkpoint *checkpoint, const struct fq_directory *directory,
                          struct fq_error *err) {
    const char *type;
    int rc = fq_directory_read(directory, FQ_CONFIG_FILE, &checkpoint->json, err);

    if (rc < 0 && rc != -FQ_NOT_FOUND) /* bare weights: dense ones need no configuration */
        return rc;
    type = json_string_value(json_object_get(checkpoint->json, "model_type"));
    checkpoint->conv1d = type && (strcmp(type, "gpt2") == 0 || strcmp(type, "openai-gpt") == 0);
    if ((rc = read_quantization(checkpoint, directory, err)) < 0)
        return rc;
    return fq_shards_init(&checkpoint->shards, directory, err);
}

static int open_gguf(struct fq_checkpoint *checkpoint, const void *bytes, size_t size,
                     const char *name, struct fq_error *err) {
    int rc = fq_gguf_new(bytes, size, name, &checkpoint->gguf, err);

    if (rc < 0)
        return rc;
    if (checkpoint->gguf->quantized)
        checkpoint->layout = &fq_layout_gguf;
    checkpoint->json = fq_gguf_config(checkpoint->gguf);
    return checkpoint->json ? 0 : fq_fail(err, FQ_NO_MEMORY, "no memory for the metadata");
}

/* What PATH is decides: a directory, or a file that must be GGUF.  *context is how much of PATH is
 * the directory that the names in messages are beneath. */
static int open_path(struct fq_checkpoint *checkpoint, const char *path, size_t *context,
                     struct fq_error *err) {
    struct fq_directory directory = {.fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
    const char *slash = strrchr(path, '/');
    int rc;

    *context = 0; /* what is said until now has all of it */
    if (directory.fd >= 0) {
        *context = strlen(path);
        rc = open_directory(checkpoint, &directory, err);
        close(directory.fd);
        return rc;
    }
    if (errno != ENOTDIR)
        return fq_fail_errno(err, "%.200s", path);
    rc = fq_directory_map(AT_FDCWD, path, 4, &checkpoint->map, &checkpoint->map_bytes, err);
    if (rc < 0)
        return rc;
    *context = slash ? (size_t)(slash - path) : 0;
    return open_gguf(checkpoint, checkpoint->map, checkpoint->map_bytes, slash ? slash + 1 : path,
                     err);
}

static int open_memory(struct fq_checkpoint *checkpoint, const struct fq_memory_file *files,
                       size_t count, struct fq_error *err) {
    struct fq_directory directory = {.fd = -1, .files = files, .count = count};
    size_t length = count == 1 ? strlen(files->name) : 0;

    if (length > 5 && strcmp(files->name + length - 5, ".gguf") == 0)
        return open_gguf(checkpoint, files->bytes, files->size, files->name, err);
    return open_directory(checkpoint, &directory, err);
}

static int checkpoint_new(const char *path, const struct fq_memory_file *files, size_t count,
                          struct fq_checkpoint **out, struct fq_error *err) {
    struct fq_error local;
    struct fq_checkpoint *checkpoint = calloc(1, sizeof *checkpoint);
    size_t context = 0;
    int rc;

    err = err ? err : &local; /* fq_fail_in needs one */
    if (!checkpoint)
        return fq_fail(err, FQ_NO_MEMORY, "no memory to open a checkpoint");
    checkpoint->dense_bits = 4;
    checkpoint->dense_group = 64;
    rc = path ? open_path(checkpoint, path, &context, err)
              : open_memory(checkpoint, files, count, err);
    if (rc == 0 && (rc = merge_tensors(checkpoint, err)) == 0)
        rc = find_layers(checkpoint, err);
    if (rc < 0) {
        if (context > 0)
            fq_fail_in(err, "%.*s", context < 200 ? (int)context : 200, path);
        fq_checkpoint_free(checkpoint);
        return rc;
    }
    *out = checkpoint;
    return 0;
}

int fq_checkpoint_new(const char *path, struct fq_checkpoint **out, struct fq_error *err) {
    return checkpoint_new(path, NULL, 0, out, err);
}

int fq_checkpoint_new_memory(const struct fq_memory_file *files, size_t count,
                             struct fq_checkpoint **out, struct fq_error *err) {
    return checkpoint_new(NULL, files, count, out, err);
}

void fq_checkpoint_free(struct fq_checkpoint *checkpoint) {
    if (!checkpoint)
        return;
    for (size_t i = 0; i < checkpoint->layer_count; i++)
        free(checkpoint->layers[i].name);
    free(checkpoint->layers);
    free(checkpoint->owners);
    free(checkpoint->tensors);
    if (checkpoint->layout && checkpoint->layout->config_free)
        checkpoint->layout->config_free(checkpoint->config);
    json_decref(checkpoint->json);
    fq_shards_fini(&checkpoint->shards);
    fq_gguf_free(checkpoint->gguf);
    if (checkpoint->map)
        munmap((void *)checkpoint->map, checkpoint->map_bytes);
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

size_t fq_checkpoint_owner(const struct fq_checkpoint *checkpoint, size_t i) {
    return checkpoint->owners[i];
}

const char *fq_checkpoint_format(const struct fq_checkpoint *checkpoint) {
    return checkpoint->layout ? checkpoint->layout->name : "dense";
}

const struct json_t *fq_checkpoint_config(const struct fq_checkpoint *checkpoint) {
    return checkpoint->json;
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
    static const struct fq_quantize_method method = {.scale = FQ_SCALE_MSE};
    const struct layer *layer = &checkpoint->layers[i];
    struct fq_error local;
    struct fq_dense dense;
    int rc;

    err = err ? err : &local;
    *out = (struct fq_loaded_matrix){0};
    if (!layer->weight)
        return checkpoint->layout->load(checkpoint->config, layer->parts, &layer->public, out, err);
    fq_checkpoint_dense(checkpoint, i, &dense);
    out->matrix = layer->public.matrix;
    rc = fq_quantize(&dense, &method, &out->matrix, &out->owned, NULL, err);
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

    if (layer->weight)
        fq_checkpoint_drop_tensor(layer->weight);
    for (int part = 0; part < FQ_LAYOUT_PARTS; part++)
        if (layer->parts[part])
            fq_checkpoint_drop_tensor(layer->parts[part]);
}
