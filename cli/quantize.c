/* SPDX-License-Identifier: Apache-2.0 */
/*
 * finequant-quantize: a Hugging Face checkpoint in, a quantized one out.  This
 * file parses the command line and shows progress; model/quantize-checkpoint.c
 * does the work.  Exits with 0 or the number of the status that stopped it.
 */
#ifdef HAVE_CONFIG_H
#include <config.h>
#endif

#include "quantize-checkpoint.h"

#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <jansson.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PROGRAM             "finequant-quantize"
#define SHARD_BYTES_DEFAULT ((uint64_t)5000000000)

/* One row an option: what getopt takes, and what --help prints. */
static const struct {
    const char *name, *argument, *help;
    char letter;
} options[] = {
    {"bits", "N", "8, 4 or 3 bits a weight (default: 4)", 'b'},
    {"group", "G", "weights that share a scale: a multiple of 16, or 'channel' (default: 64)", 'g'},
    {"shard-size", "SIZE", "begin a new file at this size, as 5000000000 or 5G (default: 5G)", 's'},
    {"json", NULL, "print a summary as JSON on standard output", 'j'},
    {"quiet", NULL, "print no progress", 'q'},
    {"help", NULL, "print this help", 'h'},
    {"version", NULL, "print the version", 'V'},
};

#define OPTION_COUNT (sizeof options / sizeof *options)

struct command {
    struct fq_quantize_options quantize;
    const char *in, *out;
    bool json, quiet, terminal;
    json_t *matrices; /* of --json, else NULL */
};

static volatile sig_atomic_t interrupted;

static void interrupt(int number) {
    (void)number;
    interrupted = 1;
}

static void print_help(void) {
    puts("Usage: " PROGRAM " [OPTION]... IN OUT\n"
         "Quantize the linear layers of the Hugging Face checkpoint in the directory IN and write\n"
         "the result as a new directory OUT, which finequantd, vLLM and transformers can load.\n\n"
         "Options:");
    for (size_t i = 0; i < OPTION_COUNT; i++) {
        char left[64];

        snprintf(left, sizeof left, "-%c, --%s%s%s", options[i].letter, options[i].name,
                 options[i].argument ? "=" : "", options[i].argument ? options[i].argument : "");
        printf("  %-22s %s\n", left, options[i].help);
    }
}

/* ---- the command line --------------------------------------------------------------------- */

static int parse_number(const char *text, uint64_t *value, const char **rest) {
    char *end;

    if (*text < '0' || *text > '9')
        return -1;
    errno = 0;
    *value = strtoull(text, &end, 10);
    *rest = end;
    return errno ? -1 : 0;
}

static int parse_bits(const char *text, struct command *command, struct fq_error *err) {
    uint64_t bits;
    const char *rest;

    if (parse_number(text, &bits, &rest) < 0 || *rest || (bits != 8 && bits != 4 && bits != 3))
        return fq_fail(err, FQ_USAGE, "--bits is '%.40s', allowed are 8, 4 and 3", text);
    command->quantize.bits = (int)bits;
    return 0;
}

static int parse_group(const char *text, struct command *command, struct fq_error *err) {
    uint64_t group;
    const char *rest;

    command->quantize.group = 0;
    if (strcmp(text, "channel") == 0)
        return 0;
    if (parse_number(text, &group, &rest) < 0 || *rest || group == 0 || group % 16 != 0 ||
        group > 1 << 24)
        return fq_fail(err, FQ_USAGE,
                       "--group is '%.40s', allowed are multiples of 16 to %d, and 'channel'", text,
                       1 << 24);
    command->quantize.group = (int64_t)group;
    return 0;
}

static int parse_shard_size(const char *text, struct command *command, struct fq_error *err) {
    static const char *const units[] = {"", "K", "M", "G", "T"};
    uint64_t bytes;
    const char *rest;

    if (parse_number(text, &bytes, &rest) == 0 && bytes > 0) {
        for (size_t i = 0; i < sizeof units / sizeof *units; i++, bytes *= 1000) {
            if (strcmp(rest, units[i]) == 0) {
                command->quantize.shard_bytes = bytes;
                return 0;
            }
            if (bytes > UINT64_MAX / 1000)
                break;
        }
    }
    return fq_fail(
        err, FQ_USAGE,
        "--shard-size is '%.40s', allowed is a number of bytes, or one with K, M, G or T", text);
}

/* 0 to go on, 1 when all is done (--help), or a negative status. */
static int parse(struct command *command, int argc, char **argv, struct fq_error *err) {
    struct option table[OPTION_COUNT + 1] = {0};
    int letter, rc = 0;

    for (size_t i = 0; i < OPTION_COUNT; i++)
        table[i] = (struct option){.name = options[i].name,
                                   .has_arg = options[i].argument ? required_argument : no_argument,
                                   .val = options[i].letter};
    while (rc == 0 && (letter = getopt_long(argc, argv, "b:g:s:jqhV", table, NULL)) != -1) {
        switch (letter) {
        case 'b':
            rc = parse_bits(optarg, command, err);
            break;
        case 'g':
            rc = parse_group(optarg, command, err);
            break;
        case 's':
            rc = parse_shard_size(optarg, command, err);
            break;
        case 'j':
            command->json = true;
            break;
        case 'q':
            command->quiet = true;
            break;
        case 'h':
            print_help();
            return 1;
        case 'V':
            puts(PROGRAM " " PACKAGE_VERSION);
            return 1;
        default: /* getopt has said what is wrong */
            return fq_fail(err, FQ_USAGE, "see " PROGRAM " --help");
        }
    }
    if (rc < 0)
        return rc;
    if (argc - optind != 2)
        return fq_fail(err, FQ_USAGE, "%d arguments, needed are IN and OUT; see " PROGRAM " --help",
                       argc - optind);
    command->in = argv[optind];
    command->out = argv[optind + 1];
    return 0;
}

