/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The listening socket.  A lock file beside it, held while the daemon lives,
 * tells a second instance that the first is there, and this one that a socket
 * it finds is stale.  Loop's thread.
 */
#ifndef FQ_DAEMON_LISTENER_H
#define FQ_DAEMON_LISTENER_H

#include "error.h"

#include <stdbool.h>
#include <uv.h>

struct fq_daemon;

struct fq_listener {
    struct fq_daemon *daemon;
    uv_poll_t poll;
    uv_timer_t retry; /* after a lack of descriptors */
    uv_timer_t sweep; /* ends sessions that do not say hello, or do not read their end */
    char path[256];   /* of the socket; "" when there is none to remove */
    int fd;           /* listening socket; -1 when closed */
    int lock;         /* the lock file; -1 */
    bool paused;
};

/* Errors: -FQ_EXISTS (another daemon holds the lock), -FQ_INVALID (path too long), -FQ_DENIED and
 * -FQ_IO from the system. */
int fq_listener_init(struct fq_listener *listener, struct fq_daemon *daemon, struct fq_error *err);
/* Accepts again, where a lack of descriptors had stopped it: one is free. */
void fq_listener_resume(struct fq_listener *listener);
/* Stops listening and removes the socket; sessions go on. */
void fq_listener_stop(struct fq_listener *listener);
/* Gives the lock back.  After the handles are closed. */
void fq_listener_fini(struct fq_listener *listener);

#endif
