/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A row of X to block fixed point: what fixed.c, bytes-fixed.c and words-fixed.c do
 * alike, the choice of each segment's form.  The including file defines LIMBS_FEW and
 * LIMBS_ALL, the bits that either has besides the sign (BITS_FEW, 14 or a
 * little over, and BITS_ALL), the largest integer of LIMBS_FEW (FEW_MAX), the name of
 * the whole (TO_FIXED), and the two functions declared below.
 */
#ifndef FQ_KERNELS_CPU_FIXED_H
#define FQ_KERNELS_CPU_FIXED_H

#include "cpu.h"

#include <float.h>
#include <string.h>

/* With LIMBS_FEW a segment's largest element may be so many times its root mean square, squared:
 * the rounding error of a row is below 2^-15 / √12 times that, of its norm. */
#define CREST_SQUARED_F16  25.0f
#define CREST_SQUARED_BF16 64.0f

/* The largest magnitude, and the sum of squares. */
static float survey(const float *x, int64_t columns, float *squares);
/* Rounds a chunk, columns `begin` to `end` of a row, to multiples of 2^exponent and takes them
 * apart. */
static void fix_chunk(const float *x, int64_t begin, int64_t end, int exponent, int bits,
                      const struct fq_cpu_fixed *fixed, struct fq_cpu_chunk *chunk);

static float power_of_two(int exponent) {
    uint32_t bits = (uint32_t)(exponent + 127) << 23;
    float value;

    memcpy(&value, &bits, sizeof value);
    return value;
}

static int exponent_of(float value) {
    uint32_t bits;
    int exponent;

    memcpy(&bits, &value, sizeof bits);
    exponent = (int)(bits >> 23) - 127;
    return exponent < -100 ? -100 : exponent; /* keeps units normal; what is lost is below 2^-115 */
}

/* Chooses a segment's limbs and unit: returns the unit's exponent. */
static int choose_unit(float largest, float squares, int64_t columns, enum fq_dtype type,
                       struct fq_cpu_segment *segment) {
    const float crest = type == FQ_BF16 ? CREST_SQUARED_BF16 : CREST_SQUARED_F16;
    /* fp32's bound is out of reach of 15 bits */
    const bool few = type != FQ_F32 && largest * largest * (float)columns <= crest * squares;
    int exponent;

    segment->limbs = few ? LIMBS_FEW : LIMBS_ALL;
    exponent = exponent_of(largest) - (segment->limbs == LIMBS_FEW ? BITS_FEW : BITS_ALL);
    if (segment->limbs == LIMBS_FEW && largest * power_of_two(-exponent) > FEW_MAX)
        exponent++;
    segment->unit = power_of_two(exponent);
    return exponent;
}

void TO_FIXED(const struct fq_cpu_weights *weights, const float *x, enum fq_dtype type,
              struct fq_cpu_fixed *fixed) {
    struct fq_cpu_chunk *chunk = fixed->chunks;
    struct fq_cpu_segment *segment = fixed->segments;
    struct fq_cpu_span ahead = {0}, span = {0};
    bool more = fq_cpu_next_span(weights, &ahead);

    fixed->most_limbs = 0;
    for (fixed->valid = false; more; segment++) {
        const int64_t begin = ahead.begin, number = ahead.segments;
        float squares, largest;
        int exponent;

        while (more && ahead.segments == number)
            more = fq_cpu_next_span(weights, &ahead);
        const int64_t end = more ? ahead.begin : weights->k_padded;
        largest = survey(x + begin, end - begin, &squares);
        if (!(largest <= FLT_MAX))
            return;
        exponent = choose_unit(largest, squares, end - begin, type, segment);
        if (segment->limbs > fixed->most_limbs)
            fixed->most_limbs = segment->limbs;
        for (; span.end < end; chunk += fixed->chunks_pitch) {
            fq_cpu_next_span(weights, &span);
            fix_chunk(x, span.begin, span.end, exponent, weights->base.info.bits, fixed, chunk);
        }
    }
    fixed->valid = true;
}

#endif