/* ---- progress and summary ----------------------------------------------------------------- */

static void print_bar(const struct fq_quantized_layer *layer, size_t done, size_t total) {
    char bar[31];
    size_t filled = done * (sizeof bar - 1) / total;

    memset(bar, '.', sizeof bar - 1);
    memset(bar, '#', filled);
    bar[sizeof bar - 1] = '\0';
    fprintf(stderr, "\r\033[K[%s] %zu/%zu %.60s%s", bar, done, total, layer->name,
            done == total ? "\n" : "");
}

static void print_line(const struct fq_quantized_layer *layer, size_t done, size_t total) {
    if (layer->kept_dense)
        fprintf(stderr,
                "[%zu/%zu] %s %" PRId64 "x%" PRId64
                ": kept dense, 3-bit rows of this length are ambiguous\n",
                done, total, layer->name, layer->n, layer->k);
    else
        fprintf(stderr,
                "[%zu/%zu] %s %" PRId64 "x%" PRId64 ": %" PRIu64 " -> %" PRIu64
                " bytes, error %.4f\n",
                done, total, layer->name, layer->n, layer->k, layer->bytes_before,
                layer->bytes_after, layer->error);
}

static int progress(void *context, const struct fq_quantized_layer *layer, size_t done,
                    size_t total) {
    struct command *command = context;

    if (command->matrices)
        json_array_append_new(
            command->matrices,
            layer->kept_dense
                ? json_pack("{s:s, s:I, s:I, s:b}", "name", layer->name, "n", (json_int_t)layer->n,
                            "k", (json_int_t)layer->k, "kept_dense", 1)
                : json_pack("{s:s, s:I, s:I, s:b, s:i, s:I, s:I, s:I, s:f}", "name", layer->name,
                            "n", (json_int_t)layer->n, "k", (json_int_t)layer->k, "kept_dense", 0,
                            "bits", layer->bits, "group", (json_int_t)layer->group, "bytes_before",
                            (json_int_t)layer->bytes_before, "bytes_after",
                            (json_int_t)layer->bytes_after, "error", layer->error));
    if (!command->quiet && command->terminal)
        print_bar(layer, done, total);
    else if (!command->quiet)
        print_line(layer, done, total);
    return interrupted;
}

static double bits_per_weight(const struct fq_quantize_summary *summary) {
    return (double)summary->bytes_after * 8 / (double)summary->weights;
}

static int print_json(const struct command *command, const struct fq_quantize_summary *summary,
                      struct fq_error *err) {
    json_t *json = json_pack(
        "{s:s, s:s, s:i, s:o, s:I, s:I, s:f, s:I, s:I, s:O}", "input", command->in, "output",
        command->out, "bits", command->quantize.bits, "group",
        command->quantize.group ? json_integer(command->quantize.group) : json_string("channel"),
        "bytes_before", (json_int_t)summary->bytes_before, "bytes_after",
        (json_int_t)summary->bytes_after, "bits_per_weight", bits_per_weight(summary),
        "tensor_bytes_before", (json_int_t)summary->tensors_before, "tensor_bytes_after",
        (json_int_t)summary->tensors_after, "matrices", command->matrices);

    if (!json)
        return fq_fail(err, FQ_INVALID, "done, but IN or OUT is not UTF-8, which JSON needs");
    json_dumpf(json, stdout, JSON_INDENT(2));
    putchar('\n');
    json_decref(json);
    return 0;
}

static void print_summary(const struct command *command,
                          const struct fq_quantize_summary *summary) {
    printf("%s: %zu layers quantized to %d bits, %.2f bits a weight with scales\n"
           "quantized weights %.1f -> %.1f MB, all tensors %.1f -> %.1f MB\n",
           command->out, summary->layers - summary->kept_dense, command->quantize.bits,
           bits_per_weight(summary), (double)summary->bytes_before / 1e6,
           (double)summary->bytes_after / 1e6, (double)summary->tensors_before / 1e6,
           (double)summary->tensors_after / 1e6);
    if (summary->kept_dense > 0)
        printf("%zu layers kept dense: 3-bit rows of their length are ambiguous\n",
               summary->kept_dense);
}

int main(int argc, char **argv) {
    struct command command = {
        .quantize = {.bits = 4, .group = 64, .shard_bytes = SHARD_BYTES_DEFAULT},
    };
    struct sigaction action = {.sa_handler = interrupt, .sa_flags = SA_RESTART | SA_RESETHAND};
    struct fq_quantize_summary summary;
    struct fq_error err = {0};
    int rc = parse(&command, argc, argv, &err);

    if (rc > 0)
        return 0;
    if (rc == 0) {
        sigaction(SIGINT, &action, NULL);
        sigaction(SIGTERM, &action, NULL);
        command.terminal = isatty(STDERR_FILENO);
        command.matrices = command.json ? json_array() : NULL;
        command.quantize.progress = progress;
        command.quantize.context = &command;
        rc = fq_quantize_checkpoint(command.in, command.out, &command.quantize, &summary, &err);
    }
    if (rc == 0 && command.json)
        rc = print_json(&command, &summary, &err);
    else if (rc == 0 && !command.quiet)
        print_summary(&command, &summary);
    json_decref(command.matrices);
    if (rc == 0 && fflush(stdout) != 0)
        rc = fq_fail_errno(&err, "standard output");
    if (rc < 0)
        fprintf(stderr, PROGRAM ": %s\n", err.message);
    return -rc;
}
