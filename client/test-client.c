/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The library against a daemon that misbehaves: a thread listens on a socket in a temporary
 * folder, answers hello, and then does what its script says.  Right answers are the integration
 * tests' business.
 */
#include "client.h"
#include "frame.h"
#include "message.h"
#include "pack.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cmocka.h>

enum script {
    SAY_OTHER_VERSION, /* in hello */
    REFUSE_VERSION,    /* hello gets the error `version` */
    CLOSE_AT_ONCE,
    CLOSE_ON_REQUEST,
    CUT_REPLY, /* half a frame, then the end */
    ANSWER_WRONG_ID,
    ANSWER_GARBAGE,
    NAME_A_DESCRIPTOR, /* fds: 1, and none sent */
    PART_WITH_WORDS,   /* the notification `error` */
    ANSWER_LATE,       /* never, as far as the client waits */
    ANSWER_BACKWARDS,  /* two requests, the second first */
    OMIT_A_KEY,        /* in tensor.describe's result */
};

struct peer {
    char folder[64];
    struct sockaddr_un address;
    int listener;
    enum script script;
    pthread_t thread;
};

struct session {
    int fd;
    struct fq_reader reader;
    struct fq_writer writer;
    struct fq_pack pack;
};

/* The next request's id, or -1 at the end. */
static int64_t take(struct session *session) {
    struct fq_message message;
    const uint8_t *payload;
    uint32_t length;
    int rc;

    while ((rc = fq_reader_next(&session->reader, &payload, &length, NULL)) == 0)
        if (fq_reader_fill(&session->reader, NULL) < 0)
            return -1;
    if (rc < 0 || fq_message_parse(payload, length, &message, NULL) < 0)
        return -1;
    fq_message_fini(&message);
    return message.id;
}

static void put(struct session *session) {
    fq_writer_add(&session->writer, fq_pack_data(&session->pack), fq_pack_length(&session->pack),
                  NULL, 0, NULL);
    fq_writer_flush(&session->writer, NULL);
}

static void answer_hello(struct session *session, uint32_t id, enum script script) {
    static const char *const limits[] = {"frame",   "inflight",     "inflight_bytes",
                                         "buffers", "buffer_bytes", "rows"};
    struct fq_pack *pack = &session->pack;

    if (script == REFUSE_VERSION) {
        struct fq_error err;

        fq_fail(&err, FQ_VERSION, "this daemon speaks version 2");
        fq_pack_error(pack, id, &err);
        put(session);
        return;
    }
    fq_pack_reply(pack, id, 7);
    fq_pack_u64(pack, "version", script == SAY_OTHER_VERSION ? 2 : 1);
    fq_pack_str(pack, "server", "peer 0");
    fq_pack_str(pack, "backend", "cpu");
    fq_pack_map(pack, "device", 5);
    fq_pack_str(pack, "name", "none");
    fq_pack_str(pack, "uuid", "");
    fq_pack_str(pack, "kernels", "generic");
    fq_pack_u64(pack, "threads", 1);
    fq_pack_u64(pack, "memory_total", 1);
    fq_pack_map(pack, "limits", 6);
    for (int i = 0; i < 6; i++)
        fq_pack_u64(pack, limits[i], 65536);
    fq_pack_array(pack, "capabilities", 1);
    fq_pack_str(pack, NULL, "f32");
    fq_pack_str(pack, "of_the_future", "skipped");
    put(session);
}

static void answer(struct session *session, uint32_t id) {
    fq_pack_reply(&session->pack, id, 0);
    put(session);
}

