/* SPDX-License-Identifier: Apache-2.0 */
/* Loading, finding and unloading models. */
#include "config.h"

#include "registry.h"

#include "checkpoint.h"
#include "daemon.h"
#include "log.h"
#include "methods.h"
#include "session.h"
#include "state.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define BIAS_ALIGN    256
#define TENSOR_BITS   32 /* of an id; the model's serial lies above */
#define MIB(bytes)    ((double)(bytes) / (1 << 20))
#define ALIGNED(size) (((size) + BIAS_ALIGN - 1) / BIAS_ALIGN * BIAS_ALIGN)

/* ---- On the pool: loading ---------------------------------------------------------------- */

static uint64_t bias_bytes(const struct fq_checkpoint_matrix *matrix) {
    return matrix->has_bias ? ALIGNED((uint64_t)matrix->matrix.n * sizeof(float)) : 0;
}

/* "a 12.0 MiB, b 3.5 MiB", as far as it fits. */
static void list_holders(struct fq_registry *registry, char *text, size_t size) {
    size_t used = 0;

    snprintf(text, size, "no model");
    fq_list_each(node, &registry->models) {
        struct fq_model *model = fq_list_entry(node, struct fq_model, link);

        if (model->reserved > 0 && used < size)
            used += (size_t)snprintf(text + used, size - used, "%s%s %.1f MiB", used ? ", " : "",
                                     model->name, MIB(model->reserved));
    }
}

/* Reserves `bytes` for the model, against the budget, or what the device has free without one. */
static int reserve(struct fq_model *model, uint64_t bytes, struct fq_error *err) {
    struct fq_registry *registry = &model->daemon->registry;
    struct fq_device_info device;
    char holders[300];
    uint64_t budget, held = 0, available;
    int rc = fq_backend_info(model->daemon->backend, &device, err);

    if (rc < 0)
        return rc;
    uv_mutex_lock(&registry->lock);
    budget = registry->budget;
    fq_list_each(node, &registry->models) held +=
        fq_list_entry(node, struct fq_model, link)->reserved;
    available = budget > held ? budget - held : 0;
    if (budget == 0 || device.memory_free < available)
        available = device.memory_free;
    if (bytes > available) {
        list_holders(registry, holders, sizeof holders);
        rc = fq_fail(err, FQ_NO_MEMORY,
                     "%s needs %.1f MiB, %.1f MiB are there of %s of %.1f MiB; held by %s",
                     model->name, MIB(bytes), MIB(available), budget ? "a budget" : "a memory",
                     MIB(budget ? budget : device.memory_total), holders);
    } else {
        model->reserved = bytes;
    }
    uv_mutex_unlock(&registry->lock);
    return rc;
}

/* Allocates the tensors' table and the biases' memory, once everything is known to fit. */
static int prepare(struct fq_model *model, struct fq_checkpoint *checkpoint, struct fq_error *err) {
    size_t count = fq_checkpoint_matrix_count(checkpoint);
    uint64_t bytes = 0, biases = 0;
    int rc;

    for (size_t i = 0; i < count; i++) {
        const struct fq_checkpoint_matrix *matrix = fq_checkpoint_matrix(checkpoint, i);
        struct fq_matrix shape = matrix->matrix;
        static const uint8_t present;

        shape.zeros = matrix->symmetric ? NULL : &present; /* only told apart from NULL */
        bytes += fq_weights_size(model->daemon->backend, &shape);
        biases += bias_bytes(matrix);
    }
    if (count == 0)
        return fq_fail(err, FQ_UNSUPPORTED, "%s has no linear layer", model->path);
    if ((rc = reserve(model, bytes + biases, err)) < 0)
        return rc;
    model->tensors = calloc(count, sizeof *model->tensors);
    if (!model->tensors)
        return fq_fail(err, FQ_NO_MEMORY, "the table of %zu tensors: out of memory", count);
    if (biases > 0 &&
        (rc = fq_memory_new(model->daemon->backend,
                            model->daemon->device.device_memory ? FQ_MEMORY_DEVICE : FQ_MEMORY_HOST,
                            biases, &model->biases, err)) < 0)
        return rc;
    model->bytes = biases;
    atomic_store(&model->total, count);
    return 0;
}

static int load_bias(struct fq_model *model, struct fq_checkpoint *checkpoint, size_t i,
                     uint64_t offset, struct fq_error *err) {
    struct fq_tensor *tensor = &model->tensors[i];
    size_t bytes = (size_t)tensor->info.n * sizeof(float);
    float *values = malloc(bytes);
    int rc;

    if (!values)
        return fq_fail(err, FQ_NO_MEMORY, "the bias of %s: out of memory", tensor->name);
    rc = fq_checkpoint_bias(checkpoint, i, values, err);
    if (rc == 0)
        rc = fq_memory_write(model->biases, offset, values, bytes, err);
    if (rc == 0)
        tensor->bias = (const char *)fq_memory_address(model->biases) + offset;
    free(values);
    return rc;
}

