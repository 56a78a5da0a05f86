/* SPDX-License-Identifier: Apache-2.0 */
/* Every method but gemm, and the table. */
#include "config.h"

#include "methods.h"

#include "daemon.h"
#include "params.h"
#include "session.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define COUNT_OF(table) (sizeof(table) / sizeof *(table))

/* 0 when the request was answered or will be, else the error to answer. */
typedef int run_function(struct fq_session *session, const struct fq_message *message,
                         const void *params, struct fq_error *err);

/* The parameters of the methods, decoded: each uses those that its fields name. */
union params {
    struct hello_params {
        uint32_t version;
        char client[64];
    } hello;
    struct load_params {
        char name[256];
        char path[FQ_MODEL_PATH_MAX + 1];
        uint32_t bits, group;
    } load;
    struct name_params {
        char name[256];
    } name;
    struct tensor_params {
        char model[256];
        char tensor[256];
    } tensor;
    struct create_params {
        uint64_t bytes;
        char kind[8];
    } create;
    struct destroy_params {
        uint64_t buffer;
    } destroy;
};

/* ---- hello, ping, shutdown --------------------------------------------------------------- */

static const struct fq_field hello_fields[] = {
    FQ_FIELD_U32(struct hello_params, version, FQ_REQUIRED),
    FQ_FIELD_STR(struct hello_params, client, FQ_REQUIRED),
};

static void pack_device(struct fq_pack *pack, const struct fq_device_info *device) {
    fq_pack_map(pack, "device", 5);
    fq_pack_str(pack, "name", device->name);
    fq_pack_str(pack, "uuid", device->uuid);
    fq_pack_str(pack, "kernels", device->kernels);
    fq_pack_u64(pack, "threads", (uint64_t)device->threads);
    fq_pack_u64(pack, "memory_total", device->memory_total);
}

static void pack_capabilities(struct fq_pack *pack, const struct fq_session *session) {
    const struct fq_device_info *device = &session->daemon->device;

    fq_pack_array(pack, "capabilities",
                  2u + device->f32_activations + device->device_memory + session->admin);
    fq_pack_str(pack, NULL, "gate");
    fq_pack_str(pack, NULL, "residual");
    if (device->f32_activations)
        fq_pack_str(pack, NULL, "f32");
    if (device->device_memory)
        fq_pack_str(pack, NULL, "device-buffers");
    if (session->admin)
        fq_pack_str(pack, NULL, "admin");
}

static int run_hello(struct fq_session *session, const struct fq_message *message,
                     const void *params, struct fq_error *err) {
    const struct hello_params *hello = params;
    const struct fq_settings *settings = &session->daemon->settings;
    struct fq_pack *pack;

    if (session->greeted)
        return fq_fail(err, FQ_INVALID, "hello was said before");
    if (!session->allowed)
        return fq_fail(err, FQ_DENIED, "user %u is not among the allowed users and groups",
                       (unsigned)session->uid);
    if (hello->version != FQ_PROTOCOL_VERSION)
        return fq_fail(err, FQ_VERSION, "the client speaks version %u, this daemon version %d",
                       hello->version, FQ_PROTOCOL_VERSION);
    session->greeted = true;
    session->reader.limit = FQ_FRAME_LIMIT;
    strcpy(session->name, hello->client);

    pack = fq_reply_begin(session, message->id, 6);
    fq_pack_u64(pack, "version", FQ_PROTOCOL_VERSION);
    fq_pack_str(pack, "server", FQ_SERVER_NAME);
    fq_pack_str(pack, "backend", session->daemon->device.backend);
    pack_device(pack, &session->daemon->device);
    fq_pack_map(pack, "limits", 6);
    fq_pack_u64(pack, "frame", FQ_FRAME_LIMIT);
    fq_pack_u64(pack, "inflight", settings->max_inflight);
    fq_pack_u64(pack, "inflight_bytes", settings->max_inflight_bytes);
    fq_pack_u64(pack, "buffers", settings->max_buffers);
    fq_pack_u64(pack, "buffer_bytes", settings->max_buffer_bytes);
    fq_pack_u64(pack, "rows", FQ_GEMM_ROWS_MAX);
    pack_capabilities(pack, session);
    fq_reply_send(session, message->id, -1);
    return 0;
}

static int run_ping(struct fq_session *session, const struct fq_message *message,
                    const void *params, struct fq_error *err) {
    (void)params;
    (void)err;
    fq_reply_empty(session, message->id);
    return 0;
}

