/* SPDX-License-Identifier: Apache-2.0 */
/* The table of layouts, and the checks and rearrangements that they share. */
#include "disk-layout.h"

#include <stdlib.h>
#include <string.h>

static const struct fq_layout_ops *const methods[] = {&fq_layout_compressed_tensors,
                                                      &fq_layout_gptq, &fq_layout_awq};

#define METHOD_COUNT (sizeof methods / sizeof *methods)

const struct fq_layout_ops *fq_layout_by_method(const char *method, struct fq_error *err) {
    for (size_t i = 0; i < METHOD_COUNT; i++)
        if (strcmp(methods[i]->name, method) == 0)
            return methods[i];
    fq_fail(err, FQ_UNSUPPORTED,
            "quant_method '%.40s', served are compressed-tensors, gptq and awq", method);
    return NULL;
}

const struct fq_layout_ops *fq_layout_by_tensor(const char *name) {
    size_t length = strlen(name);

    for (size_t i = 0; i < METHOD_COUNT; i++) {
        size_t cut = strlen(methods[i]->suffixes[0]);

        if (length > cut && strcmp(name + length - cut, methods[i]->suffixes[0]) == 0)
            return methods[i];
    }
    return NULL;
}

/* ---- checks ------------------------------------------------------------------------------- */

static int check_there(const struct fq_checkpoint_tensor *tensor, const char *suffix,
                       const struct fq_checkpoint_tensor *beside, struct fq_error *err) {
    return tensor ? 0 : FQ_TENSOR_FAIL(err, FQ_FORMAT, beside, "has no %s beside it", suffix + 1);
}

int fq_layout_check_words(const struct fq_checkpoint_tensor *tensor, const char *suffix,
                          const struct fq_checkpoint_tensor *beside, struct fq_error *err) {
    int rc = check_there(tensor, suffix, beside, err);

    if (rc == 0 && (strcmp(tensor->dtype, "I32") != 0 || tensor->rank != 2))
        rc = FQ_TENSOR_FAIL(err, FQ_FORMAT, tensor, "is %s of rank %d, must be I32 of rank 2",
                            tensor->dtype, tensor->rank);
    return rc;
}

int fq_layout_check_scales(const struct fq_checkpoint_tensor *tensor, const char *suffix,
                           const struct fq_checkpoint_tensor *beside, enum fq_dtype *type,
                           struct fq_error *err) {
    int rc = check_there(tensor, suffix, beside, err);

    if (rc < 0)
        return rc;
    if (strcmp(tensor->dtype, "F16") == 0)
        *type = FQ_F16;
    else if (strcmp(tensor->dtype, "BF16") == 0)
        *type = FQ_BF16;
    else
        return FQ_TENSOR_FAIL(err, FQ_UNSUPPORTED, tensor,
                              "is %s, only F16 and BF16 scales are served", tensor->dtype);
    if (tensor->rank != 2)
        return FQ_TENSOR_FAIL(err, FQ_FORMAT, tensor, "is of rank %d, must be of rank 2",
                              tensor->rank);
    return 0;
}

int fq_layout_check_shape(const struct fq_checkpoint_tensor *tensor, int64_t rows, int64_t columns,
                          const struct fq_matrix *matrix, struct fq_error *err) {
    if (tensor->shape[0] == rows && tensor->shape[1] == columns)
        return 0;
    return FQ_TENSOR_FAIL(err, FQ_FORMAT, tensor,
                          "is [%lld, %lld], must be [%lld, %lld] for N = %lld, K = %lld, %d bits, "
                          "groups of %lld",
                          (long long)tensor->shape[0], (long long)tensor->shape[1], (long long)rows,
                          (long long)columns, (long long)matrix->n, (long long)matrix->k,
                          matrix->bits, (long long)matrix->group);
}

int fq_layout_check_matrix(const struct fq_checkpoint_tensor *tensor,
                           const struct fq_matrix *matrix, struct fq_error *err) {
    if (fq_matrix_check(matrix, err) == 0)
        return 0;
    err->status = -FQ_UNSUPPORTED;
    return fq_fail_in(err, "%s: tensor '%.200s'", tensor->file, tensor->name);
}

