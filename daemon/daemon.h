/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The daemon's one object, which ties the parts together.  It lives in main()
 * and is used on the loop's thread alone; what other threads touch (the
 * executor's workers, the loader) says so in its own header.
 */
#ifndef FQ_DAEMON_DAEMON_H
#define FQ_DAEMON_DAEMON_H

#include "backend.h"
#include "executor.h"
#include "list.h"
#include "listener.h"
#include "metrics.h"
#include "pack.h"
#include "registry.h"
#include "scheduler.h"
#include "settings.h"

#include <time.h>
#include <uv.h>

#define FQ_SERVER_NAME "finequantd " PACKAGE_VERSION

struct fq_daemon {
    uv_loop_t loop;
    struct fq_settings settings;
    struct fq_backend *backend;
    struct fq_device_info device; /* as it was at the start */
    struct fq_registry registry;
    struct fq_scheduler scheduler;
    struct fq_executor executor;
    struct fq_listener listener;
    struct fq_metrics metrics;
    struct fq_list sessions; /* of struct fq_session, those whose socket is open */
    uint64_t session_count;
    uint64_t next_session;
    uint64_t calls;        /* requests of all sessions without a reply */
    uint64_t buffer_bytes; /* of all buffers that exist */
    uint64_t started;      /* uv_hrtime() */
    time_t started_at;
    struct fq_pack pack; /* the message being written */
    uv_prepare_t flush;  /* sends what the sessions gathered, once an iteration */
    uv_timer_t linger;   /* ends a drain whose replies nobody reads */
    bool draining;
    bool stopping;   /* the loop is closing its handles */
    int exit_status; /* positive enum fq_status */
};

/* Refuses new work, finishes and answers what is in flight, then stops the loop. */
void fq_daemon_drain(struct fq_daemon *daemon, const char *why);

/* As drain, but the process ends with `status`: a model of the configuration does not load. */
void fq_daemon_fail(struct fq_daemon *daemon, int status);

/* The device is lost: answers everything with `error`, and ends for a supervisor to start anew. */
void fq_daemon_device_lost(struct fq_daemon *daemon, const struct fq_error *error);

#endif
