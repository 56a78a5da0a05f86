/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The safetensors reader.  The format: u64 little-endian header length n, n
 * bytes of JSON {name: {dtype, shape, data_offsets}}, then the data, to which
 * the offsets are relative.  A file is taken as hostile: sizes are checked
 * before they are used, and whatever the format forbids is refused.
 */
#include "safetensors.h"

#include "directory.h"

#include <inttypes.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static const struct {
    const char *name;
    size_t size;
} dtypes[] = {
    {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1},
    {"I16", 2},  {"U16", 2}, {"F16", 2}, {"BF16", 2},    {"I32", 4},     {"U32", 4},
    {"F32", 4},  {"I64", 8}, {"U64", 8}, {"F64", 8},     {"C64", 8},
};

static const char *intern_dtype(const char *name, size_t *size) {
    for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; i++)
        if (strcmp(dtypes[i].name, name) == 0) {
            *size = dtypes[i].size;
            return dtypes[i].name;
        }
    return NULL;
}

size_t fq_safetensors_dtype_size(const char *dtype) {
    size_t size = 0;

    return intern_dtype(dtype, &size) ? size : 0;
}

static uint64_t load_le64(const unsigned char *bytes) {
    uint64_t value = 0;

    for (int i = 7; i >= 0; i--)
        value = value << 8 | bytes[i];
    return value;
}

/* Adds the file and the tensor to a message about one tensor. */
#define TENSOR_FAIL(err, status, file, tensor, ...)                                                \
    (fq_fail((err), (status), __VA_ARGS__),                                                        \
     fq_fail_in((err), "%s: tensor '%.200s'", (file)->name, (tensor)->name))

/* Shape to element count times item size, refusing what 63 bits cannot hold. */
static int parse_shape(const struct fq_safetensors *file, struct fq_checkpoint_tensor *tensor,
                       const json_t *shape, size_t item, uint64_t *bytes, struct fq_error *err) {
    int64_t product = (int64_t)item;
    bool empty = false;

    if (!json_is_array(shape))
        return TENSOR_FAIL(err, FQ_FORMAT, file, tensor, "shape is missing or not an array");
    if (json_array_size(shape) > FQ_SAFETENSORS_RANK_MAX)
        return TENSOR_FAIL(err, FQ_UNSUPPORTED, file, tensor, "rank is %zu, at most %d is read",
                           json_array_size(shape), FQ_SAFETENSORS_RANK_MAX);
    tensor->rank = (int)json_array_size(shape);
    for (int i = 0; i < tensor->rank; i++) {
        const json_t *value = json_array_get(shape, (size_t)i);

        if (!json_is_integer(value) || json_integer_value(value) < 0)
            return TENSOR_FAIL(err, FQ_FORMAT, file, tensor,
                               "shape[%d] is not a non-negative integer", i);
        tensor->shape[i] = json_integer_value(value);
        if (tensor->shape[i] == 0)
            empty = true;
        else if (__builtin_mul_overflow(product, tensor->shape[i], &product))
            return TENSOR_FAIL(err, FQ_FORMAT, file, tensor, "the size of its shape overflows");
    }
    *bytes = empty ? 0 : (uint64_t)product;
    return 0;
}

static int parse_offsets(const struct fq_safetensors *file, struct fq_checkpoint_tensor *tensor,
                         const json_t *offsets, uint64_t data_bytes, uint64_t *begin,
                         struct fq_error *err) {
    uint64_t value[2];

    if (!json_is_array(offsets) || json_array_size(offsets) != 2)
        return TENSOR_FAIL(err, FQ_FORMAT, file, tensor, "data_offsets is not two integers");
    for (int i = 0; i < 2; i++) {
        const json_t *offset = json_array_get(offsets, (size_t)i);

        if (!json_is_integer(offset) || json_integer_value(offset) < 0)
            return TENSOR_FAIL(err, FQ_FORMAT, file, tensor,
                               "data_offsets is not two non-negative integers");
        value[i] = (uint64_t)json_integer_value(offset);
    }
    if (value[0] > value[1] || value[1] > data_bytes)
        return TENSOR_FAIL(err, FQ_FORMAT, file, tensor,
                           "data_offsets [%" PRIu64 ", %" PRIu64 "] are not within the %" PRIu64
                           " bytes of data",
                           value[0], value[1], data_bytes);
    *begin = value[0];
    tensor->bytes = value[1] - value[0];
    return 0;
}

