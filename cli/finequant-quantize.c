/* SPDX-License-Identifier: Apache-2.0 */
/*
 * finequant-quantize: a Hugging Face checkpoint in, a quantized one out, and
 * looking at the result.  Each subcommand has a file of its own; without one,
 * IN and OUT are quantized.  Exits with 0 or the number of the status that
 * stopped it (finequant-protocol(7)).
 */
#ifdef HAVE_CONFIG_H
#include <config.h>
#endif

#include "quantize-cli.h"

#include <signal.h>
#include <string.h>

static const struct quantize_command *const commands[] = {
    &quantize_checkpoint, /* the first runs where none is named */
    &quantize_convert,
    &quantize_inspect,
};

#define COMMAND_COUNT (sizeof commands / sizeof *commands)

static volatile sig_atomic_t interrupted;

static void interrupt(int number) {
    (void)number;
    interrupted = 1;
}

void quantize_catch_signals(void) {
    struct sigaction action = {.sa_handler = interrupt, .sa_flags = SA_RESTART | SA_RESETHAND};

    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

bool quantize_interrupted(void) {
    return interrupted;
}

static void print_help(void) {
    for (size_t i = 0; i < COMMAND_COUNT; i++)
        printf("%s finequant-quantize %s%s[OPTION]... %s\n", i == 0 ? "Usage:" : "      ",
               commands[i]->name, *commands[i]->name ? " " : "", commands[i]->arguments);
    for (size_t i = 0; i < COMMAND_COUNT; i++) {
        printf("\n%s%s%s.\n", commands[i]->name, *commands[i]->name ? ": " : "", commands[i]->help);
        quantize_print_options(stdout, commands[i]);
    }
    puts("\n  -V, --version                print the version\n\n"
         "A directory IN that has a subcommand's name is given as ./NAME.  Manual: "
         "finequant-quantize(1).");
}

static int run(int argc, char **argv, struct fq_error *err) {
    const struct quantize_command *command = commands[0];
    char **arguments;
    bool helped = false;

    for (size_t i = 1; argc > 1 && i < COMMAND_COUNT; i++) {
        if (strcmp(argv[1], commands[i]->name) == 0) {
            command = commands[i];
            argc--;
            argv++;
            break;
        }
    }
    int status = quantize_parse(command, argc, argv, &helped, &arguments, err);
    return status < 0 || helped ? status : command->run(arguments, err);
}

int main(int argc, char **argv) {
    struct fq_error err = {0};
    int status = 0;

    if (argc == 2 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0))
        print_help();
    else if (argc == 2 && (strcmp(argv[1], "--version") == 0 || strcmp(argv[1], "-V") == 0))
        puts("finequant-quantize " PACKAGE_VERSION);
    else
        status = run(argc, argv, &err);
    if (fflush(stdout) != 0 && status == 0)
        status = fq_fail_errno(&err, "standard output");
    if (status < 0)
        fprintf(stderr, "finequant-quantize: %s\n", err.message);
    return -status;
}
