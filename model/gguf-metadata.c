/* SPDX-License-Identifier: Apache-2.0 */
/*
 * GGUF's metadata: keys with scalars and strings, which become JSON, and arrays,
 * which are only walked over; and what it would be as a config.json.
 */
#include "gguf-reader.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ALIGNMENT_MAX (1u << 20)

/* Types of metadata. */
enum value_type {
    VALUE_U8,
    VALUE_I8,
    VALUE_U16,
    VALUE_I16,
    VALUE_U32,
    VALUE_I32,
    VALUE_F32,
    VALUE_BOOL,
    VALUE_STRING,
    VALUE_ARRAY,
    VALUE_U64,
    VALUE_I64,
    VALUE_F64,
    VALUE_TYPES
};

static const uint8_t value_bytes[VALUE_TYPES] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

/* ---- bytes -------------------------------------------------------------------------------- */

static uint64_t load(const uint8_t *bytes, int count) {
    uint64_t value = 0;

    for (int i = count - 1; i >= 0; i--)
        value = value << 8 | bytes[i];
    return value;
}

bool fq_gguf_take(struct fq_gguf_cursor *cursor, uint64_t bytes, const uint8_t **out) {
    if (bytes > cursor->left)
        return false;
    *out = cursor->at;
    cursor->at += bytes;
    cursor->left -= bytes;
    return true;
}

bool fq_gguf_take_number(struct fq_gguf_cursor *cursor, int bytes, uint64_t *out) {
    const uint8_t *at;

    if (!fq_gguf_take(cursor, (uint64_t)bytes, &at))
        return false;
    *out = load(at, bytes);
    return true;
}

bool fq_gguf_take_text(struct fq_gguf_cursor *cursor, struct fq_gguf_text *out) {
    const uint8_t *at;

    if (!fq_gguf_take_number(cursor, 8, &out->length) || !fq_gguf_take(cursor, out->length, &at))
        return false;
    out->bytes = (const char *)at;
    return true;
}

char *fq_gguf_name(struct fq_gguf_text text) {
    json_t *checked;
    char *name = NULL;

    if (text.length == 0 || text.length > FQ_GGUF_NAME_BYTES_MAX ||
        memchr(text.bytes, 0, text.length))
        return NULL;
    checked = json_stringn(text.bytes, (size_t)text.length);
    if (checked) /* it is UTF-8 */
        name = strndup(text.bytes, (size_t)text.length);
    json_decref(checked);
    return name;
}

/* ---- metadata ----------------------------------------------------------------------------- */

static int fail_key(struct fq_gguf_reader *reader, const char *key, enum fq_status status,
                    const char *fault) {
    return fq_fail(reader->err, status, "%s: metadata '%.200s': %s", reader->file->name, key,
                   fault);
}

static int skip_array(struct fq_gguf_reader *reader, const char *key) {
    uint64_t type, count;
    const uint8_t *at;

    if (!fq_gguf_take_number(&reader->cursor, 4, &type) ||
        !fq_gguf_take_number(&reader->cursor, 8, &count))
        return fail_key(reader, key, FQ_FORMAT, "the file ends in its array");
    if (type >= VALUE_TYPES || type == VALUE_ARRAY)
        return fail_key(reader, key, FQ_FORMAT, "an array of what is no scalar or string");
    if (type != VALUE_STRING) {
        if (count > reader->cursor.left ||
            !fq_gguf_take(&reader->cursor, count * value_bytes[type], &at))
            return fail_key(reader, key, FQ_FORMAT, "the file ends in its array");
        return 0;
    }
    for (uint64_t i = 0; i < count; i++) {
        struct fq_gguf_text text;

        if (!fq_gguf_take_text(&reader->cursor, &text))
            return fail_key(reader, key, FQ_FORMAT, "the file ends in its array of strings");
    }
    return 0;
}

static json_t *scalar(enum value_type type, uint64_t bits) {
    uint32_t narrow = (uint32_t)bits;
    float single;
    double wide;

    switch (type) {
    case VALUE_I8:
        return json_integer((int8_t)bits);
    case VALUE_I16:
        return json_integer((int16_t)bits);
    case VALUE_I32:
        return json_integer((int32_t)bits);
    case VALUE_F32:
        memcpy(&single, &narrow, sizeof single);
        return json_real((double)single); /* NULL where it is not finite */
    case VALUE_F64:
        memcpy(&wide, &bits, sizeof wide);
        return json_real(wide);
    case VALUE_BOOL:
        return json_boolean(bits != 0);
    default:
        return bits > INT64_MAX ? NULL : json_integer((json_int_t)bits);
    }
}

