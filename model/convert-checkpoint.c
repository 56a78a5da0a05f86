/* SPDX-License-Identifier: Apache-2.0 */
/* Converting: a plan with every tensor of the output, then its data in that order, then config.json
 * and the files beside. */
#include "convert-checkpoint.h"

#include "compressed-tensors-output.h"
#include "directory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* One step: a matrix, or a tensor that is copied. */
struct step {
    const struct fq_checkpoint_tensor *copied; /* NULL for a matrix */
    size_t matrix;
    size_t first; /* number of its first tensor in the output */
};

struct job {
    const struct fq_convert_options *options;
    struct fq_convert_summary *summary;
    struct fq_checkpoint *checkpoint;
    struct fq_output_directory output;
    struct fq_checkpoint_writer *writer;
    struct step *steps;
    size_t count;
};

static int open_input(struct job *job, const char *in, struct fq_error *err) {
    int rc = fq_checkpoint_new(in, &job->checkpoint, err);

    if (rc < 0)
        return rc;
    job->summary->matrices = fq_checkpoint_matrix_count(job->checkpoint);
    snprintf(job->summary->format, sizeof job->summary->format, "%s",
             fq_checkpoint_format(job->checkpoint));
    if (job->summary->matrices == 0 || fq_checkpoint_matrix(job->checkpoint, 0)->dense)
        return fq_fail(err, FQ_INVALID,
                       "%.200s: no matrix is quantized; finequant-quantize IN OUT quantizes", in);
    return 0;
}

/* A matrix stands where the first of its tensors does. */
static int make_plan(struct job *job, struct fq_error *err) {
    size_t tensors = fq_checkpoint_tensor_count(job->checkpoint), next = 0, made;
    bool *seen = calloc(job->summary->matrices, sizeof *seen);
    int rc = 0;

    job->steps = calloc(tensors, sizeof *job->steps);
    if (!job->steps || !seen)
        rc = fq_fail(err, FQ_NO_MEMORY, "no memory for %zu tensors", tensors);
    for (size_t t = 0; t < tensors && rc == 0; t++) {
        const struct fq_checkpoint_tensor *tensor = fq_checkpoint_tensor(job->checkpoint, t);
        size_t matrix = fq_checkpoint_owner(job->checkpoint, t);
        struct step *step = &job->steps[job->count];

        job->summary->bytes_before += tensor->bytes;
        if (matrix != SIZE_MAX && seen[matrix])
            continue;
        *step = (struct step){.first = next, .matrix = matrix};
        if (matrix == SIZE_MAX) {
            step->copied = tensor;
            made = 1;
            rc = fq_checkpoint_writer_add(job->writer, tensor, 1, err);
            job->summary->copied++;
        } else {
            seen[matrix] = true;
            rc = fq_ct_output_add(job->writer, fq_checkpoint_matrix(job->checkpoint, matrix), &made,
                                  err);
        }
        next += rc == 0 ? made : 0;
        job->count++;
    }
    free(seen);
    job->summary->bytes_after = fq_checkpoint_writer_bytes(job->writer);
    return rc;
}

static int write_matrix(struct job *job, const struct step *step, struct fq_error *err) {
    struct fq_loaded_matrix loaded;
    int rc = fq_checkpoint_load(job->checkpoint, step->matrix, &loaded, err);

    if (rc < 0)
        return rc;
    rc = fq_ct_output_write(job->writer, step->first, &loaded.matrix, err);
    fq_loaded_matrix_fini(&loaded);
    fq_checkpoint_drop(job->checkpoint, step->matrix);
    return rc;
}

static int write_steps(struct job *job, struct fq_error *err) {
    const struct fq_convert_options *options = job->options;
    size_t done = 0;
    int rc = 0;

    for (size_t s = 0; s < job->count && rc == 0; s++) {
        const struct step *step = &job->steps[s];

        if (step->copied) {
            rc = fq_checkpoint_writer_write(job->writer, step->first, step->copied->data,
                                            step->copied->bytes, err);
            fq_checkpoint_drop_tensor(step->copied);
            continue;
        }
        rc = write_matrix(job, step, err);
        done++;
        if (rc == 0 && options->progress &&
            options->progress(options->context, fq_checkpoint_matrix(job->checkpoint, step->matrix),
                              done, job->summary->matrices) != 0)
            rc = fq_fail(err, FQ_CANCELLED, "stopped after %zu of %zu matrices", done,
                         job->summary->matrices);
    }
    return rc < 0 ? rc : fq_checkpoint_writer_finish(job->writer, err);
}

