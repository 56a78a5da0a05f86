/* SPDX-License-Identifier: Apache-2.0 */
/*
 * finequant-bench gemm: a running daemon, from one or many client processes at
 * once.  Each has a connection and buffers of its own and asks for one product
 * after another, taking the tensors in turn.  The processes write what they saw
 * to memory that they share with this one, which prints a row for each number
 * of clients and of rows.
 */
#include "bench.h"
#include "finequant.h"
#include "half.h"

#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define LATENCIES_MAX (1 << 20) /* a client ends after so many requests */

static const char *socket_path, *model_name, *tensor_name, *csv_path;
static struct bench_list rows = {4, {1, 4, 16, 64}};
static struct bench_list clients = {3, {1, 2, 4}};
static enum fq_dtype dtype = FQ_F16;
static int64_t requests; /* of each client; 0: as many as fit in `seconds` */
static double seconds = 2;

static const struct bench_option options[] = {
    {"socket", "PATH", "the daemon's socket (default: $FINEQUANT_SOCKET or the system's)",
     "paths of a socket", bench_parse_text, &socket_path},
    {"model", "NAME", "a model that the daemon has loaded; needed", "names of a model",
     bench_parse_text, &model_name},
    {"tensor", "NAME", "one of its matrices (default: all in turn)", "names of a tensor",
     bench_parse_text, &tensor_name},
    {"m", "LIST", "rows of X (default: 1,4,16,64)", "1 to 65536, up to 64 of them by commas",
     bench_parse_rows, &rows},
    {"clients", "LIST", "client processes (default: 1,2,4)",
     "1 to 1024, up to 64 of them by commas", bench_parse_clients, &clients},
    {"dtype", "TYPE", "of X and Y: f16, bf16 or f32 (default: f16)", "f16, bf16 and f32",
     bench_parse_dtype, &dtype},
    {"seconds", "S", "time for each row of the table (default: 2)", "more than 0, up to 3600",
     bench_parse_seconds, &seconds},
    {"requests", "N", "end a row after N requests of each client instead", "1 to 16777216",
     bench_parse_positive, &requests},
    {"csv", "FILE", "write the table as CSV as well", "file names", bench_parse_text, &csv_path},
    {NULL},
};

/* What one client process reports.  Shared with it, as many as there are clients. */
struct report {
    struct fq_error err; /* status 0: it went well */
    double start, end;   /* µs of CLOCK_MONOTONIC: first request sent, last reply got */
    uint64_t count;
    double latency[LATENCIES_MAX]; /* µs */
};

/* What is asked for: the same for every client. */
struct workload {
    struct fq_tensor *tensors; /* owned */
    size_t tensor_count;
    uint64_t n, k; /* the largest of any tensor */
};

/* ---- A client process -------------------------------------------------------------------- */

static void fill(void *x, uint64_t count) {
    uint32_t random = 1;

    for (uint64_t i = 0; i < count; i++) {
        random = random * 1664525 + 1013904223;
        fq_store(x, (int)dtype, i, (float)(int32_t)random * 0x1p-31F);
    }
}

static int send_requests(struct fq_client *client, const struct workload *workload,
                         const struct fq_buffer *x, const struct fq_buffer *y, uint64_t m,
                         int start_pipe, int ready_pipe, struct report *report) {
    uint64_t generation = fq_client_generation(client);
    uint64_t most = requests && requests < LATENCIES_MAX ? (uint64_t)requests : LATENCIES_MAX;
    size_t at = 0;
    char byte = 0;
    int status = 0;
    struct fq_gemm_request request = {
        .m = m, .dtype = dtype, .x = {.buffer = x}, .y = {.buffer = y}};

    /* once round without the clock, so that no page is touched for the first time later */
    for (size_t i = 0; i < workload->tensor_count && status == 0; i++) {
        workload->tensors[i].generation = generation;
        request.tensor = &workload->tensors[i];
        status = fq_client_gemm(client, &request, &report->err);
    }
    if (status)
        return status;
    if (write(ready_pipe, &byte, 1) != 1)
        return fq_fail_errno(&report->err, "telling that a client is ready");
    close(ready_pipe);
    if (read(start_pipe, &byte, 1) < 0) /* returns at the end of the pipe, for all at once */
        return fq_fail_errno(&report->err, "waiting for the start");
    report->start = report->end = bench_now_us();
    while (report->count < most && (requests || report->end - report->start < seconds * 1e6)) {
        double before = report->end;

        request.tensor = &workload->tensors[at++ % workload->tensor_count];
        status = fq_client_gemm(client, &request, &report->err);
        if (status)
            return status;
        report->end = bench_now_us();
        report->latency[report->count++] = report->end - before;
    }
    return 0;
}

