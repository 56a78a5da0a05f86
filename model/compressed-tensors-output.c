/* SPDX-License-Identifier: Apache-2.0 */
/* Writing compressed-tensors: the canonical packing is its packing of codes; zero points, which it
 * packs along N, are rearranged. */
#include "compressed-tensors-output.h"

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

static bool same(const struct fq_ct_scheme *a, const struct fq_ct_scheme *b) {
    return a->bits == b->bits && a->group == b->group && a->symmetric == b->symmetric;
}

static json_t *config_group(const struct fq_ct_scheme *scheme, json_t *targets) {
    return json_pack("{s:o, s:{s:i, s:s, s:b, s:s, s:o, s:b, s:n}, s:n, s:n, s:s}", "targets",
                     targets, "weights", "num_bits", scheme->bits, "type", "int", "symmetric",
                     scheme->symmetric, "strategy", scheme->group ? "group" : "channel",
                     "group_size", scheme->group ? json_integer(scheme->group) : json_null(),
                     "dynamic", 0, "actorder", "input_activations", "output_activations", "format",
                     "pack-quantized");
}

/* The layers by group; "Linear" where there is one group.  NULL without memory. */
static json_t *config_groups(const struct fq_ct_layer *layers, size_t count) {
    const struct fq_ct_scheme **distinct = calloc(count + 1, sizeof *distinct);
    json_t **targets = calloc(count + 1, sizeof *targets), *groups = json_object();
    size_t made = 0;

    for (size_t i = 0; distinct && targets && i < count; i++) {
        size_t g = 0;

        while (g < made && !same(distinct[g], &layers[i].scheme))
            g++;
        if (g == made) {
            distinct[made] = &layers[i].scheme;
            targets[made++] = json_array();
        }
        json_array_append_new(targets[g], json_string(layers[i].name));
    }
    if (made == 1) {
        json_array_clear(targets[0]);
        json_array_append_new(targets[0], json_string("Linear"));
    }
    for (size_t g = 0; g < made; g++) {
        char name[32];

        snprintf(name, sizeof name, "group_%zu", g);
        json_object_set_new(groups, name, config_group(distinct[g], targets[g]));
    }
    if (!distinct || !targets) {
        json_decref(groups);
        groups = NULL;
    }
    free(distinct);
    free(targets);
    return groups;
}

json_t *fq_ct_output_config(const struct fq_ct_layer *layers, size_t count, json_t *ignore) {
    return json_pack("{s:s, s:s, s:s, s:o, s:o, s:n, s:n}", "quant_method", "compressed-tensors",
                     "format", "pack-quantized", "quantization_status", "compressed",
                     "config_groups", config_groups(layers, count), "ignore", ignore,
                     "kv_cache_scheme", "global_compression_ratio");
}
