/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Two processes and one GPU: what a process exports, another maps, runs on and
 * writes to.  The child is forked before either touches CUDA; it imports what
 * the parent sends over a socket pair.  Exits 77 where no CUDA device answers.
 */
#include "backend.h"
#include "half.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define N 200
#define K 320
#define M 7

struct parcel {
    struct fq_memory_handle x, y;
    struct fq_weights_handle weights;
};

static struct fq_backend *backend;
static int channel = -1; /* to the child */
static pid_t child = -1;

/* ---- The child: says what failed and exits 1, or exits 0 ----------------------------------- */

static void expect(bool holds, const char *what, const struct fq_error *err) {
    if (holds)
        return;
    fprintf(stderr, "importer: %s (%s)\n", what, err->message);
    _exit(1);
}

static void import_and_run(int from) {
    struct fq_memory_handle too_long;
    struct fq_memory *x, *x_again, *y, *none;
    struct fq_weights *weights;
    struct fq_backend *own;
    struct fq_stream *stream;
    struct fq_event *event;
    struct fq_error err = {0};
    struct parcel parcel;

    if (recv(from, &parcel, sizeof parcel, MSG_WAITALL) != (ssize_t)sizeof parcel)
        _exit(0); /* the parent has no device */
    expect(fq_backend_new("cuda", NULL, &own, &err) == 0, "opens the device", &err);
    expect(fq_memory_import(own, &parcel.x, &x, &err) == 0, "imports X", &err);
    expect(fq_memory_import(own, &parcel.x, &x_again, &err) == 0, "imports X twice", &err);
    expect(fq_memory_import(own, &parcel.y, &y, &err) == 0, "imports Y", &err);
    expect(fq_weights_import(own, &parcel.weights, &weights, &err) == 0, "imports weights", &err);
    too_long = parcel.x;
    too_long.bytes = (uint64_t)1 << 30;
    expect(fq_memory_import(own, &too_long, &none, &err) == -FQ_INVALID,
           "refuses a range beyond the allocation", &err);
    memset(too_long.ipc, 0x5a, sizeof too_long.ipc);
    expect(fq_memory_import(own, &too_long, &none, &err) < 0, "refuses a forged handle", &err);
    fq_memory_free(x_again); /* X stays mapped */

    expect(fq_stream_new(own, &stream, &err) == 0, "makes a stream", &err);
    expect(fq_event_new(own, &event, &err) == 0, "makes an event", &err);
    struct fq_gemm gemm = {.weights = weights,
                           .type = FQ_F16,
                           .m = M,
                           .x = fq_memory_address(x),
                           .y = fq_memory_address(y),
                           .x_stride = K,
                           .y_stride = N};
    expect(fq_gemm(stream, &gemm, &err) == 0, "runs on imported memory", &err);
    expect(fq_event_record(event, stream, &err) == 0, "records", &err);
    expect(fq_event_wait(event, &err) == 0, "finishes", &err);
    expect(fq_memory_write(x, 0, "finished", 8, &err) == 0, "writes into imported memory", &err);
    fq_event_free(event);
    fq_stream_free(stream);
    fq_weights_free(weights);
    fq_memory_free(y);
    fq_memory_free(x);
    fq_backend_free(own);
    _exit(0);
}

/* ---- The parent ---------------------------------------------------------------------------- */

static void must(int status, const struct fq_error *err) {
    if (status)
        fail_msg("%s: %s", fq_status_name(status), err->message);
}

static struct fq_weights *make_weights(unsigned seed) {
    static uint8_t row[K], zeros[N * K / 64];
    static uint16_t scales[N * K / 64];
    struct fq_matrix matrix = {
        .n = N, .k = K, .bits = 3, .group = 64, .scale_type = FQ_F16, .zeros = zeros};
    uint8_t *codes = malloc((size_t)(N * fq_matrix_row_bytes(&matrix)));
    struct fq_weights *weights;
    struct fq_error err;

    assert_non_null(codes);
    for (int n = 0; n < N; n++) {
        for (int k = 0; k < K; k++)
            row[k] = (uint8_t)((seed = seed * 1103515245u + 12345u) >> 20 & 7);
        fq_matrix_pack_row(codes + n * fq_matrix_row_bytes(&matrix), row, K, 3);
    }
    for (size_t i = 0; i < sizeof zeros; i++) {
        zeros[i] = (uint8_t)(i * 5 % 8);
        scales[i] = fq_f32_to_f16(0.01f * (float)(1 + i % 7));
    }
    matrix.codes = codes;
    matrix.scales = scales;
    must(fq_weights_new(backend, &matrix, &weights, &err), &err);
    free(codes);
    return weights;
}

