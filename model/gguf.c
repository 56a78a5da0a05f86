/* SPDX-License-Identifier: Apache-2.0 */
/*
 * GGUF's header and tensors.  The format, little-endian: "GGUF", u32 version, u64 tensors,
 * u64 keys; the keys (string, u32 type, value); the tensors (string, u32 rank,
 * u64 sizes with the innermost first, u32 type, u64 offset); padding; the data,
 * to which offsets are relative, each at a multiple of general.alignment.  A file
 * is taken as hostile: nothing is read or allocated before the bytes are there.
 */
#include "gguf-reader.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define VERSION           3
#define ALIGNMENT_DEFAULT 32
#define RANK_MAX          4
#define STACK_MAX         65536 /* matrices in a tensor of rank 3 */
#define KEY_BYTES_LEAST   13    /* an empty name, a type, a byte */
#define INFO_BYTES_LEAST  24    /* an empty name, a rank of 0, a type, an offset */

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

/* ---- tensors ------------------------------------------------------------------------------ */

/* One entry of the table of tensors, before its data is known to be there. */
struct info {
    char *name;
    const struct tensor_type *type;
    int rank;
    int64_t sizes[RANK_MAX]; /* innermost first */
    uint64_t offset, bytes;
};

static int fail_info(struct fq_gguf_reader *reader, const struct info *info, enum fq_status status,
                     const char *format, ...) __attribute__((format(printf, 4, 5)));

static int fail_info(struct fq_gguf_reader *reader, const struct info *info, enum fq_status status,
                     const char *format, ...) {
    char fault[200];
    va_list args;

    va_start(args, format);
    vsnprintf(fault, sizeof fault, format, args);
    va_end(args);
    return fq_fail(reader->err, status, "%s: tensor '%.200s': %s", reader->file->name, info->name,
                   fault);
}

static int read_type(struct fq_gguf_reader *reader, struct info *info, uint64_t number) {
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
static int measure(struct fq_gguf_reader *reader, struct info *info) {
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

static int read_info(struct fq_gguf_reader *reader, struct info *info, uint64_t number) {
    uint64_t rank, size, type;
    struct fq_gguf_text text;
    int rc;

    if (!fq_gguf_take_text(&reader->cursor, &text))
        return fq_fail(reader->err, FQ_FORMAT, "%s: the file ends in the name of tensor %" PRIu64,
                       reader->file->name, number);
    info->name = fq_gguf_name(text);
    if (!info->name)
        return fq_fail(reader->err, FQ_FORMAT,
                       "%s: the name of tensor %" PRIu64 " is not 1 to %d bytes of UTF-8",
                       reader->file->name, number, FQ_GGUF_NAME_BYTES_MAX);
    if (!fq_gguf_take_number(&reader->cursor, 4, &rank))
        return fail_info(reader, info, FQ_FORMAT, "the file ends in its entry");
    if (rank > RANK_MAX)
        return fail_info(reader, info, FQ_FORMAT, "rank is %" PRIu64 ", at most %d is allowed",
                         rank, RANK_MAX);
    info->rank = (int)rank;
    for (int i = 0; i < info->rank; i++) {
        if (!fq_gguf_take_number(&reader->cursor, 8, &size))
            return fail_info(reader, info, FQ_FORMAT, "the file ends in its entry");
        if (size < 1 || size > INT64_MAX)
            return fail_info(reader, info, FQ_FORMAT, "size %d is %" PRIu64, i, size);
        info->sizes[i] = (int64_t)size;
    }
    if (!fq_gguf_take_number(&reader->cursor, 4, &type) ||
        !fq_gguf_take_number(&reader->cursor, 8, &info->offset))
        return fail_info(reader, info, FQ_FORMAT, "the file ends in its entry");
    if ((rc = read_type(reader, info, type)) < 0)
        return rc;
    return measure(reader, info);
}

/* In the order of the table each begins where the last one, padded, ended, as llama.cpp wants. */
static int check_cover(struct fq_gguf_reader *reader, const struct info *infos, size_t count) {
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

static int append(struct fq_gguf_reader *reader, const struct info *info, char *name, uint64_t skip,
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
static int append_matrices(struct fq_gguf_reader *reader, const struct info *info) {
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

static int append_all(struct fq_gguf_reader *reader, const struct info *infos, size_t count) {
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

static int read_tensors(struct fq_gguf_reader *reader, const uint8_t *start, uint64_t count) {
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
    if (past != 0 && !fq_gguf_take(&reader->cursor, reader->alignment - past, &padding)) {
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

static int read_file(struct fq_gguf_reader *reader) {
    const char *name = reader->file->name;
    const uint8_t *start = reader->cursor.at, *magic;
    uint64_t version, tensors, keys;
    int rc;

    if (!fq_gguf_take(&reader->cursor, 4, &magic) || memcmp(magic, "GGUF", 4) != 0)
        return fq_fail(reader->err, FQ_FORMAT,
                       "%s: does not begin with 'GGUF'; a checkpoint of other files is given by "
                       "its directory",
                       name);
    if (!fq_gguf_take_number(&reader->cursor, 4, &version) ||
        !fq_gguf_take_number(&reader->cursor, 8, &tensors) ||
        !fq_gguf_take_number(&reader->cursor, 8, &keys))
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
    if ((rc = fq_gguf_read_metadata(reader, keys)) < 0)
        return rc;
    return read_tensors(reader, start, tensors);
}

int fq_gguf_new(const void *bytes, size_t size, const char *name, struct fq_gguf **out,
                struct fq_error *err) {
    struct fq_gguf *file = calloc(1, sizeof *file);
    struct fq_gguf_reader reader = {.file = file,
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