static void be_client(const struct workload *workload, uint64_t m, int start_pipe, int ready_pipe,
                      struct report *report) {
    struct fq_client_options with = {.socket = socket_path, .name = "finequant-bench"};
    struct fq_client *client = NULL;
    struct fq_buffer *x = NULL, *y = NULL;
    uint64_t size = fq_dtype_size((int)dtype);
    int status = fq_client_new(&with, &client, &report->err);

    if (status == 0)
        status = fq_buffer_new(client, FQ_BUFFER_HOST, m * workload->k * size, &x, &report->err);
    if (status == 0)
        status = fq_buffer_new(client, FQ_BUFFER_HOST, m * workload->n * size, &y, &report->err);
    if (status == 0) {
        fill(fq_buffer_host(x), m * workload->k);
        status = send_requests(client, workload, x, y, m, start_pipe, ready_pipe, report);
    }
    report->err.status = status;
    fq_buffer_free(y);
    fq_buffer_free(x);
    fq_client_free(client);
}

/* ---- The table --------------------------------------------------------------------------- */

/* Forks the clients, starts them together once all are ready, and waits for them.  A client that
 * fails closes its end of the pipe without a byte, and its report says why. */
static int run_clients(const struct workload *workload, int count, uint64_t m,
                       struct report *reports, struct fq_error *err) {
    int ready[2], start[2], started = 0, status = 0, ended;
    char byte;

    if (pipe2(ready, O_CLOEXEC) != 0)
        return fq_fail_errno(err, "making a pipe");
    if (pipe2(start, O_CLOEXEC) != 0) {
        status = fq_fail_errno(err, "making a pipe");
        close(ready[0]);
        close(ready[1]);
        return status;
    }
    fflush(NULL);
    for (; started < count; started++) {
        pid_t child = fork();

        if (child < 0) {
            status = fq_fail_errno(err, "starting client %d", started + 1);
            break;
        }
        if (child == 0) {
            close(ready[0]);
            close(start[1]);
            be_client(workload, m, start[0], ready[1], &reports[started]);
            _exit(0);
        }
    }
    close(ready[1]);
    close(start[0]);
    for (int i = 0; i < started && read(ready[0], &byte, 1) == 1; i++)
        ;
    close(start[1]);
    close(ready[0]);
    for (int i = 0; i < started; i++)
        if (wait(&ended) > 0 && status == 0 && !(WIFEXITED(ended) && WEXITSTATUS(ended) == 0))
            status = fq_fail(err, FQ_INTERNAL, "a client process ended with wait status %d", ended);
    for (int i = 0; i < started && status == 0; i++)
        if (reports[i].err.status)
            status = fq_fail(err, (enum fq_status) - reports[i].err.status, "client %d: %s", i + 1,
                             reports[i].err.message);
    return status;
}

static void print_row(FILE *csv, int count, uint64_t m, uint64_t done, double wall,
                      struct bench_samples *latencies) {
    double rate = (double)done / wall * 1e6;
    double median = bench_samples_at(latencies, 0.5), p99 = bench_samples_at(latencies, 0.99);

    printf("%7d %6llu %10llu %12.1f %12.1f %11.1f %11.1f\n", count, (unsigned long long)m,
           (unsigned long long)done, rate, rate * (double)m, median, p99);
    fflush(stdout);
    if (csv)
        fprintf(csv, "%s,%s,%s,%d,%llu,%llu,%.6g,%.6g,%.6g,%.6g\n", model_name,
                tensor_name ? tensor_name : "all", fq_dtype_name((int)dtype), count,
                (unsigned long long)m, (unsigned long long)done, rate, rate * (double)m, median,
                p99);
}

