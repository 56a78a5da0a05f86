/* SPDX-License-Identifier: Apache-2.0 */
/* Listening: the lock, the stale socket, accepting without spinning. */
#include "config.h"

#include "listener.h"

#include "daemon.h"
#include "log.h"
#include "session.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define ACCEPTS_A_TURN 16
#define RETRY_MS       100
#define SWEEP_MS       1000
#define PATIENCE_MS    10000 /* to say hello, and to read the notification that ends a session */

static void on_retry(uv_timer_t *timer);

static void pause_accepting(struct fq_listener *listener) {
    if (!listener->paused)
        fq_log(FQ_LOG_WARNING, "accept: %s; waiting for one to be free", strerror(errno));
    listener->paused = true;
    uv_poll_stop(&listener->poll);
    uv_timer_start(&listener->retry, on_retry, RETRY_MS, 0);
}

static void refuse(int fd, const struct fq_daemon *daemon) {
    struct fq_error error;
    struct fq_pack pack;
    struct fq_writer writer;

    fq_fail(&error, FQ_BUSY, "%llu sessions are open, allowed are %llu",
            (unsigned long long)daemon->session_count,
            (unsigned long long)daemon->settings.max_sessions);
    fq_pack_init(&pack);
    fq_pack_notification(&pack, "error", 3);
    fq_pack_u64(&pack, "code", FQ_BUSY);
    fq_pack_str(&pack, "name", fq_status_name(FQ_BUSY));
    fq_pack_str(&pack, "message", error.message);
    fq_writer_init(&writer, fd);
    if (fq_writer_add(&writer, fq_pack_data(&pack), fq_pack_length(&pack), NULL, 0, NULL) == 0)
        fq_writer_flush(&writer, NULL);
    fq_writer_fini(&writer);
    fq_pack_fini(&pack);
    close(fd);
}

static void on_poll(uv_poll_t *handle, int status, int events) {
    struct fq_listener *listener = handle->data;
    struct fq_daemon *daemon = listener->daemon;
    struct fq_error error;

    (void)events;
    for (int i = 0; status == 0 && i < ACCEPTS_A_TURN; i++) {
        int fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

        if (fd < 0) {
            if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM)
                pause_accepting(listener);
            return;
        }
        if (daemon->session_count >= daemon->settings.max_sessions)
            refuse(fd, daemon);
        else if (fq_session_new(daemon, fd, &error) < 0)
            fq_log(FQ_LOG_WARNING, "a connection is refused: %s", error.message);
    }
}

void fq_listener_resume(struct fq_listener *listener) {
    if (listener->paused && !uv_is_closing((uv_handle_t *)&listener->poll)) {
        listener->paused = false;
        uv_poll_start(&listener->poll, UV_READABLE, on_poll);
    }
}

static void on_retry(uv_timer_t *timer) {
    fq_listener_resume(fq_list_entry(timer, struct fq_listener, retry));
}

static void on_sweep(uv_timer_t *timer) {
    struct fq_daemon *daemon = fq_list_entry(timer, struct fq_listener, sweep)->daemon;
    uint64_t now = uv_now(&daemon->loop);

    fq_list_each(node, &daemon->sessions) {
        struct fq_session *session = fq_list_entry(node, struct fq_session, link);
        struct fq_error error;

        if (now - session->opened < PATIENCE_MS)
            continue;
        if (session->ending)
            fq_session_close(session);
        else if (!session->greeted) {
            fq_fail(&error, FQ_PROTOCOL, "no hello within %d seconds", PATIENCE_MS / 1000);
            fq_session_end(session, &error);
        }
    }
}