static int run_shutdown(struct fq_session *session, const struct fq_message *message,
                        const void *params, struct fq_error *err) {
    (void)params;
    (void)err;
    fq_reply_empty(session, message->id);
    fq_daemon_drain(session->daemon, "a client asked for it");
    return 0;
}

/* ---- model.* ----------------------------------------------------------------------------- */

void fq_pack_model(struct fq_pack *pack, const char *key, const struct fq_model *model) {
    static const char *const states[] = {"loading", "ready", "unloading"};
    bool loading = model->state == FQ_MODEL_LOADING;

    fq_pack_map(pack, key, 12);
    fq_pack_str(pack, "name", model->name);
    fq_pack_str(pack, "path", model->path);
    fq_pack_str(pack, "state", states[model->state]);
    fq_pack_u64(pack, "done", atomic_load(&model->done));
    fq_pack_u64(pack, "total", atomic_load(&model->total));
    fq_pack_u64(pack, "matrices", atomic_load(&model->total));
    fq_pack_u64(pack, "bytes", loading ? 0 : model->bytes);
    fq_pack_u64(pack, "dense_bytes", loading ? 0 : model->dense_bytes);
    fq_pack_u64(pack, "requests", model->requests);
    fq_pack_u64(pack, "rows", model->rows);
    fq_pack_u64(pack, "queued", model->queued);
    fq_pack_u64(pack, "loaded_at", (uint64_t)model->loaded_at);
}

static int run_model_list(struct fq_session *session, const struct fq_message *message,
                          const void *params, struct fq_error *err) {
    struct fq_registry *registry = &session->daemon->registry;
    struct fq_pack *pack = fq_reply_begin(session, message->id, 1);
    uint32_t count = 0;

    (void)params;
    (void)err;
    fq_list_each(node, &registry->models) count++;
    fq_pack_array(pack, "models", count);
    fq_list_each(node, &registry->models)
        fq_pack_model(pack, NULL, fq_list_entry(node, struct fq_model, link));
    fq_reply_send(session, message->id, -1);
    return 0;
}

static int refuse_draining(const struct fq_session *session, struct fq_error *err) {
    return session->daemon->draining ? fq_fail(err, FQ_BUSY, "the daemon is shutting down") : 0;
}

static const struct fq_field load_fields[] = {
    FQ_FIELD_STR(struct load_params, name, FQ_REQUIRED),
    FQ_FIELD_STR(struct load_params, path, FQ_REQUIRED),
    FQ_FIELD_U32(struct load_params, bits, FQ_OPTIONAL),
    FQ_FIELD_U32(struct load_params, group, FQ_OPTIONAL),
};

static int run_model_load(struct fq_session *session, const struct fq_message *message,
                          const void *params, struct fq_error *err) {
    const struct load_params *given = params;
    struct fq_load load = {
        .name = given->name,
        .path = given->path,
        .bits = given->bits > 8 ? 9 : (int)given->bits, /* any wrong number will do */
        .group = given->group,
        .records = true,
    };
    struct fq_call *call;
    int rc;

    if ((rc = refuse_draining(session, err)) < 0 ||
        (rc = fq_call_new(session, message->id, 0, &call, err)) < 0)
        return rc;
    if ((rc = fq_registry_load(&session->daemon->registry, &load, call, err)) < 0)
        fq_call_free(call);
    return rc;
}

static const struct fq_field name_fields[] = {
    FQ_FIELD_STR(struct name_params, name, FQ_REQUIRED),
};

static int run_model_unload(struct fq_session *session, const struct fq_message *message,
                            const void *params, struct fq_error *err) {
    const struct name_params *given = params;
    struct fq_call *call;
    int rc;

    if ((rc = refuse_draining(session, err)) < 0 ||
        (rc = fq_call_new(session, message->id, 0, &call, err)) < 0)
        return rc;
    if ((rc = fq_registry_unload(&session->daemon->registry, given->name, call, err)) < 0)
        fq_call_free(call);
    return rc;
}

/* ---- tensor.* ---------------------------------------------------------------------------- */

