/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A call from its place in the client's table to its reply: begin, send, wait.
 * The threads that do so read the socket, one of them for all: see connection.h.
 */
#include "connection.h"

#include "deadline.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SEND_SLICE_MS 50 /* how often a blocked sender looks whether it should read as well */

/* ---- The table ------------------------------------------------------------------ */

static struct fq_call **bucket(struct fq_client *client, uint32_t id) {
    return &client->calls[id % FQ_CALL_BUCKETS];
}

struct fq_call *fq_call_find(struct fq_client *client, uint32_t id) {
    struct fq_call *call = *bucket(client, id);

    while (call && call->id != id)
        call = call->next;
    return call;
}

static void call_free(struct fq_call *call) {
    for (unsigned i = 0; i < call->fd_count; i++)
        close(call->fds[i]);
    free(call->payload);
    pthread_cond_destroy(&call->wake);
    free(call);
}

void fq_call_release(struct fq_client *client, struct fq_call *call) {
    struct fq_call **link = bucket(client, call->id);

    while (*link != call)
        link = &(*link)->next;
    *link = call->next;
    call_free(call);
}

static struct fq_call *call_new(struct fq_client *client, struct fq_error *err) {
    struct fq_call *call = calloc(1, sizeof *call);
    pthread_condattr_t attributes;

    if (!call) {
        fq_fail(err, FQ_NO_MEMORY, "no memory for a request");
        return NULL;
    }
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&call->wake, &attributes);
    pthread_condattr_destroy(&attributes);
    do {
        call->id = client->next_id++;
    } while (fq_call_find(client, call->id));
    call->next = *bucket(client, call->id);
    *bucket(client, call->id) = call;
    return call;
}

void fq_call_complete(struct fq_client *client, struct fq_call *call) {
    call->done = true;
    if (call->abandoned)
        fq_call_release(client, call);
    else if (call->asleep)
        pthread_cond_signal(&call->wake);
}

/* ---- Sending ----------------------------------------------------------------------------- */

int fq_call_begin(struct fq_client *client, const char *method, uint32_t fields,
                  struct fq_call **out, struct fq_error *err) {
    struct fq_call *call = NULL;
    int rc = 0;

    pthread_mutex_lock(&client->mutex);
    /* A thread that waited for the old socket to fall quiet may find it already replaced. */
    while (!client->alive && client->outside > 0)
        pthread_cond_wait(&client->quiet, &client->mutex);
    if (!client->alive && client->reconnect)
        rc = fq_connection_open(client, err);
    else if (!client->alive)
        rc = fq_fail(err, FQ_CLOSED, "the connection has ended: %s", client->end.message);
    if (rc == 0) {
        call = call_new(client, err);
        rc = call ? 0 : -FQ_NO_MEMORY;
    }
    if (rc < 0) {
        pthread_mutex_unlock(&client->mutex);
        return rc;
    }
    fq_pack_request(&client->pack, call->id, method, fields);
    *out = call;
    return 0;
}

void fq_call_cancel(struct fq_client *client, struct fq_call *call) {
    fq_call_release(client, call);
    pthread_mutex_unlock(&client->mutex);
}

static void outside_begin(struct fq_client *client) {
    client->outside++;
    pthread_mutex_unlock(&client->mutex);
}

static void outside_end(struct fq_client *client) {
    pthread_mutex_lock(&client->mutex);
    if (--client->outside == 0)
        pthread_cond_broadcast(&client->quiet);
}

/*
 * One turn of the leader: waits for bytes (and for room where some wait to be sent), reads, and
 * completes calls.  Mutex held, released while waiting.  1: something happened; 0: the time is up.
 * A fault ends the connection and counts as something that happened.
 */
