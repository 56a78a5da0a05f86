/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Quantizing a directory.  First the plan: the matrices, their schemes, and so
 * every tensor of the output with its shape and shard.  Then the data, shard by
 * shard and matrix by matrix, dropping each from memory once it is written.
 * Last the index, config.json and the files beside.
 *
 * The partial directory begins with a state file: what was asked of which files,
 * and the schemes that were chosen, or until they are what was measured for them.
 * A later run that asks the same takes that, and every shard that has its final
 * name, which a shard gets once it is synced.
 */
#include "quantize-checkpoint.h"

#include "compressed-tensors-output.h"
#include "directory.h"
#include "half.h"
#include "output-directory.h"
#include "quantize-plan.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* One step: a matrix, or what is copied. */
struct step {
    const struct fq_checkpoint_tensor *copied; /* a tensor as it is, or NULL */
    size_t matrix;                             /* index in the plan, where nothing is copied */
    size_t first;                              /* number of its first tensor in the output */
};

struct job {
    const struct fq_quantize_options *options;
    struct fq_quantize_summary *summary;
    struct fq_plan plan;
    struct fq_output_directory output;
    struct fq_checkpoint_writer *writer;
    struct step *steps; /* in the order of the output's tensors */
    size_t count, layers_done;
    uint64_t bytes_done, bytes_kept; /* kept: of those done, by an earlier run */
};

/* ---- the tensors -------------------------------------------------------------------------- */

/* A matrix that stays dense though others of its tensor do not. */
static int add_dense(struct job *job, const struct fq_plan_matrix *matrix, struct fq_error *err) {
    struct fq_checkpoint_tensor tensor = {.dtype = matrix->source->dtype,
                                          .rank = 2,
                                          .shape = {matrix->dense.n, matrix->dense.k},
                                          .bytes = matrix->bytes};
    char *name;
    int rc;

    if (asprintf(&name, "%s.weight", matrix->name) < 0)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for tensor names");
    tensor.name = name;
    rc = fq_checkpoint_writer_add(job->writer, &tensor, 1, err);
    free(name);
    return rc;
}

static int add_matrix(struct job *job, size_t m, size_t *next, struct fq_error *err) {
    const struct fq_plan_matrix *matrix = &job->plan.matrices[m];
    struct fq_checkpoint_matrix described = fq_plan_describe(matrix);
    size_t made = 1;
    int rc = matrix->kept_dense ? add_dense(job, matrix, err)
                                : fq_ct_output_add(job->writer, &described, &made, err);

    job->steps[job->count++] = (struct step){.matrix = m, .first = *next};
    *next += made;
    return rc;
}

static int plan_tensors(struct job *job, struct fq_error *err) {
    const struct fq_checkpoint *checkpoint = job->plan.checkpoint;
    size_t tensors = fq_checkpoint_tensor_count(checkpoint), next = 0;
    int rc = fq_checkpoint_writer_new(&job->output, job->options->shard_bytes, &job->writer, err);

    if (rc < 0)
        return rc;
    job->steps = calloc(tensors + job->plan.count + 1, sizeof *job->steps);
    if (!job->steps)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for %zu tensors", tensors);
    for (size_t t = 0; t < tensors && rc == 0; t++) {
        const struct fq_checkpoint_tensor *tensor = fq_checkpoint_tensor(checkpoint, t);
        size_t first, count = fq_plan_of_tensor(&job->plan, tensor, &first), kept = 0;

        job->summary->tensors_before += tensor->bytes;
        for (size_t m = first; m < first + count; m++)
            kept += job->plan.matrices[m].kept_dense;
        if (kept == count) { /* nothing to do, or nothing that can be done */
            job->steps[job->count++] = (struct step){.copied = tensor, .first = next++};
            rc = fq_checkpoint_writer_add(job->writer, tensor, 1, err);
            continue;
        }
        for (size_t m = first; m < first + count && rc == 0; m++)
            rc = add_matrix(job, m, &next, err);
    }
    job->summary->tensors_after = fq_checkpoint_writer_bytes(job->writer);
    job->summary->shards = fq_checkpoint_writer_shards(job->writer, &job->summary->shards_kept);
    return rc;
}

