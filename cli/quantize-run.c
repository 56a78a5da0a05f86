/* SPDX-License-Identifier: Apache-2.0 */
/*
 * finequant-quantize IN OUT: its options, progress and summary;
 * model/quantize-checkpoint.c does the work.
 */
#include "quantize-cli.h"

#include "quantize-checkpoint.h"

#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SHARD_BYTES_DEFAULT ((uint64_t)5000000000)

static struct command {
    struct fq_quantize_options quantize;
    const char *in, *out;
    bool json, quiet, terminal;
    json_t *matrices; /* of --json, else NULL */
} command = {
    .quantize = {.bits = 4, .group = 64, .shard_bytes = SHARD_BYTES_DEFAULT},
};

/* int64_t: 0 for "channel". */
static bool parse_group(const char *text, void *value) {
    char *end;
    long long group;

    *(int64_t *)value = 0;
    if (strcmp(text, "channel") == 0)
        return true;
    errno = 0;
    group = strtoll(text, &end, 10);
    *(int64_t *)value = group;
    return *text >= '0' && *text <= '9' && !*end && errno == 0 && group > 0 && group % 16 == 0 &&
           group <= 1 << 24;
}

static const struct quantize_option options[] = {
    {"bits", 'b', "N", "8, 4 or 3 bits a weight (default: 4)", "are 8, 4 and 3",
     quantize_parse_bits, &command.quantize.bits},
    {"group", 'g', "G", "weights that share a scale: a multiple of 16, or 'channel' (default: 64)",
     "are multiples of 16 to 16777216, and 'channel'", parse_group, &command.quantize.group},
    {"shard-size", 's', "SIZE", "begin a new file at this size, as 5000000000 or 5G (default: 5G)",
     "is a number of bytes, or one with K, M, G or T", quantize_parse_size,
     &command.quantize.shard_bytes},
    {"json", 'j', NULL, "print a summary as JSON on standard output", NULL, quantize_parse_flag,
     &command.json},
    {"quiet", 'q', NULL, "print no progress", NULL, quantize_parse_flag, &command.quiet},
    {0},
};

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
    (void)context;
    if (command.matrices)
        json_array_append_new(
            command.matrices,
            layer->kept_dense
                ? json_pack("{s:s, s:I, s:I, s:b}", "name", layer->name, "n", (json_int_t)layer->n,
                            "k", (json_int_t)layer->k, "kept_dense", 1)
                : json_pack("{s:s, s:I, s:I, s:b, s:i, s:I, s:I, s:I, s:f}", "name", layer->name,
                            "n", (json_int_t)layer->n, "k", (json_int_t)layer->k, "kept_dense", 0,
                            "bits", layer->bits, "group", (json_int_t)layer->group, "bytes_before",
                            (json_int_t)layer->bytes_before, "bytes_after",
                            (json_int_t)layer->bytes_after, "error", layer->error));
    if (!command.quiet && command.terminal)
        print_bar(layer, done, total);
    else if (!command.quiet)
        print_line(layer, done, total);
    return quantize_interrupted();
}

static double bits_per_weight(const struct fq_quantize_summary *summary) {
    return (double)summary->bytes_after * 8 / (double)summary->weights;
}

static int print_json(const struct fq_quantize_summary *summary, struct fq_error *err) {
    json_t *json = json_pack(
        "{s:s, s:s, s:i, s:o, s:I, s:I, s:f, s:I, s:I, s:O}", "input", command.in, "output",
        command.out, "bits", command.quantize.bits, "group",
        command.quantize.group ? json_integer(command.quantize.group) : json_string("channel"),
        "bytes_before", (json_int_t)summary->bytes_before, "bytes_after",
        (json_int_t)summary->bytes_after, "bits_per_weight", bits_per_weight(summary),
        "tensor_bytes_before", (json_int_t)summary->tensors_before, "tensor_bytes_after",
        (json_int_t)summary->tensors_after, "matrices", command.matrices);

    if (!json)
        return fq_fail(err, FQ_INVALID, "done, but IN or OUT is not UTF-8, which JSON needs");
    json_dumpf(json, stdout, JSON_INDENT(2));
    putchar('\n');
    json_decref(json);
    return 0;
}

static void print_summary(const struct fq_quantize_summary *summary) {
    printf("%s: %zu layers quantized to %d bits, %.2f bits a weight with scales\n"
           "quantized weights %.1f -> %.1f MB, all tensors %.1f -> %.1f MB\n",
           command.out, summary->layers - summary->kept_dense, command.quantize.bits,
           bits_per_weight(summary), (double)summary->bytes_before / 1e6,
           (double)summary->bytes_after / 1e6, (double)summary->tensors_before / 1e6,
           (double)summary->tensors_after / 1e6);
    if (summary->kept_dense > 0)
        printf("%zu layers kept dense: 3-bit rows of their length are ambiguous\n",
               summary->kept_dense);
}

static int run(char **arguments, struct fq_error *err) {
    struct fq_quantize_summary summary;
    int rc;

    command.in = arguments[0];
    command.out = arguments[1];
    command.terminal = isatty(STDERR_FILENO);
    command.matrices = command.json ? json_array() : NULL;
    command.quantize.progress = progress;
    quantize_catch_signals();
    rc = fq_quantize_checkpoint(command.in, command.out, &command.quantize, &summary, err);
    if (rc == 0 && command.json)
        rc = print_json(&summary, err);
    else if (rc == 0 && !command.quiet)
        print_summary(&summary);
    json_decref(command.matrices);
    return rc;
}

const struct quantize_command quantize_checkpoint = {
    .name = "",
    .arguments = "IN OUT",
    .argument_count = 2,
    .help =
        "Quantize the linear layers of the Hugging Face checkpoint in the directory IN and write\n"
        "the result as a new directory OUT, which finequantd, vLLM and transformers can load",
    .options = options,
    .run = run,
};
