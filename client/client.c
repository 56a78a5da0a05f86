/* SPDX-License-Identifier: Apache-2.0 */
/* The calls of <finequant.h> that are no buffer: models, tensors, products.  Any thread. */
#include "client.h"

#include "params.h"
#include "socket-path.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* ---- Connections ------------------------------------------------------------------------- */

static void set_up_locks(struct fq_client *client) {
    pthread_mutex_init(&client->mutex, NULL);
    pthread_cond_init(&client->quiet, NULL);
}

int fq_client_new(const struct fq_client_options *options, struct fq_client **out,
                  struct fq_error *err) {
    static const struct fq_client_options defaults = {0};
    struct fq_client *client;
    const char *name;
    int rc = 0;

    if (!options)
        options = &defaults;
    name = options->name ? options->name : program_invocation_short_name;
    if (options->timeout_ms < 0)
        return fq_fail(err, FQ_INVALID, "timeout_ms is %d, allowed are 0 (for ever) and more",
                       options->timeout_ms);
    if (options->name && (!*name || strlen(name) > 63))
        return fq_fail(err, FQ_INVALID, "the client's name has %zu bytes, allowed are 1 to 63",
                       strlen(name));
    client = calloc(1, sizeof *client);
    if (!client)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for a client");
    set_up_locks(client);
    client->fd = -1;
    client->timeout_ms = options->timeout_ms;
    client->reconnect = options->reconnect;
    memcpy(client->name, name, strnlen(name, sizeof client->name - 1));
    if (!*client->name)
        memcpy(client->name, "client", sizeof "client");
    fq_pack_init(&client->pack);
    if (!options->socket)
        rc = fq_socket_path(client->socket, sizeof client->socket, err);
    else if (!*options->socket || strlen(options->socket) >= sizeof client->socket)
        rc = fq_fail(err, FQ_INVALID, "the socket's path has %zu bytes, allowed are 1 to %zu",
                     strlen(options->socket), sizeof client->socket - 1);
    else
        memcpy(client->socket, options->socket, strlen(options->socket));
    if (rc == 0) {
        pthread_mutex_lock(&client->mutex);
        rc = fq_connection_open(client, err);
        pthread_mutex_unlock(&client->mutex);
    }
    if (rc < 0) {
        fq_client_free(client);
        return rc;
    }
    *out = client;
    return 0;
}

void fq_client_free(struct fq_client *client) {
    if (!client)
        return;
    pthread_mutex_lock(&client->mutex);
    fq_connection_fini(client);
    pthread_mutex_unlock(&client->mutex);
    fq_device_free(client->device);
    fq_pack_fini(&client->pack);
    pthread_cond_destroy(&client->quiet);
    pthread_mutex_destroy(&client->mutex);
    free(client);
}

void fq_client_info(struct fq_client *client, struct fq_client_info *info) {
    pthread_mutex_lock(&client->mutex);
    *info = client->info;
    pthread_mutex_unlock(&client->mutex);
}

uint64_t fq_client_generation(struct fq_client *client) {
    pthread_mutex_lock(&client->mutex);
    uint64_t generation = client->generation;
    pthread_mutex_unlock(&client->mutex);
    return generation;
}

int fq_client_fd(struct fq_client *client) {
    pthread_mutex_lock(&client->mutex);
    int fd = client->alive ? client->fd : -1;
    pthread_mutex_unlock(&client->mutex);
    return fd;
}

int fq_client_ping(struct fq_client *client, struct fq_error *err) {
    struct fq_call *call;
    int rc = fq_call_begin(client, "ping", 0, &call, err);

    return rc < 0 ? rc : fq_call_run(client, call, NULL, err);
}

/* Sends and waits as long as it takes. */
static int run_patiently(struct fq_client *client, struct fq_call *call, struct fq_reply *reply,
                         struct fq_error *err) {
    static const struct fq_call_wait patient = {0};
    int rc;

    call->keep_reply = reply != NULL;
    rc = fq_call_send(client, call, err);
    return rc < 0 ? rc : fq_call_finish(client, call, &patient, reply, err);
}

