/* SPDX-License-Identifier: Apache-2.0 */
/*
 * finequant-quantize convert IN OUT: its options, progress and summary;
 * model/convert-checkpoint.c does the work.
 */
#include "quantize-cli.h"

#include "convert-checkpoint.h"

#include <inttypes.h>
#include <jansson.h>
#include <unistd.h>

static struct {
    struct fq_convert_options convert;
    bool json, quiet, terminal;
    bool bar; /* a line is on the terminal that the next one replaces */
} command = {.convert = {.shard_bytes = 5000000000}};

static const struct quantize_option options[] = {
    {"shard-size", 's', "SIZE", "begin a new file at this size, as 5000000000 or 5G (default: 5G)",
     "is a number of bytes from 1 on, or one with K, M, G or T", quantize_parse_size,
     &command.convert.shard_bytes},
    {"json", 'j', NULL, "print a summary as JSON on standard output", NULL, quantize_parse_flag,
     &command.json},
    {"quiet", 'q', NULL, "print no progress", NULL, quantize_parse_flag, &command.quiet},
    {0},
};

static void clear_bar(void) {
    if (command.bar)
        fputs("\r\033[K", stderr);
    command.bar = false;
}

static int progress(void *context, const struct fq_checkpoint_matrix *matrix, size_t done,
                    size_t total) {
    (void)context;
    if (command.quiet)
        return quantize_interrupted();
    clear_bar();
    command.bar = command.terminal && done < total;
    fprintf(stderr, "[%zu/%zu] %s %" PRId64 "x%" PRId64 ": %d bits, group %" PRId64 ", %s%s", done,
            total, matrix->name, matrix->matrix.n, matrix->matrix.k, matrix->matrix.bits,
            matrix->matrix.group, matrix->symmetric ? "symmetric" : "with zero points",
            command.bar ? "" : "\n");
    return quantize_interrupted();
}

static int print_json(char **arguments, const struct fq_convert_summary *summary,
                      struct fq_error *err) {
    json_t *json = json_pack("{s:s, s:s, s:s, s:I, s:I, s:I, s:I}", "input", arguments[0], "output",
                             arguments[1], "format", summary->format, "matrices",
                             (json_int_t)summary->matrices, "copied", (json_int_t)summary->copied,
                             "tensor_bytes_before", (json_int_t)summary->bytes_before,
                             "tensor_bytes_after", (json_int_t)summary->bytes_after);

    if (!json)
        return fq_fail(err, FQ_INVALID, "done, but IN or OUT is not UTF-8, which JSON needs");
    json_dumpf(json, stdout, JSON_INDENT(2));
    putchar('\n');
    json_decref(json);
    return 0;
}

static int run(char **arguments, struct fq_error *err) {
    struct fq_convert_summary summary;
    int rc;

    command.terminal = isatty(STDERR_FILENO);
    command.convert.progress = progress;
    quantize_catch_signals();
    rc = fq_convert_checkpoint(arguments[0], arguments[1], &command.convert, &summary, err);
    clear_bar(); /* an error's line is to have its own */
    if (rc == 0 && command.json)
        return print_json(arguments, &summary, err);
    if (rc == 0 && !command.quiet)
        printf("%s: %zu matrices from %s, %zu tensors copied, %.1f -> %.1f MB\n", arguments[1],
               summary.matrices, summary.format, summary.copied, (double)summary.bytes_before / 1e6,
               (double)summary.bytes_after / 1e6);
    return rc;
}

const struct quantize_command quantize_convert = {
    .name = "convert",
    .arguments = "IN OUT",
    .argument_count = 2,
    .help = "Rewrite the quantized checkpoint IN (a directory with GPTQ, AWQ or any\n"
            "compressed-tensors packing, or a GGUF file) as the new directory OUT in today's\n"
            "compressed-tensors layout, every weight the same bit for bit",
    .options = options,
    .run = run,
};
