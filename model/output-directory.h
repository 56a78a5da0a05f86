/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A directory that appears whole or not at all: filled as NAME.partial beside
 * its place, synced, and renamed without replacing anything.  A partial one that
 * a killed process left is taken up again.  Internal to model/; one thread an
 * object.
 */
#ifndef FQ_MODEL_OUTPUT_DIRECTORY_H
#define FQ_MODEL_OUTPUT_DIRECTORY_H

#include "error.h"

#include <jansson.h>
#include <stdbool.h>

/* What a run writes first, by fq_output_directory_json, if another is to go on with it. */
#define FQ_OUTPUT_STATE_FILE "finequant-resume.json"

struct fq_output_directory {
    int parentfd;
    int fd;          /* the directory being filled */
    char *name;      /* base name, when done */
    char *temporary; /* base name now; NULL once renamed */
    bool found;      /* it was there: its files are those of an earlier run */
    bool keep;       /* _fini leaves what was not committed to the next run */
};

/*
 * Makes PATH.partial, or takes up the one that is there, and locks it.  -FQ_EXISTS where PATH is
 * there already, or a partial one that is not empty and has no state file; -FQ_INVALID where PATH
 * is within the directory IN; -FQ_BUSY where another process fills it.
 */
int fq_output_directory_init(struct fq_output_directory *output, const char *path, const char *in,
                             struct fq_error *err);
/* Whether _init could begin PATH, as far as that is known without making it: 0, or its errors. */
int fq_output_directory_check(const char *path, const char *in, struct fq_error *err);
/* Removes what an earlier run left. */
void fq_output_directory_clear(struct fq_output_directory *output);
/* Writes and syncs one JSON file, which takes the place of an older one at once. */
int fq_output_directory_json(struct fq_output_directory *output, const char *name,
                             const json_t *json, struct fq_error *err);
/* Copies the files beside the weights: configuration, tokenizer, vocabulary, texts.  A
 * checkpoint that is one file has none. */
int fq_output_directory_copy(struct fq_output_directory *output, const char *from,
                             struct fq_error *err);
/* Renames it; the state file goes. */
int fq_output_directory_commit(struct fq_output_directory *output, struct fq_error *err);
/* Removes what was not committed, unless it is to be kept. */
void fq_output_directory_fini(struct fq_output_directory *output);

#endif
