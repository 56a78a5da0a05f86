/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Writing messages.  A pack holds one message at a time: begin it with
 * fq_pack_request, _reply, _error or _notification, give exactly the
 * announced number of fields, then send `fq_pack_data` as one frame.  Running
 * out of memory is remembered and reported by fq_pack_status at the end, so
 * that the calls between need no checks.  One thread at a time.
 *
 *     fq_pack_request(&pack, 7, "tensor.describe", 2);
 *     fq_pack_str(&pack, "model", model);
 *     fq_pack_str(&pack, "tensor", tensor);
 *     rc = fq_pack_status(&pack, err);
 */
#ifndef FQ_PROTO_PACK_H
#define FQ_PROTO_PACK_H

#include "error.h"

#include <msgpack.h>
#include <stdbool.h>

struct fq_pack {
    msgpack_sbuffer buffer;
    msgpack_packer packer;
    bool failed;
};

void fq_pack_init(struct fq_pack *pack);
void fq_pack_fini(struct fq_pack *pack);

/* Begin a message, dropping what the pack held.  `fields` counts the entries of its map. */
void fq_pack_request(struct fq_pack *pack, uint32_t id, const char *method, uint32_t fields);
void fq_pack_reply(struct fq_pack *pack, uint32_t id, uint32_t fields);
void fq_pack_notification(struct fq_pack *pack, const char *method, uint32_t fields);
/* A whole reply: err's status, or internal where it is none, and its message as valid UTF-8. */
void fq_pack_error(struct fq_pack *pack, uint32_t id, const struct fq_error *err);

/* One entry of the innermost open map; with key NULL, one element of the innermost open array. */
void fq_pack_u64(struct fq_pack *pack, const char *key, uint64_t value);
void fq_pack_i64(struct fq_pack *pack, const char *key, int64_t value);
void fq_pack_bool(struct fq_pack *pack, const char *key, bool value);
/* Bytes that are not UTF-8 (a path can have them) become '?'. */
void fq_pack_str(struct fq_pack *pack, const char *key, const char *value);
void fq_pack_bin(struct fq_pack *pack, const char *key, const void *bytes, size_t length);
/* The next `count` entries or elements are the new map's or array's. */
void fq_pack_map(struct fq_pack *pack, const char *key, uint32_t count);
void fq_pack_array(struct fq_pack *pack, const char *key, uint32_t count);
/* An object that was parsed, or built by hand. */
void fq_pack_object(struct fq_pack *pack, const char *key, const msgpack_object *object);

/* 0, or -FQ_NO_MEMORY where any call since the message began ran out. */
int fq_pack_status(const struct fq_pack *pack, struct fq_error *err);

static inline const void *fq_pack_data(const struct fq_pack *pack) {
    return pack->buffer.data;
}
static inline size_t fq_pack_length(const struct fq_pack *pack) {
    return pack->buffer.size;
}

#endif