static void play(struct session *session, enum script script) {
    struct fq_pack *pack = &session->pack;
    int64_t id = take(session), second;

    if (id < 0 || script == CLOSE_AT_ONCE)
        return;
    answer_hello(session, (uint32_t)id, script);
    id = take(session);
    if (id < 0)
        return;
    switch (script) {
    case CUT_REPLY:
        if (write(session->fd, "\20\0\0\0\x94\1", 6) != 6)
            return;
        break;
    case ANSWER_WRONG_ID:
        answer(session, (uint32_t)id + 7);
        break;
    case ANSWER_GARBAGE:
        if (write(session->fd, "\1\0\0\0\xc1", 5) != 5)
            return;
        break;
    case NAME_A_DESCRIPTOR:
        fq_pack_reply(pack, (uint32_t)id, 3);
        fq_pack_u64(pack, "buffer", 1);
        fq_pack_u64(pack, "bytes", 64);
        fq_pack_u64(pack, "fds", 1);
        put(session);
        break;
    case PART_WITH_WORDS:
        fq_pack_notification(pack, "error", 3);
        fq_pack_u64(pack, "code", FQ_QUOTA);
        fq_pack_str(pack, "name", "quota");
        fq_pack_str(pack, "message", "enough of you");
        put(session);
        break;
    case ANSWER_BACKWARDS:
        second = take(session);
        answer(session, (uint32_t)second);
        answer(session, (uint32_t)id);
        take(session);
        break;
    case OMIT_A_KEY:
        fq_pack_reply(pack, (uint32_t)id, 1);
        fq_pack_map(pack, "tensor", 1);
        fq_pack_u64(pack, "id", 1);
        put(session);
        break;
    case ANSWER_LATE:
        take(session); /* until the client goes */
        break;
    default:
        break;
    }
}

static void *peer_run(void *data) {
    struct peer *peer = data;

    for (;;) {
        struct session session = {.fd = accept(peer->listener, NULL, NULL)};

        if (session.fd < 0)
            return NULL;
        fq_reader_init(&session.reader, session.fd, 0);
        fq_writer_init(&session.writer, session.fd);
        fq_pack_init(&session.pack);
        play(&session, peer->script);
        fq_pack_fini(&session.pack);
        fq_writer_fini(&session.writer);
        fq_reader_fini(&session.reader);
        close(session.fd);
    }
}

static void peer_start(struct peer *peer, enum script script) {
    memset(peer, 0, sizeof *peer);
    strcpy(peer->folder, "/tmp/finequant-test-XXXXXX");
    assert_non_null(mkdtemp(peer->folder));
    peer->script = script;
    peer->address.sun_family = AF_UNIX;
    snprintf(peer->address.sun_path, sizeof peer->address.sun_path, "%s/socket", peer->folder);
    peer->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(peer->listener, (struct sockaddr *)&peer->address, sizeof peer->address),
                     0);
    assert_int_equal(listen(peer->listener, 4), 0);
    assert_int_equal(pthread_create(&peer->thread, NULL, peer_run, peer), 0);
}

static void peer_stop(struct peer *peer) {
    shutdown(peer->listener, SHUT_RDWR);
    pthread_join(peer->thread, NULL);
    close(peer->listener);
    unlink(peer->address.sun_path);
    rmdir(peer->folder);
}

