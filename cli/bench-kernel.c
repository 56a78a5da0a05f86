/* SPDX-License-Identifier: Apache-2.0 */
/*
 * finequant-bench kernel: one quantized matrix in this process, against a plain
 * read of the bytes that it takes and against OpenBLAS on the same matrix in
 * fp32.  Every call takes the next of many copies of the weights, so that none
 * comes from a cache, and the three are measured in turns, so that whatever else
 * the machine does touches all of them.  Both ratios compare medians of one run.
 * This file parses, and measures on the host; bench-kernel-cuda.c has the GPU.
 */
#ifdef HAVE_CONFIG_H
#include <config.h>
#endif

#include "backend.h"
#include "bench-kernel.h"
#include "half.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define TURNS      4     /* turns that a measurement's time is split into */
#define SETTLE_US  40000 /* between turns: OpenBLAS's threads spin for 26 ms before they sleep */
#define CHECK_ROWS 4     /* rows of X whose results are compared with float64 */
#define CHECK_COLS 64    /* and columns of Y */
#define COPIES_MIN 2
#define COPIES_MAX 65536

static struct bench_kernel_table table = {
    .backend = "cpu",
    .bits = {1, {4}},
    .groups = {1, {64}},
    .zeros = {1, {0}},
    .dtypes = {1, {FQ_F16}},
    .rows = {5, {1, 4, 16, 64, 256}},
    .threads = {2, {1, 0}},
    .n = 4096,
    .k = 4096,
    .rotate_mib = 512,
    .seconds = 1,
};
/* What is being measured of it. */
static int64_t bits, group, dim_n, dim_k;
static bool zero;
static enum fq_dtype dtype;

static const struct bench_option options[] = {
    {"backend", "NAME", "cpu, cuda or reference (default: cpu)", "cpu, cuda and reference",
     bench_parse_text, &table.backend},
    {"bits", "LIST", "bits a weight: 8, 4 or 3 (default: 4)", "8, 4 and 3", bench_parse_bits,
     &table.bits},
    {"group", "LIST", "group size, or 'channel' (default: 64)", "multiples of 16, and 'channel'",
     bench_parse_group, &table.groups},
    {"zero", "yes|no", "with zero points, or 'no,yes' (default: no)", "yes and no", bench_parse_yes,
     &table.zeros},
    {"dtype", "LIST", "of X and Y: f16, bf16 or f32 (default: f16)", "f16, bf16 and f32",
     bench_parse_dtypes, &table.dtypes},
    {"shape", "LIST", "several matrices: NxK,NxK (instead of --n and --k)",
     "NxK of 1 to 16777216, up to 64 of them by commas", bench_parse_shapes, &table.shapes},
    {"gate", "yes|no", "gated by a second matrix; cuda only (default: no)", "yes and no",
     bench_parse_flag, &table.gate},
    {"bias", "yes|no", "with a bias; cuda only (default: no)", "yes and no", bench_parse_flag,
     &table.bias},
    {"residual", "yes|no", "with a residual; cuda only (default: no)", "yes and no",
     bench_parse_flag, &table.residual},
    {"activation", "NAME", "cuda only (default: none)", "none, relu, gelu, gelu_tanh and silu",
     bench_parse_activation, &table.activation},
    {"n", "N", "outputs (default: 4096)", "1 to 16777216", bench_parse_positive, &table.n},
    {"k", "K", "inputs (default: 4096)", "1 to 16777216", bench_parse_positive, &table.k},
    {"m", "LIST", "rows of X (default: 1,4,16,64,256)", "1 to 65536, up to 64 of them by commas",
     bench_parse_rows, &table.rows},
    {"threads", "LIST", "threads, 0 for every core (default: 1,0)",
     "0 to 4096, up to 64 of them by commas", bench_parse_counts, &table.threads},
    {"rotate-mib", "MIB", "weights to rotate over (default: 512)", "1 to 16777216",
     bench_parse_positive, &table.rotate_mib},
    {"seconds", "S", "time for each measurement on the host (default: 1)",
     "more than 0, up to 3600", bench_parse_seconds, &table.seconds},
    {"cublas", "FILE", "cuBLAS, if it is not where the loader looks", "file names",
     bench_parse_text, &table.cublas},
    {"csv", "FILE", "write the table as CSV as well", "file names", bench_parse_text, &table.csv},
    {"clocks", "FILE", "write the GPU's clocks as CSV, too; cuda only", "file names",
     bench_parse_text, &table.clocks},
    {NULL},
};

