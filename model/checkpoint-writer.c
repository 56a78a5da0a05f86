/* SPDX-License-Identifier: Apache-2.0 */
/* Dividing tensors among shards, and writing one shard after the other. */
#include "checkpoint-writer.h"

#include "directory.h"
#include "safetensors.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct item {
    struct fq_checkpoint_tensor tensor; /* name owned, data unset */
    size_t shard;
    size_t place; /* within the open shard */
};

struct fq_checkpoint_writer {
    struct fq_output_directory *output; /* borrowed */
    uint64_t shard_bytes, filled;       /* the most, and what the last shard has */
    uint64_t bytes;                     /* of all */
    struct item *items;                 /* in the order of their shards */
    size_t count, room;
    size_t shards;                      /* begun so far, 0 before the first tensor */
    struct fq_safetensors_writer *open; /* or NULL */
    size_t open_shard;
};

int fq_checkpoint_writer_new(struct fq_output_directory *output, uint64_t shard_bytes,
                             struct fq_checkpoint_writer **out, struct fq_error *err) {
    struct fq_checkpoint_writer *writer = calloc(1, sizeof *writer);

    if (!writer)
        return fq_fail(err, FQ_NO_MEMORY, "no memory to write a checkpoint");
    writer->output = output;
    writer->shard_bytes = shard_bytes;
    *out = writer;
    return 0;
}

void fq_checkpoint_writer_free(struct fq_checkpoint_writer *writer) {
    if (!writer)
        return;
    for (size_t i = 0; i < writer->count; i++)
        free((char *)writer->items[i].tensor.name);
    free(writer->items);
    fq_safetensors_writer_free(writer->open);
    free(writer);
}

uint64_t fq_checkpoint_writer_bytes(const struct fq_checkpoint_writer *writer) {
    return writer->bytes;
}

static int make_room(struct fq_checkpoint_writer *writer, size_t count, struct fq_error *err) {
    size_t room = writer->room;
    struct item *items;

    while (room < writer->count + count)
        room = room ? room * 2 : 64;
    if (room == writer->room)
        return 0;
    items = realloc(writer->items, room * sizeof *items);
    if (!items)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for %zu tensors", room);
    writer->items = items;
    writer->room = room;
    return 0;
}

int fq_checkpoint_writer_add(struct fq_checkpoint_writer *writer,
                             const struct fq_checkpoint_tensor *tensors, size_t count,
                             struct fq_error *err) {
    uint64_t bytes = 0;
    int rc = make_room(writer, count, err);

    for (size_t i = 0; i < count; i++)
        bytes += tensors[i].bytes;
    if (writer->shards == 0 ||
        (writer->filled > 0 && writer->filled + bytes > writer->shard_bytes)) {
        writer->shards++;
        writer->filled = 0;
    }
    writer->filled += bytes;
    writer->bytes += bytes;
    for (size_t i = 0; i < count && rc == 0; i++) {
        struct item *item = &writer->items[writer->count];

        *item = (struct item){.tensor = tensors[i], .shard = writer->shards - 1};
        item->tensor.name = strdup(tensors[i].name);
        if (item->tensor.name)
            writer->count++;
        else
            rc = fq_fail(err, FQ_NO_MEMORY, "no memory for tensor names");
    }
    return rc;
}

static void shard_name(const struct fq_checkpoint_writer *writer, size_t shard, char name[64]) {
    if (writer->shards == 1)
        snprintf(name, 64, FQ_SINGLE_FILE);
    else
        snprintf(name, 64, "model-%05zu-of-%05zu.safetensors", shard + 1, writer->shards);
}

/* Whether a shard is there as a whole: eight bytes that say how long the header is, that, and the
 * tensors. */
