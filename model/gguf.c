/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The GGUF reader.  The format, little-endian: "GGUF", u32 version, u64 tensors,
 * u64 keys; the keys (string, u32 type, value); the tensors (string, u32 rank,
 * u64 sizes with the innermost first, u32 type, u64 offset); padding; the data,
 * to which offsets are relative, each at a multiple of general.alignment.  A file
 * is taken as hostile: nothing is read or allocated before the bytes are there.
 */
#include "gguf.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define VERSION           3
#define ALIGNMENT_DEFAULT 32
#define ALIGNMENT_MAX     (1u << 20)
#define RANK_MAX          4
#define STACK_MAX         65536 /* matrices in a tensor of rank 3 */
#define NAME_BYTES_MAX    255
#define KEY_BYTES_LEAST   13 /* an empty name, a type, a byte */
#define INFO_BYTES_LEAST  24 /* an empty name, a rank of 0, a type, an offset */

/* The bytes that are left. */
struct cursor {
    const uint8_t *at;
    uint64_t left;
};

struct text {
    const char *bytes; /* not terminated */
    uint64_t length;
};

/* Types of tensors.  Only those with a name in our terms are read. */
static const struct tensor_type {
    const char *name;  /* GGUF's */
    const char *dtype; /* ours, or NULL */
    int block, bytes;  /* weights a block, bytes a block */
} tensor_types[] = {
    [0] = {"F32", "F32", 1, 4},
    [1] = {"F16", "F16", 1, 2},
    [2] = {"Q4_0", "Q4_0", FQ_GGUF_BLOCK, 18},
    [3] = {"Q4_1", NULL, 0, 0},
    [6] = {"Q5_0", NULL, 0, 0},
    [7] = {"Q5_1", NULL, 0, 0},
    [8] = {"Q8_0", "Q8_0", FQ_GGUF_BLOCK, 34},
    [9] = {"Q8_1", NULL, 0, 0},
    [10] = {"Q2_K", NULL, 0, 0},
    [11] = {"Q3_K", NULL, 0, 0},
    [12] = {"Q4_K", NULL, 0, 0},
    [13] = {"Q5_K", NULL, 0, 0},
    [14] = {"Q6_K", NULL, 0, 0},
    [15] = {"Q8_K", NULL, 0, 0},
    [16] = {"IQ2_XXS", NULL, 0, 0},
    [17] = {"IQ2_XS", NULL, 0, 0},
    [18] = {"IQ3_XXS", NULL, 0, 0},
    [19] = {"IQ1_S", NULL, 0, 0},
    [20] = {"IQ4_NL", NULL, 0, 0},
    [21] = {"IQ3_S", NULL, 0, 0},
    [22] = {"IQ2_S", NULL, 0, 0},
    [23] = {"IQ4_XS", NULL, 0, 0},
    [24] = {"I8", "I8", 1, 1},
    [25] = {"I16", "I16", 1, 2},
    [26] = {"I32", "I32", 1, 4},
    [27] = {"I64", "I64", 1, 8},
    [28] = {"F64", "F64", 1, 8},
    [29] = {"IQ1_M", NULL, 0, 0},
    [30] = {"BF16", "BF16", 1, 2},
    [34] = {"TQ1_0", NULL, 0, 0},
    [35] = {"TQ2_0", NULL, 0, 0},
    [39] = {"MXFP4", NULL, 0, 0},
};

#define TENSOR_TYPE_COUNT (sizeof tensor_types / sizeof *tensor_types)

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

struct reader {
    struct fq_gguf *file;
    struct cursor cursor;
    uint64_t alignment;
    struct fq_error *err;
};

/* ---- bytes -------------------------------------------------------------------------------- */

static uint64_t load(const uint8_t *bytes, int count) {
    uint64_t value = 0;

    for (int i = count - 1; i >= 0; i--)
        value = value << 8 | bytes[i];
    return value;
}

static bool take(struct cursor *cursor, uint64_t bytes, const uint8_t **out) {
    if (bytes > cursor->left)
        return false;
    *out = cursor->at;
    cursor->at += bytes;
    cursor->left -= bytes;
    return true;
}

