/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A checkpoint, opened for reading: a directory with config.json, safetensors
 * shards and their index, or a GGUF file; mapped and checked, with every linear
 * layer described in FineQuant's terms, whatever layout the disk has.
 *
 * Weights are not read until a matrix is asked for.  Not thread-safe; distinct
 * checkpoints are independent.
 */
#ifndef FQ_MODEL_CHECKPOINT_H
#define FQ_MODEL_CHECKPOINT_H

#include "matrix.h"
#include "quantize.h"

struct fq_checkpoint;
struct json_t; /* jansson's */

/*
 * Opens the directory or GGUF file PATH.  Checks every header, the index and the quantization
 * config before it returns, so that a malformed checkpoint fails here, with the file, the tensor
 * and the fault.
 * Errors: -FQ_NOT_FOUND, -FQ_DENIED, -FQ_FORMAT, -FQ_UNSUPPORTED, -FQ_IO, -FQ_NO_MEMORY.
 */
int fq_checkpoint_new(const char *path, struct fq_checkpoint **out, struct fq_error *err);
/* A file of a directory that is in memory. */
struct fq_memory_file {
    const char *name;
    const void *bytes;
    size_t size;
};
/*
 * The same over files in memory, which must outlive the result, for tests and fuzzers: what a
 * directory would hold, or one file whose name ends in ".gguf".
 */
int fq_checkpoint_new_memory(const struct fq_memory_file *files, size_t count,
                             struct fq_checkpoint **out, struct fq_error *err);
void fq_checkpoint_free(struct fq_checkpoint *checkpoint); /* NULL is fine */

/* Any tensor of the files, as it is stored. */
struct fq_checkpoint_tensor {
    const char *name;  /* owned by the checkpoint */
    const char *dtype; /* safetensors' name: "F32", "F16", "BF16", "I32", ...; or GGUF's "Q8_0"
                          and "Q4_0", whose shape counts weights */
    int rank;
    int64_t shape[8];
    const void *data; /* mapped, any alignment */
    uint64_t bytes;
    const char *file; /* the file's base name */
};
size_t fq_checkpoint_tensor_count(const struct fq_checkpoint *checkpoint);
const struct fq_checkpoint_tensor *fq_checkpoint_tensor(const struct fq_checkpoint *checkpoint,
                                                        size_t i); /* sorted by name */
const struct fq_checkpoint_tensor *fq_checkpoint_find(const struct fq_checkpoint *checkpoint,
                                                      const char *name); /* or NULL */
/* The index of the matrix that tensor i is a part of, its bias aside, or SIZE_MAX. */
size_t fq_checkpoint_owner(const struct fq_checkpoint *checkpoint, size_t i);
/* How it is stored: "compressed-tensors", "gptq", "awq" or "gguf"; "dense" where no layer is
 * quantized. */
const char *fq_checkpoint_format(const struct fq_checkpoint *checkpoint);
/* config.json as it is, or what a GGUF file's metadata says in its terms; borrowed, NULL where
 * there is none. */
const struct json_t *fq_checkpoint_config(const struct fq_checkpoint *checkpoint);

/* A linear layer: a quantized one, or a dense [N, K] "X.weight" that loading quantizes. */
struct fq_checkpoint_matrix {
    const char *name;        /* "encoder.layer.0.attention.self.query": without ".weight" */
    struct fq_matrix matrix; /* shape, bits, group, scale type; codes, scales, zeros NULL */
    bool symmetric;
    bool dense;      /* stored as F32, F16 or BF16; only where nothing says that the checkpoint
                        is quantized: else what is dense was meant to stay so */
    bool has_bias;   /* "X.bias", [N], F32, F16 or BF16, is there */
    uint64_t stored; /* bytes on disk, bias excluded */
};
size_t fq_checkpoint_matrix_count(const struct fq_checkpoint *checkpoint);
const struct fq_checkpoint_matrix *fq_checkpoint_matrix(const struct fq_checkpoint *checkpoint,
                                                        size_t i); /* sorted by name */

/* A matrix in canonical form, either borrowed from the mapping or converted into `owned`. */
struct fq_loaded_matrix {
    struct fq_matrix matrix;
    void *owned; /* freed by _fini; NULL when all of it is borrowed */
};
/*
 * Reads one matrix; a dense one is quantized with what fq_checkpoint_quantize_as set (default:
 * 4 bits, group 64, symmetric).  The result is valid until _fini and while the checkpoint is open.
 */
int fq_checkpoint_load(struct fq_checkpoint *checkpoint, size_t i, struct fq_loaded_matrix *out,
                       struct fq_error *err);
void fq_loaded_matrix_fini(struct fq_loaded_matrix *loaded);
/* The weights of a dense matrix i as they are stored, borrowed.  -FQ_NOT_FOUND where it is packed.
 */
int fq_checkpoint_dense(const struct fq_checkpoint *checkpoint, size_t i, struct fq_dense *out);
/* The bias of matrix i as float32 into out[n].  -FQ_NOT_FOUND without one. */
int fq_checkpoint_bias(struct fq_checkpoint *checkpoint, size_t i, float *out,
                       struct fq_error *err);
/* Whether a layer of that name is stored as [K, N], as GPT-2's Conv1D layers are. */
bool fq_checkpoint_is_transposed(const struct fq_checkpoint *checkpoint, const char *layer);
/* Tells the kernel that the pages of matrix i will not be needed again soon. */
void fq_checkpoint_drop(struct fq_checkpoint *checkpoint, size_t i);
void fq_checkpoint_drop_tensor(const struct fq_checkpoint_tensor *tensor); /* the same of one */

/* How dense matrices are quantized on load: bits 8, 4 or 3; group as in struct fq_matrix, 0 for per
 * channel.  Updates what fq_checkpoint_matrix says. */
int fq_checkpoint_quantize_as(struct fq_checkpoint *checkpoint, int bits, int64_t group,
                              struct fq_error *err);

#endif
