/* SPDX-License-Identifier: Apache-2.0 */
/* Parsing of messages: a scan that allocates nothing, then msgpack-c, then the envelope. */
#include "message.h"

#include "frame.h"

#include <inttypes.h>
#include <string.h>

/* ---- The scan ---------------------------------------------------------------------------- */

enum node {
    LEAF,
    ARRAY,
    MAP,
    REFUSED
};

/* What one leading byte announces: `count` elements, or `payload` bytes, given in `count_bytes`
 * big-endian bytes after it or by the leading byte itself. */
struct head {
    enum node node;
    unsigned count_bytes;
    uint32_t value;
};

static struct head head_of(uint8_t byte) {
    if (byte <= 0x7f || byte >= 0xe0)
        return (struct head){LEAF, 0, 0};
    if (byte <= 0x8f)
        return (struct head){MAP, 0, byte & 0x0fu};
    if (byte <= 0x9f)
        return (struct head){ARRAY, 0, byte & 0x0fu};
    if (byte <= 0xbf)
        return (struct head){LEAF, 0, byte & 0x1fu};
    switch (byte) {
    case 0xc0: /* nil, false, true */
    case 0xc2:
    case 0xc3:
        return (struct head){LEAF, 0, 0};
    case 0xc4: /* bin 8, 16, 32 */
    case 0xc5:
    case 0xc6:
        return (struct head){LEAF, 1u << (byte - 0xc4), 0};
    case 0xca: /* float 32, 64 */
    case 0xcb:
        return (struct head){LEAF, 0, 4u << (byte - 0xca)};
    case 0xcc: /* uint 8, 16, 32, 64 */
    case 0xcd:
    case 0xce:
    case 0xcf:
        return (struct head){LEAF, 0, 1u << (byte - 0xcc)};
    case 0xd0: /* int 8, 16, 32, 64 */
    case 0xd1:
    case 0xd2:
    case 0xd3:
        return (struct head){LEAF, 0, 1u << (byte - 0xd0)};
    case 0xd9: /* str 8, 16, 32 */
    case 0xda:
    case 0xdb:
        return (struct head){LEAF, 1u << (byte - 0xd9), 0};
    case 0xdc: /* array 16, 32 */
    case 0xdd:
        return (struct head){ARRAY, 2u << (byte - 0xdc), 0};
    case 0xde: /* map 16, 32 */
    case 0xdf:
        return (struct head){MAP, 2u << (byte - 0xde), 0};
    default: /* extensions, and 0xc1, which msgpack never uses */
        return (struct head){REFUSED, 0, 0};
    }
}

int fq_message_scan(const uint8_t *bytes, size_t length, struct fq_error *err) {
    uint64_t left[FQ_MESSAGE_DEPTH_MAX + 1]; /* objects still to come at each depth */
    size_t at = 0;
    int depth = 0;

    left[0] = 1;
    while (depth > 0 || left[0] > 0) {
        if (left[depth] == 0) {
            depth--;
            continue;
        }
        left[depth]--;
        if (at == length)
            return fq_fail(err, FQ_PROTOCOL, "the message ends early, after %zu bytes", length);
        uint8_t byte = bytes[at];
        struct head head = head_of(byte);
        if (head.node == REFUSED)
            return fq_fail(err, FQ_PROTOCOL, "the type 0x%02x at byte %zu is not allowed", byte,
                           at);
        at++;
        if (head.count_bytes > length - at)
            return fq_fail(err, FQ_PROTOCOL, "the message ends early, after %zu bytes", length);
        for (unsigned i = 0; i < head.count_bytes; i++)
            head.value = head.value << 8 | bytes[at++];
        uint64_t objects = head.node == MAP ? 2 * (uint64_t)head.value : head.value;
        if (objects > length - at) /* each object has at least one byte */
            return fq_fail(err, FQ_PROTOCOL,
                           "byte %zu announces %" PRIu64 " of what only %zu bytes remain for", at,
                           objects, length - at);
        if (head.node == LEAF) {
            at += head.value;
            continue;
        }
        if (++depth > FQ_MESSAGE_DEPTH_MAX)
            return fq_fail(err, FQ_PROTOCOL, "nesting at byte %zu is deeper than %d", at,
                           FQ_MESSAGE_DEPTH_MAX);
        left[depth] = objects;
    }
    if (at != length)
        return fq_fail(err, FQ_PROTOCOL, "%zu bytes follow the message", length - at);
    return 0;
}