static bool take_number(struct cursor *cursor, int bytes, uint64_t *out) {
    const uint8_t *at;

    if (!take(cursor, (uint64_t)bytes, &at))
        return false;
    *out = load(at, bytes);
    return true;
}

static bool take_text(struct cursor *cursor, struct text *out) {
    const uint8_t *at;

    if (!take_number(cursor, 8, &out->length) || !take(cursor, out->length, &at))
        return false;
    out->bytes = (const char *)at;
    return true;
}

/* A name: short UTF-8 without NUL.  The text of it, owned by the caller, or NULL. */
static char *copy_name(struct text text) {
    json_t *checked;
    char *name = NULL;

    if (text.length == 0 || text.length > NAME_BYTES_MAX || memchr(text.bytes, 0, text.length))
        return NULL;
    checked = json_stringn(text.bytes, (size_t)text.length);
    if (checked) /* it is UTF-8 */
        name = strndup(text.bytes, (size_t)text.length);
    json_decref(checked);
    return name;
}

/* ---- metadata ----------------------------------------------------------------------------- */

static int fail_key(struct reader *reader, const char *key, enum fq_status status,
                    const char *fault) {
    return fq_fail(reader->err, status, "%s: metadata '%.200s': %s", reader->file->name, key,
                   fault);
}

