/* SPDX-License-Identifier: Apache-2.0 */
/*
 * GGUF files in memory, on the heap in their exact size: what a whole one holds, every beginning of
 * it, and every byte of its header changed.  The file is a seed of the fuzzer, written in numpy.
 */
#include "checkpoint.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define SEED "tests/fuzz/seeds/gguf/quantized"

static uint8_t *read_seed(size_t *size) {
    const char *top = getenv("top_srcdir");
    char path[1024];
    uint8_t *bytes;
    FILE *file;

    snprintf(path, sizeof path, "%s/" SEED, top ? top : ".");
    file = fopen(path, "rb");
    assert_non_null(file);
    bytes = malloc(1 << 16);
    *size = fread(bytes, 1, 1 << 16, file);
    fclose(file);
    return bytes;
}

/* Opens a copy of the first SIZE bytes. */
static int open_bytes(const uint8_t *bytes, size_t size, struct fq_checkpoint **out, uint8_t **copy,
                      struct fq_error *err) {
    struct fq_memory_file file = {.name = "seed.gguf", .size = size};

    *out = NULL;
    *copy = malloc(size ? size : 1);
    memcpy(*copy, bytes, size);
    file.bytes = *copy;
    return fq_checkpoint_new_memory(&file, 1, out, err);
}

static void reads_blocks_dense_tensors_and_stacks(void **state) {
    static const struct {
        const char *name;
        int64_t n, k;
        int bits;
        bool bias;
    } expected[] = {{"a", 3, 64, 8, true},
                    {"b", 4, 64, 4, false},
                    {"c_exps.0", 2, 64, 4, false},
                    {"c_exps.1", 2, 64, 4, false}};
    struct fq_checkpoint *checkpoint;
    struct fq_error err = {0};
    uint8_t *copy;
    size_t size;
    uint8_t *bytes = read_seed(&size);

    (void)state;
    if (open_bytes(bytes, size, &checkpoint, &copy, &err) != 0)
        fail_msg("%s", err.message);
    assert_string_equal(fq_checkpoint_format(checkpoint), "gguf");
    assert_int_equal(fq_checkpoint_matrix_count(checkpoint), 4);
    for (size_t i = 0; i < 4; i++) {
        const struct fq_checkpoint_matrix *matrix = fq_checkpoint_matrix(checkpoint, i);
        struct fq_loaded_matrix loaded;

        assert_string_equal(matrix->name, expected[i].name);
        assert_int_equal(matrix->matrix.n, expected[i].n);
        assert_int_equal(matrix->matrix.k, expected[i].k);
        assert_int_equal(matrix->matrix.bits, expected[i].bits);
        assert_int_equal(matrix->matrix.group, 32);
        assert_true(matrix->symmetric && !matrix->dense);
        assert_int_equal(matrix->has_bias, expected[i].bias);
        assert_int_equal(fq_checkpoint_load(checkpoint, i, &loaded, &err), 0);
        assert_int_equal(fq_matrix_check(&loaded.matrix, &err), 0);
        fq_loaded_matrix_fini(&loaded);
    }
    assert_non_null(fq_checkpoint_find(checkpoint, "norm.weight"));
    assert_int_equal(fq_checkpoint_tensor_count(checkpoint), 6);
    fq_checkpoint_free(checkpoint);
    free(copy);
    free(bytes);
}

static void refuses_every_beginning_of_a_file(void **state) {
    struct fq_checkpoint *checkpoint;
    struct fq_error err;
    uint8_t *copy;
    size_t size;
    uint8_t *bytes = read_seed(&size);

    (void)state;
    assert_true(size > 1000 && size % 32 == 0);
    for (size_t cut = 0; cut < size; cut++) {
        int rc;

        err = (struct fq_error){0};
        rc = open_bytes(bytes, cut, &checkpoint, &copy, &err);
        fq_checkpoint_free(checkpoint);
        free(copy);
        if (cut >= size - 20) { /* the last tensor's 12 bytes are there, its padding not quite */
            assert_int_equal(rc, 0);
            continue;
        }
        if (rc != -FQ_FORMAT || strncmp(err.message, "seed.gguf: ", 11) != 0)
            fail_msg("%zu of %zu bytes: %d, '%s'", cut, size, rc, err.message);
    }
    free(bytes);
}

/* Whatever becomes of it, nothing beyond the file is read, which the sanitizer sees. */
static void survives_every_byte_changed(void **state) {
    static const uint8_t masks[] = {0x01, 0x80, 0xff};
    struct fq_checkpoint *checkpoint;
    struct fq_loaded_matrix loaded;
    uint8_t *copy;
    size_t size, accepted = 0, refused = 0;
    uint8_t *bytes = read_seed(&size);

    (void)state;
    for (size_t at = 0; at < size; at++) {
        for (size_t m = 0; m < sizeof masks; m++) {
            bytes[at] ^= masks[m];
            if (open_bytes(bytes, size, &checkpoint, &copy, NULL) == 0) {
                accepted++;
                for (size_t i = 0; i < fq_checkpoint_matrix_count(checkpoint); i++)
                    if (fq_checkpoint_load(checkpoint, i, &loaded, NULL) == 0)
                        fq_loaded_matrix_fini(&loaded);
            } else {
                refused++;
            }
            fq_checkpoint_free(checkpoint);
            free(copy);
            bytes[at] ^= masks[m];
        }
    }
    assert_true(accepted > 0 && refused > 0);
    free(bytes);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reads_blocks_dense_tensors_and_stacks),
        cmocka_unit_test(refuses_every_beginning_of_a_file),
        cmocka_unit_test(survives_every_byte_changed),
    };

    return cmocka_run_group_tests(tests, NULL, NULL) ? 1 : 0;
}
