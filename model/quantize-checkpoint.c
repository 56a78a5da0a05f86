/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Quantizing a directory.  First the plan: the matrices, their schemes, and so
 * every tensor of the output with its shape and shard.  Then the data, shard by
 * shard and matrix by matrix, dropping each from memory once it is written.
 * Last the index, config.json and the files beside.
 *
 * The partial directory begins with a state file: what was asked of which files,
 * and the schemes that were chosen.  A later run that asks the same takes the
 * schemes and every shard that has its final name, which a shard gets once it is
 * synced.
 */
#include "quantize-checkpoint.h"

#include "compressed-tensors.h"
#include "directory.h"
#include "output-directory.h"
#include "quantize-plan.h"
#include "safetensors.h"

#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum part {
    PART_WHOLE, /* a tensor as it is */
    PART_DENSE, /* a matrix that stays dense */
    PART_PACKED,
    PART_SCALE,
    PART_SHAPE,
    PART_ZERO
};

/* One tensor of the output. */
struct planned {
    struct fq_checkpoint_tensor tensor; /* name owned where part is not PART_WHOLE */
    const struct fq_checkpoint_tensor *source;
    enum part part;
    size_t matrix; /* index in the plan, unless PART_WHOLE */
    size_t shard;
};

struct job {
    const struct fq_quantize_options *options;
    struct fq_quantize_summary *summary;
    struct fq_plan plan;
    struct fq_output_directory output;
    struct planned *planned; /* by shard, then by item size and name */
    size_t count, shards, layers_done;
    uint64_t bytes_done;
};

/* ---- the tensors -------------------------------------------------------------------------- */

static int plan_part(struct job *job, size_t m, enum part part, struct fq_error *err) {
    static const char *const suffixes[] = {[PART_DENSE] = ".weight",
                                           [PART_PACKED] = ".weight_packed",
                                           [PART_SCALE] = ".weight_scale",
                                           [PART_SHAPE] = ".weight_shape",
                                           [PART_ZERO] = ".weight_zero_point"};
    const struct fq_plan_matrix *matrix = &job->plan.matrices[m];
    const struct fq_matrix scheme = fq_plan_scheme(matrix);
    struct planned *planned = &job->planned[job->count];
    struct fq_checkpoint_tensor *tensor = &planned->tensor;
    char *name;

    *planned = (struct planned){.source = matrix->source, .part = part, .matrix = m};
    tensor->rank = 2;
    tensor->shape[0] = matrix->dense.n;
    switch (part) {
    case PART_PACKED:
        tensor->dtype = "I32";
        tensor->shape[1] = fq_matrix_row_bytes(&scheme) / 4;
        break;
    case PART_SCALE:
        tensor->dtype = "F16";
        tensor->shape[1] = fq_matrix_groups(&scheme);
        break;
    case PART_ZERO:
        tensor->dtype = "I32";
        tensor->shape[0] = (matrix->dense.n * matrix->bits + 31) / 32;
        tensor->shape[1] = fq_matrix_groups(&scheme);
        break;
    case PART_SHAPE:
        tensor->dtype = "I64";
        tensor->rank = 1;
        tensor->shape[0] = 2;
        tensor->shape[1] = 1;
        break;
    default:
        tensor->dtype = matrix->source->dtype;
        tensor->shape[1] = matrix->dense.k;
    }
    tensor->bytes = fq_safetensors_dtype_size(tensor->dtype) * (uint64_t)tensor->shape[0] *
                    (uint64_t)tensor->shape[1];
    if (asprintf(&name, "%s%s", matrix->name, suffixes[part]) < 0)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for tensor names");
    tensor->name = name;
    job->count++;
    return 0;
}