static int skip_array(struct reader *reader, const char *key) {
    uint64_t type, count;
    const uint8_t *at;

    if (!take_number(&reader->cursor, 4, &type) || !take_number(&reader->cursor, 8, &count))
        return fail_key(reader, key, FQ_FORMAT, "the file ends in its array");
    if (type >= VALUE_TYPES || type == VALUE_ARRAY)
        return fail_key(reader, key, FQ_FORMAT, "an array of what is no scalar or string");
    if (type != VALUE_STRING) {
        if (count > reader->cursor.left || !take(&reader->cursor, count * value_bytes[type], &at))
            return fail_key(reader, key, FQ_FORMAT, "the file ends in its array");
        return 0;
    }
    for (uint64_t i = 0; i < count; i++) {
        struct text text;

        if (!take_text(&reader->cursor, &text))
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

static int read_value(struct reader *reader, const char *key, uint64_t type, json_t **out) {
    uint64_t bits;
    struct text text;

    *out = NULL;
    if (type >= VALUE_TYPES)
        return fail_key(reader, key, FQ_FORMAT, "its type is not known");
    if (type == VALUE_ARRAY)
        return skip_array(reader, key);
    if (type == VALUE_STRING) {
        if (!take_text(&reader->cursor, &text))
            return fail_key(reader, key, FQ_FORMAT, "the file ends in its string");
        *out = json_stringn(text.bytes, (size_t)text.length);
        return *out ? 0 : fail_key(reader, key, FQ_FORMAT, "its string is not UTF-8");
    }
    if (!take_number(&reader->cursor, value_bytes[type], &bits))
        return fail_key(reader, key, FQ_FORMAT, "the file ends in its value");
    if (type == VALUE_BOOL && bits > 1)
        return fail_key(reader, key, FQ_FORMAT, "its boolean is neither 0 nor 1");
    *out = scalar((enum value_type)type, bits);
    return 0;
}

/* What governs how the rest is read. */
static int heed(struct reader *reader, const char *key, const json_t *value) {
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

static int read_metadata(struct reader *reader, uint64_t count) {
    for (uint64_t i = 0; i < count; i++) {
        struct text text;
        uint64_t type;
        json_t *value;
        char *key;
        int rc;

        if (!take_text(&reader->cursor, &text) || !take_number(&reader->cursor, 4, &type))
            return fq_fail(reader->err, FQ_FORMAT,
                           "%s: the file ends in metadata key %" PRIu64 " of %" PRIu64,
                           reader->file->name, i + 1, count);
        key = copy_name(text);
        if (!key)
            return fq_fail(reader->err, FQ_FORMAT,
                           "%s: metadata key %" PRIu64 " is not 1 to %d bytes of UTF-8",
                           reader->file->name, i + 1, NAME_BYTES_MAX);
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

/* ---- tensors ------------------------------------------------------------------------------ */

/* One entry of the table of tensors, before its data is known to be there. */
struct info {
    char *name;
    const struct tensor_type *type;
    int rank;
    int64_t sizes[RANK_MAX]; /* innermost first */
    uint64_t offset, bytes;
};

static int fail_info(struct reader *reader, const struct info *info, enum fq_status status,
                     const char *format, ...) __attribute__((format(printf, 4, 5)));

static int fail_info(struct reader *reader, const struct info *info, enum fq_status status,
                     const char *format, ...) {
    char fault[200];
    va_list args;

    va_start(args, format);
    vsnprintf(fault, sizeof fault, format, args);
    va_end(args);
    return fq_fail(reader->err, status, "%s: tensor '%.200s': %s", reader->file->name, info->name,
                   fault);
}

static int read_type(struct reader *reader, struct info *info, uint64_t number) {
    const struct tensor_type *type =
        number < TENSOR_TYPE_COUNT ? &tensor_types[number] : &tensor_types[4];

    if (!type->name)
        return fail_info(reader, info, FQ_UNSUPPORTED,
                         "type %" PRIu64 " is not known; served are Q8_0 and Q4_0", number);
    if (!type->dtype)
        return fail_info(reader, info, FQ_UNSUPPORTED, "type %s; served are Q8_0 and Q4_0",
                         type->name);
    info->type = type;
    return 0;
}

/* The bytes of its sizes, which must fit in 63 bits. */
static int measure(struct reader *reader, struct info *info) {
    int64_t bytes = info->type->bytes;

    if (info->rank > 0 && info->sizes[0] % info->type->block != 0)
        return fail_info(reader, info, FQ_FORMAT, "rows of %" PRId64 " are not whole blocks of %d",
                         info->sizes[0], info->type->block);
    for (int i = 0; i < info->rank; i++)
        if (__builtin_mul_overflow(
                bytes, i == 0 ? info->sizes[0] / info->type->block : info->sizes[i], &bytes))
            return fail_info(reader, info, FQ_FORMAT, "the size of its shape overflows");
    if (info->type->block > 1 && info->rank == 3 && info->sizes[2] > STACK_MAX)
        return fail_info(reader, info, FQ_UNSUPPORTED,
                         "a stack of %" PRId64 " matrices, at most %d are read", info->sizes[2],
                         STACK_MAX);
    info->bytes = (uint64_t)bytes;
    return 0;
}

static int read_info(struct reader *reader, struct info *info, uint64_t number) {
    uint64_t rank, size, type;
    struct text text;
    int rc;

    if (!take_text(&reader->cursor, &text))
        return fq_fail(reader->err, FQ_FORMAT, "%s: the file ends in the name of tensor %" PRIu64,
                       reader->file->name, number);
    info->name = copy_name(text);
    if (!info->name)
        return fq_fail(reader->err, FQ_FORMAT,
                       "%s: the name of tensor %" PRIu64 " is not 1 to %d bytes of UTF-8",
                       reader->file->name, number, NAME_BYTES_MAX);
    if (!take_number(&reader->cursor, 4, &rank))
        return fail_info(reader, info, FQ_FORMAT, "the file ends in its entry");
    if (rank > RANK_MAX)
        return fail_info(reader, info, FQ_FORMAT, "rank is %" PRIu64 ", at most %d is allowed",
                         rank, RANK_MAX);
    info->rank = (int)rank;
    for (int i = 0; i < info->rank; i++) {
        if (!take_number(&reader->cursor, 8, &size))
            return fail_info(reader, info, FQ_FORMAT, "the file ends in its entry");
        if (size < 1 || size > INT64_MAX)
            return fail_info(reader, info, FQ_FORMAT, "size %d is %" PRIu64, i, size);
        info->sizes[i] = (int64_t)size;
    }
    if (!take_number(&reader->cursor, 4, &type) || !take_number(&reader->cursor, 8, &info->offset))
        return fail_info(reader, info, FQ_FORMAT, "the file ends in its entry");
    if ((rc = read_type(reader, info, type)) < 0)
        return rc;
    return measure(reader, info);
}

/* In the order of the table each begins where the last one, padded, ended, as llama.cpp wants. */
static int check_cover(struct reader *reader, const struct info *infos, size_t count) {
    uint64_t end = 0, begin = 0, size = reader->cursor.left;

    for (size_t i = 0; i < count; i++) {
        const struct info *info = &infos[i];

        if (info->offset % reader->alignment != 0)
            return fail_info(reader, info, FQ_FORMAT,
                             "offset %" PRIu64 " is no multiple of the alignment %" PRIu64,
                             info->offset, reader->alignment);
        if (info->offset != begin)
            return fail_info(reader, info, FQ_FORMAT,
                             "%s: begins at %" PRIu64 ", the one before ends at %" PRIu64,
                             info->offset > begin ? "gap" : "overlap", info->offset, begin);
        if (begin > size || info->bytes > size - begin)
            return fail_info(reader, info, FQ_FORMAT,
                             "its %" PRIu64 " bytes at %" PRIu64 " are not within the %" PRIu64
                             " bytes of data",
                             info->bytes, begin, size);
        end = begin + info->bytes;
        begin = (end + reader->alignment - 1) / reader->alignment * reader->alignment;
    }
    if (size > begin)
        return fq_fail(reader->err, FQ_FORMAT, "%s: %" PRIu64 " bytes after the last tensor",
                       reader->file->name, size - begin);
    return 0;
}

static int append(struct reader *reader, const struct info *info, char *name, uint64_t skip,
                  int rank) {
    struct fq_gguf *file = reader->file;
    struct fq_checkpoint_tensor *tensor = &file->tensors[file->count];

    if (!name)
        return fail_info(reader, info, FQ_NO_MEMORY, "no memory for its name");
    *tensor = (struct fq_checkpoint_tensor){
        .name = name, .dtype = info->type->dtype, .rank = rank, .file = file->name};
    tensor->bytes = info->bytes;
    for (int i = rank; i < info->rank; i++) /* a slice of the outer axes */
        tensor->bytes /= (uint64_t)info->sizes[i];
    for (int i = 0; i < rank; i++)
        tensor->shape[i] = info->sizes[rank - 1 - i];
    tensor->data = reader->cursor.at + info->offset + skip;
    file->count++;
    return 0;
}

/* A quantized tensor is a matrix or a stack of them. */
static int append_matrices(struct reader *reader, const struct info *info) {
    size_t length = strlen(info->name), cut = strlen(".weight");
    int64_t stack = info->rank == 3 ? info->sizes[2] : 1;
    int rc = 0;

    reader->file->quantized = true;
    if (info->rank < 2 || (info->rank == RANK_MAX && info->sizes[3] > 1))
        return fail_info(reader, info, FQ_UNSUPPORTED, "%s of rank %d, served are 2 and 3",
                         info->type->name, info->rank);
    if (length <= cut || strcmp(info->name + length - cut, ".weight") != 0)
        return fail_info(reader, info, FQ_UNSUPPORTED, "%s, served as a matrix NAME.weight alone",
                         info->type->name);
    if (info->rank == 2)
        return append(reader, info, strdup(info->name), 0, 2);
    for (int64_t i = 0; i < stack && rc == 0; i++) {
        char *name;

        if (asprintf(&name, "%.*s.%" PRId64 ".weight", (int)(length - cut), info->name, i) < 0)
            name = NULL;
        rc = append(reader, info, name, info->bytes / (uint64_t)stack * (uint64_t)i, 2);
    }
    return rc;
}

static int append_all(struct reader *reader, const struct info *infos, size_t count) {
    uint64_t total = 0;
    int rc = 0;

    for (size_t i = 0; i < count; i++) /* a slice has bytes, so that the file bounds this */
        total += infos[i].type->block > 1 && infos[i].rank == 3 ? (uint64_t)infos[i].sizes[2] : 1;
    reader->file->tensors = calloc((size_t)total + 1, sizeof *reader->file->tensors);
    if (!reader->file->tensors)
        return fq_fail(reader->err, FQ_NO_MEMORY, "%s: no memory for %" PRIu64 " tensors",
                       reader->file->name, total);
    for (size_t i = 0; i < count && rc == 0; i++)
        rc = infos[i].type->block > 1
                 ? append_matrices(reader, &infos[i])
                 : append(reader, &infos[i], strdup(infos[i].name), 0, infos[i].rank);
    return rc;
}

static int read_tensors(struct reader *reader, const uint8_t *start, uint64_t count) {
    struct info *infos = calloc((size_t)count + 1, sizeof *infos);
    const uint8_t *padding;
    uint64_t past;
    int rc = 0;

    if (!infos)
        return fq_fail(reader->err, FQ_NO_MEMORY, "%s: no memory for %" PRIu64 " tensors",
                       reader->file->name, count);
    for (uint64_t i = 0; i < count && rc == 0; i++)
        rc = read_info(reader, &infos[i], i + 1);
    if (rc < 0)
        goto out;
    past = (uint64_t)(reader->cursor.at - start) % reader->alignment;
    if (past != 0 && !take(&reader->cursor, reader->alignment - past, &padding)) {
        if (count > 0) {
            rc = fq_fail(reader->err, FQ_FORMAT, "%s: the file ends before its data",
                         reader->file->name);
            goto out;
        }
        reader->cursor.left = 0; /* nothing needs to be aligned */
    }
    if ((rc = check_cover(reader, infos, (size_t)count)) == 0)
        rc = append_all(reader, infos, (size_t)count);
out:
    for (uint64_t i = 0; i < count; i++)
        free(infos[i].name);
    free(infos);
    return rc;
}

/* ---- the file ----------------------------------------------------------------------------- */

static int read_file(struct reader *reader) {
    const char *name = reader->file->name;
    const uint8_t *start = reader->cursor.at, *magic;
    uint64_t version, tensors, keys;
    int rc;

    if (!take(&reader->cursor, 4, &magic) || memcmp(magic, "GGUF", 4) != 0)
        return fq_fail(reader->err, FQ_FORMAT, "%s: does not begin with 'GGUF'", name);
    if (!take_number(&reader->cursor, 4, &version) || !take_number(&reader->cursor, 8, &tensors) ||
        !take_number(&reader->cursor, 8, &keys))
        return fq_fail(reader->err, FQ_FORMAT, "%s: the file ends in its header", name);
    if (version != VERSION)
        return fq_fail(reader->err, FQ_UNSUPPORTED,
                       "%s: version %" PRIu64 "%s, served is version %d", name, version,
                       version == (uint64_t)VERSION << 24 ? " (big-endian)" : "", VERSION);
    if (keys > reader->cursor.left / KEY_BYTES_LEAST)
        return fq_fail(reader->err, FQ_FORMAT,
                       "%s: %" PRIu64 " metadata keys do not fit in the %" PRIu64 " bytes left",
                       name, keys, reader->cursor.left);
    if (tensors > reader->cursor.left / INFO_BYTES_LEAST)
        return fq_fail(reader->err, FQ_FORMAT,
                       "%s: %" PRIu64 " tensors do not fit in the %" PRIu64 " bytes left", name,
                       tensors, reader->cursor.left);
    if ((rc = read_metadata(reader, keys)) < 0)
        return rc;
    return read_tensors(reader, start, tensors);
}

int fq_gguf_new(const void *bytes, size_t size, const char *name, struct fq_gguf **out,
                struct fq_error *err) {
    struct fq_gguf *file = calloc(1, sizeof *file);
    struct reader reader = {.file = file,
                            .cursor = {.at = bytes, .left = size},
                            .alignment = ALIGNMENT_DEFAULT,
                            .err = err};
    int rc;

    if (!file || !(file->name = strdup(name)) || !(file->metadata = json_object())) {
        fq_gguf_free(file);
        return fq_fail(err, FQ_NO_MEMORY, "%s: no memory to open it", name);
    }
    rc = read_file(&reader);
    if (rc < 0) {
        fq_gguf_free(file);
        return rc;
    }
    *out = file;
    return 0;
}

void fq_gguf_free(struct fq_gguf *file) {
    if (!file)
        return;
    for (size_t i = 0; i < file->count; i++)
        free((char *)file->tensors[i].name);
    free(file->tensors);
    json_decref(file->metadata);
    free(file->name);
    free(file);
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
        char name[2 * NAME_BYTES_MAX];

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
