/* SPDX-License-Identifier: Apache-2.0 */
/*
 * finequantd: starts the parts in order, handles signals, drains and ends.
 * The process's exit status is the positive enum fq_status.
 */
#include "config.h"

#include "daemon.h"
#include "log.h"
#include "session.h"
#include "state.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#ifdef HAVE_SYSTEMD
#include <systemd/sd-daemon.h>
#else
#define sd_notify(unset, state)        ((void)(state))
#define sd_notifyf(unset, format, ...) ((void)0)
#endif

#define LINGER_MS 5000 /* how long a drain waits for peers to read their replies */

static struct {
    int argc;
    char **argv;
    struct fq_daemon daemon;
    uv_signal_t term, interrupt, hangup;
} server;

/* ---- The end ----------------------------------------------------------------------------- */

static void close_handle(uv_handle_t *handle, void *argument) {
    (void)argument;
    if (handle->type == UV_SIGNAL)
        uv_unref(handle); /* closing one would bring the default action back: killed while ending */
    else if (!uv_is_closing(handle))
        uv_close(handle, NULL);
}

/* Everything was answered, or is given up: the loop ends once its handles are closed. */
static void stop(struct fq_daemon *daemon) {
    if (daemon->stopping)
        return;
    daemon->stopping = true;
    fq_listener_stop(&daemon->listener);
    fq_list_each(node, &daemon->sessions)
        fq_session_close(fq_list_entry(node, struct fq_session, link));
    uv_walk(&daemon->loop, close_handle, NULL);
}

static void on_linger(uv_timer_t *timer) {
    struct fq_daemon *daemon = timer->data;

    if (daemon->calls == 0)
        stop(daemon);
    else
        uv_timer_again(timer);
}

static bool drained(const struct fq_daemon *daemon) {
    if (daemon->calls > 0 || daemon->registry.pending > 0 || !fq_executor_idle(&daemon->executor))
        return false;
    fq_list_each(
        node, &daemon->sessions) if (fq_writer_pending(&fq_list_entry(node, struct fq_session, link)
                                                            ->writer) > 0) return false;
    return true;
}

/* Runs before each wait: sends what this iteration gathered, and sees whether a drain is done. */
static void on_prepare(uv_prepare_t *handle) {
    struct fq_daemon *daemon = handle->data;

    fq_list_each(node, &daemon->sessions)
        fq_session_flush(fq_list_entry(node, struct fq_session, link));
    if (daemon->draining && drained(daemon))
        stop(daemon);
}

void fq_daemon_drain(struct fq_daemon *daemon, const char *why) {
    if (daemon->draining)
        return;
    daemon->draining = true;
    fq_log(FQ_LOG_INFO, "shutting down: %s; %llu requests in flight", why,
           (unsigned long long)daemon->calls);
    sd_notify(0, "STOPPING=1");
    fq_listener_stop(&daemon->listener);
    fq_registry_cancel(&daemon->registry);
    fq_list_each(node, &daemon->sessions) {
        struct fq_session *session = fq_list_entry(node, struct fq_session, link);

        if (!session->greeted || session->ending)
            continue;
        fq_notification_begin(session, "shutdown", 0);
        fq_notification_send(session);
    }
    uv_timer_start(&daemon->linger, on_linger, LINGER_MS, LINGER_MS);
}

void fq_daemon_fail(struct fq_daemon *daemon, int status) {
    if (daemon->exit_status == 0)
        daemon->exit_status = status;
    fq_daemon_drain(daemon, "a model of the configuration cannot be loaded");
}

void fq_daemon_device_lost(struct fq_daemon *daemon, const struct fq_error *error) {
    if (daemon->exit_status == FQ_DEVICE)
        return;
    daemon->exit_status = FQ_DEVICE;
    fq_log(FQ_LOG_ERROR, "the device is lost: %s", error->message);
    fq_scheduler_fail_all(&daemon->scheduler, error);
    fq_daemon_drain(daemon, "the device is lost");
}

/* ---- Signals ----------------------------------------------------------------------------- */

static void on_terminate(uv_signal_t *handle, int number) {
    struct fq_daemon *daemon = handle->data;

    if (daemon->draining) {
        fq_log(FQ_LOG_WARNING, "%s again: ending at once", strsignal(number));
        if (*daemon->listener.path)
            unlink(daemon->listener.path);
        _exit(FQ_CANCELLED);
    }
    fq_daemon_drain(daemon, strsignal(number));
}

static void warn_unchanged(const char *option) {
    fq_log(FQ_LOG_WARNING, "%s differs from the running one, and waits for a restart", option);
}

static void load_configured(struct fq_daemon *daemon, const struct fq_settings *settings,
                            bool at_start) {
    for (size_t i = 0; i < settings->model_count; i++) {
        struct fq_load load = {
            .name = settings->models[i].name,
            .path = settings->models[i].path,
            .bits = FQ_LOAD_BITS,
            .group = FQ_LOAD_GROUP,
            .configured = at_start,
        };
        struct fq_error error;
        int rc = fq_registry_load(&daemon->registry, &load, NULL, &error);

        if (rc == -FQ_EXISTS && !at_start)
            continue; /* it is there since before */
        if (rc < 0) {
            fq_log(FQ_LOG_ERROR, "model %s is not loaded: %s", load.name, error.message);
            if (at_start)
                fq_daemon_fail(daemon, -rc);
        }
    }
}

