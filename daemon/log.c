/* SPDX-License-Identifier: Apache-2.0 */
/* The log: formats into a local buffer and writes it with one call, so that lines never mix. */
#include "log.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static const struct {
    const char *name;
    int priority; /* of syslog(3) */
} levels[] = {
    [FQ_LOG_ERROR] = {"error", 3},
    [FQ_LOG_WARNING] = {"warning", 4},
    [FQ_LOG_INFO] = {"info", 6},
    [FQ_LOG_DEBUG] = {"debug", 7},
};

static atomic_int threshold = FQ_LOG_INFO;
static bool journal;

void fq_log_init(void) {
    const char *stream = getenv("JOURNAL_STREAM");
    unsigned long long device, inode;
    struct stat st;

    journal = stream && sscanf(stream, "%llu:%llu", &device, &inode) == 2 &&
              fstat(STDERR_FILENO, &st) == 0 && st.st_dev == device && st.st_ino == inode;
}

void fq_log_set_level(enum fq_log_level level) {
    atomic_store(&threshold, (int)level);
}

const char *fq_log_level_name(int level) {
    return levels[level].name;
}

int fq_log_level_parse(const char *name) {
    for (int i = 0; i <= FQ_LOG_DEBUG; i++)
        if (strcmp(levels[i].name, name) == 0)
            return i;
    return -1;
}

static int write_prefix(char *line, size_t size, enum fq_log_level level) {
    struct timespec now;
    struct tm utc;
    char when[32];

    if (journal)
        return snprintf(line, size, "<%d>", levels[level].priority);
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%S", &utc);
    return snprintf(line, size, "%s.%03ldZ %-7s ", when, now.tv_nsec / 1000000, levels[level].name);
}

void fq_log(enum fq_log_level level, const char *format, ...) {
    char line[1002];
    size_t length;
    va_list args;

    if ((int)level > atomic_load(&threshold))
        return;
    length = (size_t)write_prefix(line, sizeof line, level);
    va_start(args, format);
    vsnprintf(line + length, sizeof line - 1 - length, format, args);
    va_end(args);
    for (char *c = line; *c; c++)
        if ((unsigned char)*c < 0x20 || *c == 0x7f)
            *c = '?';
    length = strlen(line);
    line[length++] = '\n';
    if (write(STDERR_FILENO, line, length) < 0)
        return; /* nowhere is left to say so */
}
