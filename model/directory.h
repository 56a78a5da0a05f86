/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The file names of a Hugging Face directory, and reading its files: JSON
 * strictly, weights as mappings.  The files may also lie in memory, where tests
 * and fuzzers put them.  Internal to model/; any thread.
 */
#ifndef FQ_MODEL_DIRECTORY_H
#define FQ_MODEL_DIRECTORY_H

#include "checkpoint.h"

#include <jansson.h>

#define FQ_CONFIG_FILE "config.json"
#define FQ_SINGLE_FILE "model.safetensors"
#define FQ_INDEX_FILE  "model.safetensors.index.json"

/* Where a checkpoint's files are: beneath a directory, or in memory where fd is negative. */
struct fq_directory {
    int fd;                             /* borrowed */
    const struct fq_memory_file *files; /* borrowed */
    size_t count;
};

bool fq_directory_has(const struct fq_directory *directory, const char *name);
/* The bytes of NAME where the files are in memory; NULL where they are not, or it is not there. */
const struct fq_memory_file *fq_directory_memory(const struct fq_directory *directory,
                                                 const char *name);
/* As fq_directory_json, of either kind. */
int fq_directory_read(const struct fq_directory *directory, const char *name, json_t **out,
                      struct fq_error *err);

/*
 * Reads the JSON object in NAME beneath DIRFD; *out is the caller's to decref.  Errors name the
 * file: -FQ_NOT_FOUND, -FQ_DENIED, -FQ_IO, -FQ_FORMAT.
 */
int fq_directory_json(int dirfd, const char *name, json_t **out, struct fq_error *err);

/*
 * Maps the regular file NAME beneath DIRFD (or an absolute NAME) for reading, at least LEAST
 * bytes of it; *bytes is the caller's to munmap.  Errors name the file.
 */
int fq_directory_map(int dirfd, const char *name, size_t least, const void **bytes, size_t *size,
                     struct fq_error *err);

#endif
