/* SPDX-License-Identifier: Apache-2.0 */
/* Connecting, hello, and who reads the socket: see connection.h. */
#include "connection.h"

#include "params.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define WAIT_FOREVER  (-1)
#define SEND_SLICE_MS 50 /* how often a blocked sender looks whether it should read as well */

static int64_t now_ms(void) {
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* A deadline is a time of now_ms, or WAIT_FOREVER. */
static int64_t deadline_after(int timeout_ms) {
    return timeout_ms > 0 ? now_ms() + timeout_ms : WAIT_FOREVER;
}

static int poll_timeout(int64_t deadline) {
    if (deadline == WAIT_FOREVER)
        return -1;
    int64_t left = deadline - now_ms();
    return left < 0 ? 0 : left > INT32_MAX ? INT32_MAX : (int)left;
}

/* ---- Calls in the table ------------------------------------------------------------------ */

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

static void call_complete(struct fq_client *client, struct fq_call *call) {
    call->done = true;
    if (call->abandoned)
        fq_call_release(client, call);
    else if (call->asleep)
        pthread_cond_signal(&call->wake);
}

/* ---- What arrives ------------------------------------------------------------------------ */

static int take_reply(struct fq_client *client, const struct fq_message *message,
                      const uint8_t *payload, uint32_t length, struct fq_error *err) {
    struct fq_call *call = fq_call_find(client, message->id);
    int fds[FQ_FRAME_FDS_MAX];
    unsigned fd_count;
    int rc;

    if (!call || call->done)
        return fq_fail(err, FQ_PROTOCOL, "a reply came to request %" PRIu32 ", which is not open",
                       message->id);
    rc = fq_message_fds(message, &fd_count, err);
    if (rc == 0)
        rc = fq_reader_take_fds(&client->reader, fd_count, fds, err);
    if (rc < 0)
        return rc;
    call->error = message->error;
    memcpy(call->fds, fds, fd_count * sizeof *fds);
    call->fd_count = fd_count;
    if (call->keep_reply && call->error.status == 0) {
        call->payload = malloc(length);
        if (call->payload) {
            memcpy(call->payload, payload, length);
            call->length = length;
        } else {
            fq_fail(&call->error, FQ_NO_MEMORY, "no memory for a reply of %" PRIu32 " bytes",
                    length);
        }
    }
    call_complete(client, call);
    return 0;
}

static int take_progress(struct fq_client *client, const struct fq_message *message,
                         struct fq_error *err) {
    struct progress {
        char name[128];
        uint64_t done, total;
    } progress;
    static const struct fq_field fields[] = {
        FQ_FIELD_STR(struct progress, name, FQ_REQUIRED),
        FQ_FIELD_U64(struct progress, done, FQ_REQUIRED),
        FQ_FIELD_U64(struct progress, total, FQ_REQUIRED),
    };
    int rc = fq_result_decode(&message->body, fields, 3, &progress, err);

    if (rc < 0)
        return rc;
    for (int i = 0; i < FQ_CALL_BUCKETS; i++)
        for (struct fq_call *call = client->calls[i]; call; call = call->next)
            if (call->model && strcmp(call->model, progress.name) == 0) {
                call->progress_done = progress.done;
                call->progress_total = progress.total;
                call->progressed = true;
                if (call->asleep)
                    pthread_cond_signal(&call->wake);
            }
    return 0;
}

/* The daemon's parting words: its status and message become the connection's end. */
static int take_error(const struct fq_message *message, struct fq_error *err) {
    struct parting {
        uint32_t code;
        char message[2048];
    } parting;
    static const struct fq_field fields[] = {
        FQ_FIELD_U32(struct parting, code, FQ_REQUIRED),
        FQ_FIELD_STR(struct parting, message, FQ_REQUIRED),
    };
    int rc = fq_result_decode(&message->body, fields, 2, &parting, err);

    if (rc < 0)
        return rc;
    enum fq_status status =
        parting.code > 0 && parting.code <= FQ_TIMEOUT ? (enum fq_status)parting.code : FQ_INTERNAL;
    return fq_fail(err, status, "the daemon ended the session: %s", parting.message);
}

static int take_frame(struct fq_client *client, const uint8_t *payload, uint32_t length,
                      struct fq_error *err) {
    struct fq_message message;
    int rc = fq_message_parse(payload, length, &message, err);

    if (rc < 0)
        return rc;
    if (message.kind == FQ_MESSAGE_REPLY)
        rc = take_reply(client, &message, payload, length, err);
    else if (message.kind == FQ_MESSAGE_REQUEST)
        rc = fq_fail(err, FQ_PROTOCOL, "the daemon sent a request, %s", message.method);
    else if (strcmp(message.method, "model.progress") == 0)
        rc = take_progress(client, &message, err);
    else if (strcmp(message.method, "error") == 0)
        rc = take_error(&message, err);
    fq_message_fini(&message); /* other notifications, shutdown among them, need no answer */
    return rc;
}

static int take_frames(struct fq_client *client, struct fq_error *err) {
    const uint8_t *payload;
    uint32_t length;
    int rc;

    while ((rc = fq_reader_next(&client->reader, &payload, &length, err)) > 0) {
        rc = take_frame(client, payload, length, err);
        if (rc < 0)
            return rc;
    }
    return rc;
}

/* ---- Connecting -------------------------------------------------------------------------- */

void fq_connection_end(struct fq_client *client, const struct fq_error *err) {
    if (!client->alive)
        return;
    client->alive = false;
    client->end = *err;
    shutdown(client->fd, SHUT_RDWR); /* wakes whoever polls it; closed when nobody does */
    for (int i = 0; i < FQ_CALL_BUCKETS; i++) {
        struct fq_call *next;

        for (struct fq_call *call = client->calls[i]; call; call = next) {
            next = call->next;
            if (call->done)
                continue;
            call->error = *err;
            call->error.status = err->status == -FQ_PROTOCOL ? -FQ_PROTOCOL : -FQ_CLOSED;
            call_complete(client, call);
        }
    }
}

/* Waits until no thread uses the old socket, and forgets it. */
static void connection_forget(struct fq_client *client) {
    while (client->outside > 0)
        pthread_cond_wait(&client->quiet, &client->mutex);
    if (client->fd < 0)
        return;
    fq_reader_fini(&client->reader);
    fq_writer_fini(&client->writer);
    close(client->fd);
    client->fd = -1;
}

void fq_connection_fini(struct fq_client *client) {
    struct fq_error err;

    fq_fail(&err, FQ_CANCELLED, "the client was freed");
    fq_connection_end(client, &err);
    connection_forget(client);
    for (int i = 0; i < FQ_CALL_BUCKETS; i++)
        while (client->calls[i])
            fq_call_release(client, client->calls[i]);
}

static int connect_socket(struct fq_client *client, struct fq_error *err) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int flags;

    client->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (client->fd < 0)
        return fq_fail_errno(err, "cannot make a socket");
    memcpy(address.sun_path, client->socket, sizeof address.sun_path);
    if (connect(client->fd, (struct sockaddr *)&address, sizeof address) != 0) {
        int number = errno;

        close(client->fd);
        client->fd = -1;
        return fq_fail(err, number == EACCES || number == EPERM ? FQ_DENIED : FQ_UNAVAILABLE,
                       "no daemon answers at %s: %s", client->socket, strerror(number));
    }
    flags = fcntl(client->fd, F_GETFL);
    fcntl(client->fd, F_SETFL, flags | O_NONBLOCK);
    fq_reader_init(&client->reader, client->fd, FQ_FRAME_FDS_MAX);
    fq_writer_init(&client->writer, client->fd);
    return 0;
}

