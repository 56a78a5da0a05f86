/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The front of the kernels: every argument that is refused, by its name and
 * value, and host memory that another process could map.  Runs on the reference
 * backend, since the checks are the same for all.
 */
#include "backend-impl.h"

#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmocka.h>

#define COUNT(array) (sizeof(array) / sizeof *(array))

enum {
    N = 3,
    K = 16,
    ROWS = 4
};

struct fixture {
    struct fq_backend *backend;
    struct fq_stream *stream;
    struct fq_weights *weights;
    struct fq_memory *memory;
    uint16_t *x, *y;
};

static const uint8_t codes[N * K / 2];
static const uint16_t scales[N];
static const struct fq_matrix matrix = {
    .n = N, .k = K, .bits = 4, .group = 16, .scale_type = FQ_F16, .codes = codes, .scales = scales};

static int set_up(void **context) {
    struct fixture *fixture = calloc(1, sizeof *fixture);
    struct fq_error err;

    assert_non_null(fixture);
    assert_int_equal(fq_backend_new("reference", NULL, &fixture->backend, &err), 0);
    assert_int_equal(fq_stream_new(fixture->backend, &fixture->stream, &err), 0);
    assert_null(fq_stream_native(fixture->stream)); /* the host has none */
    assert_int_equal(fq_weights_new(fixture->backend, &matrix, &fixture->weights, &err), 0);
    assert_int_equal(fq_memory_new(fixture->backend, FQ_MEMORY_HOST, 4096, &fixture->memory, &err),
                     0);
    fixture->x = fq_memory_address(fixture->memory);
    fixture->y = fixture->x + 1024;
    *context = fixture;
    return 0;
}

static int tear_down(void **context) {
    struct fixture *fixture = *context;

    fq_memory_free(fixture->memory);
    fq_weights_free(fixture->weights);
    fq_stream_free(fixture->stream);
    fq_backend_free(fixture->backend);
    free(fixture);
    return 0;
}

static void assert_refused(int status, enum fq_status expected, const struct fq_error *err,
                           const char *what) {
    assert_int_equal(status, -(int)expected);
    assert_int_equal(err->status, status);
    if (!strstr(err->message, what))
        fail_msg("'%s' does not say '%s'", err->message, what);
}

/* ---- Backends ---------------------------------------------------------------------------- */

static void lists_backends_best_first(void **context) {
    int count = 0;

    (void)context;
    while (fq_backend_list(count))
        count++;
    assert_true(count >= 2);
    assert_string_equal(fq_backend_list(count - 2), "cpu");
    assert_string_equal(fq_backend_list(count - 1), "reference");
    assert_null(fq_backend_list(-1));
}

static void refuses_unknown_backends_and_thread_counts(void **context) {
    static const struct {
        const char *name;
        int threads;
        const char *says;
    } cases[] = {
        {"tpu", 0, "'tpu'"},
        {"", 0, "''"},
        {NULL, 0, "auto, cuda, cpu and reference"},
        {"reference", -1, "threads is -1"},
        {"auto", 4097, "threads is 4097"},
    };
    struct fq_error err;

    (void)context;
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct fq_backend_options options = {.threads = cases[i].threads};
        struct fq_backend *backend = (struct fq_backend *)&options;

        assert_refused(fq_backend_new(cases[i].name, &options, &backend, &err), FQ_INVALID, &err,
                       cases[i].says);
        assert_null(backend);
    }
    fq_backend_free(NULL);
}

static void auto_opens_something_and_never_replaces_a_named_gpu(void **context) {
    struct fq_backend_options options = {.device = "GPU-00000000-no-such-device"};
    struct fq_device_info info;
    struct fq_backend *backend;
    struct fq_error err;

    (void)context;
    assert_int_equal(fq_backend_new("auto", NULL, &backend, &err), 0);
    assert_int_equal(fq_backend_info(backend, &info, &err), 0);
    assert_string_not_equal(info.backend, "");
    assert_string_not_equal(info.name, "");
    assert_string_not_equal(info.kernels, "");
    assert_true(info.threads >= 1);
    assert_true(info.memory_free > 0 && info.memory_free <= info.memory_total);
    fq_backend_free(backend);
    assert_true(fq_backend_new("auto", &options, &backend, &err) < 0);
    assert_null(backend);
}

/* ---- Memory ------------------------------------------------------------------------------ */

