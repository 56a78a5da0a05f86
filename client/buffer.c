/* SPDX-License-Identifier: Apache-2.0 */
/* Buffers: shared memory or device memory that the daemon made for this connection. */
#include "client.h"
#include "params.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

struct created {
    uint64_t buffer, bytes, offset;
    uint8_t ipc[FQ_DEVICE_HANDLE_BYTES];
};

static int map_host(struct fq_buffer *buffer, const struct fq_reply *reply, struct fq_error *err) {
    struct stat status;
    int seals;

    if (reply->fd_count != 1)
        return fq_fail(err, FQ_PROTOCOL, "a host buffer came with %u descriptors, 1 is wanted",
                       reply->fd_count);
    /* Memory that shrinks under a mapping would kill this process with SIGBUS. */
    seals = fcntl(reply->fds[0], F_GET_SEALS);
    if (seals < 0 || !(seals & F_SEAL_SHRINK))
        return fq_fail(err, FQ_PROTOCOL, "the buffer's memory is not sealed against shrinking");
    if (fstat(reply->fds[0], &status) != 0 || (uint64_t)status.st_size < buffer->bytes)
        return fq_fail(err, FQ_PROTOCOL, "the buffer's memory is smaller than %" PRIu64 " bytes",
                       buffer->bytes);
    void *host = mmap(NULL, buffer->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, reply->fds[0], 0);
    if (host == MAP_FAILED)
        return fq_fail_errno(err, "cannot map a buffer of %" PRIu64 " bytes", buffer->bytes);
    buffer->host = host;
    return 0;
}

static int open_device(struct fq_buffer *buffer, const struct created *created,
                       struct fq_error *err) {
    int rc = fq_device_open(buffer->client->device, created->ipc, &buffer->device_base, err);

    if (rc == 0)
        buffer->address = buffer->device_base + created->offset;
    return rc;
}

/* The client's device, opened once; mutex taken. */
static int need_device(struct fq_client *client, struct fq_error *err) {
    int rc = 0;

    pthread_mutex_lock(&client->mutex);
    if (!client->info.device_buffers)
        rc = fq_fail(err, FQ_UNSUPPORTED, "the daemon's %s backend has no device buffers",
                     client->info.backend);
    else if (!client->device)
        rc = fq_device_new(client->info.uuid, &client->device, err);
    pthread_mutex_unlock(&client->mutex);
    return rc;
}

static int decode_created(const struct fq_reply *reply, enum fq_buffer_kind kind,
                          struct created *created, struct fq_error *err) {
    static const struct fq_field fields[] = {
        FQ_FIELD_U64(struct created, buffer, FQ_REQUIRED),
        FQ_FIELD_U64(struct created, bytes, FQ_REQUIRED),
        FQ_FIELD_BIN(struct created, ipc, FQ_REQUIRED), /* device only, as what follows */
        FQ_FIELD_U64(struct created, offset, FQ_REQUIRED),
    };

    return fq_result_decode(&reply->message.body, fields, kind == FQ_BUFFER_DEVICE ? 4 : 2, created,
                            err);
}

int fq_buffer_new(struct fq_client *client, enum fq_buffer_kind kind, uint64_t bytes,
                  struct fq_buffer **out, struct fq_error *err) {
    struct fq_buffer *buffer;
    struct created created = {0};
    struct fq_call *call;
    struct fq_reply reply;
    int rc = 0;

    if (kind != FQ_BUFFER_HOST && kind != FQ_BUFFER_DEVICE)
        return fq_fail(err, FQ_INVALID, "a buffer's kind is %d, allowed are 0 and 1", (int)kind);
    if (kind == FQ_BUFFER_DEVICE)
        rc = need_device(client, err);
    if (rc < 0)
        return rc;
    buffer = calloc(1, sizeof *buffer);
    if (!buffer)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for a buffer");
    rc = fq_call_begin(client, "buffer.create", 2, &call, err);
    if (rc == 0) {
        buffer->generation = client->generation;
        fq_pack_u64(&client->pack, "bytes", bytes);
        fq_pack_str(&client->pack, "kind", kind == FQ_BUFFER_HOST ? "host" : "device");
        rc = fq_call_run(client, call, &reply, err);
    }
    if (rc < 0) {
        free(buffer);
        return rc;
    }
    rc = decode_created(&reply, kind, &created, err);
    if (rc < 0) {
        free(buffer);
        goto end;
    }
    buffer->client = client;
    buffer->id = created.buffer;
    buffer->bytes = created.bytes;
    if (created.bytes < bytes)
        rc = fq_fail(err, FQ_PROTOCOL, "a buffer of %" PRIu64 " bytes came for one of %" PRIu64,
                     created.bytes, bytes);
    else if (kind == FQ_BUFFER_HOST)
        rc = map_host(buffer, &reply, err);
    else
        rc = open_device(buffer, &created, err);
    if (rc < 0)
        fq_buffer_free(buffer);
    else
        *out = buffer;
end:
    fq_reply_fini(&reply);
    return rc;
}

/* Tells the daemon, and does not wait: it answers when nothing uses the buffer any more. */
static void destroy(struct fq_buffer *buffer) {
    struct fq_client *client = buffer->client;
    struct fq_call *call;
    bool current;

    pthread_mutex_lock(&client->mutex);
    current = client->alive && client->generation == buffer->generation;
    pthread_mutex_unlock(&client->mutex);
    if (!current || fq_call_begin(client, "buffer.destroy", 1, &call, NULL) < 0)
        return;
    if (client->generation != buffer->generation) {
        fq_call_cancel(client, call);
        return;
    }
    fq_pack_u64(&client->pack, "buffer", buffer->id);
    call->abandoned = true;
    fq_call_send(client, call, NULL);
}

void fq_buffer_free(struct fq_buffer *buffer) {
    if (!buffer)
        return;
    if (buffer->host)
        munmap(buffer->host, buffer->bytes);
    if (buffer->device_base)
        fq_device_close(buffer->client->device, buffer->device_base);
    destroy(buffer);
    free(buffer);
}

uint64_t fq_buffer_bytes(const struct fq_buffer *buffer) {
    return buffer->bytes;
}

void *fq_buffer_host(const struct fq_buffer *buffer) {
    return buffer->host;
}

uint64_t fq_buffer_device(const struct fq_buffer *buffer) {
    return buffer->address;
}
