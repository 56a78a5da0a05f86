/* SPDX-License-Identifier: Apache-2.0 */
/* The method gemm: checks everything a client can get wrong, then queues. */
#include "config.h"

#include "methods.h"

#include "daemon.h"
#include "params.h"
#include "session.h"

#include <stdlib.h>
#include <string.h>

struct gemm_params {
    uint64_t tensor, m;
    char dtype[8];
    const msgpack_object *x, *y, *bias, *gate, *residual;
    char activation[16];
};

static const struct fq_field gemm_fields[] = {
    FQ_FIELD_U64(struct gemm_params, tensor, FQ_REQUIRED),
    FQ_FIELD_U64(struct gemm_params, m, FQ_REQUIRED),
    FQ_FIELD_STR(struct gemm_params, dtype, FQ_REQUIRED),
    FQ_FIELD_MAP(struct gemm_params, x, FQ_REQUIRED),
    FQ_FIELD_MAP(struct gemm_params, y, FQ_REQUIRED),
    FQ_FIELD_ANY(struct gemm_params, bias, FQ_OPTIONAL),
    FQ_FIELD_STR(struct gemm_params, activation, FQ_OPTIONAL),
    FQ_FIELD_MAP(struct gemm_params, gate, FQ_OPTIONAL),
    FQ_FIELD_MAP(struct gemm_params, residual, FQ_OPTIONAL),
};

struct place {
    uint64_t buffer, offset, stride;
};

static const struct fq_field place_fields[] = {
    FQ_FIELD_U64(struct place, buffer, FQ_REQUIRED),
    FQ_FIELD_U64(struct place, offset, FQ_REQUIRED),
    FQ_FIELD_U64(struct place, stride, FQ_OPTIONAL),
};

struct bias_params {
    uint64_t buffer, offset;
    char dtype[8];
};

static const struct fq_field bias_fields[] = {
    FQ_FIELD_U64(struct bias_params, buffer, FQ_REQUIRED),
    FQ_FIELD_U64(struct bias_params, offset, FQ_REQUIRED),
    FQ_FIELD_STR(struct bias_params, dtype, FQ_REQUIRED),
};

struct gate_params {
    uint64_t tensor;
    const msgpack_object *bias;
};

static const struct fq_field gate_fields[] = {
    FQ_FIELD_U64(struct gate_params, tensor, FQ_REQUIRED),
    FQ_FIELD_ANY(struct gate_params, bias, FQ_OPTIONAL),
};

#define COUNT_OF(table) (sizeof(table) / sizeof *(table))

/* Rows of a buffer, checked: `rows` of `length` elements, `stride` apart. */
struct region {
    struct fq_buffer *buffer; /* borrowed */
    uint64_t offset, stride, length, rows;
    size_t size; /* bytes an element */
};

static uint64_t end_of(const struct region *region) {
    return region->offset + ((region->rows - 1) * region->stride + region->length) * region->size;
}

/* Resolves the buffer and checks that the rows lie within it. */
static int check_region(struct fq_session *session, const char *what, uint64_t id,
                        struct region *region, struct fq_error *err) {
    uint64_t bytes, elements;

    region->buffer = fq_buffers_find(&session->buffers, id);
    if (!region->buffer)
        return fq_fail(err, FQ_NOT_FOUND, "%s: this session has no buffer %llu", what,
                       (unsigned long long)id);
    bytes = region->buffer->bytes;
    if (region->stride < region->length)
        return fq_fail(err, FQ_INVALID, "%s: stride is %llu, allowed is %llu or more", what,
                       (unsigned long long)region->stride, (unsigned long long)region->length);
    if (region->offset % region->size)
        return fq_fail(err, FQ_INVALID, "%s: offset is %llu, allowed are multiples of %zu", what,
                       (unsigned long long)region->offset, region->size);
    elements = region->offset < bytes ? (bytes - region->offset) / region->size : 0;
    if (region->length > elements ||
        (region->rows > 1 && region->stride > (elements - region->length) / (region->rows - 1)))
        return fq_fail(err, FQ_INVALID,
                       "%s: %llu rows of %llu elements, stride %llu, from offset %llu end beyond "
                       "the %llu bytes of buffer %llu",
                       what, (unsigned long long)region->rows, (unsigned long long)region->length,
                       (unsigned long long)region->stride, (unsigned long long)region->offset,
                       (unsigned long long)bytes, (unsigned long long)id);
    return 0;
}

