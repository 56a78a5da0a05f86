/* SPDX-License-Identifier: Apache-2.0 */
/* The workers' threads, and the way back to the loop. */
#include "config.h"

#include "executor.h"

#include "daemon.h"

#include <string.h>

static void run(struct fq_worker *worker) {
    struct fq_batch *batch = &worker->batch;

    batch->error.status = 0;
    if (fq_gemm(worker->stream, &batch->gemm, &batch->error) == 0 &&
        fq_event_record(worker->event, worker->stream, &batch->error) == 0 &&
        fq_event_wait(worker->event, &batch->error) == 0)
        batch->error.status = 0;
}

static void worker_main(void *argument) {
    struct fq_worker *worker = argument;
    struct fq_executor *executor = worker->executor;

    for (;;) {
        uv_sem_wait(&worker->wake);
        if (worker->quit)
            return;
        run(worker);
        uv_mutex_lock(&executor->lock);
        worker->done = true;
        uv_mutex_unlock(&executor->lock);
        uv_async_send(&executor->completed);
    }
}

static void finish(struct fq_executor *executor, struct fq_worker *worker) {
    struct fq_daemon *daemon = executor->daemon;
    struct fq_batch *batch = &worker->batch;
    const struct fq_error *error = batch->error.status < 0 ? &batch->error : NULL;

    worker->busy = false;
    daemon->metrics.launches++;
    for (size_t i = 0; i < batch->count; i++)
        fq_request_finish(batch->requests[i], error);
    if (error && error->status == -FQ_DEVICE)
        fq_daemon_device_lost(daemon, error);
}

static void on_completed(uv_async_t *handle) {
    struct fq_executor *executor = handle->data;

    for (int i = 0; i < executor->count; i++) {
        struct fq_worker *worker = &executor->workers[i];
        bool done;

        uv_mutex_lock(&executor->lock);
        done = worker->done;
        worker->done = false;
        uv_mutex_unlock(&executor->lock);
        if (done)
            finish(executor, worker);
    }
    fq_executor_pump(executor);
}

void fq_executor_pump(struct fq_executor *executor) {
    for (int i = 0; i < executor->count; i++) {
        struct fq_worker *worker = &executor->workers[i];

        if (worker->busy)
            continue;
        if (!fq_scheduler_next(&executor->daemon->scheduler, &worker->batch))
            return;
        worker->busy = true;
        uv_sem_post(&worker->wake);
    }
}

bool fq_executor_idle(const struct fq_executor *executor) {
    for (int i = 0; i < executor->count; i++)
        if (executor->workers[i].busy)
            return false;
    return true;
}

static int worker_init(struct fq_executor *executor, struct fq_worker *worker,
                       struct fq_error *err) {
    struct fq_backend *backend = executor->daemon->backend;
    int rc;

    worker->executor = executor;
    if ((rc = fq_stream_new(backend, &worker->stream, err)) < 0)
        return rc;
    if ((rc = fq_event_new(backend, &worker->event, err)) < 0)
        goto free_stream;
    if (uv_sem_init(&worker->wake, 0) != 0) {
        rc = fq_fail(err, FQ_IO, "a semaphore cannot be made");
        goto free_event;
    }
    if (uv_thread_create(&worker->thread, worker_main, worker) != 0) {
        rc = fq_fail(err, FQ_IO, "a thread cannot be started");
        goto destroy_semaphore;
    }
    return 0;

destroy_semaphore:
    uv_sem_destroy(&worker->wake);
free_event:
    fq_event_free(worker->event);
free_stream:
    fq_stream_free(worker->stream);
    return rc;
}

int fq_executor_init(struct fq_executor *executor, struct fq_daemon *daemon, struct fq_error *err) {
    int wanted = strcmp(daemon->device.backend, "cuda") == 0 ? 2 : 1;
    int rc = 0;

    memset(executor, 0, sizeof *executor);
    if (uv_mutex_init(&executor->lock) != 0)
        return fq_fail(err, FQ_IO, "a lock cannot be made");
    if (uv_async_init(&daemon->loop, &executor->completed, on_completed) != 0) {
        uv_mutex_destroy(&executor->lock);
        return fq_fail(err, FQ_IO, "the executor's wake-up cannot be made");
    }
    executor->completed.data = executor;
    executor->daemon = daemon;
    for (; rc == 0 && executor->count < wanted; executor->count++)
        if ((rc = worker_init(executor, &executor->workers[executor->count], err)) < 0)
            break;
    return rc;
}

void fq_executor_fini(struct fq_executor *executor) {
    if (!executor->daemon)
        return;
    for (int i = 0; i < executor->count; i++) {
        struct fq_worker *worker = &executor->workers[i];

        worker->quit = true;
        uv_sem_post(&worker->wake);
        uv_thread_join(&worker->thread);
        uv_sem_destroy(&worker->wake);
        fq_event_free(worker->event);
        fq_stream_free(worker->stream);
    }
    uv_mutex_destroy(&executor->lock);
}
