/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Counters since the start, and the distribution of latencies in buckets whose
 * width is at most 1/16 of their value, so that a quantile is within 7% of the
 * true one.  Owned by the daemon, used on the loop's thread.
 */
#ifndef FQ_DAEMON_METRICS_H
#define FQ_DAEMON_METRICS_H

#include <stdint.h>

#define FQ_HISTOGRAM_STEPS   16 /* buckets an octave; below this each value has its own */
#define FQ_HISTOGRAM_OCTAVES 44 /* up to 2^48 ns, three days: longer counts as that */

struct fq_histogram {
    uint64_t count, min, max;
    uint64_t buckets[FQ_HISTOGRAM_STEPS * (FQ_HISTOGRAM_OCTAVES + 1)];
};

struct fq_metrics {
    uint64_t sessions; /* accepted */
    uint64_t requests; /* gemm requests answered, well or not */
    uint64_t rows;     /* rows computed */
    uint64_t launches;
    uint64_t errors;             /* requests of any method answered with an error */
    struct fq_histogram latency; /* ns from a gemm request's arrival to its reply */
};

void fq_histogram_add(struct fq_histogram *histogram, uint64_t value);
/* The value below which a fraction q (0 to 1) of the values lie; 0 when there are none. */
uint64_t fq_histogram_quantile(const struct fq_histogram *histogram, double q);

#endif
