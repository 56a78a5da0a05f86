/* SPDX-License-Identifier: Apache-2.0 */
/* --compare-copy: what the same disk does when a file is merely copied. */
#include "quantize-report.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define COPY_MAX ((uint64_t)2000000000)
#define CHUNK    ((size_t)8 << 20)

/* What was copied so far, and the buffer that it goes through. */
struct copy {
    int to;
    char *buffer;
    uint64_t bytes;
    size_t files;
};

static int is_weights(const struct dirent *entry) {
    return fnmatch("*.safetensors", entry->d_name, 0) == 0;
}

static int write_all(int to, const char *bytes, ssize_t count) {
    for (ssize_t done = 0, more; done < count; done += more)
        if ((more = write(to, bytes + done, (size_t)(count - done))) < 0)
            return -1;
    return 0;
}

/* One file, up to what is left of COPY_MAX; from the disk, as ours was.  -1 where errno says why.
 */
static int copy_file(struct copy *copy, int directory, const char *name) {
    int from = openat(directory, name, O_RDONLY | O_CLOEXEC);
    ssize_t count = -1;

    if (from < 0)
        return -1;
    posix_fadvise(from, 0, 0, POSIX_FADV_DONTNEED);
    copy->files++;
    while (copy->bytes < COPY_MAX) {
        const uint64_t left = COPY_MAX - copy->bytes;

        count = read(from, copy->buffer, left < CHUNK ? (size_t)left : CHUNK);
        if (count <= 0 || write_all(copy->to, copy->buffer, count) < 0)
            break;
        copy->bytes += (uint64_t)count;
    }
    close(from);
    return count == 0 || copy->bytes == COPY_MAX ? 0 : -1;
}

/* The directory's files, by name; a GGUF file is itself all there is. */
static int copy_files(struct copy *copy, const char *in, struct fq_error *err) {
    struct dirent **entries = NULL;
    int count = scandir(in, &entries, is_weights, alphasort);
    int directory = open(in, O_RDONLY | O_DIRECTORY | O_CLOEXEC), rc = 0;

    if (directory < 0 && (errno != ENOTDIR || copy_file(copy, AT_FDCWD, in) < 0))
        rc = fq_fail_errno(err, "copying %.200s", in);
    for (int i = 0; i < count; i++) {
        if (rc == 0 && copy->bytes < COPY_MAX && copy_file(copy, directory, entries[i]->d_name) < 0)
            rc = fq_fail_errno(err, "copying %.200s", entries[i]->d_name);
        free(entries[i]);
    }
    free(entries);
    if (directory >= 0)
        close(directory);
    if (rc == 0 && fsync(copy->to) < 0)
        rc = fq_fail_errno(err, "copying: fsync");
    return rc;
}

/* A file beside OUT's that nobody sees and that goes with its descriptor, or a negative status. */
static int open_unnamed(const char *out, struct fq_error *err) {
    char *path;
    int fd;

    if (asprintf(&path, "%s/copy.XXXXXX", out) < 0)
        return fq_fail(err, FQ_NO_MEMORY, "no memory to copy");
    fd = mkstemp(path);
    if (fd < 0)
        fd = fq_fail_errno(err, "%.200s", path);
    else
        unlink(path);
    free(path);
    return fd;
}

int quantize_report_copy(struct quantize_report *report, const struct fq_quantize_summary *summary,
                         struct fq_error *err) {
    struct timespec begin, end;
    struct copy copy = {.to = open_unnamed(report->out, err), .buffer = malloc(CHUNK)};
    const double quantized = (double)summary->tensors_before * 1e-9;
    double seconds;
    int rc = copy.to < 0   ? copy.to
             : copy.buffer ? 0
                           : fq_fail(err, FQ_NO_MEMORY, "no memory to copy");

    clock_gettime(CLOCK_MONOTONIC, &begin);
    if (rc == 0)
        rc = copy_files(&copy, report->in, err);
    clock_gettime(CLOCK_MONOTONIC, &end);
    seconds = (double)(end.tv_sec - begin.tv_sec) + (double)(end.tv_nsec - begin.tv_nsec) * 1e-9;
    if (rc == 0)
        fprintf(report->json ? stderr : stdout,
                "quantized %.2f GB at %.2f GB/s; a plain copy of %" PRIu64
                " bytes of %zu files: %.2f GB/s\n",
                quantized, quantized / report->seconds, copy.bytes, copy.files,
                (double)copy.bytes * 1e-9 / seconds);
    if (copy.to >= 0)
        close(copy.to);
    free(copy.buffer);
    return rc;
}
