/* SPDX-License-Identifier: Apache-2.0 */
/* Sessions: poll, frames, backpressure, the end; and their calls. */
#include "config.h"

#include "session.h"

#include "daemon.h"
#include "log.h"
#include "message.h"
#include "methods.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define OUTPUT_PAUSE ((size_t)1 << 20)  /* unread output above which no more requests are read */
#define OUTPUT_MAX   ((size_t)64 << 20) /* above which the peer is given up */
#define READS_A_TURN 4                  /* so that one busy client leaves the loop to others */

static void update_poll(struct fq_session *session);

struct fq_session *fq_session_ref(struct fq_session *session) {
    session->refs++;
    return session;
}

void fq_session_unref(struct fq_session *session) {
    if (--session->refs > 0)
        return;
    free(session->groups.ids);
    free(session);
}

/* ---- The peer ---------------------------------------------------------------------------- */

static void read_groups(struct fq_session *session) {
#ifdef SO_PEERGROUPS
    socklen_t length = 0;

    if (getsockopt(session->fd, SOL_SOCKET, SO_PEERGROUPS, NULL, &length) == 0 || errno != ERANGE)
        return;
    session->groups.ids = malloc(length);
    if (session->groups.ids &&
        getsockopt(session->fd, SOL_SOCKET, SO_PEERGROUPS, session->groups.ids, &length) == 0)
        session->groups.count = length / sizeof(gid_t);
#else
    (void)session;
#endif
}

static int read_credentials(struct fq_session *session, struct fq_error *err) {
    struct ucred peer;
    socklen_t length = sizeof peer;

    if (getsockopt(session->fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) < 0)
        return fq_fail_errno(err, "the peer's credentials");
    session->pid = peer.pid;
    session->uid = peer.uid;
    session->gid = peer.gid;
    read_groups(session);
    return 0;
}

static bool in_groups(const struct fq_session *session, const struct fq_ids *allowed) {
    if (fq_ids_have(allowed, session->gid))
        return true;
    for (size_t i = 0; i < session->groups.count; i++)
        if (fq_ids_have(allowed, session->groups.ids[i]))
            return true;
    return false;
}

void fq_session_authorize(struct fq_session *session) {
    const struct fq_settings *settings = &session->daemon->settings;
    bool anyone = settings->allow_users.count == 0 && settings->allow_groups.count == 0;

    session->admin = session->uid == 0 || session->uid == geteuid() ||
                     fq_ids_have(&settings->admin_users, session->uid);
    session->allowed = anyone || session->admin ||
                       fq_ids_have(&settings->allow_users, session->uid) ||
                       in_groups(session, &settings->allow_groups);
}

/* ---- Calls ------------------------------------------------------------------------------- */

static struct fq_list *bucket_of(struct fq_session *session, uint32_t id) {
    return &session->calls[id & (FQ_SESSION_CALL_BUCKETS - 1)];
}

struct fq_call *fq_call_find(struct fq_session *session, uint32_t id) {
    fq_list_each(node, bucket_of(session, id)) {
        struct fq_call *call = fq_list_entry(node, struct fq_call, link);

        if (call->id == id)
            return call;
    }
    return NULL;
}

int fq_call_new(struct fq_session *session, uint32_t id, uint64_t bytes, struct fq_call **out,
                struct fq_error *err) {
    int rc = fq_account_request(&session->account, &session->daemon->settings, bytes, err);
    struct fq_call *call;

    if (rc < 0)
        return rc;
    call = malloc(sizeof *call);
    if (!call) {
        fq_account_end_request(&session->account, bytes);
        return fq_fail(err, FQ_NO_MEMORY, "a request: out of memory");
    }
    call->session = fq_session_ref(session);
    call->id = id;
    call->bytes = bytes;
    fq_list_append(bucket_of(session, id), &call->link);
    session->daemon->calls++;
    *out = call;
    return 0;
}

void fq_call_free(struct fq_call *call) {
    struct fq_session *session = call->session;

    fq_account_end_request(&session->account, call->bytes);
    fq_list_remove(&call->link);
    session->daemon->calls--;
    free(call);
    fq_session_unref(session);
}

void fq_call_reply_error(struct fq_call *call, const struct fq_error *error) {
    fq_reply_error(call->session, call->id, error);
    fq_call_free(call);
}

void fq_call_reply_empty(struct fq_call *call) {
    fq_reply_empty(call->session, call->id);
    fq_call_free(call);
}

/* ---- Output ------------------------------------------------------------------------------ */

