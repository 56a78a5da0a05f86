/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libfinequant: run quantized matrix products in finequantd, the daemon that
 * holds each model's weights once for every process of the machine.
 *
 * A client is one connection.  Through it you find a tensor of a loaded model,
 * make buffers that you and the daemon share, put activations into one, ask
 * for Y = activation(X·Wᵀ + bias), and read the result from another.  Nothing
 * is copied between the processes.
 *
 *     #include <finequant.h>
 *     #include <stdio.h>
 *
 *     int main(void) {
 *         struct fq_error err;
 *         struct fq_client *client = NULL;
 *         struct fq_buffer *x = NULL, *y = NULL;
 *         struct fq_tensor w;
 *         int rc = fq_client_new(NULL, &client, &err);
 *         if (rc == 0) rc = fq_client_tensor_find(client, "demo", "fc1", &w, &err);
 *         if (rc == 0) rc = fq_buffer_new(client, FQ_BUFFER_HOST, w.k * 2, &x, &err);
 *         if (rc == 0) rc = fq_buffer_new(client, FQ_BUFFER_HOST, w.n * 2, &y, &err);
 *         if (rc == 0) {
 *             uint16_t *in = fq_buffer_host(x);
 *             for (uint64_t i = 0; i < w.k; i++) in[i] = 0x3c00;    // 1.0 as fp16
 *             struct fq_gemm_request gemm = {.tensor = &w, .m = 1, .dtype = FQ_F16,
 *                                            .x = {.buffer = x}, .y = {.buffer = y}};
 *             rc = fq_client_gemm(client, &gemm, &err);
 *         }
 *         if (rc < 0) fprintf(stderr, "%s\n", err.message);
 *         else printf("y[0] is 0x%04x\n", ((uint16_t *)fq_buffer_host(y))[0]);
 *         fq_buffer_free(x); fq_buffer_free(y); fq_client_free(client);
 *         return -rc;
 *     }
 *
 * Build it with: cc demo.c $(pkg-config --cflags --libs finequant)
 *
 * Errors.  Functions that can fail return 0 or the negative of an enum
 * fq_status, and fill *err, which may be NULL.  Any call that talks to the
 * daemon can return -FQ_CLOSED (the connection ended), -FQ_TIMEOUT,
 * -FQ_PROTOCOL (the daemon sent something malformed), -FQ_NO_MEMORY and
 * -FQ_IO besides what is listed with it.
 *
 * Threads.  One client may be used by any number of threads at once.  Of those
 * that wait for replies one reads the socket for all, so that replies reach
 * whoever they belong to.  A buffer's contents are yours to order: while a
 * gemm that names them is under way leave them alone.  fq_client_free and
 * fq_buffer_free need that no other thread uses that client or buffer.
 *
 * Processes.  After fork() the child must make a client of its own.
 *
 * The library keeps no global state, writes to no stream, changes no signal
 * handler, and never ends the process.
 */
#ifndef FINEQUANT_H
#define FINEQUANT_H

#include <finequant-types.h>

#include <stdbool.h>

/* The library is built with hidden visibility: what is declared here is what it shows. */
#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Connections ------------------------------------------------------------------------- */

struct fq_client;

struct fq_client_options {
    const char *socket; /* path; NULL: $FINEQUANT_SOCKET, else /run/finequant/finequantd.sock for
                           root, else $XDG_RUNTIME_DIR/finequantd.sock */
    const char *name;   /* shown by `finequantctl clients`, 1 to 63 bytes; NULL: the program's */
    int timeout_ms;     /* longest wait for a reply; 0: for ever. Loading and unloading a model and
                           shutting down wait as long as it takes. */
    bool reconnect;     /* after the connection ended, the next call makes a new one */
};

/*
 * Connects and says hello.  options may be NULL, or all zero.
 * Errors: -FQ_UNAVAILABLE (no daemon answers), -FQ_DENIED, -FQ_VERSION, -FQ_INVALID.
 */
int fq_client_new(const struct fq_client_options *options, struct fq_client **out,
                  struct fq_error *err);

/* Disconnects: requests under way are abandoned.  Free the client's buffers first.  NULL is fine.
 */
void fq_client_free(struct fq_client *client);

struct fq_client_info {
    char server[64];  /* "finequantd 0.1.0" */
    char backend[16]; /* "cpu", "cuda" or "reference" */
    char device[128]; /* its name */
    char uuid[48];    /* of the GPU, or "" */
    char kernels[32]; /* "sm_90", "avx512", ... */
    uint32_t threads;
    uint64_t memory_total;       /* bytes */
    uint64_t max_frame;          /* bytes */
    uint64_t max_inflight;       /* requests of this connection without a reply */
    uint64_t max_inflight_bytes; /* of X and Y that they name */
    uint64_t max_buffers, max_buffer_bytes;
    uint64_t max_rows;   /* largest m */
    bool f32;            /* FQ_F32 activations */
    bool device_buffers; /* FQ_BUFFER_DEVICE */
    bool admin;          /* this process may load and unload models and shut down */
};

