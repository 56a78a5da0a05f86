/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The compressed-tensors "pack-quantized" layout: what config.json's
 * quantization_config says of a module, and how its tensors become a matrix in
 * canonical form.  Used by checkpoint.c alone, on its thread.
 */
#ifndef FQ_MODEL_COMPRESSED_TENSORS_H
#define FQ_MODEL_COMPRESSED_TENSORS_H

#include "checkpoint.h"

#include <jansson.h>

struct fq_ct_config;

/* How one module's weights are quantized. */
struct fq_ct_scheme {
    int bits;
    int64_t group; /* 0: one a row */
    bool symmetric;
};

/* The tensors of one module; zero, shape and g_idx may be NULL. */
struct fq_ct_parts {
    const struct fq_checkpoint_tensor *packed, *scale, *zero, *shape, *g_idx;
};

/* Reads a quantization_config.  Errors: -FQ_FORMAT, -FQ_UNSUPPORTED, -FQ_NO_MEMORY. */
int fq_ct_config_new(const json_t *json, struct fq_ct_config **out, struct fq_error *err);
void fq_ct_config_free(struct fq_ct_config *config);

/*
 * The scheme of a module that has packed weights, hence is a linear layer: an exact name goes
 * before a "re:" pattern, a pattern before the class.  -FQ_FORMAT where nothing matches or
 * the ignore list does.
 */
int fq_ct_config_match(const struct fq_ct_config *config, const char *module,
                       struct fq_ct_scheme *out, struct fq_error *err);

/* Checks the tensors against each other and fills in matrix, symmetric and stored. */
int fq_ct_describe(const struct fq_ct_parts *parts, const struct fq_ct_scheme *scheme,
                   struct fq_checkpoint_matrix *out, struct fq_error *err);

/* Codes, scales and zeros of a described matrix: borrowed where the layout allows, else owned. */
int fq_ct_load(const struct fq_ct_parts *parts, const struct fq_checkpoint_matrix *described,
               struct fq_loaded_matrix *out, struct fq_error *err);

/*
 * Whether 3-bit rows of k codes can be told from the older layout of ten codes a word: no, where
 * both need the same number of words and would order the codes differently.
 */
bool fq_ct_int3_is_plain(int64_t k);

#endif