static int queue(struct fq_session *session, int fd, struct fq_error *err) {
    struct fq_pack *pack = &session->daemon->pack;
    int rc = fq_pack_status(pack, err);

    if (session->closed)
        return 0;
    if (rc < 0)
        return rc;
    if (fq_pack_length(pack) > FQ_FRAME_LIMIT)
        return fq_fail(err, FQ_UNSUPPORTED, "the answer has %zu bytes, a frame has at most %u",
                       fq_pack_length(pack), (unsigned)FQ_FRAME_LIMIT);
    return fq_writer_add(&session->writer, fq_pack_data(pack), fq_pack_length(pack), &fd, fd >= 0,
                         err);
}

struct fq_pack *fq_reply_begin(struct fq_session *session, uint32_t id, uint32_t fields) {
    fq_pack_reply(&session->daemon->pack, id, fields);
    return &session->daemon->pack;
}

int fq_reply_send(struct fq_session *session, uint32_t id, int fd) {
    struct fq_error error;
    int rc = queue(session, fd, &error);

    if (rc < 0)
        fq_reply_error(session, id, &error);
    return rc;
}

void fq_reply_empty(struct fq_session *session, uint32_t id) {
    fq_reply_begin(session, id, 0);
    fq_reply_send(session, id, -1);
}

void fq_reply_error(struct fq_session *session, uint32_t id, const struct fq_error *error) {
    struct fq_error failure;

    session->daemon->metrics.errors++;
    fq_log(FQ_LOG_DEBUG, "session %llu: request %u: %s: %s", (unsigned long long)session->id, id,
           fq_status_name(error->status), error->message);
    fq_pack_error(&session->daemon->pack, id, error);
    if (queue(session, -1, &failure) < 0)
        fq_session_close(session); /* not even that fits: a client must not wait for ever */
}

struct fq_pack *fq_notification_begin(struct fq_session *session, const char *method,
                                      uint32_t fields) {
    fq_pack_notification(&session->daemon->pack, method, fields);
    return &session->daemon->pack;
}

void fq_notification_send(struct fq_session *session) {
    struct fq_error error;

    if (queue(session, -1, &error) < 0)
        fq_log(FQ_LOG_WARNING, "session %llu: a notification is lost: %s",
               (unsigned long long)session->id, error.message);
}

void fq_session_flush(struct fq_session *session) {
    struct fq_error error;
    int rc;

    if (session->closed)
        return;
    if (fq_writer_pending(&session->writer) > 0) {
        rc = fq_writer_flush(&session->writer, &error);
        if (rc < 0 || fq_writer_pending(&session->writer) > OUTPUT_MAX) {
            fq_session_close(session);
            return;
        }
    }
    if (session->ending && fq_writer_pending(&session->writer) == 0) {
        fq_session_close(session);
        return;
    }
    update_poll(session);
}

void fq_session_end(struct fq_session *session, const struct fq_error *error) {
    struct fq_pack *pack;

    if (session->closed || session->ending)
        return;
    fq_log(FQ_LOG_INFO, "session %llu (%s, pid %d, uid %u) ends: %s: %s",
           (unsigned long long)session->id, session->name, (int)session->pid,
           (unsigned)session->uid, fq_status_name(error->status), error->message);
    session->daemon->metrics.errors++;
    pack = fq_notification_begin(session, "error", 3);
    fq_pack_u64(pack, "code", (uint64_t)-error->status);
    fq_pack_str(pack, "name", fq_status_name(error->status));
    fq_pack_str(pack, "message", error->message);
    fq_notification_send(session);
    session->ending = true;
    session->opened = uv_now(&session->daemon->loop); /* from here it may linger a while */
}

/* ---- Input ------------------------------------------------------------------------------- */

static int handle(struct fq_session *session, const uint8_t *payload, uint32_t length,
                  struct fq_error *err) {
    struct fq_message message;
    int rc = fq_message_parse(payload, length, &message, err);

    if (rc < 0)
        return rc;
    if (message.kind != FQ_MESSAGE_REQUEST)
        rc = fq_fail(err, FQ_PROTOCOL, "a client sends requests, this is a %s",
                     message.kind == FQ_MESSAGE_REPLY ? "reply" : "notification");
    else if (fq_call_find(session, message.id))
        rc = fq_fail(err, FQ_PROTOCOL, "request %u has no reply yet, and its id is used again",
                     message.id);
    else
        rc = fq_method_run(session, &message, err);
    fq_message_fini(&message);
    return rc;
}

static bool paused(const struct fq_session *session) {
    return session->closed || session->ending || fq_writer_pending(&session->writer) > OUTPUT_PAUSE;
}

