/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Quantizing a directory.  First the plan: every tensor of the output with its
 * shape and shard, which follows from the shapes of the input alone.  Then the
 * data, shard by shard and matrix by matrix, dropping each from memory once it
 * is written.  Last the index, config.json and the files beside.
 */
#include "quantize-checkpoint.h"

#include "checkpoint.h"
#include "compressed-tensors.h"
#include "directory.h"
#include "output-directory.h"
#include "quantize.h"
#include "safetensors.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum part {
    PART_WHOLE,
    PART_PACKED,
    PART_SCALE,
    PART_SHAPE
};

/* One tensor of the output. */
struct planned {
    struct fq_checkpoint_tensor tensor; /* name owned where part is not PART_WHOLE */
    const struct fq_checkpoint_tensor *source;
    enum part part;
    size_t matrix; /* index of the matrix, unless PART_WHOLE */
    size_t shard;
};

struct job {
    const struct fq_quantize_options *options;
    struct fq_quantize_summary *summary;
    struct fq_checkpoint *checkpoint;
    struct fq_output_directory output;
    struct planned *plan; /* by shard, then by item size and name */
    size_t count, shards, done, quantizable;
};

/* ---- the plan ----------------------------------------------------------------------------- */

/* A matrix whose packed form would be ambiguous stays as it is. */
static bool is_kept(const struct fq_checkpoint_matrix *matrix) {
    return matrix->matrix.bits == 3 && !fq_ct_int3_is_plain(matrix->matrix.k);
}

static int plan_part(struct job *job, const struct fq_checkpoint_tensor *source, size_t i,
                     enum part part, struct fq_error *err) {
    static const char *const suffixes[] = {"", ".weight_packed", ".weight_scale", ".weight_shape"};
    static const char *const dtypes[] = {"", "I32", "F16", "I64"};
    const struct fq_checkpoint_matrix *matrix = fq_checkpoint_matrix(job->checkpoint, i);
    struct planned *planned = &job->plan[job->count];
    char *name;

    *planned = (struct planned){.source = source, .part = part, .matrix = i};
    planned->tensor.dtype = dtypes[part];
    planned->tensor.rank = part == PART_SHAPE ? 1 : 2;
    planned->tensor.shape[0] = part == PART_SHAPE ? 2 : matrix->matrix.n;
    if (part != PART_SHAPE)
        planned->tensor.shape[1] = part == PART_PACKED ? fq_matrix_row_bytes(&matrix->matrix) / 4
                                                       : fq_matrix_groups(&matrix->matrix);
    planned->tensor.bytes = fq_safetensors_dtype_size(planned->tensor.dtype) *
                            (uint64_t)planned->tensor.shape[0] *
                            (part == PART_SHAPE ? 1 : (uint64_t)planned->tensor.shape[1]);
    if (asprintf(&name, "%s%s", matrix->name, suffixes[part]) < 0)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for tensor names");
    planned->tensor.name = name;
    job->count++;
    return 0;
}

static int by_place(const void *left, const void *right) {
    const struct planned *a = left, *b = right;
    size_t a_size = fq_safetensors_dtype_size(a->tensor.dtype);
    size_t b_size = fq_safetensors_dtype_size(b->tensor.dtype);

    if (a->shard != b->shard)
        return a->shard < b->shard ? -1 : 1;
    if (a_size != b_size)
        return a_size > b_size ? -1 : 1; /* which keeps every tensor aligned */
    return strcmp(a->tensor.name, b->tensor.name);
}

/* The matrix whose dense weight TENSOR is, or NULL; both tables are sorted alike but for suffixes.
 */
static bool find_matrix(const struct job *job, const struct fq_checkpoint_tensor *tensor,
                        size_t *index) {
    size_t low = 0, high = fq_checkpoint_matrix_count(job->checkpoint);
    size_t length = strlen(tensor->name), cut = strlen(".weight");

    if (length <= cut || strcmp(tensor->name + length - cut, ".weight") != 0)
        return false;
    length -= cut;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const char *name = fq_checkpoint_matrix(job->checkpoint, middle)->name;
        int order = strncmp(tensor->name, name, length);

        if (order == 0 && name[length] == '\0') {
            *index = middle;
            return true;
        }
        if (order > 0)
            low = middle + 1;
        else
            high = middle; /* a longer name that begins alike comes after, too */
    }
    return false;
}

