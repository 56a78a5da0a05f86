/* SPDX-License-Identifier: Apache-2.0 */
/*
 * finequantctl ping: how long the daemon's event loop takes to answer, in the
 * manner of redis-cli --latency.  Ends after --count pings or on SIGINT, and
 * prints the summary either way.
 */
#include "ctl.h"

#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define SAMPLES_MAX 1000000 /* older ones are dropped: a ping can run for days */

static volatile sig_atomic_t interrupted;

static void on_interrupt(int signal_number) {
    (void)signal_number;
    interrupted = 1;
}

static double now_us(void) {
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e6 + (double)time.tv_nsec / 1e3;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static void show(const json_t *result) {
    printf("%" PRIu64 " pings: min %.0f us, median %.0f us, p99 %.0f us, max %.0f us\n",
           ctl_number(result, "count"), json_real_value(json_object_get(result, "min_us")),
           json_real_value(json_object_get(result, "median_us")),
           json_real_value(json_object_get(result, "p99_us")),
           json_real_value(json_object_get(result, "max_us")));
}

static int summarize(const struct ctl *ctl, double *samples, uint64_t count) {
    uint64_t kept = count < SAMPLES_MAX ? count : SAMPLES_MAX;

    qsort(samples, kept, sizeof *samples, by_value);
    return ctl_print(ctl,
                     json_pack("{s:I,s:f,s:f,s:f,s:f}", "count", (json_int_t)count, "min_us",
                               samples[0], "median_us", samples[kept / 2], "p99_us",
                               samples[(kept - 1) * 99 / 100], "max_us", samples[kept - 1]),
                     show);
}

static int run(struct ctl *ctl, char **argv) {
    struct sigaction action = {.sa_handler = on_interrupt};
    struct fq_error err = {0};
    uint64_t count = 0;
    int status = ctl_connect(ctl);

    (void)argv;
    if (status)
        return status;
    uint64_t room = ctl->count && ctl->count < SAMPLES_MAX ? ctl->count : SAMPLES_MAX;
    double *samples = malloc(room * sizeof *samples);
    if (!samples) {
        fputs("finequantctl: no memory\n", stderr);
        return -FQ_NO_MEMORY;
    }
    sigaction(SIGINT, &action, NULL);
    while (!interrupted && (!ctl->count || count < ctl->count)) {
        double start = now_us();

        status = fq_client_ping(ctl->client, &err);
        if (status)
            break;
        samples[count++ % room] = now_us() - start;
        if (isatty(STDERR_FILENO))
            fprintf(stderr, "\r%" PRIu64 ": %.0f us ", count, samples[(count - 1) % room]);
        if (ctl->interval_ms && count != ctl->count) {
            struct timespec pause = {(time_t)(ctl->interval_ms / 1000),
                                     (long)(ctl->interval_ms % 1000) * 1000000};
            nanosleep(&pause, NULL); /* a signal ends it early, as it should */
        }
    }
    if (isatty(STDERR_FILENO))
        fputs("\r", stderr);
    if (count)
        summarize(ctl, samples, count);
    if (status)
        ctl_report(ctl, &err);
    free(samples);
    return status;
}

const struct ctl_command ctl_ping = {
    "ping", NULL, "", 0, "ci", "Measure how fast the daemon answers", run};
