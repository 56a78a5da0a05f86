/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One on-disk layout of quantized weights: which tensors make up a linear
 * layer, what the configuration says of it, and how they become a matrix in
 * canonical form.  A layout is a file and a row in disk-layout.c's table; checkpoint.c
 * alone calls them, on its thread.
 */
#ifndef FQ_MODEL_DISK_LAYOUT_H
#define FQ_MODEL_DISK_LAYOUT_H

#include "checkpoint.h"

#include <jansson.h>

#define FQ_LAYOUT_PARTS 5

struct fq_layout_ops {
    const char *name; /* config.json's quant_method, or the format's own name */
    /* What a layer's tensors are called, after the module's name; NULL past the last.  Each
     * tensor with the first of them makes a layer, one with the second is nowhere else, the others
     * may be missing. */
    const char *suffixes[FQ_LAYOUT_PARTS];

    /* Reads a quantization_config.  Errors: -FQ_FORMAT, -FQ_UNSUPPORTED, -FQ_NO_MEMORY. */
    int (*config_new)(const json_t *json, void **config, struct fq_error *err);
    void (*config_free)(void *config); /* NULL is fine */

    /* Whether a tensor with the first suffix is a packed one; NULL: always. */
    bool (*claims)(const struct fq_checkpoint_tensor *tensor);

    /*
     * Checks the parts (in the order of suffixes, the missing ones NULL) against each other and
     * against the configuration; fills in matrix, symmetric and stored.
     */
    int (*describe)(const void *config, const char *module,
                    const struct fq_checkpoint_tensor *const *parts,
                    struct fq_checkpoint_matrix *out, struct fq_error *err);
    /* Codes, scales and zeros of a described matrix: borrowed where the layout allows, else owned.
     */
    int (*load)(const void *config, const struct fq_checkpoint_tensor *const *parts,
                const struct fq_checkpoint_matrix *described, struct fq_loaded_matrix *out,
                struct fq_error *err);
};

extern const struct fq_layout_ops fq_layout_compressed_tensors, fq_layout_gptq, fq_layout_awq,
    fq_layout_gguf;

/* By quant_method; NULL, and *err says what is served, for another one. */
const struct fq_layout_ops *fq_layout_by_method(const char *method, struct fq_error *err);
/* The layout, of those with a quant_method, whose layers begin with a tensor so named, or NULL. */
const struct fq_layout_ops *fq_layout_by_tensor(const char *name);

/* Adds the file and the tensor to a message about one tensor.  err must not be NULL. */
#define FQ_TENSOR_FAIL(err, status, tensor, ...)                                                   \
    (fq_fail((err), (status), __VA_ARGS__),                                                        \
     fq_fail_in((err), "%s: tensor '%.200s'", (tensor)->file, (tensor)->name))

/* ---- what the layouts share ---------------------------------------------------------------- */

/* -FQ_FORMAT unless TENSOR, which BESIDE needs by SUFFIX, is there and is I32 of rank 2. */
int fq_layout_check_words(const struct fq_checkpoint_tensor *tensor, const char *suffix,
                          const struct fq_checkpoint_tensor *beside, struct fq_error *err);
/* The same of scales, F16 or BF16 of rank 2; sets *type. */
int fq_layout_check_scales(const struct fq_checkpoint_tensor *tensor, const char *suffix,
                           const struct fq_checkpoint_tensor *beside, enum fq_dtype *type,
                           struct fq_error *err);
/* -FQ_FORMAT unless the rank-2 TENSOR has this shape; WHY says what needs it. */
int fq_layout_check_shape(const struct fq_checkpoint_tensor *tensor, int64_t rows, int64_t columns,
                          const struct fq_matrix *matrix, struct fq_error *err);
/* -FQ_UNSUPPORTED for n, k or group out of range, in the name of TENSOR. */
int fq_layout_check_matrix(const struct fq_checkpoint_tensor *tensor,
                           const struct fq_matrix *matrix, struct fq_error *err);
/* -FQ_UNSUPPORTED where a g_idx, NULL or I32 [k], is any order but k / group: activation order. */
int fq_layout_check_order(const struct fq_checkpoint_tensor *g_idx, const struct fq_matrix *matrix,
                          struct fq_error *err);
/* -FQ_FORMAT for an infinity or NaN, which would poison every result of its row. */
int fq_layout_check_finite(const struct fq_checkpoint_tensor *scales, enum fq_dtype type,
                           struct fq_error *err);

/*
 * One block for a matrix whose codes, scales and zeros (unless symmetric) are all converted; points
 * `out` and the three at it.  err names TENSOR where there is no memory.
 */
struct fq_layout_storage {
    uint8_t *codes;   /* [n][fq_matrix_row_bytes] */
    uint16_t *scales; /* [n][groups] */
    uint8_t *zeros;   /* [n][groups], NULL where symmetric */
};
int fq_layout_allocate(const struct fq_checkpoint_tensor *tensor,
                       const struct fq_checkpoint_matrix *described, struct fq_loaded_matrix *out,
                       struct fq_layout_storage *storage, struct fq_error *err);

/* [rows][columns] of 32-bit or 16-bit items, any alignment, to [columns][rows]. */
void fq_layout_transpose_words(const void *from, int64_t rows, int64_t columns, uint8_t *to);
void fq_layout_transpose_scales(const void *from, int64_t rows, int64_t columns, uint16_t *to);

/* Code i of a dense stream of codes, lowest bits first, in the words at FIRST, FIRST + STRIDE, ...
 */
unsigned fq_layout_code(const void *words, int64_t first, int64_t stride, int64_t i, int bits);

/* ceil(codes · bits / 32). */
static inline int64_t fq_layout_words(int64_t codes, int bits) {
    return (codes * bits + 31) / 32;
}

#endif
