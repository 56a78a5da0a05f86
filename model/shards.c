/* SPDX-License-Identifier: Apache-2.0 */
/* Finding and opening a directory's safetensors files. */
#include "shards.h"

#include <stdlib.h>
#include <string.h>

static int open_shard(struct fq_shards *shards, const struct fq_directory *directory,
                      const char *name, struct fq_error *err) {
    const struct fq_memory_file *memory = fq_directory_memory(directory, name);
    struct fq_safetensors **files;
    int rc;

    for (size_t i = 0; i < shards->count; i++)
        if (strcmp(shards->files[i]->name, name) == 0)
            return 0;
    files = realloc(shards->files, (shards->count + 1) * sizeof *files);
    if (!files)
        return fq_fail(err, FQ_NO_MEMORY, "%s: no memory to open it", name);
    shards->files = files;
    if (directory->fd >= 0)
        rc = fq_safetensors_new(directory->fd, name, &files[shards->count], err);
    else if (memory)
        rc = fq_safetensors_new_memory(memory->bytes, memory->size, name, &files[shards->count],
                                       err);
    else
        rc = fq_fail(err, FQ_NOT_FOUND, "%s: is not there", name);
    if (rc == 0)
        shards->count++;
    return rc;
}

static int open_indexed(struct fq_shards *shards, const struct fq_directory *directory,
                        const json_t *index, struct fq_error *err) {
    json_t *map = json_object_get(index, "weight_map"), *shard;
    const char *tensor, *previous = NULL;

    if (!json_is_object(map))
        return fq_fail(err, FQ_FORMAT, FQ_INDEX_FILE ": weight_map is missing or not an object");
    json_object_foreach(map, tensor, shard) {
        const char *name = json_string_value(shard);

        if (!name)
            return fq_fail(err, FQ_FORMAT, FQ_INDEX_FILE ": the file of '%.200s' is not a string",
                           tensor);
        if (previous && strcmp(name, previous) == 0)
            continue;
        if (name[0] == '\0' || name[0] == '.' || strchr(name, '/') || strlen(name) > 255)
            return fq_fail(err, FQ_FORMAT,
                           FQ_INDEX_FILE
                           ": the file of '%.200s' is '%.100s', only plain names are allowed",
                           tensor, name);
        if (open_shard(shards, directory, name, err) < 0)
            return fq_fail_in(err, FQ_INDEX_FILE ": tensor '%.200s'", tensor);
        previous = name;
    }
    return 0;
}

static int by_name_and_file(const void *left, const void *right) {
    const struct fq_checkpoint_tensor *a = *(const struct fq_checkpoint_tensor *const *)left;
    const struct fq_checkpoint_tensor *b = *(const struct fq_checkpoint_tensor *const *)right;
    int order = strcmp(a->name, b->name);

    return order ? order : strcmp(a->file, b->file);
}

/* All files' tensors in one sorted table, which is the caller's to free; NULL without memory. */
static const struct fq_checkpoint_tensor **list_tensors(const struct fq_shards *shards,
                                                        size_t *total) {
    const struct fq_checkpoint_tensor **all;
    size_t next = 0;

    *total = 0;
    for (size_t i = 0; i < shards->count; i++)
        *total += shards->files[i]->count;
    all = calloc(*total + 1, sizeof *all);
    if (!all)
        return NULL;
    for (size_t i = 0; i < shards->count; i++)
        for (size_t t = 0; t < shards->files[i]->count; t++)
            all[next++] = &shards->files[i]->tensors[t];
    qsort(all, *total, sizeof *all, by_name_and_file);
    return all;
}

/*
 * Every tensor that the index names is in the file that it names, and no file has one that the
 * index does not name: the files are of one download, and all of it.  One that is in several files
 * is found where tables are merged.
 */
static int check_index(const struct fq_shards *shards, const json_t *index, struct fq_error *err) {
    json_t *map = json_object_get(index, "weight_map"), *shard;
    const struct fq_checkpoint_tensor **all;
    const char *name;
    size_t total;
    int rc = 0;

    all = list_tensors(shards, &total);
    if (!all)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for %zu tensors", total);
    json_object_foreach(map, name, shard) {
        const struct fq_checkpoint_tensor named = {.name = name, .file = json_string_value(shard)};
        const struct fq_checkpoint_tensor *key = &named;

        if (bsearch(&key, all, total, sizeof *all, by_name_and_file))
            continue;
        rc = fq_fail(err, FQ_FORMAT, FQ_INDEX_FILE ": tensor '%.200s' is not in %s", name,
                     named.file);
        break;
    }
    for (size_t i = 0; i < total && rc == 0; i++)
        if (!json_object_get(map, all[i]->name))
            rc = fq_fail(err, FQ_FORMAT, "%s: tensor '%.200s' is not in " FQ_INDEX_FILE,
                         all[i]->file, all[i]->name);
    free(all);
    return rc;
}

/* A single file goes before an index, as transformers has it. */
int fq_shards_init(struct fq_shards *shards, const struct fq_directory *directory,
                   struct fq_error *err) {
    json_t *index = NULL;
    int rc;

    *shards = (struct fq_shards){0};
    if (fq_directory_has(directory, FQ_SINGLE_FILE))
        return open_shard(shards, directory, FQ_SINGLE_FILE, err);
    rc = fq_directory_read(directory, FQ_INDEX_FILE, &index, err);
    if (rc == -FQ_NOT_FOUND)
        return fq_fail(err, FQ_NOT_FOUND,
                       "neither " FQ_SINGLE_FILE " nor " FQ_INDEX_FILE " is there");
    if (rc == 0)
        rc = open_indexed(shards, directory, index, err);
    if (rc == 0)
        rc = check_index(shards, index, err);
    json_decref(index);
    return rc;
}

void fq_shards_fini(struct fq_shards *shards) {
    for (size_t i = 0; i < shards->count; i++)
        fq_safetensors_free(shards->files[i]);
    free(shards->files);
    *shards = (struct fq_shards){0};
}