static int read_place(struct fq_session *session, const char *what, const msgpack_object *map,
                      struct region *region, struct fq_error *err) {
    struct place place = {.stride = region->length};

    if (fq_params_decode(map, place_fields, COUNT_OF(place_fields), &place, err) < 0)
        return fq_fail_in(err, "%s", what);
    region->offset = place.offset;
    region->stride = place.stride;
    return check_region(session, what, place.buffer, region, err);
}

/* Whether no byte is in both.  Rows of X and Y may interleave, where their strides are equal. */
static bool disjoint(const struct region *a, const struct region *b) {
    uint64_t shift;

    if (a->buffer != b->buffer || end_of(a) <= b->offset || end_of(b) <= a->offset)
        return true;
    if (a->size != b->size || a->stride != b->stride)
        return false;
    if (a->offset > b->offset)
        return disjoint(b, a);
    shift = (b->offset - a->offset) / a->size % a->stride;
    return shift >= a->length && shift + b->length <= a->stride;
}

/* A bias as the checkpoint has it, or of the client's own; `what` names it in errors. */
static int read_bias(struct fq_session *session, const char *what, const struct fq_tensor *tensor,
                     const msgpack_object *given, struct region *region, const void **bias,
                     enum fq_dtype *dtype, struct fq_error *err) {
    struct bias_params params;
    int type;

    if (!given || (given->type == MSGPACK_OBJECT_BOOLEAN && !given->via.boolean))
        return 0;
    if (given->type == MSGPACK_OBJECT_BOOLEAN) {
        if (!tensor->bias)
            return fq_fail(err, FQ_INVALID, "%s is true, and %s has none in its checkpoint", what,
                           tensor->name);
        *bias = tensor->bias;
        *dtype = FQ_F32;
        return 0;
    }
    if (given->type != MSGPACK_OBJECT_MAP)
        return fq_fail(err, FQ_INVALID, "%s is neither a bool nor a map", what);
    if (fq_params_decode(given, bias_fields, COUNT_OF(bias_fields), &params, err) < 0)
        return fq_fail_in(err, "%s", what);
    if (!(type = fq_dtype_parse(params.dtype)))
        return fq_fail(err, FQ_INVALID, "%s: dtype is \"%s\", allowed are f32, f16, bf16", what,
                       params.dtype);
    *region = (struct region){
        .offset = params.offset,
        .stride = (uint64_t)tensor->info.n,
        .length = (uint64_t)tensor->info.n,
        .rows = 1,
        .size = fq_dtype_size(type),
    };
    if (check_region(session, what, params.buffer, region, err) < 0)
        return err->status;
    *bias = (char *)fq_memory_address(region->buffer->memory) + region->offset;
    *dtype = (enum fq_dtype)type;
    return 0;
}

/* The gate is of the same model, so that one count of requests keeps both from being unloaded. */
static int check_gate(const struct fq_tensor *tensor, const struct fq_tensor *gate,
                      struct fq_error *err) {
    const struct fq_weights_info *own = &tensor->info, *other = &gate->info;

    if (gate->model != tensor->model)
        return fq_fail(err, FQ_INVALID, "gate: %s is of model %s, allowed is %s", gate->name,
                       gate->model->name, tensor->model->name);
    if (other->n != own->n || other->k != own->k || other->bits != own->bits)
        return fq_fail(err, FQ_INVALID,
                       "gate: %s is %lld by %lld with %d bits, allowed is %lld by %lld with %d, as "
                       "%s is",
                       gate->name, (long long)other->n, (long long)other->k, other->bits,
                       (long long)own->n, (long long)own->k, own->bits, tensor->name);
    return 0;
}