static void pack_tensor(struct fq_pack *pack, const char *key, const struct fq_tensor *tensor) {
    const struct fq_weights_info *info = &tensor->info;

    fq_pack_map(pack, key, 10);
    fq_pack_u64(pack, "id", tensor->id);
    fq_pack_str(pack, "name", tensor->name);
    fq_pack_u64(pack, "n", (uint64_t)info->n);
    fq_pack_u64(pack, "k", (uint64_t)info->k);
    fq_pack_u64(pack, "bits", (uint64_t)info->bits);
    fq_pack_u64(pack, "group", (uint64_t)info->group);
    fq_pack_str(pack, "scale", fq_dtype_name(info->scale_type));
    fq_pack_bool(pack, "symmetric", info->symmetric);
    fq_pack_bool(pack, "bias", tensor->bias != NULL);
    fq_pack_u64(pack, "bytes", info->bytes);
}

static const struct fq_field tensor_fields[] = {
    FQ_FIELD_STR(struct tensor_params, model, FQ_REQUIRED),
    FQ_FIELD_STR(struct tensor_params, tensor, FQ_REQUIRED),
};

static int run_tensor_list(struct fq_session *session, const struct fq_message *message,
                           const void *params, struct fq_error *err) {
    const struct tensor_params *given = params;
    struct fq_model *model;
    struct fq_pack *pack;
    int rc = fq_registry_find(&session->daemon->registry, given->model, &model, err);

    if (rc < 0)
        return rc;
    pack = fq_reply_begin(session, message->id, 1);
    fq_pack_array(pack, "tensors", (uint32_t)model->count);
    for (size_t i = 0; i < model->count; i++)
        pack_tensor(pack, NULL, &model->tensors[i]);
    fq_reply_send(session, message->id, -1);
    return 0;
}

static int compare_tensor(const void *name, const void *tensor) {
    return strcmp(name, ((const struct fq_tensor *)tensor)->name);
}

static int run_tensor_describe(struct fq_session *session, const struct fq_message *message,
                               const void *params, struct fq_error *err) {
    const struct tensor_params *given = params;
    const struct fq_tensor *tensor;
    struct fq_model *model;
    struct fq_pack *pack;
    int rc = fq_registry_find(&session->daemon->registry, given->model, &model, err);

    if (rc < 0)
        return rc;
    tensor = bsearch(given->tensor, model->tensors, model->count, sizeof *tensor, compare_tensor);
    if (!tensor)
        return fq_fail(err, FQ_NOT_FOUND, "%s has no tensor \"%s\"", given->model, given->tensor);
    pack = fq_reply_begin(session, message->id, 1);
    pack_tensor(pack, "tensor", tensor);
    fq_reply_send(session, message->id, -1);
    return 0;
}

/* ---- buffer.* ---------------------------------------------------------------------------- */

static const struct fq_field create_fields[] = {
    FQ_FIELD_U64(struct create_params, bytes, FQ_REQUIRED),
    FQ_FIELD_STR(struct create_params, kind, FQ_REQUIRED),
};

static int run_buffer_create(struct fq_session *session, const struct fq_message *message,
                             const void *params, struct fq_error *err) {
    const struct create_params *given = params;
    bool device = strcmp(given->kind, "device") == 0;
    struct fq_memory_handle handle;
    struct fq_buffer *buffer;
    struct fq_pack *pack;
    int rc = refuse_draining(session, err);

    if (rc < 0)
        return rc;
    if (!device && strcmp(given->kind, "host") != 0)
        return fq_fail(err, FQ_INVALID, "kind is \"%s\", allowed are host and device", given->kind);
    if (given->bytes == 0)
        return fq_fail(err, FQ_INVALID, "bytes is 0, allowed is 1 or more");
    if (device && !session->daemon->device.device_memory)
        return fq_fail(err, FQ_UNSUPPORTED, "kind is device, the %s backend has host buffers only",
                       session->daemon->device.backend);
    if ((rc = fq_buffers_create(&session->buffers, session->daemon, &session->account,
                                device ? FQ_MEMORY_DEVICE : FQ_MEMORY_HOST, given->bytes, &buffer,
                                err)) < 0)
        return rc;
    if ((rc = fq_memory_export(buffer->memory, &handle, err)) < 0) {
        fq_buffers_destroy(&session->buffers, buffer, NULL);
        return rc;
    }
    pack = fq_reply_begin(session, message->id, device ? 4 : 3);
    fq_pack_u64(pack, "buffer", buffer->id);
    fq_pack_u64(pack, "bytes", buffer->bytes);
    if (device) {
        fq_pack_bin(pack, "ipc", handle.ipc, sizeof handle.ipc);
        fq_pack_u64(pack, "offset", handle.offset);
    } else {
        fq_pack_u64(pack, "fds", 1);
    }
    if (fq_reply_send(session, message->id, device ? -1 : handle.fd) < 0)
        fq_buffers_destroy(&session->buffers, buffer, NULL);
    return 0;
}