/* One matrix and all copies of it, on one backend. */
struct subject {
    struct fq_backend *backend;
    struct fq_stream *stream;
    struct fq_event *event;
    struct fq_device_info device;
    struct fq_matrix matrix;
    void *codes, *scales, *zeros; /* owned: what matrix points to */
    size_t bytes;                 /* that a GEMM must read of W */
    struct fq_weights **copies;   /* owned, copy_count of them */
    size_t copy_count, next_copy;
    uint8_t *plain; /* owned mapping of plain_count · bytes, for reading */
    size_t plain_count, next_plain;
    float *dense; /* owned: [dense_count][n][k], NULL without OpenBLAS */
    size_t dense_count, next_dense;
    uint64_t read_sum; /* keeps the reads from being optimised away */
};

/* X and Y of one number of rows. */
struct operands {
    int64_t m;
    struct fq_memory *x, *y;
    void *x_image;            /* owned: what X holds, [m][k] */
    float *x_dense, *y_dense; /* owned */
    struct fq_gemm gemm;
};

static uint64_t random_state = 1;

static uint64_t random_bits(void) {
    uint64_t z = random_state += 0x9e3779b97f4a7c15u; /* splitmix64 */

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static float random_unit(void) { /* [-1, 1) */
    return (float)(int64_t)random_bits() * 0x1p-63F;
}

/* ---- The subject ------------------------------------------------------------------------- */

static int make_matrix(struct subject *subject, struct fq_error *err) {
    struct fq_matrix *matrix = &subject->matrix;

    *matrix = (struct fq_matrix){.n = dim_n,
                                 .k = dim_k,
                                 .bits = (int)bits,
                                 .group = group ? group : dim_k,
                                 .scale_type = dtype == FQ_BF16 ? FQ_BF16 : FQ_F16};
    int status = fq_matrix_check(matrix, err);
    if (status)
        return status;
    size_t row_bytes = (size_t)fq_matrix_row_bytes(matrix);
    size_t groups = (size_t)(dim_n * fq_matrix_groups(matrix));
    uint8_t *codes = subject->codes = malloc((size_t)dim_n * row_bytes);
    uint8_t *zeros = subject->zeros = malloc(groups);
    uint8_t *row = malloc((size_t)dim_k);
    subject->scales = malloc(groups * 2);
    if (!codes || !zeros || !row || !subject->scales) {
        free(row);
        return fq_fail(err, FQ_NO_MEMORY, "no memory for a matrix of %lld by %lld",
                       (long long)dim_n, (long long)dim_k);
    }
    for (int64_t n = 0; n < dim_n; n++) {
        for (int64_t k = 0; k < dim_k; k++)
            row[k] = (uint8_t)(random_bits() & ((1u << bits) - 1));
        fq_matrix_pack_row(codes + (size_t)n * row_bytes, row, dim_k, (int)bits);
    }
    free(row);
    for (size_t i = 0; i < groups; i++) {
        fq_store(subject->scales, matrix->scale_type, i,
                 (1.5F + random_unit()) / (float)(1 << bits) / 16);
        zeros[i] = (uint8_t)((1 << (bits - 1)) + (int)(random_bits() % 3) - 1);
    }
    matrix->codes = codes;
    matrix->scales = subject->scales;
    matrix->zeros = zero ? zeros : NULL;
    subject->bytes = (size_t)fq_matrix_bytes(matrix);
    return 0;
}

int bench_kernel_copies(uint64_t bytes) {
    uint64_t copies = ((uint64_t)table.rotate_mib << 20) / bytes + 1;

    return copies < COPIES_MIN ? COPIES_MIN : copies < COPIES_MAX ? (int)copies : COPIES_MAX;
}

static int make_copies(struct subject *subject, struct fq_error *err) {
    size_t wanted = (size_t)bench_kernel_copies(subject->bytes);
    int status = 0;

    subject->copies = calloc(wanted, sizeof *subject->copies);
    if (!subject->copies)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for %zu copies", wanted);
    while (subject->copy_count < wanted && status == 0) {
        status = fq_weights_new(subject->backend, &subject->matrix,
                                &subject->copies[subject->copy_count], err);
        subject->copy_count += status == 0;
    }
    return status;
}

/* What the rivals need: only the cpu backend has any. */
static int make_rivals(struct subject *subject, struct fq_error *err) {
    size_t elements = (size_t)(dim_n * dim_k);

    subject->plain_count = (size_t)bench_kernel_copies(subject->bytes);
    size_t plain_bytes = subject->plain_count * subject->bytes;
    void *plain =
        mmap(NULL, plain_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (plain == MAP_FAILED)
        return fq_fail_errno(err, "mapping %zu bytes to read", plain_bytes);
    subject->plain = plain;
    madvise(plain, plain_bytes, MADV_HUGEPAGE); /* as the backend asks for its weights */
    memset(plain, 1, plain_bytes);
    if (!bench_has_sgemm())
        return 0;
    subject->dense_count = (size_t)bench_kernel_copies(elements * sizeof(float));
    subject->dense = malloc(subject->dense_count * elements * sizeof(float));
    double *row = malloc((size_t)dim_k * sizeof *row);
    if (!subject->dense || !row) {
        free(row);
        return fq_fail(err, FQ_NO_MEMORY, "no memory for %zu dense matrices of %zu elements",
                       subject->dense_count, elements);
    }
    for (int64_t n = 0; n < dim_n; n++) {
        fq_matrix_dequantize_row(&subject->matrix, n, row);
        for (int64_t k = 0; k < dim_k; k++)
            subject->dense[n * dim_k + k] = (float)row[k];
    }
    free(row);
    for (size_t i = 1; i < subject->dense_count; i++)
        memcpy(subject->dense + i * elements, subject->dense, elements * sizeof(float));
    return 0;
}

static void subject_fini(struct subject *subject) {
    for (size_t i = 0; i < subject->copy_count; i++)
        fq_weights_free(subject->copies[i]);
    free(subject->copies);
    fq_event_free(subject->event);
    fq_stream_free(subject->stream);
    fq_backend_free(subject->backend);
    if (subject->plain)
        munmap(subject->plain, subject->plain_count * subject->bytes);
    free(subject->dense);
    free(subject->scales);
    free(subject->zeros);
    free(subject->codes);
}

static int subject_init(struct subject *subject, int thread_count, struct fq_error *err) {
    struct fq_backend_options with = {.threads = thread_count};

    *subject = (struct subject){0};
    int status = fq_backend_new(table.backend, &with, &subject->backend, err);
    if (status == 0)
        status = fq_backend_info(subject->backend, &subject->device, err);
    if (status == 0)
        status = fq_stream_new(subject->backend, &subject->stream, err);
    if (status == 0)
        status = fq_event_new(subject->backend, &subject->event, err);
    if (status == 0)
        status = make_matrix(subject, err);
    if (status == 0)
        status = make_copies(subject, err);
    if (status == 0 && strcmp(subject->device.backend, "cpu") == 0)
        status = make_rivals(subject, err);
    if (status)
        subject_fini(subject);
    return status;
}

/* ---- The operands ------------------------------------------------------------------------ */

static void operands_fini(struct operands *operands) {
    fq_memory_free(operands->x);
    fq_memory_free(operands->y);
    free(operands->x_image);
    free(operands->x_dense);
    free(operands->y_dense);
}

static int operands_init(struct operands *operands, struct subject *subject, int64_t m,
                         struct fq_error *err) {
    size_t size = fq_dtype_size(dtype), x_count = (size_t)(m * dim_k);
    uint64_t x_bytes = x_count * size, y_bytes = (uint64_t)(m * dim_n) * size;
    int status = 0;

    *operands = (struct operands){.m = m};
    operands->x_image = malloc(x_bytes);
    operands->x_dense = malloc(x_count * sizeof(float));
    operands->y_dense = malloc((size_t)(m * dim_n) * sizeof(float));
    if (!operands->x_image || !operands->x_dense || !operands->y_dense)
        status = fq_fail(err, FQ_NO_MEMORY, "no memory for %lld rows", (long long)m);
    for (size_t i = 0; i < x_count && status == 0; i++) {
        fq_store(operands->x_image, dtype, i, random_unit());
        operands->x_dense[i] = fq_load(operands->x_image, dtype, i);
    }
    if (status == 0)
        status = fq_memory_new(subject->backend, FQ_MEMORY_HOST, x_bytes, &operands->x, err);
    if (status == 0)
        status = fq_memory_new(subject->backend, FQ_MEMORY_HOST, y_bytes, &operands->y, err);
    if (status == 0)
        status = fq_memory_write(operands->x, 0, operands->x_image, x_bytes, err);
    if (status) {
        operands_fini(operands);
        return status;
    }
    operands->gemm = (struct fq_gemm){.type = dtype,
                                      .m = m,
                                      .x = fq_memory_address(operands->x),
                                      .y = fq_memory_address(operands->y),
                                      .x_stride = dim_k,
                                      .y_stride = dim_n,
                                      .host = true};
    return 0;
}

/* ‖y − ref‖ / ‖ref‖ on evenly spread rows and columns; runs one GEMM. */
static int measure_error(struct subject *subject, struct operands *operands, double *error,
                         struct fq_error *err) {
    int64_t row_step = (operands->m + CHECK_ROWS - 1) / CHECK_ROWS;
    int64_t column_step = (dim_n + CHECK_COLS - 1) / CHECK_COLS;
    uint64_t y_bytes = fq_memory_bytes(operands->y);
    double *w = malloc((size_t)dim_k * sizeof *w);
    void *y = malloc(y_bytes);
    double difference = 0, norm = 0;
    int status = 0;

    if (!w || !y)
        status = fq_fail(err, FQ_NO_MEMORY, "no memory for %llu bytes of results",
                         (unsigned long long)y_bytes);
    operands->gemm.weights = subject->copies[0];
    if (status == 0)
        status = fq_gemm(subject->stream, &operands->gemm, err);
    if (status == 0)
        status = fq_event_record(subject->event, subject->stream, err);
    if (status == 0)
        status = fq_event_wait(subject->event, err);
    if (status == 0)
        status = fq_memory_read(operands->y, 0, y, y_bytes, err);
    for (int64_t n = 0; n < dim_n && status == 0; n += column_step) {
        fq_matrix_dequantize_row(&subject->matrix, n, w);
        for (int64_t m = 0; m < operands->m; m += row_step) {
            double sum = 0;

            for (int64_t k = 0; k < dim_k; k++)
                sum += (double)operands->x_dense[m * dim_k + k] * w[k];
            double off = (double)fq_load(y, dtype, (size_t)(m * dim_n + n)) - sum;
            difference += off * off;
            norm += sum * sum;
        }
    }
    *error = sqrt(difference / norm);
    free(y);
    free(w);
    return status;
}

/* ---- Measuring --------------------------------------------------------------------------- */

/* One sample of each: the time of a call in µs. */
static int sample_ours(struct subject *subject, struct operands *operands, double *us,
                       struct fq_error *err) {
    double start = bench_now_us();
    int status;

    operands->gemm.weights = subject->copies[subject->next_copy++ % subject->copy_count];
    status = fq_gemm(subject->stream, &operands->gemm, err);
    if (status == 0)
        status = fq_event_record(subject->event, subject->stream, err);
    if (status == 0)
        status = fq_event_wait(subject->event, err);
    *us = bench_now_us() - start;
    return status;
}

static int sample_read(struct subject *subject, struct operands *operands, double *us,
                       struct fq_error *err) {
    const uint8_t *from =
        subject->plain + subject->next_plain++ % subject->plain_count * subject->bytes;
    double start = bench_now_us();

    (void)operands;
    (void)err;
    subject->read_sum += bench_read(from, subject->bytes, subject->device.threads);
    *us = bench_now_us() - start;
    return 0;
}

static int sample_sgemm(struct subject *subject, struct operands *operands, double *us,
                        struct fq_error *err) {
    const float *w =
        subject->dense + subject->next_dense++ % subject->dense_count * (size_t)(dim_n * dim_k);
    double start = bench_now_us();

    (void)err;
    bench_sgemm(operands->m, dim_n, dim_k, operands->x_dense, w, operands->y_dense,
                subject->device.threads);
    *us = bench_now_us() - start;
    return 0;
}

struct contender {
    int (*sample)(struct subject *subject, struct operands *operands, double *us,
                  struct fq_error *err);
    struct bench_samples samples;
};

/* A turn: threads of the one before are asleep, and the first call, which is not counted, wakes
 * those of this one. */
static int take_turn(struct contender *contender, struct subject *subject,
                     struct operands *operands, struct fq_error *err) {
    if (subject->device.threads > 1) /* one thread waits for no others, and none spins for it */
        usleep(SETTLE_US);
    double end = bench_now_us() + table.seconds * 1e6 / TURNS, us;
    int status = contender->sample(subject, operands, &us, err);

    do {
        if (status == 0)
            status = contender->sample(subject, operands, &us, err);
        if (status == 0)
            status = bench_samples_add(&contender->samples, us, err);
    } while (status == 0 && bench_now_us() < end);
    return status;
}

static void print_row(FILE *csv, const struct subject *subject, int64_t m, double us,
                      double read_us, double sgemm_us, double error) {
    char group_text[24] = "channel";

    if (group)
        snprintf(group_text, sizeof group_text, "%lld", (long long)group);
    printf("%7d %6lld", subject->device.threads, (long long)m);
    bench_print_cell(stdout, 11, 1, us);
    bench_print_cell(stdout, 8, 2, (double)subject->bytes / us / 1e3);
    bench_print_cell(stdout, 11, 1, read_us);
    bench_print_cell(stdout, 6, 2, read_us / us);
    bench_print_cell(stdout, 11, 1, sgemm_us);
    bench_print_cell(stdout, 6, 2, sgemm_us / us);
    printf(" %9.1e\n", error);
    fflush(stdout);
    if (!csv)
        return;
    fprintf(csv, "%lld,%s,%d,%s,%d,%lld,%lld,%lld", (long long)bits, group_text, zero,
            fq_dtype_name((int)dtype), subject->device.threads, (long long)dim_n, (long long)dim_k,
            (long long)m);
    bench_print_field(csv, us);
    bench_print_field(csv, read_us);
    bench_print_field(csv, sgemm_us);
    bench_print_field(csv, error);
    fputc('\n', csv);
}

static int measure(struct subject *subject, int64_t m, FILE *csv, struct fq_error *err) {
    struct contender contenders[] = {{sample_ours}, {sample_read}, {sample_sgemm}};
    const bool present[] = {true, subject->plain != NULL, subject->dense != NULL};
    struct operands operands;
    double error;
    int status = operands_init(&operands, subject, m, err);

    if (status)
        return status;
    status = measure_error(subject, &operands, &error, err);
    for (int turn = 0; turn < TURNS; turn++)
        for (int i = 0; i < 3 && status == 0; i++)
            if (present[i])
                status = take_turn(&contenders[i], subject, &operands, err);
    if (status == 0)
        print_row(csv, subject, m, bench_samples_at(&contenders[0].samples, 0.5),
                  bench_samples_at(&contenders[1].samples, 0.5),
                  bench_samples_at(&contenders[2].samples, 0.5), error);
    for (int i = 0; i < 3; i++)
        bench_samples_fini(&contenders[i].samples);
    operands_fini(&operands);
    return status;
}

static void print_heading(const struct subject *subject) {
    const struct fq_device_info *device = &subject->device;

    printf("%s: %s, %s\n", device->backend, device->name, device->kernels);
    printf("%lld bits, group %lld%s, %s, n %lld, k %lld: %zu bytes, %zu copies in turn\n",
           (long long)bits, (long long)subject->matrix.group, zero ? ", zero points" : "",
           fq_dtype_name((int)dtype), (long long)dim_n, (long long)dim_k, subject->bytes,
           subject->copy_count);
    printf("read: read_us / us.  sgemm: sgemm_us / us; OpenBLAS on the dense fp32 matrix%s.\n",
           subject->dense ? "" : " (not measured)");
    printf("%7s %6s %11s %8s %11s %6s %11s %6s %9s\n", "threads", "m", "us", "GB/s", "read_us",
           "read", "sgemm_us", "sgemm", "error");
}

static void print_csv_heading(FILE *csv, const struct fq_device_info *device) {
    fprintf(csv, "# %s: %s, %s: ", device->backend, device->name, device->kernels);
    bench_print_command(csv);
    fputs("\nbits,group,zero,dtype,threads,n,k,m,us,read_us,sgemm_us,err\n", csv);
}

/* The matrix that bits, group, zero, dtype, dim_n and dim_k name, on every number of threads. */
static int measure_matrix(FILE *csv, bool *headed, struct fq_error *err) {
    int status = 0;

    for (int t = 0; t < table.threads.count && status == 0; t++) {
        struct subject subject;

        status = subject_init(&subject, bench_pin_threads((int)table.threads.values[t]), err);
        if (status)
            break;
        if (csv && !*headed)
            print_csv_heading(csv, &subject.device);
        *headed = true;
        if (t == 0)
            print_heading(&subject);
        for (int i = 0; i < table.rows.count && status == 0; i++)
            status = measure(&subject, table.rows.values[i], csv, err);
        subject_fini(&subject);
    }
    return status;
}

/* Makes combination `at` of the lists, counted with the last changing fastest, the current one;
 * false past the end. */
static bool select_matrix(int at) {
    const struct bench_list *lists[] = {&table.zeros, &table.groups, &table.bits, &table.dtypes};
    int64_t picked[4];

    for (int i = 0; i < 4; i++) {
        picked[i] = lists[i]->values[at % lists[i]->count];
        at /= lists[i]->count;
    }
    if (at >= table.shapes.count)
        return false;
    zero = picked[0];
    group = picked[1];
    bits = picked[2];
    dtype = (enum fq_dtype)picked[3];
    dim_n = table.shapes.values[at].n;
    dim_k = table.shapes.values[at].k;
    return true;
}

static int measure_table(FILE *csv, struct fq_error *err) {
    bool headed = false;
    int status = 0;

    for (int at = 0; status == 0 && select_matrix(at); at++)
        status = measure_matrix(csv, &headed, err);
    return status;
}

/* What the cuda backend alone is measured with. */
static int check_backend(struct fq_error *err) {
    const char *asked = table.gate                               ? "gate"
                        : table.bias                             ? "bias"
                        : table.residual                         ? "residual"
                        : table.activation != FQ_ACTIVATION_NONE ? "activation"
                        : table.clocks                           ? "clocks"
                                                                 : NULL;

    if (asked && strcmp(table.backend, "cuda") != 0)
        return fq_fail(err, FQ_UNSUPPORTED, "--%s is measured on the cuda backend, not on '%s'",
                       asked, table.backend);
    return 0;
}

static int run(struct fq_error *err) {
    FILE *csv = NULL, *clocks = NULL;
    int status = check_backend(err);

    if (status)
        return status;
    if (table.shapes.count == 0)
        table.shapes = (struct bench_shapes){1, {{table.n, table.k}}};
    if (table.csv && !(csv = fopen(table.csv, "we")))
        return fq_fail_errno(err, "--csv: '%s'", table.csv);
    if (table.clocks && !(clocks = fopen(table.clocks, "we")))
        status = fq_fail_errno(err, "--clocks: '%s'", table.clocks);
#ifdef HAVE_CUDA
    else if (strcmp(table.backend, "cuda") == 0)
        status = bench_kernel_cuda(&table, csv, clocks, err);
#endif
    else
        status = measure_table(csv, err);
    if (clocks && fclose(clocks) != 0 && status == 0)
        status = fq_fail_errno(err, "--clocks: '%s'", table.clocks);
    if (csv && fclose(csv) != 0 && status == 0)
        status = fq_fail_errno(err, "--csv: '%s'", table.csv);
    return status;
}

const struct bench_command bench_kernel = {
    "kernel",
    "the kernels in this process, against a plain read and a dense BLAS",
    options,
    run,
};