static int parse_tensor(const struct fq_safetensors *file, struct fq_checkpoint_tensor *tensor,
                        const json_t *entry, const char *data, uint64_t data_bytes,
                        struct fq_error *err) {
    const char *dtype;
    size_t item = 0;
    uint64_t bytes = 0, begin = 0;
    int rc;

    if (!json_is_object(entry))
        return TENSOR_FAIL(err, FQ_FORMAT, file, tensor, "its entry is not an object");
    dtype = json_string_value(json_object_get(entry, "dtype"));
    if (!dtype)
        return TENSOR_FAIL(err, FQ_FORMAT, file, tensor, "dtype is missing or not a string");
    tensor->dtype = intern_dtype(dtype, &item);
    if (!tensor->dtype)
        return TENSOR_FAIL(err, FQ_UNSUPPORTED, file, tensor, "dtype '%.40s' is not known", dtype);
    if ((rc = parse_shape(file, tensor, json_object_get(entry, "shape"), item, &bytes, err)) < 0)
        return rc;
    if ((rc = parse_offsets(file, tensor, json_object_get(entry, "data_offsets"), data_bytes,
                            &begin, err)) < 0)
        return rc;
    if (bytes != tensor->bytes)
        return TENSOR_FAIL(err, FQ_FORMAT, file, tensor,
                           "data_offsets span %" PRIu64 " bytes, its shape needs %" PRIu64,
                           tensor->bytes, bytes);
    if (json_object_size(entry) != 3)
        return TENSOR_FAIL(err, FQ_FORMAT, file, tensor,
                           "its entry has keys other than dtype, shape and data_offsets");
    tensor->data = data + begin;
    tensor->file = file->name;
    return 0;
}

/* Empty tensors sort before the one that starts where they stand. */
static int by_position(const void *left, const void *right) {
    const struct fq_checkpoint_tensor *a = left, *b = right;

    if (a->data != b->data)
        return (const char *)a->data < (const char *)b->data ? -1 : 1;
    if (a->bytes != b->bytes)
        return a->bytes < b->bytes ? -1 : 1;
    return strcmp(a->name, b->name);
}

/* Sorted, each tensor must begin where the last one ended, and the last end the file. */
static int check_cover(const struct fq_safetensors *file, const char *data, uint64_t data_bytes,
                       struct fq_error *err) {
    uint64_t end = 0;

    for (size_t i = 0; i < file->count; i++) {
        const struct fq_checkpoint_tensor *tensor = &file->tensors[i];
        uint64_t begin = (uint64_t)((const char *)tensor->data - data);

        if (begin != end)
            return TENSOR_FAIL(err, FQ_FORMAT, file, tensor,
                               "%s: begins at %" PRIu64 ", the one before ends at %" PRIu64,
                               begin > end ? "gap" : "overlap", begin, end);
        end = begin + tensor->bytes;
    }
    if (end != data_bytes)
        return fq_fail(err, FQ_FORMAT, "%s: %" PRIu64 " bytes after the last tensor", file->name,
                       data_bytes - end);
    return 0;
}

static int check_metadata(const struct fq_safetensors *file, json_t *metadata,
                          struct fq_error *err) {
    const char *key;
    json_t *value;

    if (!json_is_object(metadata))
        return fq_fail(err, FQ_FORMAT, "%s: __metadata__ is not an object", file->name);
    json_object_foreach(metadata, key, value) {
        if (!json_is_string(value))
            return fq_fail(err, FQ_FORMAT, "%s: __metadata__ '%.100s' is not a string", file->name,
                           key);
    }
    return 0;
}

