/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Connecting, hello, what arrives, and the end: see connection.h.  Calls, and who
 * reads the socket for them, are call.c's.
 */
#include "connection.h"

#include "deadline.h"
#include "params.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

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
    fq_call_complete(client, call);
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

int fq_connection_take(struct fq_client *client, struct fq_error *err) {
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
            fq_call_complete(client, call);
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
    int64_t deadline = fq_deadline_after(client->timeout_ms);
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

        rc = poll(&ready, 1, fq_deadline_poll(deadline));
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