/* Every module whose two-dimensional weight is no matrix, and lm_head, which a tied embedding hides
 * from the files. */
static json_t *ignore_list(const struct fq_checkpoint *checkpoint) {
    json_t *ignore = json_array();
    bool has_head = false;

    for (size_t i = 0; i < fq_checkpoint_matrix_count(checkpoint); i++)
        has_head |= strcmp(fq_checkpoint_matrix(checkpoint, i)->name, "lm_head") == 0;
    if (!has_head)
        json_array_append_new(ignore, json_string("lm_head"));
    for (size_t t = 0; t < fq_checkpoint_tensor_count(checkpoint); t++) {
        const struct fq_checkpoint_tensor *tensor = fq_checkpoint_tensor(checkpoint, t);
        size_t length = strlen(tensor->name), cut = strlen(".weight");

        if (fq_checkpoint_owner(checkpoint, t) == SIZE_MAX && tensor->rank == 2 && length > cut &&
            strcmp(tensor->name + length - cut, ".weight") == 0 &&
            strcmp(tensor->name, "lm_head.weight") != 0)
            json_array_append_new(ignore, json_stringn(tensor->name, length - cut));
    }
    return ignore;
}

/* NULL without memory. */
static json_t *make_quantization(const struct fq_checkpoint *checkpoint) {
    size_t count = fq_checkpoint_matrix_count(checkpoint);
    struct fq_ct_layer *layers = calloc(count, sizeof *layers);
    json_t *made;

    for (size_t i = 0; layers && i < count; i++) {
        const struct fq_checkpoint_matrix *matrix = fq_checkpoint_matrix(checkpoint, i);

        layers[i].name = matrix->name;
        layers[i].scheme.bits = matrix->matrix.bits;
        layers[i].scheme.symmetric = matrix->symmetric;
        /* one a row is said so, that readers need not divide K by it */
        if (matrix->matrix.group != matrix->matrix.k)
            layers[i].scheme.group = matrix->matrix.group;
    }
    made = layers ? fq_ct_output_config(layers, count, ignore_list(checkpoint)) : NULL;
    free(layers);
    return made;
}

static int write_config(struct job *job, struct fq_error *err) {
    const json_t *before = fq_checkpoint_config(job->checkpoint);
    json_t *config = before ? json_copy((json_t *)before) : json_object();
    json_t *quantization = make_quantization(job->checkpoint);
    int rc;

    json_object_del(config, "compression_config");
    if (!quantization || json_object_set_new(config, "quantization_config", quantization) < 0)
        rc = fq_fail(err, FQ_NO_MEMORY, "no memory for " FQ_CONFIG_FILE);
    else
        rc = fq_output_directory_json(&job->output, FQ_CONFIG_FILE, config, err);
    json_decref(config);
    return rc;
}

/* A GGUF file has nothing beside it that belongs to it. */
static int copy_companions(struct job *job, const char *in, struct fq_error *err) {
    struct stat status;

    if (stat(in, &status) < 0)
        return fq_fail_errno(err, "%.200s", in);
    return S_ISDIR(status.st_mode) ? fq_output_directory_copy(&job->output, in, err) : 0;
}

int fq_convert_checkpoint(const char *in, const char *out, const struct fq_convert_options *options,
                          struct fq_convert_summary *summary, struct fq_error *err) {
    struct job job = {.options = options, .summary = summary};
    json_t *state;
    int rc;

    *summary = (struct fq_convert_summary){0};
    if ((rc = fq_output_directory_init(&job.output, out, in, err)) < 0)
        return rc;
    fq_output_directory_clear(&job.output);     /* what a killed run left is not taken up */
    state = json_pack("{s:s}", "converts", in); /* by which the next run knows it for ours */
    rc = state ? fq_output_directory_json(&job.output, FQ_OUTPUT_STATE_FILE, state, err)
               : fq_fail(err, FQ_NO_MEMORY, "no memory to convert %.200s", in);
    json_decref(state);
    if (rc == 0 && (rc = open_input(&job, in, err)) == 0 &&
        (rc = fq_checkpoint_writer_new(&job.output, options->shard_bytes, &job.writer, err)) == 0 &&
        (rc = make_plan(&job, err)) == 0 && (rc = write_steps(&job, err)) == 0 &&
        (rc = write_config(&job, err)) == 0 && (rc = copy_companions(&job, in, err)) == 0)
        rc = fq_output_directory_commit(&job.output, err);
    free(job.steps);
    fq_checkpoint_writer_free(job.writer);
    fq_checkpoint_free(job.checkpoint);
    fq_output_directory_fini(&job.output);
    return rc;
}