struct hello {
    uint32_t version;
    char server[64], backend[16];
    const msgpack_object *device, *limits, *capabilities;
};
struct device {
    char name[128], uuid[48], kernels[32];
    uint32_t threads;
    uint64_t memory_total;
};
struct limits {
    uint64_t frame, inflight, inflight_bytes, buffers, buffer_bytes, rows;
};

static bool is_str(const msgpack_object *object, const char *text) {
    return object->type == MSGPACK_OBJECT_STR && object->via.str.size == strlen(text) &&
           memcmp(object->via.str.ptr, text, object->via.str.size) == 0;
}

static int decode_hello(const msgpack_object *body, struct fq_client_info *info,
                        struct fq_error *err) {
    static const struct fq_field hello_fields[] = {
        FQ_FIELD_U32(struct hello, version, FQ_REQUIRED),
        FQ_FIELD_STR(struct hello, server, FQ_REQUIRED),
        FQ_FIELD_STR(struct hello, backend, FQ_REQUIRED),
        FQ_FIELD_MAP(struct hello, device, FQ_REQUIRED),
        FQ_FIELD_MAP(struct hello, limits, FQ_REQUIRED),
        FQ_FIELD_ARRAY(struct hello, capabilities, FQ_REQUIRED),
    };
    static const struct fq_field device_fields[] = {
        FQ_FIELD_STR(struct device, name, FQ_REQUIRED),
        FQ_FIELD_STR(struct device, uuid, FQ_REQUIRED),
        FQ_FIELD_STR(struct device, kernels, FQ_REQUIRED),
        FQ_FIELD_U32(struct device, threads, FQ_REQUIRED),
        FQ_FIELD_U64(struct device, memory_total, FQ_REQUIRED),
    };
    static const struct fq_field limits_fields[] = {
        FQ_FIELD_U64(struct limits, frame, FQ_REQUIRED),
        FQ_FIELD_U64(struct limits, inflight, FQ_REQUIRED),
        FQ_FIELD_U64(struct limits, inflight_bytes, FQ_REQUIRED),
        FQ_FIELD_U64(struct limits, buffers, FQ_REQUIRED),
        FQ_FIELD_U64(struct limits, buffer_bytes, FQ_REQUIRED),
        FQ_FIELD_U64(struct limits, rows, FQ_REQUIRED),
    };
    struct hello hello = {0};
    struct device device = {{0}};
    struct limits limits = {0};
    int rc = fq_result_decode(body, hello_fields, 6, &hello, err);

    if (rc == 0)
        rc = fq_result_decode(hello.device, device_fields, 5, &device, err);
    if (rc == 0)
        rc = fq_result_decode(hello.limits, limits_fields, 6, &limits, err);
    if (rc < 0)
        return rc;
    if (hello.version != FQ_PROTOCOL_VERSION)
        return fq_fail(err, FQ_VERSION, "the daemon speaks protocol version %" PRIu32 ", not %d",
                       hello.version, FQ_PROTOCOL_VERSION);
    memset(info, 0, sizeof *info);
    memcpy(info->server, hello.server, sizeof info->server);
    memcpy(info->backend, hello.backend, sizeof info->backend);
    memcpy(info->device, device.name, sizeof info->device);
    memcpy(info->uuid, device.uuid, sizeof info->uuid);
    memcpy(info->kernels, device.kernels, sizeof info->kernels);
    info->threads = device.threads;
    info->memory_total = device.memory_total;
    info->max_frame = limits.frame;
    info->max_inflight = limits.inflight;
    info->max_inflight_bytes = limits.inflight_bytes;
    info->max_buffers = limits.buffers;
    info->max_buffer_bytes = limits.buffer_bytes;
    info->max_rows = limits.rows;
    for (uint32_t i = 0; i < hello.capabilities->via.array.size; i++) {
        const msgpack_object *name = &hello.capabilities->via.array.ptr[i];

        info->f32 |= is_str(name, "f32");
        info->device_buffers |= is_str(name, "device-buffers");
        info->admin |= is_str(name, "admin");
        info->gate |= is_str(name, "gate");
        info->residual |= is_str(name, "residual");
    }
    return 0;
}