static void on_hangup(uv_signal_t *handle, int number) {
    struct fq_daemon *daemon = handle->data;
    struct fq_settings fresh;
    struct fq_error error;

    (void)number;
    if (daemon->draining)
        return;
    sd_notifyf(0, "RELOADING=1");
    if (fq_settings_init(&fresh, server.argc, server.argv, &error) < 0) {
        fq_log(FQ_LOG_ERROR, "the configuration stays as it was: %s", error.message);
    } else {
        fq_settings_reload(&daemon->settings, &fresh, warn_unchanged);
        fq_log_set_level((enum fq_log_level)daemon->settings.log_level);
        fq_registry_set_budget(&daemon->registry, daemon->settings.memory_budget);
        fq_list_each(node, &daemon->sessions) {
            struct fq_session *session = fq_list_entry(node, struct fq_session, link);

            fq_session_authorize(session);
            if (!session->allowed) {
                fq_fail(&error, FQ_DENIED, "user %u is no longer allowed", (unsigned)session->uid);
                fq_session_end(session, &error);
            }
        }
        load_configured(daemon, &fresh, false);
        fq_log(FQ_LOG_INFO, "configuration reread");
    }
    fq_settings_fini(&fresh);
    sd_notify(0, "READY=1");
}

/* ---- The start --------------------------------------------------------------------------- */

static void raise_descriptor_limit(void) {
    struct rlimit limit;

    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < limit.rlim_max) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

static int open_backend(struct fq_daemon *daemon, struct fq_error *err) {
    struct fq_backend_options options = {
        .threads = (int)daemon->settings.threads,
        .device = daemon->settings.device,
    };
    int rc = fq_backend_new(daemon->settings.backend, &options, &daemon->backend, err);

    if (rc == 0)
        rc = fq_backend_info(daemon->backend, &daemon->device, err);
    if (rc == 0)
        fq_log(FQ_LOG_INFO, "backend %s on %s%s%s, %s kernels, %d threads", daemon->device.backend,
               daemon->device.name, *daemon->device.uuid ? " " : "", daemon->device.uuid,
               daemon->device.kernels, daemon->device.threads);
    return rc;
}

static void start_signal(struct fq_daemon *daemon, uv_signal_t *handle, uv_signal_cb callback,
                         int number) {
    uv_signal_init(&daemon->loop, handle);
    handle->data = daemon;
    uv_signal_start(handle, callback, number);
}

static int start(struct fq_daemon *daemon, struct fq_error *err) {
    int rc;

    daemon->started = uv_hrtime();
    daemon->started_at = time(NULL);
    fq_list_init(&daemon->sessions);
    fq_scheduler_init(&daemon->scheduler);
    fq_pack_init(&daemon->pack);
    uv_prepare_init(&daemon->loop, &daemon->flush);
    daemon->flush.data = daemon;
    uv_prepare_start(&daemon->flush, on_prepare);
    uv_timer_init(&daemon->loop, &daemon->linger);
    daemon->linger.data = daemon;
    signal(SIGPIPE, SIG_IGN);
    start_signal(daemon, &server.term, on_terminate, SIGTERM);
    start_signal(daemon, &server.interrupt, on_terminate, SIGINT);
    start_signal(daemon, &server.hangup, on_hangup, SIGHUP);
    /* the lock first: a second instance must not touch the device */
    if ((rc = fq_listener_init(&daemon->listener, daemon, err)) < 0 ||
        (rc = open_backend(daemon, err)) < 0 ||
        (rc = fq_registry_init(&daemon->registry, daemon, err)) < 0 ||
        (rc = fq_executor_init(&daemon->executor, daemon, err)) < 0)
        return rc;
    fq_log(FQ_LOG_INFO, "%s listens on %s", FQ_SERVER_NAME, daemon->settings.socket);
    sd_notifyf(0, "READY=1\nSTATUS=%s on %s", daemon->device.backend, daemon->device.name);
    load_configured(daemon, &daemon->settings, true);
    fq_state_restore(daemon);
    return 0;
}

static int serve(struct fq_daemon *daemon) {
    struct fq_error error;

    uv_loop_init(&daemon->loop);
    daemon->listener.fd = daemon->listener.lock = -1;
    if (start(daemon, &error) < 0) {
        fq_log(FQ_LOG_ERROR, "%s", error.message);
        daemon->exit_status = -error.status;
        stop(daemon);
    }
    uv_run(&daemon->loop, UV_RUN_DEFAULT);
    fq_executor_fini(&daemon->executor);
    fq_registry_fini(&daemon->registry);
    fq_backend_free(daemon->backend);
    fq_listener_fini(&daemon->listener);
    fq_pack_fini(&daemon->pack);
    return daemon->exit_status;
}

static void print_help(void) {
    printf("Usage: finequantd [OPTION]...\n"
           "Holds quantized models once and multiplies for every local process that asks.\n\n");
    fq_settings_help(stdout);
    printf("\nLISTs are names or numbers separated by commas; SIZEs end in K, M, G or T.\n"
           "Signals: TERM and INT finish what is in flight and end, HUP rereads the\n"
           "configuration.  See finequantd(8) and finequantd.conf(5).\n");
}

int main(int argc, char **argv) {
    struct fq_daemon *daemon = &server.daemon;
    struct fq_error error;
    int status = 0;

    server.argc = argc;
    server.argv = argv;
    fq_log_init();
    if (fq_settings_init(&daemon->settings, argc, argv, &error) < 0) {
        fprintf(stderr, "finequantd: %s\n", error.message);
        status = -error.status;
    } else if (daemon->settings.help) {
        print_help();
    } else if (daemon->settings.version) {
        printf("%s\n", FQ_SERVER_NAME);
    } else if (daemon->settings.check_config) {
        printf("finequantd: the configuration is valid\n");
    } else {
        fq_log_set_level((enum fq_log_level)daemon->settings.log_level);
        raise_descriptor_limit();
        status = serve(daemon);
    }
    fq_settings_fini(&daemon->settings);
    return status;
}