static bool is_there(const struct fq_checkpoint_writer *writer, size_t shard) {
    char name[64];
    unsigned char start[8];
    uint64_t bytes = sizeof start, header = 0;
    struct stat status;
    bool whole;
    int fd;

    shard_name(writer, shard, name);
    fd = openat(writer->output->fd, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return false;
    whole = fstat(fd, &status) == 0 && pread(fd, start, sizeof start, 0) == sizeof start;
    close(fd);
    for (int i = 7; whole && i >= 0; i--)
        header = header << 8 | start[i];
    for (size_t i = 0; i < writer->count; i++)
        if (writer->items[i].shard == shard)
            bytes += writer->items[i].tensor.bytes;
    return whole && (uint64_t)status.st_size == bytes + header;
}

bool fq_checkpoint_writer_has(const struct fq_checkpoint_writer *writer, size_t i) {
    size_t shard = writer->items[i].shard;

    return !(writer->open && writer->open_shard == shard) && is_there(writer, shard);
}

size_t fq_checkpoint_writer_shards(const struct fq_checkpoint_writer *writer, size_t *found) {
    *found = 0;
    for (size_t shard = 0; shard < writer->shards; shard++)
        *found += is_there(writer, shard);
    return writer->shards;
}

/* The largest elements first, which keeps every tensor aligned. */
static int by_element(const void *left, const void *right) {
    const struct item *a = *(struct item *const *)left, *b = *(struct item *const *)right;
    size_t a_size = fq_safetensors_dtype_size(a->tensor.dtype);
    size_t b_size = fq_safetensors_dtype_size(b->tensor.dtype);

    if (a_size != b_size)
        return a_size > b_size ? -1 : 1;
    return a < b ? -1 : 1;
}

static int begin_shard(struct fq_checkpoint_writer *writer, size_t shard, struct fq_error *err) {
    struct fq_checkpoint_tensor *tensors = calloc(writer->count, sizeof *tensors);
    struct item **order = calloc(writer->count, sizeof *order);
    size_t count = 0;
    char name[64];
    int rc;

    if (!tensors || !order) {
        rc = fq_fail(err, FQ_NO_MEMORY, "no memory for %zu tensors", writer->count);
        goto out;
    }
    for (size_t i = 0; i < writer->count; i++)
        if (writer->items[i].shard == shard)
            order[count++] = &writer->items[i];
    qsort(order, count, sizeof *order, by_element);
    for (size_t i = 0; i < count; i++) {
        order[i]->place = i;
        tensors[i] = order[i]->tensor;
    }
    shard_name(writer, shard, name);
    rc = fq_safetensors_writer_new(writer->output->fd, name, tensors, count, &writer->open, err);
    writer->open_shard = shard;
out:
    free(tensors);
    free(order);
    return rc;
}

static int end_shard(struct fq_checkpoint_writer *writer, struct fq_error *err) {
    int rc = writer->open ? fq_safetensors_writer_finish(writer->open, err) : 0;

    fq_safetensors_writer_free(writer->open);
    writer->open = NULL;
    return rc;
}

int fq_checkpoint_writer_write(struct fq_checkpoint_writer *writer, size_t i, const void *data,
                               uint64_t bytes, struct fq_error *err) {
    const struct item *item = &writer->items[i];
    int rc;

    if (!writer->open || writer->open_shard != item->shard) {
        if ((rc = end_shard(writer, err)) < 0 || (rc = begin_shard(writer, item->shard, err)) < 0)
            return rc;
    }
    return fq_safetensors_write(writer->open, item->place, data, bytes, err);
}

static int write_index(struct fq_checkpoint_writer *writer, struct fq_error *err) {
    json_t *map = json_object();
    json_t *index;
    int rc;

    for (size_t i = 0; i < writer->count; i++) {
        char name[64];

        shard_name(writer, writer->items[i].shard, name);
        json_object_set_new(map, writer->items[i].tensor.name, json_string(name));
    }
    index = json_pack("{s:{s:I}, s:o}", "metadata", "total_size", (json_int_t)writer->bytes,
                      "weight_map", map);
    if (!index)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for the index");
    rc = fq_output_directory_json(writer->output, FQ_INDEX_FILE, index, err);
    json_decref(index);
    return rc;
}

int fq_checkpoint_writer_finish(struct fq_checkpoint_writer *writer, struct fq_error *err) {
    int rc = end_shard(writer, err);

    return rc == 0 && writer->shards > 1 ? write_index(writer, err) : rc;
}
