/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Writing the safetensors files of a checkpoint.  First every tensor of the
 * output is added with its shape, which decides the shards; then the data comes,
 * in the same order, so that one shard is open at a time and nothing is held in
 * memory.  Internal to model/; one thread an object.
 */
#ifndef FQ_MODEL_CHECKPOINT_WRITER_H
#define FQ_MODEL_CHECKPOINT_WRITER_H

#include "checkpoint.h"
#include "output-directory.h"

struct fq_checkpoint_writer;

/* OUTPUT is borrowed.  A new shard is begun where shard_bytes would be passed. */
int fq_checkpoint_writer_new(struct fq_output_directory *output, uint64_t shard_bytes,
                             struct fq_checkpoint_writer **out, struct fq_error *err);
/* Removes what was not finished.  NULL is fine. */
void fq_checkpoint_writer_free(struct fq_checkpoint_writer *writer);

/*
 * Adds tensors that are to be in one shard: name, dtype, rank, shape and bytes count, and are
 * copied. They are numbered through, from 0 on.  Only before the first _write.
 */
int fq_checkpoint_writer_add(struct fq_checkpoint_writer *writer,
                             const struct fq_checkpoint_tensor *tensors, size_t count,
                             struct fq_error *err);
/* Writes tensor i, once each; a shard's come before the next one's. */
int fq_checkpoint_writer_write(struct fq_checkpoint_writer *writer, size_t i, const void *data,
                               uint64_t bytes, struct fq_error *err);
/* Ends the last shard and writes the index, where there are several. */
int fq_checkpoint_writer_finish(struct fq_checkpoint_writer *writer, struct fq_error *err);

/* Whether the shard of tensor i is there from an earlier run, so that none of it is to be written;
 * once all tensors were added. */
bool fq_checkpoint_writer_has(const struct fq_checkpoint_writer *writer, size_t i);
/* How many shards there will be, and how many of them are there. */
size_t fq_checkpoint_writer_shards(const struct fq_checkpoint_writer *writer, size_t *found);
/* Bytes of all tensors that were added. */
uint64_t fq_checkpoint_writer_bytes(const struct fq_checkpoint_writer *writer);

#endif
