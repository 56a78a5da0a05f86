/* SPDX-License-Identifier: Apache-2.0 */
/* Formatting of struct fq_error.  Touches only its arguments: any thread. */
#include "error.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static void make_printable(char *text) {
    for (; *text; text++)
        if ((unsigned char)*text < 0x20 || *text == 0x7f)
            *text = '?';
}

int fq_fail(struct fq_error *err, enum fq_status status, const char *format, ...) {
    if (err) {
        va_list args;

        va_start(args, format);
        vsnprintf(err->message, sizeof err->message, format, args);
        va_end(args);
        make_printable(err->message);
        err->status = -(int)status;
    }
    return -(int)status;
}

static enum fq_status status_of_errno(int number) {
    switch (number) {
    case ENOMEM:
        return FQ_NO_MEMORY;
    case ENOENT:
        return FQ_NOT_FOUND;
    case EACCES:
    case EPERM:
        return FQ_DENIED;
    default:
        return FQ_IO;
    }
}

int fq_fail_errno(struct fq_error *err, const char *format, ...) {
    int number = errno;
    char text[sizeof err->message];
    va_list args;

    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return fq_fail(err, status_of_errno(number), "%s: %s", text, strerror(number));
}

int fq_fail_in(struct fq_error *err, const char *format, ...) {
    char context[sizeof err->message];
    char inner[sizeof err->message];
    va_list args;

    if (!err)
        return -FQ_INTERNAL;
    va_start(args, format);
    vsnprintf(context, sizeof context, format, args);
    va_end(args);
    memcpy(inner, err->message, sizeof inner);
    fq_fail(err, (enum fq_status) - err->status, "%s: %s", context, inner);
    return err->status;
}
