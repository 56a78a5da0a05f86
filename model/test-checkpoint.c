/* SPDX-License-Identifier: Apache-2.0 */
/* Checkpoint directories, written with our writer and read back, whole and with faults. */
#include "checkpoint.h"
#include "half.h"
#include "quantize-checkpoint.h"
#include "safetensors.h"

#include <dirent.h>
#include <fcntl.h>
#include <jansson.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define COUNT(array) (sizeof(array) / sizeof *(array))

static char directory[64]; /* a fresh one a test */
static char quantized[80]; /* what a test may quantize it into */
static int dirfd_now;

static void remove_directory(const char *path) {
    DIR *open_directory = opendir(path);
    struct dirent *entry;

    if (!open_directory)
        return;
    while ((entry = readdir(open_directory)))
        unlinkat(dirfd(open_directory), entry->d_name, 0);
    closedir(open_directory);
    rmdir(path);
}

static int setup(void **state) {
    (void)state;
    strcpy(directory, "test-checkpoint-XXXXXX");
    if (!mkdtemp(directory))
        return -1;
    snprintf(quantized, sizeof quantized, "%s-out", directory);
    dirfd_now = open(directory, O_RDONLY | O_DIRECTORY);
    return dirfd_now < 0;
}

static int teardown(void **state) {
    (void)state;
    close(dirfd_now);
    remove_directory(directory);
    remove_directory(quantized);
    return 0;
}

static void write_text(const char *name, const char *text) {
    char path[160];
    FILE *file;

    snprintf(path, sizeof path, "%s/%s", directory, name);
    file = fopen(path, "w");
    assert_non_null(file);
    fputs(text, file);
    assert_int_equal(fclose(file), 0);
}

static struct fq_checkpoint_tensor tensor(const char *name, const char *dtype, int64_t rows,
                                          int64_t columns, const void *data) {
    struct fq_checkpoint_tensor made = {.name = name, .dtype = dtype, .data = data};

    made.rank = columns ? 2 : 1;
    made.shape[0] = rows;
    made.shape[1] = columns;
    made.bytes =
        fq_safetensors_dtype_size(dtype) * (uint64_t)rows * (uint64_t)(columns ? columns : 1);
    return made;
}

static void write_tensors(const char *name, const struct fq_checkpoint_tensor *tensors,
                          size_t count) {
    struct fq_safetensors_writer *writer;
    struct fq_error err;

    assert_int_equal(fq_safetensors_writer_new(dirfd_now, name, tensors, count, &writer, &err), 0);
    for (size_t i = count; i-- > 0;) /* any order will do */
        assert_int_equal(fq_safetensors_write(writer, i, tensors[i].data, tensors[i].bytes, &err),
                         0);
    assert_int_equal(fq_safetensors_writer_finish(writer, &err), 0);
    fq_safetensors_writer_free(writer);
}

static struct fq_checkpoint *open_checkpoint(const char *path) {
    struct fq_checkpoint *checkpoint = NULL;
    struct fq_error err = {0};

    if (fq_checkpoint_new(path, &checkpoint, &err) != 0)
        fail_msg("%s", err.message);
    return checkpoint;
}

static void expect_refusal(int status, const char *words) {
    struct fq_checkpoint *checkpoint = NULL;
    struct fq_error err = {0};
    int rc = fq_checkpoint_new(directory, &checkpoint, &err);

    fq_checkpoint_free(checkpoint);
    if (rc != -status || !strstr(err.message, words))
        fail_msg("%d, '%s', expected %d, '%s'", rc, err.message, -status, words);
}

static void write_config(int bits, int group, bool symmetric, const char *targets,
                         const char *ignore) {
    char text[1024];

    snprintf(text, sizeof text,
             "{\"quantization_config\":{\"quant_method\":\"compressed-tensors\",\"format\":"
             "\"pack-quantized\",\"ignore\":[%s],\"config_groups\":{\"group_0\":{\"targets\":[%s],"
             "\"weights\":{\"num_bits\":%d,\"type\":\"int\",\"symmetric\":%s,\"strategy\":"
             "\"group\",\"group_size\":%d}}}}}",
             ignore, targets, bits, symmetric ? "true" : "false", group);
    write_text("config.json", text);
}

/* Codes that any packing must keep apart. */
static unsigned code_at(int64_t n, int64_t k, int bits) {
    return (unsigned)(n * 31 + k * 7 + k / 5) & ((1u << bits) - 1);
}

