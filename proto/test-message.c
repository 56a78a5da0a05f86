/* SPDX-License-Identifier: Apache-2.0 */
/* The codec against bytes that no honest peer sends, against itself, and against mutation. */
#include "message.h"
#include "pack.h"
#include "params.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define BYTES(text) (const uint8_t *)(text), sizeof(text) - 1

static void every_malformed_payload_is_a_protocol_error(void **state) {
    static const struct {
        const uint8_t *bytes;
        size_t length;
        const char *says; /* within the message */
    } cases[] = {
        {BYTES(""), "ends early"},
        {BYTES("\x94"), "what only"},
        {BYTES("\xc0"), "must be an array"},
        {BYTES("\x81\xa1x\x01"), "must be an array"},
        {BYTES("\x90"), "must be an array"},
        {BYTES("\x91\x00"), "has 4 parts"},
        {BYTES("\x94\x03\x01\xa1p\x80"), "begins with 0, 1 or 2"},
        {BYTES("\x94\x00\xff\xa1p\x80"), "id must be a u32"},
        {BYTES("\x94\x00\xcf\x00\x00\x00\x01\x00\x00\x00\x00\xa1p\x80"), "id must be a u32"},
        {BYTES("\x94\x00\x01\xa0\x80"), "a method must be"},
        {BYTES("\x94\x00\x01\x05\x80"), "a method must be"},
        {BYTES("\x94\x00\x01\xa1\xff\x80"), "a method must be"},
        {BYTES("\x94\x00\x01\xa2p\x00\x80"), "a method must be"},
        {BYTES("\x94\x00\x01\xa1p\x90"), "must be a map"},
        {BYTES("\x94\x00\x01\xa1p\xc0"), "must be a map"},
        {BYTES("\x94\x00\x01\xa1p\x80\x00"), "bytes follow"},
        {BYTES("\x94\x01\x01\xc0\xc0"), "must be a map, or nil"},
        {BYTES("\x94\x01\x01\x93\x03\xa1n\xa1m\x80"), "must be a map, or nil"},
        {BYTES("\x94\x01\x01\x93\x00\xa1n\xa1m\xc0"), "[code, name, message]"},
        {BYTES("\x94\x01\x01\x91\x03\xc0"), "[code, name, message]"},
        {BYTES("\x93\x02\xa1p\xc0"), "must be a map"},
        {BYTES("\x94\x00\x01\xa1p\xc1"), "not allowed"},               /* never used */
        {BYTES("\x94\x00\x01\xa1p\xd4\x01\x02"), "not allowed"},       /* an extension */
        {BYTES("\xdd\xff\xff\xff\xff"), "what only"},                  /* 100 GB of objects */
        {BYTES("\x94\x00\x01\xa1p\xdf\x80\x00\x00\x00"), "what only"}, /* 2·2^31 objects */
        {BYTES("\x94\x00\x01\xdb\xff\xff\xff\xff"), "what only"},      /* a str beyond the end */
        {BYTES("\x94\x00\x01\xa1p\x81\xa1k\xcd\x01"), "what only"},
        {BYTES("\x92\x00\xd9"), "ends early"},
        {BYTES("\x91\x91\x91\x91\x91\x91\x91\x91\x91\x91\x91\x91\x91\x91\x91\x91\x91\x00"),
         "deeper than 16"},
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct fq_message message;
        struct fq_error err = {0};
        /* On the heap at its exact size, so that the sanitizer sees a read beyond it. */
        uint8_t *copy = malloc(cases[i].length + !cases[i].length);

        memcpy(copy, cases[i].bytes, cases[i].length);
        int rc = fq_message_parse(copy, cases[i].length, &message, &err);
        if (rc != -FQ_PROTOCOL || !strstr(err.message, cases[i].says))
            fail_msg("case %zu: %d \"%s\", wanted \"%s\"", i, rc, err.message, cases[i].says);
        free(copy);
    }
}

