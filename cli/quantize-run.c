/* SPDX-License-Identifier: Apache-2.0 */
/*
 * finequant-quantize IN OUT: its options and the summary; what it tells while it
 * works is quantize-report.c's, and model/quantize-checkpoint.c does the work.
 */
#include "quantize-report.h"

#include "quantize-cli.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define SHARD_BYTES_DEFAULT ((uint64_t)5000000000)
#define MIN_GROUP_DEFAULT   16
#define RULES_MAX           256

static struct fq_quantize_rule rules[RULES_MAX];
static struct quantize_report report;
static bool compare_copy;

static struct fq_quantize_options quantize = {
    .group = FQ_QUANTIZE_GROUP_AUTO,
    .alpha = -1, /* not given; nor is min_group */
    .method = {.scale = FQ_SCALE_MSE},
    .rules = rules,
    .shard_bytes = SHARD_BYTES_DEFAULT,
    .context = &report,
};

/* ---- parsers ------------------------------------------------------------------------------ */

/* A multiple of 16; int64_t. */
static bool parse_multiple(const char *text, void *value) {
    char *end;
    long long group;

    errno = 0;
    group = strtoll(text, &end, 10);
    *(int64_t *)value = group;
    return *text >= '0' && *text <= '9' && !*end && errno == 0 && group > 0 && group % 16 == 0 &&
           group <= 1 << 24;
}

/* int64_t: 0 for "channel". */
static bool parse_fixed_group(const char *text, void *value) {
    *(int64_t *)value = 0;
    return strcmp(text, "channel") == 0 || parse_multiple(text, value);
}

static bool parse_group(const char *text, void *value) {
    *(int64_t *)value = FQ_QUANTIZE_GROUP_AUTO;
    return strcmp(text, "auto") == 0 || parse_fixed_group(text, value);
}

/* One width, or several with commas between them. */
static bool parse_widths(const char *text, void *value) {
    struct fq_quantize_options *options = value;
    const char *comma;
    char one[2] = "";

    options->widths = 0;
    do {
        comma = strchr(text, ',');
        one[0] = *text;
        if ((comma ? comma != text + 1 : *text == '\0' || text[1] != '\0') ||
            !quantize_parse_bits(one, &options->bits))
            return false;
        options->widths |= 1u << options->bits;
        text = comma + 1;
    } while (comma);
    if (options->widths == 1u << options->bits)
        options->widths = 0;
    else
        options->bits = 0;
    return true;
}

static bool parse_fraction(const char *text, void *value) {
    char *end;

    *(double *)value = strtod(text, &end);
    return *text && !*end && *(double *)value >= 0 && *(double *)value < 1;
}

static bool parse_width(const char *text, void *value) {
    char *end;

    *(double *)value = strtod(text, &end);
    return *text && !*end && *(double *)value > 0 && *(double *)value <= 16;
}

static bool parse_scale(const char *text, void *value) {
    *(enum fq_scale_rule *)value = strcmp(text, "mse") == 0 ? FQ_SCALE_MSE : FQ_SCALE_ABSMAX;
    return strcmp(text, "mse") == 0 || strcmp(text, "absmax") == 0;
}

static bool parse_loss(const char *text, void *value) {
    *(enum fq_loss *)value = strcmp(text, "error") == 0 ? FQ_LOSS_ERROR : FQ_LOSS_SQUARES;
    return strcmp(text, "error") == 0 || strcmp(text, "squares") == 0;
}

static struct fq_quantize_rule *add_rule(const char *text) {
    if (*text == '\0' || quantize.rule_count == RULES_MAX)
        return NULL;
    rules[quantize.rule_count].pattern = text;
    return &rules[quantize.rule_count++];
}

static bool parse_include(const char *text, void *value) {
    struct fq_quantize_rule *rule = add_rule(text);

    (void)value;
    if (rule)
        rule->kind = FQ_RULE_INCLUDE;
    return rule != NULL;
}

static bool parse_exclude(const char *text, void *value) {
    struct fq_quantize_rule *rule = add_rule(text);

    (void)value;
    if (rule)
        rule->kind = FQ_RULE_EXCLUDE;
    return rule != NULL;
}

/* GLOB=bits,group: the text is cut up in place, it is the command line's. */
static bool parse_override(const char *text, void *value) {
    struct fq_quantize_rule *rule = add_rule(text);
    char *equals = strrchr(text, '='), *comma = equals ? strchr(equals, ',') : NULL;

    (void)value;
    if (!rule || !comma || equals == text)
        return false;
    *comma = '\0';
    if (!quantize_parse_bits(equals + 1, &rule->bits) ||
        !parse_fixed_group(comma + 1, &rule->group)) {
        *comma = ','; /* for the message */
        return false;
    }
    *equals = '\0';
    rule->kind = FQ_RULE_OVERRIDE;
    return true;
}