static int make_plan(struct job *job, struct fq_error *err) {
    size_t tensors = fq_checkpoint_tensor_count(job->checkpoint);
    uint64_t filled = 0;
    int rc;

    job->plan =
        calloc(tensors + 2 * fq_checkpoint_matrix_count(job->checkpoint) + 1, sizeof *job->plan);
    if (!job->plan)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for %zu tensors", tensors);
    for (size_t t = 0; t < tensors; t++) {
        const struct fq_checkpoint_tensor *tensor = fq_checkpoint_tensor(job->checkpoint, t);
        size_t first = job->count, matrix;
        uint64_t bytes = 0;

        if (find_matrix(job, tensor, &matrix) &&
            !is_kept(fq_checkpoint_matrix(job->checkpoint, matrix))) {
            for (enum part part = PART_PACKED; part <= PART_SHAPE; part++)
                if ((rc = plan_part(job, tensor, matrix, part, err)) < 0)
                    return rc;
            job->quantizable++;
        } else {
            job->plan[job->count++] = (struct planned){.tensor = *tensor, .source = tensor};
        }
        for (size_t i = first; i < job->count; i++)
            bytes += job->plan[i].tensor.bytes;
        if (filled > 0 && filled + bytes > job->options->shard_bytes) {
            job->shards++;
            filled = 0;
        }
        filled += bytes;
        for (size_t i = first; i < job->count; i++)
            job->plan[i].shard = job->shards;
        job->summary->tensors_before += tensor->bytes;
        job->summary->tensors_after += bytes;
    }
    job->shards++;
    qsort(job->plan, job->count, sizeof *job->plan, by_place);
    return 0;
}

/* ---- the data ----------------------------------------------------------------------------- */

static void shard_name(const struct job *job, size_t shard, char name[64]) {
    if (job->shards == 1)
        snprintf(name, 64, FQ_SINGLE_FILE);
    else
        snprintf(name, 64, "model-%05zu-of-%05zu.safetensors", shard + 1, job->shards);
}

static int tell(struct job *job, const struct fq_quantized_layer *layer, struct fq_error *err) {
    job->done++;
    if (job->options->progress &&
        job->options->progress(job->options->context, layer, job->done,
                               fq_checkpoint_matrix_count(job->checkpoint)) != 0)
        return fq_fail(err, FQ_CANCELLED, "stopped after %zu of %zu layers", job->done,
                       fq_checkpoint_matrix_count(job->checkpoint));
    return 0;
}

/* Quantizes matrix i and writes its three tensors, wherever in [first, end) they are. */
static int write_matrix(struct job *job, struct fq_safetensors_writer *writer, size_t i,
                        size_t first, size_t end, struct fq_error *err) {
    const struct fq_checkpoint_matrix *described = fq_checkpoint_matrix(job->checkpoint, i);
    struct fq_loaded_matrix loaded;
    struct fq_quantized_layer layer = {.name = described->name};
    struct fq_dense dense;
    int rc = fq_checkpoint_load(job->checkpoint, i, &loaded, err);

    if (rc < 0)
        return rc;
    for (size_t p = first; p < end && rc == 0; p++) {
        const struct planned *planned = &job->plan[p];
        int64_t shape[2] = {loaded.matrix.n, loaded.matrix.k}; /* little-endian, as x86 and arm */
        const void *data = planned->part == PART_PACKED  ? loaded.matrix.codes
                           : planned->part == PART_SCALE ? loaded.matrix.scales
                                                         : shape;

        if (planned->part == PART_WHOLE || planned->matrix != i)
            continue;
        rc = fq_safetensors_write(writer, p - first, data, planned->tensor.bytes, err);
        layer.bytes_after += planned->tensor.bytes;
    }
    if (rc == 0 && fq_checkpoint_dense(job->checkpoint, i, &dense) == 0) {
        layer.n = loaded.matrix.n;
        layer.k = loaded.matrix.k;
        layer.bits = loaded.matrix.bits;
        layer.group = loaded.matrix.group;
        layer.bytes_before = described->stored;
        layer.error = fq_quantize_error(&dense, &loaded.matrix);
        job->summary->weights += layer.n * layer.k;
        job->summary->bytes_before += layer.bytes_before;
        job->summary->bytes_after += layer.bytes_after;
        rc = tell(job, &layer, err);
    }
    fq_loaded_matrix_fini(&loaded);
    fq_checkpoint_drop(job->checkpoint, i);
    return rc;
}