static void count_layers(struct job *job) {
    struct fq_quantize_summary *summary = job->summary;

    summary->unsuited = job->plan.unsuited;
    for (size_t m = 0; m < job->plan.count; m++) {
        const struct fq_plan_matrix *matrix = &job->plan.matrices[m];
        int64_t group = fq_plan_describe(matrix).matrix.group;

        summary->layers++;
        summary->kept_dense += matrix->kept_dense;
        if (matrix->kept_dense)
            continue;
        summary->asymmetric += matrix->asymmetric;
        summary->uneven += matrix->dense.k % group != 0;
        summary->unusual += matrix->bits == 3 ||
                            (group < matrix->dense.k && group != 32 && group != 64 && group != 128);
        summary->weights += matrix->dense.n * matrix->dense.k;
        summary->bytes_before += matrix->bytes;
        summary->bytes_after +=
            fq_plan_bytes(matrix, matrix->bits, matrix->group, matrix->asymmetric);
    }
}

/* The schemes that --override fixes are no part of what a budget chooses, but of what it pays. */
static int check_budget(const struct job *job, struct fq_error *err) {
    const struct fq_quantize_options *options = job->options;
    const struct fq_quantize_summary *summary = job->summary;
    const double width = (double)summary->bytes_after * 8 / (double)summary->weights;

    if (options->budget > 0 && summary->tensors_after > options->budget)
        return fq_fail(err, FQ_INVALID,
                       "all tensors would take %" PRIu64 " bytes, the budget is %" PRIu64
                       ": --override leaves too little",
                       summary->tensors_after, options->budget);
    if (options->bits_per_weight > 0 && width > options->bits_per_weight * (1 + 1e-9))
        return fq_fail(err, FQ_INVALID,
                       "the weights would take %.3f bits each, the budget is %g: --override leaves "
                       "too little",
                       width, options->bits_per_weight);
    return 0;
}

/* ---- the data ----------------------------------------------------------------------------- */

static struct fq_quantized_layer describe(const struct fq_plan_matrix *matrix) {
    struct fq_matrix scheme = fq_plan_describe(matrix).matrix;
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
                                            .work_before = job->plan.looked,
                                            .work_a_byte = 1,
                                            .bytes_kept = job->bytes_kept,
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

/* What is to become of a matrix. */
static struct fq_quantize_method method_of(const struct job *job,
                                           const struct fq_plan_matrix *matrix) {
    struct fq_quantize_method method = job->options->method;

    method.asymmetric = matrix->asymmetric;
    return method;
}

static int write_matrix(struct job *job, const struct step *step, struct fq_error *err) {
    const struct fq_plan_matrix *matrix = &job->plan.matrices[step->matrix];
    struct fq_quantized_layer layer = describe(matrix);
    struct fq_quantize_method method = method_of(job, matrix);
    struct fq_matrix quantized = fq_plan_describe(matrix).matrix;
    void *storage = NULL;
    int rc;

    fq_plan_read_ahead(&job->plan, step->matrix + 1);
    rc = fq_quantize(&matrix->dense, &method, &quantized, &storage, &layer.error, err);
    if (rc < 0)
        fq_fail_in(err, "%s: tensor '%.200s'", matrix->source->file, matrix->source->name);
    fq_plan_drop(matrix);
    if (rc == 0)
        rc = fq_ct_output_write(job->writer, step->first, &quantized, err);
    free(storage);
    job->summary->error += layer.error;
    job->summary->poor += layer.error >= FQ_QUANTIZE_POOR;
    return rc < 0 ? rc : tell(job, matrix->bytes, &layer, err);
}

/*
 * NaN and infinities where weights are expected: a tensor's name ends in .weight or .bias.  A mask
 * may have infinities.
 */
static int check_finite(const struct job *job, const struct fq_checkpoint_tensor *tensor,
                        struct fq_error *err) {
    const char *last = strrchr(tensor->name, '.');
    const int type = strcmp(tensor->dtype, "F32") == 0    ? FQ_F32
                     : strcmp(tensor->dtype, "F16") == 0  ? FQ_F16
                     : strcmp(tensor->dtype, "BF16") == 0 ? FQ_BF16
                                                          : 0;
    const uint64_t count = type ? tensor->bytes / (type == FQ_F32 ? 4 : 2) : 0;

