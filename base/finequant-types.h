/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The words that every layer of FineQuant shares: status codes, element types
 * and activations.  Installed beside <finequant.h>, which includes it.  The
 * numeric values are part of the wire protocol and of the ABI: append, never
 * renumber.
 */
#ifndef FINEQUANT_TYPES_H
#define FINEQUANT_TYPES_H

#include <stddef.h>
#include <stdint.h>

/* The library is built with hidden visibility: what is declared here is what it shows. */
#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

#ifdef __cplusplus
extern "C" {
#endif

/*
 * Status codes.  Functions return FQ_OK or the negative of one of these; the
 * positive number is what travels on the wire and what the commands exit with.
 *
 *   FQ_STATUS(NAME, number, "wire-name", "what it means")
 */
#define FQ_STATUS_LIST(FQ_STATUS)                                                                  \
    FQ_STATUS(OK, 0, "ok", "success")                                                              \
    FQ_STATUS(INTERNAL, 1, "internal", "a fault of FineQuant's own")                               \
    FQ_STATUS(USAGE, 2, "usage", "the command line or configuration is wrong")                     \
    FQ_STATUS(INVALID, 3, "invalid", "an argument is out of range or of the wrong form")           \
    FQ_STATUS(PROTOCOL, 4, "protocol", "a frame or message breaks the wire protocol")              \
    FQ_STATUS(VERSION, 5, "version", "the peers speak different protocol versions")                \
    FQ_STATUS(METHOD, 6, "method", "no such method")                                               \
    FQ_STATUS(DENIED, 7, "denied", "the peer may not do this")                                     \
    FQ_STATUS(NOT_FOUND, 8, "not-found", "no such model, tensor, buffer or file")                  \
    FQ_STATUS(EXISTS, 9, "exists", "the name is taken")                                            \
    FQ_STATUS(BUSY, 10, "busy", "in use, loading or draining: try again later")                    \
    FQ_STATUS(QUOTA, 11, "quota", "a limit of this session is reached")                            \
    FQ_STATUS(NO_MEMORY, 12, "no-memory", "host or device memory, or the budget, is exhausted")    \
    FQ_STATUS(UNSUPPORTED, 13, "unsupported", "well formed, but not something this build does")    \
    FQ_STATUS(FORMAT, 14, "format", "a checkpoint or configuration file is malformed")             \
    FQ_STATUS(IO, 15, "io", "a system call failed")                                                \
    FQ_STATUS(DEVICE, 16, "device", "the GPU reported an error")                                   \
    FQ_STATUS(UNAVAILABLE, 17, "unavailable", "no daemon answers, or no such device")              \
    FQ_STATUS(CLOSED, 18, "closed", "the connection ended before the reply came")                  \
    FQ_STATUS(CANCELLED, 19, "cancelled", "given up before it ran")                                \
    FQ_STATUS(TIMEOUT, 20, "timeout", "no answer within the time allowed")

enum fq_status {
#define FQ_STATUS_ENUM(name, number, wire, text) FQ_##name = number,
    FQ_STATUS_LIST(FQ_STATUS_ENUM)
#undef FQ_STATUS_ENUM
};

/* What a function leaves where it failed: one line that says what was wrong, the value, and what
 * is allowed.  Owned by the caller, who may pass NULL to discard it. */
struct fq_error {
    int status;        /* negative enum fq_status, 0 when unset */
    char message[480]; /* UTF-8, no newline at its end */
};

/* Element types of activations, outputs, biases and scales. */
enum fq_dtype {
    FQ_F32 = 1,  /* IEEE binary32; activations on the CPU backend only */
    FQ_F16 = 2,  /* IEEE binary16 */
    FQ_BF16 = 3, /* bfloat16: the upper half of a binary32 */
};

/* What is applied to X·Wᵀ + bias before it is rounded to the output type. */
enum fq_activation {
    FQ_ACTIVATION_NONE = 0,
    FQ_ACTIVATION_RELU = 1,      /* max(x, 0) */
    FQ_ACTIVATION_GELU = 2,      /* x·Φ(x), by erf */
    FQ_ACTIVATION_GELU_TANH = 3, /* 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))) */
    FQ_ACTIVATION_SILU = 4,      /* x / (1 + e^−x) */
};
#define FQ_ACTIVATION_COUNT 5

/*
 * The name of a status ("not-found") and its meaning.  Takes the positive or
 * the negative form; never NULL.  Static storage.
 */
const char *fq_status_name(int status);
const char *fq_status_text(int status);

/* "f16" and so on; NULL for a number that is no dtype.  The reverse: 0 for an unknown name. */
const char *fq_dtype_name(int dtype);
int fq_dtype_parse(const char *name);
/* Bytes an element; 0 for a number that is no dtype. */
size_t fq_dtype_size(int dtype);

/* "none", "relu", "gelu", "gelu_tanh", "silu"; NULL or -1 where unknown. */
const char *fq_activation_name(int activation);
int fq_activation_parse(const char *name);

#ifdef __cplusplus
}
#endif
#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
#endif