size_t fq_utf8_span(const char *text, size_t length) {
    const unsigned char *bytes = (const unsigned char *)text;
    size_t at = 0;

    while (at < length) {
        unsigned char lead = bytes[at];
        /* How many bytes follow, and what the first of them may be (no overlong form, no
         * surrogate, nothing above U+10FFFF). */
        size_t more = lead < 0x80 ? 0 : lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : 3;
        unsigned char low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
        unsigned char high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;

        if ((lead >= 0x80 && lead < 0xc2) || lead > 0xf4 || more >= length - at)
            return at;
        for (size_t i = 1; i <= more; i++) {
            if (bytes[at + i] < low || bytes[at + i] > high)
                return at;
            low = 0x80;
            high = 0xbf;
        }
        at += more + 1;
    }
    return at;
}

/* ---- The envelope ------------------------------------------------------------------------ */

static bool get_u32(const msgpack_object *object, uint32_t *value) {
    if (object->type != MSGPACK_OBJECT_POSITIVE_INTEGER || object->via.u64 > UINT32_MAX)
        return false;
    *value = (uint32_t)object->via.u64;
    return true;
}

static bool get_method(const msgpack_object *object, char *method) {
    if (object->type != MSGPACK_OBJECT_STR || object->via.str.size == 0 ||
        object->via.str.size > FQ_METHOD_MAX ||
        memchr(object->via.str.ptr, 0, object->via.str.size) ||
        fq_utf8_span(object->via.str.ptr, object->via.str.size) != object->via.str.size)
        return false;
    memcpy(method, object->via.str.ptr, object->via.str.size);
    method[object->via.str.size] = 0;
    return true;
}

/* [code, name, message]: false where it is not that. */
static bool get_error(const msgpack_object *object, struct fq_error *error) {
    const msgpack_object *parts = object->via.array.ptr;
    uint32_t code;

    if (object->type != MSGPACK_OBJECT_ARRAY || object->via.array.size < 3 ||
        !get_u32(&parts[0], &code) || code == 0 || parts[1].type != MSGPACK_OBJECT_STR ||
        parts[2].type != MSGPACK_OBJECT_STR)
        return false;
    /* A code that this version does not know: the message still says what happened. */
    enum fq_status status = code <= FQ_TIMEOUT ? (enum fq_status)code : FQ_INTERNAL;
    fq_fail(error, status, "%.*s", (int)parts[2].via.str.size, parts[2].via.str.ptr);
    return true;
}

static int parse_reply(const msgpack_object *parts, struct fq_message *message,
                       struct fq_error *err) {
    if (!get_u32(&parts[1], &message->id))
        return fq_fail(err, FQ_PROTOCOL, "a reply's id must be a u32");
    if (parts[2].type != MSGPACK_OBJECT_NIL && !get_error(&parts[2], &message->error))
        return fq_fail(err, FQ_PROTOCOL,
                       "the error of reply %" PRIu32 " must be nil or [code, name, message]",
                       message->id);
    if (parts[3].type != (message->error.status == 0 ? MSGPACK_OBJECT_MAP : MSGPACK_OBJECT_NIL))
        return fq_fail(err, FQ_PROTOCOL,
                       "the result of reply %" PRIu32 " must be a map, or nil with an error",
                       message->id);
    message->body = parts[3];
    return 0;
}

