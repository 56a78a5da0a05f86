/* SPDX-License-Identifier: Apache-2.0 */
/*
 * finequant-bench model: the products of one decode step of a whole model, with
 * synthetic weights, against a plain read of all the bytes that they must move.
 *
 * On a GPU the step is one CUDA graph, in the order of the model's layers; within
 * a layer each product takes what the one before it wrote.  A layer begins with
 * an input of its own, as after a layer norm, so that the values stay in range.
 * Attention is left out: it multiplies with no weights.  Where a few layers are
 * smaller than what caches hold, copies of them are used in turn.
 */
#ifdef HAVE_CONFIG_H
#include <config.h>
#endif

#include "bench-model.h"

#include <math.h>
#include <string.h>

/* ---- Models --------------------------------------------------------------------------------- */

#define OPT(h)                                                                                     \
    4, {                                                                                           \
        {"qkv", 3 * (h), h, -1, false}, {"out", h, h, 0, false}, {"fc1", 4 * (h), h, 1, false}, {  \
            "fc2", h, 4 * (h), 2, false                                                            \
        }                                                                                          \
    }

static const struct bench_arch archs[] = {
    {"opt-125m", 12, OPT(768), {0}},
    {"opt-13b", 40, OPT(5120), {0}},
    {"opt-66b", 64, OPT(9216), {0}},
    {"opt-175b", 96, OPT(12288), {44, 45, 58}},
    {"llama-70b",
     80,
     4,
     {{"qkv", 8192 + 2 * 1024, 8192, -1, false},
      {"o", 8192, 8192, 0, false},
      {"gate and up", 28672, 8192, 1, true},
      {"down", 8192, 28672, 2, false}},
     {0}},
};

static const int64_t paper_rows[] = {1, 8, 32};

/* ---- Options -------------------------------------------------------------------------------- */

/* What is the same for the whole table; bits and group are the current ones. */
static struct bench_model_spec spec = {.backend = "cuda", .dtype = FQ_F16, .rotate_mib = 512};
static struct bench_list bits_list = {1, {4}}, groups = {1, {64}}, rows = {3, {1, 8, 32}};
static const char *csv_path;

static bool parse_arch(const char *text, void *value) {
    for (size_t i = 0; i < sizeof archs / sizeof *archs; i++) {
        if (strcmp(archs[i].name, text) == 0) {
            *(const struct bench_arch **)value = &archs[i];
            return true;
        }
    }
    return false;
}

static const struct bench_option options[] = {
    {"arch", "NAME", "the model; needed", "opt-125m, opt-13b, opt-66b, opt-175b and llama-70b",
     parse_arch, &spec.arch},
    {"backend", "NAME", "cuda, cpu or reference (default: cuda)", "cpu, cuda and reference",
     bench_parse_text, &spec.backend},
    {"bits", "LIST", "bits a weight: 8, 4 or 3 (default: 4)", "8, 4 and 3", bench_parse_bits,
     &bits_list},
    {"group", "LIST", "group size, or 'channel' (default: 64)", "multiples of 16, and 'channel'",
     bench_parse_group, &groups},
    {"dtype", "TYPE", "of X and Y: f16, bf16 or f32 (default: f16)", "f16, bf16 and f32",
     bench_parse_dtype, &spec.dtype},
    {"layers", "N", "of the model's layers (default: all)", "1 to 16777216", bench_parse_positive,
     &spec.layers},
    {"m", "LIST", "rows of X: sequences at once (default: 1,8,32)",
     "1 to 65536, up to 64 of them by commas", bench_parse_rows, &rows},
    {"rotate-mib", "MIB", "weights to rotate over, at least (default: 512)", "1 to 16777216",
     bench_parse_positive, &spec.rotate_mib},
    {"csv", "FILE", "write the table as CSV as well", "file names", bench_parse_text, &csv_path},
    {NULL},
};

/* ---- The table ------------------------------------------------------------------------------- */

static double paper_ms(const struct bench_model_spec *of, int64_t m) {
    for (size_t i = 0; i < sizeof paper_rows / sizeof *paper_rows; i++)
        if (m == paper_rows[i] && of->bits == 4 && of->group == 64 &&
            of->layers == of->arch->layers && of->arch->paper_ms[i] > 0)
            return of->arch->paper_ms[i];
    return NAN;
}

