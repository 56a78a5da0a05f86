/* SPDX-License-Identifier: Apache-2.0 */
/* Filling, committing and abandoning the directory that output-directory.h describes. */
#include "output-directory.h"

#include "directory.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <libgen.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

int fq_output_directory_init(struct fq_output_directory *output, const char *path,
                             struct fq_error *err) {
    char *parent = strdup(path), *base = strdup(path);
    struct stat status;
    int rc = 0;

    *output = (struct fq_output_directory){.parentfd = -1, .fd = -1};
    if (!parent || !base || !(output->name = strdup(basename(base))) ||
        asprintf(&output->temporary, "%s.partial-%ld", output->name, (long)getpid()) < 0) {
        output->temporary = NULL;
        rc = fq_fail(err, FQ_NO_MEMORY, "%.200s: no memory to make it", path);
        goto out;
    }
    output->parentfd = open(dirname(parent), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (output->parentfd < 0) {
        rc = fq_fail_errno(err, "%.200s: the directory it goes into", path);
        goto out;
    }
    if (fstatat(output->parentfd, output->name, &status, AT_SYMLINK_NOFOLLOW) == 0) {
        rc = fq_fail(err, FQ_EXISTS, "%.200s exists; it must be a new directory", path);
        goto out;
    }
    if (mkdirat(output->parentfd, output->temporary, 0777) < 0) {
        rc = fq_fail_errno(err, "%.200s", output->temporary);
        free(output->temporary); /* not ours to remove */
        output->temporary = NULL;
        goto out;
    }
    output->fd = openat(output->parentfd, output->temporary, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (output->fd < 0)
        rc = fq_fail_errno(err, "%.200s", output->temporary);
out:
    free(parent);
    free(base);
    if (rc < 0)
        fq_output_directory_fini(output);
    return rc;
}

static int create(struct fq_output_directory *output, const char *name, struct fq_error *err) {
    int fd = openat(output->fd, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);

    return fd < 0 ? fq_fail_errno(err, "%.200s", name) : fd;
}

int fq_output_directory_json(struct fq_output_directory *output, const char *name,
                             const json_t *json, struct fq_error *err) {
    FILE *stream;
    bool written;
    int fd = create(output, name, err);

    if (fd < 0)
        return fd;
    stream = fdopen(fd, "w");
    if (!stream) {
        close(fd);
        return fq_fail_errno(err, "%s", name);
    }
    written = json_dumpf(json, stream, JSON_INDENT(2)) == 0 && fputc('\n', stream) != EOF &&
              fflush(stream) == 0 && fsync(fd) == 0;
    if (fclose(stream) != 0 || !written)
        return fq_fail_errno(err, "%s: writing", name);
    return 0;
}

static int write_all(int fd, const char *bytes, size_t count) {
    while (count > 0) {
        ssize_t done = write(fd, bytes, count);

        if (done < 0 && errno != EINTR)
            return -1;
        if (done > 0) {
            bytes += done;
            count -= (size_t)done;
        }
    }
    return 0;
}

static int copy_file(struct fq_output_directory *output, int from, const char *name,
                     struct fq_error *err) {
    char buffer[65536];
    ssize_t count;
    int rc = 0;
    int to = create(output, name, err);

    if (to < 0)
        return to;
    while ((count = read(from, buffer, sizeof buffer)) != 0) {
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0 || write_all(to, buffer, (size_t)count) < 0) {
            rc = fq_fail_errno(err, "%.200s: copying", name);
            break;
        }
    }
    if (rc == 0 && fsync(to) < 0)
        rc = fq_fail_errno(err, "%.200s: fsync", name);
    close(to);
    return rc;
}

/* What belongs to a model but is no weight; weights in other formats would be stale. */
static bool is_companion(const char *name) {
    static const char *const patterns[] = {"*.json",  "*.txt",   "*.model",  "*.jinja",
                                           "*.md",    "*.py",    "vocab*",   "tokenizer*",
                                           "merges*", "README*", "LICENSE*", "NOTICE*"};

    if (strcmp(name, FQ_CONFIG_FILE) == 0 || fnmatch("*.safetensors*", name, 0) == 0 ||
        fnmatch("*.index.json", name, 0) == 0)
        return false; /* ours to write */
    if (strcmp(name, "quantize_config.json") == 0 || strcmp(name, "quant_config.json") == 0)
        return false; /* of the format that IN had */
    for (size_t i = 0; i < sizeof patterns / sizeof patterns[0]; i++)
        if (fnmatch(patterns[i], name, FNM_PERIOD) == 0)
            return true;
    return false;
}

int fq_output_directory_copy(struct fq_output_directory *output, const char *from,
                             struct fq_error *err) {
    DIR *directory = opendir(from);
    struct dirent *entry;
    int rc = 0;

    if (!directory)
        return fq_fail_errno(err, "%.200s", from);
    while (rc == 0 && (entry = readdir(directory))) {
        struct stat status;
        int fd;

        if (!is_companion(entry->d_name))
            continue;
        fd = openat(dirfd(directory), entry->d_name, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        if (fd < 0) {
            rc = fq_fail_errno(err, "%.200s", entry->d_name);
            break;
        }
        if (fstat(fd, &status) == 0 && S_ISREG(status.st_mode))
            rc = copy_file(output, fd, entry->d_name, err);
        close(fd);
    }
    closedir(directory);
    return rc;
}

int fq_output_directory_commit(struct fq_output_directory *output, struct fq_error *err) {
    if (fsync(output->fd) < 0)
        return fq_fail_errno(err, "%.200s: fsync", output->temporary);
    if (renameat2(output->parentfd, output->temporary, output->parentfd, output->name,
                  RENAME_NOREPLACE) < 0) {
        if (errno == EEXIST)
            return fq_fail(err, FQ_EXISTS, "%.200s has come to exist meanwhile", output->name);
        /* a file system without the flag: _init saw that nothing was there */
        if (errno != EINVAL ||
            renameat(output->parentfd, output->temporary, output->parentfd, output->name) < 0)
            return fq_fail_errno(err, "%.200s: rename", output->name);
    }
    free(output->temporary);
    output->temporary = NULL;
    if (fsync(output->parentfd) < 0)
        return fq_fail_errno(err, "%.200s: fsync of its directory", output->name);
    return 0;
}

/* The files are ours: plain ones, no directory among them. */
static void remove_files(int fd) {
    int copy = dup(fd);
    DIR *directory = copy < 0 ? NULL : fdopendir(copy);
    struct dirent *entry;

    if (!directory) {
        if (copy >= 0)
            close(copy);
        return;
    }
    rewinddir(directory);
    while ((entry = readdir(directory)))
        unlinkat(fd, entry->d_name, 0);
    closedir(directory);
}

void fq_output_directory_fini(struct fq_output_directory *output) {
    if (output->temporary && output->parentfd >= 0) {
        if (output->fd >= 0)
            remove_files(output->fd);
        unlinkat(output->parentfd, output->temporary, AT_REMOVEDIR);
    }
    if (output->fd >= 0)
        close(output->fd);
    if (output->parentfd >= 0)
        close(output->parentfd);
    free(output->temporary);
    free(output->name);
    *output = (struct fq_output_directory){.parentfd = -1, .fd = -1};
}