static void a_daemon_that_breaks_the_protocol_gives_a_named_error(void **state) {
    static const struct {
        enum script script;
        int connect, call; /* the statuses wanted */
        const char *says;
    } cases[] = {
        {SAY_OTHER_VERSION, -FQ_VERSION, 0, "protocol version 2, not 1"},
        {REFUSE_VERSION, -FQ_VERSION, 0, "speaks version 2"},
        {CLOSE_AT_ONCE, -FQ_CLOSED, 0, "closed"},
        {CLOSE_ON_REQUEST, 0, -FQ_CLOSED, "closed"},
        {CUT_REPLY, 0, -FQ_PROTOCOL, "bytes into a frame"},
        {ANSWER_WRONG_ID, 0, -FQ_PROTOCOL, "which is not open"},
        {ANSWER_GARBAGE, 0, -FQ_PROTOCOL, "0xc1"},
        {NAME_A_DESCRIPTOR, 0, -FQ_PROTOCOL, "names 1 descriptors, 0 came"},
        {PART_WITH_WORDS, 0, -FQ_CLOSED, "enough of you"},
        {ANSWER_LATE, 0, -FQ_TIMEOUT, "within 50 ms"},
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct peer peer;
        struct fq_client *client = NULL;
        struct fq_buffer *buffer = NULL;
        struct fq_error err = {0};

        peer_start(&peer, cases[i].script);
        struct fq_client_options options = {
            .socket = peer.address.sun_path,
            .timeout_ms = cases[i].script == ANSWER_LATE ? 50 : 0,
        };
        int rc = fq_client_new(&options, &client, &err);
        if (rc != cases[i].connect)
            fail_msg("case %zu: connecting gave %d \"%s\"", i, rc, err.message);
        if (rc == 0) {
            rc = fq_buffer_new(client, FQ_BUFFER_HOST, 64, &buffer, &err);
            if (rc != cases[i].call)
                fail_msg("case %zu: the call gave %d \"%s\"", i, rc, err.message);
        }
        if (!strstr(err.message, cases[i].says))
            fail_msg("case %zu: \"%s\"", i, err.message);
        fq_client_free(client);
        peer_stop(&peer);
    }
}

static void a_result_without_a_key_is_a_protocol_error(void **state) {
    struct peer peer;
    struct fq_client *client;
    struct fq_tensor tensor;
    struct fq_error err;

    (void)state;
    peer_start(&peer, OMIT_A_KEY);
    struct fq_client_options options = {.socket = peer.address.sun_path};
    assert_int_equal(fq_client_new(&options, &client, &err), 0);
    assert_int_equal(fq_client_tensor_find(client, "m", "t", &tensor, &err), -FQ_PROTOCOL);
    assert_string_equal(err.message, "the key name is missing");
    fq_client_free(client);
    peer_stop(&peer);
}

static void *ping(void *client) {
    return fq_client_ping(client, NULL) == 0 ? client : NULL;
}

static void replies_reach_the_threads_they_belong_to(void **state) {
    struct peer peer;
    struct fq_client *client;
    pthread_t threads[2];
    void *ok;

    (void)state;
    peer_start(&peer, ANSWER_BACKWARDS);
    struct fq_client_options options = {.socket = peer.address.sun_path};
    assert_int_equal(fq_client_new(&options, &client, NULL), 0);
    for (int i = 0; i < 2; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, ping, client), 0);
    for (int i = 0; i < 2; i++) {
        pthread_join(threads[i], &ok);
        assert_non_null(ok);
    }
    fq_client_free(client);
    peer_stop(&peer);
}

static void reconnecting_makes_what_was_had_before_stale(void **state) {
    struct peer peer;
    struct fq_client *client;
    struct fq_error err;

    (void)state;
    peer_start(&peer, CLOSE_ON_REQUEST);
    struct fq_client_options options = {.socket = peer.address.sun_path, .reconnect = true};
    assert_int_equal(fq_client_new(&options, &client, &err), 0);
    assert_int_equal(fq_client_generation(client), 1);
    assert_int_equal(fq_client_ping(client, &err), -FQ_CLOSED);
    assert_int_equal(fq_client_fd(client), -1);
    assert_int_equal(fq_client_ping(client, &err), -FQ_CLOSED); /* on the second connection */
    assert_int_equal(fq_client_generation(client), 2);
    fq_client_free(client);

    options.reconnect = false;
    assert_int_equal(fq_client_new(&options, &client, &err), 0);
    assert_int_equal(fq_client_ping(client, &err), -FQ_CLOSED);
    assert_int_equal(fq_client_ping(client, &err), -FQ_CLOSED);
    assert_int_equal(fq_client_generation(client), 1);
    fq_client_free(client);
    peer_stop(&peer);
}

