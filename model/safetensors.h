/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One safetensors file: a strict reader over a mapping, and a writer that
 * computes the header from sizes known beforehand, takes tensors one at a time
 * and makes the file appear whole or not at all.  Knows nothing of what the
 * tensors mean.  Not thread-safe; distinct objects are independent.
 *
 * The file must not shrink while it is mapped: as with any mapping, touching
 * a lost page raises SIGBUS.
 */
#ifndef FQ_MODEL_SAFETENSORS_H
#define FQ_MODEL_SAFETENSORS_H

#include "checkpoint.h"

#define FQ_SAFETENSORS_HEADER_MAX ((uint64_t)100000000) /* the reference implementation's limit */
#define FQ_SAFETENSORS_RANK_MAX   8

/* An open file.  Everything in it is borrowed by callers until _free. */
struct fq_safetensors {
    char *name;      /* base name, for messages */
    const void *map; /* NULL where the bytes are the caller's */
    size_t map_bytes;
    struct fq_checkpoint_tensor *tensors; /* in the order of the data */
    size_t count;
};

/*
 * Opens NAME beneath the directory DIRFD, maps it and checks the whole header.  A name with a
 * slash is the caller's to refuse.  Every error names the file, the tensor and the fault.
 */
int fq_safetensors_new(int dirfd, const char *name, struct fq_safetensors **out,
                       struct fq_error *err);
/* The same over bytes in memory, which must outlive the result. */
int fq_safetensors_new_memory(const void *bytes, size_t size, const char *name,
                              struct fq_safetensors **out, struct fq_error *err);
void fq_safetensors_free(struct fq_safetensors *file);

/* Bytes an element of a safetensors dtype; 0 for one that this reader does not know. */
size_t fq_safetensors_dtype_size(const char *dtype);

struct fq_safetensors_writer;
/*
 * Starts NAME beneath DIRFD (borrowed until _free) as a temporary file.  The descriptions give
 * name, dtype, rank and shape; the rest is ignored.  They are copied; data is laid out in this
 * order.  __metadata__ says {"format": "pt"}, which transformers asks for.
 */
int fq_safetensors_writer_new(int dirfd, const char *name,
                              const struct fq_checkpoint_tensor *tensors, size_t count,
                              struct fq_safetensors_writer **out, struct fq_error *err);
/* Writes the data of tensor i, once each, in any order.  BYTES must be what the shape says. */
int fq_safetensors_write(struct fq_safetensors_writer *writer, size_t i, const void *data,
                         uint64_t bytes, struct fq_error *err);
/* Checks that every tensor came, syncs, and renames into place (over an older file). */
int fq_safetensors_writer_finish(struct fq_safetensors_writer *writer, struct fq_error *err);
/* Removes the temporary file of a writer that did not finish.  NULL is fine. */
void fq_safetensors_writer_free(struct fq_safetensors_writer *writer);

#endif
