/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The canonical form of a quantized matrix: what checkpoints are turned into,
 * what every backend prepacks from, and what tests compute references from.
 *
 *     W[n][k] = (code[n][k] − zero[n][k / group]) · scale[n][k / group]
 *
 * Codes are unsigned, of `bits` bits, packed along K as one dense stream a
 * row, lowest bits first, in 32-bit little-endian words; rows start on a word.
 * That is the dense compressed-tensors "pack-quantized" layout.  A symmetric
 * matrix has no zero points: its zero is 2^(bits−1).
 */
#ifndef FQ_KERNELS_MATRIX_H
#define FQ_KERNELS_MATRIX_H

#include "error.h"

#include <stdbool.h>

/* N and K; keeps every product of sizes in 63 bits. */
#define FQ_MATRIX_DIM_MAX ((int64_t)1 << 24)
#define FQ_GROUP_MIN      16

struct fq_matrix {
    int64_t n, k;             /* outputs (rows), inputs (columns): 1 to FQ_MATRIX_DIM_MAX */
    int bits;                 /* 8, 4 or 3 */
    int64_t group;            /* weights along K that share a scale: a multiple of 16, or k (per
                                 channel); the last group is short where group does not divide k */
    enum fq_dtype scale_type; /* FQ_F16 or FQ_BF16 */
    const void *codes;        /* [n][fq_matrix_row_bytes]; borrowed, any alignment */
    const void *scales;       /* [n][fq_matrix_groups] of scale_type; borrowed, any alignment */
    const uint8_t *zeros;     /* [n][fq_matrix_groups] codes, or NULL when symmetric; borrowed */
};

/* ceil(k / group). */
static inline int64_t fq_matrix_groups(const struct fq_matrix *matrix) {
    return (matrix->k + matrix->group - 1) / matrix->group;
}

/* Bytes of one packed row: 4·ceil(k·bits / 32). */
static inline int64_t fq_matrix_row_bytes(const struct fq_matrix *matrix) {
    return (matrix->k * matrix->bits + 31) / 32 * 4;
}

/* Bytes of the codes, scales and zero points together. */
int64_t fq_matrix_bytes(const struct fq_matrix *matrix);

/* 0, or -FQ_INVALID with the field, its value and what is allowed.  Looks at no element. */
int fq_matrix_check(const struct fq_matrix *matrix, struct fq_error *err);

/* One code, 0 ≤ code < 2^bits.  0 ≤ row < n, 0 ≤ column < k: not checked. */
unsigned fq_matrix_code(const struct fq_matrix *matrix, int64_t row, int64_t column);

/* W[row][0..k) in float64, exact: codes, zeros and fp16/bf16 scales all fit. */
void fq_matrix_dequantize_row(const struct fq_matrix *matrix, int64_t row, double *out);

/* Packs k codes (one a byte, each < 2^bits) into one row of fq_matrix_row_bytes; pads with 0. */
void fq_matrix_pack_row(uint8_t *packed, const uint8_t *codes, int64_t k, int bits);

#endif
