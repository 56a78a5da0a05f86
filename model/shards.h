/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The safetensors files of a checkpoint directory: a single one, or those that
 * the index names, which are held to what it says.  Internal to model/; one
 * thread an object.
 */
#ifndef FQ_MODEL_SHARDS_H
#define FQ_MODEL_SHARDS_H

#include "directory.h"
#include "safetensors.h"

struct fq_shards {
    struct fq_safetensors **files;
    size_t count;
};

/*
 * Opens and checks them all.  _fini is due whatever the result.  Errors: -FQ_NOT_FOUND, -FQ_DENIED,
 * -FQ_FORMAT, -FQ_UNSUPPORTED, -FQ_IO, -FQ_NO_MEMORY, with the file, the tensor and the fault.
 */
int fq_shards_init(struct fq_shards *shards, const struct fq_directory *directory,
                   struct fq_error *err);
void fq_shards_fini(struct fq_shards *shards);

#endif
