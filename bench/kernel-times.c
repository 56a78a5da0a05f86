/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Times the GEMMs of one matrix on the cuda backend, through backend.h alone:
 *
 *     kernel-times N K BITS GROUP f16|bf16 M...
 *
 * Weights are random and held in as many copies as fill 512 MiB, used in turn,
 * so that nothing of them stays in a cache.  The launches of a sample are queued
 * back to back in one stream; a sample's time over its launches is one GEMM's, with
 * the gaps between launches.  Prints lines "m us bytes error": the median of the samples, the
 * bytes of the prepacked weights, and ‖y−ref‖/‖ref‖ against float64 over some of Y.
 */
#include "backend.h"
#include "half.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define ROTATE_BYTES ((uint64_t)512 << 20)
#define COPIES_MAX   64
#define SAMPLES      9
#define SAMPLE_US    6000.0 /* at least; short of the driver's queue of launches */

static double now_us(void) {
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static void must(int status, const struct fq_error *err) {
    if (status == 0)
        return;
    fprintf(stderr, "kernel-times: %s\n", err->message);
    exit(-status);
}

static uint64_t next_random(void) {
    static uint64_t state = 1;
    uint64_t z = state += 0x9e3779b97f4a7c15u;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static void *random_bytes(size_t bytes) {
    uint64_t *data = malloc(bytes + 8);

    for (size_t i = 0; data && i <= bytes / 8; i++)
        data[i] = next_random();
    return data;
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

#define CHECK_N 64 /* columns of Y that are compared with float64, spread over all */
#define CHECK_M 16 /* rows at most */

struct bench {
    struct fq_backend *backend;
    struct fq_stream *stream;
    struct fq_event *event;
    struct fq_weights *weights[COPIES_MAX];
    int copies, next;
    double *check; /* [CHECK_N][k]: rows of W */
};

static double run(struct bench *bench, struct fq_gemm *gemm, int count) {
    double start = now_us();
    struct fq_error err;

    for (int i = 0; i < count; i++) {
        gemm->weights = bench->weights[bench->next++ % bench->copies];
        must(fq_gemm(bench->stream, gemm, &err), &err);
    }
    must(fq_event_record(bench->event, bench->stream, &err), &err);
    must(fq_event_wait(bench->event, &err), &err);
    return (now_us() - start) / count;
}

static void load(struct bench *bench, struct fq_matrix *matrix) {
    size_t scales = (size_t)(matrix->n * fq_matrix_groups(matrix));
    uint16_t *scale_data = malloc(scales * 2);
    struct fq_error err;

    matrix->codes = random_bytes((size_t)(matrix->n * fq_matrix_row_bytes(matrix)));
    matrix->scales = scale_data;
    if (!matrix->codes || !scale_data)
        exit(FQ_NO_MEMORY);
    for (size_t i = 0; i < scales; i++)
        scale_data[i] = fq_f32_to_f16(0.001f * (float)(1 + next_random() % 8));
    bench->check = malloc(CHECK_N * (size_t)matrix->k * sizeof *bench->check);
    if (!bench->check)
        exit(FQ_NO_MEMORY);
    for (int64_t i = 0; i < CHECK_N; i++)
        fq_matrix_dequantize_row(matrix, i * matrix->n / CHECK_N, bench->check + i * matrix->k);
    uint64_t bytes = fq_weights_size(bench->backend, matrix);
    bench->copies = (int)(ROTATE_BYTES / bytes) + 1;
    if (bench->copies > COPIES_MAX)
        bench->copies = COPIES_MAX;
    double start = now_us();
    for (int i = 0; i < bench->copies; i++)
        must(fq_weights_new(bench->backend, matrix, &bench->weights[i], &err), &err);
    fprintf(stderr, "%d copies of %llu bytes, loaded at %.1f GB/s\n", bench->copies,
            (unsigned long long)bytes, (double)bytes * bench->copies / (now_us() - start) / 1e3);
    free((void *)matrix->codes);
    free(scale_data);
}

/* ‖y−ref‖ / ‖ref‖ over a sample of Y. */
static double error_of(const struct bench *bench, const struct fq_matrix *matrix,
                       const struct fq_gemm *gemm, const uint16_t *x, const uint16_t *y) {
    double error = 0, norm = 0;

    for (int64_t m = 0; m < gemm->m && m < CHECK_M; m++) {
        for (int64_t i = 0; i < CHECK_N; i++) {
            int64_t row = gemm->m - 1 - m, n = i * matrix->n / CHECK_N;
            double sum = 0;

            for (int64_t k = 0; k < matrix->k; k++)
                sum += bench->check[i * matrix->k + k] *
                       (double)fq_load(x, (int)gemm->type, (size_t)(row * matrix->k + k));
            double off = (double)fq_load(y, (int)gemm->type, (size_t)(row * matrix->n + n)) - sum;
            error += off * off;
            norm += sum * sum;
        }
    }
    return sqrt(error / norm);
}

int main(int argc, char **argv) {
    struct bench bench = {0};
    struct fq_matrix matrix = {.scale_type = FQ_F16};
    struct fq_error err;

    if (argc < 7) {
        fprintf(stderr, "usage: kernel-times N K BITS GROUP f16|bf16 M...\n");
        return FQ_USAGE;
    }
    matrix.n = atoll(argv[1]);
    matrix.k = atoll(argv[2]);
    matrix.bits = atoi(argv[3]);
    matrix.group = atoll(argv[4]);
    must(fq_backend_new("cuda", NULL, &bench.backend, &err), &err);
    must(fq_stream_new(bench.backend, &bench.stream, &err), &err);
    must(fq_event_new(bench.backend, &bench.event, &err), &err);
    load(&bench, &matrix);
    for (int i = 6; i < argc; i++) {
        struct fq_gemm gemm = {.type = (enum fq_dtype)fq_dtype_parse(argv[5]),
                               .m = atoll(argv[i]),
                               .x_stride = matrix.k,
                               .y_stride = matrix.n};
        uint64_t x_bytes = (uint64_t)(gemm.m * matrix.k) * 2;
        uint64_t y_bytes = (uint64_t)(gemm.m * matrix.n) * 2;
        uint16_t *x_data = malloc(x_bytes), *y_data = malloc(y_bytes);
        struct fq_memory *x, *y;
        double samples[SAMPLES], once;

        if (!x_data || !y_data)
            return FQ_NO_MEMORY;
        for (uint64_t j = 0; j < x_bytes / 2; j++)
            fq_store(x_data, (int)gemm.type, j, (float)(next_random() >> 40) * 0x1p-23f - 1);
        must(fq_memory_new(bench.backend, FQ_MEMORY_DEVICE, x_bytes, &x, &err), &err);
        must(fq_memory_new(bench.backend, FQ_MEMORY_DEVICE, y_bytes, &y, &err), &err);
        must(fq_memory_write(x, 0, x_data, x_bytes, &err), &err);
        gemm.x = fq_memory_address(x);
        gemm.y = fq_memory_address(y);
        (void)run(&bench, &gemm, bench.copies);
        once = run(&bench, &gemm, bench.copies);
        for (int s = 0; s < SAMPLES; s++)
            samples[s] = run(&bench, &gemm, (int)(SAMPLE_US / once) + 1);
        qsort(samples, SAMPLES, sizeof *samples, compare);
        must(fq_memory_read(y, 0, y_data, y_bytes, &err), &err);
        printf("%lld %.2f %llu %.2e\n", (long long)gemm.m, samples[SAMPLES / 2],
               (unsigned long long)fq_weights_size(bench.backend, &matrix),
               error_of(&bench, &matrix, &gemm, x_data, y_data));
        fflush(stdout);
        free(x_data);
        free(y_data);
        fq_memory_free(x);
        fq_memory_free(y);
    }
    for (int i = 0; i < bench.copies; i++)
        fq_weights_free(bench.weights[i]);
    free(bench.check);
    fq_event_free(bench.event);
    fq_stream_free(bench.stream);
    fq_backend_free(bench.backend);
    return 0;
}
