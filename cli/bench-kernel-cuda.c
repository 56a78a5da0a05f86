/* SPDX-License-Identifier: Apache-2.0 */
/*
 * finequant-bench kernel --backend cuda: ours, the plain read of exactly the
 * bytes that ours must move (weights as prepacked, X and Y once), and cuBLAS on
 * the dense matrix of X's type.  Each is a CUDA graph of calls that go round
 * copies of 512 MiB or more, and the three are replayed in turns.
 *
 * Everything is made on the GPU.  The values are hashes of their places, so the
 * host can work out what any element of Y must be (bench-check.h).
 *
 * Loops, outermost first: shape and dtype (X, Y and dense copies), then bits,
 * group and zero points (weights), then m.  cuBLAS knows of the outer loop and m
 * alone, so it is measured with the first weights and its time kept for the rest.
 */
#ifdef HAVE_CONFIG_H
#include <config.h>
#endif

#include "backend.h"
#include "bench-check.h"
#include "bench-cuda.h"
#include "bench-kernel.h"

#include <math.h>
#include <stdlib.h>

#define WARM_READS 8 /* of the whole buffer, before the first measurement */

/* What lives through the whole table. */
struct bench {
    const struct bench_kernel_table *table;
    FILE *csv, *clocks; /* or NULL */
    struct fq_backend *backend;
    struct fq_stream *stream;
    cudaStream_t native;         /* borrowed from stream */
    struct bench_cublas *cublas; /* NULL: not there */
    struct fq_memory *sink;
    struct fq_memory *buffer; /* what the plain read reads; grows */
};

/* One shape and dtype. */
struct operands {
    int64_t n, k, m_max;
    enum fq_dtype dtype;
    struct fq_memory *x, *y;    /* [m_max][k], [m_max][n] */
    struct fq_memory *bias;     /* [2][n] of f32, the second the gate's; NULL: none */
    struct fq_memory *residual; /* [m_max][n], or NULL */
    int64_t dense_n;            /* rows of a dense matrix: n, with a gate 2·n */
    struct fq_memory *dense;    /* [dense_count][dense_n][k], NULL without cuBLAS */
    struct fq_memory *dense_y;  /* [m_max][dense_n] */
    int dense_count;
    /* by the index of m; 0: not measured yet */
    double cublas_us[BENCH_LIST_MAX], cublas_mhz[BENCH_LIST_MAX];
};

/* One quantized matrix of that shape. */
struct subject {
    struct bench_product_kind kind;
    struct fq_weights **copies; /* owned, and the gates behind them, where there are any */
    int copy_count;
    uint64_t bytes; /* of a copy, its gate included */
    struct bench_check *check;
};

/* What a graph's calls need to know. */
struct call {
    const struct bench *bench;
    const struct operands *operands;
    const struct subject *subject;
    struct fq_gemm gemm;
};

/* ---- Contenders ----------------------------------------------------------------------------- */

static int queue_ours(void *context, int number, struct fq_error *err) {
    struct call *call = context;

    const struct subject *subject = call->subject;
    int copy = number % subject->copy_count;

    call->gemm.weights = subject->copies[copy];
    if (subject->kind.gate)
        call->gemm.gate = subject->copies[subject->copy_count + copy];
    return fq_gemm(call->bench->stream, &call->gemm, err);
}

static int queue_cublas(void *context, int number, struct fq_error *err) {
    struct call *call = context;
    const struct operands *operands = call->operands;
    uint64_t bytes = (uint64_t)(operands->dense_n * operands->k) * 2;
    const uint8_t *w = fq_memory_address(operands->dense);

    return bench_cublas_gemm(call->bench->cublas, operands->dtype, call->gemm.m, operands->dense_n,
                             operands->k, call->gemm.x,
                             w + (uint64_t)(number % operands->dense_count) * bytes,
                             fq_memory_address(operands->dense_y), err);
}