/* What the daemon said of itself when the present connection was made. */
void fq_client_info(struct fq_client *client, struct fq_client_info *info);

/* Counts the client's connections, from 1.  Buffers and tensors belong to the connection they were
 * made on; after a reconnect they are stale, and calls that name them give -FQ_NOT_FOUND. */
uint64_t fq_client_generation(struct fq_client *client);

/* The socket, readable when replies wait, for a caller's own event loop, which then calls
 * fq_client_poll; -1 while there is no connection.  Do not read from it. */
int fq_client_fd(struct fq_client *client);

/* Answered by the daemon at once, whatever it is computing. */
int fq_client_ping(struct fq_client *client, struct fq_error *err);

/* Asks the daemon to finish what is under way and end.  Error: -FQ_DENIED. */
int fq_client_shutdown(struct fq_client *client, struct fq_error *err);

/* ---- Models and tensors ------------------------------------------------------------------ */

struct fq_model {
    char name[128];
    char path[4096];      /* the checkpoint's directory or file */
    char state[16];       /* "loading", "ready" or "unloading" */
    uint64_t done, total; /* matrices, while loading */
    uint64_t matrices;    /* held */
    uint64_t bytes;       /* of memory that weights and biases take */
    uint64_t dense_bytes; /* that the same matrices take as fp16 */
    uint64_t requests;    /* served since the load */
    uint64_t rows;        /* served since the load */
    uint64_t queued;      /* requests that wait */
    uint64_t loaded_at;   /* seconds since the epoch, 0 while loading */
};

/* Every model of the daemon.  The caller releases *models with free(). */
int fq_client_model_list(struct fq_client *client, struct fq_model **models, size_t *count,
                         struct fq_error *err);

struct fq_model_load {
    const char *name; /* what it will be called */
    const char *path; /* absolute, as the daemon sees it */
    uint32_t bits;    /* 8, 4 or 3 for matrices that are not quantized yet; 0: the default, 4 */
    int64_t group;    /* a multiple of 16, FQ_GROUP_CHANNEL, or 0: the default, 64 */
    /* Called on the thread that called fq_client_model_load, now and then while it waits, with the
     * matrices that are loaded.  May be NULL.  Must not call back into the client. */
    void (*progress)(void *data, uint64_t done, uint64_t total);
    void *data;
};
#define FQ_GROUP_CHANNEL (-1) /* one scale for a whole row */

/*
 * Loads a checkpoint and returns when it is ready.  *model may be NULL.
 * Errors: -FQ_EXISTS, -FQ_NOT_FOUND, -FQ_FORMAT, -FQ_UNSUPPORTED, -FQ_DENIED, -FQ_NO_MEMORY,
 * -FQ_BUSY, -FQ_INVALID.
 */
int fq_client_model_load(struct fq_client *client, const struct fq_model_load *load,
                         struct fq_model *model, struct fq_error *err);

/* Returns when what was under way has ended and the memory has been given back: *bytes of it,
 * where bytes is not NULL.  Errors: -FQ_NOT_FOUND, -FQ_BUSY, -FQ_DENIED. */
int fq_client_model_unload(struct fq_client *client, const char *name, uint64_t *bytes,
                           struct fq_error *err);

struct fq_tensor {
    uint64_t id;         /* the daemon's name for it */
    uint64_t generation; /* of the connection it belongs to */
    char name[256];
    uint64_t n, k;       /* outputs and inputs: X is [m, k], Y is [m, n] */
    uint32_t bits;       /* 8, 4 or 3 */
    uint64_t group;      /* weights along K that share a scale; k: one scale a row */
    enum fq_dtype scale; /* FQ_F16 or FQ_BF16 */
    bool symmetric;      /* no zero points */
    bool bias;           /* the checkpoint has one: see FQ_BIAS_CHECKPOINT */
    uint64_t bytes;      /* of memory */
};

/* One tensor by name.  Errors: -FQ_NOT_FOUND, -FQ_BUSY (the model is loading). */
int fq_client_tensor_find(struct fq_client *client, const char *model, const char *tensor,
                          struct fq_tensor *out, struct fq_error *err);

/* Every tensor of a model, by name.  The caller releases *tensors with free(). */
int fq_client_tensor_list(struct fq_client *client, const char *model, struct fq_tensor **tensors,
                          size_t *count, struct fq_error *err);

/* ---- Buffers ----------------------------------------------------------------------------- */

struct fq_buffer;