static const struct fq_field destroy_fields[] = {
    FQ_FIELD_U64(struct destroy_params, buffer, FQ_REQUIRED),
};

static int run_buffer_destroy(struct fq_session *session, const struct fq_message *message,
                              const void *params, struct fq_error *err) {
    const struct destroy_params *given = params;
    struct fq_buffer *buffer = fq_buffers_find(&session->buffers, given->buffer);
    struct fq_call *call;
    int rc;

    if (!buffer)
        return fq_fail(err, FQ_NOT_FOUND, "this session has no buffer %llu",
                       (unsigned long long)given->buffer);
    if (buffer->refs == 1) { /* nothing to wait for, and so no quota that could be in the way */
        fq_buffers_destroy(&session->buffers, buffer, NULL);
        fq_reply_empty(session, message->id);
        return 0;
    }
    if ((rc = fq_call_new(session, message->id, 0, &call, err)) == 0)
        fq_buffers_destroy(&session->buffers, buffer, call);
    return rc;
}

/* ---- client.list, stats ------------------------------------------------------------------ */

static bool sees(const struct fq_session *session, const struct fq_session *other) {
    return other->greeted && (session->admin || other->uid == session->uid);
}

static int run_client_list(struct fq_session *session, const struct fq_message *message,
                           const void *params, struct fq_error *err) {
    struct fq_list *sessions = &session->daemon->sessions;
    struct fq_pack *pack = fq_reply_begin(session, message->id, 1);
    uint32_t count = 0;

    (void)params;
    (void)err;
    fq_list_each(node, sessions) count +=
        sees(session, fq_list_entry(node, struct fq_session, link));
    fq_pack_array(pack, "clients", count);
    fq_list_each(node, sessions) {
        const struct fq_session *other = fq_list_entry(node, struct fq_session, link);

        if (!sees(session, other))
            continue;
        fq_pack_map(pack, NULL, 11);
        fq_pack_u64(pack, "id", other->id);
        fq_pack_str(pack, "name", other->name);
        fq_pack_i64(pack, "pid", other->pid);
        fq_pack_u64(pack, "uid", other->uid);
        fq_pack_u64(pack, "gid", other->gid);
        fq_pack_u64(pack, "connected_at", (uint64_t)other->connected_at);
        fq_pack_u64(pack, "requests", other->requests);
        fq_pack_u64(pack, "rows", other->rows);
        fq_pack_u64(pack, "inflight", other->account.inflight);
        fq_pack_u64(pack, "buffers", other->account.buffers);
        fq_pack_u64(pack, "buffer_bytes", other->account.buffer_bytes);
    }
    fq_reply_send(session, message->id, -1);
    return 0;
}

static void pack_latency(struct fq_pack *pack, const struct fq_histogram *latency) {
    fq_pack_map(pack, "latency_us", 6);
    fq_pack_u64(pack, "count", latency->count);
    fq_pack_u64(pack, "min", latency->min / 1000);
    fq_pack_u64(pack, "p50", fq_histogram_quantile(latency, 0.5) / 1000);
    fq_pack_u64(pack, "p90", fq_histogram_quantile(latency, 0.9) / 1000);
    fq_pack_u64(pack, "p99", fq_histogram_quantile(latency, 0.99) / 1000);
    fq_pack_u64(pack, "max", latency->max / 1000);
}