static int lead(struct fq_client *client, int timeout_ms) {
    struct fq_error err = {0};
    bool sending = fq_writer_pending(&client->writer) > 0;
    struct pollfd ready = {.fd = client->fd, .events = (short)(POLLIN | (sending ? POLLOUT : 0))};
    int rc;

    client->reading = true;
    outside_begin(client);
    rc = poll(&ready, 1, timeout_ms);
    if (rc < 0)
        rc = errno == EINTR ? 1 : fq_fail_errno(&err, "cannot wait for the socket");
    else if (rc > 0 && ready.revents & (POLLIN | POLLHUP | POLLERR)) {
        rc = fq_reader_fill(&client->reader, &err);
        rc = rc < 0 ? rc : 1;
    }
    outside_end(client);
    client->reading = false;
    if (rc > 0 && client->alive) {
        int taken = fq_connection_take(client, &err);

        rc = taken < 0 ? taken : rc;
        if (rc > 0 && fq_writer_pending(&client->writer) > 0) {
            int sent = fq_writer_flush(&client->writer, &err);

            rc = sent < 0 ? sent : rc;
        }
    }
    if (rc < 0) {
        fq_connection_end(client, &err);
        rc = 1;
    }
    return rc;
}

/* Whoever stops waiting passes the lead on. */
static void wake_next_leader(struct fq_client *client) {
    if (!client->reading && client->waiters)
        pthread_cond_signal(&client->waiters->wake);
}

void fq_connection_drain(struct fq_client *client) {
    if (client->alive && !client->reading) {
        lead(client, 0);
        wake_next_leader(client);
    }
}

/* Sends all that waits.  Reads meanwhile where nobody else does, since the daemon may be waiting
 * for us to. */
static int send_pending(struct fq_client *client, uint64_t generation, struct fq_error *err) {
    while (client->alive && client->generation == generation) {
        struct fq_error fault;
        int rc = fq_writer_flush(&client->writer, &fault);

        if (rc > 0)
            return 0;
        if (rc < 0) {
            /* The daemon may have said why before it closed: prefer its words. */
            if (rc == -FQ_CLOSED && !client->reading)
                lead(client, 0);
            fq_connection_end(client, &fault);
            break;
        }
        if (!client->reading) {
            lead(client, -1);
            wake_next_leader(client);
            continue;
        }
        struct pollfd ready = {.fd = client->fd, .events = POLLOUT};
        outside_begin(client);
        poll(&ready, 1, SEND_SLICE_MS);
        outside_end(client);
    }
    return fq_fail(err, FQ_CLOSED, "the connection has ended: %s", client->end.message);
}

int fq_call_send(struct fq_client *client, struct fq_call *call, struct fq_error *err) {
    bool sent = false;
    int rc = fq_pack_status(&client->pack, err);

    if (rc == 0 && fq_pack_length(&client->pack) > client->info.max_frame)
        rc = fq_fail(err, FQ_INVALID, "a request of %zu bytes is larger than %" PRIu64,
                     fq_pack_length(&client->pack), client->info.max_frame);
    if (rc == 0)
        rc = fq_writer_add(&client->writer, fq_pack_data(&client->pack),
                           fq_pack_length(&client->pack), NULL, 0, err);
    if (rc == 0) {
        /* Not to be freed by a reply or an end while this thread is without the mutex. */
        bool abandoned = call->abandoned;

        sent = true;
        call->abandoned = false;
        rc = send_pending(client, client->generation, err);
        call->abandoned = abandoned;
    }
    if (rc < 0 || (call->done && call->abandoned)) {
        if (rc < 0 && sent && call->done && call->error.status == 0)
            rc = 0; /* the reply made it before the end */
        else if (rc < 0 && sent && call->done) {
            rc = call->error.status;
            if (err)
                *err = call->error;
        }
        if (rc < 0 || call->abandoned)
            fq_call_release(client, call);
    }
    pthread_mutex_unlock(&client->mutex);
    return rc;
}

/* ---- Waiting ----------------------------------------------------------------------------- */

static void waiter_add(struct fq_client *client, struct fq_call *call) {
    call->asleep = true;
    call->waiter_previous = NULL;
    call->waiter_next = client->waiters;
    if (client->waiters)
        client->waiters->waiter_previous = call;
    client->waiters = call;
}

