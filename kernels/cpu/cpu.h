/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Inside the cpu backend: the prepacked layout and the table of functions that
 * each instruction set provides.
 *
 * The layout.  Rows of W are taken in blocks of 64 (the last one padded with
 * zero weights), K is padded to a multiple of 32.  A vector lane is a row, so
 * that a weight is multiplied with a broadcast activation and nothing is summed
 * across lanes:
 *
 *     4 and 3 bits:  word 0 of rows 0..63 | word 1 of rows 0..63 | ...
 *                    where the words of a row are its canonical stream: 8 codes
 *                    a word, or 32 codes in three words
 *     8 bits:        k = 0 of rows 0..63 | k = 1 of rows 0..63 | ...   one byte each
 *     scales:        group 0 of rows 0..63 | group 1 of rows 0..63 | ...
 *     zero points:   likewise, as int8: zero − 2^(bits−1)
 *
 * Codes are stored less 2^(bits−1), in two's complement of `bits` bits, so that
 * sign extension gives the weight over its scale exactly.
 */
#ifndef FQ_KERNELS_CPU_H
#define FQ_KERNELS_CPU_H

#include "../backend-impl.h"

#define FQ_CPU_BLOCK     64  /* rows of W in a block */
#define FQ_CPU_K_ALIGN   32  /* K is padded to this */
#define FQ_CPU_STEP      16  /* columns a kernel step takes; no group boundary lies inside */
#define FQ_CPU_ROWS_PASS 384 /* rows of X that a large-M pass takes at once */
#define FQ_CPU_PANEL_K   512 /* columns of W dequantized at once for large M */

struct fq_cpu_weights {
    struct fq_weights base;
    int64_t blocks; /* ceil(n / 64) */
    int64_t k_padded;
    int64_t groups;
    int64_t block_bytes;    /* codes of one block */
    const uint8_t *codes;   /* [blocks][block_bytes], 64-byte aligned */
    const uint16_t *scales; /* [blocks][groups][64] */
    const int8_t *zeros;    /* [blocks][groups][64], or NULL */
    void *mapping;          /* owns all three */
    size_t mapping_bytes;
};

/* A GEMM with X converted: what the instruction sets compute. */
struct fq_cpu_job {
    const struct fq_cpu_weights *weights;
    const struct fq_gemm *gemm;
    int64_t row;        /* first row of X and Y that this pass covers */
    int64_t rows;       /* and how many */
    const float *x;     /* [rows][k_padded], zero-padded */
    const float *x_sum; /* [rows][groups]: sums of x over each group; NULL when symmetric */
    int threads;
    float *scratch; /* [threads][fq_cpu_scratch_floats(rows)], 64-byte aligned */
};

/* Floats that one thread needs for a pass of `rows` rows. */
size_t fq_cpu_scratch_floats(int64_t rows);

struct fq_cpu_kernels {
    const char *name;
    /* Both compute all rows of the job and apply the epilogue.  decode: per-row results do not
     * depend on the other rows.  panel: dequantizes a panel at a time, for many rows. */
    void (*decode)(const struct fq_cpu_job *job);
    void (*panel)(const struct fq_cpu_job *job);
    /* One row of X to float, and one block row of results to Y. */
    void (*to_f32)(float *out, const void *in, enum fq_dtype type, int64_t count);
};

extern const struct fq_cpu_kernels fq_cpu_generic;
extern const struct fq_cpu_kernels fq_cpu_avx2;
extern const struct fq_cpu_kernels fq_cpu_avx512;

/* Bias and activation, in place: values[i] is column `column + i` of Y.  (epilogue.c) */
void fq_cpu_epilogue(const struct fq_gemm *gemm, int64_t column, float *values, int64_t count);

/* Prepacking (pack.c). */
uint64_t fq_cpu_weights_size(struct fq_backend *backend, const struct fq_matrix *matrix);
int fq_cpu_weights_new(struct fq_backend *backend, const struct fq_matrix *matrix,
                       struct fq_weights **out, struct fq_error *err);
void fq_cpu_weights_free(struct fq_weights *weights);

#endif
