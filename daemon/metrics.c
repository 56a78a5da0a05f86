/* SPDX-License-Identifier: Apache-2.0 */
/* The histogram: logarithmic octaves, each split linearly. */
#include "metrics.h"

#include <stddef.h>

#define STEP_BITS 4 /* log2 of FQ_HISTOGRAM_STEPS */
#define BUCKETS   (sizeof((struct fq_histogram *)0)->buckets / sizeof(uint64_t))

static size_t bucket_of(uint64_t value) {
    if (value < FQ_HISTOGRAM_STEPS)
        return value;

    unsigned octave = 63u - (unsigned)__builtin_clzll(value) - STEP_BITS; /* 0 for 16..31 */
    size_t index =
        ((size_t)octave + 1) * FQ_HISTOGRAM_STEPS + ((value >> octave) & (FQ_HISTOGRAM_STEPS - 1));

    return index < BUCKETS ? index : BUCKETS - 1;
}

/* The middle of a bucket. */
static uint64_t value_of(size_t bucket) {
    if (bucket < FQ_HISTOGRAM_STEPS)
        return bucket;

    unsigned octave = (unsigned)(bucket / FQ_HISTOGRAM_STEPS) - 1;
    uint64_t low = (FQ_HISTOGRAM_STEPS + (uint64_t)(bucket % FQ_HISTOGRAM_STEPS)) << octave;

    return low + ((1ull << octave) >> 1);
}

void fq_histogram_add(struct fq_histogram *histogram, uint64_t value) {
    if (histogram->count == 0 || value < histogram->min)
        histogram->min = value;
    if (value > histogram->max)
        histogram->max = value;
    histogram->count++;
    histogram->buckets[bucket_of(value)]++;
}

uint64_t fq_histogram_quantile(const struct fq_histogram *histogram, double q) {
    uint64_t rank = (uint64_t)(q * (double)histogram->count), seen = 0;

    if (histogram->count == 0)
        return 0;
    if (rank >= histogram->count)
        rank = histogram->count - 1;
    for (size_t i = 0; i < BUCKETS; i++) {
        seen += histogram->buckets[i];
        if (seen > rank) {
            uint64_t value = value_of(i);

            if (value < histogram->min)
                return histogram->min;
            return value > histogram->max ? histogram->max : value;
        }
    }
    return histogram->max;
}