static void waiter_remove(struct fq_client *client, struct fq_call *call) {
    call->asleep = false;
    if (call->waiter_next)
        call->waiter_next->waiter_previous = call->waiter_previous;
    if (call->waiter_previous)
        call->waiter_previous->waiter_next = call->waiter_next;
    else
        client->waiters = call->waiter_next;
}

/* Sleeps until the call is done, has progressed, or may lead.  0: the time is up. */
static int follow(struct fq_client *client, struct fq_call *call, int64_t deadline) {
    int rc = 0;

    waiter_add(client, call);
    if (deadline == FQ_FOREVER) {
        pthread_cond_wait(&call->wake, &client->mutex);
    } else {
        struct timespec until = {.tv_sec = (time_t)(deadline / 1000),
                                 .tv_nsec = (long)(deadline % 1000) * 1000000};
        rc = pthread_cond_timedwait(&call->wake, &client->mutex, &until);
    }
    waiter_remove(client, call);
    return rc == ETIMEDOUT ? 0 : 1;
}

static void report_progress(struct fq_client *client, struct fq_call *call,
                            const struct fq_call_wait *how) {
    uint64_t done = call->progress_done, total = call->progress_total;

    call->progressed = false;
    if (!how->progress)
        return;
    pthread_mutex_unlock(&client->mutex);
    how->progress(how->data, done, total);
    pthread_mutex_lock(&client->mutex);
}

/* Mutex held.  0: done. */
static int wait_done(struct fq_client *client, struct fq_call *call, const struct fq_call_wait *how,
                     struct fq_error *err) {
    int64_t deadline = fq_deadline_after(how->timeout_ms);
    int happened = 1;

    for (;;) {
        if (call->progressed) {
            wake_next_leader(client);
            report_progress(client, call, how);
            continue;
        }
        if (call->done)
            return 0;
        if (!happened)
            return fq_fail(err, FQ_TIMEOUT, "no reply within %d ms", how->timeout_ms);
        happened = client->reading ? follow(client, call, deadline)
                                   : lead(client, fq_deadline_poll(deadline));
    }
}

static int reply_parse(struct fq_reply *reply, struct fq_call *call, struct fq_error *err) {
    int rc;

    memset(reply, 0, sizeof *reply);
    rc = fq_message_parse(call->payload, call->length, &reply->message, err);
    if (rc < 0)
        return rc;
    reply->payload = call->payload;
    memcpy(reply->fds, call->fds, sizeof reply->fds);
    reply->fd_count = call->fd_count;
    call->payload = NULL;
    call->fd_count = 0;
    return 0;
}

void fq_reply_fini(struct fq_reply *reply) {
    fq_message_fini(&reply->message);
    for (unsigned i = 0; i < reply->fd_count; i++)
        close(reply->fds[i]);
    free(reply->payload);
    memset(reply, 0, sizeof *reply);
}

int fq_call_finish(struct fq_client *client, struct fq_call *call, const struct fq_call_wait *how,
                   struct fq_reply *reply, struct fq_error *err) {
    int rc;

    pthread_mutex_lock(&client->mutex);
    call->waited_for = true;
    rc = wait_done(client, call, how, err);
    call->waited_for = false;
    wake_next_leader(client);
    if (rc < 0) {
        call->abandoned = !how->keep;
        call->model = NULL;
    } else {
        rc = call->error.status;
        if (rc < 0 && err)
            *err = call->error;
        if (rc == 0 && reply)
            rc = reply_parse(reply, call, err);
        fq_call_release(client, call);
    }
    pthread_mutex_unlock(&client->mutex);
    return rc;
}

int fq_call_run(struct fq_client *client, struct fq_call *call, struct fq_reply *reply,
                struct fq_error *err) {
    struct fq_call_wait how = {.timeout_ms = client->timeout_ms};
    int rc;

    call->keep_reply = reply != NULL;
    rc = fq_call_send(client, call, err);
    return rc < 0 ? rc : fq_call_finish(client, call, &how, reply, err);
}
