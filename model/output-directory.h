/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A directory that appears whole or not at all: filled under a temporary name
 * beside its place, synced, and renamed without replacing anything.  Internal
 * to model/; one thread an object.
 */
#ifndef FQ_MODEL_OUTPUT_DIRECTORY_H
#define FQ_MODEL_OUTPUT_DIRECTORY_H

#include "error.h"

#include <jansson.h>

struct fq_output_directory {
    int parentfd;
    int fd;          /* the directory being filled */
    char *name;      /* base name, when done */
    char *temporary; /* base name now; NULL once renamed */
};

/* Makes PATH.partial-PID.  -FQ_EXISTS where PATH is there already. */
int fq_output_directory_init(struct fq_output_directory *output, const char *path,
                             struct fq_error *err);
/* Writes and syncs one JSON file. */
int fq_output_directory_json(struct fq_output_directory *output, const char *name,
                             const json_t *json, struct fq_error *err);
/* Copies the files beside the weights: configuration, tokenizer, vocabulary, texts. */
int fq_output_directory_copy(struct fq_output_directory *output, const char *from,
                             struct fq_error *err);
int fq_output_directory_commit(struct fq_output_directory *output, struct fq_error *err);
/* Removes what was not committed. */
void fq_output_directory_fini(struct fq_output_directory *output);

#endif
