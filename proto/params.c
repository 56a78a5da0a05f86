/* SPDX-License-Identifier: Apache-2.0 */
/* Maps into structs: see params.h. */
#include "params.h"

#include "message.h"

#include <string.h>

struct rules {
    bool skip_unknown, empty_strings;
    enum fq_status fault;
};

static const char *const type_names[] = {
    [FQ_TYPE_U64] = "u64",   [FQ_TYPE_U32] = "u32",     [FQ_TYPE_I64] = "i64",
    [FQ_TYPE_BOOL] = "bool", [FQ_TYPE_STR] = "str",     [FQ_TYPE_BIN] = "bin",
    [FQ_TYPE_MAP] = "map",   [FQ_TYPE_ARRAY] = "array", [FQ_TYPE_ANY] = "value",
};

static int store_str(const struct fq_field *field, const struct rules *rules,
                     const msgpack_object_str *str, char *out, struct fq_error *err) {
    size_t minimum = field->empty || rules->empty_strings ? 0 : 1;

    if (str->size < minimum || str->size >= field->size)
        return fq_fail(err, rules->fault, "%s has %u bytes, allowed are %zu to %zu", field->key,
                       str->size, minimum, field->size - 1);
    if (str->size > 0 &&
        (memchr(str->ptr, 0, str->size) || fq_utf8_span(str->ptr, str->size) != str->size))
        return fq_fail(err, rules->fault, "%s is not UTF-8 without NUL", field->key);
    if (str->size > 0)
        memcpy(out, str->ptr, str->size);
    out[str->size] = 0;
    return 0;
}

/* 0, 1 where the type is another one than the field's, or an error. */
static int store(const struct fq_field *field, const struct rules *rules,
                 const msgpack_object *value, char *out, struct fq_error *err) {
    bool positive = value->type == MSGPACK_OBJECT_POSITIVE_INTEGER;

    switch (field->type) {
    case FQ_TYPE_U64:
        if (!positive)
            return 1;
        memcpy(out, &value->via.u64, sizeof(uint64_t));
        return 0;
    case FQ_TYPE_U32: {
        uint32_t number = (uint32_t)value->via.u64;

        if (!positive || value->via.u64 > UINT32_MAX)
            return 1;
        memcpy(out, &number, sizeof number);
        return 0;
    }
    case FQ_TYPE_I64:
        if (!(positive && value->via.u64 <= INT64_MAX) &&
            value->type != MSGPACK_OBJECT_NEGATIVE_INTEGER)
            return 1;
        memcpy(out, &value->via.i64, sizeof(int64_t));
        return 0;
    case FQ_TYPE_BOOL:
        if (value->type != MSGPACK_OBJECT_BOOLEAN)
            return 1;
        memcpy(out, &value->via.boolean, sizeof(bool));
        return 0;
    case FQ_TYPE_STR:
        if (value->type != MSGPACK_OBJECT_STR)
            return 1;
        return store_str(field, rules, &value->via.str, out, err);
    case FQ_TYPE_BIN:
        if (value->type != MSGPACK_OBJECT_BIN)
            return 1;
        if (value->via.bin.size != field->size)
            return fq_fail(err, rules->fault, "%s has %u bytes, %zu are wanted", field->key,
                           value->via.bin.size, field->size);
        memcpy(out, value->via.bin.ptr, field->size);
        return 0;
    case FQ_TYPE_MAP:
    case FQ_TYPE_ARRAY:
    case FQ_TYPE_ANY:
        if ((field->type == FQ_TYPE_MAP && value->type != MSGPACK_OBJECT_MAP) ||
            (field->type == FQ_TYPE_ARRAY && value->type != MSGPACK_OBJECT_ARRAY))
            return 1;
        memcpy(out, &value, sizeof value);
        return 0;
    }
    return 1;
}

static const struct fq_field *find_field(const struct fq_field *fields, size_t count,
                                         const msgpack_object_str *key) {
    for (size_t i = 0; i < count; i++)
        if (key->size == strlen(fields[i].key) && memcmp(key->ptr, fields[i].key, key->size) == 0)
            return &fields[i];
    return NULL;
}

static int decode(const msgpack_object *map, const struct fq_field *fields, size_t count, void *out,
                  const struct rules *rules, struct fq_error *err) {
    uint64_t seen = 0, given = 0;

    if (map->type != MSGPACK_OBJECT_MAP)
        return fq_fail(err, rules->fault, "a map is wanted");
    for (uint32_t i = 0; i < map->via.map.size; i++) {
        const msgpack_object_kv *pair = &map->via.map.ptr[i];
        const msgpack_object_str *key = &pair->key.via.str;

        if (pair->key.type != MSGPACK_OBJECT_STR)
            return fq_fail(err, rules->fault, "every key must be a str");
        const struct fq_field *field = find_field(fields, count, key);
        if (!field && rules->skip_unknown)
            continue;
        if (!field)
            return fq_fail(err, rules->fault, "there is no key %.*s here",
                           (int)(key->size < 64 ? key->size : 64), key->ptr);
        uint64_t bit = (uint64_t)1 << (field - fields);
        if (seen & bit)
            return fq_fail(err, rules->fault, "%s is given twice", field->key);
        seen |= bit;
        if (field->need == FQ_OPTIONAL && pair->val.type == MSGPACK_OBJECT_NIL)
            continue;
        int rc = store(field, rules, &pair->val, (char *)out + field->offset, err);
        if (rc < 0)
            return rc;
        if (rc > 0)
            return fq_fail(err, rules->fault, "%s must be a %s", field->key,
                           type_names[field->type]);
        given |= bit;
    }
    for (size_t i = 0; i < count; i++)
        if (fields[i].need == FQ_REQUIRED && !(given >> i & 1))
            return fq_fail(err, rules->fault, "the key %s is missing", fields[i].key);
    return 0;
}

int fq_params_decode(const msgpack_object *map, const struct fq_field *fields, size_t count,
                     void *out, struct fq_error *err) {
    static const struct rules strict = {.fault = FQ_INVALID};

    return decode(map, fields, count, out, &strict, err);
}

int fq_result_decode(const msgpack_object *map, const struct fq_field *fields, size_t count,
                     void *out, struct fq_error *err) {
    static const struct rules lenient = {
        .skip_unknown = true, .empty_strings = true, .fault = FQ_PROTOCOL};

    return decode(map, fields, count, out, &lenient, err);
}
