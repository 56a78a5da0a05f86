/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What finequant-quantize IN OUT says while it works and afterwards: a bar or
 * lines, explanations, a summary as text or JSON, and the rate beside a plain
 * copy's.  One thread.
 */
#ifndef FQ_CLI_QUANTIZE_REPORT_H
#define FQ_CLI_QUANTIZE_REPORT_H

#include "quantize-checkpoint.h"

#include <jansson.h>

struct quantize_report {
    bool json, quiet, explain;                     /* as asked for */
    bool plan;                                     /* a dry run: errors are expectations */
    bool terminal;                                 /* standard error is one: a bar */
    bool bar;                                      /* one is on the line */
    bool explained;                                /* what the columns of explanations mean */
    const char *in, *out;                          /* borrowed */
    double begun, phase_begun, line_printed, told; /* seconds; told: the last progress */
    int phase;                                     /* of the last progress, -1 before the first */
    double seconds;                                /* all of it, at the end */
    json_t *matrices;                              /* of --json, else NULL */
};

void quantize_report_begin(struct quantize_report *report, const char *in, const char *out);
void quantize_report_fini(struct quantize_report *report);

/* The callbacks of struct fq_quantize_options; the context is the report. */
int quantize_report_progress(void *context, const struct fq_quantize_progress *progress);
void quantize_report_explain(void *context, const struct fq_quantize_explanation *explanation);
void quantize_report_problem(void *context, const char *message);

int quantize_report_end(struct quantize_report *report, const struct fq_quantize_options *options,
                        const struct fq_quantize_summary *summary, struct fq_error *err);
/* Copies up to 2 GB of IN's safetensors files to a temporary file in OUT, both read and written
 * through to the disk, and prints how much, and the rate beside ours. */
int quantize_report_copy(struct quantize_report *report, const struct fq_quantize_summary *summary,
                         struct fq_error *err);

#endif