    if (job->options->method.allow_nonfinite || !last ||
        (strcmp(last, ".weight") != 0 && strcmp(last, ".bias") != 0))
        return 0;
    for (uint64_t i = 0; i < count; i++) {
        const float value = fq_load(tensor->data, type, i);

        if (!isfinite(value))
            return fq_fail(err, FQ_INVALID,
                           "%.200s: tensor '%.200s': element %" PRIu64
                           " is %s; --allow-nonfinite copies the tensor as it is",
                           tensor->file, tensor->name, i, isnan(value) ? "NaN" : "infinite");
    }
    return 0;
}

/* A tensor or a matrix as it is. */
static int write_dense(struct job *job, const struct step *step, struct fq_error *err) {
    const struct fq_plan_matrix *matrix = &job->plan.matrices[step->matrix];
    const void *data = step->copied ? step->copied->data : matrix->dense.data;
    uint64_t bytes = step->copied ? step->copied->bytes : matrix->bytes;
    int rc = step->copied ? check_finite(job, step->copied, err) : 0;

    if (rc == 0)
        rc = fq_checkpoint_writer_write(job->writer, step->first, data, bytes, err);
    if (step->copied)
        fq_checkpoint_drop_tensor(step->copied);
    else
        fq_plan_drop(matrix);
    return rc < 0 ? rc : tell(job, bytes, NULL, err);
}

/* Looks for all that writing would stop at. */
static int check_matrix(struct job *job, const struct step *step, struct fq_error *err) {
    const struct fq_plan_matrix *matrix = &job->plan.matrices[step->matrix];
    const struct fq_quantized_layer layer = describe(matrix);
    const struct fq_quantize_method method = method_of(job, matrix);
    const struct fq_matrix scheme = fq_plan_describe(matrix).matrix;
    int rc;

    fq_plan_read_ahead(&job->plan, step->matrix + 1);
    rc = fq_quantize_check(&matrix->dense, &method, &scheme, err);
    fq_plan_drop(matrix);
    if (rc < 0)
        return fq_fail_in(err, "%s: tensor '%.200s'", matrix->source->file, matrix->source->name);
    return tell(job, matrix->bytes, &layer, err);
}

static int check_copied(struct job *job, const struct step *step, struct fq_error *err) {
    int rc = check_finite(job, step->copied, err);

    fq_checkpoint_drop_tensor(step->copied);
    return rc < 0 ? rc : tell(job, step->copied->bytes, NULL, err);
}

/* A dry run: every weight is looked at, as by the run that it stands for, and none written. */
static int check_steps(struct job *job, struct fq_error *err) {
    int rc = 0;

    for (size_t s = 0; s < job->count && rc == 0; s++) {
        const struct step *step = &job->steps[s];

        if (step->copied)
            rc = check_copied(job, step, err);
        else if (job->plan.matrices[step->matrix].kept_dense)
            rc = tell(job, job->plan.matrices[step->matrix].bytes, NULL, err);
        else
            rc = check_matrix(job, step, err);
    }
    return rc;
}

/* Its shard is there from an earlier run: it counts as done. */
static int skip(struct job *job, const struct step *step, struct fq_error *err) {
    const struct fq_plan_matrix *matrix = &job->plan.matrices[step->matrix];
    const uint64_t bytes = step->copied ? step->copied->bytes : matrix->bytes;

    job->layers_done += !step->copied && !matrix->kept_dense;
    job->bytes_kept += bytes;
    return tell(job, bytes, NULL, err);
}

static int write_steps(struct job *job, struct fq_error *err) {
    int rc = 0;

    for (size_t s = 0; s < job->count && rc == 0; s++) {
        const struct step *step = &job->steps[s];

        if (fq_checkpoint_writer_has(job->writer, step->first))
            rc = skip(job, step, err);
        else if (step->copied || job->plan.matrices[step->matrix].kept_dense)
            rc = write_dense(job, step, err);
        else
            rc = write_matrix(job, step, err);
    }
    return rc < 0 ? rc : fq_checkpoint_writer_finish(job->writer, err);
}

/* ---- config.json -------------------------------------------------------------------------- */

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

static json_t *make_config(const struct fq_plan *plan) {
    struct fq_ct_layer *packed = calloc(plan->count + 1, sizeof *packed);
    const json_t *before = fq_checkpoint_config(plan->checkpoint);
    json_t *config = before ? json_copy((json_t *)before) : json_object(); /* or bare weights */
    json_t *quantization = NULL;
    size_t count = 0;

    for (size_t m = 0; packed && m < plan->count; m++) {
        const struct fq_plan_matrix *matrix = &plan->matrices[m];

        if (matrix->kept_dense)
            continue;
        packed[count++] = (struct fq_ct_layer){
            .name = matrix->name,
            /* one a row is said so, also where K is shorter than a group */
            .scheme = {.bits = matrix->bits,
                       .group = matrix->group < matrix->dense.k ? matrix->group : 0,
                       .symmetric = !matrix->asymmetric}};
    }
    if (packed)
        quantization = fq_ct_output_config(packed, count, ignore_list(plan));
    free(packed);
    if (!quantization || json_object_set_new(config, "quantization_config", quantization) < 0) {
        json_decref(config);
        return NULL;
    }
    return config;
}

static int write_config(struct job *job, struct fq_error *err) {
    json_t *config = make_config(&job->plan);
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
            if (stat(path, &status) < 0)
                stat(in, &status); /* a GGUF file is itself the input */
            free(path);
        }
        json_object_set_new(files, file,
                            json_pack("[I, I, I]", (json_int_t)status.st_size,
                                      (json_int_t)status.st_mtim.tv_sec,
                                      (json_int_t)status.st_mtim.tv_nsec));
    }
    return json_pack("{s:i, s:i, s:I, s:I, s:f, s:i, s:b, s:b, s:I, s:f, s:i, s:I, s:o, s:o}",
                     "bits", options->bits, "widths", (int)options->widths, "group",
                     (json_int_t)options->group, "min_group", (json_int_t)options->min_group,
                     "alpha", options->alpha, "scale", (int)options->method.scale, "asymmetric",
                     options->method.asymmetric, "allow_nonfinite", options->method.allow_nonfinite,
                     "budget", (json_int_t)options->budget, "bits_per_weight",
                     options->bits_per_weight, "loss", (int)options->loss, "shard_bytes",
                     (json_int_t)options->shard_bytes, "rules", rules, "files", files);
}

