/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Maps into structs, by a table of fields.  fq_params_decode is strict, for
 * what a client asks: an unknown key, a key given twice, a missing key or a
 * wrong type is -FQ_INVALID and names the key.  fq_result_decode is for what
 * the daemon answers: unknown keys are skipped, so that a newer daemon may say
 * more, and a fault is -FQ_PROTOCOL.  No state; any thread.
 *
 *     struct load { char name[128]; char path[4096]; uint32_t bits; };
 *     static const struct fq_field fields[] = {
 *         FQ_FIELD_STR(struct load, name, FQ_REQUIRED),
 *         FQ_FIELD_STR(struct load, path, FQ_REQUIRED),
 *         FQ_FIELD_U32(struct load, bits, FQ_OPTIONAL),
 *     };
 *     struct load load = {.bits = 4};
 *     rc = fq_params_decode(&message.body, fields, 3, &load, err);
 */
#ifndef FQ_PROTO_PARAMS_H
#define FQ_PROTO_PARAMS_H

#include "error.h"

#include <msgpack.h>
#include <stdbool.h>

enum fq_field_type {
    FQ_TYPE_U64,   /* uint64_t */
    FQ_TYPE_U32,   /* uint32_t */
    FQ_TYPE_I64,   /* int64_t */
    FQ_TYPE_BOOL,  /* bool */
    FQ_TYPE_STR,   /* char[size]: copied, at most size − 1 bytes, no NUL within */
    FQ_TYPE_BIN,   /* uint8_t[size]: exactly size bytes */
    FQ_TYPE_MAP,   /* const msgpack_object *: borrowed from the message */
    FQ_TYPE_ARRAY, /* const msgpack_object * */
    FQ_TYPE_ANY,   /* const msgpack_object *, of a type the caller looks at */
};

enum fq_field_need {
    FQ_REQUIRED,
    FQ_OPTIONAL, /* absent or nil: the struct keeps what it had */
};

struct fq_field {
    const char *key;
    enum fq_field_type type;
    enum fq_field_need need;
    size_t offset, size; /* of the member */
    bool empty;          /* a STR may have no bytes; in results it always may */
};

#define FQ_FIELD_(struct_type, member, type_, need_)                                               \
    {                                                                                              \
        .key = #member, .type = type_, .need = need_, .offset = offsetof(struct_type, member),     \
        .size = sizeof(((struct_type *)0)->member)                                                 \
    }
#define FQ_FIELD_U64(struct_type, member, need)  FQ_FIELD_(struct_type, member, FQ_TYPE_U64, need)
#define FQ_FIELD_U32(struct_type, member, need)  FQ_FIELD_(struct_type, member, FQ_TYPE_U32, need)
#define FQ_FIELD_I64(struct_type, member, need)  FQ_FIELD_(struct_type, member, FQ_TYPE_I64, need)
#define FQ_FIELD_BOOL(struct_type, member, need) FQ_FIELD_(struct_type, member, FQ_TYPE_BOOL, need)
#define FQ_FIELD_STR(struct_type, member, need)  FQ_FIELD_(struct_type, member, FQ_TYPE_STR, need)
#define FQ_FIELD_BIN(struct_type, member, need)  FQ_FIELD_(struct_type, member, FQ_TYPE_BIN, need)
#define FQ_FIELD_MAP(struct_type, member, need)  FQ_FIELD_(struct_type, member, FQ_TYPE_MAP, need)
#define FQ_FIELD_ARRAY(struct_type, member, need)                                                  \
    FQ_FIELD_(struct_type, member, FQ_TYPE_ARRAY, need)
#define FQ_FIELD_ANY(struct_type, member, need) FQ_FIELD_(struct_type, member, FQ_TYPE_ANY, need)

#define FQ_FIELDS_MAX 64 /* in one table */

int fq_params_decode(const msgpack_object *map, const struct fq_field *fields, size_t count,
                     void *out, struct fq_error *err);
int fq_result_decode(const msgpack_object *map, const struct fq_field *fields, size_t count,
                     void *out, struct fq_error *err);

#endif