int fq_client_shutdown(struct fq_client *client, struct fq_error *err) {
    struct fq_call *call;
    int rc = fq_call_begin(client, "shutdown", 0, &call, err);

    return rc < 0 ? rc : run_patiently(client, call, NULL, err);
}

/* ---- Models ------------------------------------------------------------------------------ */

static int decode_model(const msgpack_object *map, struct fq_model *model, struct fq_error *err) {
    static const struct fq_field fields[] = {
        FQ_FIELD_STR(struct fq_model, name, FQ_REQUIRED),
        FQ_FIELD_STR(struct fq_model, path, FQ_REQUIRED),
        FQ_FIELD_STR(struct fq_model, state, FQ_REQUIRED),
        FQ_FIELD_U64(struct fq_model, done, FQ_REQUIRED),
        FQ_FIELD_U64(struct fq_model, total, FQ_REQUIRED),
        FQ_FIELD_U64(struct fq_model, matrices, FQ_REQUIRED),
        FQ_FIELD_U64(struct fq_model, bytes, FQ_REQUIRED),
        FQ_FIELD_U64(struct fq_model, dense_bytes, FQ_REQUIRED),
        FQ_FIELD_U64(struct fq_model, requests, FQ_REQUIRED),
        FQ_FIELD_U64(struct fq_model, rows, FQ_REQUIRED),
        FQ_FIELD_U64(struct fq_model, queued, FQ_REQUIRED),
        FQ_FIELD_U64(struct fq_model, loaded_at, FQ_REQUIRED),
    };

    memset(model, 0, sizeof *model);
    return fq_result_decode(map, fields, sizeof fields / sizeof *fields, model, err);
}

struct list {
    const msgpack_object *models, *tensors;
};

int fq_client_model_list(struct fq_client *client, struct fq_model **models, size_t *count,
                         struct fq_error *err) {
    static const struct fq_field fields[] = {FQ_FIELD_ARRAY(struct list, models, FQ_REQUIRED)};
    struct list list = {0};
    struct fq_model *array = NULL;
    struct fq_call *call;
    struct fq_reply reply;
    uint32_t size = 0;
    int rc = fq_call_begin(client, "model.list", 0, &call, err);

    if (rc == 0)
        rc = fq_call_run(client, call, &reply, err);
    if (rc < 0)
        return rc;
    rc = fq_result_decode(&reply.message.body, fields, 1, &list, err);
    if (rc == 0) {
        size = list.models->via.array.size;
        array = calloc(size ? size : 1, sizeof *array);
        if (!array)
            rc = fq_fail(err, FQ_NO_MEMORY, "no memory for %" PRIu32 " models", size);
    }
    for (uint32_t i = 0; rc == 0 && i < size; i++)
        rc = decode_model(&list.models->via.array.ptr[i], &array[i], err);
    fq_reply_fini(&reply);
    if (rc < 0) {
        free(array);
        return rc;
    }
    *models = array;
    *count = size;
    return 0;
}

struct loaded {
    const msgpack_object *model;
};