static void a_request_survives_the_round_trip(void **state) {
    struct params {
        char name[128];
        uint64_t wide;
        int64_t below;
        uint32_t bits;
        bool flag;
        uint8_t handle[4];
        const msgpack_object *place, *list;
    } out = {.bits = 4};
    static const struct fq_field fields[] = {
        FQ_FIELD_STR(struct params, name, FQ_REQUIRED),
        FQ_FIELD_U64(struct params, wide, FQ_REQUIRED),
        FQ_FIELD_I64(struct params, below, FQ_REQUIRED),
        FQ_FIELD_U32(struct params, bits, FQ_OPTIONAL),
        FQ_FIELD_BOOL(struct params, flag, FQ_REQUIRED),
        FQ_FIELD_BIN(struct params, handle, FQ_REQUIRED),
        FQ_FIELD_MAP(struct params, place, FQ_REQUIRED),
        FQ_FIELD_ARRAY(struct params, list, FQ_REQUIRED),
    };
    struct fq_pack pack;
    struct fq_message message;
    struct fq_error err;

    (void)state;
    fq_pack_init(&pack);
    fq_pack_request(&pack, UINT32_MAX, "model.load", 7);
    fq_pack_str(&pack, "name", "caf\xc3\xa9");
    fq_pack_u64(&pack, "wide", UINT64_MAX);
    fq_pack_i64(&pack, "below", INT64_MIN);
    fq_pack_bool(&pack, "flag", true);
    fq_pack_bin(&pack, "handle", "\0\1\2\3", 4);
    fq_pack_map(&pack, "place", 1);
    fq_pack_u64(&pack, "buffer", 3);
    fq_pack_array(&pack, "list", 2);
    fq_pack_u64(&pack, NULL, 1);
    fq_pack_u64(&pack, NULL, 2);
    assert_int_equal(fq_pack_status(&pack, &err), 0);
    assert_int_equal(fq_message_parse(fq_pack_data(&pack), fq_pack_length(&pack), &message, &err),
                     0);
    assert_int_equal(message.kind, FQ_MESSAGE_REQUEST);
    assert_true(message.id == UINT32_MAX);
    assert_string_equal(message.method, "model.load");
    assert_int_equal(fq_params_decode(&message.body, fields, 8, &out, &err), 0);
    assert_string_equal(out.name, "caf\xc3\xa9");
    assert_true(out.wide == UINT64_MAX && out.below == INT64_MIN && out.bits == 4 && out.flag);
    assert_memory_equal(out.handle, "\0\1\2\3", 4);
    assert_int_equal(out.place->via.map.size, 1);
    assert_int_equal(out.list->via.array.size, 2);
    fq_message_fini(&message);
    fq_pack_fini(&pack);
}

static void an_error_reply_keeps_its_status_and_becomes_utf8(void **state) {
    struct fq_error sent = {.status = -FQ_NOT_FOUND, .message = "no file \xff\xc3"}, err;
    struct fq_message message;
    struct fq_pack pack;

    (void)state;
    fq_pack_init(&pack);
    fq_pack_error(&pack, 9, &sent);
    assert_int_equal(fq_message_parse(fq_pack_data(&pack), fq_pack_length(&pack), &message, &err),
                     0);
    assert_int_equal(message.kind, FQ_MESSAGE_REPLY);
    assert_int_equal(message.id, 9);
    assert_int_equal(message.error.status, -FQ_NOT_FOUND);
    assert_string_equal(message.error.message, "no file ??");
    fq_message_fini(&message);
    fq_pack_fini(&pack);
}

static void a_code_of_the_future_is_internal_and_keeps_its_message(void **state) {
    struct fq_message message;
    struct fq_error err;

    (void)state;
    assert_int_equal(
        fq_message_parse(BYTES("\x94\x01\x05\x93\xcd\x03\xe8\xa3new\xa4why?\xc0"), &message, &err),
        0);
    assert_int_equal(message.error.status, -FQ_INTERNAL);
    assert_string_equal(message.error.message, "why?");
    fq_message_fini(&message);
}

struct two {
    char name[4];
    uint32_t bits;
};
static const struct fq_field two_fields[] = {
    FQ_FIELD_STR(struct two, name, FQ_REQUIRED),
    FQ_FIELD_U32(struct two, bits, FQ_OPTIONAL),
};

