/* SPDX-License-Identifier: Apache-2.0 */
/* Inputs of the checkpoint fuzzers: from text to files in memory, and through the reader. */
#include "checkpoint.h"
#include "fuzz.h"
#include "safetensors.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TENSORS_MAX    24
#define DATA_BYTES_MAX (1 << 18)
#define SHARDS         2

struct input {
    const uint8_t *at;
    size_t left;
};

/* ---- through the reader ------------------------------------------------------------------- */

static void read_matrix(struct fq_checkpoint *checkpoint, size_t i) {
    const struct fq_checkpoint_matrix *described = fq_checkpoint_matrix(checkpoint, i);
    struct fq_loaded_matrix loaded;
    double *row;
    float *bias;

    if (fq_checkpoint_load(checkpoint, i, &loaded, NULL) == 0) {
        const struct fq_matrix *matrix = &loaded.matrix;

        row = malloc((size_t)matrix->k * sizeof *row);
        if (fq_matrix_check(matrix, NULL) != 0 || described->symmetric != !matrix->zeros)
            abort(); /* what was accepted is no matrix */
        for (int64_t n = 0; n < matrix->n; n++) {
            fq_matrix_dequantize_row(matrix, n, row);
            for (int64_t k = 0; k < matrix->k; k++)
                if (!isfinite(row[k]))
                    abort();
        }
        free(row);
        fq_loaded_matrix_fini(&loaded);
    }
    bias = malloc((size_t)described->matrix.n * sizeof *bias);
    fq_checkpoint_bias(checkpoint, i, bias, NULL);
    free(bias);
}

void fuzz_checkpoint(const struct fq_memory_file *files, size_t count) {
    struct fq_checkpoint *checkpoint;
    struct fq_error err = {0};

    if (fq_checkpoint_new_memory(files, count, &checkpoint, &err) < 0) {
        if (err.status >= 0 || !err.message[0] || strchr(err.message, '\n'))
            abort(); /* a refusal says in one line what is wrong */
        return;
    }
    for (size_t i = 0; i < fq_checkpoint_matrix_count(checkpoint); i++)
        read_matrix(checkpoint, i);
    fuzz_accepted++;
    fq_checkpoint_free(checkpoint);
}

/* ---- from text to files ------------------------------------------------------------------- */

/* A section as text of its own, on the heap. */
static char *take_section(struct input *input) {
    const uint8_t *end = input->left ? memchr(input->at, 0, input->left) : NULL;
    size_t length = end ? (size_t)(end - input->at) : input->left;
    char *text = strndup((const char *)input->at, length);

    length += end ? 1 : 0;
    input->at += length;
    input->left -= length;
    return text;
}

/* config.json, as a malloced text; NULL where the section is no JSON object. */
static char *make_config(const char *section, const char *method) {
    json_t *quantization = json_loads(section, JSON_REJECT_DUPLICATES, NULL), *config;
    char *text = NULL;

    if (json_is_object(quantization)) {
        json_object_set_new(quantization, "quant_method", json_string(method));
        config = json_pack("{s:O}", "quantization_config", quantization);
        text = json_dumps(config, JSON_COMPACT);
        json_decref(config);
    }
    json_decref(quantization);
    return text;
}

struct shard {
    json_t *header;
    uint64_t bytes;
    int tensors;
};

/* "name dtype size ...": one more entry, unless it is malformed or too large. */
static void add_tensor(struct shard *shard, char *line) {
    char *save, *name = strtok_r(line, " ", &save), *dtype = strtok_r(NULL, " ", &save), *word;
    json_t *shape = json_array();
    uint64_t bytes = dtype ? fq_safetensors_dtype_size(dtype) : 0;

    while ((word = strtok_r(NULL, " ", &save)) && json_array_size(shape) < 8) {
        uint64_t size = strtoull(word, NULL, 10) % (DATA_BYTES_MAX + 1);

        bytes = bytes * size <= DATA_BYTES_MAX ? bytes * size : DATA_BYTES_MAX + 1;
        json_array_append_new(shape, json_integer((json_int_t)size));
    }
    if (dtype && fq_safetensors_dtype_size(dtype) && shard->tensors < TENSORS_MAX &&
        shard->bytes + bytes <= DATA_BYTES_MAX && !json_object_get(shard->header, name) &&
        json_object_set_new(shard->header, name,
                            json_pack("{s:s, s:O, s:[I, I]}", "dtype", dtype, "shape", shape,
                                      "data_offsets", (json_int_t)shard->bytes,
                                      (json_int_t)(shard->bytes + bytes))) == 0) {
        shard->bytes += bytes;
        shard->tensors++;
    }
    json_decref(shape);
}

static void read_tensors(char *section, struct shard shards[SHARDS]) {
    char *save;
    int now = 0;

    for (char *line = strtok_r(section, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        if (strcmp(line, "--") == 0)
            now = SHARDS - 1;
        else
            add_tensor(&shards[now], line);
    }
}

/* The bytes of a safetensors file, malloced to their exact size. */
static uint8_t *make_shard(const struct shard *shard, const struct input *data, size_t *size) {
    char *text = json_dumps(shard->header, JSON_COMPACT);
    size_t length = strlen(text);
    uint8_t *bytes = malloc(8 + length + shard->bytes);

    *size = 8 + length + shard->bytes;
    for (int i = 0; i < 8; i++)
        bytes[i] = (uint8_t)((uint64_t)length >> (8 * i));
    memcpy(bytes + 8, text, length);
    for (uint64_t i = 0; i < shard->bytes; i++)
        bytes[8 + length + i] = data->left ? data->at[i % data->left] : (uint8_t)(i * 37);
    free(text);
    return bytes;
}

void fuzz_layout(const uint8_t *data, size_t size, const char *method) {
    struct input input = {data, size};
    char *section = take_section(&input), *config = make_config(section, method);
    char *index = take_section(&input), *tensors = take_section(&input);
    struct shard shards[SHARDS] = {{json_object(), 0, 0}, {json_object(), 0, 0}};
    uint8_t *bytes[SHARDS];
    size_t sizes[SHARDS];

    read_tensors(tensors, shards);
    for (int i = 0; i < SHARDS; i++)
        bytes[i] = make_shard(&shards[i], &input, &sizes[i]);
    if (config) {
        const struct fq_memory_file files[] = {
            {"config.json", config, strlen(config)},
            {*index ? "one.safetensors" : "model.safetensors", bytes[0], sizes[0]},
            {"two.safetensors", bytes[1], sizes[1]},
            {"model.safetensors.index.json", index, strlen(index)},
        };

        fuzz_checkpoint(files, *index ? 4 : 2);
    }
    for (int i = 0; i < SHARDS; i++) {
        json_decref(shards[i].header);
        free(bytes[i]);
    }
    free(section);
    free(config);
    free(index);
    free(tensors);
}
