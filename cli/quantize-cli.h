/* SPDX-License-Identifier: Apache-2.0 */
/*
 * finequant-quantize inside: the table of subcommands and what they share.  A
 * subcommand is a file quantize-NAME.c that ends in its table entry; a new one
 * also takes a line in the table of finequant-quantize.c.  One thread.
 */
#ifndef FQ_CLI_QUANTIZE_CLI_H
#define FQ_CLI_QUANTIZE_CLI_H

#include "error.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

/* One option: how it is parsed, where it goes, and what --help says. */
struct quantize_option {
    const char *name;     /* without the dashes */
    char letter;          /* its short form, or 0 */
    const char *argument; /* as --help shows it: "SIZE"; NULL for a flag */
    const char *help;     /* one line */
    const char *allowed;  /* ends the message about a value that parse refuses */
    bool (*parse)(const char *text, void *value); /* a flag's gets NULL */
    void *value;
};

struct quantize_command {
    const char *name;      /* "" for the job that runs where no subcommand is named */
    const char *arguments; /* as --help shows them: "IN OUT" */
    int argument_count;
    const char *help;                      /* one line */
    const struct quantize_option *options; /* ends with a row of NULL */
    /* After the options are parsed.  0 or a negative status with *err. */
    int (*run)(char **arguments, struct fq_error *err);
};

extern const struct quantize_command quantize_checkpoint, quantize_convert, quantize_inspect;

/* ---- Parsers (quantize-options.c) -------------------------------------------------------- */

bool quantize_parse_flag(const char *text, void *value); /* bool: sets it */
bool quantize_parse_text(const char *text, void *value); /* const char *, not empty */
bool quantize_parse_bits(const char *text, void *value); /* int: 8, 4 or 3 */
bool quantize_parse_size(const char *text, void *value); /* uint64_t: bytes, with K, M, G or T */

/* Parses a subcommand's command line, argv[0] aside, into its options; *arguments is the first of
 * what is left.  Prints its help where asked to, and sets *helped. */
int quantize_parse(const struct quantize_command *command, int argc, char **argv, bool *helped,
                   char ***arguments, struct fq_error *err);
void quantize_print_options(FILE *out, const struct quantize_command *command);

/* ---- Signals (finequant-quantize.c) ------------------------------------------------------ */

/* From here on SIGINT and SIGTERM only set what quantize_interrupted says; a second one ends the
 * process as ever. */
void quantize_catch_signals(void);
bool quantize_interrupted(void);

#endif
