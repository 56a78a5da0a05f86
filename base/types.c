/* SPDX-License-Identifier: Apache-2.0 */
/* Names and sizes of the shared enumerations.  Pure look-ups: any thread. */
#include "finequant-types.h"

#include <string.h>

struct status_entry {
    int number;
    const char *name;
    const char *text;
};

static const struct status_entry statuses[] = {
#define FQ_STATUS_ROW(name, number, wire, text) {number, wire, text},
    FQ_STATUS_LIST(FQ_STATUS_ROW)
#undef FQ_STATUS_ROW
};

static const struct status_entry *status_find(int status) {
    int number = status < 0 ? -status : status;

    for (size_t i = 0; i < sizeof statuses / sizeof *statuses; i++)
        if (statuses[i].number == number)
            return &statuses[i];
    return NULL;
}

const char *fq_status_name(int status) {
    const struct status_entry *entry = status_find(status);

    return entry ? entry->name : "unknown";
}

const char *fq_status_text(int status) {
    const struct status_entry *entry = status_find(status);

    return entry ? entry->text : "a status this version does not know";
}

static const struct {
    const char *name;
    size_t size;
} dtypes[] = {
    [FQ_F32] = {"f32", 4},
    [FQ_F16] = {"f16", 2},
    [FQ_BF16] = {"bf16", 2},
};

#define DTYPE_COUNT (int)(sizeof dtypes / sizeof *dtypes)

const char *fq_dtype_name(int dtype) {
    return dtype > 0 && dtype < DTYPE_COUNT ? dtypes[dtype].name : NULL;
}

int fq_dtype_parse(const char *name) {
    for (int i = 1; i < DTYPE_COUNT; i++)
        if (strcmp(dtypes[i].name, name) == 0)
            return i;
    return 0;
}

size_t fq_dtype_size(int dtype) {
    return dtype > 0 && dtype < DTYPE_COUNT ? dtypes[dtype].size : 0;
}

static const char *const activations[FQ_ACTIVATION_COUNT] = {
    [FQ_ACTIVATION_NONE] = "none", [FQ_ACTIVATION_RELU] = "relu",
    [FQ_ACTIVATION_GELU] = "gelu", [FQ_ACTIVATION_GELU_TANH] = "gelu_tanh",
    [FQ_ACTIVATION_SILU] = "silu",
};

const char *fq_activation_name(int activation) {
    return activation >= 0 && activation < FQ_ACTIVATION_COUNT ? activations[activation] : NULL;
}

int fq_activation_parse(const char *name) {
    for (int i = 0; i < FQ_ACTIVATION_COUNT; i++)
        if (strcmp(activations[i], name) == 0)
            return i;
    return -1;
}
