/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One client: its socket, its frames in and out, what it is charged for, and
 * its requests that have no reply yet ("calls").  The daemon's list holds a
 * session while its socket is open; each call holds a reference, so that a
 * launch never writes to what has gone.  Loop's thread.
 *
 * Frames that come while too much of the output is unread wait in the socket.
 */
#ifndef FQ_DAEMON_SESSION_H
#define FQ_DAEMON_SESSION_H

#include "account.h"
#include "buffers.h"
#include "frame.h"
#include "list.h"
#include "pack.h"
#include "scheduler.h"

#include <sys/types.h>
#include <time.h>
#include <uv.h>

#define FQ_SESSION_CALL_BUCKETS 64 /* of the table of calls by id; a power of two */

struct fq_session {
    struct fq_list link; /* in the daemon's list */
    struct fq_daemon *daemon;
    unsigned refs;
    uint64_t id;
    uv_poll_t poll;
    int events; /* that it polls for */
    int fd;
    struct fq_reader reader;
    struct fq_writer writer;
    bool greeted; /* hello was answered */
    bool ending;  /* reads no more: closes when the output is sent */
    bool closed;  /* the socket is gone */
    bool allowed, admin;
    pid_t pid;
    uid_t uid;
    gid_t gid;
    struct fq_ids groups; /* supplementary ones, where the kernel tells */
    char name[64];        /* as hello gave it */
    time_t connected_at;
    uint64_t opened; /* uv_now() */

    struct fq_account account;
    struct fq_buffers buffers;
    struct fq_turn turn;
    struct fq_list calls[FQ_SESSION_CALL_BUCKETS];
    uint64_t requests, rows; /* gemm, answered well */
};

/* A request without a reply. */
struct fq_call {
    struct fq_list link; /* in the session's table */
    struct fq_session *session;
    uint32_t id;
    uint64_t bytes; /* of X and Y, charged with it */
};

/* Takes an accepted nonblocking socket, even when it fails. */
int fq_session_new(struct fq_daemon *daemon, int fd, struct fq_error *err);
struct fq_session *fq_session_ref(struct fq_session *session);
void fq_session_unref(struct fq_session *session);

/* Whether the settings allow this peer, and as an administrator; after SIGHUP, too. */
void fq_session_authorize(struct fq_session *session);

/* Sends what is gathered; closes a session that is ending and has sent all. */
void fq_session_flush(struct fq_session *session);
/* Sends the notification `error`, then closes. */
void fq_session_end(struct fq_session *session, const struct fq_error *error);
/* Closes at once; everything of the session's is freed, or when its last launch ends. */
void fq_session_close(struct fq_session *session);

/* ---- Replies ----------------------------------------------------------------------------- */

/* A message is packed into the daemon's one pack: take it, fill in the fields, send it.  Sending a
 * reply takes `fd`, borrowed, along unless it is -1; where it cannot be sent (a frame above the
 * limit, no descriptor left) an error goes in its place, and is returned. */
struct fq_pack *fq_reply_begin(struct fq_session *session, uint32_t id, uint32_t fields);
int fq_reply_send(struct fq_session *session, uint32_t id, int fd);
struct fq_pack *fq_notification_begin(struct fq_session *session, const char *method,
                                      uint32_t fields);
void fq_notification_send(struct fq_session *session);

void fq_reply_error(struct fq_session *session, uint32_t id, const struct fq_error *error);
void fq_reply_empty(struct fq_session *session, uint32_t id);

/* Charges one request, with `bytes` of X and Y.  Errors: -FQ_QUOTA, -FQ_NO_MEMORY. */
int fq_call_new(struct fq_session *session, uint32_t id, uint64_t bytes, struct fq_call **out,
                struct fq_error *err);
struct fq_call *fq_call_find(struct fq_session *session, uint32_t id);
/* Ends a call whose reply was sent, or needs none. */
void fq_call_free(struct fq_call *call);
/* Each answers, and frees the call. */
void fq_call_reply_error(struct fq_call *call, const struct fq_error *error);
void fq_call_reply_empty(struct fq_call *call);

#endif