static void print_heading(FILE *csv, const struct bench_model *model) {
    const struct fq_device_info *device = &model->device;

    printf("%s: %s, %s\n", device->backend, device->name, device->kernels);
    printf("%s: %lld of %d layers, %s.  read: read_ms / ms.  paper_ms: FineQuant's, two A100.\n",
           spec.arch->name, (long long)spec.layers, spec.arch->layers,
           fq_dtype_name((int)spec.dtype));
    printf("%4s %7s %8s %6s %9s %9s %5s %9s %9s %8s %9s\n", "bits", "group", "GB", "m", "ms",
           "read_ms", "read", "tokens/s", "GB/s", "paper_ms", "error");
    if (!csv)
        return;
    fprintf(csv, "# %s: %s, %s: ", device->backend, device->name, device->kernels);
    bench_print_command(csv);
    fputs("\narch,layers,bits,group,dtype,m,ms,read_ms,tokens_per_s,bytes\n", csv);
}

static void print_row(FILE *csv, const struct bench_step *step, double us, double read_us,
                      double error) {
    const struct bench_model_spec *of = &step->model->spec;
    double rate = (double)step->m / us * 1e6;
    char group[24] = "channel";

    if (of->group)
        snprintf(group, sizeof group, "%lld", (long long)of->group);
    printf("%4d %7s %8.3f %6lld %9.3f %9.3f %5.2f %9.1f %9.1f", of->bits, group,
           (double)step->model->weight_bytes / 1e9, (long long)step->m, us / 1e3, read_us / 1e3,
           read_us / us, rate, (double)step->bytes / us / 1e3);
    bench_print_cell(stdout, 8, 0, paper_ms(of, step->m));
    printf(" %9.1e\n", error);
    fflush(stdout);
    if (!csv)
        return;
    fprintf(csv, "%s,%lld,%d,%s,%s,%lld", of->arch->name, (long long)of->layers, of->bits, group,
            fq_dtype_name((int)of->dtype), (long long)step->m);
    bench_print_field(csv, us / 1e3);
    bench_print_field(csv, read_us / 1e3);
    bench_print_field(csv, rate);
    fprintf(csv, ",%llu\n", (unsigned long long)step->bytes);
    fflush(csv); /* a run that is cut off keeps its rows */
}

static int measure_step(FILE *csv, struct bench_model *model, int64_t m, struct fq_error *err) {
    struct bench_step step;
    double us, read_us, error;
    int status;

    bench_step_init(&step, model, m);
    status = bench_step_time(&step, &us, &read_us, err);
    if (status == 0)
        status = bench_step_error(&step, &error, err);
    if (status == 0)
        print_row(csv, &step, us, read_us, error);
    return status;
}

/* The model of the current spec, at every m. */
static int measure_model(FILE *csv, bool *headed, struct fq_error *err) {
    struct bench_model model;
    int status = bench_model_init(&model, &spec, err);

    if (status == 0 && !*headed) {
        print_heading(csv, &model);
        *headed = true;
        if (!model.fused)
            printf("This backend has no gated products: gate and up are two.\n");
    }
    for (int i = 0; i < rows.count && status == 0; i++)
        status = measure_step(csv, &model, rows.values[i], err);
    bench_model_fini(&model);
    return status;
}

static int run(struct fq_error *err) {
    FILE *csv = NULL;
    bool headed = false;
    int status = 0;

    if (!spec.arch)
        return fq_fail(err, FQ_USAGE, "--arch is needed; see finequant-bench model --help");
    if (spec.layers > spec.arch->layers)
        return fq_fail(err, FQ_USAGE, "--layers is '%lld', allowed are 1 to %d for %s",
                       (long long)spec.layers, spec.arch->layers, spec.arch->name);
    if (spec.layers == 0)
        spec.layers = spec.arch->layers;
    for (int i = 0; i < rows.count; i++)
        if (rows.values[i] > spec.m_max)
            spec.m_max = rows.values[i];
    if (csv_path && !(csv = fopen(csv_path, "we")))
        return fq_fail_errno(err, "--csv: '%s'", csv_path);
    for (int b = 0; b < bits_list.count; b++) {
        for (int g = 0; g < groups.count && status == 0; g++) {
            spec.bits = (int)bits_list.values[b];
            spec.group = groups.values[g];
            status = measure_model(csv, &headed, err);
        }
    }
    if (csv && fclose(csv) != 0 && status == 0)
        status = fq_fail_errno(err, "--csv: '%s'", csv_path);
    return status;
}

const struct bench_command bench_model = {
    "model",
    "a decode step's products of a whole model, against a plain read",
    options,
    run,
};
