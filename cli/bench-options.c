/* SPDX-License-Identifier: Apache-2.0 */
/* The options of finequant-bench's subcommands: parsed strictly, and printed by --help. */
#include "bench.h"

#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define OPTIONS_MAX 32

static bool parse_number(const char *text, int64_t least, int64_t most, int64_t *value) {
    char *end;

    if (*text < '0' || *text > '9')
        return false;
    errno = 0;
    long long number = strtoll(text, &end, 10);
    *value = number;
    return errno == 0 && *end == '\0' && number >= least && number <= most;
}

/* Items with commas between them, each taken by `parse` into an element of `size` bytes. */
static bool parse_items(const char *text, bool (*parse)(const char *item, void *value),
                        void *values, size_t size, int *count) {
    char item[24];
    bool last = false;

    for (*count = 0; !last && *count < BENCH_LIST_MAX; ++*count) {
        size_t length = strcspn(text, ",");

        if (length >= sizeof item)
            return false;
        memcpy(item, text, length);
        item[length] = '\0';
        if (!parse(item, (char *)values + (size_t)*count * size))
            return false;
        last = text[length] == '\0';
        text += length + 1;
    }
    return last;
}

static bool parse_list(const char *text, bool (*parse)(const char *item, void *value),
                       void *value) {
    struct bench_list *list = value;

    return parse_items(text, parse, list->values, sizeof *list->values, &list->count);
}

bool bench_parse_text(const char *text, void *value) {
    *(const char **)value = text;
    return *text != '\0';
}

bool bench_parse_positive(const char *text, void *value) {
    return parse_number(text, 1, 1 << 24, value);
}

static bool parse_row_count(const char *text, void *value) {
    return parse_number(text, 1, 65536, value);
}

bool bench_parse_rows(const char *text, void *value) {
    return parse_list(text, parse_row_count, value);
}

static bool parse_count(const char *text, void *value) {
    return parse_number(text, 0, 4096, value);
}

bool bench_parse_counts(const char *text, void *value) {
    return parse_list(text, parse_count, value);
}

static bool parse_client_count(const char *text, void *value) {
    return parse_number(text, 1, 1024, value);
}

bool bench_parse_clients(const char *text, void *value) {
    return parse_list(text, parse_client_count, value);
}

static bool parse_bits(const char *text, void *value) {
    int64_t *bits = value;

    return parse_number(text, 3, 8, bits) && (*bits == 8 || *bits == 4 || *bits == 3);
}

bool bench_parse_bits(const char *text, void *value) {
    return parse_list(text, parse_bits, value);
}

static bool parse_group(const char *text, void *value) {
    int64_t *group = value;

    *group = 0;
    if (strcmp(text, "channel") == 0)
        return true;
    return parse_number(text, 16, 1 << 24, group) && *group % 16 == 0;
}

bool bench_parse_group(const char *text, void *value) {
    return parse_list(text, parse_group, value);
}

static bool parse_yes(const char *text, void *value) {
    int64_t *yes = value;

    *yes = strcmp(text, "yes") == 0;
    return *yes || strcmp(text, "no") == 0;
}

bool bench_parse_yes(const char *text, void *value) {
    return parse_list(text, parse_yes, value);
}

bool bench_parse_flag(const char *text, void *value) {
    int64_t yes;
    bool known = parse_yes(text, &yes);

    *(bool *)value = yes;
    return known;
}

bool bench_parse_activation(const char *text, void *value) {
    int activation = fq_activation_parse(text);

    *(enum fq_activation *)value = (enum fq_activation)activation;
    return activation >= 0;
}

static bool parse_dtype(const char *text, void *value) {
    int64_t *dtype = value;

    *dtype = fq_dtype_parse(text);
    return *dtype != 0;
}

bool bench_parse_dtypes(const char *text, void *value) {
    return parse_list(text, parse_dtype, value);
}

static bool parse_shape(const char *text, void *value) {
    struct bench_shape *shape = value;
    size_t n = strspn(text, "0123456789");
    char digits[24];

    if (text[n] != 'x')
        return false;
    memcpy(digits, text, n); /* an item is shorter than 24 */
    digits[n] = '\0';
    return parse_number(digits, 1, 1 << 24, &shape->n) &&
           parse_number(text + n + 1, 1, 1 << 24, &shape->k);
}

bool bench_parse_shapes(const char *text, void *value) {
    struct bench_shapes *shapes = value;

    return parse_items(text, parse_shape, shapes->values, sizeof *shapes->values, &shapes->count);
}

bool bench_parse_dtype(const char *text, void *value) {
    int64_t type;
    bool known = parse_dtype(text, &type);

    *(enum fq_dtype *)value = (enum fq_dtype)type;
    return known;
}

bool bench_parse_seconds(const char *text, void *value) {
    char *end;
    double seconds = strtod(text, &end);

    *(double *)value = seconds;
    return *text >= '0' && *text <= '9' && *end == '\0' && seconds > 0 && seconds <= 3600;
}

static int command_argc; /* of the command that runs, borrowed from main */
static char **command_argv;

void bench_print_command(FILE *out) {
    fputs("finequant-bench", out);
    for (int i = 0; i < command_argc; i++)
        fprintf(out, " %s", command_argv[i]);
}

void bench_print_options(FILE *out, const struct bench_command *command) {
    for (const struct bench_option *option = command->options; option->name; option++) {
        char left[64];

        snprintf(left, sizeof left, "--%s=%s", option->name, option->argument);
        fprintf(out, "  %-18s %s\n", left, option->help);
    }
}

int bench_parse(const struct bench_command *command, int argc, char **argv, bool *helped,
                struct fq_error *err) {
    struct option longs[OPTIONS_MAX + 2] = {{"help", no_argument, NULL, 'h'}};
    int count = 0, found, index = 0;

    for (; command->options[count].name && count < OPTIONS_MAX; count++)
        longs[count + 1] =
            (struct option){command->options[count].name, required_argument, NULL, 'o'};
    command_argc = argc;
    command_argv = argv;
    opterr = 0;
    optind = 1;
    while ((found = getopt_long(argc, argv, ":h", longs, &index)) != -1) {
        if (found == 'h') {
            printf("usage: finequant-bench %s [OPTION]...\n%s\n\nOptions:\n", command->name,
                   command->help);
            bench_print_options(stdout, command);
            *helped = true;
            return 0;
        }
        if (found == ':')
            return fq_fail(err, FQ_USAGE, "%s needs a value; see finequant-bench %s --help",
                           argv[optind - 1], command->name);
        if (found == '?')
            return fq_fail(err, FQ_USAGE, "no option %s; see finequant-bench %s --help",
                           argv[optind - 1], command->name);
        const struct bench_option *option = &command->options[index - 1];
        if (!option->parse(optarg, option->value))
            return fq_fail(err, FQ_USAGE, "--%s is '%s', allowed are %s", option->name, optarg,
                           option->allowed);
    }
    if (optind < argc)
        return fq_fail(err, FQ_USAGE, "'%s' is no option; see finequant-bench %s --help",
                       argv[optind], command->name);
    return 0;
}