static int run_stats(struct fq_session *session, const struct fq_message *message,
                     const void *params, struct fq_error *err) {
    struct fq_daemon *daemon = session->daemon;
    const struct fq_metrics *metrics = &daemon->metrics;
    struct fq_device_info now;
    struct fq_pack *pack;
    uint64_t models = 0;
    int rc = fq_backend_info(daemon->backend, &now, err);

    (void)params;
    if (rc < 0)
        return rc;
    fq_list_each(node, &daemon->registry.models) models++;
    pack = fq_reply_begin(session, message->id, 21);
    fq_pack_str(pack, "server", FQ_SERVER_NAME);
    fq_pack_u64(pack, "pid", (uint64_t)getpid());
    fq_pack_u64(pack, "started_at", (uint64_t)daemon->started_at);
    fq_pack_u64(pack, "uptime", (uv_hrtime() - daemon->started) / 1000000000);
    fq_pack_str(pack, "backend", daemon->device.backend);
    pack_device(pack, &daemon->device);
    fq_pack_bool(pack, "draining", daemon->draining);
    fq_pack_u64(pack, "sessions", daemon->session_count);
    fq_pack_u64(pack, "sessions_total", metrics->sessions);
    fq_pack_u64(pack, "models", models);
    fq_pack_u64(pack, "weight_bytes", fq_registry_bytes(&daemon->registry));
    fq_pack_u64(pack, "budget_bytes", daemon->settings.memory_budget);
    fq_pack_u64(pack, "buffer_bytes", daemon->buffer_bytes);
    fq_pack_u64(pack, "memory_total", now.memory_total);
    fq_pack_u64(pack, "memory_free", now.memory_free);
    fq_pack_u64(pack, "requests", metrics->requests);
    fq_pack_u64(pack, "rows", metrics->rows);
    fq_pack_u64(pack, "launches", metrics->launches);
    fq_pack_u64(pack, "errors", metrics->errors);
    fq_pack_u64(pack, "queued", daemon->scheduler.queued);
    pack_latency(pack, &metrics->latency);
    fq_reply_send(session, message->id, -1);
    return 0;
}

/* ---- The table --------------------------------------------------------------------------- */

static int run_gemm(struct fq_session *session, const struct fq_message *message,
                    const void *params, struct fq_error *err) {
    (void)params;
    return fq_method_gemm(session, message, err);
}

struct method {
    const char *name;
    bool admin;
    bool decodes_itself;
    const struct fq_field *fields;
    size_t field_count;
    run_function *run;
};

#define FIELDS(table) .fields = (table), .field_count = COUNT_OF(table)

static const struct method methods[] = {
    {"gemm", .run = run_gemm, .decodes_itself = true}, /* first: the most frequent */
    {"hello", .run = run_hello, FIELDS(hello_fields)},
    {"ping", .run = run_ping},
    {"model.list", .run = run_model_list},
    {"model.load", .run = run_model_load, .admin = true, FIELDS(load_fields)},
    {"model.unload", .run = run_model_unload, .admin = true, FIELDS(name_fields)},
    {"tensor.list", .run = run_tensor_list, .fields = tensor_fields, .field_count = 1},
    {"tensor.describe", .run = run_tensor_describe, FIELDS(tensor_fields)},
    {"buffer.create", .run = run_buffer_create, FIELDS(create_fields)},
    {"buffer.destroy", .run = run_buffer_destroy, FIELDS(destroy_fields)},
    {"client.list", .run = run_client_list},
    {"stats", .run = run_stats},
    {"shutdown", .run = run_shutdown, .admin = true},
};

static const struct method *find(const char *name) {
    for (size_t i = 0; i < COUNT_OF(methods); i++)
        if (strcmp(methods[i].name, name) == 0)
            return &methods[i];
    return NULL;
}

static int dispatch(struct fq_session *session, const struct fq_message *message,
                    struct fq_error *err) {
    const struct method *method = find(message->method);
    union params params;
    int rc;

    if (!method)
        return fq_fail(err, FQ_METHOD, "no method is named \"%s\"", message->method);
    if (method->admin && !session->admin)
        return fq_fail(err, FQ_DENIED, "%s is for administrators, user %u is none", method->name,
                       (unsigned)session->uid);
    if (!method->decodes_itself)
        memset(&params, 0, sizeof params);
    if (method->run == run_model_load) {
        params.load.bits = FQ_LOAD_BITS;
        params.load.group = FQ_LOAD_GROUP;
    }
    if (!method->decodes_itself && (rc = fq_params_decode(&message->body, method->fields,
                                                          method->field_count, &params, err)) < 0)
        return rc;
    return method->run(session, message, &params, err);
}

int fq_method_run(struct fq_session *session, const struct fq_message *message,
                  struct fq_error *err) {
    bool greeted = session->greeted;
    struct fq_error error;
    int rc;

    if (!greeted && strcmp(message->method, "hello") != 0)
        return fq_fail(err, FQ_PROTOCOL, "the first message is %s, it must be hello",
                       message->method);
    rc = dispatch(session, message, &error);
    if (rc == 0)
        return 0;
    fq_reply_error(session, message->id, &error);
    if (!greeted)
        session->ending = true; /* a refused hello is the end */
    return 0;
}