/* Handles the whole frames that have arrived.  0, or why the session ends. */
static int handle_frames(struct fq_session *session, struct fq_error *err) {
    const uint8_t *payload;
    uint32_t length;
    int rc = 0;

    while (!paused(session) && (rc = fq_reader_next(&session->reader, &payload, &length, err)) > 0)
        if ((rc = handle(session, payload, length, err)) < 0)
            break;
    return rc < 0 ? rc : 0;
}

static void on_readable(struct fq_session *session) {
    struct fq_error error;
    int rc = handle_frames(session, &error); /* those that waited for the output to be read */

    for (int i = 0; i < READS_A_TURN && rc == 0 && !paused(session); i++) {
        rc = fq_reader_fill(&session->reader, &error);
        if (rc == 0)
            break;
        if (rc > 0)
            rc = handle_frames(session, &error);
    }
    if (rc == -FQ_CLOSED)
        fq_session_close(session);
    else if (rc < 0)
        fq_session_end(session, &error);
}

static void on_poll(uv_poll_t *handle, int status, int events) {
    struct fq_session *session = fq_session_ref(handle->data);

    if (status < 0)
        fq_session_close(session);
    if (!session->closed && (events & UV_WRITABLE))
        fq_session_flush(session);
    if (!session->closed && !session->ending &&
        ((events & UV_READABLE) || session->reader.end > session->reader.start))
        on_readable(session);
    fq_session_flush(session);
    if ((events & UV_DISCONNECT) && paused(session))
        fq_session_close(session); /* nobody reads what is still to be sent */
    fq_executor_pump(&session->daemon->executor);
    fq_session_unref(session);
}

static void update_poll(struct fq_session *session) {
    int events = UV_DISCONNECT;

    if (!paused(session))
        events |= UV_READABLE;
    if (fq_writer_pending(&session->writer) > 0)
        events |= UV_WRITABLE;
    if (events != session->events) /* each change costs system calls */
        uv_poll_start(&session->poll, events, on_poll);
    session->events = events;
}

/* ---- Life -------------------------------------------------------------------------------- */

int fq_session_new(struct fq_daemon *daemon, int fd, struct fq_error *err) {
    struct fq_session *session = calloc(1, sizeof *session);
    int rc;

    if (!session) {
        close(fd);
        return fq_fail(err, FQ_NO_MEMORY, "a session: out of memory");
    }
    session->daemon = daemon;
    session->fd = fd;
    session->refs = 1;
    if ((rc = read_credentials(session, err)) < 0)
        goto fail;
    if (uv_poll_init(&daemon->loop, &session->poll, fd) != 0) {
        rc = fq_fail(err, FQ_IO, "the socket of a session cannot be polled");
        goto fail;
    }
    session->poll.data = session;
    session->id = ++daemon->next_session;
    session->connected_at = time(NULL);
    session->opened = uv_now(&daemon->loop);
    strcpy(session->name, "?");
    fq_reader_init(&session->reader, fd, 0);
    fq_writer_init(&session->writer, fd);
    fq_turn_init(&session->turn);
    for (size_t i = 0; i < FQ_SESSION_CALL_BUCKETS; i++)
        fq_list_init(&session->calls[i]);
    fq_session_authorize(session);
    fq_list_append(&daemon->sessions, &session->link);
    daemon->session_count++;
    daemon->metrics.sessions++;
    update_poll(session);
    fq_log(FQ_LOG_DEBUG, "session %llu: pid %d, uid %u", (unsigned long long)session->id,
           (int)session->pid, (unsigned)session->uid);
    return 0;

fail:
    close(fd);
    fq_session_unref(session);
    return rc;
}

static void on_closed(uv_handle_t *handle) {
    struct fq_session *session = handle->data;

    close(session->fd);
    fq_listener_resume(&session->daemon->listener);
    fq_session_unref(session);
}

void fq_session_close(struct fq_session *session) {
    struct fq_daemon *daemon = session->daemon;

    if (session->closed)
        return;
    session->closed = true;
    fq_log(FQ_LOG_DEBUG, "session %llu closed", (unsigned long long)session->id);
    fq_list_remove(&session->link);
    daemon->session_count--;
    fq_session_ref(session);
    fq_scheduler_drop(&daemon->scheduler, session);
    fq_buffers_fini(&session->buffers);
    fq_reader_fini(&session->reader);
    fq_writer_fini(&session->writer);
    shutdown(session->fd, SHUT_RDWR); /* the peer learns now; the descriptor goes with the handle */
    uv_close((uv_handle_t *)&session->poll, on_closed);
    fq_session_unref(session);
}