/* A reader of `bytes` and room for it to go round; the buffer may move. */
static int make_reader(struct bench *bench, uint64_t bytes, struct bench_reader *reader,
                       struct fq_error *err) {
    uint64_t stride = (bytes + 255) / 256 * 256;
    int rotation = bench_kernel_copies(stride), status = 0;
    uint64_t wanted = stride * (uint64_t)rotation;

    if (!bench->buffer || fq_memory_bytes(bench->buffer) < wanted) {
        fq_memory_free(bench->buffer);
        status = fq_memory_new(bench->backend, FQ_MEMORY_DEVICE, wanted, &bench->buffer, err);
        if (status == 0)
            status = bench_cuda_check(bench_cuda_fill(fq_memory_address(bench->buffer), 1,
                                                      (int64_t)(wanted / 2), FQ_F16,
                                                      BENCH_SEED_OTHER, 1, bench->native),
                                      "fill the memory to read", err);
    }
    if (status)
        return status;
    *reader = (struct bench_reader){
        .buffer = fq_memory_address(bench->buffer),
        .bytes = (bytes + 15) / 16 * 16,
        .stride = stride,
        .rotation = rotation,
        .sink = fq_memory_address(bench->sink),
        .stream = bench->native,
    };
    return 0;
}

/* ---- A row of the table ---------------------------------------------------------------------- */

static void print_formula(const struct bench_kernel_table *table) {
    const char *bias = table->bias ? " + bias" : "";
    const char *activation =
        table->activation == FQ_ACTIVATION_NONE ? "" : fq_activation_name((int)table->activation);

    printf("Y = %s(X %c%s)", activation, table->gate ? 'V' : 'W', bias);
    if (table->gate)
        printf(" * (X W%s)", bias);
    printf("%s.\n", table->residual ? " + residual" : "");
}

static void print_heading(const struct bench *bench, const char *cublas) {
    struct fq_device_info device = {0};

    (void)fq_backend_info(bench->backend, &device, NULL);
    printf("%s: %s, %s; %s\n", device.backend, device.name, device.kernels, cublas);
    printf("read: read_us / us.  cublas: cublas_us / us.  ");
    print_formula(bench->table);
    printf("%4s %7s %4s %5s %6s %6s %6s %10s %10s %5s %10s %6s %9s\n", "bits", "group", "zero",
           "dtype", "n", "k", "m", "us", "read_us", "read", "cublas_us", "cublas", "error");
    for (int i = 0; i < 2; i++) {
        FILE *out = i == 0 ? bench->csv : bench->clocks;

        if (!out)
            continue;
        fprintf(out, "# %s, %s: ", device.name, cublas);
        bench_print_command(out);
        fprintf(out, "\nbits,group,zero,dtype,n,k,m,%s\n",
                i == 0 ? "us,read_us,cublas_us,err" : "mhz,read_mhz,cublas_mhz");
    }
}

/* Of a CSV file: what is measured, and `count` numbers. */
static void print_fields(FILE *csv, const struct fq_matrix *matrix, const char *group,
                         enum fq_dtype dtype, int64_t m, const double *values, int count) {
    fprintf(csv, "%d,%s,%d,%s,%lld,%lld,%lld", matrix->bits, group, matrix->zeros != NULL,
            fq_dtype_name((int)dtype), (long long)matrix->n, (long long)matrix->k, (long long)m);
    for (int i = 0; i < count; i++)
        bench_print_field(csv, values[i]);
    fputc('\n', csv);
    fflush(csv); /* a run that is cut off keeps its rows */
}

static void print_row(const struct bench *bench, const struct subject *subject, enum fq_dtype dtype,
                      int64_t m, const double *us, const double *mhz, double error) {
    const struct fq_matrix *matrix = &subject->kind.shape;
    const double row[] = {us[0], us[1], us[2], error};
    char group[24] = "channel";

    if (matrix->group != matrix->k)
        snprintf(group, sizeof group, "%lld", (long long)matrix->group);
    printf("%4d %7s %4s %5s %6lld %6lld %6lld", matrix->bits, group, matrix->zeros ? "yes" : "no",
           fq_dtype_name((int)dtype), (long long)matrix->n, (long long)matrix->k, (long long)m);
    bench_print_cell(stdout, 10, 2, us[0]);
    bench_print_cell(stdout, 10, 2, us[1]);
    bench_print_cell(stdout, 5, 2, us[1] / us[0]);
    bench_print_cell(stdout, 10, 2, us[2]);
    bench_print_cell(stdout, 6, 2, us[2] / us[0]);
    printf(" %9.1e\n", error);
    fflush(stdout);
    if (bench->csv)
        print_fields(bench->csv, matrix, group, dtype, m, row, 4);
    if (bench->clocks)
        print_fields(bench->clocks, matrix, group, dtype, m, mhz, 3);
}

