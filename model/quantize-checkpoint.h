/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Directory to directory: an ordinary Hugging Face checkpoint in, the same
 * checkpoint with its linear layers quantized out, in the compressed-tensors
 * pack-quantized layout.  One matrix is in memory at a time.
 */
#ifndef FQ_MODEL_QUANTIZE_CHECKPOINT_H
#define FQ_MODEL_QUANTIZE_CHECKPOINT_H

#include "error.h"

#include <stdbool.h>

/* What became of one linear layer. */
struct fq_quantized_layer {
    const char *name; /* borrowed for the call */
    int64_t n, k;
    bool kept_dense;       /* 3-bit rows of this length are ambiguous in the layout */
    int bits;              /* 0 where kept dense, as the rest */
    int64_t group;         /* k: per channel */
    uint64_t bytes_before; /* the weights alone, without bias */
    uint64_t bytes_after;
    double error; /* ‖W − dequantized‖ / ‖W‖ */
};

struct fq_quantize_options {
    int bits;             /* 8, 4 or 3 */
    int64_t group;        /* a multiple of 16, or 0 for per channel */
    uint64_t shard_bytes; /* a new file is begun where this would be passed */
    /* Called after each layer, on the caller's thread.  Not 0 ends the work: -FQ_CANCELLED. */
    int (*progress)(void *context, const struct fq_quantized_layer *layer, size_t done,
                    size_t total);
    void *context;
};

struct fq_quantize_summary {
    size_t layers, kept_dense;
    int64_t weights;                        /* quantized ones */
    uint64_t bytes_before, bytes_after;     /* of the quantized layers' weights */
    uint64_t tensors_before, tensors_after; /* of all tensors, in bytes */
};

/*
 * Quantizes the checkpoint IN into the directory OUT, which must not exist.  Other tensors are
 * copied as they are, and so are the tokenizer's and other small files beside them.  OUT appears
 * complete and synced, or not at all.
 * Errors: those of fq_checkpoint_new and fq_quantize; -FQ_EXISTS; -FQ_INVALID where IN is already
 * quantized or has no linear layer; -FQ_IO; -FQ_CANCELLED.
 */
int fq_quantize_checkpoint(const char *in, const char *out,
                           const struct fq_quantize_options *options,
                           struct fq_quantize_summary *summary, struct fq_error *err);

#endif