int fq_client_model_load(struct fq_client *client, const struct fq_model_load *load,
                         struct fq_model *model, struct fq_error *err) {
    static const struct fq_field fields[] = {FQ_FIELD_MAP(struct loaded, model, FQ_REQUIRED)};
    struct fq_call_wait how = {.progress = load->progress, .data = load->data};
    struct loaded loaded = {0};
    struct fq_call *call;
    struct fq_reply reply;
    int rc;

    if (load->group < FQ_GROUP_CHANNEL)
        return fq_fail(err, FQ_INVALID,
                       "group is %" PRId64 ", allowed are 0, %d and multiples of 16", load->group,
                       FQ_GROUP_CHANNEL);
    rc = fq_call_begin(client, "model.load", 2u + (load->bits != 0) + (load->group != 0), &call,
                       err);
    if (rc < 0)
        return rc;
    fq_pack_str(&client->pack, "name", load->name);
    fq_pack_str(&client->pack, "path", load->path);
    if (load->bits != 0)
        fq_pack_u64(&client->pack, "bits", load->bits);
    if (load->group != 0)
        fq_pack_u64(&client->pack, "group",
                    load->group == FQ_GROUP_CHANNEL ? 0 : (uint64_t)load->group);
    call->keep_reply = true;
    call->model = load->name;
    rc = fq_call_send(client, call, err);
    if (rc == 0)
        rc = fq_call_finish(client, call, &how, &reply, err);
    if (rc < 0)
        return rc;
    rc = fq_result_decode(&reply.message.body, fields, 1, &loaded, err);
    if (rc == 0 && model)
        rc = decode_model(loaded.model, model, err);
    fq_reply_fini(&reply);
    return rc;
}

struct unloaded {
    uint64_t bytes;
};

int fq_client_model_unload(struct fq_client *client, const char *name, uint64_t *bytes,
                           struct fq_error *err) {
    static const struct fq_field fields[] = {FQ_FIELD_U64(struct unloaded, bytes, FQ_REQUIRED)};
    struct unloaded unloaded = {0};
    struct fq_call *call;
    struct fq_reply reply;
    int rc = fq_call_begin(client, "model.unload", 1, &call, err);

    if (rc < 0)
        return rc;
    fq_pack_str(&client->pack, "name", name);
    rc = run_patiently(client, call, &reply, err);
    if (rc < 0)
        return rc;
    rc = fq_result_decode(&reply.message.body, fields, 1, &unloaded, err);
    if (rc == 0 && bytes)
        *bytes = unloaded.bytes;
    fq_reply_fini(&reply);
    return rc;
}

/* ---- Tensors ----------------------------------------------------------------------------- */

struct wire_tensor {
    uint64_t id, n, k, group, bytes;
    uint32_t bits;
    char name[256], scale[16];
    bool symmetric, bias;
};

static int decode_tensor(const msgpack_object *map, uint64_t generation, struct fq_tensor *tensor,
                         struct fq_error *err) {
    static const struct fq_field fields[] = {
        FQ_FIELD_U64(struct wire_tensor, id, FQ_REQUIRED),
        FQ_FIELD_STR(struct wire_tensor, name, FQ_REQUIRED),
        FQ_FIELD_U64(struct wire_tensor, n, FQ_REQUIRED),
        FQ_FIELD_U64(struct wire_tensor, k, FQ_REQUIRED),
        FQ_FIELD_U32(struct wire_tensor, bits, FQ_REQUIRED),
        FQ_FIELD_U64(struct wire_tensor, group, FQ_REQUIRED),
        FQ_FIELD_STR(struct wire_tensor, scale, FQ_REQUIRED),
        FQ_FIELD_BOOL(struct wire_tensor, symmetric, FQ_REQUIRED),
        FQ_FIELD_BOOL(struct wire_tensor, bias, FQ_REQUIRED),
        FQ_FIELD_U64(struct wire_tensor, bytes, FQ_REQUIRED),
    };
    struct wire_tensor wire = {0};
    int rc = fq_result_decode(map, fields, sizeof fields / sizeof *fields, &wire, err);

    if (rc < 0)
        return rc;
    if (fq_dtype_parse(wire.scale) == 0)
        return fq_fail(err, FQ_PROTOCOL, "tensor %s has scales of unknown type %s", wire.name,
                       wire.scale);
    *tensor = (struct fq_tensor){
        .id = wire.id,
        .generation = generation,
        .n = wire.n,
        .k = wire.k,
        .bits = wire.bits,
        .group = wire.group,
        .scale = (enum fq_dtype)fq_dtype_parse(wire.scale),
        .symmetric = wire.symmetric,
        .bias = wire.bias,
        .bytes = wire.bytes,
    };
    memcpy(tensor->name, wire.name, sizeof tensor->name);
    return 0;
}

