/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The connection behind a struct fq_client: connecting, hello, the end
 * (connection.c), and calls (call.c).  A call is a request and, later, its reply.  Every field
 * below is guarded by the mutex, except that the one thread which has set `reading` uses the reader
 * without it while it waits for bytes.
 *
 * Of the threads that wait, one is the leader: it reads the socket and
 * completes everybody's calls.  The others sleep, each on its call's own
 * condition; whoever stops waiting wakes the next leader where there is none.
 */
#ifndef FQ_CLIENT_CONNECTION_H
#define FQ_CLIENT_CONNECTION_H

#include "device.h"
#include "error.h"
#include "finequant.h"
#include "frame.h"
#include "message.h"
#include "pack.h"

#include <pthread.h>

#define FQ_CALL_BUCKETS 256

struct fq_call {
    struct fq_call *next; /* in its bucket */
    struct fq_call *waiter_next, *waiter_previous;
    uint32_t id;
    uint64_t generation; /* a submitted gemm's: half of its ticket */
    bool done;
    bool abandoned;  /* nobody will ask: freed when the reply comes */
    bool waited_for; /* a thread is in fq_call_wait for it */
    bool asleep;     /* that thread is a follower, in the waiters' list */
    bool keep_reply; /* the result is wanted: payload and fds are kept */
    pthread_cond_t wake;
    struct fq_error error; /* status 0: success */
    uint8_t *payload;      /* the reply's frame; owned */
    size_t length;
    int fds[FQ_FRAME_FDS_MAX]; /* owned */
    unsigned fd_count;
    const char *model; /* model.load: whose progress to note; borrowed */
    uint64_t progress_done, progress_total;
    bool progressed;
};

struct fq_client {
    pthread_mutex_t mutex;
    char socket[108];
    char name[64];
    int timeout_ms;
    bool reconnect;

    int fd;               /* -1 before the first connection */
    bool alive;           /* false: calls fail until a reconnect */
    unsigned outside;     /* threads that use fd without the mutex */
    pthread_cond_t quiet; /* `outside` became 0 */
    struct fq_error end;  /* why the last connection ended */
    uint64_t generation;
    struct fq_client_info info;

    bool reading; /* a leader is there */
    struct fq_reader reader;
    struct fq_writer writer;
    struct fq_pack pack;
    uint32_t next_id;
    struct fq_call *calls[FQ_CALL_BUCKETS];
    struct fq_call *waiters;

    struct fq_device *device; /* opened by the first device buffer */
};

/* A reply that was kept.  The message's strings lie in the payload. */
struct fq_reply {
    uint8_t *payload;
    struct fq_message message;
    int fds[FQ_FRAME_FDS_MAX];
    unsigned fd_count;
};
void fq_reply_fini(struct fq_reply *reply); /* closes the descriptors left in it */

/* Connects where there is no connection.  Mutex held.  Used by fq_client_new and fq_call_begin. */
int fq_connection_open(struct fq_client *client, struct fq_error *err);
/* Ends the connection and every call: `err` says why.  Mutex held. */
void fq_connection_end(struct fq_client *client, const struct fq_error *err);
void fq_connection_fini(struct fq_client *client);
/* Completes the calls whose replies the reader holds.  Mutex held. */
int fq_connection_take(struct fq_client *client, struct fq_error *err);

/*
 * Begins a request of `fields` params in client->pack.  On success the mutex is held until
 * fq_call_send or fq_call_cancel; on failure it is not.
 */
int fq_call_begin(struct fq_client *client, const char *method, uint32_t fields,
                  struct fq_call **out, struct fq_error *err);
/* Drops a call that was not sent; releases the mutex. */
void fq_call_cancel(struct fq_client *client, struct fq_call *call);
/* Sends what the pack holds; releases the mutex.  On failure the call is gone. */
int fq_call_send(struct fq_client *client, struct fq_call *call, struct fq_error *err);

/*
 * Waits for a call and ends it.  timeout_ms 0: for ever.  reply may be NULL where the result does
 * not matter, else the caller owns it on success.  progress: see struct fq_model_load.
 * On -FQ_TIMEOUT the call is abandoned, or with `keep` left as it was.
 */
struct fq_call_wait {
    int timeout_ms;
    bool keep;
    void (*progress)(void *data, uint64_t done, uint64_t total);
    void *data;
};
int fq_call_finish(struct fq_client *client, struct fq_call *call, const struct fq_call_wait *how,
                   struct fq_reply *reply, struct fq_error *err);

/* Reads what has arrived, without waiting, unless another thread is reading.  Mutex held. */
void fq_connection_drain(struct fq_client *client);

/* A pending call by id, or NULL.  Mutex held. */
struct fq_call *fq_call_find(struct fq_client *client, uint32_t id);
/* A call's reply or end is there: wakes who waits, or frees it where nobody will ask.  Mutex held.
 */
void fq_call_complete(struct fq_client *client, struct fq_call *call);
/* Takes a call that is done out of the table and frees it.  Mutex held. */
void fq_call_release(struct fq_client *client, struct fq_call *call);

/* fq_call_send and fq_call_finish with the client's own timeout. */
int fq_call_run(struct fq_client *client, struct fq_call *call, struct fq_reply *reply,
                struct fq_error *err);

#endif