/* After the bias, whose type that of the gate must be. */
static int read_gate(struct fq_session *session, const struct fq_tensor *tensor,
                     const msgpack_object *given, struct fq_gemm *gemm, struct region *region,
                     struct fq_error *err) {
    enum fq_dtype type = gemm->bias_type;
    struct gate_params params = {0};
    struct fq_tensor *gate;
    int rc;

    if (!given)
        return 0;
    if ((rc = fq_params_decode(given, gate_fields, COUNT_OF(gate_fields), &params, err)) < 0 ||
        (rc = fq_registry_tensor(&session->daemon->registry, params.tensor, &gate, err)) < 0)
        return fq_fail_in(err, "gate");
    if ((rc = check_gate(tensor, gate, err)) < 0 ||
        (rc = read_bias(session, "gate.bias", gate, params.bias, region, &gemm->gate_bias, &type,
                        err)) < 0)
        return rc;
    if (gemm->bias && type != gemm->bias_type)
        return fq_fail(err, FQ_INVALID, "gate.bias is %s, allowed is %s, as the bias is",
                       fq_dtype_name((int)type), fq_dtype_name((int)gemm->bias_type));
    gemm->bias_type = type;
    gemm->gate = gate->weights;
    return 0;
}

static int read_scalars(struct fq_session *session, const struct gemm_params *params,
                        struct fq_gemm *gemm, struct fq_error *err) {
    int type = fq_dtype_parse(params->dtype), activation = fq_activation_parse(params->activation);

    if (params->m < 1 || params->m > FQ_GEMM_ROWS_MAX)
        return fq_fail(err, FQ_INVALID, "m is %llu, allowed are 1 to %d",
                       (unsigned long long)params->m, FQ_GEMM_ROWS_MAX);
    if (!type)
        return fq_fail(err, FQ_INVALID, "dtype is \"%s\", allowed are f16, bf16, f32",
                       params->dtype);
    if (type == FQ_F32 && !session->daemon->device.f32_activations)
        return fq_fail(err, FQ_UNSUPPORTED, "dtype is f32, the %s backend has f16 and bf16",
                       session->daemon->device.backend);
    if (activation < 0)
        return fq_fail(err, FQ_INVALID,
                       "activation is \"%s\", allowed are none, relu, gelu, gelu_tanh, silu",
                       params->activation);
    gemm->m = (int64_t)params->m;
    gemm->type = (enum fq_dtype)type;
    gemm->activation = (enum fq_activation)activation;
    return 0;
}

/* What Y must not overlap.  The residual's rows may be the rows of Y that they are added to. */
static int check_overlap(const struct region *regions, struct fq_error *err) {
    static const struct {
        enum fq_operand operand;
        const char *name;
    } others[] = {
        {FQ_OPERAND_X, "x"},
        {FQ_OPERAND_BIAS, "the bias"},
        {FQ_OPERAND_GATE_BIAS, "the gate's bias"},
        {FQ_OPERAND_RESIDUAL, "the residual"},
    };
    const struct region *y = &regions[FQ_OPERAND_Y];

    for (size_t i = 0; i < COUNT_OF(others); i++) {
        const struct region *other = &regions[others[i].operand];
        bool in_place = others[i].operand == FQ_OPERAND_RESIDUAL && other->buffer == y->buffer &&
                        other->offset == y->offset && (other->stride == y->stride || y->rows == 1);

        if (other->buffer && !in_place && !disjoint(other, y))
            return fq_fail(err, FQ_INVALID, "y overlaps %s", others[i].name);
    }
    return 0;
}

static bool on_host(const struct region *region) {
    return !region->buffer || fq_memory_kind(region->buffer->memory) == FQ_MEMORY_HOST;
}

static void *address_of(const struct region *region) {
    return (char *)fq_memory_address(region->buffer->memory) + region->offset;
}