static int plan_matrix(struct job *job, size_t m, struct fq_error *err) {
    const struct fq_plan_matrix *matrix = &job->plan.matrices[m];
    int rc;

    if (matrix->kept_dense)
        return plan_part(job, m, PART_DENSE, err);
    if ((rc = plan_part(job, m, PART_PACKED, err)) < 0 ||
        (rc = plan_part(job, m, PART_SCALE, err)) < 0 ||
        (rc = plan_part(job, m, PART_SHAPE, err)) < 0)
        return rc;
    return matrix->asymmetric ? plan_part(job, m, PART_ZERO, err) : 0;
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

/* Puts what was planned from FIRST on, which belongs together, into the shard or a new one. */
static void place(struct job *job, size_t first, uint64_t *filled) {
    uint64_t bytes = 0;

    for (size_t i = first; i < job->count; i++)
        bytes += job->planned[i].tensor.bytes;
    if (*filled > 0 && *filled + bytes > job->options->shard_bytes) {
        job->shards++;
        *filled = 0;
    }
    *filled += bytes;
    for (size_t i = first; i < job->count; i++)
        job->planned[i].shard = job->shards;
    job->summary->tensors_after += bytes;
}

static int plan_tensors(struct job *job, struct fq_error *err) {
    const struct fq_checkpoint *checkpoint = job->plan.checkpoint;
    size_t tensors = fq_checkpoint_tensor_count(checkpoint);
    uint64_t filled = 0;
    int rc;

    job->planned = calloc(tensors + 4 * job->plan.count + 1, sizeof *job->planned);
    if (!job->planned)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for %zu tensors", tensors);
    for (size_t t = 0; t < tensors; t++) {
        const struct fq_checkpoint_tensor *tensor = fq_checkpoint_tensor(checkpoint, t);
        size_t first, count = fq_plan_of_tensor(&job->plan, tensor, &first), kept = 0;

        job->summary->tensors_before += tensor->bytes;
        for (size_t m = first; m < first + count; m++)
            kept += job->plan.matrices[m].kept_dense;
        if (kept == count) { /* nothing to do, or nothing that can be done */
            job->planned[job->count++] = (struct planned){.tensor = *tensor, .source = tensor};
            place(job, job->count - 1, &filled);
            continue;
        }
        for (size_t m = first; m < first + count; m++) {
            size_t begin = job->count;

            if ((rc = plan_matrix(job, m, err)) < 0)
                return rc;
            place(job, begin, &filled);
        }
    }
    job->shards++;
    job->summary->shards = job->shards;
    qsort(job->planned, job->count, sizeof *job->planned, by_place);
    return 0;
}

static void count_layers(struct job *job) {
    struct fq_quantize_summary *summary = job->summary;

    for (size_t m = 0; m < job->plan.count; m++) {
        const struct fq_plan_matrix *matrix = &job->plan.matrices[m];
        int64_t group = fq_plan_scheme(matrix).group;

        summary->layers++;
        summary->kept_dense += matrix->kept_dense;
        if (matrix->kept_dense)
            continue;
        summary->asymmetric += matrix->asymmetric;
        summary->uneven += matrix->dense.k % group != 0;
        summary->weights += matrix->dense.n * matrix->dense.k;
        summary->bytes_before += matrix->bytes;
        summary->bytes_after +=
            fq_plan_bytes(matrix, matrix->bits, matrix->group, matrix->asymmetric);
    }
}

/* ---- the data ----------------------------------------------------------------------------- */

static void shard_name(const struct job *job, size_t shard, char name[64]) {
    if (job->shards == 1)
        snprintf(name, 64, FQ_SINGLE_FILE);
    else
        snprintf(name, 64, "model-%05zu-of-%05zu.safetensors", shard + 1, job->shards);
}

static struct fq_quantized_layer describe(const struct fq_plan_matrix *matrix) {
    struct fq_matrix scheme = fq_plan_scheme(matrix);
    struct fq_quantized_layer layer = {.name = matrix->name,
                                       .n = matrix->dense.n,
                                       .k = matrix->dense.k,
                                       .kept_dense = matrix->kept_dense,
                                       .bytes_before = matrix->bytes,
                                       .bytes_after = matrix->bytes};

    if (matrix->kept_dense)
        return layer;
    layer.bits = matrix->bits;
    layer.group = scheme.group;
    layer.asymmetric = matrix->asymmetric;
    layer.bytes_after = fq_plan_bytes(matrix, matrix->bits, matrix->group, matrix->asymmetric);
    layer.error = matrix->expected;
    return layer;
}

/* BYTES more of the input are done; LAYER, unless NULL, with them. */
static int tell(struct job *job, uint64_t bytes, const struct fq_quantized_layer *layer,
                struct fq_error *err) {
    struct fq_quantize_progress progress = {.phase = FQ_QUANTIZE_WRITE,
                                            .bytes_total = job->summary->tensors_before,
                                            .layers = job->plan.count,
                                            .layer = layer};

    job->bytes_done += bytes;
    job->layers_done += layer != NULL;
    progress.bytes_done = job->bytes_done;
    progress.layers_done = job->layers_done;
    if (job->options->progress && job->options->progress(job->options->context, &progress) != 0)
        return fq_fail(err, FQ_CANCELLED, "stopped after %zu of %zu layers", job->layers_done,
                       job->plan.count);
    return 0;
}

/* Zero points [N, G], a code a byte, as the layout has them: packed along N. */
static void *pack_zeros(const struct fq_matrix *matrix, uint64_t bytes) {
    int64_t groups = fq_matrix_groups(matrix);
    uint8_t *packed = calloc(1, bytes + 1);

    for (int64_t n = 0; packed && n < matrix->n; n++) {
        int64_t bit = n * matrix->bits, word = bit / 32;

        for (int64_t g = 0; g < groups; g++) {
            uint64_t spread = (uint64_t)matrix->zeros[n * groups + g] << bit % 32;

            for (int byte = 0; byte < 8 && spread >> (8 * byte); byte++)
                packed[((word + byte / 4) * groups + g) * 4 + byte % 4] |=
                    (uint8_t)(spread >> (8 * byte));
        }
    }
    return packed;
}

/* Starts reading what is next while this is computed. */
static void read_ahead(const struct job *job, size_t m) {
    const struct fq_plan_matrix *matrix = &job->plan.matrices[m];
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t begin = (uintptr_t)matrix->dense.data / page * page;

    madvise((void *)begin, (uintptr_t)matrix->dense.data + matrix->bytes - begin, MADV_WILLNEED);
}

/* Quantizes matrix m and writes its tensors, wherever in [first, end) they are. */
static int write_matrix(struct job *job, struct fq_safetensors_writer *writer, size_t m,
                        size_t first, size_t end, struct fq_error *err) {
    const struct fq_plan_matrix *matrix = &job->plan.matrices[m];
    struct fq_quantized_layer layer = describe(matrix);
    struct fq_quantize_method method = job->options->method;
    struct fq_matrix quantized = fq_plan_scheme(matrix);
    void *storage = NULL;
    int rc;

    method.asymmetric = matrix->asymmetric;
    if (m + 1 < job->plan.count)
        read_ahead(job, m + 1);
    rc = fq_quantize(&matrix->dense, &method, &quantized, &storage, &layer.error, err);
    if (rc < 0)
        fq_fail_in(err, "%s: tensor '%.200s'", matrix->source->file, matrix->source->name);
    fq_plan_drop(matrix);
    for (size_t p = first; p < end && rc == 0; p++) {
        const struct planned *planned = &job->planned[p];
        int64_t shape[2] = {matrix->dense.n, matrix->dense.k}; /* little-endian, as x86 and arm */
        void *zeros = NULL;
        const void *data;

        if (planned->part == PART_WHOLE || planned->matrix != m)
            continue;
        if (planned->part == PART_ZERO && !(zeros = pack_zeros(&quantized, planned->tensor.bytes)))
            rc = fq_fail(err, FQ_NO_MEMORY, "no memory for the zero points of '%.200s'",
                         matrix->name);
        data = planned->part == PART_PACKED  ? quantized.codes
               : planned->part == PART_SCALE ? quantized.scales
               : planned->part == PART_ZERO  ? zeros
                                             : shape;
        if (rc == 0)
            rc = fq_safetensors_write(writer, p - first, data, planned->tensor.bytes, err);
        free(zeros);
    }
    free(storage);
    job->summary->error += layer.error;
    job->summary->read += matrix->bytes;
    return rc < 0 ? rc : tell(job, matrix->bytes, &layer, err);
}

/* A tensor or a matrix as it is. */
static int write_dense(struct job *job, struct fq_safetensors_writer *writer, size_t p,
                       size_t first, struct fq_error *err) {
    const struct planned *planned = &job->planned[p];
    bool whole = planned->part == PART_WHOLE;
    const void *data =
        whole ? planned->source->data : job->plan.matrices[planned->matrix].dense.data;
    int rc = fq_safetensors_write(writer, p - first, data, planned->tensor.bytes, err);

    if (whole)
        fq_checkpoint_drop_tensor(planned->source);
    else
        fq_plan_drop(&job->plan.matrices[planned->matrix]);
    job->summary->read += planned->tensor.bytes;
    return rc < 0 ? rc : tell(job, planned->tensor.bytes, NULL, err);
}

static int write_shard(struct job *job, const char *name, size_t first, size_t end,
                       struct fq_error *err) {
    struct fq_checkpoint_tensor *tensors = calloc(end - first + 1, sizeof *tensors);
    struct fq_safetensors_writer *writer = NULL;
    int rc;

    if (!tensors)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for %zu tensors", end - first);
    for (size_t p = first; p < end; p++)
        tensors[p - first] = job->planned[p].tensor;
    rc = fq_safetensors_writer_new(job->output.fd, name, tensors, end - first, &writer, err);
    for (size_t p = first; p < end && rc == 0; p++) {
        const struct planned *planned = &job->planned[p];

        if (planned->part == PART_PACKED)
            rc = write_matrix(job, writer, planned->matrix, first, end, err);
        else if (planned->part == PART_WHOLE || planned->part == PART_DENSE)
            rc = write_dense(job, writer, p, first, err);
    }
    if (rc == 0)
        rc = fq_safetensors_writer_finish(writer, err);
    fq_safetensors_writer_free(writer);
    free(tensors);
    return rc;
}

/* A shard that an earlier run finished: its layers count as done. */
static int skip_shard(struct job *job, size_t first, size_t end, struct fq_error *err) {
    uint64_t bytes = 0;

    for (size_t p = first; p < end; p++) {
        const struct planned *planned = &job->planned[p];

        if (planned->part == PART_PACKED) {
            bytes += job->plan.matrices[planned->matrix].bytes;
            job->layers_done++;
        } else if (planned->part == PART_WHOLE || planned->part == PART_DENSE) {
            bytes += planned->tensor.bytes;
        }
    }
    job->summary->shards_kept++;
    return tell(job, bytes, NULL, err);
}

static int write_shards(struct job *job, struct fq_error *err) {
    size_t first = 0;
    int rc = 0;

    for (size_t shard = 0; shard < job->shards && rc == 0; shard++) {
        size_t end = first;
        char name[64];

        while (end < job->count && job->planned[end].shard == shard)
            end++;
        shard_name(job, shard, name);
        rc = faccessat(job->output.fd, name, F_OK, 0) == 0
                 ? skip_shard(job, first, end, err)
                 : write_shard(job, name, first, end, err);
        first = end;
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

        shard_name(job, job->planned[p].shard, name);
        json_object_set_new(map, job->planned[p].tensor.name, json_string(name));
    }
    index = json_pack("{s:{s:I}, s:o}", "metadata", "total_size",
                      (json_int_t)job->summary->tensors_after, "weight_map", map);
    if (!index)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for the index");
    rc = fq_output_directory_json(&job->output, FQ_INDEX_FILE, index, err);
    json_decref(index);
    return rc;
}

static int write_config(struct job *job, struct fq_error *err) {
    json_t *config = fq_plan_config(&job->plan);
    int rc = config ? fq_output_directory_json(&job->output, FQ_CONFIG_FILE, config, err)
                    : fq_fail(err, FQ_NO_MEMORY, "no memory for " FQ_CONFIG_FILE);

    json_decref(config);
    return rc;
}

/* ---- going on with an earlier run --------------------------------------------------------- */

/* What was asked, of which files: sizes and times stand for their contents.  NULL without memory.
 */
static json_t *fingerprint(const struct job *job, const char *in) {
    const struct fq_quantize_options *options = job->options;
    json_t *rules = json_array(), *files = json_object();
    const char *last = "";

    for (size_t i = 0; i < options->rule_count; i++)
        json_array_append_new(rules, json_pack("[i, s, i, I]", (int)options->rules[i].kind,
                                               options->rules[i].pattern, options->rules[i].bits,
                                               (json_int_t)options->rules[i].group));
    for (size_t t = 0; t < fq_checkpoint_tensor_count(job->plan.checkpoint); t++) {
        const char *file = fq_checkpoint_tensor(job->plan.checkpoint, t)->file;
        struct stat status = {0};
        char *path;

        if (strcmp(file, last) == 0 || json_object_get(files, file))
            continue;
        last = file;
        if (asprintf(&path, "%s/%s", in, file) >= 0) {
            stat(path, &status);
            free(path);
        }
        json_object_set_new(files, file,
                            json_pack("[I, I, I]", (json_int_t)status.st_size,
                                      (json_int_t)status.st_mtim.tv_sec,
                                      (json_int_t)status.st_mtim.tv_nsec));
    }
    return json_pack(
        "{s:i, s:I, s:I, s:f, s:i, s:b, s:b, s:I, s:f, s:I, s:o, s:o}", "bits", options->bits,
        "group", (json_int_t)options->group, "min_group", (json_int_t)options->min_group, "alpha",
        options->alpha, "scale", (int)options->method.scale, "asymmetric",
        options->method.asymmetric, "allow_nonfinite", options->method.allow_nonfinite, "budget",
        (json_int_t)options->budget, "bits_per_weight", options->bits_per_weight, "shard_bytes",
        (json_int_t)options->shard_bytes, "rules", rules, "files", files);
}

/* Takes up the earlier run's choices; false, and an empty directory, where it asked otherwise. */
static bool resume(struct job *job, const json_t *asked) {
    json_t *state = NULL;
    bool same = job->output.found &&
                fq_directory_json(job->output.fd, FQ_OUTPUT_STATE_FILE, &state, NULL) == 0 &&
                json_equal(json_object_get(state, "asked"), asked) &&
                fq_plan_take_choices(&job->plan, json_object_get(state, "choices")) == 0;

    json_decref(state);
    if (!same)
        fq_output_directory_clear(&job->output);
    return same;
}

static int decide(struct job *job, const char *in, struct fq_error *err) {
    json_t *asked = fingerprint(job, in), *state;
    int rc;

    if (!asked)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for the plan");
    if (job->options->dry_run || !resume(job, asked)) {
        rc = fq_plan_decide(&job->plan, job->summary, err);
        if (rc < 0 || job->options->dry_run)
            goto out;
        state = json_pack("{s:O, s:o}", "asked", asked, "choices", fq_plan_choices(&job->plan));
        rc = state ? fq_output_directory_json(&job->output, FQ_OUTPUT_STATE_FILE, state, err)
                   : fq_fail(err, FQ_NO_MEMORY, "no memory for the plan");
        json_decref(state);
    } else {
        rc = 0;
    }
out:
    json_decref(asked);
    return rc;
}

/* ---- all of it ---------------------------------------------------------------------------- */

/* Layers that stay dense, and in a dry run all of them. */
static int report_layers(struct job *job, struct fq_error *err) {
    int rc = 0;

    for (size_t m = 0; m < job->plan.count && rc == 0; m++) {
        struct fq_quantized_layer layer = describe(&job->plan.matrices[m]);

        if (job->options->dry_run || layer.kept_dense)
            rc = tell(job, 0, &layer, err);
    }
    return rc;
}

static int write_all(struct job *job, const char *in, struct fq_error *err) {
    int rc;

    if ((rc = write_shards(job, err)) < 0 ||
        (job->shards > 1 && (rc = write_index(job, err)) < 0) ||
        (rc = write_config(job, err)) < 0 ||
        (rc = fq_output_directory_copy(&job->output, in, err)) < 0)
        return rc;
    return fq_output_directory_commit(&job->output, err);
}

int fq_quantize_checkpoint(const char *in, const char *out,
                           const struct fq_quantize_options *options,
                           struct fq_quantize_summary *summary, struct fq_error *err) {
    struct job job = {.options = options, .summary = summary, .output = {.parentfd = -1, .fd = -1}};
    int rc;

    *summary = (struct fq_quantize_summary){0};
    if (!options->dry_run && (rc = fq_output_directory_init(&job.output, out, err)) < 0)
        return rc;
    if ((rc = fq_plan_init(&job.plan, in, options, err)) < 0 || (rc = decide(&job, in, err)) < 0 ||
        (rc = plan_tensors(&job, err)) < 0)
        goto out;
    count_layers(&job);
    if (summary->kept_dense == summary->layers)
        rc = fq_fail(err, FQ_UNSUPPORTED, "%.200s: no layer can be packed with %d bits", in,
                     options->bits);
    if (rc == 0)
        rc = report_layers(&job, err);
    if (rc == 0 && !options->dry_run)
        rc = write_all(&job, in, err);
out:
    job.output.keep = job.output.keep || rc == -FQ_CANCELLED;
    for (size_t p = 0; p < job.count; p++)
        if (job.planned[p].part != PART_WHOLE)
            free((char *)job.planned[p].tensor.name);
    free(job.planned);
    fq_plan_fini(&job.plan);
    fq_output_directory_fini(&job.output);
    return rc;
}
