/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Frames: see frame.h.  On a Unix stream socket the kernel never lets one
 * recvmsg run past the bytes that a set of descriptors was sent with, but it
 * may put earlier, descriptor-less bytes before them.  So descriptors belong
 * to a frame that begins within the read that brought them: that is what
 * fds_end is for.
 */
#include "frame.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define HEADER       4u
#define BUFFER_FIRST 4096u
#define BUFFER_KEPT  65536u /* an empty buffer larger than this is given back */

struct fq_writer_fds {
    struct fq_writer_fds *next;
    uint64_t position; /* of the frame's first byte in the stream */
    unsigned count;
    int fds[FQ_FRAME_FDS_MAX];
};

static uint32_t get_u32(const uint8_t *bytes) {
    return (uint32_t)bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 |
           (uint32_t)bytes[3] << 24;
}

static void put_u32(uint8_t *bytes, uint32_t value) {
    for (int i = 0; i < 4; i++)
        bytes[i] = (uint8_t)(value >> 8 * i);
}

/* ---- Reader ------------------------------------------------------------------------------ */

void fq_reader_init(struct fq_reader *reader, int fd, unsigned fds_limit) {
    memset(reader, 0, sizeof *reader);
    reader->fd = fd;
    reader->limit = FQ_FRAME_LIMIT_HELLO;
    reader->fds_limit = fds_limit < FQ_FRAME_FDS_MAX ? fds_limit : FQ_FRAME_FDS_MAX;
}

void fq_reader_fini(struct fq_reader *reader) {
    for (unsigned i = 0; i < reader->fd_count; i++)
        close(reader->fds[i]);
    free(reader->buffer);
    memset(reader, 0, sizeof *reader);
    reader->fd = -1;
}

/* Makes room behind `end`: by moving what waits to the front, else by doubling up to the cap. */
static int reader_room(struct fq_reader *reader, struct fq_error *err) {
    size_t cap = (size_t)reader->limit + HEADER;
    size_t waiting = reader->end - reader->start;

    if (waiting == 0 && reader->capacity > BUFFER_KEPT) {
        free(reader->buffer);
        reader->buffer = NULL;
        reader->capacity = 0;
    }
    if (reader->start > 0) {
        if (waiting > 0)
            memmove(reader->buffer, reader->buffer + reader->start, waiting);
        reader->start = 0;
        reader->end = waiting;
    }
    if (reader->end < reader->capacity)
        return 0;
    if (reader->capacity >= cap)
        return fq_fail(err, FQ_INTERNAL, "the frames read so far were not taken");
    size_t capacity = reader->capacity ? reader->capacity * 2 : BUFFER_FIRST;
    if (capacity > cap)
        capacity = cap;
    uint8_t *grown = realloc(reader->buffer, capacity);
    if (!grown)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for a frame of more than %zu bytes",
                       reader->capacity);
    reader->buffer = grown;
    reader->capacity = capacity;
    return 0;
}

