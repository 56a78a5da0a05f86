/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Runs batches away from the loop: each worker is a thread with a stream and
 * an event of its own, that gives one batch to the backend and waits for it.
 * The cpu and reference backends, which use every core for one launch, have
 * one worker; cuda has two, so that a launch follows another without a gap.
 * fq_executor_* are called on the loop's thread.
 */
#ifndef FQ_DAEMON_EXECUTOR_H
#define FQ_DAEMON_EXECUTOR_H

#include "backend.h"

#include <uv.h>

#define FQ_EXECUTOR_WORKERS_MAX 2

struct fq_daemon;
struct fq_request;

/* One launch.  The loop's thread fills it, a worker runs it, the loop's thread reads the outcome.
 */
struct fq_batch {
    struct fq_gemm gemm;
    const void *x_rows[FQ_DECODE_ROWS];
    void *y_rows[FQ_DECODE_ROWS];
    const void *residual_rows[FQ_DECODE_ROWS];
    struct fq_request *requests[FQ_DECODE_ROWS];
    size_t count;
    struct fq_error error; /* status 0: done */
};

struct fq_worker {
    struct fq_executor *executor;
    uv_thread_t thread;
    uv_sem_t wake;
    struct fq_stream *stream;
    struct fq_event *event;
    struct fq_batch batch;
    bool busy; /* loop's thread */
    bool done; /* under the executor's lock */
    bool quit; /* set before the last wake */
};

struct fq_executor {
    struct fq_daemon *daemon;
    struct fq_worker workers[FQ_EXECUTOR_WORKERS_MAX];
    int count;
    uv_mutex_t lock;
    uv_async_t completed;
};

int fq_executor_init(struct fq_executor *executor, struct fq_daemon *daemon, struct fq_error *err);
/* Gives waiting requests to idle workers. */
void fq_executor_pump(struct fq_executor *executor);
bool fq_executor_idle(const struct fq_executor *executor);
/* Ends the threads, which must be idle.  The handle `completed` is closed by the caller's loop. */
void fq_executor_fini(struct fq_executor *executor);

#endif
