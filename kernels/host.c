/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What backends that compute on the host have in common: sealed memfds as
 * shareable memory, streams and events that are always reached (a GEMM has
 * ended when its call returns), and what the machine says of itself; and a copy
 * of rows by threads, by which cuda loads.
 */
#include "backend-impl.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define SEALS (F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL)

static int map(struct fq_memory *memory, int fd, uint64_t bytes, struct fq_error *err) {
    void *host = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

    if (host == MAP_FAILED)
        return fq_fail_errno(err, "mapping %llu bytes of shared memory", (unsigned long long)bytes);
    memory->kind = FQ_MEMORY_HOST;
    memory->bytes = bytes;
    memory->host = host;
    memory->address = host;
    memory->fd = fd;
    return 0;
}

int fq_host_memory_init(struct fq_memory *memory, uint64_t bytes, struct fq_error *err) {
    uint64_t total, available;
    int status;

    /* The kernel would hand out any size and kill a process once the pages are touched. */
    fq_host_memory_info(&total, &available);
    if (bytes > available)
        return fq_fail(err, FQ_NO_MEMORY, "%llu bytes of host memory, of which %llu are free",
                       (unsigned long long)bytes, (unsigned long long)available);
    int fd = memfd_create("finequant-buffer", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    if (fd < 0)
        return fq_fail_errno(err, "making a memfd");
    if (ftruncate(fd, (off_t)bytes) != 0) {
        status = fq_fail_errno(err, "sizing a memfd to %llu bytes", (unsigned long long)bytes);
        goto close_fd;
    }
    if (fcntl(fd, F_ADD_SEALS, SEALS) != 0) {
        status = fq_fail_errno(err, "sealing a memfd");
        goto close_fd;
    }
    status = map(memory, fd, bytes, err);
    if (status == 0)
        return 0;
close_fd:
    close(fd);
    return status;
}

int fq_host_memory_init_from_fd(struct fq_memory *memory, int fd, uint64_t bytes,
                                struct fq_error *err) {
    struct stat stat;
    int status;
    int own = fcntl(fd, F_DUPFD_CLOEXEC, 0);

    if (own < 0)
        return fq_fail_errno(err, "duplicating file descriptor %d", fd);
    int seals = fcntl(own, F_GET_SEALS);
    if (seals < 0 || !(seals & F_SEAL_SHRINK)) {
        status = fq_fail(err, FQ_INVALID, "the descriptor is no memfd sealed against shrinking");
        goto close_fd;
    }
    if (fstat(own, &stat) != 0 || (uint64_t)stat.st_size < bytes) {
        status = fq_fail(err, FQ_INVALID, "the memfd is shorter than %llu bytes",
                         (unsigned long long)bytes);
        goto close_fd;
    }
    status = map(memory, own, bytes, err);
    if (status == 0)
        return 0;
close_fd:
    close(own);
    return status;
}

void fq_host_memory_fini(struct fq_memory *memory) {
    munmap(memory->host, memory->bytes);
    close(memory->fd);
}

int fq_host_memory_new(struct fq_backend *backend, enum fq_memory_kind kind, uint64_t bytes,
                       struct fq_memory **out, struct fq_error *err) {
    if (kind != FQ_MEMORY_HOST)
        return fq_fail(err, FQ_UNSUPPORTED, "the %s backend has no device memory",
                       backend->ops->name);
    struct fq_memory *memory = calloc(1, sizeof *memory);
    if (!memory)
        return fq_fail(err, FQ_NO_MEMORY, "no memory");
    int status = fq_host_memory_init(memory, bytes, err);
    if (status) {
        free(memory);
        return status;
    }
    memory->backend = backend;
    *out = memory;
    return 0;
}

int fq_host_memory_import(struct fq_backend *backend, const struct fq_memory_handle *handle,
                          struct fq_memory **out, struct fq_error *err) {
    if (handle->kind != FQ_MEMORY_HOST)
        return fq_fail(err, FQ_UNSUPPORTED, "the %s backend has no device memory",
                       backend->ops->name);
    struct fq_memory *memory = calloc(1, sizeof *memory);
    if (!memory)
        return fq_fail(err, FQ_NO_MEMORY, "no memory");
    int status = fq_host_memory_init_from_fd(memory, handle->fd, handle->bytes, err);
    if (status) {
        free(memory);
        return status;
    }
    memory->backend = backend;
    *out = memory;
    return 0;
}

int fq_host_memory_export(struct fq_memory *memory, struct fq_memory_handle *handle,
                          struct fq_error *err) {
    (void)err;
    handle->fd = memory->fd;
    return 0;
}

void fq_host_memory_free(struct fq_memory *memory) {
    fq_host_memory_fini(memory);
    free(memory);
}

int fq_host_stream_new(struct fq_backend *backend, struct fq_stream **out, struct fq_error *err) {
    struct fq_stream *stream = calloc(1, sizeof *stream);

    if (!stream)
        return fq_fail(err, FQ_NO_MEMORY, "no memory");
    stream->backend = backend;
    *out = stream;
    return 0;
}

void fq_host_stream_free(struct fq_stream *stream) {
    free(stream);
}

int fq_host_event_new(struct fq_backend *backend, struct fq_event **out, struct fq_error *err) {
    struct fq_event *event = calloc(1, sizeof *event);

    if (!event)
        return fq_fail(err, FQ_NO_MEMORY, "no memory");
    event->backend = backend;
    *out = event;
    return 0;
}

void fq_host_event_free(struct fq_event *event) {
    free(event);
}

int fq_host_event_record(struct fq_event *event, struct fq_stream *stream, struct fq_error *err) {
    (void)event;
    (void)stream;
    (void)err;
    return 0;
}

int fq_host_event_query(struct fq_event *event, struct fq_error *err) {
    (void)event;
    (void)err;
    return 1;
}

int fq_host_event_wait(struct fq_event *event, struct fq_error *err) {
    (void)event;
    (void)err;
    return 0;
}

/* The value in bytes of a "Name:   123 kB" line of a /proc file; 0 where there is none. */
static uint64_t proc_kilobytes(const char *path, const char *name) {
    char line[256];
    unsigned long long value = 0;
    FILE *file = fopen(path, "re");

    if (!file)
        return 0;
    while (fgets(line, sizeof line, file))
        if (strncmp(line, name, strlen(name)) == 0 &&
            sscanf(line + strlen(name), ": %llu", &value) == 1)
            break;
    fclose(file);
    return value * 1024;
}

/* The first number of a file; UINT64_MAX for "max" or no such file. */
static uint64_t file_number(const char *folder, const char *name) {
    char path[PATH_MAX];
    unsigned long long value = UINT64_MAX;
    FILE *file;

    snprintf(path, sizeof path, "%s/%s", folder, name);
    file = fopen(path, "re");
    if (!file)
        return UINT64_MAX;
    if (fscanf(file, "%llu", &value) != 1)
        value = UINT64_MAX;
    fclose(file);
    return value;
}

/* The value of a "name 123" line of a control group's memory.stat; 0 where there is none. */
static uint64_t memory_stat(const char *folder, const char *name) {
    char path[PATH_MAX], key[64];
    unsigned long long value, found = 0;
    FILE *file;

    snprintf(path, sizeof path, "%s/memory.stat", folder);
    file = fopen(path, "re");
    if (!file)
        return 0;
    while (fscanf(file, "%63s %llu", key, &value) == 2)
        if (strcmp(key, name) == 0)
            found = value;
    fclose(file);
    return found;
}

/* Lowers total and available to what one control group allows.  The inactive page cache counts as
 * available: the kernel drops it first. */
static void apply_limit(const char *folder, const char *limit_file, const char *usage_file,
                        const char *cache_name, uint64_t *total, uint64_t *available) {
    uint64_t limit = file_number(folder, limit_file);
    uint64_t used = file_number(folder, usage_file);
    uint64_t cache = memory_stat(folder, cache_name);

    if (limit >= *total || used == UINT64_MAX)
        return;
    used -= cache < used ? cache : used;
    uint64_t left = used < limit ? limit - used : 0;

    *total = limit;
    if (left < *available)
        *available = left;
}

/* The group of this process in a hierarchy of /proc/self/cgroup: "0::" is version 2, and
 * "N:...memory...:" version 1.  Without the hierarchy's prefix; false where it is not in use. */
static bool cgroup_path(bool version_1, char *path, size_t size) {
    char line[PATH_MAX];
    bool found = false;
    FILE *file = fopen("/proc/self/cgroup", "re");

    if (!file)
        return false;
    while (!found && fgets(line, sizeof line, file)) {
        char *controllers = strchr(line, ':');
        char *group = controllers ? strchr(controllers + 1, ':') : NULL;

        if (!group)
            continue;
        *group++ = '\0';
        group[strcspn(group, "\n")] = '\0';
        found = version_1 ? strstr(controllers, "memory") != NULL : controllers[1] == '\0';
        if (found)
            snprintf(path, size, "%s", strcmp(group, "/") == 0 ? "" : group);
    }
    fclose(file);
    return found;
}

/* Every group from this process's own up to the root limits it.  In a container the path may name a
 * group outside of what is mounted; the mount's root is then its own. */
static void apply_limits(bool version_1, uint64_t *total, uint64_t *available) {
    const char *root = version_1 ? "/sys/fs/cgroup/memory" : "/sys/fs/cgroup";
    char path[PATH_MAX / 2], folder[PATH_MAX];

    if (!cgroup_path(version_1, path, sizeof path))
        return;
    for (;;) {
        snprintf(folder, sizeof folder, "%s%s", root, path);
        if (version_1)
            apply_limit(folder, "memory.limit_in_bytes", "memory.usage_in_bytes",
                        "total_inactive_file", total, available);
        else
            apply_limit(folder, "memory.max", "memory.current", "inactive_file", total, available);
        char *slash = strrchr(path, '/');
        if (!slash)
            break;
        *slash = '\0';
    }
}

void fq_host_memory_info(uint64_t *total, uint64_t *available) {
    *total = proc_kilobytes("/proc/meminfo", "MemTotal");
    *available = proc_kilobytes("/proc/meminfo", "MemAvailable");
    apply_limits(false, total, available);
    apply_limits(true, total, available);
}

void fq_host_processor_name(char *name, size_t size) {
    char line[256];
    FILE *file = fopen("/proc/cpuinfo", "re");

    snprintf(name, size, "unknown processor");
    if (!file)
        return;
    while (fgets(line, sizeof line, file)) {
        char *colon = strchr(line, ':');

        if (strncmp(line, "model name", 10) == 0 && colon) {
            colon[strcspn(colon, "\n")] = '\0';
            snprintf(name, size, "%s", colon + 2);
            break;
        }
    }
    fclose(file);
}

int fq_host_threads(void) {
#ifdef _OPENMP
    cpu_set_t set;

    if (sched_getaffinity(0, sizeof set, &set) == 0)
        return CPU_COUNT(&set);
#endif
    return 1;
}

/* One thread copies a sixth of what a GPU takes, eight most of it (cuda/NOTES.md). */
#define COPY_THREADS 8
#define COPY_BYTES   ((uint64_t)512 * 1024) /* that a thread is worth */

void fq_host_copy_rows(void *to, const void *from, int64_t rows, uint64_t width, uint64_t pitch) {
    const int64_t worth = (int64_t)((uint64_t)rows * width / COPY_BYTES);
    int threads = fq_host_threads();

    if (threads > COPY_THREADS)
        threads = COPY_THREADS;
    if (threads > worth)
        threads = worth > 1 ? (int)worth : 1;
    if (threads > rows)
        threads = (int)rows;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++)
        memcpy((char *)to + (uint64_t)row * width, (const char *)from + (uint64_t)row * pitch,
               width);
}