/* Moves the descriptors of one recvmsg into the reader; -FQ_PROTOCOL where they are too many. */
static int reader_keep_fds(struct fq_reader *reader, struct msghdr *header, struct fq_error *err) {
    unsigned arrived = 0, refused = 0;

    for (struct cmsghdr *control = CMSG_FIRSTHDR(header); control;
         control = CMSG_NXTHDR(header, control)) {
        if (control->cmsg_level != SOL_SOCKET || control->cmsg_type != SCM_RIGHTS)
            continue;
        unsigned count = (unsigned)((control->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        for (unsigned i = 0; i < count; i++) {
            int fd;

            memcpy(&fd, CMSG_DATA(control) + i * sizeof fd, sizeof fd);
            arrived++;
            if (reader->fd_count < reader->fds_limit) {
                reader->fds[reader->fd_count++] = fd;
            } else {
                close(fd);
                refused++;
            }
        }
    }
    if (header->msg_flags & MSG_CTRUNC)
        return fq_fail(err, FQ_PROTOCOL, "descriptors were cut off: at most %d may come at once",
                       FQ_FRAME_FDS_MAX);
    if (refused > 0)
        return fq_fail(err, FQ_PROTOCOL, "%u descriptors came, %u may wait", arrived,
                       reader->fds_limit);
    if (arrived > 0)
        reader->fds_end = reader->position + (reader->end - reader->start);
    return 0;
}

int fq_reader_fill(struct fq_reader *reader, struct fq_error *err) {
    union {
        struct cmsghdr aligned;
        char bytes[CMSG_SPACE(FQ_FRAME_FDS_MAX * sizeof(int))];
    } control;
    int rc = reader_room(reader, err);

    if (rc < 0)
        return rc;
    struct iovec data = {reader->buffer + reader->end, reader->capacity - reader->end};
    struct msghdr header = {
        .msg_iov = &data,
        .msg_iovlen = 1,
        .msg_control = control.bytes,
        .msg_controllen = sizeof control.bytes,
    };
    ssize_t got;
    do {
        got = recvmsg(reader->fd, &header, MSG_CMSG_CLOEXEC);
    } while (got < 0 && errno == EINTR);
    if (got < 0) {
        if (errno == EAGAIN || errno == EWOULDBLOCK)
            return 0;
        if (errno == ECONNRESET)
            return fq_fail(err, FQ_CLOSED, "the peer closed the connection with data unread");
        return fq_fail_errno(err, "cannot read from the socket");
    }
    reader->end += (size_t)got;
    rc = reader_keep_fds(reader, &header, err);
    if (rc < 0)
        return rc;
    if (got == 0 && reader->end > reader->start)
        return fq_fail(err, FQ_PROTOCOL, "the stream ended %zu bytes into a frame",
                       reader->end - reader->start);
    if (got == 0)
        return fq_fail(err, FQ_CLOSED, "the peer closed the connection");
    return 1;
}

int fq_reader_next(struct fq_reader *reader, const uint8_t **payload, uint32_t *length,
                   struct fq_error *err) {
    size_t waiting = reader->end - reader->start;

    if (reader->fd_count > 0 && reader->position >= reader->fds_end)
        return fq_fail(err, FQ_PROTOCOL, "%u descriptors came that no message named",
                       reader->fd_count);
    if (waiting < HEADER)
        return 0;
    const uint8_t *frame = reader->buffer + reader->start;
    uint32_t declared = get_u32(frame);
    if (declared == 0 || declared > reader->limit)
        return fq_fail(err, FQ_PROTOCOL,
                       "a frame of %" PRIu32 " bytes was announced, allowed are 1 to %" PRIu32,
                       declared, reader->limit);
    if (waiting - HEADER < declared)
        return 0;
    *payload = frame + HEADER;
    *length = declared;
    reader->start += HEADER + (size_t)declared;
    reader->position += HEADER + (uint64_t)declared;
    return 1;
}

int fq_reader_take_fds(struct fq_reader *reader, unsigned count, int *fds, struct fq_error *err) {
    if (count > reader->fd_count)
        return fq_fail(err, FQ_PROTOCOL, "a message names %u descriptors, %u came", count,
                       reader->fd_count);
    memcpy(fds, reader->fds, count * sizeof *fds);
    reader->fd_count -= count;
    memmove(reader->fds, reader->fds + count, reader->fd_count * sizeof *fds);
    return 0;
}

/* ---- Writer ------------------------------------------------------------------------------ */

void fq_writer_init(struct fq_writer *writer, int fd) {
    memset(writer, 0, sizeof *writer);
    writer->fd = fd;
}

static void fds_free(struct fq_writer_fds *fds) {
    for (unsigned i = 0; i < fds->count; i++)
        close(fds->fds[i]);
    free(fds);
}

void fq_writer_fini(struct fq_writer *writer) {
    while (writer->first_fds) {
        struct fq_writer_fds *next = writer->first_fds->next;

        fds_free(writer->first_fds);
        writer->first_fds = next;
    }
    free(writer->buffer);
    memset(writer, 0, sizeof *writer);
    writer->fd = -1;
}

static int writer_room(struct fq_writer *writer, size_t bytes, struct fq_error *err) {
    size_t waiting = writer->end - writer->start;

    if (writer->start > 0 && (waiting == 0 || writer->capacity - writer->end < bytes)) {
        if (waiting > 0)
            memmove(writer->buffer, writer->buffer + writer->start, waiting);
        writer->start = 0;
        writer->end = waiting;
    }
    if (writer->capacity - writer->end >= bytes)
        return 0;
    size_t capacity = writer->capacity ? writer->capacity : BUFFER_FIRST;
    while (capacity - writer->end < bytes)
        capacity *= 2;
    uint8_t *grown = realloc(writer->buffer, capacity);
    if (!grown)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for a frame of %zu bytes", bytes);
    writer->buffer = grown;
    writer->capacity = capacity;
    return 0;
}

int fq_writer_add(struct fq_writer *writer, const void *payload, size_t length, const int *fds,
                  unsigned fd_count, struct fq_error *err) {
    struct fq_writer_fds *copies = NULL;
    int rc;

    if (length == 0 || length > UINT32_MAX - HEADER)
        return fq_fail(err, FQ_INVALID, "a frame cannot have %zu bytes", length);
    if (fd_count > FQ_FRAME_FDS_MAX)
        return fq_fail(err, FQ_INVALID, "a frame cannot carry %u descriptors, at most %d", fd_count,
                       FQ_FRAME_FDS_MAX);
    rc = writer_room(writer, HEADER + length, err);
    if (rc < 0)
        return rc;
    if (fd_count > 0) {
        copies = calloc(1, sizeof *copies);
        if (!copies)
            return fq_fail(err, FQ_NO_MEMORY, "no memory for descriptors to send");
        copies->position = writer->position + fq_writer_pending(writer);
        for (; copies->count < fd_count; copies->count++) {
            int fd = fcntl(fds[copies->count], F_DUPFD_CLOEXEC, 0);

            if (fd < 0) {
                rc = fq_fail_errno(err, "cannot duplicate a descriptor to send");
                fds_free(copies);
                return rc;
            }
            copies->fds[copies->count] = fd;
        }
        if (writer->first_fds)
            writer->last_fds->next = copies;
        else
            writer->first_fds = copies;
        writer->last_fds = copies;
    }
    put_u32(writer->buffer + writer->end, (uint32_t)length);
    memcpy(writer->buffer + writer->end + HEADER, payload, length);
    writer->end += HEADER + length;
    return 0;
}

/* Sends what one sendmsg may carry: bytes up to the next frame that has descriptors, or that
 * frame's bytes with them. */
static ssize_t send_some(struct fq_writer *writer) {
    union {
        struct cmsghdr aligned;
        char bytes[CMSG_SPACE(FQ_FRAME_FDS_MAX * sizeof(int))];
    } control;
    struct fq_writer_fds *fds = writer->first_fds;
    struct iovec data = {writer->buffer + writer->start, fq_writer_pending(writer)};
    struct msghdr header = {.msg_iov = &data, .msg_iovlen = 1};

    if (fds && fds->position > writer->position) {
        data.iov_len = (size_t)(fds->position - writer->position);
    } else if (fds) {
        if (fds->next)
            data.iov_len = (size_t)(fds->next->position - writer->position);
        memset(&control, 0, sizeof control);
        header.msg_control = control.bytes;
        header.msg_controllen = CMSG_SPACE(fds->count * sizeof(int));
        struct cmsghdr *first = CMSG_FIRSTHDR(&header);
        first->cmsg_level = SOL_SOCKET;
        first->cmsg_type = SCM_RIGHTS;
        first->cmsg_len = CMSG_LEN(fds->count * sizeof(int));
        memcpy(CMSG_DATA(first), fds->fds, fds->count * sizeof(int));
    }
    ssize_t sent = sendmsg(writer->fd, &header, MSG_NOSIGNAL);
    if (sent > 0 && header.msg_control) {
        writer->first_fds = fds->next;
        fds_free(fds);
    }
    return sent;
}

int fq_writer_flush(struct fq_writer *writer, struct fq_error *err) {
    while (fq_writer_pending(writer) > 0) {
        ssize_t sent = send_some(writer);

        if (sent < 0) {
            if (errno == EINTR)
                continue;
            if (errno == EAGAIN || errno == EWOULDBLOCK)
                return 0;
            if (errno == EPIPE || errno == ECONNRESET)
                return fq_fail(err, FQ_CLOSED, "the peer closed the connection");
            return fq_fail_errno(err, "cannot write to the socket");
        }
        writer->start += (size_t)sent;
        writer->position += (uint64_t)sent;
    }
    writer->start = writer->end = 0;
    if (writer->capacity > BUFFER_KEPT) {
        free(writer->buffer);
        writer->buffer = NULL;
        writer->capacity = 0;
    }
    return 1;
}
