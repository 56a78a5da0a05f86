/* SPDX-License-Identifier: Apache-2.0 */
/* The safetensors reader: what is well formed is read, all else refused in the expected words. */
#include "safetensors.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* A file in memory, on the heap, so that a read beyond it is seen by the sanitizer. */
static uint8_t *make_file(const char *header, uint64_t length, size_t data, size_t *size) {
    size_t text = strlen(header);
    uint8_t *bytes = malloc(8 + text + data);

    for (int i = 0; i < 8; i++)
        bytes[i] = (uint8_t)(length >> (8 * i));
    memcpy(bytes + 8, header, text);
    for (size_t i = 0; i < data; i++)
        bytes[8 + text + i] = (uint8_t)i;
    *size = 8 + text + data;
    return bytes;
}

static int open_bytes(const uint8_t *bytes, size_t size, struct fq_error *err) {
    struct fq_safetensors *file = NULL;
    int rc = fq_safetensors_new_memory(bytes, size, "f.safetensors", &file, err);

    fq_safetensors_free(file);
    return rc;
}

#define T(name, dtype, shape, begin, end)                                                          \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" #begin "," #end \
    "]}"

static const struct {
    const char *header;
    size_t data;
    int status;
    const char *words; /* in the message, after the file's name */
} refused[] = {
    {"", 0, FQ_FORMAT, "does not begin with '{'"},
    {"[]", 0, FQ_FORMAT, "does not begin with '{'"},
    {"{", 0, FQ_FORMAT, "header, byte"},
    {"{} x", 0, FQ_FORMAT, "header, byte"},
    {"{\"a\xff\":1}", 0, FQ_FORMAT, "header, byte"},
    {"{" T("a", "F32", "[1]", 0, 4) "," T("a", "F32", "[1]", 0, 4) "}", 4, FQ_FORMAT, "duplicate"},
    {"{\"a\":3}", 0, FQ_FORMAT, "tensor 'a': its entry is not an object"},
    {"{\"a\":{\"shape\":[],\"data_offsets\":[0,4]}}", 4, FQ_FORMAT, "dtype is missing"},
    {"{" T("a", "F4", "[1]", 0, 4) "}", 4, FQ_UNSUPPORTED, "tensor 'a': dtype 'F4'"},
    {"{" T("a", "F32", "1", 0, 4) "}", 4, FQ_FORMAT, "shape is missing"},
    {"{" T("a", "F32", "[-1]", 0, 4) "}", 4, FQ_FORMAT, "shape[0] is not a non-negative integer"},
    {"{" T("a", "F32", "[1.0]", 0, 4) "}", 4, FQ_FORMAT, "shape[0] is not a non-negative integer"},
    {"{" T("a", "F32", "[1,1,1,1,1,1,1,1,1]", 0, 4) "}", 4, FQ_UNSUPPORTED, "rank is 9"},
    {"{" T("a", "F32", "[4611686018427387904]", 0, 4) "}", 4, FQ_FORMAT, "overflows"},
    {"{" T("a", "U8", "[4294967296,4294967296]", 0, 0) "}", 0, FQ_FORMAT, "overflows"},
    {"{" T("a", "U8", "[18446744073709551616]", 0, 0) "}", 0, FQ_FORMAT, "header, byte"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0]}}", 1, FQ_FORMAT,
     "data_offsets is not two"},
    {"{" T("a", "F32", "[1]", -4, 0) "}", 4, FQ_FORMAT, "not two non-negative integers"},
    {"{" T("a", "F32", "[1]", 4, 0) "}", 4, FQ_FORMAT, "not within the 4 bytes"},
    {"{" T("a", "F32", "[2]", 0, 8) "}", 4, FQ_FORMAT, "[0, 8] are not within the 4 bytes"},
    {"{" T("a", "F32", "[2]", 0, 4) "}", 4, FQ_FORMAT, "span 4 bytes, its shape needs 8"},
    {"{" T("a", "F32", "[1]", 4, 8) "}", 8, FQ_FORMAT, "tensor 'a': gap: begins at 4"},
    {"{" T("a", "F32", "[1]", 0, 4) "," T("b", "F32", "[1]", 8, 12) "}", 12, FQ_FORMAT,
     "tensor 'b': gap: begins at 8, the one before ends at 4"},
    {"{" T("a", "F32", "[1]", 0, 4) "," T("b", "F32", "[1]", 2, 6) "}", 6, FQ_FORMAT,
     "tensor 'b': overlap"},
    {"{" T("a", "F32", "[1]", 0, 4) "," T("b", "F32", "[1]", 0, 4) "}", 4, FQ_FORMAT, "overlap"},
    {"{" T("a", "F32", "[1]", 0, 4) "," T("b", "U8", "[0]", 2, 2) "}", 4, FQ_FORMAT, "overlap"},
    {"{" T("a", "F32", "[1]", 0, 4) "}", 5, FQ_FORMAT, "1 bytes after the last tensor"},
    {"{}", 1, FQ_FORMAT, "1 bytes after the last tensor"},
    {"{\"__metadata__\":[]}", 0, FQ_FORMAT, "__metadata__ is not an object"},
    {"{\"__metadata__\":{\"a\":1}}", 0, FQ_FORMAT, "__metadata__ 'a' is not a string"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"x\":1}}", 1, FQ_FORMAT,
     "keys other than"},
};