static void another_process_maps_runs_on_and_writes_to_what_is_exported(void **state) {
    static uint16_t x_host[M * K], y_theirs[M * N], y_ours[M * N];
    uint64_t x_bytes = sizeof x_host, y_bytes = sizeof y_ours;
    struct fq_weights *first, *weights;
    struct fq_memory *x, *y, *own;
    struct fq_stream *stream;
    struct parcel parcel;
    struct fq_error err;
    char mark[8];
    int status;

    (void)state;
    first = make_weights(1);
    weights = make_weights(2); /* shares the first one's allocation: a handle with an offset */
    for (int i = 0; i < M * K; i++)
        x_host[i] = fq_f32_to_f16((float)(i * 37 % 101 - 50) / 50);
    must(fq_memory_new(backend, FQ_MEMORY_DEVICE, x_bytes, &x, &err), &err);
    must(fq_memory_new(backend, FQ_MEMORY_DEVICE, y_bytes, &y, &err), &err);
    must(fq_memory_write(x, 0, x_host, x_bytes, &err), &err);

    must(fq_stream_new(backend, &stream, &err), &err);
    struct fq_gemm gemm = {.weights = weights,
                           .type = FQ_F16,
                           .m = M,
                           .x = fq_memory_address(x),
                           .y = fq_memory_address(y),
                           .x_stride = K,
                           .y_stride = N};
    must(fq_gemm(stream, &gemm, &err), &err);
    fq_stream_free(stream); /* waits */
    must(fq_memory_read(y, 0, y_ours, y_bytes, &err), &err);
    memset(y_theirs, 0xff, y_bytes);
    must(fq_memory_write(y, 0, y_theirs, y_bytes, &err), &err);

    must(fq_memory_export(x, &parcel.x, &err), &err);
    must(fq_memory_export(y, &parcel.y, &err), &err);
    must(fq_weights_export(weights, &parcel.weights, &err), &err);
    assert_true(parcel.weights.memory.offset > 0);
    assert_true(fq_memory_import(backend, &parcel.x, &own, &err) < 0); /* not in one process */
    assert_int_equal(send(channel, &parcel, sizeof parcel, 0), sizeof parcel);
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);

    must(fq_memory_read(y, 0, y_theirs, y_bytes, &err), &err);
    assert_memory_equal(y_theirs, y_ours, y_bytes);
    must(fq_memory_read(x, 0, mark, sizeof mark, &err), &err);
    assert_memory_equal(mark, "finished", sizeof mark);
    fq_memory_free(y);
    fq_memory_free(x);
    fq_weights_free(weights);
    fq_weights_free(first);
}

/* 36 small matrices must not take 36 times the driver's granularity, and must be given back. */
static void small_matrices_share_allocations_and_unloading_frees_them(void **state) {
    struct fq_device_info before, loaded, after;
    struct fq_weights *weights[36];
    struct fq_error err;

    (void)state;
    fq_weights_free(make_weights(1)); /* what the first load alone allocates */
    must(fq_backend_info(backend, &before, &err), &err);
    for (unsigned i = 0; i < 36; i++)
        weights[i] = make_weights(i);
    must(fq_backend_info(backend, &loaded, &err), &err);
    for (unsigned i = 0; i < 36; i++)
        fq_weights_free(weights[i]);
    must(fq_backend_info(backend, &after, &err), &err);
    assert_true(before.memory_free - loaded.memory_free <= (uint64_t)8 << 20);
    assert_true(after.memory_free == before.memory_free);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(another_process_maps_runs_on_and_writes_to_what_is_exported),
        cmocka_unit_test(small_matrices_share_allocations_and_unloading_frees_them),
    };
    struct fq_error err;
    int ends[2], status;

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0)
        return 1;
    child = fork();
    if (child < 0)
        return 1;
    if (child == 0) {
        close(ends[0]);
        import_and_run(ends[1]);
    }
    close(ends[1]);
    channel = ends[0];
    status = fq_backend_new("cuda", NULL, &backend, &err);
    if (status < 0) {
        close(channel);
        waitpid(child, NULL, 0);
        printf("skipped: %s\n", err.message);
        return status == -FQ_UNAVAILABLE ? 77 : 1;
    }
    status = cmocka_run_group_tests_name("cuda ipc", tests, NULL, NULL);
    close(channel);
    fq_backend_free(backend);
    return status != 0;
}