static void params_are_strict_and_results_let_the_unknown_pass(void **state) {
    static const struct {
        const uint8_t *map;
        size_t length;
        const char *params, *result; /* what the message says; NULL: success */
    } cases[] = {
        {BYTES("\x81\xa4name\xa1x"), NULL, NULL},
        {BYTES("\x82\xa4name\xa1x\xa4\x62its\xc0"), NULL, NULL}, /* optional and nil */
        {BYTES("\x80"), "key name is missing", "key name is missing"},
        {BYTES("\x81\xa4name\xc0"), "name must be a str", "name must be a str"},
        {BYTES("\x82\xa4name\xa1x\xa4name\xa1x"), "name is given twice", "name is given twice"},
        {BYTES("\x82\xa4name\xa1x\xa5other\x01"), "no key other", NULL},
        {BYTES("\x81\x01\x02"), "every key must be a str", "every key must be a str"},
        {BYTES("\x81\xa4name\x07"), "name must be a str", "name must be a str"},
        {BYTES("\x81\xa4name\xa0"), "name has 0 bytes", NULL},
        {BYTES("\x81\xa4name\xa4long"), "name has 4 bytes", "name has 4 bytes"},
        {BYTES("\x81\xa4name\xa1\xff"), "not UTF-8", "not UTF-8"},
        {BYTES("\x81\xa4name\xa3x\0y"), "without NUL", "without NUL"},
        {BYTES("\x82\xa4name\xa1x\xa4\x62its\xff"), "bits must be a u32", "bits must be a u32"},
        {BYTES("\x82\xa4name\xa1x\xa4\x62its\xcf\0\0\0\1\0\0\0\0"), "bits must be a u32",
         "bits must be a u32"},
        {BYTES("\x82\xa4name\xa1x\xa4\x62its\xca\x3f\x80\0\0"), "bits must be a u32",
         "bits must be a u32"},
        {BYTES("\x90"), "a map is wanted", "a map is wanted"},
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        msgpack_unpacked unpacked;
        struct two out = {.bits = 4};
        struct fq_error err = {0};

        msgpack_unpacked_init(&unpacked);
        assert_int_equal(
            msgpack_unpack_next(&unpacked, (const char *)cases[i].map, cases[i].length, NULL),
            MSGPACK_UNPACK_SUCCESS);
        int rc = fq_params_decode(&unpacked.data, two_fields, 2, &out, &err);
        if (rc != (cases[i].params ? -FQ_INVALID : 0) ||
            (cases[i].params && !strstr(err.message, cases[i].params)))
            fail_msg("case %zu as params: %d \"%s\"", i, rc, err.message);
        rc = fq_result_decode(&unpacked.data, two_fields, 2, &out, &err);
        if (rc != (cases[i].result ? -FQ_PROTOCOL : 0) ||
            (cases[i].result && !strstr(err.message, cases[i].result)))
            fail_msg("case %zu as a result: %d \"%s\"", i, rc, err.message);
        msgpack_unpacked_destroy(&unpacked);
    }
}

static void utf8_is_told_from_what_only_looks_like_it(void **state) {
    static const struct {
        const char *text;
        size_t span;
    } cases[] = {
        {"abc", 3},          {"\xc3\xa9x", 3},    {"\xe2\x82\xac", 3},     {"\xf0\x9f\x98\x80", 4},
        {"a\x80", 1},        {"\xc0\xaf", 0}, /* overlong */
        {"\xe0\x80\xaf", 0}, {"\xed\xa0\x80", 0}, {"\xf4\x90\x80\x80", 0}, {"\xf5\x80\x80\x80", 0},
        {"ab\xe2\x82", 2},   {"\xf0\x9f\x98", 0},
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert_int_equal(fq_utf8_span(cases[i].text, strlen(cases[i].text)), cases[i].span);
}

static uint32_t next_random(uint32_t *seed) {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 17;
    *seed ^= *seed << 5;
    return *seed;
}

static void mutated_messages_parse_or_are_refused(void **state) {
    struct fq_pack pack;
    uint32_t seed = 2308;
    unsigned parsed = 0, refused = 0;

    (void)state;
    fq_pack_init(&pack);
    for (int round = 0; round < 100000; round++) {
        fq_pack_request(&pack, next_random(&seed), "gemm", 3);
        fq_pack_str(&pack, "name", "x");
        fq_pack_map(&pack, "place", 2);
        fq_pack_u64(&pack, "buffer", next_random(&seed));
        fq_pack_u64(&pack, "offset", 1);
        fq_pack_array(&pack, "list", 1);
        fq_pack_bin(&pack, NULL, "1234", 4);
        size_t length = fq_pack_length(&pack);
        uint8_t *bytes = malloc(length);
        memcpy(bytes, fq_pack_data(&pack), length);
        for (uint32_t changes = next_random(&seed) % 4; changes > 0; changes--)
            bytes[next_random(&seed) % length] = (uint8_t)next_random(&seed);
        if (next_random(&seed) % 8 == 0)
            length = next_random(&seed) % length;
        struct fq_message message;
        struct two out = {.bits = 4};
        unsigned fds;
        int rc = fq_message_parse(bytes, length, &message, NULL);
        if (rc == 0) {
            parsed++;
            fq_params_decode(&message.body, two_fields, 2, &out, NULL);
            fq_result_decode(&message.body, two_fields, 2, &out, NULL);
            fq_message_fds(&message, &fds, NULL);
            fq_message_fini(&message);
        } else {
            refused++;
            assert_int_equal(rc, -FQ_PROTOCOL);
        }
        free(bytes);
    }
    fq_pack_fini(&pack);
    assert_true(parsed > 1000 && refused > 1000);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_malformed_payload_is_a_protocol_error),
        cmocka_unit_test(a_request_survives_the_round_trip),
        cmocka_unit_test(an_error_reply_keeps_its_status_and_becomes_utf8),
        cmocka_unit_test(a_code_of_the_future_is_internal_and_keeps_its_message),
        cmocka_unit_test(params_are_strict_and_results_let_the_unknown_pass),
        cmocka_unit_test(utf8_is_told_from_what_only_looks_like_it),
        cmocka_unit_test(mutated_messages_parse_or_are_refused),
    };

    return cmocka_run_group_tests(tests, NULL, NULL) ? 1 : 0;
}
