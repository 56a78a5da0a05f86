/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Reading a GGUF file's bytes in their order: what gguf.c and gguf-metadata.c
 * share.  Nothing is read before it is known to be there.
 */
#ifndef FQ_MODEL_GGUF_READER_H
#define FQ_MODEL_GGUF_READER_H

#include "gguf.h"

#define FQ_GGUF_NAME_BYTES_MAX 255

/* The bytes that are left. */
struct fq_gguf_cursor {
    const uint8_t *at;
    uint64_t left;
};

struct fq_gguf_text {
    const char *bytes; /* not terminated */
    uint64_t length;
};

struct fq_gguf_reader {
    struct fq_gguf *file;
    struct fq_gguf_cursor cursor;
    uint64_t alignment; /* of the data, as the metadata says */
    struct fq_error *err;
};

/* Each takes what it reads off the front, or returns false where that much is not left. */
bool fq_gguf_take(struct fq_gguf_cursor *cursor, uint64_t bytes, const uint8_t **out);
bool fq_gguf_take_number(struct fq_gguf_cursor *cursor, int bytes, uint64_t *out);
bool fq_gguf_take_text(struct fq_gguf_cursor *cursor, struct fq_gguf_text *out);

/* A copy of a name, 1 to FQ_GGUF_NAME_BYTES_MAX bytes of UTF-8 without NUL: the caller's to free;
 * NULL for anything else. */
char *fq_gguf_name(struct fq_gguf_text text);

/* Reads COUNT keys into file->metadata, and the alignment.  -FQ_FORMAT, -FQ_UNSUPPORTED,
 * -FQ_NO_MEMORY. */
int fq_gguf_read_metadata(struct fq_gguf_reader *reader, uint64_t count);

#endif