static int load_matrix(struct fq_model *model, struct fq_checkpoint *checkpoint, size_t i,
                       struct fq_error *err) {
    struct fq_tensor *tensor = &model->tensors[i];
    struct fq_loaded_matrix loaded;
    int rc;

    tensor->model = model;
    tensor->id = model->serial << TENSOR_BITS | i;
    fq_list_init(&tensor->flows);
    tensor->name = strdup(fq_checkpoint_matrix(checkpoint, i)->name);
    model->count = i + 1;
    if (!tensor->name)
        return fq_fail(err, FQ_NO_MEMORY, "the name of a tensor: out of memory");
    if ((rc = fq_checkpoint_load(checkpoint, i, &loaded, err)) < 0)
        return rc;
    rc = fq_weights_new(model->daemon->backend, &loaded.matrix, &tensor->weights, err);
    fq_loaded_matrix_fini(&loaded);
    fq_checkpoint_drop(checkpoint, i);
    if (rc < 0)
        return fq_fail_in(err, "%s", tensor->name);
    fq_weights_info(tensor->weights, &tensor->info);
    model->bytes += tensor->info.bytes;
    model->dense_bytes += (uint64_t)(tensor->info.n * tensor->info.k) * 2;
    return 0;
}

static int load_all(struct fq_model *model, struct fq_checkpoint *checkpoint,
                    struct fq_error *err) {
    struct fq_registry *registry = &model->daemon->registry;
    size_t count = atomic_load(&model->total);
    uint64_t offset = 0;
    int rc;

    for (size_t i = 0; i < count; i++) {
        const struct fq_checkpoint_matrix *matrix = fq_checkpoint_matrix(checkpoint, i);

        if (atomic_load(&registry->cancel))
            return fq_fail(err, FQ_CANCELLED, "loading %s was given up: the daemon ends",
                           model->name);
        if ((rc = load_matrix(model, checkpoint, i, err)) < 0)
            return rc;
        if (matrix->has_bias && (rc = load_bias(model, checkpoint, i, offset, err)) < 0)
            return rc;
        offset += bias_bytes(matrix);
        atomic_store(&model->done, i + 1);
        uv_async_send(&registry->progress);
    }
    return 0;
}

static void free_contents(struct fq_model *model) {
    for (size_t i = 0; i < model->count; i++) {
        fq_weights_free(model->tensors[i].weights);
        free(model->tensors[i].name);
    }
    free(model->tensors);
    fq_memory_free(model->biases);
    model->tensors = NULL;
    model->biases = NULL;
    model->count = 0;
}

static void load_work(uv_work_t *work) {
    struct fq_model *model = fq_list_entry(work, struct fq_model, work);
    struct fq_checkpoint *checkpoint = NULL;
    struct fq_error error = {0};
    int rc = fq_checkpoint_new(model->path, &checkpoint, &error);

    if (rc == 0)
        rc = fq_checkpoint_quantize_as(checkpoint, model->bits, model->group, &error);
    if (rc == 0)
        rc = prepare(model, checkpoint, &error);
    if (rc == 0)
        rc = load_all(model, checkpoint, &error);
    fq_checkpoint_free(checkpoint);
    model->error.status = 0;
    if (rc < 0) {
        free_contents(model);
        model->error = error;
    }
}

static void unload_work(uv_work_t *work) {
    free_contents(fq_list_entry(work, struct fq_model, work));
}

/* ---- On the loop ------------------------------------------------------------------------- */

static void model_free(struct fq_model *model) {
    struct fq_registry *registry = &model->daemon->registry;

    uv_mutex_lock(&registry->lock);
    fq_list_remove(&model->link);
    uv_mutex_unlock(&registry->lock);
    free(model->path);
    free(model);
}

static void report_progress(struct fq_model *model) {
    size_t done = atomic_load(&model->done), total = atomic_load(&model->total);

    while (model->reported < done) {
        struct fq_session *session = model->waiter ? model->waiter->session : NULL;

        model->reported++;
        if (!session || session->closed)
            continue;
        struct fq_pack *pack = fq_notification_begin(session, "model.progress", 3);

        fq_pack_str(pack, "name", model->name);
        fq_pack_u64(pack, "done", model->reported);
        fq_pack_u64(pack, "total", total);
        fq_notification_send(session);
    }
}

static void on_progress(uv_async_t *handle) {
    struct fq_registry *registry = handle->data;

    fq_list_each(node, &registry->models) {
        struct fq_model *model = fq_list_entry(node, struct fq_model, link);

        if (model->state == FQ_MODEL_LOADING)
            report_progress(model);
    }
}