/* The bytes that one product must move: weights, X, Y, residual and biases once. */
static uint64_t bytes_to_move(const struct operands *operands, const struct subject *subject,
                              int64_t m) {
    uint64_t row = (uint64_t)(operands->n + operands->k);

    if (operands->residual)
        row += (uint64_t)operands->n;
    return subject->bytes + (uint64_t)m * row * 2 +
           (operands->bias ? (uint64_t)operands->n * (subject->kind.gate ? 8 : 4) : 0);
}

static struct fq_gemm gemm_of(const struct operands *operands, const struct subject *subject,
                              int64_t m) {
    struct fq_gemm gemm = {.type = operands->dtype,
                           .m = m,
                           .x = fq_memory_address(operands->x),
                           .y = fq_memory_address(operands->y),
                           .x_stride = operands->k,
                           .y_stride = operands->n,
                           .activation = subject->kind.activation};

    if (operands->bias) {
        gemm.bias = fq_memory_address(operands->bias);
        gemm.bias_type = FQ_F32;
        if (subject->kind.gate)
            gemm.gate_bias = (const float *)gemm.bias + operands->n;
    }
    if (operands->residual) {
        gemm.residual = fq_memory_address(operands->residual);
        gemm.residual_stride = operands->n;
    }
    return gemm;
}

static int measure(struct bench *bench, struct operands *operands, const struct subject *subject,
                   int m_index, struct fq_error *err) {
    int64_t m = bench->table->rows.values[m_index];
    struct call call = {bench, operands, subject, gemm_of(operands, subject, m)};
    struct bench_reader reader;
    struct bench_contender contenders[] = {
        {.queue = queue_ours, .context = &call, .rotation = subject->copy_count},
        {.queue = bench_reader_queue, .context = &reader},
        {.queue = queue_cublas, .context = &call, .rotation = operands->dense_count},
    };
    double *known = &operands->cublas_us[m_index], *known_mhz = &operands->cublas_mhz[m_index];
    double us[3] = {NAN, NAN, NAN}, mhz[3] = {NAN, NAN, NAN}, error;
    int count = bench->cublas && *known == 0 ? 3 : 2;
    int status = make_reader(bench, bytes_to_move(operands, subject, m), &reader, err);

    if (status)
        return status;
    contenders[1].rotation = reader.rotation;
    for (int i = 0; i < count && status == 0; i++)
        status = bench_contender_capture(&contenders[i], bench->native, err);
    if (status == 0) /* NaN: what is checked below, the graphs must have written */
        status = bench_cuda_check(cudaMemsetAsync(fq_memory_address(operands->y), 0xff,
                                                  (size_t)(m * operands->n) * 2, bench->native),
                                  "clear Y", err);
    if (status == 0)
        status = bench_contenders_time(contenders, count, bench->native, us,
                                       bench->clocks ? mhz : NULL, err);
    if (status == 0)
        status = bench_check_error(subject->check, operands->y, m, &error, err);
    if (status == 0) {
        if (count == 3) {
            *known = us[2];
            *known_mhz = mhz[2];
        }
        us[2] = *known == 0 ? NAN : *known;
        mhz[2] = *known == 0 ? NAN : *known_mhz;
        print_row(bench, subject, operands->dtype, m, us, mhz, error);
    }
    for (int i = 0; i < count; i++)
        bench_contender_fini(&contenders[i]);
    return status;
}

/* ---- A matrix -------------------------------------------------------------------------------- */

static void subject_fini(struct subject *subject) {
    for (int i = 0; i < 2 * subject->copy_count && subject->copies; i++)
        fq_weights_free(subject->copies[i]);
    free(subject->copies);
    bench_check_free(subject->check);
}