static int parse_header(struct fq_safetensors *file, json_t *header, const char *data,
                        uint64_t data_bytes, struct fq_error *err) {
    const char *name;
    json_t *entry;
    int rc;

    file->tensors = calloc(json_object_size(header) + 1, sizeof *file->tensors);
    if (!file->tensors)
        return fq_fail(err, FQ_NO_MEMORY, "%s: no memory for %zu tensors", file->name,
                       json_object_size(header));
    json_object_foreach(header, name, entry) {
        struct fq_checkpoint_tensor *tensor = &file->tensors[file->count];

        if (strcmp(name, "__metadata__") == 0) {
            if ((rc = check_metadata(file, entry, err)) < 0)
                return rc;
            continue;
        }
        tensor->name = strdup(name);
        if (!tensor->name)
            return fq_fail(err, FQ_NO_MEMORY, "%s: no memory for tensor names", file->name);
        file->count++;
        if ((rc = parse_tensor(file, tensor, entry, data, data_bytes, err)) < 0)
            return rc;
    }
    qsort(file->tensors, file->count, sizeof *file->tensors, by_position);
    return check_cover(file, data, data_bytes, err);
}

static int parse_file(struct fq_safetensors *file, const void *bytes, size_t size,
                      struct fq_error *err) {
    const char *text = (const char *)bytes + 8;
    json_error_t fault;
    json_t *header;
    uint64_t length;
    int rc;

    if (size < 8)
        return fq_fail(err, FQ_FORMAT, "%s: %zu bytes, too short for the header length", file->name,
                       size);
    length = load_le64(bytes);
    if (length > FQ_SAFETENSORS_HEADER_MAX)
        return fq_fail(err, FQ_FORMAT,
                       "%s: header of %" PRIu64 " bytes, at most %" PRIu64 " are allowed",
                       file->name, length, FQ_SAFETENSORS_HEADER_MAX);
    if (length > size - 8)
        return fq_fail(err, FQ_FORMAT, "%s: header of %" PRIu64 " bytes, beyond the file's %zu",
                       file->name, length, size);
    if (length == 0 || text[0] != '{')
        return fq_fail(err, FQ_FORMAT, "%s: the header does not begin with '{'", file->name);
    header = json_loadb(text, (size_t)length, JSON_REJECT_DUPLICATES, &fault);
    if (!header)
        return fq_fail(err, FQ_FORMAT, "%s: header, byte %d: %s", file->name, fault.position,
                       fault.text);
    rc = parse_header(file, header, text + length, size - 8 - length, err);
    json_decref(header);
    return rc;
}

int fq_safetensors_new_memory(const void *bytes, size_t size, const char *name,
                              struct fq_safetensors **out, struct fq_error *err) {
    struct fq_error local;
    struct fq_safetensors *file = calloc(1, sizeof *file);
    int rc;

    err = err ? err : &local; /* fq_fail_in needs one */
    if (!file || !(file->name = strdup(name))) {
        free(file);
        return fq_fail(err, FQ_NO_MEMORY, "%s: no memory to open it", name);
    }
    rc = parse_file(file, bytes, size, err);
    if (rc < 0) {
        fq_safetensors_free(file);
        return rc;
    }
    *out = file;
    return 0;
}

int fq_safetensors_new(int dirfd, const char *name, struct fq_safetensors **out,
                       struct fq_error *err) {
    const void *map;
    size_t size;
    int rc = fq_directory_map(dirfd, name, 8, &map, &size, err);

    if (rc < 0)
        return rc;
    rc = fq_safetensors_new_memory(map, size, name, out, err);
    if (rc < 0) {
        munmap((void *)map, size);
        return rc;
    }
    (*out)->map = map;
    (*out)->map_bytes = size;
    return 0;
}

void fq_safetensors_free(struct fq_safetensors *file) {
    if (!file)
        return;
    for (size_t i = 0; i < file->count; i++)
        free((char *)file->tensors[i].name);
    free(file->tensors);
    if (file->map)
        munmap((void *)file->map, file->map_bytes);
    free(file->name);
    free(file);
}
