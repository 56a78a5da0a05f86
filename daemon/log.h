/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The daemon's log: one line an event on standard error.  Where the journal
 * listens there (JOURNAL_STREAM names the same file) a line begins with its
 * priority, "<6>"; elsewhere with the time in UTC and the level's name.
 * Any thread.
 */
#ifndef FQ_DAEMON_LOG_H
#define FQ_DAEMON_LOG_H

#include <stdbool.h>

enum fq_log_level {
    FQ_LOG_ERROR = 0,
    FQ_LOG_WARNING,
    FQ_LOG_INFO,
    FQ_LOG_DEBUG,
};

/* Finds out whether the journal listens.  Before any other thread runs. */
void fq_log_init(void);
void fq_log_set_level(enum fq_log_level level);

/* "error", "warning", "info", "debug"; the reverse is -1 for an unknown name. */
const char *fq_log_level_name(int level);
int fq_log_level_parse(const char *name);

/* Writes one line, which is cut at 1000 bytes; control characters become '?'. */
void fq_log(enum fq_log_level level, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