static int parse_envelope(const msgpack_object *root, struct fq_message *message,
                          struct fq_error *err) {
    static const uint32_t sizes[] = {
        [FQ_MESSAGE_REQUEST] = 4, [FQ_MESSAGE_REPLY] = 4, [FQ_MESSAGE_NOTIFICATION] = 3};
    const msgpack_object *parts = root->via.array.ptr;
    uint32_t kind;

    if (root->type != MSGPACK_OBJECT_ARRAY || root->via.array.size == 0 ||
        !get_u32(&parts[0], &kind) || kind > FQ_MESSAGE_NOTIFICATION)
        return fq_fail(err, FQ_PROTOCOL, "a message must be an array that begins with 0, 1 or 2");
    message->kind = (enum fq_message_kind)kind;
    if (root->via.array.size != sizes[kind])
        return fq_fail(err, FQ_PROTOCOL,
                       "a message of kind %" PRIu32 " has %" PRIu32 " parts, %" PRIu32 " came",
                       kind, sizes[kind], root->via.array.size);
    if (kind == FQ_MESSAGE_REPLY)
        return parse_reply(parts, message, err);
    if (kind == FQ_MESSAGE_REQUEST && !get_u32(&parts[1], &message->id))
        return fq_fail(err, FQ_PROTOCOL, "a request's id must be a u32");
    const msgpack_object *rest = parts + (kind == FQ_MESSAGE_REQUEST ? 2 : 1);
    if (!get_method(&rest[0], message->method))
        return fq_fail(err, FQ_PROTOCOL, "a method must be a str of 1 to %d bytes of UTF-8",
                       FQ_METHOD_MAX);
    if (rest[1].type != MSGPACK_OBJECT_MAP)
        return fq_fail(err, FQ_PROTOCOL, "the params of %s must be a map", message->method);
    message->body = rest[1];
    return 0;
}

int fq_message_parse(const uint8_t *payload, size_t length, struct fq_message *message,
                     struct fq_error *err) {
    msgpack_object root;
    size_t offset = 0;
    int rc;

    memset(message, 0, sizeof *message);
    message->body.type = MSGPACK_OBJECT_NIL;
    rc = fq_message_scan(payload, length, err);
    if (rc < 0)
        return rc;
    message->zone = msgpack_zone_new(MSGPACK_ZONE_CHUNK_SIZE);
    if (!message->zone)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for a message of %zu bytes", length);
    switch (msgpack_unpack((const char *)payload, length, &offset, message->zone, &root)) {
    case MSGPACK_UNPACK_SUCCESS:
        rc = parse_envelope(&root, message, err);
        break;
    case MSGPACK_UNPACK_NOMEM_ERROR:
        rc = fq_fail(err, FQ_NO_MEMORY, "no memory for a message of %zu bytes", length);
        break;
    default:
        rc = fq_fail(err, FQ_PROTOCOL, "a message of %zu bytes cannot be unpacked", length);
    }
    if (rc < 0)
        fq_message_fini(message);
    return rc;
}

void fq_message_fini(struct fq_message *message) {
    msgpack_zone_free(message->zone);
    message->zone = NULL;
    message->body.type = MSGPACK_OBJECT_NIL;
}

int fq_message_fds(const struct fq_message *message, unsigned *count, struct fq_error *err) {
    *count = 0;
    if (message->body.type != MSGPACK_OBJECT_MAP)
        return 0;
    for (uint32_t i = 0; i < message->body.via.map.size; i++) {
        const msgpack_object_kv *pair = &message->body.via.map.ptr[i];
        uint32_t value;

        if (pair->key.type != MSGPACK_OBJECT_STR || pair->key.via.str.size != 3 ||
            memcmp(pair->key.via.str.ptr, "fds", 3) != 0)
            continue;
        if (!get_u32(&pair->val, &value) || value > FQ_FRAME_FDS_MAX)
            return fq_fail(err, FQ_PROTOCOL, "fds must be 0 to %d", FQ_FRAME_FDS_MAX);
        *count = value;
    }
    return 0;
}
