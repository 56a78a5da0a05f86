/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The payload of a frame as a message: a msgpack array that is a request, a
 * reply or a notification (PROTOCOL.md, section 1).  Parsing trusts nothing:
 * declared counts are held against the bytes that remain before msgpack-c,
 * which allocates by the declared count, sees them.  No state; any thread.
 */
#ifndef FQ_PROTO_MESSAGE_H
#define FQ_PROTO_MESSAGE_H

#include "error.h"

#include <msgpack.h>
#include <stdbool.h>

#define FQ_PROTOCOL_VERSION  1
#define FQ_MESSAGE_DEPTH_MAX 16 /* arrays and maps within each other */
#define FQ_METHOD_MAX        63 /* bytes of a method's name */

enum fq_message_kind {
    FQ_MESSAGE_REQUEST = 0,
    FQ_MESSAGE_REPLY = 1,
    FQ_MESSAGE_NOTIFICATION = 2,
};

struct fq_message {
    enum fq_message_kind kind;
    uint32_t id;                    /* of a request or reply */
    char method[FQ_METHOD_MAX + 1]; /* of a request or notification, "" otherwise */
    msgpack_object body; /* params, or a reply's result: a map; nil in a reply with an error */
    /* A reply's error: status is the negative code (-FQ_INTERNAL for one that is not known here)
     * with the peer's message; status 0 where there is none. */
    struct fq_error error;
    msgpack_zone *zone; /* owns the objects; strings lie in the payload */
};

/*
 * Parses a payload, which must outlive the message: strings are not copied.
 * Errors: -FQ_PROTOCOL (anything that is not exactly one message), -FQ_NO_MEMORY.
 */
int fq_message_parse(const uint8_t *payload, size_t length, struct fq_message *message,
                     struct fq_error *err);
void fq_message_fini(struct fq_message *message);

/* The number of descriptors that the message's body names: 0 where it has no key `fds`.
 * Error: -FQ_PROTOCOL where the value is no number from 0 to FQ_FRAME_FDS_MAX. */
int fq_message_fds(const struct fq_message *message, unsigned *count, struct fq_error *err);

/*
 * Whether `length` bytes are one msgpack object and nothing else, with every declared size within
 * the bytes that are there, nesting within FQ_MESSAGE_DEPTH_MAX, and no extension types.  Nothing
 * is allocated.  Error: -FQ_PROTOCOL, with the offset.
 */
int fq_message_scan(const uint8_t *bytes, size_t length, struct fq_error *err);

/* The bytes at the start of `text` that are well-formed UTF-8: `length` where all are. */
size_t fq_utf8_span(const char *text, size_t length);

#endif