static int write_shard(struct job *job, size_t shard, size_t first, size_t end,
                       struct fq_error *err) {
    struct fq_checkpoint_tensor *tensors = calloc(end - first + 1, sizeof *tensors);
    struct fq_safetensors_writer *writer = NULL;
    char name[64];
    int rc;

    if (!tensors)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for %zu tensors", end - first);
    for (size_t p = first; p < end; p++)
        tensors[p - first] = job->plan[p].tensor;
    shard_name(job, shard, name);
    rc = fq_safetensors_writer_new(job->output.fd, name, tensors, end - first, &writer, err);
    for (size_t p = first; p < end && rc == 0; p++) {
        const struct planned *planned = &job->plan[p];

        if (planned->part == PART_PACKED)
            rc = write_matrix(job, writer, planned->matrix, first, end, err);
        if (planned->part != PART_WHOLE)
            continue;
        rc = fq_safetensors_write(writer, p - first, planned->source->data, planned->source->bytes,
                                  err);
        fq_checkpoint_drop_tensor(planned->source);
    }
    if (rc == 0)
        rc = fq_safetensors_writer_finish(writer, err);
    fq_safetensors_writer_free(writer);
    free(tensors);
    return rc;
}

static int write_shards(struct job *job, struct fq_error *err) {
    size_t first = 0;
    int rc = 0;

    for (size_t shard = 0; shard < job->shards && rc == 0; shard++) {
        size_t end = first;

        while (end < job->count && job->plan[end].shard == shard)
            end++;
        rc = write_shard(job, shard, first, end, err);
        first = end;
    }
    return rc;
}

static int report_kept(struct job *job, struct fq_error *err) {
    int rc = 0;

    for (size_t i = 0; i < fq_checkpoint_matrix_count(job->checkpoint) && rc == 0; i++) {
        const struct fq_checkpoint_matrix *matrix = fq_checkpoint_matrix(job->checkpoint, i);
        struct fq_quantized_layer layer = {.name = matrix->name,
                                           .n = matrix->matrix.n,
                                           .k = matrix->matrix.k,
                                           .kept_dense = true,
                                           .bytes_before = matrix->stored,
                                           .bytes_after = matrix->stored};

        if (!is_kept(matrix))
            continue;
        job->summary->kept_dense++;
        rc = tell(job, &layer, err);
    }
    return rc;
}

/* ---- index and config.json ---------------------------------------------------------------- */

static int write_index(struct job *job, struct fq_error *err) {
    json_t *map = json_object();
    json_t *index;
    int rc;

    for (size_t p = 0; p < job->count; p++) {
        char name[64];

        shard_name(job, job->plan[p].shard, name);
        json_object_set_new(map, job->plan[p].tensor.name, json_string(name));
    }
    index = json_pack("{s:{s:I}, s:o}", "metadata", "total_size",
                      (json_int_t)job->summary->tensors_after, "weight_map", map);
    if (!index)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for the index");
    rc = fq_output_directory_json(&job->output, FQ_INDEX_FILE, index, err);
    json_decref(index);
    return rc;
}

/* Per channel where the group does not fit: then the readers need not divide K by it. */
static int64_t written_group(const struct fq_checkpoint_matrix *matrix) {
    return matrix->matrix.group == matrix->matrix.k ? 0 : matrix->matrix.group;
}

static json_t *config_group(int bits, int64_t group, json_t *targets) {
    return json_pack("{s:o, s:{s:i, s:s, s:b, s:s, s:o, s:b, s:n}, s:n, s:n, s:s}", "targets",
                     targets, "weights", "num_bits", bits, "type", "int", "symmetric", 1,
                     "strategy", group ? "group" : "channel", "group_size",
                     group ? json_integer(group) : json_null(), "dynamic", 0, "actorder",
                     "input_activations", "output_activations", "format", "pack-quantized");
}

/*
 * One group for the class "Linear" with the group size that was asked for; where K is not longer
 * than it, a second one, by name, says "channel".  Names go before classes with every reader.
 */
static json_t *config_groups(const struct job *job) {
    json_t *groups = json_object(), *short_rows = json_array();
    size_t long_rows = 0;

    for (size_t i = 0; i < fq_checkpoint_matrix_count(job->checkpoint); i++) {
        const struct fq_checkpoint_matrix *matrix = fq_checkpoint_matrix(job->checkpoint, i);

        if (is_kept(matrix))
            continue;
        if (job->options->group != 0 && written_group(matrix) == 0)
            json_array_append_new(short_rows, json_string(matrix->name));
        else
            long_rows++;
    }
    if (long_rows > 0)
        json_object_set_new(
            groups, "group_0",
            config_group(job->options->bits, job->options->group, json_pack("[s]", "Linear")));
    if (json_array_size(short_rows) > 0)
        json_object_set_new(groups, long_rows > 0 ? "group_1" : "group_0",
                            config_group(job->options->bits, 0, json_incref(short_rows)));
    json_decref(short_rows);
    return groups;
}