/* Packs along rows, dense or `each` codes a word. */
static void pack(uint32_t *words, int64_t stride, int64_t count, int bits, int each,
                 unsigned (*code)(int64_t, void *), void *context) {
    for (int64_t i = 0; i < count; i++) {
        int64_t bit = each ? i / each * 32 + i % each * bits : i * bits;
        uint64_t value = (uint64_t)code(i, context) << bit % 32;

        words[bit / 32 * stride] |= (uint32_t)value;
        if (value >> 32)
            words[(bit / 32 + 1) * stride] |= (uint32_t)(value >> 32);
    }
}

struct row {
    int64_t n;
    int bits;
};

static unsigned row_code(int64_t k, void *context) {
    const struct row *row = context;

    return code_at(row->n, k, row->bits);
}

static unsigned zero_code(int64_t n, void *context) {
    const struct row *group = context;

    return (unsigned)(n * 3 + group->n) & ((1u << group->bits) - 1);
}

#define N      21
#define K      192
#define GROUP  64
#define GROUPS (K / GROUP)

/* A packed layer "model.a" with the arrays it needs, in one place. */
struct packed {
    uint32_t codes[N * K], zeros[N * GROUPS];
    uint16_t scales[N * GROUPS];
    int32_t shape[2];
    struct fq_checkpoint_tensor tensors[6];
};

static struct packed *make_packed(int bits, int each, bool zeros) {
    struct packed *packed = calloc(1, sizeof *packed);
    int64_t columns = each ? (K + each - 1) / each : (K * bits + 31) / 32;
    int64_t rows = each ? (N + each - 1) / each : (N * bits + 31) / 32;

    for (int64_t n = 0; n < N; n++)
        pack(packed->codes + n * columns, 1, K, bits, each, row_code, &(struct row){n, bits});
    for (int64_t g = 0; g < GROUPS; g++)
        pack(packed->zeros + g, GROUPS, N, bits, each, zero_code, &(struct row){g, bits});
    for (int i = 0; i < N * GROUPS; i++)
        packed->scales[i] = fq_f32_to_f16(0.01f * (float)(i + 1));
    packed->shape[0] = N;
    packed->shape[1] = K;
    packed->tensors[0] = tensor("model.a.weight_packed", "I32", N, columns, packed->codes);
    packed->tensors[1] = tensor("model.a.weight_scale", "F16", N, GROUPS, packed->scales);
    packed->tensors[2] = tensor("model.a.weight_shape", "I32", 2, 0, packed->shape);
    packed->tensors[3] = tensor("model.a.weight_zero_point", "I32", rows, GROUPS, packed->zeros);
    write_tensors("model.safetensors", packed->tensors, zeros ? 4 : 3);
    return packed;
}

static void reads_every_packing_bit_for_bit(void **state) {
    static const struct {
        int bits, each;
        bool zeros;
    } cases[] = {{8, 0, false}, {4, 0, false}, {3, 0, false}, {3, 10, false},
                 {8, 0, true},  {4, 0, true},  {3, 0, true},  {3, 10, true}};

    (void)state;
    for (size_t i = 0; i < COUNT(cases); i++) {
        int bits = cases[i].bits;
        struct packed *packed = make_packed(bits, cases[i].each, cases[i].zeros);
        struct fq_loaded_matrix loaded;
        struct fq_checkpoint *checkpoint;
        struct fq_error err;

        write_config(bits, GROUP, !cases[i].zeros, "\"Linear\"", "");
        checkpoint = open_checkpoint(directory);
        assert_int_equal(fq_checkpoint_matrix_count(checkpoint), 1);
        assert_string_equal(fq_checkpoint_matrix(checkpoint, 0)->name, "model.a");
        assert_int_equal(fq_checkpoint_load(checkpoint, 0, &loaded, &err), 0);
        assert_int_equal(loaded.matrix.bits, bits);
        assert_int_equal(loaded.matrix.group, GROUP);
        assert_true((loaded.owned == NULL) == (!cases[i].each && !cases[i].zeros));
        assert_memory_equal(loaded.matrix.scales, packed->scales, sizeof packed->scales);
        for (int64_t n = 0; n < N; n++)
            for (int64_t k = 0; k < K; k++)
                assert_int_equal(fq_matrix_code(&loaded.matrix, n, k), code_at(n, k, bits));
        for (int64_t n = 0; cases[i].zeros && n < N; n++)
            for (int64_t g = 0; g < GROUPS; g++)
                assert_int_equal(loaded.matrix.zeros[n * GROUPS + g],
                                 zero_code(n, &(struct row){g, bits}));
        fq_loaded_matrix_fini(&loaded);
        fq_checkpoint_free(checkpoint);
        free(packed);
    }
}

