/* SPDX-License-Identifier: Apache-2.0 */
/* Writing messages: see pack.h. */
#include "pack.h"

#include "message.h"

#include <string.h>

void fq_pack_init(struct fq_pack *pack) {
    msgpack_sbuffer_init(&pack->buffer);
    msgpack_packer_init(&pack->packer, &pack->buffer, msgpack_sbuffer_write);
    pack->failed = false;
}

void fq_pack_fini(struct fq_pack *pack) {
    msgpack_sbuffer_destroy(&pack->buffer);
}

static void check(struct fq_pack *pack, int rc) {
    if (rc != 0)
        pack->failed = true;
}

static void put_str(struct fq_pack *pack, const char *text, size_t length) {
    check(pack, msgpack_pack_str(&pack->packer, length));
    while (length > 0) {
        size_t valid = fq_utf8_span(text, length);

        if (valid == 0) {
            check(pack, msgpack_pack_str_body(&pack->packer, "?", 1));
            valid = 1;
        } else {
            check(pack, msgpack_pack_str_body(&pack->packer, text, valid));
        }
        text += valid;
        length -= valid;
    }
}

static void put_key(struct fq_pack *pack, const char *key) {
    if (key)
        put_str(pack, key, strlen(key));
}

static void begin(struct fq_pack *pack, size_t parts, enum fq_message_kind kind) {
    msgpack_sbuffer_clear(&pack->buffer);
    pack->failed = false;
    check(pack, msgpack_pack_array(&pack->packer, parts));
    check(pack, msgpack_pack_uint8(&pack->packer, (uint8_t)kind));
}

void fq_pack_request(struct fq_pack *pack, uint32_t id, const char *method, uint32_t fields) {
    begin(pack, 4, FQ_MESSAGE_REQUEST);
    check(pack, msgpack_pack_uint32(&pack->packer, id));
    put_key(pack, method);
    check(pack, msgpack_pack_map(&pack->packer, fields));
}

void fq_pack_reply(struct fq_pack *pack, uint32_t id, uint32_t fields) {
    begin(pack, 4, FQ_MESSAGE_REPLY);
    check(pack, msgpack_pack_uint32(&pack->packer, id));
    check(pack, msgpack_pack_nil(&pack->packer));
    check(pack, msgpack_pack_map(&pack->packer, fields));
}

void fq_pack_notification(struct fq_pack *pack, const char *method, uint32_t fields) {
    begin(pack, 3, FQ_MESSAGE_NOTIFICATION);
    put_key(pack, method);
    check(pack, msgpack_pack_map(&pack->packer, fields));
}

void fq_pack_error(struct fq_pack *pack, uint32_t id, const struct fq_error *err) {
    int status = err->status < 0 ? -err->status : FQ_INTERNAL;

    begin(pack, 4, FQ_MESSAGE_REPLY);
    check(pack, msgpack_pack_uint32(&pack->packer, id));
    check(pack, msgpack_pack_array(&pack->packer, 3));
    fq_pack_u64(pack, NULL, (uint64_t)status);
    fq_pack_str(pack, NULL, fq_status_name(status));
    fq_pack_str(pack, NULL, err->message);
    check(pack, msgpack_pack_nil(&pack->packer));
}

void fq_pack_u64(struct fq_pack *pack, const char *key, uint64_t value) {
    put_key(pack, key);
    check(pack, msgpack_pack_uint64(&pack->packer, value));
}

void fq_pack_i64(struct fq_pack *pack, const char *key, int64_t value) {
    put_key(pack, key);
    check(pack, msgpack_pack_int64(&pack->packer, value));
}

void fq_pack_bool(struct fq_pack *pack, const char *key, bool value) {
    put_key(pack, key);
    check(pack, value ? msgpack_pack_true(&pack->packer) : msgpack_pack_false(&pack->packer));
}

void fq_pack_str(struct fq_pack *pack, const char *key, const char *value) {
    put_key(pack, key);
    put_str(pack, value, strlen(value));
}

void fq_pack_bin(struct fq_pack *pack, const char *key, const void *bytes, size_t length) {
    put_key(pack, key);
    check(pack, msgpack_pack_bin(&pack->packer, length));
    check(pack, msgpack_pack_bin_body(&pack->packer, bytes, length));
}

void fq_pack_map(struct fq_pack *pack, const char *key, uint32_t count) {
    put_key(pack, key);
    check(pack, msgpack_pack_map(&pack->packer, count));
}

void fq_pack_array(struct fq_pack *pack, const char *key, uint32_t count) {
    put_key(pack, key);
    check(pack, msgpack_pack_array(&pack->packer, count));
}

void fq_pack_object(struct fq_pack *pack, const char *key, const msgpack_object *object) {
    put_key(pack, key);
    check(pack, msgpack_pack_object(&pack->packer, *object));
}

int fq_pack_status(const struct fq_pack *pack, struct fq_error *err) {
    if (pack->failed)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for a message of more than %zu bytes",
                       pack->buffer.size);
    return 0;
}
