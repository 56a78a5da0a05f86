/* SPDX-License-Identifier: Apache-2.0 */
/* Progress, explanations and the summary, as quantize-report.h says. */
#include "quantize-report.h"

#include "quantize-cli.h"
#include "quantize-progress.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

void quantize_report_begin(struct quantize_report *report, const char *in, const char *out) {
    report->in = in;
    report->out = out;
    report->terminal = isatty(STDERR_FILENO);
    report->matrices = report->json ? json_array() : NULL;
    report->begun = report->phase_begun = report->told = now();
    report->phase = -1;
}

static void clear_bar(struct quantize_report *report) {
    if (report->bar)
        fputs("\r\033[K", stderr);
    report->bar = false;
}

void quantize_report_fini(struct quantize_report *report) {
    clear_bar(report); /* an error's line is to have its own */
    json_decref(report->matrices);
    report->matrices = NULL;
}

/* ---- progress ----------------------------------------------------------------------------- */

static const char *word_of(const struct quantize_report *report,
                           const struct fq_quantize_progress *progress) {
    return progress->phase == FQ_QUANTIZE_MEASURE ? "looking"
           : report->plan                         ? "checking"
                                                  : "writing";
}

/* Bar, percents and the time left are of the whole job; layers and rate, of the phase. */
static void print_bar(struct quantize_report *report, const struct fq_quantize_progress *progress) {
    const double part = quantize_progress_part(progress), seconds = now() - report->phase_begun;
    const double left = quantize_progress_left(progress, seconds);
    size_t filled;
    char bar[31];

    filled = (size_t)(part * (sizeof bar - 1));
    memset(bar, '.', sizeof bar - 1);
    memset(bar, '#', filled);
    bar[sizeof bar - 1] = '\0';
    fprintf(stderr, "\r\033[K%s [%s] %3.0f%%, %zu of %zu layers, %.2f GB/s, %d:%02d left",
            word_of(report, progress), bar, floor(part * 100), progress->layers_done,
            progress->layers, quantize_progress_rate(progress, seconds) * 1e-9, (int)left / 60,
            (int)left % 60);
    report->bar = true;
}

/* Every few seconds, while nothing is written yet. */
static void print_planning(struct quantize_report *report,
                           const struct fq_quantize_progress *progress) {
    const double seconds = now() - report->phase_begun;

    if (now() - report->line_printed < 5)
        return;
    report->line_printed = now();
    fprintf(stderr,
            "[%zu/%zu] planning: %.1f of %.1f GB, %.2f GB/s, about %.0f s left with the writing\n",
            progress->layers_done, progress->layers, (double)progress->bytes_done * 1e-9,
            (double)progress->bytes_total * 1e-9, quantize_progress_rate(progress, seconds) * 1e-9,
            quantize_progress_left(progress, seconds));
}

static void print_line(struct quantize_report *report,
                       const struct fq_quantize_progress *progress) {
    const struct fq_quantized_layer *layer = progress->layer;

    if (!layer) {
        if (progress->phase == FQ_QUANTIZE_MEASURE)
            print_planning(report, progress);
        return;
    }
    fprintf(stderr, "[%zu/%zu] %s %" PRId64 "x%" PRId64, progress->layers_done, progress->layers,
            layer->name, layer->n, layer->k);
    if (layer->kept_dense) {
        fputs(": kept dense, 3-bit rows of this length are ambiguous\n", stderr);
        return;
    }
    fprintf(stderr, ": %d bits, ", layer->bits);
    if (layer->group == layer->k)
        fputs("channel", stderr);
    else
        fprintf(stderr, "group %" PRId64, layer->group);
    fprintf(stderr, "%s, %" PRIu64 " -> %" PRIu64 " bytes",
            layer->asymmetric ? ", zero points" : "", layer->bytes_before, layer->bytes_after);
    if (!isnan(layer->error))
        fprintf(stderr, report->plan ? ", error to expect %.4f" : ", error %.4f", layer->error);
    fputc('\n', stderr);
}