/* Every module with a two-dimensional weight that stays dense, and lm_head, which a tied
 * embedding hides from the file. */
static json_t *ignore_list(const struct job *job) {
    json_t *ignore = json_pack("[s]", "lm_head");

    for (size_t t = 0; t < fq_checkpoint_tensor_count(job->checkpoint); t++) {
        const struct fq_checkpoint_tensor *tensor = fq_checkpoint_tensor(job->checkpoint, t);
        size_t length = strlen(tensor->name), cut = strlen(".weight"), matrix;

        if (tensor->rank != 2 || length <= cut ||
            strcmp(tensor->name + length - cut, ".weight") != 0 ||
            strcmp(tensor->name, "lm_head.weight") == 0)
            continue;
        if (!find_matrix(job, tensor, &matrix) ||
            is_kept(fq_checkpoint_matrix(job->checkpoint, matrix)))
            json_array_append_new(ignore, json_stringn(tensor->name, length - cut));
    }
    return ignore;
}

static int write_config(struct job *job, const char *in, struct fq_error *err) {
    json_t *config = NULL, *quantization;
    int dirfd = open(in, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int rc = dirfd < 0 ? fq_fail_errno(err, "%.200s", in)
                       : fq_directory_json(dirfd, FQ_CONFIG_FILE, &config, err);

    if (dirfd >= 0)
        close(dirfd);
    if (rc == -FQ_NOT_FOUND && dirfd >= 0)
        config = json_object(); /* bare weights */
    else if (rc < 0)
        return rc;
    quantization = json_pack(
        "{s:s, s:s, s:s, s:o, s:o, s:n, s:n}", "quant_method", "compressed-tensors", "format",
        "pack-quantized", "quantization_status", "compressed", "config_groups", config_groups(job),
        "ignore", ignore_list(job), "kv_cache_scheme", "global_compression_ratio");
    if (!quantization || json_object_set_new(config, "quantization_config", quantization) < 0)
        rc = fq_fail(err, FQ_NO_MEMORY, "no memory for " FQ_CONFIG_FILE);
    else
        rc = fq_output_directory_json(&job->output, FQ_CONFIG_FILE, config, err);
    json_decref(config);
    return rc;
}

/* ---- all of it ---------------------------------------------------------------------------- */

static int open_input(struct job *job, const char *in, struct fq_error *err) {
    int rc = fq_checkpoint_new(in, &job->checkpoint, err);

    if (rc < 0)
        return rc;
    if ((rc = fq_checkpoint_quantize_as(job->checkpoint, job->options->bits, job->options->group,
                                        err)) < 0)
        return rc;
    job->summary->layers = fq_checkpoint_matrix_count(job->checkpoint);
    if (job->summary->layers == 0)
        return fq_fail(err, FQ_INVALID, "%.200s: no linear layer with an F32, F16 or BF16 weight",
                       in);
    for (size_t i = 0; i < job->summary->layers; i++)
        if (!fq_checkpoint_matrix(job->checkpoint, i)->dense)
            return fq_fail(err, FQ_INVALID, "%.200s: already quantized ('%.200s')", in,
                           fq_checkpoint_matrix(job->checkpoint, i)->name);
    return 0;
}

int fq_quantize_checkpoint(const char *in, const char *out,
                           const struct fq_quantize_options *options,
                           struct fq_quantize_summary *summary, struct fq_error *err) {
    struct job job = {.options = options, .summary = summary};
    int rc;

    *summary = (struct fq_quantize_summary){0};
    if ((rc = fq_output_directory_init(&job.output, out, err)) < 0)
        return rc;
    if ((rc = open_input(&job, in, err)) < 0 || (rc = make_plan(&job, err)) < 0 ||
        (rc = report_kept(&job, err)) < 0 || (rc = write_shards(&job, err)) < 0 ||
        (job.shards > 1 && (rc = write_index(&job, err)) < 0) ||
        (rc = write_config(&job, in, err)) < 0 ||
        (rc = fq_output_directory_copy(&job.output, in, err)) < 0)
        goto out;
    if (job.quantizable == 0)
        rc = fq_fail(err, FQ_UNSUPPORTED, "%.200s: no layer can be packed with %d bits", in,
                     options->bits);
    else
        rc = fq_output_directory_commit(&job.output, err);
out:
    for (size_t p = 0; p < job.count; p++)
        if (job.plan[p].part != PART_WHOLE)
            free((char *)job.plan[p].tensor.name);
    free(job.plan);
    fq_checkpoint_free(job.checkpoint);
    fq_output_directory_fini(&job.output);
    return rc;
}
