/* SPDX-License-Identifier: Apache-2.0 */
/* Opening a checkpoint's files.  They are taken as hostile: no FIFO, no device, no endless JSON. */
#include "directory.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define JSON_BYTES_MAX ((long long)256 << 20)

const struct fq_memory_file *fq_directory_memory(const struct fq_directory *directory,
                                                 const char *name) {
    for (size_t i = 0; i < directory->count; i++)
        if (strcmp(directory->files[i].name, name) == 0)
            return &directory->files[i];
    return NULL;
}

bool fq_directory_has(const struct fq_directory *directory, const char *name) {
    return directory->fd < 0 ? fq_directory_memory(directory, name) != NULL
                             : faccessat(directory->fd, name, F_OK, 0) == 0;
}

/* Opens a regular file; the descriptor, or a negative status. */
static int open_regular(int dirfd, const char *name, long long *size, struct fq_error *err) {
    struct stat status;
    int rc = 0;
    /* O_NONBLOCK, so that a FIFO of that name does not hold us before fstat sees it */
    int fd = openat(dirfd, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK);

    if (fd < 0)
        return fq_fail_errno(err, "%.200s", name);
    if (fstat(fd, &status) < 0)
        rc = fq_fail_errno(err, "%.200s", name);
    else if (!S_ISREG(status.st_mode))
        rc = fq_fail(err, FQ_FORMAT, "%.200s: not a regular file", name);
    if (rc < 0) {
        close(fd);
        return rc;
    }
    *size = status.st_size;
    return fd;
}

/* Takes over JSON, which may be NULL for FAULT. */
static int take_object(json_t *json, const json_error_t *fault, const char *name, json_t **out,
                       struct fq_error *err) {
    if (!json)
        return fq_fail(err, FQ_FORMAT, "%.200s: line %d: %s", name, fault->line, fault->text);
    if (!json_is_object(json)) {
        json_decref(json);
        return fq_fail(err, FQ_FORMAT, "%.200s: not a JSON object", name);
    }
    *out = json;
    return 0;
}

int fq_directory_json(int dirfd, const char *name, json_t **out, struct fq_error *err) {
    json_error_t fault;
    json_t *json;
    long long size;
    FILE *stream;
    int rc;
    int fd = open_regular(dirfd, name, &size, err);

    if (fd < 0)
        return fd;
    if (size > JSON_BYTES_MAX) {
        close(fd);
        return fq_fail(err, FQ_FORMAT, "%.200s: %lld bytes, at most %lld are read", name, size,
                       JSON_BYTES_MAX);
    }
    stream = fdopen(fd, "r");
    if (!stream) {
        rc = fq_fail_errno(err, "%.200s", name);
        close(fd);
        return rc;
    }
    json = json_loadf(stream, JSON_REJECT_DUPLICATES, &fault);
    fclose(stream);
    return take_object(json, &fault, name, out, err);
}

int fq_directory_read(const struct fq_directory *directory, const char *name, json_t **out,
                      struct fq_error *err) {
    const struct fq_memory_file *file;
    json_error_t fault;

    if (directory->fd >= 0)
        return fq_directory_json(directory->fd, name, out, err);
    file = fq_directory_memory(directory, name);
    if (!file)
        return fq_fail(err, FQ_NOT_FOUND, "%.200s: is not there", name);
    return take_object(json_loadb(file->bytes, file->size, JSON_REJECT_DUPLICATES, &fault), &fault,
                       name, out, err);
}

int fq_directory_map(int dirfd, const char *name, size_t least, const void **bytes, size_t *size,
                     struct fq_error *err) {
    long long length;
    void *map = MAP_FAILED;
    int rc = 0;
    int fd = open_regular(dirfd, name, &length, err);

    if (fd < 0)
        return fd;
    if ((unsigned long long)length < least)
        rc = fq_fail(err, FQ_FORMAT, "%.200s: %lld bytes, too short for its first %zu", name,
                     length, least);
    else if ((map = mmap(NULL, (size_t)length, PROT_READ, MAP_PRIVATE, fd, 0)) == MAP_FAILED)
        rc = fq_fail_errno(err, "%.200s: mmap of %lld bytes", name, length);
    close(fd);
    if (rc < 0)
        return rc;
    *bytes = map;
    *size = (size_t)length;
    return 0;
}
