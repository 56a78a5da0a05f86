/* SPDX-License-Identifier: Apache-2.0 */
/*
 * FineQuant's quantizer (arXiv 2308.09723, section 3): linear, with one scale,
 * and where asked for one zero point, for each group of consecutive weights
 * along K.  The scale is rounded to fp16 before it is used, so that what is
 * stored is what was measured.  Pure functions: any thread; the rows are shared
 * among OpenMP's threads and the result does not depend on their number, nor on
 * the processor.
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

enum fq_scale_rule {
    FQ_SCALE_ABSMAX, /* the paper's: 2·max|w| / (2^bits − 1); asymmetric, the range over that */
    FQ_SCALE_MSE     /* the one of a search that leaves the least squared error, never more than
                        absmax does; negative where the longer tail is positive, symmetric only */
};

struct fq_quantize_method {
    enum fq_scale_rule scale;
    bool asymmetric;
    bool allow_nonfinite; /* take NaN as 0 and an infinity as the row's largest finite magnitude */
};

/*
 * Quantizes into canonical form.  *matrix has bits and group set (group 0: per channel); the rest
 * is filled in.  *storage, to be freed by the caller, holds codes, scales and zero points.
 * *error, unless NULL, gets ‖W − dequantized‖ / ‖W‖; 0 for an all-zero W, 1 where all of a W that
 * is not is too small for fp16 scales (2^−25 and less) and becomes 0. Errors: -FQ_INVALID (bits,
 * group, sizes; a NaN, an infinity or a weight too large for an fp16 scale, with its row and
 * column), -FQ_NO_MEMORY.
 */
int fq_quantize(const struct fq_dense *dense, const struct fq_quantize_method *method,
                struct fq_matrix *matrix, void **storage, double *error, struct fq_error *err);

/* ‖W − dequantized‖ / ‖W‖ of any matrix of W's shape, in float64; NaN where W holds a NaN or an
 * infinity, or without memory for a row a thread. */
double fq_quantize_error(const struct fq_dense *dense, const struct fq_matrix *matrix);

/*
 * How the ranges of the groups compare with the weights, for several group sizes (0: per channel)
 * in one pass: crest[i] is the square root of (the mean over all weights of their group's max|w|²)
 * over (the mean of w²).  A rounding error is uniform over the step s = 2·max|w| / (2^bits − 1), so
 * that its mean square is s²/12 and the error to expect, relative to ‖W‖, is
 *     crest · 2 / ((2^bits − 1)·√12).
 * 0 for an all-zero W.  Errors: as fq_quantize.
 */
int fq_quantize_crest(const struct fq_dense *dense, bool allow_nonfinite, const int64_t *groups,
                      size_t count, double *crest, struct fq_error *err);

/* Whether fq_quantize could: 0, or its errors, in one pass that rounds nothing.  *matrix as there,
 * left as it is. */
int fq_quantize_check(const struct fq_dense *dense, const struct fq_quantize_method *method,
                      const struct fq_matrix *matrix, struct fq_error *err);

/* One way to quantize a matrix, and what it would leave. */
struct fq_quantize_trial {
    int bits;
    int64_t group; /* 0: per channel */
    bool asymmetric;
    double error; /* out: as fq_quantize's */
};
/* Measures all trials in one pass over W, with method's scale rule. */
int fq_quantize_measure(const struct fq_dense *dense, const struct fq_quantize_method *method,
                        struct fq_quantize_trial *trials, size_t count, struct fq_error *err);
/* The same, but for a large matrix an estimate from the ranges of all rows and trials on 256 of
 * them; quantize-measure.c says how far that is off. */
int fq_quantize_estimate(const struct fq_dense *dense, const struct fq_quantize_method *method,
                         struct fq_quantize_trial *trials, size_t count, struct fq_error *err);
/* Whether it is an estimate. */
bool fq_quantize_is_sampled(const struct fq_dense *dense);

#endif