struct described {
    const msgpack_object *tensor;
};

int fq_client_tensor_find(struct fq_client *client, const char *model, const char *tensor,
                          struct fq_tensor *out, struct fq_error *err) {
    static const struct fq_field fields[] = {FQ_FIELD_MAP(struct described, tensor, FQ_REQUIRED)};
    struct described described = {0};
    struct fq_call *call;
    struct fq_reply reply;
    uint64_t generation;
    int rc = fq_call_begin(client, "tensor.describe", 2, &call, err);

    if (rc < 0)
        return rc;
    generation = client->generation;
    fq_pack_str(&client->pack, "model", model);
    fq_pack_str(&client->pack, "tensor", tensor);
    rc = fq_call_run(client, call, &reply, err);
    if (rc < 0)
        return rc;
    rc = fq_result_decode(&reply.message.body, fields, 1, &described, err);
    if (rc == 0)
        rc = decode_tensor(described.tensor, generation, out, err);
    fq_reply_fini(&reply);
    return rc;
}

int fq_client_tensor_list(struct fq_client *client, const char *model, struct fq_tensor **tensors,
                          size_t *count, struct fq_error *err) {
    static const struct fq_field fields[] = {FQ_FIELD_ARRAY(struct list, tensors, FQ_REQUIRED)};
    struct list list = {0};
    struct fq_tensor *array = NULL;
    struct fq_call *call;
    struct fq_reply reply;
    uint64_t generation;
    uint32_t size = 0;
    int rc = fq_call_begin(client, "tensor.list", 1, &call, err);

    if (rc < 0)
        return rc;
    generation = client->generation;
    fq_pack_str(&client->pack, "model", model);
    rc = fq_call_run(client, call, &reply, err);
    if (rc < 0)
        return rc;
    rc = fq_result_decode(&reply.message.body, fields, 1, &list, err);
    if (rc == 0) {
        size = list.tensors->via.array.size;
        array = calloc(size ? size : 1, sizeof *array);
        if (!array)
            rc = fq_fail(err, FQ_NO_MEMORY, "no memory for %" PRIu32 " tensors", size);
    }
    for (uint32_t i = 0; rc == 0 && i < size; i++)
        rc = decode_tensor(&list.tensors->via.array.ptr[i], generation, &array[i], err);
    fq_reply_fini(&reply);
    if (rc < 0) {
        free(array);
        return rc;
    }
    *tensors = array;
    *count = size;
    return 0;
}

/* ---- Products ---------------------------------------------------------------------------- */

static int check_bias(const char *name, enum fq_bias bias, const struct fq_place *at,
                      enum fq_dtype dtype, struct fq_error *err) {
    if ((unsigned)bias > FQ_BIAS_BUFFER)
        return fq_fail(err, FQ_INVALID, "%s is %d, allowed are 0 to %d", name, (int)bias,
                       FQ_BIAS_BUFFER);
    if (bias == FQ_BIAS_BUFFER && (!at->buffer || !fq_dtype_name((int)dtype)))
        return fq_fail(err, FQ_INVALID, "FQ_BIAS_BUFFER needs %s_at.buffer and bias_dtype", name);
    return 0;
}