static void refuses_malformed_files_by_name(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        struct fq_error err = {0};
        size_t size;
        uint8_t *bytes =
            make_file(refused[i].header, strlen(refused[i].header), refused[i].data, &size);
        int rc = open_bytes(bytes, size, &err);

        free(bytes);
        if (rc != -refused[i].status || !strstr(err.message, refused[i].words) ||
            !strstr(err.message, "f.safetensors"))
            fail_msg("case %zu: %d, '%s', expected '%s'", i, rc, err.message, refused[i].words);
    }
}

static void refuses_header_beyond_file_or_limit(void **state) {
    static const struct {
        uint64_t length;
        const char *words;
    } cases[] = {{3, "beyond the file"},
                 {100000000, "beyond the file"},
                 {100000001, "at most 100000000"},
                 {UINT64_MAX, "at most 100000000"},
                 {UINT64_MAX - 7, "at most 100000000"}};
    struct fq_error err;
    size_t size;

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint8_t *bytes = make_file("{}", cases[i].length, 0, &size);

        assert_int_equal(open_bytes(bytes, size, &err), -FQ_FORMAT);
        assert_non_null(strstr(err.message, cases[i].words));
        free(bytes);
    }
    for (size = 0; size < 8; size++) {
        uint8_t *bytes = calloc(1, size + 1);

        assert_int_equal(open_bytes(bytes, size, &err), -FQ_FORMAT);
        assert_non_null(strstr(err.message, "too short"));
        free(bytes);
    }
}

static void accepts_what_the_format_allows(void **state) {
    static const char *const headers[] = {
        "{}",
        "{}      ",
        "{\"__metadata__\":{\"format\":\"pt\"}}",
        "{" T("scalar", "F64", "[]", 0, 8) "}",
        "{" T("z", "U8", "[3]", 0, 3) "," T("unaligned", "F32", "[1]", 3, 7) "}",
        "{" T("empty", "F32", "[4,0]", 0, 0) "," T("a", "F32", "[1]", 0, 4) "," T("end", "I64",
                                                                                  "[0]", 4, 4) "}",
    };
    static const size_t data[] = {0, 0, 0, 8, 7, 4};

    (void)state;
    for (size_t i = 0; i < sizeof headers / sizeof *headers; i++) {
        struct fq_error err = {0};
        size_t size;
        uint8_t *bytes = make_file(headers[i], strlen(headers[i]), data[i], &size);

        if (open_bytes(bytes, size, &err) != 0)
            fail_msg("case %zu: %s", i, err.message);
        free(bytes);
    }
}

static uint32_t next_random(uint32_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 17;
    return *state ^= *state << 5;
}

/* Whatever is accepted lies within the file; the sanitizer sees the rest. */
static void survives_seeded_mutations(void **state) {
    static const char header[] = "{\"__metadata__\":{\"format\":\"pt\"}," T(
        "a", "F32", "[2,3]", 0, 24) "," T("b", "F16", "[4]", 24, 32) "}";
    uint32_t random = 20230809;

    (void)state;
    for (int round = 0; round < 20000; round++) {
        struct fq_safetensors *file = NULL;
        struct fq_error err;
        size_t size;
        uint8_t *bytes = make_file(header, strlen(header), 32, &size);
        unsigned sum = 0;

        for (uint32_t edits = 1 + next_random(&random) % 4; edits > 0; edits--) {
            size_t at = next_random(&random) % size;

            bytes[at] = (uint8_t)(next_random(&random) % 3 == 0 ? '0' + next_random(&random) % 10
                                                                : next_random(&random));
        }
        if (next_random(&random) % 4 == 0)
            size -= next_random(&random) % size;
        bytes = realloc(bytes, size);
        if (fq_safetensors_new_memory(bytes, size, "f", &file, &err) == 0)
            for (size_t i = 0; i < file->count; i++)
                for (uint64_t at = 0; at < file->tensors[i].bytes; at++)
                    sum += ((const uint8_t *)file->tensors[i].data)[at];
        assert_true(sum <= 255 * size);
        fq_safetensors_free(file);
        free(bytes);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(refuses_malformed_files_by_name),
        cmocka_unit_test(refuses_header_beyond_file_or_limit),
        cmocka_unit_test(accepts_what_the_format_allows),
        cmocka_unit_test(survives_seeded_mutations),
    };

    return cmocka_run_group_tests(tests, NULL, NULL) ? 1 : 0;
}
