/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The regular expressions of quantization configs: Python's, matched at the
 * beginning of a module's name, with bounds on what a hostile one may cost.
 * Internal to model/; a pattern is used by one thread at a time.
 */
#ifndef FQ_MODEL_PATTERN_H
#define FQ_MODEL_PATTERN_H

#include "error.h"

struct fq_pattern;

/* Errors: -FQ_FORMAT with the expression, the place and the reason; -FQ_NO_MEMORY. */
int fq_pattern_new(const char *text, struct fq_pattern **out, struct fq_error *err);
void fq_pattern_free(struct fq_pattern *pattern); /* NULL is fine */

/* 1 where NAME (UTF-8) begins with a match, 0 where not, or -FQ_FORMAT for one that takes too long.
 */
int fq_pattern_match(const struct fq_pattern *pattern, const char *name, struct fq_error *err);

#endif
