/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One row of weights in float32 and the fitting of a scale to one group of it:
 * what fq_quantize and the measurements have in common.  Internal to model/;
 * a row belongs to one thread.
 */
#ifndef FQ_MODEL_QUANTIZE_ROW_H
#define FQ_MODEL_QUANTIZE_ROW_H

#include "quantize-kernel.h"
#include "quantize.h"

/* What can be wrong with a row, and where. */
struct fq_row_fault {
    int64_t row, column; /* of the weight */
    enum {
        FQ_ROW_FINE,
        FQ_ROW_NOT_FINITE,
        FQ_ROW_SCALE_OVERFLOW
    } kind;
    float value;
};

struct fq_row {
    const struct fq_quantize_kernels *kernels;
    int64_t k;
    size_t blocks;        /* of 16; what is beyond k is zero */
    float *weights;       /* [blocks · 16] */
    uint32_t *magnitudes; /* [blocks]: as the kernel gives them */
    uint8_t *codes;       /* [blocks · 16, and zeros to a multiple of 32] */
    double power;         /* Σ w² */
    void *memory;         /* owned: all of the above */
};

/* Scale and range of codes of one group: w ≈ q·scale with low ≤ q ≤ high, whole numbers. */
struct fq_fit {
    uint16_t stored; /* the scale in fp16 */
    float scale;     /* the same in float32; 0 where all weights are, or are at most half of what
                        fp16 has for its least: those have the code of 0 anyway */
    float low, high; /* −zero point, and 2^bits − 1 more */
};

/* The largest magnitude of the COUNT weights from COLUMN on, which is a multiple of 16. */
float fq_row_absmax(const struct fq_row *row, int64_t column, int64_t count);
/* Fits the group; false, with *fault filled in, where its scale exceeds fp16. */
bool fq_row_fit(const struct fq_row *row, int64_t column, int64_t count, int bits,
                const struct fq_quantize_method *method, struct fq_fit *out,
                struct fq_row_fault *fault);
/* Σ (w − q·scale)² of the group with that fit. */
double fq_row_error(const struct fq_row *row, int64_t column, int64_t count,
                    const struct fq_fit *fit);

/* What is done with row n once it is loaded; false, with *fault filled in, where it cannot be. */
typedef bool (*fq_row_body)(struct fq_row *row, int64_t n, void *context,
                            struct fq_row_fault *fault);
/* Some of a matrix's rows; n is then the place in the list. */
struct fq_row_list {
    const int64_t *rows;
    int64_t count;
};
/* Loads every row, or those of LIST where it is not NULL, and calls BODY, rows shared among
 * threads.  -FQ_INVALID for the topmost fault, -FQ_NO_MEMORY. */
int fq_rows(const struct fq_dense *dense, const struct fq_row_list *list, bool allow_nonfinite,
            fq_row_body body, void *context, struct fq_error *err);

#endif