static void refuses_what_config_and_tensors_disagree_on(void **state) {
    struct packed *packed = make_packed(4, 0, false);
    struct fq_checkpoint_tensor *tensors = packed->tensors;
    int32_t order[K];

    (void)state;
    expect_refusal(FQ_FORMAT, "config.json has no quantization_config");
    write_config(4, GROUP, true, "\"re:.*\\\\.b$\"", "");
    expect_refusal(FQ_FORMAT, "no target of quantization_config matches");
    write_config(4, GROUP, true, "\"Linear\"", "\"re:model\\\\.a\"");
    expect_refusal(FQ_FORMAT, "quantization_config ignores it");
    write_config(4, GROUP, true, "\"re:(\"", "");
    expect_refusal(FQ_FORMAT, "config.json: quantization_config: targets: pattern '('");
    write_config(8, GROUP, true, "\"Linear\"", "");
    expect_refusal(FQ_FORMAT, "has 24 columns, 8 bits with K = 192 need 48");
    write_config(4, 32, true, "\"Linear\"", "");
    expect_refusal(FQ_FORMAT, "weight_scale': is [21, 3], must be [21, 6] for N = 21");
    write_config(4, GROUP, false, "\"Linear\"", "");
    expect_refusal(FQ_FORMAT, "has no weight_zero_point");
    write_config(5, GROUP, true, "\"Linear\"", "");
    expect_refusal(FQ_UNSUPPORTED, "group_0: num_bits 5");
    write_config(4, 8, true, "\"Linear\"", "");
    expect_refusal(FQ_UNSUPPORTED, "group_size 8");
    write_text("config.json", "{\"quantization_config\":{\"quant_method\":\"hqq\"}}");
    expect_refusal(FQ_UNSUPPORTED, "quant_method 'hqq'");
    write_text("config.json", "{\"quantization_config\":{\"quant_method\":\"gptq\",\"bits\":4,"
                              "\"group_size\":64}}");
    expect_refusal(FQ_FORMAT, "quantization_config says gptq, which has no such tensors");

    write_config(4, GROUP, true, "\"re:.*\\\\.(a|c)$\"", "\"lm_head\"");
    fq_checkpoint_free(open_checkpoint(directory));
    for (int k = 0; k < K; k++)
        order[k] = k / GROUP;
    tensors[3] = tensor("model.a.weight_g_idx", "I32", K, 0, order);
    write_tensors("model.safetensors", tensors, 4);
    fq_checkpoint_free(open_checkpoint(directory)); /* an order that changes nothing */
    order[K - 1] = 0;
    write_tensors("model.safetensors", tensors, 4);
    expect_refusal(FQ_UNSUPPORTED, "weight_g_idx': activation order");
    tensors[1].dtype = "F32";
    tensors[1].data = packed->codes;
    tensors[1].bytes *= 2;
    write_tensors("model.safetensors", tensors, 3);
    expect_refusal(FQ_UNSUPPORTED, "is F32, only F16 and BF16");
    packed->shape[1] = -1;
    write_tensors("model.safetensors", tensors, 3);
    expect_refusal(FQ_FORMAT, "says 21 by -1");
    free(packed);
}

static void refuses_int3_that_could_be_either_layout(void **state) {
    uint32_t codes[5] = {0};
    uint16_t scale = 0x3c00;
    int32_t shape[2] = {1, 48};
    struct fq_checkpoint_tensor tensors[] = {
        tensor("a.weight_packed", "I32", 1, 5, codes),
        tensor("a.weight_scale", "F16", 1, 1, &scale),
        tensor("a.weight_shape", "I32", 2, 0, shape),
    };

    (void)state;
    write_tensors("model.safetensors", tensors, 3);
    write_config(3, 64, true, "\"Linear\"", "");
    expect_refusal(FQ_UNSUPPORTED, "cannot be told apart");
}

