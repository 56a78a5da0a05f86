/* SPDX-License-Identifier: Apache-2.0 */
/*
 * finequant-quantize inspect DIR: the quantized matrices of a checkpoint as a
 * table, as JSON, or as a picture, and with --against the error that each keeps.
 */
#include "quantize-inspect.h"

#include "quantize-checkpoint.h"
#include "quantize-cli.h"

#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char *against, *svg;
static bool json;

static const struct quantize_option options[] = {
    {"against", 'a', "ORIGINAL", "compare with the checkpoint that DIR was made from",
     "is a directory", quantize_parse_text, &against},
    {"json", 'j', NULL, "print JSON in place of the table", NULL, quantize_parse_flag, &json},
    {"svg", 0, "FILE", "draw where the bits went and what error each matrix keeps",
     "is the name of a file", quantize_parse_text, &svg},
    {0},
};

uint64_t inspection_bytes(const struct inspection *inspection) {
    uint64_t bytes = 0;

    for (size_t i = 0; i < inspection->count; i++)
        bytes += inspection->matrices[i].codes + inspection->matrices[i].scales +
                 inspection->matrices[i].zeros;
    return bytes;
}

/* ---- looking ------------------------------------------------------------------------------ */

static void describe(const struct fq_checkpoint_matrix *described, struct inspected_matrix *out) {
    const struct fq_matrix *matrix = &described->matrix;
    uint64_t groups = (uint64_t)(matrix->n * fq_matrix_groups(matrix));

    *out = (struct inspected_matrix){
        .name = described->name,
        .n = matrix->n,
        .k = matrix->k,
        .group = matrix->group,
        .bits = matrix->bits,
        .symmetric = described->symmetric,
        .codes = (uint64_t)matrix->n * (uint64_t)fq_matrix_row_bytes(matrix),
        .scales = groups * 2,
        .zeros = described->symmetric ? 0 : groups * (uint64_t)matrix->bits / 8,
        .error = NAN,
    };
}

static int compare(struct fq_checkpoint *checkpoint, const struct fq_checkpoint *original, size_t i,
                   struct inspected_matrix *matrix, struct fq_error *err) {
    struct fq_loaded_matrix loaded;
    struct fq_dense dense;
    int rc;

    if (fq_quantize_original(original, matrix->name, matrix->n, matrix->k, &dense) < 0)
        return fq_fail(err, FQ_INVALID,
                       "%.200s has no weights of '%.200s', %" PRId64 " by %" PRId64, against,
                       matrix->name, matrix->n, matrix->k);
    if ((rc = fq_checkpoint_load(checkpoint, i, &loaded, err)) < 0)
        return rc;
    matrix->error = fq_quantize_error(&dense, &loaded.matrix);
    fq_loaded_matrix_fini(&loaded);
    fq_checkpoint_drop(checkpoint, i);
    return isnan(matrix->error) ? fq_fail(err, FQ_INVALID,
                                          "%.200s: the weights of '%.200s' are not all finite, "
                                          "no error can be told",
                                          against, matrix->name)
                                : 0;
}

static int inspect(struct fq_checkpoint *checkpoint, const struct fq_checkpoint *original,
                   struct inspection *out, struct fq_error *err) {
    size_t count = fq_checkpoint_matrix_count(checkpoint);
    uint64_t stored = 0;
    int rc = 0;

    out->matrices = calloc(count + 1, sizeof *out->matrices);
    if (!out->matrices)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for %zu matrices", count);
    for (size_t i = 0; i < count && rc == 0; i++) {
        const struct fq_checkpoint_matrix *described = fq_checkpoint_matrix(checkpoint, i);
        struct inspected_matrix *matrix = &out->matrices[out->count];

        if (described->dense)
            continue;
        describe(described, matrix);
        out->count++;
        out->weights += (uint64_t)(matrix->n * matrix->k);
        stored += described->stored;
        if (original)
            rc = compare(checkpoint, original, i, matrix, err);
    }
    for (size_t t = 0; t < fq_checkpoint_tensor_count(checkpoint); t++)
        out->dense += fq_checkpoint_tensor(checkpoint, t)->bytes;
    out->dense -= stored;
    if (rc == 0 && out->count == 0)
        rc = fq_fail(err, FQ_INVALID, "%.200s: no quantized matrix is there", out->directory);
    return rc;
}

