/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What stands in for libFuzzer where there is no clang: runs the target once for each file of the
 * directories that are named, in a buffer of its exact size, and for each of its beginnings.  A
 * whole seed must be accepted, or it would lead a fuzzer nowhere.
 */
#include "fuzz.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static void run(const uint8_t *bytes, size_t size) {
    uint8_t *exact = malloc(size ? size : 1);

    memcpy(exact, bytes, size);
    LLVMFuzzerTestOneInput(exact, size);
    free(exact);
}

/* 1 for a file that was run, 0 for what is no file, -1 for one that cannot be read or is refused.
 */
static int run_file(int dirfd, const char *name) {
    struct stat status;
    uint8_t *bytes = NULL;
    int result = -1;
    int fd = openat(dirfd, name, O_RDONLY | O_CLOEXEC);

    if (fd < 0 || fstat(fd, &status) < 0) {
        perror(name);
        goto out;
    }
    result = 0;
    if (!S_ISREG(status.st_mode))
        goto out;
    bytes = malloc((size_t)status.st_size + 1);
    result = bytes && read(fd, bytes, (size_t)status.st_size) == status.st_size ? 1 : -1;
    if (result < 0)
        perror(name);
    for (off_t size = status.st_size; result == 1 && size >= 0; size--) {
        size_t accepted = fuzz_accepted;

        run(bytes, (size_t)size);
        if (size == status.st_size && fuzz_accepted == accepted) {
            fprintf(stderr, "%s: the whole seed is refused\n", name);
            result = -1;
        }
    }
out:
    free(bytes);
    if (fd >= 0)
        close(fd);
    return result;
}

int main(int argc, char **argv) {
    int count = 0;

    for (int i = 1; i < argc; i++) {
        DIR *directory = opendir(argv[i]);
        struct dirent *entry;

        if (!directory) {
            perror(argv[i]);
            return 1;
        }
        while ((entry = readdir(directory))) {
            int result = run_file(dirfd(directory), entry->d_name);

            if (result < 0)
                return 1;
            count += result;
        }
        closedir(directory);
    }
    printf("%d seeds, with all their beginnings\n", count);
    return count > 0 ? 0 : 1;
}