static int make_copies(struct subject *subject, struct bench *bench, struct fq_error *err) {
    const struct fq_matrix *shape = &subject->kind.shape;
    int status = 0;

    subject->bytes = fq_weights_size(bench->backend, shape) * (subject->kind.gate ? 2 : 1);
    subject->copy_count = bench_kernel_copies(subject->bytes);
    subject->copies = calloc(2 * (size_t)subject->copy_count, sizeof(struct fq_weights *));
    if (!subject->copies)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for %d copies", subject->copy_count);
    for (int i = 0; i < subject->copy_count && status == 0; i++) {
        struct fq_weights **copy = &subject->copies[i];

        status = fq_weights_synthetic(bench->backend, shape, BENCH_SEED_WEIGHTS, copy, err);
        if (status == 0 && subject->kind.gate)
            status = fq_weights_synthetic(bench->backend, shape, BENCH_SEED_GATE,
                                          copy + subject->copy_count, err);
    }
    return status;
}

static int subject_init(struct subject *subject, struct bench *bench,
                        const struct operands *operands, int bits, int64_t group, bool zero,
                        struct fq_error *err) {
    static const uint8_t with_zeros;
    const struct bench_kernel_table *table = bench->table;

    *subject = (struct subject){.kind = {.shape = {.n = operands->n,
                                                   .k = operands->k,
                                                   .bits = bits,
                                                   .group = group ? group : operands->k,
                                                   .scale_type = operands->dtype,
                                                   .zeros = zero ? &with_zeros : NULL},
                                         .dtype = operands->dtype,
                                         .gate = table->gate,
                                         .bias = table->bias,
                                         .residual = table->residual,
                                         .activation = table->activation}};
    int status = fq_matrix_check(&subject->kind.shape, err);
    if (status == 0)
        status = make_copies(subject, bench, err);
    if (status == 0)
        status = bench_check_new(&subject->kind, &subject->check, err);
    return status;
}

static int measure_matrix(struct bench *bench, struct operands *operands, int bits, int64_t group,
                          bool zero, struct fq_error *err) {
    struct subject subject;
    int status = subject_init(&subject, bench, operands, bits, group, zero, err);

    for (int i = 0; i < bench->table->rows.count && status == 0; i++)
        status = measure(bench, operands, &subject, i, err);
    subject_fini(&subject);
    return status;
}

/* ---- A shape and dtype ----------------------------------------------------------------------- */

static void operands_fini(struct operands *operands) {
    fq_memory_free(operands->dense_y);
    fq_memory_free(operands->dense);
    fq_memory_free(operands->residual);
    fq_memory_free(operands->bias);
    fq_memory_free(operands->y);
    fq_memory_free(operands->x);
}

/* Memory of the GPU with the values that a seed stands for. */
static int make_values(struct bench *bench, int64_t rows, int64_t columns, enum fq_dtype dtype,
                       uint64_t seed, float scale, struct fq_memory **out, struct fq_error *err) {
    int status =
        fq_memory_new(bench->backend, FQ_MEMORY_DEVICE, (uint64_t)(rows * columns) * 2, out, err);

    return status ? status
                  : bench_cuda_check(bench_cuda_fill(fq_memory_address(*out), rows, columns, dtype,
                                                     seed, scale, bench->native),
                                     "fill memory", err);
}

static int make_dense(struct bench *bench, struct operands *operands, struct fq_error *err) {
    int64_t k = operands->k;
    int status;

    operands->dense_n = operands->n * (bench->table->gate ? 2 : 1);
    operands->dense_count = bench_kernel_copies((uint64_t)(operands->dense_n * k) * 2);
    status = make_values(bench, operands->dense_count * operands->dense_n, k, operands->dtype,
                         BENCH_SEED_OTHER, 1 / sqrtf((float)k), &operands->dense, err);
    if (status == 0)
        status = fq_memory_new(bench->backend, FQ_MEMORY_DEVICE,
                               (uint64_t)(operands->m_max * operands->dense_n) * 2,
                               &operands->dense_y, err);
    return status;
}

static int make_biases(struct bench *bench, struct operands *operands, struct fq_error *err) {
    int64_t n = operands->n;
    uint64_t bytes = (uint64_t)n * 2 * sizeof(float);
    float *biases = malloc(bytes);
    int status;

    if (!biases)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for biases of %lld", (long long)n);
    for (int64_t i = 0; i < 2 * n; i++)
        biases[i] = fq_synthetic_value(BENCH_SEED_BIAS, i / n, i % n, FQ_F32);
    status = fq_memory_new(bench->backend, FQ_MEMORY_DEVICE, bytes, &operands->bias, err);
    if (status == 0)
        status = fq_memory_write(operands->bias, 0, biases, bytes, err);
    free(biases);
    return status;
}

