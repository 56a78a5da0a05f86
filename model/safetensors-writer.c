/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The safetensors writer: the header is computed from the shapes, each tensor
 * is then written at its place, so that a caller never holds more than one.
 * The file is a temporary one until _finish has synced and renamed it.
 */
#include "safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct slot {
    uint64_t begin; /* from the start of the file */
    uint64_t bytes;
    bool written;
};

struct fq_safetensors_writer {
    int dirfd; /* borrowed */
    int fd;
    char *name;      /* what the file will be called */
    char *temporary; /* what it is called now; NULL once renamed */
    struct slot *slots;
    size_t count;
};

static int write_at(int fd, const void *data, uint64_t bytes, uint64_t offset) {
    const char *next = data;

    while (bytes > 0) {
        size_t chunk = bytes < (1u << 30) ? (size_t)bytes : 1u << 30;
        ssize_t done = pwrite(fd, next, chunk, (off_t)offset);

        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0)
            return -1;
        next += done;
        offset += (uint64_t)done;
        bytes -= (uint64_t)done;
    }
    return 0;
}

/* Bytes of a tensor by its shape, which is ours or was checked by the reader. */
static uint64_t tensor_bytes(const struct fq_checkpoint_tensor *tensor) {
    uint64_t bytes = fq_safetensors_dtype_size(tensor->dtype);

    for (int i = 0; i < tensor->rank; i++)
        bytes *= (uint64_t)tensor->shape[i];
    return bytes;
}

/* Fills the slots, relative to the data, and returns the JSON text; NULL without memory. */
static char *build_header(struct fq_safetensors_writer *writer,
                          const struct fq_checkpoint_tensor *tensors) {
    json_t *header = json_pack("{s:{s:s}}", "__metadata__", "format", "pt");
    char *text = NULL;
    uint64_t end = 0;

    for (size_t i = 0; header && i < writer->count; i++) {
        const struct fq_checkpoint_tensor *tensor = &tensors[i];
        json_t *shape = json_array();
        uint64_t bytes = tensor_bytes(tensor);

        for (int axis = 0; axis < tensor->rank; axis++)
            json_array_append_new(shape, json_integer(tensor->shape[axis]));
        writer->slots[i] = (struct slot){.begin = end, .bytes = bytes};
        if (json_object_set_new(header, tensor->name,
                                json_pack("{s:s, s:o, s:[I, I]}", "dtype", tensor->dtype, "shape",
                                          shape, "data_offsets", (json_int_t)end,
                                          (json_int_t)(end + bytes))) < 0) {
            json_decref(header);
            return NULL;
        }
        end += bytes;
    }
    if (header)
        text = json_dumps(header, JSON_COMPACT);
    json_decref(header);
    return text;
}

/* The header is padded with spaces to a multiple of 8, which aligns the data. */
static int write_header(struct fq_safetensors_writer *writer, const char *text,
                        struct fq_error *err) {
    uint64_t length = strlen(text), padded = (length + 7) / 8 * 8;
    unsigned char prefix[8];

    if (padded > FQ_SAFETENSORS_HEADER_MAX)
        return fq_fail(err, FQ_UNSUPPORTED,
                       "%s: its header would be %" PRIu64 " bytes, at most %" PRIu64 " are allowed",
                       writer->name, padded, FQ_SAFETENSORS_HEADER_MAX);
    for (int i = 0; i < 8; i++)
        prefix[i] = (unsigned char)(padded >> (8 * i));
    if (write_at(writer->fd, prefix, 8, 0) < 0 || write_at(writer->fd, text, length, 8) < 0 ||
        write_at(writer->fd, "       ", padded - length, 8 + length) < 0)
        return fq_fail_errno(err, "%s: writing the header", writer->name);
    for (size_t i = 0; i < writer->count; i++)
        writer->slots[i].begin += 8 + padded;
    return 0;
}

static int by_name(const void *left, const void *right) {
    return strcmp(*(const char *const *)left, *(const char *const *)right);
}