static int check_request(const struct fq_gemm_request *request, struct fq_error *err) {
    if (!request->tensor || !request->x.buffer || !request->y.buffer)
        return fq_fail(err, FQ_INVALID, "a gemm needs a tensor, x.buffer and y.buffer");
    if (!fq_dtype_name((int)request->dtype))
        return fq_fail(err, FQ_INVALID, "dtype is %d, allowed are FQ_F16, FQ_BF16 and FQ_F32",
                       (int)request->dtype);
    if (!fq_activation_name((int)request->activation))
        return fq_fail(err, FQ_INVALID, "activation is %d, allowed are 0 to %d",
                       (int)request->activation, FQ_ACTIVATION_COUNT - 1);
    if (!request->gate && request->gate_bias != FQ_BIAS_NONE)
        return fq_fail(err, FQ_INVALID, "gate_bias is %d without a gate, allowed is 0",
                       (int)request->gate_bias);
    int rc = check_bias("bias", request->bias, &request->bias_at, request->bias_dtype, err);
    return rc < 0 ? rc
                  : check_bias("gate_bias", request->gate_bias, &request->gate_bias_at,
                               request->bias_dtype, err);
}

/* Mutex held: the daemon, which would only call an unknown key invalid, can do what is asked. */
static int check_capable(const struct fq_client *client, const struct fq_gemm_request *request,
                         struct fq_error *err) {
    const struct fq_client_info *info = &client->info;

    if (request->gate && !info->gate)
        return fq_fail(err, FQ_UNSUPPORTED, "a gate, which %s does not know", info->server);
    if (request->residual.buffer && !info->residual)
        return fq_fail(err, FQ_UNSUPPORTED, "a residual, which %s does not know", info->server);
    return 0;
}

/* Mutex held: nothing of a former connection may be named. */
static int check_generation(const struct fq_client *client, const struct fq_gemm_request *request,
                            struct fq_error *err) {
    const struct fq_tensor *tensors[] = {request->tensor, request->gate};
    const struct fq_buffer *buffers[] = {
        request->x.buffer, request->y.buffer, request->residual.buffer,
        request->bias == FQ_BIAS_BUFFER ? request->bias_at.buffer : NULL,
        request->gate_bias == FQ_BIAS_BUFFER ? request->gate_bias_at.buffer : NULL};

    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++)
        if (tensors[i] && tensors[i]->generation != client->generation)
            return fq_fail(err, FQ_NOT_FOUND, "tensor %s belongs to a connection that has ended",
                           tensors[i]->name);
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) {
        if (buffers[i] && buffers[i]->client != client)
            return fq_fail(err, FQ_INVALID, "buffer %" PRIu64 " belongs to another client",
                           buffers[i]->id);
        if (buffers[i] && buffers[i]->generation != client->generation)
            return fq_fail(err, FQ_NOT_FOUND,
                           "buffer %" PRIu64 " belongs to a connection that has ended",
                           buffers[i]->id);
    }
    return 0;
}

static void pack_place(struct fq_pack *pack, const char *key, const struct fq_place *place) {
    fq_pack_map(pack, key, 2u + (place->stride != 0));
    fq_pack_u64(pack, "buffer", place->buffer->id);
    fq_pack_u64(pack, "offset", place->offset);
    if (place->stride != 0)
        fq_pack_u64(pack, "stride", place->stride);
}

static void pack_bias(struct fq_pack *pack, enum fq_bias bias, const struct fq_place *at,
                      enum fq_dtype dtype) {
    if (bias == FQ_BIAS_CHECKPOINT) {
        fq_pack_bool(pack, "bias", true);
    } else if (bias == FQ_BIAS_BUFFER) {
        fq_pack_map(pack, "bias", 3);
        fq_pack_u64(pack, "buffer", at->buffer->id);
        fq_pack_u64(pack, "offset", at->offset);
        fq_pack_str(pack, "dtype", fq_dtype_name((int)dtype));
    }
}

