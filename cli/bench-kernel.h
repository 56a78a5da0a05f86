/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What `finequant-bench kernel` was asked for, shared by bench-kernel.c, which
 * measures backends that compute on the host, and bench-kernel-cuda.c.  Every
 * combination of the lists is a row of the table.
 */
#ifndef FQ_CLI_BENCH_KERNEL_H
#define FQ_CLI_BENCH_KERNEL_H

#include "bench.h"

struct bench_kernel_table {
    const char *backend;
    const char *csv;    /* file, or NULL */
    const char *clocks; /* the same; cuda only */
    const char *cublas; /* library, or NULL: where the loader finds it; cuda only */
    struct bench_shapes shapes;
    struct bench_list bits, groups, zeros, dtypes, rows;
    struct bench_list threads; /* host backends only */
    bool gate, bias, residual; /* cuda only, as the activation */
    enum fq_activation activation;
    int64_t n, k; /* where no shapes are given */
    int64_t rotate_mib;
    double seconds; /* host backends only */
};

/* Measures the table on the cuda backend; rows also go to csv, and clocks to `clocks`, unless those
 * are NULL.  Only in builds with CUDA. */
int bench_kernel_cuda(const struct bench_kernel_table *table, FILE *csv, FILE *clocks,
                      struct fq_error *err);

/* How many copies of `bytes` are used in turn, so that no call finds its own in a cache. */
int bench_kernel_copies(uint64_t bytes);

#endif