/* Takes up what the earlier run wrote; false, and an empty directory, where it asked otherwise.
 * *MEASURED, unless there are choices, is what it had measured for them. */
static bool resume(struct job *job, const json_t *asked, json_t **measured) {
    json_t *state = NULL;
    bool same = job->output.found &&
                fq_directory_json(job->output.fd, FQ_OUTPUT_STATE_FILE, &state, NULL) == 0 &&
                json_equal(json_object_get(state, "asked"), asked);
    bool decided = same && fq_plan_take_choices(&job->plan, json_object_get(state, "choices")) == 0;

    if (same && !decided)
        *measured = json_incref(json_object_get(state, "measured"));
    json_decref(state);
    if (!decided && !*measured)
        fq_output_directory_clear(&job->output);
    return decided;
}

/* What is kept of planning, and when it was last written. */
struct notebook {
    struct job *job;
    json_t *asked;
    struct fq_plan_notes notes;
    double saved; /* seconds of the monotonic clock; 0: never */
};

/* Seconds between two writings of what was measured. */
#define NOTES_INTERVAL 5.0

static double seconds(void) {
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

/* The state, with what was decided or measured. */
static int write_state(struct job *job, json_t *asked, const char *what, json_t *of,
                       struct fq_error *err) {
    json_t *state = json_pack("{s:O, s:O}", "asked", asked, what, of);
    int rc = state ? fq_output_directory_json(&job->output, FQ_OUTPUT_STATE_FILE, state, err)
                   : fq_fail(err, FQ_NO_MEMORY, "no memory for the plan");

    json_decref(state);
    return rc;
}

/* A failure costs a later run some time, no more. */
static void save_notes(struct notebook *notebook) {
    write_state(notebook->job, notebook->asked, "measured", notebook->notes.measured, NULL);
    notebook->saved = seconds();
}

static void notes_added(void *context) {
    struct notebook *notebook = context;

    if (notebook->saved == 0 || seconds() - notebook->saved >= NOTES_INTERVAL)
        save_notes(notebook);
}

static int decide(struct job *job, const char *in, struct fq_error *err) {
    struct notebook notebook = {.job = job, .asked = fingerprint(job, in)};
    json_t *choices = NULL;
    int rc = 0;

    notebook.notes = (struct fq_plan_notes){.save = notes_added, .context = &notebook};
    if (!notebook.asked)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for the plan");
    if (job->options->dry_run) {
        rc = fq_plan_decide(&job->plan, job->summary, NULL, err);
    } else if (!resume(job, notebook.asked, &notebook.notes.measured)) {
        if (!notebook.notes.measured)
            notebook.notes.measured = json_object();
        rc = fq_plan_decide(&job->plan, job->summary, &notebook.notes, err);
        if (rc == -FQ_CANCELLED && json_object_size(notebook.notes.measured) > 0)
            save_notes(&notebook);
        choices = rc == 0 ? fq_plan_choices(&job->plan) : NULL;
        if (rc == 0)
            rc = write_state(job, notebook.asked, "choices", choices, err);
    }
    json_decref(choices);
    json_decref(notebook.notes.measured);
    json_decref(notebook.asked);
    return rc;
}

/* ---- all of it ---------------------------------------------------------------------------- */

/* Layers that stay dense. */
static int report_dense(struct job *job, struct fq_error *err) {
    int rc = 0;

    for (size_t m = 0; m < job->plan.count && rc == 0; m++) {
        struct fq_quantized_layer layer = describe(&job->plan.matrices[m]);

        if (layer.kept_dense)
            rc = tell(job, 0, &layer, err);
    }
    return rc;
}

static int write_all(struct job *job, const char *in, struct fq_error *err) {
    int rc;

    if ((rc = write_steps(job, err)) < 0 || (rc = write_config(job, err)) < 0 ||
        (rc = fq_output_directory_copy(&job->output, in, err)) < 0)
        return rc;
    return fq_output_directory_commit(&job->output, err);
}

static bool has_shards(const struct job *job) {
    size_t found = 0;

    if (job->writer)
        fq_checkpoint_writer_shards(job->writer, &found);
    return found > 0;
}

int fq_quantize_checkpoint(const char *in, const char *out,
                           const struct fq_quantize_options *options,
                           struct fq_quantize_summary *summary, struct fq_error *err) {
    struct job job = {.options = options, .summary = summary, .output = {.parentfd = -1, .fd = -1}};
    bool failed = false; /* to write */
    int rc;

    *summary = (struct fq_quantize_summary){0};
    rc = options->dry_run ? fq_output_directory_check(out, in, err)
                          : fq_output_directory_init(&job.output, out, in, err);
    if (rc < 0)
        return rc;
    if ((rc = fq_plan_init(&job.plan, in, options, err)) < 0 || (rc = decide(&job, in, err)) < 0 ||
        (rc = plan_tensors(&job, err)) < 0)
        goto out;
    count_layers(&job);
    if (summary->kept_dense == summary->layers)
        rc = fq_fail(err, FQ_UNSUPPORTED, "%.200s: no layer can be packed with %d bits", in,
                     options->bits);
    if (rc == 0 && (rc = check_budget(&job, err)) == 0)
        rc = report_dense(&job, err);
    if (rc == 0 && options->dry_run) {
        rc = check_steps(&job, err);
    } else if (rc == 0) {
        rc = write_all(&job, in, err);
        failed = rc == -FQ_IO;
    }
out:
    /* a full disk does not take away what was finished before it was full */
    summary->resumable = !options->dry_run && (rc == -FQ_CANCELLED || (failed && has_shards(&job)));
    job.output.keep = job.output.keep || summary->resumable;
    free(job.steps);
    fq_checkpoint_writer_free(job.writer);
    fq_plan_fini(&job.plan);
    fq_output_directory_fini(&job.output);
    return rc;
}
