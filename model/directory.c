/* SPDX-License-Identifier: Apache-2.0 */
/* Reading a JSON file of a checkpoint, strictly: one object, no key twice, a sane size. */
#include "directory.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#define JSON_BYTES_MAX ((long long)256 << 20)

int fq_directory_json(int dirfd, const char *name, json_t **out, struct fq_error *err) {
    struct stat status;
    json_error_t fault;
    FILE *stream;
    int rc = 0;
    int fd = openat(dirfd, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK);

    if (fd < 0)
        return fq_fail_errno(err, "%s", name);
    if (fstat(fd, &status) < 0)
        rc = fq_fail_errno(err, "%s", name);
    else if (!S_ISREG(status.st_mode) || status.st_size > JSON_BYTES_MAX)
        rc = fq_fail(err, FQ_FORMAT, "%s: not a regular file of at most %lld bytes", name,
                     JSON_BYTES_MAX);
    if (rc < 0) {
        close(fd);
        return rc;
    }
    stream = fdopen(fd, "r");
    if (!stream) {
        rc = fq_fail_errno(err, "%s", name);
        close(fd);
        return rc;
    }
    *out = json_loadf(stream, JSON_REJECT_DUPLICATES, &fault);
    fclose(stream);
    if (!*out)
        return fq_fail(err, FQ_FORMAT, "%s: line %d: %s", name, fault.line, fault.text);
    if (!json_is_object(*out)) {
        json_decref(*out);
        *out = NULL;
        return fq_fail(err, FQ_FORMAT, "%s: not a JSON object", name);
    }
    return 0;
}
