/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How a failure travels: functions return 0 or a negative enum fq_status and,
 * where they take a struct fq_error (finequant-types.h), leave one line there
 * that says what was wrong, the value, and what is allowed.  The struct lives
 * with the caller; passing NULL discards the line.
 */
#ifndef FQ_BASE_ERROR_H
#define FQ_BASE_ERROR_H

#include "finequant-types.h"

/*
 * Fills *err (if not NULL) and returns -status, so that a check reads
 *     return fq_fail(err, FQ_INVALID, "m is %lld, allowed are 1 to %d", ...);
 * status is the positive enum.  Control characters in the message, which may
 * quote a peer or a file, become '?'.
 */
int fq_fail(struct fq_error *err, enum fq_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* As fq_fail, with ": " and the text of errno at the end.  Status FQ_NO_MEMORY for ENOMEM,
 * FQ_NOT_FOUND for ENOENT, FQ_DENIED for EACCES and EPERM, else FQ_IO. */
int fq_fail_errno(struct fq_error *err, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* Puts "context: " before the message that *err holds; returns err->status.  For the layer
 * that knows the file or tensor a lower one failed on. */
int fq_fail_in(struct fq_error *err, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
