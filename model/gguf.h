/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One GGUF file, version 3: a strict reader over bytes that the caller keeps.
 * The tensors come out with llama.cpp's names and with their axes in our order
 * (K last); metadata as JSON.  What the blocks of a quantized tensor mean is
 * gguf-blocks.c's.  Internal to model/; one thread an object.
 */
#ifndef FQ_MODEL_GGUF_H
#define FQ_MODEL_GGUF_H

#include "checkpoint.h"

#include <jansson.h>

#define FQ_GGUF_BLOCK 32 /* weights that share a scale, in both quantized types that are read */

struct fq_gguf {
    char *name;                           /* base name, for messages */
    struct fq_checkpoint_tensor *tensors; /* in the order of the file */
    size_t count;
    bool quantized;   /* some tensor is Q8_0 or Q4_0 */
    json_t *metadata; /* {key: scalar or string}; an array is null */
};

/*
 * Checks the whole header.  A stack [E, N, K] of quantized matrices "X.weight" comes out as E
 * tensors "X.0.weight", "X.1.weight", ...  Every error names the file and the key or tensor:
 * -FQ_FORMAT, -FQ_UNSUPPORTED (another version or type, a split file), -FQ_NO_MEMORY.
 */
int fq_gguf_new(const void *bytes, size_t size, const char *name, struct fq_gguf **out,
                struct fq_error *err);
void fq_gguf_free(struct fq_gguf *file); /* NULL is fine */

/* What config.json would say: model_type and sizes under Hugging Face's names, and all scalar
 * metadata under "gguf".  The caller's to decref; NULL without memory. */
json_t *fq_gguf_config(const struct fq_gguf *file);

#endif
