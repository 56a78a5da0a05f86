/* SPDX-License-Identifier: Apache-2.0 */
/* Clock, samples and the cells they are printed in, for every subcommand of finequant-bench. */
#include "bench.h"

#include <math.h>
#include <stdlib.h>
#include <time.h>

double bench_now_us(void) {
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e6 + (double)now.tv_nsec * 1e-3;
}

int bench_samples_add(struct bench_samples *samples, double value, struct fq_error *err) {
    if (samples->count == samples->room) {
        size_t room = samples->room ? 2 * samples->room : 256;
        double *values = realloc(samples->values, room * sizeof *values);

        if (!values)
            return fq_fail(err, FQ_NO_MEMORY, "no memory for %zu samples", room);
        samples->values = values;
        samples->room = room;
    }
    samples->values[samples->count++] = value;
    return 0;
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

double bench_samples_at(struct bench_samples *samples, double at) {
    if (samples->count == 0)
        return NAN;
    qsort(samples->values, samples->count, sizeof *samples->values, compare);
    return samples->values[(size_t)(at * (double)(samples->count - 1) + 0.5)];
}

void bench_samples_fini(struct bench_samples *samples) {
    free(samples->values);
    *samples = (struct bench_samples){0};
}

void bench_print_cell(FILE *out, int width, int digits, double value) {
    if (isnan(value))
        fprintf(out, " %*s", width, "-");
    else
        fprintf(out, " %*.*f", width, digits, value);
}

void bench_print_field(FILE *out, double value) {
    if (isnan(value))
        fputc(',', out);
    else
        fprintf(out, ",%.6g", value);
}