static int operands_init(struct operands *operands, struct bench *bench,
                         const struct bench_shape *shape, enum fq_dtype dtype,
                         struct fq_error *err) {
    const struct bench_kernel_table *table = bench->table;
    int64_t m = 0;
    int status;

    for (int i = 0; i < table->rows.count; i++)
        if (table->rows.values[i] > m)
            m = table->rows.values[i];
    *operands = (struct operands){.n = shape->n, .k = shape->k, .m_max = m, .dtype = dtype};
    status = make_values(bench, m, shape->k, dtype, BENCH_SEED_X, 1, &operands->x, err);
    if (status == 0)
        status = fq_memory_new(bench->backend, FQ_MEMORY_DEVICE, (uint64_t)(m * shape->n) * 2,
                               &operands->y, err);
    if (status == 0 && table->bias)
        status = make_biases(bench, operands, err);
    if (status == 0 && table->residual)
        status = make_values(bench, m, shape->n, dtype, BENCH_SEED_RESIDUAL, 1, &operands->residual,
                             err);
    if (status == 0 && bench->cublas)
        status = make_dense(bench, operands, err);
    return status;
}

/* Every matrix of one shape and dtype: all bits, groups and zero points. */
static int measure_operands(struct bench *bench, const struct bench_shape *shape,
                            enum fq_dtype dtype, struct fq_error *err) {
    const struct bench_kernel_table *table = bench->table;
    struct operands operands;
    int status = operands_init(&operands, bench, shape, dtype, err);

    for (int b = 0; b < table->bits.count; b++)
        for (int g = 0; g < table->groups.count; g++)
            for (int z = 0; z < table->zeros.count && status == 0; z++)
                status = measure_matrix(bench, &operands, (int)table->bits.values[b],
                                        table->groups.values[g], table->zeros.values[z], err);
    operands_fini(&operands);
    return status;
}

/* ---- The table ------------------------------------------------------------------------------- */

static void bench_fini(struct bench *bench) {
    bench_cublas_free(bench->cublas);
    fq_memory_free(bench->buffer);
    fq_memory_free(bench->sink);
    fq_stream_free(bench->stream);
    fq_backend_free(bench->backend);
}

static int bench_init(struct bench *bench, struct fq_error *err) {
    char cublas[64];
    struct bench_reader reader;
    int status = fq_backend_new("cuda", NULL, &bench->backend, err);

    if (status == 0)
        status = fq_stream_new(bench->backend, &bench->stream, err);
    if (status)
        return status;
    bench->native = fq_stream_native(bench->stream);
    status = fq_memory_new(bench->backend, FQ_MEMORY_DEVICE, sizeof(unsigned), &bench->sink, err);
    if (status == 0)
        status = bench_cublas_new(bench->table->cublas, bench->native, &bench->cublas, cublas, err);
    if (status == 0) /* brings the clocks up */
        status = make_reader(bench, (uint64_t)bench->table->rotate_mib << 20, &reader, err);
    for (int i = 0; i < WARM_READS * reader.rotation && status == 0; i++)
        status = bench_reader_queue(&reader, i, err);
    if (status == 0)
        print_heading(bench, cublas);
    return status;
}

static int check_dtypes(const struct bench_kernel_table *table, struct fq_error *err) {
    for (int i = 0; i < table->dtypes.count; i++)
        if (table->dtypes.values[i] == FQ_F32)
            return fq_fail(err, FQ_UNSUPPORTED,
                           "--dtype is 'f32', the cuda backend has f16 and bf16");
    return 0;
}

int bench_kernel_cuda(const struct bench_kernel_table *table, FILE *csv, FILE *clocks,
                      struct fq_error *err) {
    struct bench bench = {.table = table, .csv = csv, .clocks = clocks};
    int status = check_dtypes(table, err);

    if (status == 0)
        status = bench_init(&bench, err);
    for (int s = 0; s < table->shapes.count; s++)
        for (int t = 0; t < table->dtypes.count && status == 0; t++)
            status = measure_operands(&bench, &table->shapes.values[s],
                                      (enum fq_dtype)table->dtypes.values[t], err);
    bench_fini(&bench);
    return status;
}