/* The reply to hello, or whatever came in its place. */
static int take_hello(struct fq_client *client, uint32_t id, const uint8_t *payload,
                      uint32_t length, struct fq_error *err) {
    struct fq_message message;
    int rc = fq_message_parse(payload, length, &message, err);

    if (rc < 0)
        return rc;
    if (message.kind == FQ_MESSAGE_NOTIFICATION && strcmp(message.method, "error") == 0) {
        rc = take_error(&message, err);
    } else if (message.kind != FQ_MESSAGE_REPLY || message.id != id) {
        rc = fq_fail(err, FQ_PROTOCOL, "the daemon's first message is not the reply to hello");
    } else if (message.error.status != 0) {
        if (err)
            *err = message.error;
        rc = message.error.status;
    } else {
        rc = decode_hello(&message.body, &client->info, err);
    }
    fq_message_fini(&message);
    return rc;
}

static int say_hello(struct fq_client *client, struct fq_error *err) {
    int64_t deadline = deadline_after(client->timeout_ms);
    uint32_t id = client->next_id++, length;
    const uint8_t *payload;
    int rc;

    fq_pack_request(&client->pack, id, "hello", 2);
    fq_pack_u64(&client->pack, "version", FQ_PROTOCOL_VERSION);
    fq_pack_str(&client->pack, "client", client->name);
    rc = fq_pack_status(&client->pack, err);
    if (rc == 0)
        rc = fq_writer_add(&client->writer, fq_pack_data(&client->pack),
                           fq_pack_length(&client->pack), NULL, 0, err);
    if (rc == 0)
        rc = fq_writer_flush(&client->writer, NULL);
    /* A daemon that refuses this peer may have closed already: its reason can still be read. */
    if (rc < 0 && rc != -FQ_CLOSED)
        return rc;
    for (;;) {
        struct pollfd ready = {.fd = client->fd, .events = POLLIN};

        rc = poll(&ready, 1, poll_timeout(deadline));
        if (rc < 0 && errno != EINTR)
            return fq_fail_errno(err, "cannot wait for the socket");
        if (rc == 0)
            return fq_fail(err, FQ_TIMEOUT, "no answer from %s within %d ms", client->socket,
                           client->timeout_ms);
        if (rc < 0)
            continue;
        rc = fq_reader_fill(&client->reader, err);
        if (rc > 0)
            rc = fq_reader_next(&client->reader, &payload, &length, err);
        if (rc < 0)
            return rc;
        if (rc > 0)
            return take_hello(client, id, payload, length, err);
    }
}

int fq_connection_open(struct fq_client *client, struct fq_error *err) {
    int rc;

    connection_forget(client);
    rc = connect_socket(client, err);
    if (rc < 0)
        return rc;
    /* The daemon's reply to hello is held to the limit that hello will announce. */
    client->reader.limit = FQ_FRAME_LIMIT;
    rc = say_hello(client, err);
    if (rc < 0) {
        connection_forget(client);
        return rc;
    }
    if (client->info.max_frame > 0 && client->info.max_frame <= UINT32_MAX)
        client->reader.limit = (uint32_t)client->info.max_frame;
    client->alive = true;
    client->generation++;
    return 0;
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
        int taken = take_frames(client, &err);

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
    if (deadline == WAIT_FOREVER) {
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
    int64_t deadline = deadline_after(how->timeout_ms);
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
        happened =
            client->reading ? follow(client, call, deadline) : lead(client, poll_timeout(deadline));
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
