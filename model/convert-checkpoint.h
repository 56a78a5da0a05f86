/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A quantized checkpoint of any format that is read, rewritten in the
 * compressed-tensors pack-quantized layout with the same codes, scales and zero
 * points, so that every weight is the same bit for bit.  One matrix is in memory
 * at a time.
 */
#ifndef FQ_MODEL_CONVERT_CHECKPOINT_H
#define FQ_MODEL_CONVERT_CHECKPOINT_H

#include "checkpoint.h"

struct fq_convert_options {
    uint64_t shard_bytes; /* a new file is begun where this would be passed */
    /* Called after each matrix, on the caller's thread.  Not 0 ends the work: -FQ_CANCELLED. */
    int (*progress)(void *context, const struct fq_checkpoint_matrix *matrix, size_t done,
                    size_t total);
    void *context;
};

struct fq_convert_summary {
    char format[24];                    /* of IN: "gptq", ... */
    size_t matrices, copied;            /* rewritten ones, and tensors copied through */
    uint64_t bytes_before, bytes_after; /* of all tensors */
};

/*
 * Rewrites the directory or GGUF file IN as the directory OUT, which must not exist.  Tensors that
 * belong to no matrix are copied as they are, and so are a directory's tokenizer and other small
 * files. OUT appears complete and synced, or not at all. Errors: those of fq_checkpoint_new and
 * fq_checkpoint_load; -FQ_EXISTS; -FQ_INVALID where IN has no quantized matrix or OUT is within it;
 * -FQ_UNSUPPORTED (see fq_ct_output_add); -FQ_IO; -FQ_CANCELLED.
 */
int fq_convert_checkpoint(const char *in, const char *out, const struct fq_convert_options *options,
                          struct fq_convert_summary *summary, struct fq_error *err);

#endif
