/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Frames on a Unix stream socket (PROTOCOL.md, section 1): a u32 length, then
 * as many bytes of payload, and file descriptors that travel with the first
 * byte.  A reader and a writer each borrow the socket and work on blocking and
 * nonblocking ones alike.  Memory follows the bytes that have arrived, never
 * a length that a peer merely declared.
 *
 * Neither is safe for two threads at once; a reader and a writer of the same
 * socket are independent of each other.
 */
#ifndef FQ_PROTO_FRAME_H
#define FQ_PROTO_FRAME_H

#include "error.h"

#define FQ_FRAME_LIMIT_HELLO 4096u               /* largest payload before hello is answered */
#define FQ_FRAME_LIMIT       ((uint32_t)1 << 20) /* afterwards, where no other was agreed */
#define FQ_FRAME_FDS_MAX     8                   /* descriptors one frame can carry */

struct fq_reader {
    int fd;             /* borrowed */
    uint32_t limit;     /* largest payload; the owner may change it between frames */
    unsigned fds_limit; /* descriptors that may wait to be taken; 0: the peer must send none */
    uint8_t *buffer;
    size_t start, end, capacity; /* bytes start..end wait to be handed out */
    uint64_t position;           /* of buffer[start] in the stream */
    int fds[FQ_FRAME_FDS_MAX];   /* arrived and not taken, oldest first; owned */
    unsigned fd_count;
    uint64_t fds_end; /* a frame that begins here or later cannot be the one that carried them */
};

void fq_reader_init(struct fq_reader *reader, int fd, unsigned fds_limit);
/* Closes descriptors that nobody took; leaves the socket. */
void fq_reader_fini(struct fq_reader *reader);

/*
 * Reads once.  1: bytes arrived.  0: the socket would block.
 * Errors: -FQ_CLOSED (end of stream), -FQ_PROTOCOL (end within a frame, descriptors that are not
 * allowed or were cut off), -FQ_NO_MEMORY, -FQ_IO.  Call fq_reader_next until it returns 0 first.
 */
int fq_reader_fill(struct fq_reader *reader, struct fq_error *err);

/*
 * Hands out the next whole frame.  1: *payload, *length are set and stay valid until the next
 * fq_reader_fill.  0: more bytes are needed.
 * Errors: -FQ_PROTOCOL (length 0 or above the limit, descriptors that no message named).
 */
int fq_reader_next(struct fq_reader *reader, const uint8_t **payload, uint32_t *length,
                   struct fq_error *err);

/* Moves `count` descriptors, which the frame last handed out names, to the caller.
 * Error: -FQ_PROTOCOL where fewer came. */
int fq_reader_take_fds(struct fq_reader *reader, unsigned count, int *fds, struct fq_error *err);

struct fq_writer_fds;

struct fq_writer {
    int fd; /* borrowed */
    uint8_t *buffer;
    size_t start, end, capacity;     /* bytes start..end wait to be sent */
    uint64_t position;               /* of buffer[start] in the stream */
    struct fq_writer_fds *first_fds; /* descriptors still to be sent, oldest first; owned */
    struct fq_writer_fds *last_fds;
};

void fq_writer_init(struct fq_writer *writer, int fd);
void fq_writer_fini(struct fq_writer *writer);

/*
 * Queues one frame.  Descriptors are duplicated: the caller keeps its own.
 * Errors: -FQ_NO_MEMORY, -FQ_IO (no descriptor left), -FQ_INVALID (length 0, too many descriptors).
 */
int fq_writer_add(struct fq_writer *writer, const void *payload, size_t length, const int *fds,
                  unsigned fd_count, struct fq_error *err);

/* Sends.  1: nothing waits any more.  0: the socket would block.  Errors: -FQ_CLOSED, -FQ_IO. */
int fq_writer_flush(struct fq_writer *writer, struct fq_error *err);

/* Bytes that wait to be sent. */
static inline size_t fq_writer_pending(const struct fq_writer *writer) {
    return writer->end - writer->start;
}

#endif