static void refuses_sizes_and_kinds_of_memory(void **context) {
    static const struct {
        int kind;
        uint64_t bytes;
        enum fq_status status;
        const char *says;
    } cases[] = {
        {FQ_MEMORY_HOST, 0, FQ_INVALID, "0 bytes"},
        {FQ_MEMORY_HOST, UINT64_MAX, FQ_INVALID, "18446744073709551615 bytes"},
        {FQ_MEMORY_HOST, (uint64_t)1 << 46, FQ_NO_MEMORY, "70368744177664 bytes"},
        {FQ_MEMORY_DEVICE, 64, FQ_UNSUPPORTED, "reference"},
        {7, 64, FQ_INVALID, "kind 7"},
    };
    struct fixture *fixture = *context;
    struct fq_error err;

    for (size_t i = 0; i < COUNT(cases); i++) {
        struct fq_memory *memory = fixture->memory;

        assert_refused(fq_memory_new(fixture->backend, (enum fq_memory_kind)cases[i].kind,
                                     cases[i].bytes, &memory, &err),
                       cases[i].status, &err, cases[i].says);
        assert_null(memory);
    }
    fq_memory_free(NULL);
}

static void copies_only_within_the_region(void **context) {
    static const struct {
        uint64_t offset, bytes;
        const char *says;
    } refused[] = {
        {0, 4097, "4097 bytes at offset 0 of a region of 4096"},
        {4096, 1, "1 bytes at offset 4096"},
        {4097, 0, "0 bytes at offset 4097"},
        {UINT64_MAX, 2, "2 bytes at offset 18446744073709551615"},
        {2, UINT64_MAX, "18446744073709551615 bytes"},
    };
    struct fixture *fixture = *context;
    char text[8] = "";
    struct fq_error err;

    for (size_t i = 0; i < COUNT(refused); i++) {
        assert_refused(
            fq_memory_write(fixture->memory, refused[i].offset, text, refused[i].bytes, &err),
            FQ_INVALID, &err, refused[i].says);
        assert_refused(
            fq_memory_read(fixture->memory, refused[i].offset, text, refused[i].bytes, &err),
            FQ_INVALID, &err, refused[i].says);
    }
    assert_int_equal(fq_memory_write(fixture->memory, 4092, "end", 4, &err), 0);
    assert_int_equal(fq_memory_read(fixture->memory, 4092, text, 4, &err), 0);
    assert_string_equal(text, "end");
    assert_int_equal(fq_memory_read(fixture->memory, 4096, NULL, 0, &err), 0);
}

static void host_memory_is_zeroed_sealed_and_shared(void **context) {
    struct fixture *fixture = *context;
    struct fq_memory_handle handle;
    struct fq_memory *other;
    struct fq_error err;

    assert_int_equal(fixture->x[0], 0);
    assert_int_equal(fq_memory_kind(fixture->memory), FQ_MEMORY_HOST);
    assert_int_equal(fq_memory_bytes(fixture->memory), 4096);
    assert_int_equal(fq_memory_export(fixture->memory, &handle, &err), 0);
    assert_int_equal(handle.bytes, 4096);
    assert_int_equal(fcntl(handle.fd, F_GET_SEALS), F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL);
    assert_int_not_equal(ftruncate(handle.fd, 0), 0);
    assert_int_equal(fq_memory_import(fixture->backend, &handle, &other, &err), 0);
    assert_ptr_not_equal(fq_memory_host(other), fq_memory_host(fixture->memory));
    strcpy(fq_memory_host(fixture->memory), "shared");
    assert_string_equal(fq_memory_host(other), "shared");
    fq_memory_free(other);
}

/* Few bytes, which one thread copies, and many, which several do: rows lie side by side afterwards,
 * and nothing behind them is touched. */
static void copies_rows_side_by_side(void **state) {
    static const struct {
        int64_t rows;
        size_t width, pitch;
    } cases[] = {
        {1, 1, 1}, {3, 7, 9}, {1, 3 << 20, 3 << 20}, {64, 65537, 65600}, {1000, 4096, 6144}};

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const size_t from_bytes = (size_t)cases[i].rows * cases[i].pitch;
        const size_t bytes = (size_t)cases[i].rows * cases[i].width;
        uint8_t *from = malloc(from_bytes), *to = malloc(bytes + 1);

        assert_non_null(from);
        assert_non_null(to);
        for (size_t at = 0; at < from_bytes; at++)
            from[at] = (uint8_t)(at * 2654435761u >> 11);
        memset(to, 0x5a, bytes + 1);
        fq_host_copy_rows(to, from, cases[i].rows, cases[i].width, cases[i].pitch);
        for (int64_t row = 0; row < cases[i].rows; row++)
            assert_memory_equal(to + (size_t)row * cases[i].width,
                                from + (size_t)row * cases[i].pitch, cases[i].width);
        assert_int_equal(to[bytes], 0x5a);
        free(from);
        free(to);
    }
}