static int read_value(struct fq_gguf_reader *reader, const char *key, uint64_t type, json_t **out) {
    uint64_t bits;
    struct fq_gguf_text text;

    *out = NULL;
    if (type >= VALUE_TYPES)
        return fail_key(reader, key, FQ_FORMAT, "its type is not known");
    if (type == VALUE_ARRAY)
        return skip_array(reader, key);
    if (type == VALUE_STRING) {
        if (!fq_gguf_take_text(&reader->cursor, &text))
            return fail_key(reader, key, FQ_FORMAT, "the file ends in its string");
        *out = json_stringn(text.bytes, (size_t)text.length);
        return *out ? 0 : fail_key(reader, key, FQ_FORMAT, "its string is not UTF-8");
    }
    if (!fq_gguf_take_number(&reader->cursor, value_bytes[type], &bits))
        return fail_key(reader, key, FQ_FORMAT, "the file ends in its value");
    if (type == VALUE_BOOL && bits > 1)
        return fail_key(reader, key, FQ_FORMAT, "its boolean is neither 0 nor 1");
    *out = scalar((enum value_type)type, bits);
    return 0;
}

/* What governs how the rest is read. */
static int heed(struct fq_gguf_reader *reader, const char *key, const json_t *value) {
    json_int_t number = json_integer_value(value);

    if (strcmp(key, "general.alignment") == 0) {
        if (!json_is_integer(value) || number < 1 || number > ALIGNMENT_MAX ||
            (number & (number - 1)) != 0)
            return fail_key(reader, key, FQ_FORMAT, "must be a power of two up to 1048576");
        reader->alignment = (uint64_t)number;
    }
    if (strcmp(key, "split.count") == 0 && number > 1)
        return fail_key(reader, key, FQ_UNSUPPORTED,
                        "split files are not read; llama-gguf-split --merge joins them");
    return 0;
}

int fq_gguf_read_metadata(struct fq_gguf_reader *reader, uint64_t count) {
    for (uint64_t i = 0; i < count; i++) {
        struct fq_gguf_text text;
        uint64_t type;
        json_t *value;
        char *key;
        int rc;

        if (!fq_gguf_take_text(&reader->cursor, &text) ||
            !fq_gguf_take_number(&reader->cursor, 4, &type))
            return fq_fail(reader->err, FQ_FORMAT,
                           "%s: the file ends in metadata key %" PRIu64 " of %" PRIu64,
                           reader->file->name, i + 1, count);
        key = fq_gguf_name(text);
        if (!key)
            return fq_fail(reader->err, FQ_FORMAT,
                           "%s: metadata key %" PRIu64 " is not 1 to %d bytes of UTF-8",
                           reader->file->name, i + 1, FQ_GGUF_NAME_BYTES_MAX);
        rc = read_value(reader, key, type, &value);
        if (rc == 0 && json_object_get(reader->file->metadata, key))
            rc = fail_key(reader, key, FQ_FORMAT, "is there twice");
        if (rc == 0)
            rc = heed(reader, key, value);
        if (rc == 0 &&
            json_object_set(reader->file->metadata, key, value ? value : json_null()) < 0)
            rc = fail_key(reader, key, FQ_NO_MEMORY, "no memory to keep it");
        json_decref(value);
        free(key);
        if (rc < 0)
            return rc;
    }
    return 0;
}

/* ---- config.json -------------------------------------------------------------------------- */

json_t *fq_gguf_config(const struct fq_gguf *file) {
    static const struct {
        const char *key, *name; /* "ARCHITECTURE.key", and config.json's name for it */
    } sizes[] = {
        {"embedding_length", "hidden_size"},
        {"block_count", "num_hidden_layers"},
        {"feed_forward_length", "intermediate_size"},
        {"attention.head_count", "num_attention_heads"},
        {"attention.head_count_kv", "num_key_value_heads"},
        {"attention.key_length", "head_dim"},
        {"attention.layer_norm_rms_epsilon", "rms_norm_eps"},
        {"context_length", "max_position_embeddings"},
        {"rope.freq_base", "rope_theta"},
        {"vocab_size", "vocab_size"},
    };
    const char *model = json_string_value(json_object_get(file->metadata, "general.architecture"));
    json_t *config = json_object(), *scalars = json_object(), *value;
    const char *key;

    json_object_foreach(file->metadata, key, value) {
        if (!json_is_null(value))
            json_object_set(scalars, key, value);
    }
    if (model)
        json_object_set_new(config, "model_type", json_string(model));
    for (size_t i = 0; model && i < sizeof sizes / sizeof *sizes; i++) {
        char name[2 * FQ_GGUF_NAME_BYTES_MAX];

        snprintf(name, sizeof name, "%s.%s", model, sizes[i].key);
        if ((value = json_object_get(scalars, name)))
            json_object_set(config, sizes[i].name, value);
    }
    if (json_object_set_new(config, "gguf", scalars) < 0) {
        json_decref(config);
        return NULL;
    }
    return config;
}