static int measure(const struct workload *workload, int count, uint64_t m, FILE *csv,
                   struct fq_error *err) {
    size_t bytes = (size_t)count * sizeof(struct report);
    struct bench_samples latencies = {0};
    double start = INFINITY, end = 0;
    struct report *reports = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                                  MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (reports == MAP_FAILED)
        return fq_fail_errno(err, "mapping the reports of %d clients", count);
    int status = run_clients(workload, count, m, reports, err);
    for (int i = 0; i < count && status == 0; i++) {
        start = fmin(start, reports[i].start);
        end = fmax(end, reports[i].end);
        for (uint64_t r = 0; r < reports[i].count && status == 0; r++)
            status = bench_samples_add(&latencies, reports[i].latency[r], err);
    }
    if (status == 0)
        print_row(csv, count, m, latencies.count, end - start, &latencies);
    bench_samples_fini(&latencies);
    munmap(reports, bytes);
    return status;
}

/* Asks the daemon for the tensors, and prints what runs there.  The connection is closed again:
 * each client process makes its own. */
static int workload_init(struct workload *workload, FILE *csv, struct fq_error *err) {
    struct fq_client_options with = {.socket = socket_path, .name = "finequant-bench"};
    struct fq_client_info info;
    struct fq_client *client;
    int status = fq_client_new(&with, &client, err);

    *workload = (struct workload){0};
    if (status)
        return status;
    fq_client_info(client, &info);
    if (tensor_name) {
        workload->tensor_count = 1;
        workload->tensors = malloc(sizeof *workload->tensors);
        status = workload->tensors ? fq_client_tensor_find(client, model_name, tensor_name,
                                                           workload->tensors, err)
                                   : fq_fail(err, FQ_NO_MEMORY, "no memory for a tensor");
    } else {
        status = fq_client_tensor_list(client, model_name, &workload->tensors,
                                       &workload->tensor_count, err);
        if (status == 0 && workload->tensor_count == 0)
            status = fq_fail(err, FQ_NOT_FOUND, "model '%s' has no tensors", model_name);
    }
    fq_client_free(client);
    if (status)
        return status;
    for (size_t i = 0; i < workload->tensor_count; i++) {
        workload->n = workload->n > workload->tensors[i].n ? workload->n : workload->tensors[i].n;
        workload->k = workload->k > workload->tensors[i].k ? workload->k : workload->tensors[i].k;
    }
    printf("%s, %s: %s, %s\n%s: %zu matrices in turn, %s\n", info.server, info.backend, info.device,
           info.kernels, model_name, workload->tensor_count, fq_dtype_name((int)dtype));
    printf("%7s %6s %10s %12s %12s %11s %11s\n", "clients", "m", "requests", "requests/s", "rows/s",
           "median_us", "p99_us");
    if (csv)
        fprintf(csv,
                "# %s, %s: %s, %s\nmodel,tensor,dtype,clients,m,requests,requests_per_s,"
                "rows_per_s,median_us,p99_us\n",
                info.server, info.backend, info.device, info.kernels);
    return 0;
}

static int run(struct fq_error *err) {
    struct workload workload = {0};
    FILE *csv = NULL;

    if (!model_name)
        return fq_fail(err, FQ_USAGE, "--model is needed; finequantctl list shows the models");
    if (csv_path && !(csv = fopen(csv_path, "we")))
        return fq_fail_errno(err, "--csv: '%s'", csv_path);
    int status = workload_init(&workload, csv, err);
    for (int c = 0; c < clients.count && status == 0; c++)
        for (int i = 0; i < rows.count && status == 0; i++)
            status = measure(&workload, (int)clients.values[c], (uint64_t)rows.values[i], csv, err);
    free(workload.tensors);
    if (csv && fclose(csv) != 0 && status == 0)
        status = fq_fail_errno(err, "--csv: '%s'", csv_path);
    return status;
}

const struct bench_command bench_gemm = {
    "gemm",
    "a running daemon, from one or many client processes",
    options,
    run,
};
