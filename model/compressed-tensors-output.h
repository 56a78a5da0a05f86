/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A matrix in canonical form as the compressed-tensors "pack-quantized" tensors
 * that vLLM and transformers read, and the quantization_config that says so.
 * The reverse is compressed-tensors.c.  Internal to model/; one thread an object.
 */
#ifndef FQ_MODEL_COMPRESSED_TENSORS_OUTPUT_H
#define FQ_MODEL_COMPRESSED_TENSORS_OUTPUT_H

#include "checkpoint-writer.h"
#include "compressed-tensors.h"

/*
 * Adds weight_packed, weight_scale, weight_shape and, unless symmetric, weight_zero_point of a
 * matrix: three or four tensors, in this order.  -FQ_UNSUPPORTED for 3 bits with a K whose packing
 * readers cannot tell from the older one.
 */
int fq_ct_output_add(struct fq_checkpoint_writer *writer, const struct fq_checkpoint_matrix *matrix,
                     size_t *count, struct fq_error *err);
/* Writes them, from tensor number FIRST on. */
int fq_ct_output_write(struct fq_checkpoint_writer *writer, size_t first,
                       const struct fq_matrix *matrix, struct fq_error *err);

/* A layer and how it is quantized. */
struct fq_ct_layer {
    const char *name;
    struct fq_ct_scheme scheme;
};
/*
 * A quantization_config with a group for each distinct scheme.  A single one is said of the class
 * "Linear"; several are said by name alone, since vLLM looks at the class before it looks at the
 * parts of a layer that it fuses.  Takes over IGNORE, an array of module names.  The caller's to
 * decref; NULL without memory.
 */
json_t *fq_ct_output_config(const struct fq_ct_layer *layers, size_t count, json_t *ignore);

#endif
