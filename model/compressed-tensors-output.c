/* SPDX-License-Identifier: Apache-2.0 */
/* Writing compressed-tensors: the canonical packing is its packing of codes; zero points, which it
 * packs along N, are rearranged. */
#include "compressed-tensors-output.h"

#include "compressed-tensors.h"
#include "disk-layout.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    PACKED,
    SCALE,
    SHAPE,
    ZERO,
    PARTS
};

/* ---- tensors ------------------------------------------------------------------------------ */

static struct fq_checkpoint_tensor part(const char *dtype, int64_t rows, int64_t columns) {
    struct fq_checkpoint_tensor made = {.dtype = dtype, .rank = 2, .shape = {rows, columns}};

    made.bytes = (uint64_t)rows * (uint64_t)columns * (strcmp(dtype, "I32") == 0 ? 4 : 2);
    return made;
}

int fq_ct_output_add(struct fq_checkpoint_writer *writer, const struct fq_checkpoint_matrix *matrix,
                     size_t *count, struct fq_error *err) {
    static const char *const suffixes[PARTS] = {".weight_packed", ".weight_scale", ".weight_shape",
                                                ".weight_zero_point"};
    const struct fq_matrix *shape = &matrix->matrix;
    int64_t groups = fq_matrix_groups(shape);
    struct fq_checkpoint_tensor parts[PARTS] = {
        [PACKED] = part("I32", shape->n, fq_matrix_row_bytes(shape) / 4),
        [SCALE] = part(shape->scale_type == FQ_F16 ? "F16" : "BF16", shape->n, groups),
        [SHAPE] = {.dtype = "I64", .rank = 1, .shape = {2}, .bytes = 16},
        [ZERO] = part("I32", fq_layout_words(shape->n, shape->bits), groups),
    };
    size_t made = 0;
    int rc = 0;

    if (shape->bits == 3 && !fq_ct_int3_is_plain(shape->k))
        return fq_fail(err, FQ_UNSUPPORTED,
                       "'%.200s': 3 bits with K = %lld cannot be written so that the packing is "
                       "told from the older one of ten codes a word",
                       matrix->name, (long long)shape->k);
    *count = matrix->symmetric ? PARTS - 1 : PARTS;
    for (; made < *count && rc == 0; made++)
        if (asprintf((char **)&parts[made].name, "%s%s", matrix->name, suffixes[made]) < 0) {
            rc = fq_fail(err, FQ_NO_MEMORY, "no memory for tensor names");
            break;
        }
    if (rc == 0)
        rc = fq_checkpoint_writer_add(writer, parts, *count, err);
    while (made > 0)
        free((char *)parts[--made].name);
    return rc;
}

/* Zero points as [ceil(N·bits/32)][groups] words, each group's a dense stream down its column. */
static int write_zeros(struct fq_checkpoint_writer *writer, size_t i,
                       const struct fq_matrix *matrix, struct fq_error *err) {
    int64_t groups = fq_matrix_groups(matrix), words = fq_layout_words(matrix->n, matrix->bits);
    size_t bytes = (size_t)words * (size_t)groups * 4;
    uint8_t *packed = malloc(bytes * 2 + (size_t)matrix->n);
    uint8_t *streams = packed + bytes, *column = streams + bytes;
    int rc;

    if (!packed)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for %zu bytes of zero points", bytes);
    for (int64_t g = 0; g < groups; g++) {
        for (int64_t n = 0; n < matrix->n; n++)
            column[n] = matrix->zeros[n * groups + g];
        fq_matrix_pack_row(streams + g * words * 4, column, matrix->n, matrix->bits);
    }
    fq_layout_transpose_words(streams, groups, words, packed);
    rc = fq_checkpoint_writer_write(writer, i, packed, bytes, err);
    free(packed);
    return rc;
}