static int check_names(const struct fq_safetensors_writer *writer,
                       const struct fq_checkpoint_tensor *tensors, struct fq_error *err) {
    const char **names = calloc(writer->count + 1, sizeof *names);
    int rc = 0;

    if (!names)
        return fq_fail(err, FQ_NO_MEMORY, "%s: no memory for tensor names", writer->name);
    for (size_t i = 0; i < writer->count; i++)
        names[i] = tensors[i].name;
    qsort(names, writer->count, sizeof *names, by_name);
    for (size_t i = 1; i < writer->count && rc == 0; i++)
        if (strcmp(names[i - 1], names[i]) == 0)
            rc = fq_fail(err, FQ_FORMAT, "%s: tensor '%.200s' would be written twice", writer->name,
                         names[i]);
    free(names);
    return rc;
}

int fq_safetensors_writer_new(int dirfd, const char *name,
                              const struct fq_checkpoint_tensor *tensors, size_t count,
                              struct fq_safetensors_writer **out, struct fq_error *err) {
    struct fq_safetensors_writer *writer = calloc(1, sizeof *writer);
    char *text = NULL;
    int rc;

    if (!writer)
        return fq_fail(err, FQ_NO_MEMORY, "%s: no memory to write it", name);
    writer->dirfd = dirfd;
    writer->fd = -1;
    writer->count = count;
    writer->name = strdup(name);
    writer->slots = calloc(count + 1, sizeof *writer->slots);
    if (!writer->name || !writer->slots) {
        rc = fq_fail(err, FQ_NO_MEMORY, "%s: no memory to write it", name);
        goto fail;
    }
    if ((rc = check_names(writer, tensors, err)) < 0)
        goto fail;
    text = build_header(writer, tensors);
    if (!text || asprintf(&writer->temporary, "%s.tmp-%ld", name, (long)getpid()) < 0) {
        writer->temporary = NULL;
        rc = fq_fail(err, FQ_NO_MEMORY, "%s: no memory for its header", name);
        goto fail;
    }
    writer->fd = openat(dirfd, writer->temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (writer->fd < 0) {
        rc = fq_fail_errno(err, "%s", writer->temporary);
        goto fail;
    }
    if ((rc = write_header(writer, text, err)) < 0)
        goto fail;
    free(text);
    *out = writer;
    return 0;
fail:
    free(text);
    fq_safetensors_writer_free(writer);
    return rc;
}

int fq_safetensors_write(struct fq_safetensors_writer *writer, size_t i, const void *data,
                         uint64_t bytes, struct fq_error *err) {
    struct slot *slot = &writer->slots[i];

    if (i >= writer->count || slot->written || bytes != slot->bytes)
        return fq_fail(err, FQ_INTERNAL,
                       "%s: tensor %zu of %zu with %" PRIu64 " bytes is not one that is due",
                       writer->name, i, writer->count, bytes);
    if (write_at(writer->fd, data, bytes, slot->begin) < 0)
        return fq_fail_errno(err, "%s: writing", writer->name);
    slot->written = true;
    /* on the way to the disk while the next is computed: the sync at the end has less to wait for */
    sync_file_range(writer->fd, (off_t)slot->begin, (off_t)bytes, SYNC_FILE_RANGE_WRITE);
    return 0;
}

int fq_safetensors_writer_finish(struct fq_safetensors_writer *writer, struct fq_error *err) {
    for (size_t i = 0; i < writer->count; i++)
        if (!writer->slots[i].written)
            return fq_fail(err, FQ_INTERNAL, "%s: tensor %zu was not written", writer->name, i);
    if (fsync(writer->fd) < 0)
        return fq_fail_errno(err, "%s: fsync", writer->name);
    if (renameat(writer->dirfd, writer->temporary, writer->dirfd, writer->name) < 0)
        return fq_fail_errno(err, "%s: rename", writer->name);
    free(writer->temporary);
    writer->temporary = NULL;
    return 0;
}

void fq_safetensors_writer_free(struct fq_safetensors_writer *writer) {
    if (!writer)
        return;
    if (writer->fd >= 0) {
        close(writer->fd);
        if (writer->temporary)
            unlinkat(writer->dirfd, writer->temporary, 0);
    }
    free(writer->temporary);
    free(writer->slots);
    free(writer->name);
    free(writer);
}