static void refuses_descriptors_that_could_shrink_or_are_too_short(void **context) {
    struct fixture *fixture = *context;
    struct fq_memory *memory;
    struct fq_memory_handle handle;
    struct fq_error err;

    assert_int_equal(fq_memory_export(fixture->memory, &handle, &err), 0);
    handle.bytes = 4097;
    assert_refused(fq_memory_import(fixture->backend, &handle, &memory, &err), FQ_INVALID, &err,
                   "4097");
    handle.bytes = 0;
    assert_refused(fq_memory_import(fixture->backend, &handle, &memory, &err), FQ_INVALID, &err,
                   "0 bytes");
    handle = (struct fq_memory_handle){.fd = -1, .bytes = 4096};
    assert_refused(fq_memory_import(fixture->backend, &handle, &memory, &err), FQ_INVALID, &err,
                   "descriptor -1");
    handle.kind = FQ_MEMORY_DEVICE;
    assert_refused(fq_memory_import(fixture->backend, &handle, &memory, &err), FQ_UNSUPPORTED, &err,
                   "reference");
    int fd = memfd_create("unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    assert_true(fd >= 0 && ftruncate(fd, 4096) == 0);
    handle = (struct fq_memory_handle){.fd = fd, .bytes = 4096};
    assert_refused(fq_memory_import(fixture->backend, &handle, &memory, &err), FQ_INVALID, &err,
                   "sealed");
    close(fd);
    assert_null(memory);
}

/* ---- Weights ----------------------------------------------------------------------------- */

static void refuses_malformed_matrices(void **context) {
    struct fixture *fixture = *context;
    struct fq_matrix bad = matrix;
    struct fq_weights *weights;
    struct fq_error err;

    bad.bits = 6;
    assert_refused(fq_weights_new(fixture->backend, &bad, &weights, &err), FQ_INVALID, &err,
                   "bits is 6");
    assert_int_equal(fq_weights_size(fixture->backend, &bad), 0);
    bad = matrix;
    bad.codes = NULL;
    assert_refused(fq_weights_new(fixture->backend, &bad, &weights, &err), FQ_INVALID, &err,
                   "no codes");
    bad = matrix;
    bad.scales = NULL;
    assert_refused(fq_weights_new(fixture->backend, &bad, &weights, &err), FQ_INVALID, &err,
                   "no scales");
    assert_null(weights);
    fq_weights_free(NULL);
}

static void refuses_to_share_weights_where_it_cannot(void **context) {
    struct fixture *fixture = *context;
    struct fq_weights_handle handle = {0};
    struct fq_weights *weights;
    struct fq_error err;

    assert_refused(fq_weights_export(fixture->weights, &handle, &err), FQ_UNSUPPORTED, &err,
                   "reference");
    assert_refused(fq_weights_import(fixture->backend, &handle, &weights, &err), FQ_UNSUPPORTED,
                   &err, "reference");
}

/* ---- GEMM -------------------------------------------------------------------------------- */

static struct fq_gemm valid_gemm(const struct fixture *fixture) {
    return (struct fq_gemm){.weights = fixture->weights,
                            .type = FQ_F16,
                            .m = ROWS,
                            .x = fixture->x,
                            .y = fixture->y,
                            .x_stride = K,
                            .y_stride = N,
                            .host = true};
}

/* One wrong field a case; `set` spoils a valid GEMM. */
struct refusal {
    void (*set)(struct fq_gemm *gemm);
    const char *says;
};

#define REFUSAL(name, statement, text)                                                             \
    static void name(struct fq_gemm *gemm) {                                                       \
        statement;                                                                                 \
    }
#define REFUSALS(ROW)                                                                              \
    ROW(no_weights, gemm->weights = NULL, "weights are NULL")                                      \
    ROW(type_0, gemm->type = (enum fq_dtype)0, "dtype 0")                                          \
    ROW(type_4, gemm->type = (enum fq_dtype)4, "dtype 4")                                          \
    ROW(m_0, gemm->m = 0, "m is 0")                                                                \
    ROW(m_negative, gemm->m = INT64_MIN, "m is -9223372036854775808")                              \
    ROW(m_large, gemm->m = FQ_GEMM_ROWS_MAX + 1, "m is 65537")                                     \
    ROW(activation_5, gemm->activation = (enum fq_activation)5, "activation 5")                    \
    ROW(activation_minus, gemm->activation = (enum fq_activation) - 1, "activation -1")            \
    ROW(bias_type_0, gemm->bias = gemm->x, "bias dtype 0")                                         \
    ROW(bias_odd, (gemm->bias = (const char *)gemm->x + 2, gemm->bias_type = FQ_F32),              \
        "bias is at")                                                                              \
    ROW(x_null, gemm->x = NULL, "row 0 of X")                                                      \
    ROW(y_null, gemm->y = NULL, "row 0 of Y")                                                      \
    ROW(x_odd, gemm->x = (const char *)gemm->x + 1, "row 0 of X")                                  \
    ROW(y_odd, gemm->y = (char *)gemm->y + 1, "row 0 of Y")                                        \
    ROW(y_odd_f32, (gemm->type = FQ_F32, gemm->y = (char *)gemm->y + 2), "multiples of 4")         \
    ROW(x_stride_short, gemm->x_stride = K - 1, "stride of X is 15")                               \
    ROW(x_stride_minus, gemm->x_stride = -K, "stride of X is -16")                                 \
    ROW(y_stride_short, gemm->y_stride = N - 1, "stride of Y is 2")                                \
    ROW(y_stride_huge, gemm->y_stride = INT64_MAX, "stride of Y is 9223372036854775807")           \
    ROW(gate_bias_alone, (gemm->gate_bias = gemm->x, gemm->bias_type = FQ_F16), "without a gate")  \
    ROW(gate_bias_type_0, (gemm->gate = gemm->weights, gemm->gate_bias = gemm->x), "bias dtype 0") \
    ROW(gate_bias_odd,                                                                             \
        (gemm->gate = gemm->weights, gemm->gate_bias = (const char *)gemm->x + 2,                  \
         gemm->bias_type = FQ_F32),                                                                \
        "gate bias is at")                                                                         \
    ROW(residual_odd, (gemm->residual = (const char *)gemm->y + 1, gemm->residual_stride = N),     \
        "row 0 of the residual")                                                                   \
    ROW(residual_stride_0, gemm->residual = gemm->y, "stride of the residual is 0")                \
    ROW(residual_stride_short, (gemm->residual = gemm->y, gemm->residual_stride = N - 1),          \
        "stride of the residual is 2")                                                             \
    ROW(residual_wraps,                                                                            \
        (gemm->residual = (const void *)(UINTPTR_MAX - 15), gemm->residual_stride = N),            \
        "address space")                                                                           \
    ROW(residual_rows_alone, gemm->residual_rows = &gemm->residual, "with Y by base")              \
    ROW(x_wraps, gemm->x = (const void *)(UINTPTR_MAX - 15), "address space")                      \
    ROW(y_wraps, gemm->y = (void *)(UINTPTR_MAX - 15), "address space")

REFUSALS(REFUSAL)

static void refuses_each_wrong_argument_of_a_gemm(void **context) {
#define REFUSAL_ROW(name, statement, text) {name, text},
    static const struct refusal refusals[] = {REFUSALS(REFUSAL_ROW)};
    struct fixture *fixture = *context;
    struct fq_error err;

    for (size_t i = 0; i < COUNT(refusals); i++) {
        struct fq_gemm gemm = valid_gemm(fixture);

        refusals[i].set(&gemm);
        assert_refused(fq_gemm(fixture->stream, &gemm, &err), FQ_INVALID, &err, refusals[i].says);
    }
    struct fq_gemm gemm = valid_gemm(fixture);
    assert_int_equal(fq_gemm(fixture->stream, &gemm, &err), 0);
}

static void refuses_wrong_row_pointers(void **context) {
    struct fixture *fixture = *context;
    const void *x_rows[FQ_DECODE_ROWS + 1];
    void *y_rows[FQ_DECODE_ROWS + 1];
    struct fq_gemm gemm = valid_gemm(fixture);
    struct fq_error err;

    for (int i = 0; i <= FQ_DECODE_ROWS; i++) {
        x_rows[i] = fixture->x;
        y_rows[i] = fixture->y + (ptrdiff_t)i * N;
    }
    gemm.x = gemm.y = NULL;
    gemm.x_stride = gemm.y_stride = 0;
    gemm.x_rows = x_rows;
    assert_refused(fq_gemm(fixture->stream, &gemm, &err), FQ_INVALID, &err, "X alone");
    gemm.x_rows = NULL;
    gemm.y_rows = y_rows;
    assert_refused(fq_gemm(fixture->stream, &gemm, &err), FQ_INVALID, &err, "Y alone");
    gemm.x_rows = x_rows;
    gemm.m = FQ_DECODE_ROWS + 1;
    assert_refused(fq_gemm(fixture->stream, &gemm, &err), FQ_INVALID, &err, "m is 65");
    gemm.m = FQ_DECODE_ROWS;
    assert_int_equal(fq_gemm(fixture->stream, &gemm, &err), 0);
    x_rows[63] = (const char *)x_rows[63] + 1;
    assert_refused(fq_gemm(fixture->stream, &gemm, &err), FQ_INVALID, &err, "row 63 of X");
    x_rows[63] = x_rows[0];
    y_rows[5] = NULL;
    assert_refused(fq_gemm(fixture->stream, &gemm, &err), FQ_INVALID, &err, "row 5 of Y");
    y_rows[5] = y_rows[6];
    gemm.residual = fixture->y;
    gemm.residual_stride = N;
    assert_refused(fq_gemm(fixture->stream, &gemm, &err), FQ_INVALID, &err, "by base");
    gemm.residual = NULL;
    gemm.residual_rows = memcpy(x_rows, y_rows, sizeof x_rows);
    gemm.x_rows = gemm.residual_rows; /* what X holds does not matter here */
    assert_int_equal(fq_gemm(fixture->stream, &gemm, &err), 0);
    x_rows[7] = NULL;
    gemm.x_rows = (const void *const *)y_rows;
    assert_refused(fq_gemm(fixture->stream, &gemm, &err), FQ_INVALID, &err,
                   "row 7 of the residual");
}

static void refuses_gates_unlike_the_weights(void **context) {
    static const struct {
        const char *backend; /* NULL: the stream's */
        int64_t n, k;
        int bits;
        const char *says;
    } cases[] = {
        {NULL, N - 1, K, 4, "the gate is 2×16, allowed is the weights' 3×16"},
        {NULL, N, K - 1, 4, "the gate is 3×15, allowed is the weights' 3×16"},
        {NULL, N, K, 3, "the gate has 3 bits, allowed are the weights' 4"},
        {"reference", N, K, 4, "the gate belongs to another backend"},
    };
    struct fixture *fixture = *context;
    struct fq_error err;

    for (size_t i = 0; i < COUNT(cases); i++) {
        struct fq_backend *backend = fixture->backend;
        struct fq_gemm gemm = valid_gemm(fixture);
        struct fq_matrix gate = matrix;
        struct fq_weights *weights;

        gate.n = cases[i].n;
        gate.k = gate.group = cases[i].k;
        gate.bits = cases[i].bits;
        if (cases[i].backend)
            assert_int_equal(fq_backend_new(cases[i].backend, NULL, &backend, &err), 0);
        assert_int_equal(fq_weights_new(backend, &gate, &weights, &err), 0);
        gemm.gate = weights;
        assert_refused(fq_gemm(fixture->stream, &gemm, &err), FQ_INVALID, &err, cases[i].says);
        fq_weights_free(weights);
        if (cases[i].backend)
            fq_backend_free(backend);
    }
}

static void refuses_weights_of_another_backend(void **context) {
    struct fixture *fixture = *context;
    struct fq_gemm gemm = valid_gemm(fixture);
    struct fq_backend *other;
    struct fq_stream *stream;
    struct fq_error err;

    assert_int_equal(fq_backend_new("reference", NULL, &other, &err), 0);
    assert_int_equal(fq_stream_new(other, &stream, &err), 0);
    assert_refused(fq_gemm(stream, &gemm, &err), FQ_INVALID, &err, "another backend");
    fq_stream_free(stream);
    fq_backend_free(other);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(lists_backends_best_first),
        cmocka_unit_test(refuses_unknown_backends_and_thread_counts),
        cmocka_unit_test(auto_opens_something_and_never_replaces_a_named_gpu),
        cmocka_unit_test(refuses_sizes_and_kinds_of_memory),
        cmocka_unit_test(copies_only_within_the_region),
        cmocka_unit_test(copies_rows_side_by_side),
        cmocka_unit_test(host_memory_is_zeroed_sealed_and_shared),
        cmocka_unit_test(refuses_descriptors_that_could_shrink_or_are_too_short),
        cmocka_unit_test(refuses_malformed_matrices),
        cmocka_unit_test(refuses_to_share_weights_where_it_cannot),
        cmocka_unit_test(refuses_each_wrong_argument_of_a_gemm),
        cmocka_unit_test(refuses_wrong_row_pointers),
        cmocka_unit_test(refuses_gates_unlike_the_weights),
        cmocka_unit_test(refuses_weights_of_another_backend),
    };

    return cmocka_run_group_tests_name("backend", tests, set_up, tear_down) != 0;
}
