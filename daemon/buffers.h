/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A session's buffers: memory it shares with the daemon.  The table holds one
 * reference to each, and every request that names one another, so that what a
 * launch is using outlives both `buffer.destroy` and the session, and nothing
 * else does.  Loop's thread.
 */
#ifndef FQ_DAEMON_BUFFERS_H
#define FQ_DAEMON_BUFFERS_H

#include "account.h"
#include "backend.h"

struct fq_call;
struct fq_daemon;

struct fq_buffer {
    uint64_t id; /* of the session's; ascending, never used again */
    struct fq_daemon *daemon;
    struct fq_account *account; /* of the session, which outlives its buffers */
    struct fq_memory *memory;
    uint64_t bytes;
    unsigned refs;
    struct fq_call *waiter; /* a buffer.destroy to answer when the memory is free; owned */
};

struct fq_buffers {
    struct fq_buffer **entries; /* ascending ids */
    size_t count, room;
    uint64_t next_id;
};

/* A zero-filled region, charged to the account.  The table owns it; *out is borrowed. */
int fq_buffers_create(struct fq_buffers *buffers, struct fq_daemon *daemon,
                      struct fq_account *account, enum fq_memory_kind kind, uint64_t bytes,
                      struct fq_buffer **out, struct fq_error *err);

/* Borrowed, or NULL. */
struct fq_buffer *fq_buffers_find(const struct fq_buffers *buffers, uint64_t id);

/* Takes a buffer out of the table; `waiter`, which may be NULL, is answered when it is free. */
void fq_buffers_destroy(struct fq_buffers *buffers, struct fq_buffer *buffer,
                        struct fq_call *waiter);

/* The session ends: destroys all of them. */
void fq_buffers_fini(struct fq_buffers *buffers);

struct fq_buffer *fq_buffer_ref(struct fq_buffer *buffer);
void fq_buffer_unref(struct fq_buffer *buffer); /* NULL is fine */

#endif