/* X, Y and the residual, whose regions have their shapes. */
static int read_places(struct fq_session *session, const struct gemm_params *params,
                       struct fq_gemm *gemm, struct region *regions, struct fq_error *err) {
    struct region *x = &regions[FQ_OPERAND_X], *y = &regions[FQ_OPERAND_Y];
    struct region *residual = &regions[FQ_OPERAND_RESIDUAL];
    int rc;

    if ((rc = read_place(session, "x", params->x, x, err)) < 0 ||
        (rc = read_place(session, "y", params->y, y, err)) < 0 ||
        (params->residual &&
         (rc = read_place(session, "residual", params->residual, residual, err)) < 0))
        return rc;
    gemm->x = address_of(x);
    gemm->y = address_of(y);
    gemm->x_stride = (int64_t)x->stride;
    gemm->y_stride = (int64_t)y->stride;
    gemm->host = on_host(x) && on_host(y) && on_host(residual);
    if (params->residual) {
        gemm->residual = address_of(residual);
        gemm->residual_stride = (int64_t)residual->stride;
    }
    return 0;
}

/* Checks the whole request and fills request->gemm; the regions borrow their buffers. */
static int read_gemm(struct fq_session *session, const struct fq_message *message,
                     struct fq_request *request, struct region regions[FQ_OPERAND_COUNT],
                     struct fq_error *err) {
    struct region *x = &regions[FQ_OPERAND_X], *y = &regions[FQ_OPERAND_Y];
    struct gemm_params params = {.activation = "none"};
    struct fq_gemm *gemm = &request->gemm;
    int rc;

    if ((rc = fq_params_decode(&message->body, gemm_fields, COUNT_OF(gemm_fields), &params, err)) <
            0 ||
        (rc = fq_registry_tensor(&session->daemon->registry, params.tensor, &request->tensor,
                                 err)) < 0 ||
        (rc = read_scalars(session, &params, gemm, err)) < 0)
        return rc;
    x->rows = y->rows = params.m;
    x->size = y->size = fq_dtype_size(gemm->type);
    x->length = (uint64_t)request->tensor->info.k;
    y->length = (uint64_t)request->tensor->info.n;
    regions[FQ_OPERAND_RESIDUAL] = *y;
    if ((rc = read_places(session, &params, gemm, regions, err)) < 0 ||
        (rc = read_bias(session, "bias", request->tensor, params.bias, &regions[FQ_OPERAND_BIAS],
                        &gemm->bias, &gemm->bias_type, err)) < 0 ||
        (rc = read_gate(session, request->tensor, params.gate, gemm, &regions[FQ_OPERAND_GATE_BIAS],
                        err)) < 0)
        return rc;
    gemm->weights = request->tensor->weights;
    return check_overlap(regions, err);
}

/* That it names, without biases. */
static uint64_t bytes_of(const struct region *regions) {
    uint64_t elements = regions[FQ_OPERAND_X].length + regions[FQ_OPERAND_Y].length;

    if (regions[FQ_OPERAND_RESIDUAL].buffer)
        elements += regions[FQ_OPERAND_RESIDUAL].length;
    return regions[FQ_OPERAND_X].rows * elements * regions[FQ_OPERAND_X].size;
}

int fq_method_gemm(struct fq_session *session, const struct fq_message *message,
                   struct fq_error *err) {
    struct fq_request *request = calloc(1, sizeof *request);
    struct region regions[FQ_OPERAND_COUNT] = {0};
    int rc;

    if (!request)
        return fq_fail(err, FQ_NO_MEMORY, "a request: out of memory");
    request->arrived = uv_hrtime();
    if (session->daemon->draining) {
        rc = fq_fail(err, FQ_BUSY, "the daemon is shutting down");
        goto fail;
    }
    if ((rc = read_gemm(session, message, request, regions, err)) < 0)
        goto fail;
    if ((rc = fq_call_new(session, message->id, bytes_of(regions), &request->call, err)) < 0)
        goto fail;
    if ((rc = fq_scheduler_add(&session->daemon->scheduler, request, err)) < 0) {
        fq_call_free(request->call);
        goto fail;
    }
    for (int i = 0; i < FQ_OPERAND_COUNT; i++)
        if (regions[i].buffer)
            request->buffers[i] = fq_buffer_ref(regions[i].buffer);
    fq_model_begin(request->tensor->model);
    return 0;

fail:
    free(request);
    return rc;
}
