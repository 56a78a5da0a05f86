/* SPDX-License-Identifier: Apache-2.0 */
/* --compare-copy: what the same disk does when a file is merely copied. */
#include "quantize-report.h"

#include <dirent.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define COPY_MAX ((uint64_t)2000000000)
#define CHUNK    ((size_t)8 << 20)

/* The largest safetensors file of the directory, opened; or a negative status. */
static int open_largest(const char *in, struct fq_error *err) {
    DIR *directory = opendir(in);
    struct dirent *entry;
    off_t largest = -1;
    int best = -1;

    while (directory && (entry = readdir(directory))) {
        struct stat status;
        int fd;

        if (fnmatch("*.safetensors", entry->d_name, 0) != 0 ||
            (fd = openat(dirfd(directory), entry->d_name, O_RDONLY | O_CLOEXEC)) < 0)
            continue;
        if (fstat(fd, &status) == 0 && status.st_size > largest) {
            largest = status.st_size;
            if (best >= 0)
                close(best);
            best = fd;
        } else {
            close(fd);
        }
    }
    if (directory)
        closedir(directory);
    return best >= 0 ? best : fq_fail(err, FQ_NOT_FOUND, "%.200s: no file to copy", in);
}

/* Bytes copied, 0 on an error that errno has. */
static uint64_t copy(int from, int to) {
    char *buffer = malloc(CHUNK);
    uint64_t total = 0;
    ssize_t count = -1;

    while (buffer && total < COPY_MAX && (count = read(from, buffer, CHUNK)) > 0) {
        for (ssize_t done = 0, more; done < count; done += more)
            if ((more = write(to, buffer + done, (size_t)(count - done))) < 0) {
                free(buffer);
                return 0;
            }
        total += (uint64_t)count;
    }
    free(buffer);
    return count < 0 || fsync(to) < 0 ? 0 : total;
}

int quantize_report_copy(struct quantize_report *report, const struct fq_quantize_summary *summary,
                         struct fq_error *err) {
    struct timespec begin, end;
    char *path = NULL;
    uint64_t bytes = 0;
    double seconds;
    int from = open_largest(report->in, err), to = -1, rc = from < 0 ? from : 0;

    if (rc == 0 && asprintf(&path, "%s/copy.XXXXXX", report->out) < 0) {
        path = NULL;
        rc = fq_fail(err, FQ_NO_MEMORY, "no memory to copy");
    }
    if (rc == 0 && (to = mkstemp(path)) < 0)
        rc = fq_fail_errno(err, "%.200s", path);
    if (rc == 0) {
        unlink(path);
        posix_fadvise(from, 0, 0, POSIX_FADV_DONTNEED); /* from the disk, as ours was */
        clock_gettime(CLOCK_MONOTONIC, &begin);
        bytes = copy(from, to);
        clock_gettime(CLOCK_MONOTONIC, &end);
        if (bytes == 0)
            rc = fq_fail_errno(err, "copying");
    }
    if (rc == 0) {
        seconds =
            (double)(end.tv_sec - begin.tv_sec) + (double)(end.tv_nsec - begin.tv_nsec) * 1e-9;
        fprintf(report->json ? stderr : stdout,
                "quantized %.2f GB at %.2f GB/s; a plain copy of %.2f GB: %.2f GB/s\n",
                (double)summary->tensors_before * 1e-9,
                (double)summary->tensors_before * 1e-9 / report->seconds, (double)bytes * 1e-9,
                (double)bytes * 1e-9 / seconds);
    }
    if (to >= 0)
        close(to);
    if (from >= 0)
        close(from);
    free(path);
    return rc;
}