static json_t *layer_json(const struct fq_quantized_layer *layer) {
    if (layer->kept_dense)
        return json_pack("{s:s, s:I, s:I, s:b}", "name", layer->name, "n", (json_int_t)layer->n,
                         "k", (json_int_t)layer->k, "kept_dense", 1);
    return json_pack("{s:s, s:I, s:I, s:b, s:i, s:I, s:b, s:I, s:I, s:o}", "name", layer->name, "n",
                     (json_int_t)layer->n, "k", (json_int_t)layer->k, "kept_dense", 0, "bits",
                     layer->bits, "group", (json_int_t)layer->group, "asymmetric",
                     layer->asymmetric, "bytes_before", (json_int_t)layer->bytes_before,
                     "bytes_after", (json_int_t)layer->bytes_after, "error",
                     isnan(layer->error) ? json_null() : json_real(layer->error));
}

int quantize_report_progress(void *context, const struct fq_quantize_progress *progress) {
    struct quantize_report *report = context;

    if (report->phase != (int)progress->phase) {
        clear_bar(report);
        report->phase = (int)progress->phase;
        report->phase_begun = report->told;
        report->line_printed = report->told;
    }
    report->told = now();
    if (report->matrices && progress->layer)
        json_array_append_new(report->matrices, layer_json(progress->layer));
    if (!report->quiet && report->terminal)
        print_bar(report, progress);
    else if (!report->quiet)
        print_line(report, progress);
    return quantize_interrupted();
}

void quantize_report_problem(void *context, const char *message) {
    clear_bar(context);
    fprintf(stderr, "finequant-quantize: %s\n", message);
}

/* ---- explanations ------------------------------------------------------------------------- */

static void group_text(int64_t group, bool channel, char text[24]) {
    if (channel)
        snprintf(text, 24, "channel");
    else
        snprintf(text, 24, "%" PRId64, group);
}

/* Of a step: what alpha's walk chose, and what the choice came to be. */
static const char *mark_of(const struct fq_quantize_explanation *explanation, size_t step) {
    return step == explanation->chosen ? "->" : step == explanation->walked ? " *" : "  ";
}

/* What a finer row gains over a coarser one, of which one is where alpha stopped. */
static void explain_gain(const struct fq_choose_step *coarse, const struct fq_choose_step *fine) {
    const double halvings = log2((double)coarse->group / (double)fine->group);

    printf(" %14.1f%% %8.4f %8.4f", 100 * (1 - pow(fine->error / coarse->error, 1 / halvings)),
           log2(coarse->error / fine->error), fine->bits - coarse->bits);
}

static void explain_step(const struct fq_quantize_explanation *explanation, size_t i) {
    const struct fq_choose_step *step = &explanation->steps[i];
    const struct fq_choose_step *walked = &explanation->steps[explanation->walked];
    char text[24];

    group_text(step->group, i == 0, text);
    printf("  %s %8s %11.4f %16.4f", mark_of(explanation, i), text, step->bits, step->error);
    if (step != walked && step->error > 0 && walked->error > 0)
        explain_gain(step < walked ? step : walked, step < walked ? walked : step);
    else if (explanation->options)
        printf(" %15s %8s %8s", "", "", "");
    if (explanation->options)
        printf("   %s%.4f", explanation->options[i].estimated ? "~" : " ",
               explanation->options[i].error / (double)explanation->count);
    putchar('\n');
}

static void explain_steps(const struct fq_quantize_explanation *explanation) {
    const struct fq_choose_step *steps = explanation->steps;
    char walked[24], chosen[24];

    printf("       group  scale bits  error to expect  gain a halving    worth     cost%s\n",
           explanation->options ? "  measured" : "");
    for (size_t i = 0; i < explanation->step_count; i++)
        explain_step(explanation, i);
    group_text(steps[explanation->walked].group, explanation->walked == 0, walked);
    group_text(steps[explanation->chosen].group, explanation->chosen == 0, chosen);
    printf("     alpha: %s, %s\n", walked,
           explanation->stop == FQ_CHOOSE_FINEST  ? "the finest candidate"
           : explanation->stop == FQ_CHOOSE_ALPHA ? "no finer one gains alpha with each halving"
                                                  : "finer ones gain, but less than their scales "
                                                    "cost");
    if (explanation->options)
        printf("     its bytes shared out anew: %s, %s\n", chosen,
               explanation->chosen > explanation->walked
                   ? "with bytes that take away less in other matrices"
               : explanation->chosen < explanation->walked
                   ? "since the bytes take away more in other matrices"
                   : "as before");
}

