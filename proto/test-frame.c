/* SPDX-License-Identifier: Apache-2.0 */
/* Frames over a socketpair: however the bytes are cut, and with descriptors right and wrong. */
#include "frame.h"

#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

struct pair {
    int sockets[2];
    struct fq_reader reader;
    struct fq_writer writer;
};

static int set_up(void **state) {
    struct pair *pair = calloc(1, sizeof *pair);

    if (!pair || socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair->sockets) != 0)
        return -1;
    fq_writer_init(&pair->writer, pair->sockets[0]);
    fq_reader_init(&pair->reader, pair->sockets[1], FQ_FRAME_FDS_MAX);
    *state = pair;
    return 0;
}

static int tear_down(void **state) {
    struct pair *pair = *state;

    fq_reader_fini(&pair->reader);
    fq_writer_fini(&pair->writer);
    close(pair->sockets[0]);
    close(pair->sockets[1]);
    free(pair);
    return 0;
}

static int read_frame(struct pair *pair, const uint8_t **payload, uint32_t *length,
                      struct fq_error *err) {
    int rc;

    while ((rc = fq_reader_next(&pair->reader, payload, length, err)) == 0) {
        rc = fq_reader_fill(&pair->reader, err);
        if (rc <= 0)
            break;
    }
    return rc;
}

static void frames_arrive_byte_by_byte(void **state) {
    struct pair *pair = *state;
    static const char bytes[] = "\3\0\0\0one\5\0\0\0three";
    const uint8_t *payload;
    uint32_t length;
    int frames = 0;

    for (size_t i = 0; i < sizeof bytes - 1; i++) {
        assert_int_equal(write(pair->sockets[0], bytes + i, 1), 1);
        int rc = read_frame(pair, &payload, &length, NULL);
        assert_int_equal(rc, i == 6 || i == sizeof bytes - 2);
        if (rc == 0)
            continue;
        frames++;
        assert_int_equal(length, frames == 1 ? 3 : 5);
        assert_memory_equal(payload, frames == 1 ? "one" : "three", length);
    }
    assert_int_equal(frames, 2);
}

static void a_large_frame_passes_a_full_socket(void **state) {
    struct pair *pair = *state;
    size_t size = FQ_FRAME_LIMIT;
    uint8_t *large = malloc(size);
    const uint8_t *payload;
    uint32_t length;
    int rc = 0, sent = 0;

    for (size_t i = 0; i < size; i++)
        large[i] = (uint8_t)(i * 31);
    pair->reader.limit = FQ_FRAME_LIMIT;
    assert_int_equal(fq_writer_add(&pair->writer, large, size, NULL, 0, NULL), 0);
    while (rc == 0) {
        if (!sent)
            sent = fq_writer_flush(&pair->writer, NULL);
        assert_true(sent >= 0);
        rc = read_frame(pair, &payload, &length, NULL);
        /* Memory follows the bytes that came: at most twice them. */
        assert_true(pair->reader.capacity <= 4096 || pair->reader.capacity <= 2 * pair->reader.end);
    }
    assert_int_equal(rc, 1);
    assert_int_equal(length, size);
    assert_memory_equal(payload, large, size);
    free(large);
}

static void lengths_out_of_bounds_are_refused_before_their_bytes(void **state) {
    struct pair *pair = *state;
    static const char *const headers[] = {"\0\0\0\0", "\1\20\0\0", "\377\377\377\377"};

    for (int i = 0; i < 3; i++) {
        struct fq_error err;
        const uint8_t *payload;
        uint32_t length;

        tear_down(state);
        set_up(state);
        pair = *state;
        assert_int_equal(write(pair->sockets[0], headers[i], 4), 4);
        assert_int_equal(read_frame(pair, &payload, &length, &err), -FQ_PROTOCOL);
        assert_non_null(strstr(err.message, "allowed are 1 to 4096"));
    }
}

static void the_end_of_the_stream_is_told_from_a_cut_frame(void **state) {
    struct pair *pair = *state;
    const uint8_t *payload;
    uint32_t length;

    shutdown(pair->sockets[0], SHUT_WR);
    assert_int_equal(read_frame(pair, &payload, &length, NULL), -FQ_CLOSED);
    tear_down(state);
    set_up(state);
    pair = *state;
    assert_int_equal(write(pair->sockets[0], "\5\0\0\0x", 5), 5);
    shutdown(pair->sockets[0], SHUT_WR);
    assert_int_equal(read_frame(pair, &payload, &length, NULL), -FQ_PROTOCOL);
}