int fq_ct_output_write(struct fq_checkpoint_writer *writer, size_t first,
                       const struct fq_matrix *matrix, struct fq_error *err) {
    const int64_t shape[2] = {matrix->n, matrix->k}; /* little-endian, as x86 and arm are */
    uint64_t codes = (uint64_t)matrix->n * (uint64_t)fq_matrix_row_bytes(matrix);
    uint64_t scales = (uint64_t)matrix->n * (uint64_t)fq_matrix_groups(matrix) * 2;
    int rc;

    if ((rc = fq_checkpoint_writer_write(writer, first + PACKED, matrix->codes, codes, err)) < 0 ||
        (rc = fq_checkpoint_writer_write(writer, first + SCALE, matrix->scales, scales, err)) < 0 ||
        (rc = fq_checkpoint_writer_write(writer, first + SHAPE, shape, sizeof shape, err)) < 0)
        return rc;
    return matrix->zeros ? write_zeros(writer, first + ZERO, matrix, err) : 0;
}

/* ---- configuration ------------------------------------------------------------------------ */

/* What the layers of one config group have in common. */
struct scheme {
    int bits;
    int64_t group; /* 0: one a row, so that readers need not divide K by it */
    bool symmetric;
};

static struct scheme scheme_of(const struct fq_checkpoint_matrix *matrix) {
    return (struct scheme){
        .bits = matrix->matrix.bits,
        .group = matrix->matrix.group == matrix->matrix.k ? 0 : matrix->matrix.group,
        .symmetric = matrix->symmetric,
    };
}

static bool same(const struct scheme *a, const struct scheme *b) {
    return a->bits == b->bits && a->group == b->group && a->symmetric == b->symmetric;
}

/* The distinct schemes; NULL without memory. */
static struct scheme *find_schemes(const struct fq_checkpoint_matrix *matrices, size_t layers,
                                   size_t *count) {
    struct scheme *schemes = calloc(layers + 1, sizeof *schemes);

    *count = 0;
    for (size_t i = 0; schemes && i < layers; i++) {
        struct scheme scheme = scheme_of(&matrices[i]);
        size_t found = 0;

        while (found < *count && !same(&schemes[found], &scheme))
            found++;
        if (found == *count)
            schemes[(*count)++] = scheme;
    }
    return schemes;
}

static json_t *targets_of(const struct fq_checkpoint_matrix *matrices, size_t layers,
                          const struct scheme *scheme) {
    json_t *targets = json_array();

    for (size_t i = 0; i < layers; i++) {
        struct scheme own = scheme_of(&matrices[i]);

        if (same(&own, scheme))
            json_array_append_new(targets, json_string(matrices[i].name));
    }
    return targets;
}

static json_t *config_group(const struct scheme *scheme, json_t *targets) {
    return json_pack("{s:o, s:{s:i, s:s, s:b, s:s, s:o, s:b, s:n}, s:n, s:n, s:s}", "targets",
                     targets, "weights", "num_bits", scheme->bits, "type", "int", "symmetric",
                     scheme->symmetric, "strategy", scheme->group ? "group" : "channel",
                     "group_size", scheme->group ? json_integer(scheme->group) : json_null(),
                     "dynamic", 0, "actorder", "input_activations", "output_activations", "format",
                     "pack-quantized");
}

json_t *fq_ct_output_config(const struct fq_checkpoint_matrix *matrices, size_t layers,
                            json_t *ignore) {
    size_t count;
    struct scheme *schemes = find_schemes(matrices, layers, &count);
    json_t *groups = json_object();

    for (size_t i = 0; schemes && i < count; i++) {
        char name[32];

        snprintf(name, sizeof name, "group_%zu", i);
        json_object_set_new(
            groups, name,
            config_group(&schemes[i], count == 1 ? json_pack("[s]", "Linear")
                                                 : targets_of(matrices, layers, &schemes[i])));
    }
    if (!schemes) {
        json_decref(groups);
        json_decref(ignore);
        return NULL;
    }
    free(schemes);
    return json_pack("{s:s, s:s, s:s, s:o, s:o, s:n, s:n}", "quant_method", "compressed-tensors",
                     "format", "pack-quantized", "quantization_status", "compressed",
                     "config_groups", groups, "ignore", ignore, "kv_cache_scheme",
                     "global_compression_ratio");
}
