/* SPDX-License-Identifier: Apache-2.0 */
/*
 * finequant-bench: measures FineQuant and prints tables.  This file finds the
 * subcommand; each has a file of its own.  Exits with 0 or the number of the
 * status that stopped it.
 */
#ifdef HAVE_CONFIG_H
#include <config.h>
#endif

#include "bench.h"

#include <string.h>

static const struct bench_command *const commands[] = {
    &bench_kernel,
    &bench_model,
    &bench_gemm,
};

#define COMMAND_COUNT (sizeof commands / sizeof *commands)

static void print_help(void) {
    fputs("usage: finequant-bench COMMAND [OPTION]...\n"
          "       finequant-bench --help | --version\n"
          "Measures FineQuant's kernels and daemon.\n\nCommands:\n",
          stdout);
    for (size_t i = 0; i < COMMAND_COUNT; i++)
        printf("  %-18s %s\n", commands[i]->name, commands[i]->help);
    fputs("\nOptions:\n"
          "  -h, --help         print this help; after a command, that command's alone\n"
          "  -V, --version      print the version\n",
          stdout);
    for (size_t i = 0; i < COMMAND_COUNT; i++) {
        printf("\nOptions of %s:\n", commands[i]->name);
        bench_print_options(stdout, commands[i]);
    }
}

static int fail(const struct fq_error *err) {
    fprintf(stderr, "finequant-bench: %s\n", err->message);
    return -err->status;
}

int main(int argc, char **argv) {
    struct fq_error err = {0};
    bool helped = false;

    if (argc < 2) {
        fq_fail(&err, FQ_USAGE, "no command; see finequant-bench --help");
        return fail(&err);
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0) {
        print_help();
        return 0;
    }
    if (strcmp(argv[1], "--version") == 0 || strcmp(argv[1], "-V") == 0) {
        puts("finequant-bench " PACKAGE_VERSION);
        return 0;
    }
    for (size_t i = 0; i < COMMAND_COUNT; i++) {
        if (strcmp(argv[1], commands[i]->name) != 0)
            continue;
        int status = bench_parse(commands[i], argc - 1, argv + 1, &helped, &err);
        if (status == 0 && !helped)
            status = commands[i]->run(&err);
        return status ? fail(&err) : 0;
    }
    fq_fail(&err, FQ_USAGE, "no command '%s'; see finequant-bench --help", argv[1]);
    return fail(&err);
}