static const struct quantize_option options[] = {
    {"bits", 'b', "N", "8, 4 or 3 bits a weight (default: 4); under a budget also a list, as 8,4",
     "are 8, 4 and 3, and lists of them", parse_widths, &quantize},
    {"group", 'g', "G",
     "weights that share a scale: a multiple of 16, 'channel', or 'auto' (default)",
     "are multiples of 16 to 16777216, 'channel' and 'auto'", parse_group, &quantize.group},
    {"alpha", 'a', "X", "auto: halve while the error falls by this part (default: 0.075)",
     "is 0 to below 1", parse_fraction, &quantize.alpha},
    {"min-group", 0, "G", "auto: never under this (default: 16)", "are multiples of 16 to 16777216",
     parse_multiple, &quantize.min_group},
    {"budget", 'B', "SIZE", "choose bits and group of each matrix so that all tensors fit in SIZE",
     "is a number of bytes from 1 on, or one with K, M, G or T", quantize_parse_size,
     &quantize.budget},
    {"bits-per-weight", 'w', "X", "the same for an average over the quantized weights, with scales",
     "is a number above 0, to 16", parse_width, &quantize.bits_per_weight},
    {"minimize", 0, "WHAT",
     "the sum of 'squares' of relative errors, by size (default), or of each 'error'",
     "are squares and error", parse_loss, &quantize.loss},
    {"scale", 0, "RULE", "'mse', which searches (default), or 'absmax', the paper's",
     "are mse and absmax", parse_scale, &quantize.method.scale},
    {"asymmetric", 0, NULL, "zero points for the matrices where they pay", NULL,
     quantize_parse_flag, &quantize.method.asymmetric},
    {"include", 0, "GLOB", "quantize what matches; of these and --exclude the last one decides",
     "are up to 256 patterns, not empty", parse_include, NULL},
    {"exclude", 0, "GLOB", "keep what matches dense", "are up to 256 patterns, not empty",
     parse_exclude, NULL},
    {"override", 0, "GLOB=N,G", "N bits and group G for what matches",
     "is GLOB=bits,group, with 8, 4 or 3, and a multiple of 16 or 'channel'", parse_override, NULL},
    {"allow-nonfinite", 0, NULL, "take NaN as 0 and infinities as the row's largest", NULL,
     quantize_parse_flag, &quantize.method.allow_nonfinite},
    {"shard-size", 's', "SIZE", "begin a new file at this size (default: 5G)",
     "is a number of bytes from 1 on, or one with K, M, G or T", quantize_parse_size,
     &quantize.shard_bytes},
    {"dry-run", 'n', NULL, "print the plan and the sizes, write nothing", NULL, quantize_parse_flag,
     &quantize.dry_run},
    {"explain", 'e', NULL, "print why each matrix gets its bits and group", NULL,
     quantize_parse_flag, &report.explain},
    {"compare-copy", 0, NULL, "measure a plain copy's rate afterwards, beside our own", NULL,
     quantize_parse_flag, &compare_copy},
    {"json", 'j', NULL, "print a summary as JSON on standard output", NULL, quantize_parse_flag,
     &report.json},
    {"quiet", 'q', NULL, "print neither progress nor summary", NULL, quantize_parse_flag,
     &report.quiet},
    {0},
};

/* Options that would have no effect are refused, but for those of writing in a dry run. */
static int check(struct fq_error *err) {
    const char *budget = quantize.budget                ? "--budget"
                         : quantize.bits_per_weight > 0 ? "--bits-per-weight"
                                                        : NULL;
    const bool fixed = quantize.group != FQ_QUANTIZE_GROUP_AUTO;

    if (quantize.budget && quantize.bits_per_weight > 0)
        return fq_fail(err, FQ_USAGE, "--budget and --bits-per-weight say the same: give one");
    if (quantize.alpha >= 0 && (budget || fixed))
        return fq_fail(err, FQ_USAGE, "--alpha has no effect with %s: give one of them",
                       budget ? budget : "a fixed --group");
    if (quantize.min_group && fixed)
        return fq_fail(err, FQ_USAGE,
                       "--min-group has no effect with a fixed --group: give one of them");
    if (report.explain && fixed && !budget)
        return fq_fail(err, FQ_USAGE,
                       "--explain has nothing to tell with a fixed --group unless there is a "
                       "--budget or --bits-per-weight");
    if (report.explain && report.json)
        return fq_fail(err, FQ_USAGE,
                       "--explain and --json are both for standard output: give one of them");
    if (quantize.widths && !budget)
        return fq_fail(err, FQ_USAGE,
                       "--bits with a list is for --budget or --bits-per-weight, "
                       "which choose from it: give one of them");
    if (quantize.loss == FQ_LOSS_ERROR && !budget && fixed)
        return fq_fail(err, FQ_USAGE,
                       "--minimize has no effect with a fixed --group unless there "
                       "is a --budget or --bits-per-weight");
    if (!quantize.min_group)
        quantize.min_group = MIN_GROUP_DEFAULT;
    if (quantize.alpha < 0)
        quantize.alpha = FQ_CHOOSE_ALPHA_OF_CHANCE;
    return 0;
}

static int run(char **arguments, struct fq_error *err) {
    struct fq_quantize_summary summary;
    int rc = check(err);

    if (rc < 0)
        return rc;
    quantize_report_begin(&report, arguments[0], arguments[1]);
    report.plan = quantize.dry_run;
    quantize.progress = quantize_report_progress;
    quantize.explain = report.explain ? quantize_report_explain : NULL;
    quantize.problem = quantize_report_problem;
    quantize_catch_signals();
    rc = fq_quantize_checkpoint(arguments[0], arguments[1], &quantize, &summary, err);
    if (rc == 0)
        rc = quantize_report_end(&report, &quantize, &summary, err);
    else if (summary.resumable)
        fq_fail_in(err, "%.200s.partial is kept, the same command goes on", arguments[1]);
    if (rc == 0 && compare_copy && !quantize.dry_run)
        if ((rc = quantize_report_copy(&report, &summary, err)) < 0)
            fq_fail_in(err, "%.200s is complete, but --compare-copy failed", arguments[1]);
    quantize_report_fini(&report);
    return rc;
}

const struct quantize_command quantize_checkpoint = {
    .name = "",
    .arguments = "IN OUT",
    .argument_count = 2,
    .help = "Quantize the linear layers of the Hugging Face checkpoint in the directory IN and "
            "write\nthe result as a new directory OUT, which finequantd, vLLM and transformers can "
            "load",
    .options = options,
    .run = run,
};
