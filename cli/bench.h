/* SPDX-License-Identifier: Apache-2.0 */
/*
 * finequant-bench inside: the table of subcommands and what they share.  A
 * subcommand is a file bench-NAME.c that ends in its table entry; a new one
 * also takes a line in the table of finequant-bench.c.  One thread.
 */
#ifndef FQ_CLI_BENCH_H
#define FQ_CLI_BENCH_H

#include "error.h"

#include <stdbool.h>
#include <stdio.h>

/* One option with an argument: how it is parsed, where it goes, and what --help says. */
struct bench_option {
    const char *name;     /* without the dashes */
    const char *argument; /* as --help shows it: "LIST" */
    const char *help;     /* one line */
    const char *allowed;  /* ends the message about a value that parse refuses */
    bool (*parse)(const char *text, void *value);
    void *value;
};

struct bench_command {
    const char *name;
    const char *help;                   /* one line */
    const struct bench_option *options; /* ends with a row of NULL */
    /* After the options are parsed.  0 or a negative status with *err. */
    int (*run)(struct fq_error *err);
};

extern const struct bench_command bench_kernel, bench_model, bench_gemm;

/* ---- Parsers (bench-options.c) ----------------------------------------------------------- */

#define BENCH_LIST_MAX 64
struct bench_list {
    int count;
    int64_t values[BENCH_LIST_MAX];
};

struct bench_shapes {
    int count;
    struct bench_shape {
        int64_t n, k;
    } values[BENCH_LIST_MAX];
};

bool bench_parse_text(const char *text, void *value);       /* const char *, not empty */
bool bench_parse_positive(const char *text, void *value);   /* int64_t: 1 to 2^24 */
bool bench_parse_rows(const char *text, void *value);       /* struct bench_list: 1 to 65536 */
bool bench_parse_counts(const char *text, void *value);     /* struct bench_list: 0 to 4096 */
bool bench_parse_clients(const char *text, void *value);    /* struct bench_list: 1 to 1024 */
bool bench_parse_bits(const char *text, void *value);       /* struct bench_list: 8, 4 or 3 */
bool bench_parse_group(const char *text, void *value);      /* struct bench_list: 0 for "channel" */
bool bench_parse_yes(const char *text, void *value);        /* struct bench_list: 1 yes, 0 no */
bool bench_parse_flag(const char *text, void *value);       /* bool: yes or no */
bool bench_parse_activation(const char *text, void *value); /* enum fq_activation */
bool bench_parse_dtype(const char *text, void *value);      /* enum fq_dtype */
bool bench_parse_dtypes(const char *text, void *value);     /* struct bench_list of enum fq_dtype */
bool bench_parse_shapes(const char *text, void *value);     /* struct bench_shapes: "NxK,NxK" */
bool bench_parse_seconds(const char *text, void *value);    /* double: over 0, up to 3600 */

/* Parses a subcommand's arguments; prints its help where asked to, and sets *helped. */
int bench_parse(const struct bench_command *command, int argc, char **argv, bool *helped,
                struct fq_error *err);
void bench_print_options(FILE *out, const struct bench_command *command);
/* The command line of the subcommand that was parsed. */
void bench_print_command(FILE *out);

/* ---- Measuring (bench-time.c) ------------------------------------------------------------ */

double bench_now_us(void); /* monotonic */

/* Samples of one quantity. */
struct bench_samples {
    double *values; /* owned */
    size_t count, room;
};

int bench_samples_add(struct bench_samples *samples, double value, struct fq_error *err);
/* Sorts; 0 ≤ at ≤ 1: 0.5 is the median.  NAN where there are none. */
double bench_samples_at(struct bench_samples *samples, double at);
void bench_samples_fini(struct bench_samples *samples);

/* A table cell: "-" for NAN. */
void bench_print_cell(FILE *out, int width, int digits, double value);
/* ",value", nothing after the comma for NAN. */
void bench_print_field(FILE *out, double value);

/* ---- What FineQuant is compared with (bench-rivals.c) -------------------------------------- */

/* Reads every byte once with the widest loads of this processor, on that many threads.  Returns a
 * value that depends on all of them. */
uint64_t bench_read(const void *from, size_t bytes, int threads);
/* Binds so many OpenMP threads, 0 for a thread a core, each to a core of its own while there are
 * any; the first call, which must come before any other OpenMP region, also OpenBLAS's.  Returns
 * how many. By the main thread, whenever the number of threads changes. */
int bench_pin_threads(int threads);
/* False where this build has no OpenBLAS.  Y[m][n] = X[m][k]·W[n][k]ᵀ, by sgemv for one row. */
bool bench_has_sgemm(void);
void bench_sgemm(int64_t m, int64_t n, int64_t k, const float *x, const float *w, float *y,
                 int threads);

#endif
