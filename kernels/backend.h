/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The one interface to the kernels.  A backend drives one device: "reference"
 * (plain C, float64 accumulation: the judge of the others), "cpu" or "cuda".
 * It knows nothing of files or sockets.
 *
 *     Y[m][n] = activation( Σk X[m][k] · W[n][k] + bias[n] )
 *
 * or, with a gate and a residual, what a transformer's gated unit wants in one pass:
 *
 *     Y[m][n] = activation( Σk X[m][k] · V[n][k] + gate_bias[n] )
 *               · ( Σk X[m][k] · W[n][k] + bias[n] ) + residual[m][n]
 *
 * Objects: a backend owns a device; memory is a region that another process
 * can be given; weights are one prepacked matrix; a stream runs GEMMs in the
 * order they are given; an event marks a point of a stream.  Everything made
 * from a backend must be freed before it.
 *
 * Threads: a backend, its memory and its weights may be used from any threads
 * at once; a stream and its events by one thread at a time.
 *
 * To add a backend: implement struct fq_backend_ops (backend-impl.h) in a
 * folder of its own and add a row to the table in backend.c.
 */
#ifndef FQ_KERNELS_BACKEND_H
#define FQ_KERNELS_BACKEND_H

#include "matrix.h"

struct fq_backend;
struct fq_memory;
struct fq_weights;
struct fq_stream;
struct fq_event;

/* A launch of at most this many rows is on the decode path: each row's result depends on its own
 * inputs alone, bit for bit, and rows may lie anywhere (row pointers). */
#define FQ_DECODE_ROWS 64

/* ---- Backends ---------------------------------------------------------------------------- */

struct fq_backend_options {
    int threads;        /* CPU threads for one GEMM; 0: every core this process may run on */
    const char *device; /* "cuda": index ("0"), UUID ("GPU-...") or NULL for device 0 */
};

struct fq_device_info {
    char backend[16];      /* "reference", "cpu" or "cuda" */
    char name[128];        /* "NVIDIA H200", or the processor's model name */
    char uuid[48];         /* "GPU-xxxxxxxx-...", or "" where the device has none */
    char kernels[32];      /* what runs: "sm_90", "amx", "avx512bf16", "avx512gfni",
                              "avx512vnni", "avx512", "avxvnni", "avx2" or "generic" */
    int threads;           /* host threads a GEMM uses; 1 for cuda */
    bool device_memory;    /* FQ_MEMORY_DEVICE works */
    bool f32_activations;  /* FQ_F32 works */
    uint64_t memory_total; /* bytes of the memory that weights live in */
    uint64_t memory_free;  /* of those, free now, all processes counted */
};

/*
 * Opens a backend by name, or the best present for "auto": cuda where a device answers, else cpu.
 * A name never falls back to another, nor does "auto" where options name a device: it is "cuda"
 * then.  options may be NULL.
 * Errors: -FQ_INVALID (no such name), -FQ_UNSUPPORTED (not in this build), -FQ_UNAVAILABLE (no
 * such device), -FQ_NO_MEMORY, -FQ_DEVICE.
 */
int fq_backend_new(const char *name, const struct fq_backend_options *options,
                   struct fq_backend **out, struct fq_error *err);
void fq_backend_free(struct fq_backend *backend); /* NULL is fine */

/* The name of the i-th backend of this build, best first; NULL past the end. */
const char *fq_backend_list(int i);

int fq_backend_info(struct fq_backend *backend, struct fq_device_info *info, struct fq_error *err);

/* ---- Memory ------------------------------------------------------------------------------ */

enum fq_memory_kind {
    /* A sealed memfd, mapped here; page-locked for the device if there is one. */
    FQ_MEMORY_HOST = 0,
    /* Device memory of its own allocation, so that exporting it shares no other. */
    FQ_MEMORY_DEVICE = 1,
};

#define FQ_IPC_HANDLE_BYTES 64