static void descriptors_reach_the_frames_that_name_them(void **state) {
    struct pair *pair = *state;
    const uint8_t *payload;
    uint32_t length;
    int pipe_ends[2], got[2];
    char byte;

    assert_int_equal(pipe(pipe_ends), 0);
    assert_int_equal(fq_writer_add(&pair->writer, "plain", 5, NULL, 0, NULL), 0);
    assert_int_equal(fq_writer_add(&pair->writer, "write", 5, &pipe_ends[1], 1, NULL), 0);
    assert_int_equal(fq_writer_add(&pair->writer, "read", 4, &pipe_ends[0], 1, NULL), 0);
    close(pipe_ends[0]);
    close(pipe_ends[1]);
    assert_int_equal(fq_writer_flush(&pair->writer, NULL), 1);
    assert_int_equal(read_frame(pair, &payload, &length, NULL), 1);
    assert_memory_equal(payload, "plain", 5);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(read_frame(pair, &payload, &length, NULL), 1);
        assert_int_equal(fq_reader_take_fds(&pair->reader, 1, &got[i], NULL), 0);
        assert_true(fcntl(got[i], F_GETFD) & FD_CLOEXEC);
    }
    assert_int_equal(write(got[0], "!", 1), 1);
    assert_int_equal(read(got[1], &byte, 1), 1);
    assert_int_equal(byte, '!');
    close(got[0]);
    close(got[1]);
}

static void descriptor_counts_must_match(void **state) {
    struct pair *pair = *state;
    const uint8_t *payload;
    uint32_t length;
    struct fq_error err;
    int fds[2] = {0, 0}, got[2];

    /* Named two, came one. */
    assert_int_equal(fq_writer_add(&pair->writer, "a", 1, fds, 1, NULL), 0);
    assert_int_equal(fq_writer_flush(&pair->writer, NULL), 1);
    assert_int_equal(read_frame(pair, &payload, &length, NULL), 1);
    assert_int_equal(fq_reader_take_fds(&pair->reader, 2, got, &err), -FQ_PROTOCOL);
    assert_string_equal(err.message, "a message names 2 descriptors, 1 came");
    /* Named none, came one: found out at the next frame. */
    assert_int_equal(read_frame(pair, &payload, &length, &err), -FQ_PROTOCOL);
    assert_non_null(strstr(err.message, "no message named"));
    /* A side that takes none. */
    tear_down(state);
    set_up(state);
    pair = *state;
    pair->reader.fds_limit = 0;
    assert_int_equal(fq_writer_add(&pair->writer, "a", 1, fds, 2, NULL), 0);
    assert_int_equal(fq_writer_flush(&pair->writer, NULL), 1);
    assert_int_equal(read_frame(pair, &payload, &length, &err), -FQ_PROTOCOL);
    assert_string_equal(err.message, "2 descriptors came, 0 may wait");
}

static void more_descriptors_than_a_frame_carries_are_refused(void **state) {
    struct pair *pair = *state;
    int fds[FQ_FRAME_FDS_MAX + 2] = {0};
    union {
        struct cmsghdr aligned;
        char bytes[CMSG_SPACE(sizeof fds)];
    } control = {.bytes = {0}};
    struct iovec data = {(char[]){"\1\0\0\0a"}, 5};
    struct msghdr header = {.msg_iov = &data,
                            .msg_iovlen = 1,
                            .msg_control = control.bytes,
                            .msg_controllen = sizeof control.bytes};
    struct cmsghdr *first = CMSG_FIRSTHDR(&header);
    struct fq_error err;

    assert_int_equal(fq_writer_add(&pair->writer, "a", 1, fds, FQ_FRAME_FDS_MAX + 1, &err),
                     -FQ_INVALID);
    first->cmsg_level = SOL_SOCKET;
    first->cmsg_type = SCM_RIGHTS;
    first->cmsg_len = CMSG_LEN(sizeof fds);
    memcpy(CMSG_DATA(first), fds, sizeof fds);
    assert_int_equal(sendmsg(pair->sockets[0], &header, 0), 5);
    assert_int_equal(fq_reader_fill(&pair->reader, &err), -FQ_PROTOCOL);
    assert_non_null(strstr(err.message, "cut off"));
}

static void writing_to_a_closed_peer_is_an_error_and_no_signal(void **state) {
    struct pair *pair = *state;

    shutdown(pair->sockets[1], SHUT_RDWR);
    assert_int_equal(fq_writer_add(&pair->writer, "a", 1, NULL, 0, NULL), 0);
    assert_int_equal(fq_writer_flush(&pair->writer, NULL), -FQ_CLOSED);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(frames_arrive_byte_by_byte),
        TEST(a_large_frame_passes_a_full_socket),
        TEST(lengths_out_of_bounds_are_refused_before_their_bytes),
        TEST(the_end_of_the_stream_is_told_from_a_cut_frame),
        TEST(descriptors_reach_the_frames_that_name_them),
        TEST(descriptor_counts_must_match),
        TEST(more_descriptors_than_a_frame_carries_are_refused),
        TEST(writing_to_a_closed_peer_is_an_error_and_no_signal),
    };

    return cmocka_run_group_tests(tests, NULL, NULL) ? 1 : 0;
}
