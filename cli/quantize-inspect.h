/* SPDX-License-Identifier: Apache-2.0 */
/* What finequant-quantize inspect found, for its table, its JSON and its picture.  One thread. */
#ifndef FQ_CLI_QUANTIZE_INSPECT_H
#define FQ_CLI_QUANTIZE_INSPECT_H

#include "checkpoint.h"

struct inspected_matrix {
    const char *name; /* the checkpoint's */
    int64_t n, k, group;
    int bits;
    bool symmetric;
    uint64_t codes, scales, zeros; /* bytes in the file */
    double error;                  /* NaN where there is nothing to compare with */
};

struct inspection {
    const char *directory;
    struct inspected_matrix *matrices; /* owned */
    size_t count;
    uint64_t dense;   /* bytes of all other tensors */
    uint64_t weights; /* quantized ones */
};

/* Bytes of the matrices, without what is dense. */
uint64_t inspection_bytes(const struct inspection *inspection);
/* Draws the picture as an SVG file; an older one is replaced. */
int inspection_svg(const struct inspection *inspection, const char *path, struct fq_error *err);

#endif