/* What another process needs to map a region. */
struct fq_memory_handle {
    enum fq_memory_kind kind;
    int fd;                           /* HOST: borrowed from the memory, -1 otherwise */
    uint8_t ipc[FQ_IPC_HANDLE_BYTES]; /* DEVICE: cudaIpcMemHandle_t of the underlying allocation */
    uint64_t offset;                  /* DEVICE: bytes from that allocation's base */
    uint64_t bytes;
};

/* A region of `bytes` > 0, zero-filled.  Errors: -FQ_NO_MEMORY, -FQ_UNSUPPORTED (DEVICE without a
 * device), -FQ_INVALID. */
int fq_memory_new(struct fq_backend *backend, enum fq_memory_kind kind, uint64_t bytes,
                  struct fq_memory **out, struct fq_error *err);
/* A region that another process exported.  The handle's fd is duplicated. */
int fq_memory_import(struct fq_backend *backend, const struct fq_memory_handle *handle,
                     struct fq_memory **out, struct fq_error *err);
int fq_memory_export(struct fq_memory *memory, struct fq_memory_handle *handle,
                     struct fq_error *err);
/* Nothing may be running on it any more.  NULL is fine. */
void fq_memory_free(struct fq_memory *memory);

/* The address to put into a struct fq_gemm; for HOST memory without a device also the address to
 * read and write here. */
void *fq_memory_address(const struct fq_memory *memory);
/* The address to read and write on the host; NULL for DEVICE memory. */
void *fq_memory_host(const struct fq_memory *memory);
uint64_t fq_memory_bytes(const struct fq_memory *memory);
enum fq_memory_kind fq_memory_kind(const struct fq_memory *memory);

/* Copies between a host address and a region, and waits.  Range checked: -FQ_INVALID. */
int fq_memory_write(struct fq_memory *memory, uint64_t offset, const void *from, uint64_t bytes,
                    struct fq_error *err);
int fq_memory_read(struct fq_memory *memory, uint64_t offset, void *to, uint64_t bytes,
                   struct fq_error *err);

/* ---- Weights ----------------------------------------------------------------------------- */

/*
 * Prepacks a canonical matrix into device memory and waits; the canonical data may go afterwards.
 * Only one matrix's canonical form is ever held beside the packed one.
 * Errors: -FQ_INVALID, -FQ_NO_MEMORY, -FQ_DEVICE.
 */
int fq_weights_new(struct fq_backend *backend, const struct fq_matrix *matrix,
                   struct fq_weights **out, struct fq_error *err);
void fq_weights_free(struct fq_weights *weights); /* no GEMM may be running on it; NULL is fine */

/*
 * Weights without a checkpoint, to measure and test with: the matrix of `shape` whose every element
 * is a hash of the seed and its place (synthetic.h).  The same seed gives the same matrix on every
 * backend.  cuda makes it on the device.  The shape's pointers are not followed: `zeros` other than
 * NULL asks for zero points.  Errors as of fq_weights_new.
 */
int fq_weights_synthetic(struct fq_backend *backend, const struct fq_matrix *shape, uint64_t seed,
                         struct fq_weights **out, struct fq_error *err);

/* The shape, with codes, scales and zeros NULL. `symmetric` tells whether there are zero points. */
struct fq_weights_info {
    int64_t n, k, group;
    int bits;
    enum fq_dtype scale_type;
    bool symmetric;
    uint64_t bytes; /* memory the prepacked form takes, padding included */
};
void fq_weights_info(const struct fq_weights *weights, struct fq_weights_info *info);

/*
 * Bytes that fq_weights_new would take on this backend for that shape, so that a loader can refuse
 * before it reads.  Exact.  The pointers are not followed: `zeros` other than NULL tells that there
 * are zero points.  0 for a shape that fq_matrix_check refuses.
 */
uint64_t fq_weights_size(struct fq_backend *backend, const struct fq_matrix *matrix);

