/* SPDX-License-Identifier: Apache-2.0 */
/* fq_client_call_json: any method, with JSON on this side and msgpack on the wire. */
#include "client.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

static void pack_json(struct fq_pack *pack, const char *key, json_t *value) {
    json_t *item;
    const char *name;
    size_t i;

    switch (json_typeof(value)) {
    case JSON_OBJECT:
        fq_pack_map(pack, key, (uint32_t)json_object_size(value));
        json_object_foreach(value, name, item) pack_json(pack, name, item);
        break;
    case JSON_ARRAY:
        fq_pack_array(pack, key, (uint32_t)json_array_size(value));
        json_array_foreach(value, i, item) pack_json(pack, NULL, item);
        break;
    case JSON_STRING:
        fq_pack_str(pack, key, json_string_value(value));
        break;
    case JSON_INTEGER:
        if (json_integer_value(value) < 0)
            fq_pack_i64(pack, key, json_integer_value(value));
        else
            fq_pack_u64(pack, key, (uint64_t)json_integer_value(value));
        break;
    case JSON_TRUE:
    case JSON_FALSE:
        fq_pack_bool(pack, key, json_is_true(value));
        break;
    case JSON_REAL: {
        msgpack_object number = {.type = MSGPACK_OBJECT_FLOAT64,
                                 .via = {.f64 = json_real_value(value)}};
        fq_pack_object(pack, key, &number);
        break;
    }
    case JSON_NULL: {
        msgpack_object nil = {.type = MSGPACK_OBJECT_NIL};
        fq_pack_object(pack, key, &nil);
        break;
    }
    }
}

static json_t *json_hex(const msgpack_object_bin *bin) {
    static const char digits[] = "0123456789abcdef";
    char *text = malloc((size_t)bin->size * 2 + 1);
    json_t *json = NULL;

    if (!text)
        return NULL;
    for (uint32_t i = 0; i < bin->size; i++) {
        text[2 * i] = digits[(unsigned char)bin->ptr[i] >> 4];
        text[2 * i + 1] = digits[(unsigned char)bin->ptr[i] & 15];
    }
    json = json_stringn(text, (size_t)bin->size * 2);
    free(text);
    return json;
}

static json_t *json_of(const msgpack_object *object);

static json_t *json_of_map(const msgpack_object_map *map) {
    json_t *json = json_object();

    for (uint32_t i = 0; json && i < map->size; i++) {
        const msgpack_object_str *key = &map->ptr[i].key.via.str;
        char name[256];

        if (map->ptr[i].key.type != MSGPACK_OBJECT_STR || key->size >= sizeof name)
            continue; /* no key of the protocol is that long */
        memcpy(name, key->ptr, key->size);
        name[key->size] = 0;
        if (json_object_set_new(json, name, json_of(&map->ptr[i].val)) != 0) {
            json_decref(json);
            return NULL;
        }
    }
    return json;
}

/* NULL where memory ran out, or a string is no UTF-8. */
static json_t *json_of(const msgpack_object *object) {
    json_t *json;

    switch (object->type) {
    case MSGPACK_OBJECT_NIL:
        return json_null();
    case MSGPACK_OBJECT_BOOLEAN:
        return json_boolean(object->via.boolean);
    case MSGPACK_OBJECT_POSITIVE_INTEGER:
        return object->via.u64 > INT64_MAX ? json_real((double)object->via.u64)
                                           : json_integer((json_int_t)object->via.u64);
    case MSGPACK_OBJECT_NEGATIVE_INTEGER:
        return json_integer((json_int_t)object->via.i64);
    case MSGPACK_OBJECT_FLOAT32:
    case MSGPACK_OBJECT_FLOAT64:
        return json_real(object->via.f64);
    case MSGPACK_OBJECT_STR:
        return json_stringn(object->via.str.ptr, object->via.str.size);
    case MSGPACK_OBJECT_BIN:
        return json_hex(&object->via.bin);
    case MSGPACK_OBJECT_MAP:
        return json_of_map(&object->via.map);
    case MSGPACK_OBJECT_ARRAY:
        json = json_array();
        for (uint32_t i = 0; json && i < object->via.array.size; i++)
            if (json_array_append_new(json, json_of(&object->via.array.ptr[i])) != 0) {
                json_decref(json);
                return NULL;
            }
        return json;
    default:
        return NULL;
    }
}

int fq_client_call_json(struct fq_client *client, const char *method, const char *params,
                        char **result, struct fq_error *err) {
    json_error_t fault;
    json_t *map = json_loads(params ? params : "{}", JSON_REJECT_DUPLICATES, &fault);
    json_t *value, *answer;
    struct fq_call *call;
    struct fq_reply reply;
    const char *key;
    int rc;

    if (!json_is_object(map)) {
        rc = fq_fail(err, FQ_INVALID, "params must be a JSON object%s%s", map ? "" : ": ",
                     map ? "" : fault.text);
        json_decref(map);
        return rc;
    }
    rc = fq_call_begin(client, method, (uint32_t)json_object_size(map), &call, err);
    if (rc == 0) {
        json_object_foreach(map, key, value) pack_json(&client->pack, key, value);
        rc = fq_call_run(client, call, &reply, err);
    }
    json_decref(map);
    if (rc < 0)
        return rc;
    answer = json_of(&reply.message.body);
    *result = answer ? json_dumps(answer, JSON_COMPACT) : NULL;
    if (!*result)
        rc = fq_fail(err, FQ_PROTOCOL, "the reply to %s cannot be put as JSON", method);
    json_decref(answer);
    fq_reply_fini(&reply);
    return rc;
}