static int begin_gemm(struct fq_client *client, const struct fq_gemm_request *request,
                      struct fq_call **out, struct fq_error *err) {
    struct fq_call *call;
    uint32_t fields = 5u + (request->bias != FQ_BIAS_NONE) +
                      (request->activation != FQ_ACTIVATION_NONE) + (request->gate != NULL) +
                      (request->residual.buffer != NULL);
    int rc = check_request(request, err);

    if (rc == 0)
        rc = fq_call_begin(client, "gemm", fields, &call, err);
    if (rc < 0)
        return rc;
    rc = check_capable(client, request, err);
    if (rc == 0)
        rc = check_generation(client, request, err);
    if (rc < 0) {
        fq_call_cancel(client, call);
        return rc;
    }
    struct fq_pack *pack = &client->pack;
    fq_pack_u64(pack, "tensor", request->tensor->id);
    fq_pack_u64(pack, "m", request->m);
    fq_pack_str(pack, "dtype", fq_dtype_name((int)request->dtype));
    pack_place(pack, "x", &request->x);
    pack_place(pack, "y", &request->y);
    pack_bias(pack, request->bias, &request->bias_at, request->bias_dtype);
    if (request->activation != FQ_ACTIVATION_NONE)
        fq_pack_str(pack, "activation", fq_activation_name((int)request->activation));
    if (request->gate) {
        fq_pack_map(pack, "gate", 1u + (request->gate_bias != FQ_BIAS_NONE));
        fq_pack_u64(pack, "tensor", request->gate->id);
        pack_bias(pack, request->gate_bias, &request->gate_bias_at, request->bias_dtype);
    }
    if (request->residual.buffer)
        pack_place(pack, "residual", &request->residual);
    *out = call;
    return 0;
}

int fq_client_gemm(struct fq_client *client, const struct fq_gemm_request *request,
                   struct fq_error *err) {
    struct fq_call *call;
    int rc = begin_gemm(client, request, &call, err);

    return rc < 0 ? rc : fq_call_run(client, call, NULL, err);
}

static fq_ticket ticket_of(uint64_t generation, uint32_t id) {
    return generation << 32 | id;
}

int fq_client_submit(struct fq_client *client, const struct fq_gemm_request *request,
                     fq_ticket *ticket, struct fq_error *err) {
    struct fq_call *call;
    fq_ticket made;
    int rc = begin_gemm(client, request, &call, err);

    if (rc < 0)
        return rc;
    made = ticket_of(client->generation, call->id);
    call->generation = client->generation;
    rc = fq_call_send(client, call, err);
    if (rc == 0)
        *ticket = made;
    return rc;
}

/* The call of a ticket; mutex held. */
static int find_ticket(struct fq_client *client, fq_ticket ticket, struct fq_call **out,
                       struct fq_error *err) {
    struct fq_call *call = fq_call_find(client, (uint32_t)ticket);

    if (!call || call->waited_for || ticket_of(call->generation, call->id) != ticket)
        return fq_fail(err, FQ_INVALID, "ticket %#" PRIx64 " is spent or being waited for", ticket);
    *out = call;
    return 0;
}

int fq_client_wait(struct fq_client *client, fq_ticket ticket, struct fq_error *err) {
    struct fq_call_wait how = {.timeout_ms = client->timeout_ms, .keep = true};
    struct fq_call *call;
    int rc;

    pthread_mutex_lock(&client->mutex);
    rc = find_ticket(client, ticket, &call, err);
    if (rc == 0)
        call->waited_for = true;
    pthread_mutex_unlock(&client->mutex);
    return rc < 0 ? rc : fq_call_finish(client, call, &how, NULL, err);
}

int fq_client_poll(struct fq_client *client, fq_ticket ticket, struct fq_error *err) {
    struct fq_call *call;
    int rc;

    pthread_mutex_lock(&client->mutex);
    rc = find_ticket(client, ticket, &call, err);
    if (rc == 0 && !call->done) {
        call->waited_for = true; /* drain lets go of the mutex */
        fq_connection_drain(client);
        call->waited_for = false;
    }
    if (rc == 0 && call->done) {
        rc = call->error.status < 0 ? call->error.status : 1;
        if (rc < 0 && err)
            *err = call->error;
        fq_call_release(client, call);
    }
    pthread_mutex_unlock(&client->mutex);
    return rc;
}