/* The peer's hello names neither capability: nothing is sent, and the connection stays. */
static void a_daemon_without_gates_and_residuals_is_not_asked(void **state) {
    struct peer peer;
    struct fq_client *client;
    struct fq_client_info info;
    struct fq_error err;

    (void)state;
    peer_start(&peer, CLOSE_ON_REQUEST);
    struct fq_client_options options = {.socket = peer.address.sun_path};
    assert_int_equal(fq_client_new(&options, &client, &err), 0);
    fq_client_info(client, &info);
    assert_true(info.f32 && !info.gate && !info.residual);
    struct fq_buffer buffer = {.client = client, .generation = 1, .id = 1, .bytes = 4096};
    struct fq_tensor tensor = {.id = 1, .generation = 1, .name = "t", .n = 4, .k = 4};
    struct fq_gemm_request plain = {.tensor = &tensor,
                                    .m = 1,
                                    .dtype = FQ_F16,
                                    .x = {.buffer = &buffer},
                                    .y = {.buffer = &buffer, .offset = 64}};
    struct fq_gemm_request gemm = plain;
    gemm.gate = &tensor;
    assert_int_equal(fq_client_gemm(client, &gemm, &err), -FQ_UNSUPPORTED);
    assert_string_equal(err.message, "a gate, which peer 0 does not know");
    gemm.gate_bias = FQ_BIAS_BUFFER;
    assert_int_equal(fq_client_gemm(client, &gemm, &err), -FQ_INVALID);
    assert_string_equal(err.message, "FQ_BIAS_BUFFER needs gate_bias_at.buffer and bias_dtype");
    gemm = plain;
    gemm.residual = gemm.y;
    assert_int_equal(fq_client_gemm(client, &gemm, &err), -FQ_UNSUPPORTED);
    assert_string_equal(err.message, "a residual, which peer 0 does not know");
    gemm = plain;
    gemm.gate_bias = FQ_BIAS_CHECKPOINT;
    assert_int_equal(fq_client_gemm(client, &gemm, &err), -FQ_INVALID);
    assert_string_equal(err.message, "gate_bias is 1 without a gate, allowed is 0");
    assert_int_not_equal(fq_client_fd(client), -1);
    assert_int_equal(fq_client_gemm(client, &plain, &err), -FQ_CLOSED); /* this one was sent */
    fq_client_free(client);
    peer_stop(&peer);
}

static void options_out_of_range_are_refused(void **state) {
    char name[80], path[200];
    struct fq_client *client;

    (void)state;
    memset(name, 'n', sizeof name - 1);
    name[sizeof name - 1] = 0;
    memset(path, 'p', sizeof path - 1);
    path[sizeof path - 1] = 0;
    const struct {
        struct fq_client_options options;
        int status;
    } cases[] = {
        {{.socket = path}, -FQ_INVALID},
        {{.socket = ""}, -FQ_INVALID},
        {{.socket = "/nonexistent/socket", .name = name}, -FQ_INVALID},
        {{.socket = "/nonexistent/socket", .name = ""}, -FQ_INVALID},
        {{.socket = "/nonexistent/socket", .timeout_ms = -1}, -FQ_INVALID},
        {{.socket = "/nonexistent/socket"}, -FQ_UNAVAILABLE},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert_int_equal(fq_client_new(&cases[i].options, &client, NULL), cases[i].status);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_daemon_that_breaks_the_protocol_gives_a_named_error),
        cmocka_unit_test(a_result_without_a_key_is_a_protocol_error),
        cmocka_unit_test(replies_reach_the_threads_they_belong_to),
        cmocka_unit_test(reconnecting_makes_what_was_had_before_stale),
        cmocka_unit_test(a_daemon_without_gates_and_residuals_is_not_asked),
        cmocka_unit_test(options_out_of_range_are_refused),
    };

    return cmocka_run_group_tests(tests, NULL, NULL) ? 1 : 0;
}
