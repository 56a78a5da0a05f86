/* SPDX-License-Identifier: Apache-2.0 */
/* Bounded matching with PCRE2, whose syntax holds all of Python's that configs use. */
#include "pattern.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdlib.h>
#include <string.h>

/* Names in a checkpoint are short: a pattern that needs more is a hostile one. */
#define MATCH_STEPS_MAX   100000
#define MATCH_HEAP_KIB    (16 << 10)
#define PATTERN_BYTES_MAX 4096

struct fq_pattern {
    char *text;
    pcre2_code *code;
    pcre2_match_data *data;
    pcre2_match_context *limits;
};

static int compile(struct fq_pattern *pattern, struct fq_error *err) {
    int fault;
    PCRE2_SIZE offset;
    PCRE2_UCHAR reason[160];

    pattern->code = pcre2_compile((PCRE2_SPTR)pattern->text, PCRE2_ZERO_TERMINATED,
                                  PCRE2_ANCHORED | PCRE2_UTF, &fault, &offset, NULL);
    if (pattern->code)
        return 0;
    pcre2_get_error_message(fault, reason, sizeof reason);
    return fq_fail(err, FQ_FORMAT, "pattern '%.200s': character %zu: %s", pattern->text,
                   (size_t)offset, (const char *)reason);
}

int fq_pattern_new(const char *text, struct fq_pattern **out, struct fq_error *err) {
    struct fq_pattern *pattern;
    int rc;

    if (strlen(text) > PATTERN_BYTES_MAX)
        return fq_fail(err, FQ_FORMAT, "pattern '%.40s...': %zu bytes, at most %d are allowed",
                       text, strlen(text), PATTERN_BYTES_MAX);
    pattern = calloc(1, sizeof *pattern);
    if (!pattern || !(pattern->text = strdup(text)) ||
        !(pattern->data = pcre2_match_data_create(1, NULL)) ||
        !(pattern->limits = pcre2_match_context_create(NULL))) {
        rc = fq_fail(err, FQ_NO_MEMORY, "pattern '%.200s': no memory to compile it", text);
    } else {
        pcre2_set_match_limit(pattern->limits, MATCH_STEPS_MAX);
        pcre2_set_heap_limit(pattern->limits, MATCH_HEAP_KIB);
        rc = compile(pattern, err);
    }
    if (rc < 0) {
        fq_pattern_free(pattern);
        return rc;
    }
    *out = pattern;
    return 0;
}

void fq_pattern_free(struct fq_pattern *pattern) {
    if (!pattern)
        return;
    pcre2_code_free(pattern->code);
    pcre2_match_data_free(pattern->data);
    pcre2_match_context_free(pattern->limits);
    free(pattern->text);
    free(pattern);
}

int fq_pattern_match(const struct fq_pattern *pattern, const char *name, struct fq_error *err) {
    int found = pcre2_match(pattern->code, (PCRE2_SPTR)name, PCRE2_ZERO_TERMINATED, 0, 0,
                            pattern->data, pattern->limits);

    if (found == PCRE2_ERROR_NOMATCH)
        return 0;
    if (found < 0)
        return fq_fail(err, FQ_FORMAT, "pattern '%.200s' cannot be matched within %d steps",
                       pattern->text, MATCH_STEPS_MAX);
    return 1;
}