static int take_lock(struct fq_listener *listener, const char *path, struct fq_error *err) {
    char name[sizeof listener->path + 8];
    char holder[32] = "";
    ssize_t length;

    snprintf(name, sizeof name, "%s.lock", path);
    listener->lock = open(name, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (listener->lock < 0)
        return fq_fail_errno(err, "%s", name);
    if (flock(listener->lock, LOCK_EX | LOCK_NB) < 0) {
        if (errno != EWOULDBLOCK)
            return fq_fail_errno(err, "%s", name);
        length = pread(listener->lock, holder, sizeof holder - 1, 0);
        holder[length > 0 ? length : 0] = '\0';
        holder[strcspn(holder, "\n")] = '\0';
        return fq_fail(err, FQ_EXISTS, "another finequantd (pid %s) serves %s", holder, path);
    }
    length = snprintf(holder, sizeof holder, "%d\n", (int)getpid());
    if (ftruncate(listener->lock, 0) < 0 ||
        pwrite(listener->lock, holder, (size_t)length, 0) != length)
        return fq_fail_errno(err, "%s", name);
    return 0;
}

/* Under the lock: whatever socket is there has no daemon behind it. */
static int remove_stale(const char *path, struct fq_error *err) {
    struct stat st;

    if (lstat(path, &st) < 0)
        return errno == ENOENT ? 0 : fq_fail_errno(err, "%s", path);
    if (!S_ISSOCK(st.st_mode))
        return fq_fail(err, FQ_EXISTS, "%s is there and is no socket", path);
    return unlink(path) < 0 ? fq_fail_errno(err, "%s", path) : 0;
}

static int bind_socket(struct fq_listener *listener, const char *path, mode_t mode,
                       struct fq_error *err) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    mode_t mask;
    int rc;

    strcpy(address.sun_path, path); /* the length was checked */
    listener->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (listener->fd < 0)
        return fq_fail_errno(err, "a socket");
    mask = umask(0777); /* nobody connects before chmod has set the mode */
    rc = bind(listener->fd, (struct sockaddr *)&address, sizeof address);
    umask(mask);
    if (rc < 0)
        return fq_fail_errno(err, "%s", path);
    strcpy(listener->path, path);
    if (chmod(path, mode) < 0 || listen(listener->fd, SOMAXCONN) < 0)
        return fq_fail_errno(err, "%s", path);
    return 0;
}

int fq_listener_init(struct fq_listener *listener, struct fq_daemon *daemon, struct fq_error *err) {
    const char *path = daemon->settings.socket;
    size_t room = sizeof((struct sockaddr_un *)0)->sun_path;
    int rc;

    if (strlen(path) >= room)
        return fq_fail(err, FQ_INVALID, "the socket's path %s has %zu bytes, allowed are %zu", path,
                       strlen(path), room - 1);
    if ((rc = take_lock(listener, path, err)) < 0 || (rc = remove_stale(path, err)) < 0 ||
        (rc = bind_socket(listener, path, (mode_t)daemon->settings.mode, err)) < 0)
        return rc;
    if (uv_poll_init(&daemon->loop, &listener->poll, listener->fd) != 0)
        return fq_fail(err, FQ_IO, "%s cannot be polled", path);
    listener->daemon = daemon;
    listener->poll.data = listener;
    uv_timer_init(&daemon->loop, &listener->retry);
    uv_timer_init(&daemon->loop, &listener->sweep);
    uv_poll_start(&listener->poll, UV_READABLE, on_poll);
    uv_timer_start(&listener->sweep, on_sweep, SWEEP_MS, SWEEP_MS);
    return 0;
}

static void on_closed(uv_handle_t *handle) {
    struct fq_listener *listener = handle->data;

    close(listener->fd);
    listener->fd = -1;
}

void fq_listener_stop(struct fq_listener *listener) {
    if (*listener->path)
        unlink(listener->path);
    *listener->path = '\0';
    if (listener->daemon && !uv_is_closing((uv_handle_t *)&listener->poll)) {
        listener->paused = false;
        uv_close((uv_handle_t *)&listener->poll, on_closed);
    }
}

void fq_listener_fini(struct fq_listener *listener) {
    if (listener->fd >= 0)
        close(listener->fd);
    if (*listener->path)
        unlink(listener->path);
    if (listener->lock >= 0)
        close(listener->lock);
    listener->fd = listener->lock = -1;
    *listener->path = '\0';
}
