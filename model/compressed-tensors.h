/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What compressed-tensors.c, the layout, and compressed-tensors-config.c, its
 * configuration, have in common, and what a writer must know.  Internal to
 * model/; one thread an object.
 */
#ifndef FQ_MODEL_COMPRESSED_TENSORS_H
#define FQ_MODEL_COMPRESSED_TENSORS_H

#include "checkpoint.h"

#include <jansson.h>

/* How one module's weights are quantized. */
struct fq_ct_scheme {
    int bits;
    int64_t group; /* 0: one a row */
    bool symmetric;
};

/* Reads a quantization_config.  Errors: -FQ_FORMAT, -FQ_UNSUPPORTED, -FQ_NO_MEMORY. */
int fq_ct_config_new(const json_t *json, void **out, struct fq_error *err);
void fq_ct_config_free(void *config);

/*
 * The scheme of a module that has packed weights, hence is a linear layer: an exact name goes
 * before a "re:" pattern, a pattern before the class.  -FQ_FORMAT where nothing matches or
 * the ignore list does.
 */
int fq_ct_config_match(const void *config, const char *module, struct fq_ct_scheme *out,
                       struct fq_error *err);

/*
 * Whether 3-bit rows of k codes can be told from the older layout of ten codes a word: no, where
 * both need the same number of words and would order the codes differently.
 */
bool fq_ct_int3_is_plain(int64_t k);

#endif
