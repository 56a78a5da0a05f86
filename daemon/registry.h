/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The models that are loaded, each once, and their tensors.  A model is loaded
 * on a thread of libuv's pool, which prepacks one matrix after the other and
 * reports through an async handle, so that requests to other models go on.
 * Memory is reserved against the budget before anything is read, and given
 * back on the pool too.  Everything here is called on the loop's thread; what
 * the loading thread shares is under the registry's lock.
 */
#ifndef FQ_DAEMON_REGISTRY_H
#define FQ_DAEMON_REGISTRY_H

#include "backend.h"
#include "list.h"

#include <stdatomic.h>
#include <time.h>
#include <uv.h>

struct fq_call;
struct fq_daemon;
struct fq_model;

#define FQ_MODEL_NAME_MAX 127
#define FQ_MODEL_PATH_MAX 4095

struct fq_tensor {
    struct fq_model *model;
    uint64_t id;
    char *name;
    struct fq_weights *weights;
    struct fq_weights_info info;
    const void *bias;     /* [n] of FQ_F32 in the model's memory, or NULL */
    struct fq_list flows; /* the scheduler's: waiting requests, a flow a session */
};

enum fq_model_state {
    FQ_MODEL_LOADING,
    FQ_MODEL_READY,
    FQ_MODEL_UNLOADING,
};

struct fq_model {
    struct fq_list link;
    struct fq_daemon *daemon;
    uint64_t serial; /* ids of its tensors are serial·2^32 + index */
    char name[FQ_MODEL_NAME_MAX + 1];
    char *path;
    int bits; /* how dense matrices are quantized */
    int64_t group;
    bool configured; /* named at start: the daemon does not go on without it */
    bool records;    /* goes into the state file once it is ready */
    bool recorded;   /* is to be in the state file */
    enum fq_model_state state;
    struct fq_tensor *tensors; /* sorted by name */
    size_t count;              /* of tensors */
    struct fq_memory *biases;  /* all of the model's, one region; NULL without any */
    uint64_t bytes, dense_bytes;
    uint64_t requests, rows, queued;
    uint64_t inflight; /* requests queued or running */
    time_t loaded_at;
    struct fq_call *waiter; /* the load or unload to answer; owned, may be NULL */

    /* Loading */
    uv_work_t work;
    uint64_t begun; /* uv_hrtime() */
    atomic_size_t done, total;
    size_t reported;
    uint64_t reserved; /* under the registry's lock */
    struct fq_error error;
};

struct fq_registry {
    struct fq_daemon *daemon; /* NULL: not initialised */
    struct fq_list models;
    uint64_t next_serial;
    uint64_t pending; /* loads and unloads on the pool */
    uv_mutex_t lock;  /* the list, `reserved` and the budget, for the loading threads */
    uint64_t budget;  /* bytes; 0: what the device has free */
    uv_async_t progress;
    atomic_bool cancel; /* loads end at their next matrix */
};

int fq_registry_init(struct fq_registry *registry, struct fq_daemon *daemon, struct fq_error *err);
/* Frees all models; nothing may be loading or running. */
void fq_registry_fini(struct fq_registry *registry);

/* How dense matrices are quantized when nobody says. */
#define FQ_LOAD_BITS  4
#define FQ_LOAD_GROUP 64

struct fq_load {
    const char *name, *path;
    int bits; /* bits and group: for dense matrices, as fq_checkpoint_quantize_as */
    int64_t group;
    bool configured; /* the daemon ends where it cannot be loaded */
    bool records;    /* on request: to be recorded in the state file */
    bool restored;   /* named there already */
};

/* Takes `call`, which may be NULL, when it succeeds; answers it when the model is ready.
 * Errors: -FQ_INVALID, -FQ_EXISTS, -FQ_NO_MEMORY. */
int fq_registry_load(struct fq_registry *registry, const struct fq_load *load, struct fq_call *call,
                     struct fq_error *err);
/* Takes `call` when it succeeds.  Errors: -FQ_NOT_FOUND, -FQ_BUSY. */
int fq_registry_unload(struct fq_registry *registry, const char *name, struct fq_call *call,
                       struct fq_error *err);
/* Ends loads that are under way. */
void fq_registry_cancel(struct fq_registry *registry);

/* A ready model or its tensor.  Errors: -FQ_NOT_FOUND, -FQ_BUSY (loading). */
int fq_registry_find(struct fq_registry *registry, const char *name, struct fq_model **out,
                     struct fq_error *err);
int fq_registry_tensor(struct fq_registry *registry, uint64_t id, struct fq_tensor **out,
                       struct fq_error *err);

/* A request of the model begins, and ends; an unload waits for the last. */
void fq_model_begin(struct fq_model *model);
void fq_model_end(struct fq_model *model);

void fq_registry_set_budget(struct fq_registry *registry, uint64_t bytes);

/* Bytes of the weights and biases of loaded models. */
uint64_t fq_registry_bytes(const struct fq_registry *registry);

#endif
