/* SPDX-License-Identifier: Apache-2.0 */
/* What finequant-quantize's subcommands share of the command line: parsing and help. */
#include "quantize-cli.h"

#include <errno.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>

#define OPTIONS_MAX 32

bool quantize_parse_flag(const char *text, void *value) {
    (void)text;
    *(bool *)value = true;
    return true;
}

bool quantize_parse_text(const char *text, void *value) {
    *(const char **)value = text;
    return *text != '\0';
}

bool quantize_parse_bits(const char *text, void *value) {
    int bits = strcmp(text, "8") == 0   ? 8
               : strcmp(text, "4") == 0 ? 4
               : strcmp(text, "3") == 0 ? 3
                                        : 0;

    *(int *)value = bits;
    return bits != 0;
}

bool quantize_parse_size(const char *text, void *value) {
    static const char units[] = "KMGT";
    double scale = 1, number;
    const char *unit;
    char *end;

    if (*text < '0' || *text > '9')
        return false;
    errno = 0;
    number = strtod(text, &end);
    if (*end != '\0') {
        if (end[1] != '\0' || !(unit = strchr(units, *end)))
            return false;
        for (const char *u = units; u <= unit; u++)
            scale *= 1000;
    }
    number *= scale;
    if (errno != 0 || !(number >= 1) || number > 1e18)
        return false;
    *(uint64_t *)value = (uint64_t)number;
    return true;
}

static void left_column(const struct quantize_option *option, char text[64]) {
    char letter[8] = "    ";

    if (option->letter)
        snprintf(letter, sizeof letter, "-%c, ", option->letter);
    snprintf(text, 64, "%s--%s%s%s", letter, option->name, option->argument ? "=" : "",
             option->argument ? option->argument : "");
}

void quantize_print_options(FILE *out, const struct quantize_command *command) {
    char left[64];

    for (const struct quantize_option *option = command->options; option->name; option++) {
        left_column(option, left);
        fprintf(out, "  %-28s %s\n", left, option->help);
    }
    fprintf(out, "  %-28s %s\n", "-h, --help", "print this help");
}

/* The row that getopt's answer stands for. */
static const struct quantize_option *find(const struct quantize_command *command, int answer) {
    if (answer >= 256)
        return &command->options[answer - 256];
    for (const struct quantize_option *option = command->options; option->name; option++)
        if (option->letter == answer)
            return option;
    return NULL;
}

/* What getopt found wrong with the word that it has just passed. */
static int refuse(const struct quantize_command *command, int answer, const char *word,
                  struct fq_error *err) {
    const bool known = optopt >= 256 || optopt == 'h'; /* a flag, with "=VALUE" */
    const char letter[] = {'-', (char)optopt, '\0'};

    return fq_fail(err, FQ_USAGE, "option '%.80s' %s; see finequant-quantize %s%s--help",
                   answer == ':' || known || !optopt ? word : letter,
                   answer == ':' ? "needs an argument"
                   : known       ? "takes no argument"
                                 : "is unknown or ambiguous",
                   command->name, *command->name ? " " : "");
}

int quantize_parse(const struct quantize_command *command, int argc, char **argv, bool *helped,
                   char ***arguments, struct fq_error *err) {
    struct option longs[OPTIONS_MAX + 2] = {0};
    char shorts[2 * OPTIONS_MAX + 3] = ":h"; /* the colon: a lacking argument is told apart */
    size_t count = 0, letters = 2;
    int answer;

    for (; command->options[count].name && count < OPTIONS_MAX; count++) {
        const struct quantize_option *option = &command->options[count];

        longs[count] =
            (struct option){.name = option->name,
                            .has_arg = option->argument ? required_argument : no_argument,
                            .val = 256 + (int)count};
        if (option->letter) {
            shorts[letters++] = option->letter;
            if (option->argument)
                shorts[letters++] = ':';
        }
    }
    longs[count] = (struct option){.name = "help", .has_arg = no_argument, .val = 'h'};
    optind = 1;
    opterr = 0; /* one line, and it is ours */
    while ((answer = getopt_long(argc, argv, shorts, longs, NULL)) != -1) {
        const struct quantize_option *option = answer == 'h' ? NULL : find(command, answer);

        if (answer == 'h') {
            printf("Usage: finequant-quantize %s%s[OPTION]... %s\n%s.\n\nOptions:\n", command->name,
                   *command->name ? " " : "", command->arguments, command->help);
            quantize_print_options(stdout, command);
            *helped = true;
            return 0;
        }
        if (!option)
            return refuse(command, answer, argv[optind - 1], err);
        if (!option->parse(optarg, option->value))
            return fq_fail(err, FQ_USAGE, "--%s is '%.80s', allowed %s", option->name, optarg,
                           option->allowed);
    }
    if (argc - optind != command->argument_count)
        return fq_fail(err, FQ_USAGE, "%d arguments, needed: %s; see finequant-quantize --help",
                       argc - optind, command->arguments);
    for (int i = optind; i < argc; i++)
        if (*argv[i] == '\0')
            return fq_fail(err, FQ_USAGE, "argument %d of %s is empty, it must be a path",
                           i - optind + 1, command->arguments);
    *arguments = argv + optind;
    return 0;
}
