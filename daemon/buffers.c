/* SPDX-License-Identifier: Apache-2.0 */
/* The table of a session's buffers: an array in order of their ids. */
#include "config.h"

#include "buffers.h"

#include "daemon.h"
#include "session.h"

#include <stdlib.h>
#include <string.h>

int fq_buffers_create(struct fq_buffers *buffers, struct fq_daemon *daemon,
                      struct fq_account *account, enum fq_memory_kind kind, uint64_t bytes,
                      struct fq_buffer **out, struct fq_error *err) {
    struct fq_buffer *buffer;
    int rc;

    if ((rc = fq_account_buffer(account, &daemon->settings, bytes, err)) < 0)
        return rc;
    if (buffers->count == buffers->room) {
        size_t room = buffers->room ? buffers->room * 2 : 8;
        struct fq_buffer **entries = realloc(buffers->entries, room * sizeof *entries);

        if (!entries) {
            rc = fq_fail(err, FQ_NO_MEMORY, "the table of buffers: out of memory");
            goto uncharge;
        }
        buffers->entries = entries;
        buffers->room = room;
    }
    buffer = calloc(1, sizeof *buffer);
    if (!buffer) {
        rc = fq_fail(err, FQ_NO_MEMORY, "a buffer: out of memory");
        goto uncharge;
    }
    if ((rc = fq_memory_new(daemon->backend, kind, bytes, &buffer->memory, err)) < 0)
        goto free_buffer;
    buffer->id = ++buffers->next_id;
    buffer->daemon = daemon;
    buffer->account = account;
    buffer->bytes = bytes;
    buffer->refs = 1;
    buffers->entries[buffers->count++] = buffer;
    daemon->buffer_bytes += bytes;
    *out = buffer;
    return 0;

free_buffer:
    free(buffer);
uncharge:
    fq_account_end_buffer(account, bytes);
    return rc;
}

/* The index of the first entry whose id is at least `id`. */
static size_t position_of(const struct fq_buffers *buffers, uint64_t id) {
    size_t low = 0, high = buffers->count;

    while (low < high) {
        size_t middle = low + (high - low) / 2;

        if (buffers->entries[middle]->id < id)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

struct fq_buffer *fq_buffers_find(const struct fq_buffers *buffers, uint64_t id) {
    size_t i = position_of(buffers, id);

    return i < buffers->count && buffers->entries[i]->id == id ? buffers->entries[i] : NULL;
}

void fq_buffers_destroy(struct fq_buffers *buffers, struct fq_buffer *buffer,
                        struct fq_call *waiter) {
    size_t i = position_of(buffers, buffer->id);

    memmove(&buffers->entries[i], &buffers->entries[i + 1],
            (buffers->count - i - 1) * sizeof *buffers->entries);
    buffers->count--;
    buffer->waiter = waiter;
    fq_buffer_unref(buffer);
}

void fq_buffers_fini(struct fq_buffers *buffers) {
    for (size_t i = 0; i < buffers->count; i++)
        fq_buffer_unref(buffers->entries[i]);
    free(buffers->entries);
    buffers->entries = NULL;
    buffers->count = buffers->room = 0;
}

struct fq_buffer *fq_buffer_ref(struct fq_buffer *buffer) {
    buffer->refs++;
    return buffer;
}

void fq_buffer_unref(struct fq_buffer *buffer) {
    if (!buffer || --buffer->refs > 0)
        return;
    fq_memory_free(buffer->memory);
    buffer->daemon->buffer_bytes -= buffer->bytes;
    fq_account_end_buffer(buffer->account, buffer->bytes);
    if (buffer->waiter)
        fq_call_reply_empty(buffer->waiter);
    free(buffer);
}
