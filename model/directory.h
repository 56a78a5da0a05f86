/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The file names of a Hugging Face directory, and reading its JSON files.
 * Internal to model/; any thread.
 */
#ifndef FQ_MODEL_DIRECTORY_H
#define FQ_MODEL_DIRECTORY_H

#include "error.h"

#include <jansson.h>

#define FQ_CONFIG_FILE "config.json"
#define FQ_SINGLE_FILE "model.safetensors"
#define FQ_INDEX_FILE  "model.safetensors.index.json"

/*
 * Reads the JSON object in NAME beneath DIRFD; *out is the caller's to decref.  Errors name the
 * file: -FQ_NOT_FOUND, -FQ_DENIED, -FQ_IO, -FQ_FORMAT.
 */
int fq_directory_json(int dirfd, const char *name, json_t **out, struct fq_error *err);

#endif
