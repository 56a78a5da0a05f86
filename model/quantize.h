/* SPDX-License-Identifier: Apache-2.0 */
/*
 * FineQuant's quantizer (arXiv 2308.09723, section 3): linear, symmetric,
 * absmax over each group of `group` consecutive weights along K,
 *     s = 2·max|w| / (2^bits − 1),   q = round(w / s),
 * with s rounded to fp16 before it is used, so that what is stored is what was
 * measured.  Pure functions: any thread.
 */
#ifndef FQ_MODEL_QUANTIZE_H
#define FQ_MODEL_QUANTIZE_H

#include "matrix.h"

/* A dense row-major matrix of FQ_F32, FQ_F16 or FQ_BF16 elements, any alignment. */
struct fq_dense {
    int64_t n, k;
    enum fq_dtype type;
    const void *data;
};

/*
 * Quantizes into canonical form.  *matrix has bits and group set (group 0: per channel); the rest
 * is filled in.  *storage, to be freed by the caller, holds codes and scales.
 * Errors: -FQ_INVALID (bits, group, sizes; a NaN or infinity, with its row and column),
 * -FQ_NO_MEMORY.
 */
int fq_quantize(const struct fq_dense *dense, struct fq_matrix *matrix, void **storage,
                struct fq_error *err);

/* ‖W − dequantized‖ / ‖W‖ over the whole matrix, in float64; 0 for an all-zero W; NaN
 * without memory for a row a thread. */
double fq_quantize_error(const struct fq_dense *dense, const struct fq_matrix *matrix);

#endif