/* More than the chosen row's, or less, in percent of it. */
static double percent_more(double value, double chosen) {
    return chosen > 0 ? 100 * (value / chosen - 1) : 0;
}

static void explain_options(const struct fq_quantize_explanation *explanation) {
    const struct fq_choose_option *chosen = &explanation->options[explanation->chosen];

    puts("       bits    group  zeros        bytes  to chosen  summed error  to chosen");
    for (size_t i = 0; i < explanation->option_count; i++) {
        const struct fq_choose_option *option = &explanation->options[i];
        char text[24];

        group_text(option->group, option->group == 0, text);
        printf("  %s %4d %8s %6s %12" PRIu64, option == chosen ? "->" : "  ", option->bits, text,
               option->asymmetric ? "yes" : "no", option->bytes);
        if (option == chosen)
            printf(" %10s    %s%10.5f %10s\n", "-", option->estimated ? "~" : " ", option->error,
                   "-");
        else
            printf(" %+9.1f%%    %s%10.5f %+9.1f%%\n",
                   percent_more((double)option->bytes, (double)chosen->bytes),
                   option->estimated ? "~" : " ", option->error,
                   percent_more(option->error, chosen->error));
    }
}

static const char *const steps_legend =
    "* is where alpha stopped, -> what is chosen (one mark where they are the same).  Every other\n"
    "row is compared with alpha's, the finer of the two with the coarser.  gain: of the error, "
    "for\n"
    "each halving of the group; it must be alpha or more.  worth: the bits in each code that "
    "would\n"
    "gain as much; it must be more than the cost, the bits in scales.  ~: estimated.\n";

static const char *const options_legend =
    "-> is chosen; 'to chosen' is what a row has more (+) or less (-) than that one.  For the "
    "bytes\n"
    "that a smaller row saves, other matrices gain less than this one loses; for those that a "
    "larger\n"
    "one takes they lose more than this one gains, or there are none left.  ~: estimated.\n";

void quantize_report_explain(void *context, const struct fq_quantize_explanation *explanation) {
    struct quantize_report *report = context;

    clear_bar(report);
    if (!report->explained)
        fputs(explanation->steps ? steps_legend : options_legend, stdout);
    report->explained = true;
    for (size_t i = 0; i < explanation->count; i++)
        printf("%s%s", explanation->names[i], i + 1 < explanation->count ? ", " : ":\n");
    if (explanation->steps)
        explain_steps(explanation);
    else
        explain_options(explanation);
}

/* ---- summary ------------------------------------------------------------------------------ */

static double bits_per_weight(const struct fq_quantize_summary *summary) {
    return (double)summary->bytes_after * 8 / (double)summary->weights;
}

/* Bytes that this process had resident at its most. */
static int64_t peak_resident(void) {
    struct rusage usage;

    return getrusage(RUSAGE_SELF, &usage) == 0 ? (int64_t)usage.ru_maxrss * 1024 : 0;
}

static json_t *uniform_json(const struct fq_quantize_summary *summary) {
    if (!summary->budgeted)
        return json_null();
    return json_pack("{s:I, s:f, s:i, s:I, s:I, s:o, s:I}", "allowed", (json_int_t)summary->allowed,
                     "error", summary->expected, "uniform_bits", summary->uniform.bits,
                     "uniform_group", (json_int_t)summary->uniform.group, "uniform_bytes",
                     (json_int_t)summary->uniform.bytes, "uniform_error",
                     summary->uniform.bits ? json_real(summary->uniform.error) : json_null(),
                     "measured_before", (json_int_t)summary->measured_before);
}

static json_t *group_json(int64_t group) {
    return group == FQ_QUANTIZE_GROUP_AUTO ? json_string("auto")
           : group == 0                    ? json_string("channel")
                                           : json_integer(group);
}

/* A width, an array of those that a budget had, or 0. */
static json_t *bits_json(const struct fq_quantize_options *options) {
    json_t *list;

    if (!options->widths)
        return json_integer(options->bits);
    list = json_array();
    for (int bits = 0; bits <= 8; bits++)
        if (options->widths >> bits & 1)
            json_array_append_new(list, json_integer(bits));
    return list;
}