/* ---- telling ------------------------------------------------------------------------------ */

static double bits_per_weight(const struct inspection *inspection) {
    return (double)inspection_bytes(inspection) * 8 / (double)inspection->weights;
}

static void print_table(const struct inspection *inspection) {
    int width = 6;
    double summed = 0;

    for (size_t i = 0; i < inspection->count; i++)
        if ((int)strlen(inspection->matrices[i].name) > width)
            width = (int)strlen(inspection->matrices[i].name);
    printf("%-*s %13s %4s %8s %5s %12s %6s%s\n", width, "matrix", "shape", "bits", "group", "zeros",
           "bytes", "bits/w", against ? "    error" : "");
    for (size_t i = 0; i < inspection->count; i++) {
        const struct inspected_matrix *matrix = &inspection->matrices[i];
        uint64_t bytes = matrix->codes + matrix->scales + matrix->zeros;
        char shape[48], group[24] = "channel";

        snprintf(shape, sizeof shape, "%" PRId64 "x%" PRId64, matrix->n, matrix->k);
        if (matrix->group < matrix->k)
            snprintf(group, sizeof group, "%" PRId64, matrix->group);
        printf("%-*s %13s %4d %8s %5s %12" PRIu64 " %6.3f", width, matrix->name, shape,
               matrix->bits, group, matrix->symmetric ? "no" : "yes", bytes,
               (double)bytes * 8 / ((double)matrix->n * (double)matrix->k));
        if (against)
            printf(" %8.5f", matrix->error);
        putchar('\n');
        summed += matrix->error;
    }
    printf("%zu matrices, %" PRIu64 " bytes, %.3f bits a weight; %" PRIu64 " bytes are dense",
           inspection->count, inspection_bytes(inspection), bits_per_weight(inspection),
           inspection->dense);
    if (against)
        printf("; summed relative error %.5f", summed);
    putchar('\n');
}

static int print_json(const struct inspection *inspection, struct fq_error *err) {
    json_t *matrices = json_array(), *all;

    for (size_t i = 0; i < inspection->count; i++) {
        const struct inspected_matrix *m = &inspection->matrices[i];

        json_array_append_new(
            matrices, json_pack("{s:s, s:I, s:I, s:i, s:I, s:b, s:I, s:I, s:I, s:o}", "name",
                                m->name, "n", (json_int_t)m->n, "k", (json_int_t)m->k, "bits",
                                m->bits, "group", (json_int_t)m->group, "symmetric", m->symmetric,
                                "code_bytes", (json_int_t)m->codes, "scale_bytes",
                                (json_int_t)m->scales, "zero_bytes", (json_int_t)m->zeros, "error",
                                isnan(m->error) ? json_null() : json_real(m->error)));
    }
    all = json_pack("{s:s, s:I, s:f, s:I, s:o}", "directory", inspection->directory, "bytes",
                    (json_int_t)inspection_bytes(inspection), "bits_per_weight",
                    bits_per_weight(inspection), "dense_bytes", (json_int_t)inspection->dense,
                    "matrices", matrices);
    if (!all)
        return fq_fail(err, FQ_INVALID, "DIR is not UTF-8, which JSON needs");
    json_dumpf(all, stdout, JSON_INDENT(2));
    putchar('\n');
    json_decref(all);
    return 0;
}

static int run(char **arguments, struct fq_error *err) {
    struct fq_checkpoint *checkpoint = NULL, *original = NULL;
    struct inspection inspection = {.directory = arguments[0]};
    int rc;

    if ((rc = fq_checkpoint_new(arguments[0], &checkpoint, err)) < 0 ||
        (against && (rc = fq_checkpoint_new(against, &original, err)) < 0) ||
        (rc = inspect(checkpoint, original, &inspection, err)) < 0)
        goto out;
    if (svg && (rc = inspection_svg(&inspection, svg, err)) < 0)
        goto out;
    if (json)
        rc = print_json(&inspection, err);
    else
        print_table(&inspection);
out:
    free(inspection.matrices);
    fq_checkpoint_free(original);
    fq_checkpoint_free(checkpoint);
    return rc;
}

const struct quantize_command quantize_inspect = {
    .name = "inspect",
    .arguments = "DIR",
    .argument_count = 1,
    .help = "Show the quantized matrices of the checkpoint in the directory DIR",
    .options = options,
    .run = run,
};
