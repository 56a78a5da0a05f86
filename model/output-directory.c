/* SPDX-License-Identifier: Apache-2.0 */
/* Filling, resuming, committing and abandoning the directory that output-directory.h describes. */
#include "output-directory.h"

#include "directory.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <libgen.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

/* What belongs to a model but is no weight; weights in other formats would be stale. */
static bool is_companion(const char *name) {
    static const char *const patterns[] = {"*.json",  "*.txt",   "*.model",  "*.jinja",
                                           "*.md",    "*.py",    "vocab*",   "tokenizer*",
                                           "merges*", "README*", "LICENSE*", "NOTICE*"};

    if (strcmp(name, FQ_CONFIG_FILE) == 0 || fnmatch("*.safetensors*", name, 0) == 0 ||
        fnmatch("*.index.json", name, 0) == 0 || strcmp(name, FQ_OUTPUT_STATE_FILE) == 0)
        return false; /* ours to write */
    if (strcmp(name, "quantize_config.json") == 0 || strcmp(name, "quant_config.json") == 0)
        return false; /* of the format that IN had */
    for (size_t i = 0; i < sizeof patterns / sizeof patterns[0]; i++)
        if (fnmatch(patterns[i], name, FNM_PERIOD) == 0)
            return true;
    return false;
}