/* What another process needs to use the same weights in its own context, without a copy. */
struct fq_weights_handle {
    struct fq_weights_info info;
    uint32_t layout; /* version of the prepacked layout; the importer's must be equal */
    struct fq_memory_handle memory;
};
/* Errors: -FQ_UNSUPPORTED where the backend cannot share weights (cpu, reference). */
int fq_weights_export(struct fq_weights *weights, struct fq_weights_handle *handle,
                      struct fq_error *err);
int fq_weights_import(struct fq_backend *backend, const struct fq_weights_handle *handle,
                      struct fq_weights **out, struct fq_error *err);

/* ---- Streams and GEMM -------------------------------------------------------------------- */

struct fq_gemm {
    const struct fq_weights *weights;
    enum fq_dtype type; /* of X and Y */
    int64_t m;          /* rows: 1 to FQ_GEMM_ROWS_MAX */

    /* Rows of X and Y, either by base and stride or, for m ≤ FQ_DECODE_ROWS, by a pointer each.
     * Addresses as from fq_memory_address, aligned to the element.  The pointer arrays are host
     * memory, read before fq_gemm returns.  Y may not overlap X, W or another row of Y. */
    const void *x;              /* [m][x_stride], the first k of each row used */
    void *y;                    /* [m][y_stride], the first n of each row written, nothing else */
    int64_t x_stride, y_stride; /* in elements; ≥ k and ≥ n */
    const void *const *x_rows;  /* [m], or NULL; both or neither */
    void *const *y_rows;        /* [m], or NULL */
    bool host; /* X, Y and the residual are FQ_MEMORY_HOST: the backend may stage large ones */

    const void *bias; /* [n] of bias_type at a device-visible address, or NULL */
    enum fq_dtype bias_type;
    enum fq_activation activation; /* of the product, or with a gate of the gate's product alone */

    /* A second matrix V whose activated product multiplies the first: with SiLU, Y is
     * silu(X·Vᵀ + gate_bias) ⊙ (X·Wᵀ + bias).  Of `weights`' backend, n, k and bits; group, scale
     * type and zero points may differ.  NULL: no gate. */
    const struct fq_weights *gate;
    const void *gate_bias; /* [n] of bias_type at a device-visible address, or NULL; NULL without
                              a gate */

    /* m rows of n elements of `type`, added after activation and gate, before the one rounding;
     * given as Y is: by base and stride, or by row pointers.  Both NULL: none.  A row may be the
     * row of Y that it is added to (in place), and overlaps Y in no other way. */
    const void *residual;
    int64_t residual_stride;          /* in elements; ≥ n */
    const void *const *residual_rows; /* [m], with y_rows */
};

#define FQ_GEMM_ROWS_MAX 65536

int fq_stream_new(struct fq_backend *backend, struct fq_stream **out, struct fq_error *err);
void fq_stream_free(struct fq_stream *stream); /* waits for its work; NULL is fine */

/* The cudaStream_t behind a stream of the cuda backend, so that others can queue work between its
 * GEMMs or capture them into a graph; NULL on host backends.  Borrowed. */
void *fq_stream_native(struct fq_stream *stream);

/*
 * Gives one GEMM to a stream.  The cpu and reference backends have finished it when this returns;
 * cuda has queued it.  Accumulates in fp32 (reference: float64) and rounds once.
 * Errors: -FQ_INVALID, -FQ_UNSUPPORTED (dtype), -FQ_NO_MEMORY, -FQ_DEVICE.
 */
int fq_gemm(struct fq_stream *stream, const struct fq_gemm *gemm, struct fq_error *err);

/* Marks the end of what the stream has been given so far. */
int fq_event_new(struct fq_backend *backend, struct fq_event **out, struct fq_error *err);
void fq_event_free(struct fq_event *event);
int fq_event_record(struct fq_event *event, struct fq_stream *stream, struct fq_error *err);
/* 1: reached, 0: not yet, negative: an error of the device.  Never waits. */
int fq_event_query(struct fq_event *event, struct fq_error *err);
/* Sleeps until reached. */
int fq_event_wait(struct fq_event *event, struct fq_error *err);

#endif