static void refuses_traps_in_the_index(void **state) {
    static const float one = 1;
    const struct fq_checkpoint_tensor a = tensor("a", "F32", 1, 0, &one);
    const struct fq_checkpoint_tensor both[] = {a, tensor("c", "F32", 1, 0, &one)};
    static const struct {
        const char *index;
        int status;
        const char *words;
    } cases[] = {
        {"{\"weight_map\":{\"a\":\"../s1.safetensors\"}}", FQ_FORMAT, "only plain names"},
        {"{\"weight_map\":{\"a\":\"/s1.safetensors\"}}", FQ_FORMAT, "only plain names"},
        {"{\"weight_map\":{\"a\":\"..\"}}", FQ_FORMAT, "only plain names"},
        {"{\"weight_map\":{\"a\":\"\"}}", FQ_FORMAT, "only plain names"},
        {"{\"weight_map\":{\"a\":1}}", FQ_FORMAT, "the file of 'a' is not a string"},
        {"{\"weight_map\":{\"a\":\"none.safetensors\"}}", FQ_NOT_FOUND, "none.safetensors"},
        {"{\"weight_map\":{\"b\":\"s1.safetensors\"}}", FQ_FORMAT, "tensor 'b' is not in s1"},
        {"{\"weight_map\":{\"a\":\"s1.safetensors\",\"a\":\"s2.safetensors\"}}", FQ_FORMAT,
         "duplicate"},
        {"{\"weight_map\":{\"a\":\"s1.safetensors\",\"c\":\"s2.safetensors\"}}", FQ_FORMAT,
         "tensor 'a' is in both s"},
        {"{\"weight_map\":{\"c\":\"s2.safetensors\"}}", FQ_FORMAT,
         "s2.safetensors: tensor 'a' is not in model.safetensors.index.json"},
        {"{\"weight_map\":[]}", FQ_FORMAT, "weight_map is missing"},
        {"[]", FQ_FORMAT, "not a JSON object"},
    };

    (void)state;
    expect_refusal(FQ_NOT_FOUND, "neither model.safetensors nor model.safetensors.index.json");
    write_tensors("s1.safetensors", &a, 1);
    write_tensors("s2.safetensors", both, 2);
    for (size_t i = 0; i < COUNT(cases); i++) {
        write_text("model.safetensors.index.json", cases[i].index);
        expect_refusal(cases[i].status, cases[i].words);
    }
}

static void takes_dense_linear_layers_only(void **state) {
    static const float weights[64 * 32];
    const struct fq_checkpoint_tensor tensors[] = {
        tensor("embeddings.word_embeddings.weight", "F32", 64, 32, weights),
        tensor("layer.0.attn.q.weight", "F32", 64, 32, weights),
        tensor("layer.0.attn.q.bias", "F32", 64, 0, weights),
        tensor("layer.0.norm.weight", "F32", 32, 0, weights),
        tensor("lm_head.weight", "F32", 64, 32, weights),
        tensor("wte.weight", "F32", 64, 32, weights),
        tensor("layer.0.attn.mask.weight", "I32", 64, 32, weights),
    };
    struct fq_checkpoint *checkpoint;
    struct fq_error err;

    (void)state;
    write_tensors("model.safetensors", tensors, COUNT(tensors));
    checkpoint = open_checkpoint(directory);
    assert_int_equal(fq_checkpoint_tensor_count(checkpoint), COUNT(tensors));
    assert_int_equal(fq_checkpoint_matrix_count(checkpoint), 1);
    assert_string_equal(fq_checkpoint_matrix(checkpoint, 0)->name, "layer.0.attn.q");
    assert_true(fq_checkpoint_matrix(checkpoint, 0)->has_bias);
    assert_int_equal(fq_checkpoint_matrix(checkpoint, 0)->matrix.group, 32); /* K, below 64 */
    assert_int_equal(fq_checkpoint_quantize_as(checkpoint, 8, 16, &err), 0);
    assert_int_equal(fq_checkpoint_matrix(checkpoint, 0)->matrix.group, 16);
    assert_int_equal(fq_checkpoint_quantize_as(checkpoint, 5, 16, &err), -FQ_INVALID);
    assert_int_equal(fq_checkpoint_quantize_as(checkpoint, 4, 17, &err), -FQ_INVALID);
    fq_checkpoint_free(checkpoint);
}