enum fq_buffer_kind {
    FQ_BUFFER_HOST = 0,   /* shared memory, mapped here; needs no CUDA */
    FQ_BUFFER_DEVICE = 1, /* CUDA memory of the daemon's GPU; needs libcuda.so.1 */
};

/*
 * Makes a region of `bytes`, zero-filled, that the daemon reads activations and biases from and
 * writes results to.  A device buffer is opened in the primary context of the daemon's GPU.
 * Errors: -FQ_INVALID (0 bytes), -FQ_QUOTA, -FQ_NO_MEMORY, -FQ_UNSUPPORTED (no device buffers),
 * -FQ_UNAVAILABLE (no libcuda here, or that GPU is not visible), -FQ_DEVICE.
 */
int fq_buffer_new(struct fq_client *client, enum fq_buffer_kind kind, uint64_t bytes,
                  struct fq_buffer **out, struct fq_error *err);

/* Unmaps the region; the daemon gives it back when nothing under way uses it.  NULL is fine. */
void fq_buffer_free(struct fq_buffer *buffer);

uint64_t fq_buffer_bytes(const struct fq_buffer *buffer);
/* The address of a host buffer here, page-aligned; NULL for a device buffer. */
void *fq_buffer_host(const struct fq_buffer *buffer);
/* The address of a device buffer (a CUdeviceptr); 0 for a host buffer. */
uint64_t fq_buffer_device(const struct fq_buffer *buffer);

/* ---- Matrix products --------------------------------------------------------------------- */

/* A matrix within a buffer. */
struct fq_place {
    const struct fq_buffer *buffer;
    uint64_t offset; /* bytes, a multiple of the element's size */
    uint64_t stride; /* elements from a row to the next; 0: rows follow one another */
};

enum fq_bias {
    FQ_BIAS_NONE = 0,
    FQ_BIAS_CHECKPOINT = 1, /* the one the model has */
    FQ_BIAS_BUFFER = 2,     /* n elements at `bias_at` */
};

/* Y = activation(X·Wᵀ + bias).  Zero is a good value for every field not needed. */
struct fq_gemm_request {
    const struct fq_tensor *tensor; /* W, [n, k] */
    uint64_t m;                     /* rows, 1 to max_rows */
    enum fq_dtype dtype;            /* of X and Y */
    struct fq_place x;              /* [m, k] */
    struct fq_place y;              /* [m, n]; must not overlap X or the bias */
    enum fq_bias bias;
    struct fq_place bias_at;  /* for FQ_BIAS_BUFFER; stride is ignored */
    enum fq_dtype bias_dtype; /* for FQ_BIAS_BUFFER */
    enum fq_activation activation;
};

/*
 * Returns when Y is complete.  Sums are kept in fp32 and rounded once; for m ≤ 64 a row's result
 * depends on that row alone, bit for bit.  After -FQ_TIMEOUT the daemon may still read X and write
 * Y until their buffers have been freed.
 * Errors: -FQ_INVALID, -FQ_NOT_FOUND (tensor or buffer gone or stale), -FQ_UNSUPPORTED (dtype),
 * -FQ_QUOTA, -FQ_BUSY (the daemon is ending), -FQ_DEVICE.
 */
int fq_client_gemm(struct fq_client *client, const struct fq_gemm_request *request,
                   struct fq_error *err);

/* A gemm under way.  Waited for, or polled to its end, once. */
typedef uint64_t fq_ticket;

/* Starts a gemm and returns at once; up to max_inflight may be under way.  The daemon's own errors
 * come from fq_client_wait. */
int fq_client_submit(struct fq_client *client, const struct fq_gemm_request *request,
                     fq_ticket *ticket, struct fq_error *err);

/* Waits for one.  Replies that came for other tickets meanwhile are kept for them.  Errors: those
 * of fq_client_gemm; after -FQ_TIMEOUT the ticket is still good, after anything else it is spent.
 * -FQ_INVALID for a ticket that is spent, or that another thread waits for. */
int fq_client_wait(struct fq_client *client, fq_ticket ticket, struct fq_error *err);

/* 1: complete, the ticket is spent.  0: not yet.  Negative: as fq_client_wait.  Never waits. */
int fq_client_poll(struct fq_client *client, fq_ticket ticket, struct fq_error *err);

/* ---- Everything else --------------------------------------------------------------------- */

/*
 * Any method of the protocol (finequant-protocol(7)), with params and result as JSON objects.
 * params may be NULL for none.  *result is a NUL-terminated string that the caller releases with
 * free(); binary values are in it as hexadecimal.  File descriptors that come are closed.
 * Errors: the method's; -FQ_INVALID where params is not a JSON object.
 */
int fq_client_call_json(struct fq_client *client, const char *method, const char *params,
                        char **result, struct fq_error *err);

#ifdef __cplusplus
}
#endif
#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
#endif