static int print_json(const struct quantize_report *report,
                      const struct fq_quantize_options *options,
                      const struct fq_quantize_summary *summary, struct fq_error *err) {
    json_t *json = json_pack(
        "{s:s, s:s, s:o, s:o, s:I, s:I, s:f, s:I, s:I, s:o, s:I, s:I, s:f, s:I, s:o, s:O}", "input",
        report->in, "output", report->out, "bits", bits_json(options), "group",
        group_json(options->group), "bytes_before", (json_int_t)summary->bytes_before,
        "bytes_after", (json_int_t)summary->bytes_after, "bits_per_weight",
        bits_per_weight(summary), "tensor_bytes_before", (json_int_t)summary->tensors_before,
        "tensor_bytes_after", (json_int_t)summary->tensors_after, "error",
        options->dry_run ? json_null() : json_real(summary->error), "shards",
        (json_int_t)summary->shards, "shards_kept", (json_int_t)summary->shards_kept, "seconds",
        report->seconds, "peak_resident_bytes", (json_int_t)peak_resident(), "budget",
        uniform_json(summary), "matrices", report->matrices);

    if (!json)
        return fq_fail(err, FQ_INVALID, "done, but IN or OUT is not UTF-8, which JSON needs");
    json_dumpf(json, stdout, JSON_INDENT(2));
    putchar('\n');
    json_decref(json);
    return 0;
}

static void print_budget(const struct fq_quantize_summary *summary) {
    const struct fq_choose_uniform *uniform = &summary->uniform;
    char text[24];

    printf("summed relative error %.5f in %" PRIu64 " of %" PRIu64 " bytes\n", summary->expected,
           summary->bytes_after, summary->allowed);
    group_text(uniform->group, uniform->group == 0, text);
    if (uniform->bits)
        printf("the best of one width and group size: %d bits, group %s: %.5f in %" PRIu64
               " bytes\n",
               uniform->bits, text, uniform->error, uniform->bytes);
    else
        puts("no single width and group size fits");
    if (summary->measured_before > 0)
        printf("%zu layers had been measured by an earlier run\n", summary->measured_before);
}

int quantize_report_end(struct quantize_report *report, const struct fq_quantize_options *options,
                        const struct fq_quantize_summary *summary, struct fq_error *err) {
    clear_bar(report);
    report->seconds = now() - report->begun;
    if (report->json)
        return print_json(report, options, summary, err);
    if (report->quiet)
        return 0;
    printf("%s: %zu layers %squantized, %.3f bits a weight with scales\n"
           "quantized weights %.1f -> %.1f MB, all tensors %.1f -> %.1f MB\n",
           report->out, summary->layers - summary->kept_dense, options->dry_run ? "would be " : "",
           bits_per_weight(summary), (double)summary->bytes_before / 1e6,
           (double)summary->bytes_after / 1e6, (double)summary->tensors_before / 1e6,
           (double)summary->tensors_after / 1e6);
    if (summary->budgeted)
        print_budget(summary);
    if (summary->asymmetric > 0)
        printf("%zu layers have zero points\n", summary->asymmetric);
    if (summary->kept_dense > 0)
        printf("%zu layers kept dense: 3-bit rows of their length are ambiguous\n",
               summary->kept_dense);
    if (summary->unsuited > 0)
        printf("%zu tensors of layers stay dense: stored transposed, or not as F32, F16 or BF16\n",
               summary->unsuited);
    if (summary->uneven > 0)
        printf("%zu layers end in a short group: finequantd reads them, vLLM does not\n",
               summary->uneven);
    if (summary->unusual > 0)
        printf("%zu layers have 3 bits, or groups other than 32, 64, 128 and channel: finequantd "
               "reads "
               "them, vLLM's GPU kernels do not\n",
               summary->unusual);
    if (summary->poor > 0)
        printf(
            "%zu layers keep an error of %.1f or more; weights under 3e-8 become 0, since scales "
            "are in fp16\n",
            summary->poor, FQ_QUANTIZE_POOR);
    if (summary->shards_kept > 0)
        printf("%zu of %zu files were there from an earlier run\n", summary->shards_kept,
               summary->shards);
    if (!options->dry_run)
        printf("%.1f s, %.2f GB/s of input, at most %.0f MB resident\n", report->seconds,
               (double)summary->tensors_before * 1e-9 / report->seconds,
               (double)peak_resident() / 1e6);
    return 0;
}