static void load_failed(struct fq_model *model) {
    struct fq_daemon *daemon = model->daemon;
    bool configured = model->configured;
    int status = model->error.status;

    fq_log(FQ_LOG_ERROR, "model %s is not loaded: %s: %s", model->name, fq_status_name(status),
           model->error.message);
    if (model->waiter)
        fq_call_reply_error(model->waiter, &model->error);
    model_free(model);
    if (status == -FQ_DEVICE)
        fq_daemon_device_lost(daemon, &(struct fq_error){status, "loading a model failed"});
    else if (configured && !daemon->draining)
        fq_daemon_fail(daemon, -status);
}

static void after_load(uv_work_t *work, int status) {
    struct fq_model *model = fq_list_entry(work, struct fq_model, work);

    (void)status; /* never cancelled in the pool's queue */
    model->daemon->registry.pending--;
    report_progress(model);
    if (model->error.status < 0) {
        load_failed(model);
        return;
    }
    model->state = FQ_MODEL_READY;
    model->recorded |= model->records;
    model->loaded_at = time(NULL);
    fq_log(FQ_LOG_INFO, "model %s: %zu matrices, %" PRIu64 " bytes (%" PRIu64 " as fp16), %.2f s",
           model->name, model->count, model->bytes, model->dense_bytes,
           (double)(uv_hrtime() - model->begun) * 1e-9);
    fq_state_save(model->daemon);
    if (model->waiter) {
        struct fq_session *session = model->waiter->session;
        struct fq_pack *pack = fq_reply_begin(session, model->waiter->id, 1);

        fq_pack_model(pack, "model", model);
        fq_reply_send(session, model->waiter->id, -1);
        fq_call_free(model->waiter);
        model->waiter = NULL;
    }
}

static void after_unload(uv_work_t *work, int status) {
    struct fq_model *model = fq_list_entry(work, struct fq_model, work);
    struct fq_daemon *daemon = model->daemon;

    (void)status;
    daemon->registry.pending--;
    fq_log(FQ_LOG_INFO, "model %s unloaded: %" PRIu64 " bytes", model->name, model->bytes);
    if (model->waiter) {
        struct fq_session *session = model->waiter->session;
        struct fq_pack *pack = fq_reply_begin(session, model->waiter->id, 1);

        fq_pack_u64(pack, "bytes", model->bytes);
        fq_reply_send(session, model->waiter->id, -1);
        fq_call_free(model->waiter);
    }
    model_free(model);
    fq_state_save(daemon);
}

static void start_unload(struct fq_model *model) {
    model->daemon->registry.pending++;
    uv_queue_work(&model->daemon->loop, &model->work, unload_work, after_unload);
}

void fq_model_begin(struct fq_model *model) {
    model->inflight++;
}

void fq_model_end(struct fq_model *model) {
    if (--model->inflight == 0 && model->state == FQ_MODEL_UNLOADING)
        start_unload(model);
}

static struct fq_model *find_any(struct fq_registry *registry, const char *name) {
    fq_list_each(node, &registry->models) {
        struct fq_model *model = fq_list_entry(node, struct fq_model, link);

        if (strcmp(model->name, name) == 0)
            return model;
    }
    return NULL;
}