/* Calls VISIT for each entry but "." and ".."; stops and returns false where it does. */
static bool for_entries(int fd, bool (*visit)(int fd, const char *name)) {
    int copy = openat(fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *directory = copy < 0 ? NULL : fdopendir(copy);
    struct dirent *entry;
    bool all = true;

    if (!directory) {
        if (copy >= 0)
            close(copy);
        return false;
    }
    while (all && (entry = readdir(directory)))
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            all = visit(fd, entry->d_name);
    closedir(directory);
    return all;
}

/* A state file that a killed process had not finished is ours; anything else is not. */
static bool refuse(int fd, const char *name) {
    (void)fd;
    return fnmatch(FQ_OUTPUT_STATE_FILE ".tmp-*", name, 0) == 0;
}

static bool remove_file(int fd, const char *name) {
    unlinkat(fd, name, 0);
    return true;
}

/* A writer that was killed leaves NAME.tmp-PID. */
static bool remove_unfinished(int fd, const char *name) {
    if (fnmatch("*.tmp-*", name, 0) == 0)
        unlinkat(fd, name, 0);
    return true;
}

static int open_partial(struct fq_output_directory *output, const char *path,
                        struct fq_error *err) {
    if (mkdirat(output->parentfd, output->temporary, 0777) < 0) {
        if (errno != EEXIST)
            return fq_fail_errno(err, "%.200s: making %.200s", path, output->temporary);
        output->found = true;
        output->keep = true; /* until it is known to be ours */
    }
    output->fd = openat(output->parentfd, output->temporary,
                        O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    if (output->fd < 0)
        return fq_fail_errno(err, "%.200s", output->temporary);
    if (flock(output->fd, LOCK_EX | LOCK_NB) < 0)
        return errno == EWOULDBLOCK
                   ? fq_fail(err, FQ_BUSY, "%.200s: another process fills it", output->temporary)
                   : fq_fail_errno(err, "%.200s: flock", output->temporary);
    if (output->found && faccessat(output->fd, FQ_OUTPUT_STATE_FILE, F_OK, 0) < 0 &&
        !for_entries(output->fd, refuse)) /* neither empty nor begun by us */
        return fq_fail(err, FQ_EXISTS, "%.200s exists and is not of this program's making",
                       output->temporary);
    output->keep = false;
    for_entries(output->fd, remove_unfinished);
    return 0;
}

void fq_output_directory_clear(struct fq_output_directory *output) {
    for_entries(output->fd, remove_file);
    output->found = false;
}

/* Whether the directory FD is IN or lies in it. */
static bool is_within(int fd, const char *in) {
    struct stat outer, here, above;
    bool within = false, root = stat(in, &outer) < 0 || fstat(fd, &here) < 0;

    fd = root ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 0);
    while (fd >= 0 && !root && !within) {
        int parent = openat(fd, "..", O_PATH | O_DIRECTORY | O_CLOEXEC);

        within = here.st_dev == outer.st_dev && here.st_ino == outer.st_ino;
        root = parent < 0 || fstat(parent, &above) < 0 ||
               (above.st_dev == here.st_dev && above.st_ino == here.st_ino);
        close(fd);
        fd = parent;
        here = above;
    }
    if (fd >= 0)
        close(fd);
    return within;
}

/* The directory that PATH will be in, opened, and the names there. */
static int find_place(struct fq_output_directory *output, const char *path, const char *in,
                      struct fq_error *err) {
    char *parent = strdup(path), *base = strdup(path);
    struct stat status;
    int rc = 0;

    *output = (struct fq_output_directory){.parentfd = -1, .fd = -1};
    if (!parent || !base || !(output->name = strdup(basename(base))) ||
        asprintf(&output->temporary, "%s.partial", output->name) < 0) {
        output->temporary = NULL;
        rc = fq_fail(err, FQ_NO_MEMORY, "%.200s: no memory to make it", path);
        goto out;
    }
    output->parentfd = open(dirname(parent), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (output->parentfd < 0)
        rc = fq_fail_errno(err, "%.200s: the directory it goes into", path);
    else if (fstatat(output->parentfd, output->name, &status, AT_SYMLINK_NOFOLLOW) == 0)
        rc = fq_fail(err, FQ_EXISTS, "%.200s exists; it must be a new directory", path);
    else if (is_within(output->parentfd, in))
        rc = fq_fail(err, FQ_INVALID, "%.200s is within the input, %.200s; it must be elsewhere",
                     path, in);
out:
    free(parent);
    free(base);
    return rc;
}

int fq_output_directory_init(struct fq_output_directory *output, const char *path, const char *in,
                             struct fq_error *err) {
    int rc = find_place(output, path, in, err);

    if (rc == 0)
        rc = open_partial(output, path, err);
    if (rc < 0)
        fq_output_directory_fini(output);
    return rc;
}

int fq_output_directory_check(const char *path, const char *in, struct fq_error *err) {
    struct fq_output_directory output;
    int rc = find_place(&output, path, in, err);

    if (rc == 0 && faccessat(output.parentfd, ".", W_OK | X_OK, AT_EACCESS) < 0)
        rc = fq_fail_errno(err, "%.200s: making %.200s", path, output.temporary);
    fq_output_directory_fini(&output);
    return rc;
}

static int create(struct fq_output_directory *output, const char *name, struct fq_error *err) {
    int fd = openat(output->fd, name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);

    return fd < 0 ? fq_fail_errno(err, "%.200s", name) : fd;
}

int fq_output_directory_json(struct fq_output_directory *output, const char *name,
                             const json_t *json, struct fq_error *err) {
    char unfinished[NAME_MAX + 1];
    FILE *stream;
    bool written;
    int fd, rc = 0;

    snprintf(unfinished, sizeof unfinished, "%s.tmp-%ld", name, (long)getpid());
    if ((fd = create(output, unfinished, err)) < 0)
        return fd;
    stream = fdopen(fd, "w");
    if (!stream) {
        close(fd);
        return fq_fail_errno(err, "%s", name);
    }
    written = json_dumpf(json, stream, JSON_INDENT(2)) == 0 && fputc('\n', stream) != EOF &&
              fflush(stream) == 0 && fsync(fd) == 0;
    if (fclose(stream) != 0 || !written || renameat(output->fd, unfinished, output->fd, name) < 0) {
        rc = fq_fail_errno(err, "%s: writing", name);
        unlinkat(output->fd, unfinished, 0);
    }
    return rc;
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

int fq_output_directory_copy(struct fq_output_directory *output, const char *from,
                             struct fq_error *err) {
    DIR *directory = opendir(from);
    struct dirent *entry;
    int rc = 0;

    if (!directory)
        return errno == ENOTDIR ? 0 : fq_fail_errno(err, "%.200s", from);
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
    unlinkat(output->fd, FQ_OUTPUT_STATE_FILE, 0);
    if (fsync(output->parentfd) < 0)
        return fq_fail_errno(err, "%.200s: fsync of its directory", output->name);
    return 0;
}

void fq_output_directory_fini(struct fq_output_directory *output) {
    if (output->temporary && output->fd >= 0 && !output->keep) {
        for_entries(output->fd, remove_file);
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