int fq_layout_check_order(const struct fq_checkpoint_tensor *g_idx, const struct fq_matrix *matrix,
                          struct fq_error *err) {
    if (!g_idx)
        return 0;
    if (strcmp(g_idx->dtype, "I32") != 0 || g_idx->rank != 1 || g_idx->shape[0] != matrix->k)
        return FQ_TENSOR_FAIL(err, FQ_FORMAT, g_idx, "is not I32 of [%lld]", (long long)matrix->k);
    for (int64_t k = 0; k < matrix->k; k++) {
        int32_t group;

        memcpy(&group, (const char *)g_idx->data + k * 4, 4);
        if (group != k / matrix->group)
            return FQ_TENSOR_FAIL(err, FQ_UNSUPPORTED, g_idx,
                                  "activation order (act-order, desc_act) is not served: column "
                                  "%lld is in group %d, not in %lld",
                                  (long long)k, group, (long long)(k / matrix->group));
    }
    return 0;
}

int fq_layout_check_finite(const struct fq_checkpoint_tensor *scales, enum fq_dtype type,
                           struct fq_error *err) {
    uint16_t exponent = type == FQ_F16 ? 0x7c00 : 0x7f80;
    int64_t columns = scales->rank == 2 ? scales->shape[1] : 1;

    for (uint64_t i = 0; i < scales->bytes / 2; i++) {
        uint16_t bits;

        memcpy(&bits, (const char *)scales->data + i * 2, 2);
        if ((bits & exponent) == exponent)
            return FQ_TENSOR_FAIL(err, FQ_FORMAT, scales, "the scale at [%lld, %lld] is not finite",
                                  (long long)i / (long long)columns,
                                  (long long)i % (long long)columns);
    }
    return 0;
}

/* ---- converting --------------------------------------------------------------------------- */

int fq_layout_allocate(const struct fq_checkpoint_tensor *tensor,
                       const struct fq_checkpoint_matrix *described, struct fq_loaded_matrix *out,
                       struct fq_layout_storage *storage, struct fq_error *err) {
    const struct fq_matrix *matrix = &described->matrix;
    size_t codes = (size_t)matrix->n * (size_t)fq_matrix_row_bytes(matrix);
    size_t groups = (size_t)matrix->n * (size_t)fq_matrix_groups(matrix);
    size_t bytes = codes + groups * (described->symmetric ? 2 : 3);
    uint8_t *block = malloc(bytes);

    if (!block)
        return FQ_TENSOR_FAIL(err, FQ_NO_MEMORY, tensor, "no memory for %zu bytes", bytes);
    *storage = (struct fq_layout_storage){
        .codes = block,
        .scales = (uint16_t *)(void *)(block + codes), /* rows are whole words */
        .zeros = described->symmetric ? NULL : block + codes + groups * 2,
    };
    *out = (struct fq_loaded_matrix){.matrix = *matrix, .owned = block};
    out->matrix.codes = storage->codes;
    out->matrix.scales = storage->scales;
    out->matrix.zeros = storage->zeros;
    return 0;
}

/* Tiles of this many rows and columns keep both sides' cache lines in use until they are full. */
#define TILE 32

#define TRANSPOSE(item, from, rows, columns, to)                                                   \
    for (int64_t row = 0; row < (rows); row += TILE)                                               \
        for (int64_t column = 0; column < (columns); column += TILE)                               \
            for (int64_t c = column; c < column + TILE && c < (columns); c++)                      \
                for (int64_t r = row; r < row + TILE && r < (rows); r++)                           \
    memcpy((char *)(to) + (c * (rows) + r) * (item),                                               \
           (const char *)(from) + (r * (columns) + c) * (item), (item))

void fq_layout_transpose_words(const void *from, int64_t rows, int64_t columns, uint8_t *to) {
    TRANSPOSE(4, from, rows, columns, to);
}

void fq_layout_transpose_scales(const void *from, int64_t rows, int64_t columns, uint16_t *to) {
    TRANSPOSE(2, from, rows, columns, to);
}

static uint32_t load_word(const void *words, int64_t i) {
    const uint8_t *bytes = (const uint8_t *)words + i * 4;

    return bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

unsigned fq_layout_code(const void *words, int64_t first, int64_t stride, int64_t i, int bits) {
    int64_t word = i * bits / 32;
    int shift = (int)(i * bits % 32);
    uint32_t code = load_word(words, first + word * stride) >> shift;

    if (shift + bits > 32)
        code |= load_word(words, first + (word + 1) * stride) << (32 - shift);
    return code & ((1u << bits) - 1);
}
