/* SPDX-License-Identifier: Apache-2.0 */
/*
 * GGUF's quantized blocks of 32 weights along K.  Q8_0: fp16 d, 32 signed bytes
 * q, W = q·d.  Q4_0: fp16 d, 16 bytes, whose low nibbles are the first half and
 * whose high ones the second, W = (q − 8)·d.  d may be negative in Q4_0, and a
 * scale of ours too, so that both are exact: codes q + 128 and q, symmetric.
 */
#include "disk-layout.h"
#include "gguf.h"

#include <string.h>

#define SCALE_BYTES 2

static bool claims(const struct fq_checkpoint_tensor *tensor) {
    return strcmp(tensor->dtype, "Q8_0") == 0 || strcmp(tensor->dtype, "Q4_0") == 0;
}

static int describe(const void *config, const char *module,
                    const struct fq_checkpoint_tensor *const *parts,
                    struct fq_checkpoint_matrix *out, struct fq_error *err) {
    const struct fq_checkpoint_tensor *weight = parts[0];

    (void)config, (void)module;
    out->matrix = (struct fq_matrix){
        .n = weight->shape[0],
        .k = weight->shape[1],
        .bits = strcmp(weight->dtype, "Q8_0") == 0 ? 8 : 4,
        .group = FQ_GGUF_BLOCK,
        .scale_type = FQ_F16,
    };
    out->symmetric = true;
    return fq_layout_check_matrix(weight, &out->matrix, err);
}

static void load_q8(const uint8_t *quants, uint8_t *codes) {
    for (int i = 0; i < FQ_GGUF_BLOCK; i++)
        codes[i] = quants[i] ^ 0x80;
}

static void load_q4(const uint8_t *quants, uint8_t *codes) {
    for (int i = 0; i < FQ_GGUF_BLOCK / 4; i++) {
        unsigned first = quants[2 * i], second = quants[2 * i + 1];

        codes[i] = (uint8_t)((first & 15) | (second & 15) << 4);
        codes[FQ_GGUF_BLOCK / 4 + i] = (uint8_t)(first >> 4 | (second & 0xf0));
    }
}

/* K is whole blocks, and a block of codes is whole bytes: blocks follow each other in both. */
static int load(const void *config, const struct fq_checkpoint_tensor *const *parts,
                const struct fq_checkpoint_matrix *described, struct fq_loaded_matrix *out,
                struct fq_error *err) {
    const struct fq_checkpoint_tensor *weight = parts[0];
    const uint8_t *block = weight->data;
    const struct fq_matrix *matrix = &described->matrix;
    int64_t blocks = matrix->n * fq_matrix_groups(matrix);
    size_t code_bytes = FQ_GGUF_BLOCK * (size_t)matrix->bits / 8;
    struct fq_layout_storage storage;
    int rc = fq_layout_allocate(weight, described, out, &storage, err);

    (void)config;
    for (int64_t i = 0; i < blocks && rc == 0; i++, block += SCALE_BYTES + code_bytes) {
        uint16_t scale;

        memcpy(&scale, block, SCALE_BYTES);
        storage.scales[i] = scale;
        if ((scale & 0x7c00) == 0x7c00) {
            fq_loaded_matrix_fini(out);
            return FQ_TENSOR_FAIL(err, FQ_FORMAT, weight,
                                  "the scale of row %lld, block %lld is not finite",
                                  (long long)(i / fq_matrix_groups(matrix)),
                                  (long long)(i % fq_matrix_groups(matrix)));
        }
        if (matrix->bits == 8)
            load_q8(block + SCALE_BYTES, storage.codes + (size_t)i * code_bytes);
        else
            load_q4(block + SCALE_BYTES, storage.codes + (size_t)i * code_bytes);
    }
    return rc;
}

const struct fq_layout_ops fq_layout_gguf = {
    .name = "gguf",
    .suffixes = {".weight"},
    .claims = claims,
    .describe = describe,
    .load = load,
};