static void quantizing_a_directory_equals_quantizing_on_load(void **state) {
    static float weights[40 * 192];
    struct fq_checkpoint_tensor tensors[] = {
        tensor("a.weight", "F32", 40, 192, weights),
        tensor("b.weight", "F32", 80, 48, weights), /* ambiguous with 3 bits: kept dense */
        tensor("embed.weight", "F32", 40, 48, weights),
    };
    static const int bits[] = {8, 4, 3};

    (void)state;
    for (size_t i = 0; i < COUNT(weights); i++)
        weights[i] = (float)((i * 2654435761u >> 8) % 2001) / 1000.0f - 1.0f;
    write_tensors("model.safetensors", tensors, COUNT(tensors));
    write_text("vocab.txt", "word\n");
    write_text("pytorch_model.bin", "stale");
    for (size_t i = 0; i < COUNT(bits); i++) {
        /* shards of two sizes: all in one file, and a file a layer */
        struct fq_quantize_options options = {.bits = bits[i],
                                              .group = 64,
                                              .shard_bytes = i == 1 ? 4096 : 1 << 20,
                                              .method.scale = FQ_SCALE_MSE};
        struct fq_quantize_summary summary;
        struct fq_checkpoint *before, *after;
        struct fq_error err = {0};
        char path[160];

        if (fq_quantize_checkpoint(directory, quantized, &options, &summary, &err) != 0)
            fail_msg("%s", err.message);
        assert_int_equal(fq_quantize_checkpoint(directory, quantized, &options, &summary, &err),
                         -FQ_EXISTS);
        before = open_checkpoint(directory);
        after = open_checkpoint(quantized);
        assert_int_equal(fq_checkpoint_quantize_as(before, bits[i], 64, &err), 0);
        assert_int_equal(fq_checkpoint_matrix_count(after), bits[i] == 3 ? 1 : 2);
        for (size_t m = 0; m < fq_checkpoint_matrix_count(after); m++) {
            struct fq_loaded_matrix left, right;

            assert_int_equal(fq_checkpoint_load(before, m, &left, &err), 0);
            assert_int_equal(fq_checkpoint_load(after, m, &right, &err), 0);
            assert_null(right.owned);
            assert_int_equal(left.matrix.group, right.matrix.group);
            assert_memory_equal(left.matrix.codes, right.matrix.codes,
                                left.matrix.n * fq_matrix_row_bytes(&left.matrix));
            assert_memory_equal(left.matrix.scales, right.matrix.scales,
                                left.matrix.n * fq_matrix_groups(&left.matrix) * 2);
            fq_loaded_matrix_fini(&left);
            fq_loaded_matrix_fini(&right);
        }
        assert_memory_equal(fq_checkpoint_find(after, "embed.weight")->data, weights, 40 * 48 * 4);
        assert_true((fq_checkpoint_find(after, "b.weight") != NULL) == (bits[i] == 3));
        snprintf(path, sizeof path, "%s/vocab.txt", quantized);
        assert_int_equal(access(path, F_OK), 0);
        snprintf(path, sizeof path, "%s/pytorch_model.bin", quantized);
        assert_int_not_equal(access(path, F_OK), 0);
        fq_checkpoint_free(before);
        fq_checkpoint_free(after);
        remove_directory(quantized);
    }
}

static int stop(void *context, const struct fq_quantize_progress *progress) {
    (void)context, (void)progress;
    return 1;
}

static void leaves_nothing_behind_when_it_fails(void **state) {
    static float weights[64 * 64];
    struct fq_checkpoint_tensor a = tensor("a.weight", "F32", 64, 64, weights);
    struct fq_quantize_options options = {.bits = 4, .group = 64, .shard_bytes = 1 << 20};
    struct fq_quantize_summary summary;
    struct fq_error err;
    char partial[128];

    (void)state;
    snprintf(partial, sizeof partial, "%s.partial", quantized);
    write_tensors("model.safetensors", &a, 1);
    options.progress = stop;
    assert_int_equal(fq_quantize_checkpoint(directory, quantized, &options, &summary, &err),
                     -FQ_CANCELLED);
    assert_int_not_equal(access(quantized, F_OK), 0);
    assert_int_equal(access(partial, F_OK), 0); /* for the next run */
    options.progress = NULL;
    weights[65] = fq_f32_from_bits(0x7fc00000);
    write_tensors("model.safetensors", &a, 1);
    assert_int_equal(fq_quantize_checkpoint(directory, quantized, &options, &summary, &err),
                     -FQ_INVALID);
    assert_non_null(strstr(err.message, "'a.weight': row 1, column 1 is NaN"));
    assert_int_not_equal(access(quantized, F_OK), 0);
    assert_int_not_equal(access(partial, F_OK), 0);
}

#define CASE(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void) {
    const struct CMUnitTest tests[] = {
        CASE(reads_every_packing_bit_for_bit),
        CASE(refuses_what_config_and_tensors_disagree_on),
        CASE(refuses_int3_that_could_be_either_layout),
        CASE(refuses_traps_in_the_index),
        CASE(takes_dense_linear_layers_only),
        CASE(quantizing_a_directory_equals_quantizing_on_load),
        CASE(leaves_nothing_behind_when_it_fails),
    };

    return cmocka_run_group_tests(tests, NULL, NULL) ? 1 : 0;
}