static int check_name(const char *name, struct fq_error *err) {
    static const char allowed[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
                                  "._-/:";

    if (!*name || name[strspn(name, allowed)] || strlen(name) > FQ_MODEL_NAME_MAX)
        return fq_fail(err, FQ_INVALID,
                       "name is \"%s\", allowed are 1 to %d letters, digits, and . _ - / :", name,
                       FQ_MODEL_NAME_MAX);
    return 0;
}

int fq_registry_load(struct fq_registry *registry, const struct fq_load *load, struct fq_call *call,
                     struct fq_error *err) {
    struct fq_model *model;
    int rc = check_name(load->name, err);

    if (rc < 0)
        return rc;
    if (*load->path != '/' || strlen(load->path) > FQ_MODEL_PATH_MAX)
        return fq_fail(err, FQ_INVALID,
                       "path is \"%s\", allowed are absolute ones of 1 to %d bytes", load->path,
                       FQ_MODEL_PATH_MAX);
    if (load->bits != 8 && load->bits != 4 && load->bits != 3)
        return fq_fail(err, FQ_INVALID, "bits is %d, allowed are 8, 4 and 3", load->bits);
    if (load->group < 0 || load->group % FQ_GROUP_MIN || load->group > FQ_MATRIX_DIM_MAX)
        return fq_fail(err, FQ_INVALID, "group is %lld, allowed are 0 and multiples of %d",
                       (long long)load->group, FQ_GROUP_MIN);
    if (find_any(registry, load->name))
        return fq_fail(err, FQ_EXISTS, "a model is named %s already", load->name);
    model = calloc(1, sizeof *model);
    if (!model || !(model->path = strdup(load->path))) {
        free(model);
        return fq_fail(err, FQ_NO_MEMORY, "a model: out of memory");
    }
    model->daemon = registry->daemon;
    model->serial = ++registry->next_serial;
    strcpy(model->name, load->name);
    model->bits = load->bits;
    model->group = load->group;
    model->configured = load->configured;
    model->records = load->records;
    model->recorded = load->restored;
    model->waiter = call;
    model->begun = uv_hrtime();
    uv_mutex_lock(&registry->lock);
    fq_list_append(&registry->models, &model->link);
    uv_mutex_unlock(&registry->lock);
    registry->pending++;
    fq_log(FQ_LOG_DEBUG, "model %s: loading %s", model->name, model->path);
    uv_queue_work(&registry->daemon->loop, &model->work, load_work, after_load);
    return 0;
}

int fq_registry_unload(struct fq_registry *registry, const char *name, struct fq_call *call,
                       struct fq_error *err) {
    struct fq_model *model = find_any(registry, name);

    if (!model)
        return fq_fail(err, FQ_NOT_FOUND, "no model is named \"%s\"", name);
    if (model->state != FQ_MODEL_READY)
        return fq_fail(err, FQ_BUSY, "%s is %s", name,
                       model->state == FQ_MODEL_LOADING ? "loading" : "being unloaded");
    model->state = FQ_MODEL_UNLOADING;
    model->waiter = call;
    if (model->inflight == 0)
        start_unload(model);
    return 0;
}

void fq_registry_cancel(struct fq_registry *registry) {
    atomic_store(&registry->cancel, true);
}

void fq_registry_set_budget(struct fq_registry *registry, uint64_t bytes) {
    uv_mutex_lock(&registry->lock);
    registry->budget = bytes;
    uv_mutex_unlock(&registry->lock);
}

int fq_registry_find(struct fq_registry *registry, const char *name, struct fq_model **out,
                     struct fq_error *err) {
    *out = find_any(registry, name);
    if (!*out || (*out)->state == FQ_MODEL_UNLOADING)
        return fq_fail(err, FQ_NOT_FOUND, "no model is named \"%s\"", name);
    if ((*out)->state == FQ_MODEL_LOADING)
        return fq_fail(err, FQ_BUSY, "%s is loading: %zu of %zu matrices", name,
                       atomic_load(&(*out)->done), atomic_load(&(*out)->total));
    return 0;
}

int fq_registry_tensor(struct fq_registry *registry, uint64_t id, struct fq_tensor **out,
                       struct fq_error *err) {
    fq_list_each(node, &registry->models) {
        struct fq_model *model = fq_list_entry(node, struct fq_model, link);
        uint64_t index = id & (((uint64_t)1 << TENSOR_BITS) - 1);

        if (model->serial != id >> TENSOR_BITS)
            continue;
        if (model->state != FQ_MODEL_READY || index >= model->count)
            break;
        *out = &model->tensors[index];
        return 0;
    }
    return fq_fail(err, FQ_NOT_FOUND, "no tensor has the id %" PRIu64, id);
}

uint64_t fq_registry_bytes(const struct fq_registry *registry) {
    uint64_t bytes = 0;

    fq_list_each(node, &registry->models) {
        const struct fq_model *model = fq_list_entry(node, struct fq_model, link);

        if (model->state != FQ_MODEL_LOADING) /* its bytes are the loading thread's */
            bytes += model->bytes;
    }
    return bytes;
}

int fq_registry_init(struct fq_registry *registry, struct fq_daemon *daemon, struct fq_error *err) {
    memset(registry, 0, sizeof *registry);
    fq_list_init(&registry->models);
    if (uv_mutex_init(&registry->lock) != 0)
        return fq_fail(err, FQ_IO, "a lock cannot be made");
    if (uv_async_init(&daemon->loop, &registry->progress, on_progress) != 0) {
        uv_mutex_destroy(&registry->lock);
        return fq_fail(err, FQ_IO, "the registry's wake-up cannot be made");
    }
    registry->daemon = daemon;
    registry->progress.data = registry;
    registry->budget = daemon->settings.memory_budget;
    return 0;
}

void fq_registry_fini(struct fq_registry *registry) {
    if (!registry->daemon)
        return;
    fq_list_each(node, &registry->models) {
        struct fq_model *model = fq_list_entry(node, struct fq_model, link);

        free_contents(model);
        model_free(model);
    }
    uv_mutex_destroy(&registry->lock);
}
