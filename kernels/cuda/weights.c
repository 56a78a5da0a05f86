/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Weights of the CUDA backend: loading, which streams the canonical form
 * through two page-locked pieces and prepacks each on the device as it arrives,
 * or has the device make it there, and sharing the result with other processes.
 * Neither the whole canonical form nor a dense one is ever in device memory.
 */
#include "cuda-impl.h"

#include <stdlib.h>
#include <string.h>

/* Where group_inverse stops being exact: its square in k16 steps is 2^31. */
#define GROUP_MAX (46336 * FQ_CUDA_STEP)

static uint64_t align_part(uint64_t bytes) {
    return (bytes + FQ_CUDA_PART_ALIGN - 1) / FQ_CUDA_PART_ALIGN * FQ_CUDA_PART_ALIGN;
}

/* Where the parts behind the codes start, in bytes. */
struct parts {
    uint64_t scales, zeros, meta;
};

/* Fills everything but the addresses; returns the bytes of all parts together. */
static uint64_t plan(struct fq_cuda_matrix *packed, int64_t n, int64_t k, int64_t group, int bits,
                     bool bf16, bool symmetric, struct parts *parts) {
    bool whole = group >= k; /* one group: per channel, or a group longer than a row */
    int64_t strips = (n + FQ_CUDA_STRIP - 1) / FQ_CUDA_STRIP;
    int64_t tiles = (k + FQ_CUDA_TILE - 1) / FQ_CUDA_TILE;
    int64_t steps = group / FQ_CUDA_STEP;

    memset(packed, 0, sizeof *packed);
    packed->n = (int)n;
    packed->k = (int)k;
    packed->bits = bits;
    packed->strips = (int)strips;
    packed->tiles = (int)tiles;
    packed->groups = whole ? 1 : (int)((tiles * FQ_CUDA_TILE + group - 1) / group);
    packed->group_steps = whole ? (int)tiles * FQ_CUDA_STEPS : (int)steps;
    packed->group_inverse =
        whole ? 0 : (uint32_t)((((uint64_t)1 << 31) + (uint64_t)steps - 1) / (uint64_t)steps);
    packed->group_shift = whole ? 31 : (steps & (steps - 1)) ? -1 : __builtin_ctzll(steps);
    packed->slots_log2 = whole || group % 64 == 0 ? 0 : group % 32 == 0 ? 1 : 2;
    packed->scale_bf16 = bf16;
    parts->scales = align_part((uint64_t)strips * tiles * FQ_CUDA_TILE_BYTES(bits));
    parts->zeros =
        parts->scales + align_part((uint64_t)strips * packed->groups * FQ_CUDA_SCALE_BYTES);
    parts->meta =
        parts->zeros +
        (symmetric ? 0 : align_part((uint64_t)strips * packed->groups * FQ_CUDA_ZERO_BYTES));
    return parts->meta + align_part(sizeof(struct fq_cuda_meta));
}

static void place(struct fq_cuda_weights *weights, const struct parts *parts) {
    weights->matrix.codes = weights->packed;
    weights->matrix.scales = weights->packed + parts->scales;
    weights->matrix.zeros = weights->base.info.symmetric ? NULL : weights->packed + parts->zeros;
    weights->matrix.meta = (const struct fq_cuda_meta *)(weights->packed + parts->meta);
}

uint64_t fq_cuda_weights_size(struct fq_backend *backend, const struct fq_matrix *matrix) {
    struct fq_cuda_matrix packed;
    struct parts parts;

    (void)backend;
    return plan(&packed, matrix->n, matrix->k, matrix->group, matrix->bits,
                matrix->scale_type == FQ_BF16, !matrix->zeros, &parts);
}

/* ---- Loading -------------------------------------------------------------------------------- */

static int prepare_loader(struct fq_cuda_loader *loader, struct fq_error *err) {
    for (int i = 0; i < 2; i++) {
        int status = 0;
        void *p;

        if (!loader->host[i]) {
            status = fq_cuda_check(cudaHostAlloc(&p, FQ_CUDA_PIECE_BYTES, cudaHostAllocDefault),
                                   err, "allocate page-locked memory for loading");
            if (status < 0)
                return status;
            loader->host[i] = p;
        }
        if (!loader->device[i]) {
            status = fq_cuda_check(cudaMalloc(&p, FQ_CUDA_PIECE_BYTES), err,
                                   "allocate device memory for loading");
            if (status < 0)
                return status;
            loader->device[i] = p;
        }
        if (!loader->moved[i])
            status = fq_cuda_check(
                cudaEventCreateWithFlags(&loader->moved[i],
                                         cudaEventBlockingSync | cudaEventDisableTiming),
                err, "create a CUDA event");
        if (status < 0)
            return status;
    }
    return 0;
}

/* One of a matrix's three arrays: n rows of `units`, a unit being what the device packs by. */
struct part {
    const uint8_t *data;
    uint64_t row_bytes;
    uint64_t unit_bytes; /* of the last unit of a row perhaps less */
    int64_t units;
    int element;                               /* bytes of a scale or zero point; 0: codes */
    const struct fq_cuda_synthetic *synthetic; /* the device makes it and data is NULL; or NULL */
};

/* The piece is in host memory: queues its way into half `half` of the loader's device memory. */
static int bring_piece(struct fq_cuda_backend *cuda, const struct part *part,
                       const struct fq_cuda_piece *piece, int half, struct fq_error *err) {
    struct fq_cuda_loader *loader = &cuda->loader;
    uint64_t from = (uint64_t)piece->unit0 * part->unit_bytes, width = (uint64_t)piece->stride;
    int status = fq_cuda_check(cudaEventSynchronize(loader->moved[half]), err, "load weights");

    if (status < 0)
        return status;
    fq_host_copy_rows(loader->host[half],
                      part->data + (uint64_t)piece->row0 * part->row_bytes + from, piece->rows,
                      width, part->row_bytes);
    return fq_cuda_check(cudaMemcpyAsync(loader->device[half], loader->host[half],
                                         (uint64_t)piece->rows * width, cudaMemcpyHostToDevice,
                                         cuda->copies),
                         err, "load weights");
}

/* Gets rows row0.. and units unit0.. into half `half` of the loader and packs them. */
static int load_piece(struct fq_cuda_backend *cuda, const struct fq_cuda_matrix *packed,
                      const struct part *part, struct fq_cuda_piece *piece, int half,
                      struct fq_error *err) {
    struct fq_cuda_loader *loader = &cuda->loader;
    uint64_t from = (uint64_t)piece->unit0 * part->unit_bytes;
    uint64_t width = (uint64_t)piece->units * part->unit_bytes;
    int status;

    if (width > part->row_bytes - from)
        width = part->row_bytes - from;
    piece->data = loader->device[half];
    piece->stride = (int64_t)width;
    if (!part->synthetic)
        status = bring_piece(cuda, part, piece, half, err);
    else
        status = fq_cuda_check(
            part->element
                ? fq_cuda_synthetic_groups(part->synthetic, part->element, piece, cuda->copies)
                : fq_cuda_synthetic_codes(part->synthetic, piece, cuda->copies),
            err, "make synthetic weights");
    if (status < 0)
        return status;
    status = fq_cuda_check(part->element
                               ? fq_cuda_prepack_groups(packed, part->element, piece, cuda->copies)
                               : fq_cuda_prepack_codes(packed, piece, cuda->copies),
                           err, "prepack weights");
    if (status < 0)
        return status;
    return fq_cuda_check(cudaEventRecord(loader->moved[half], cuda->copies), err, "load weights");
}

static int load_part(struct fq_cuda_backend *cuda, const struct fq_cuda_matrix *packed,
                     const struct part *part, struct fq_error *err) {
    int64_t rows = (int64_t)(FQ_CUDA_PIECE_BYTES / part->row_bytes) / FQ_CUDA_STRIP * FQ_CUDA_STRIP;
    int64_t units = part->units;
    int half = 0;

    if (rows == 0) { /* not even one strip of whole rows fits: windows of it */
        rows = FQ_CUDA_STRIP;
        units = (int64_t)(FQ_CUDA_PIECE_BYTES / FQ_CUDA_STRIP / part->unit_bytes);
    }
    for (int64_t row = 0; row < packed->n; row += rows) {
        for (int64_t unit = 0; unit < part->units; unit += units) {
            struct fq_cuda_piece piece = {
                .row0 = (int)row,
                .rows = (int)(packed->n - row < rows ? packed->n - row : rows),
                .unit0 = (int)unit,
                .units = (int)(part->units - unit < units ? part->units - unit : units),
            };
            int status = load_piece(cuda, packed, part, &piece, half, err);

            if (status < 0)
                return status;
            half = !half;
        }
    }
    return 0;
}

/* The backend's lock is held: the loader serves one matrix at a time. */
static int load(struct fq_cuda_backend *cuda, struct fq_cuda_weights *weights,
                const struct fq_matrix *matrix, const struct fq_cuda_synthetic *synthetic,
                struct fq_error *err) {
    const struct fq_cuda_matrix *packed = &weights->matrix;
    uint64_t codes_bytes = (uint64_t)(packed->scales - packed->codes);
    int64_t groups = fq_matrix_groups(matrix);
    struct part codes = {matrix->codes,
                         (uint64_t)fq_matrix_row_bytes(matrix),
                         (uint64_t)matrix->bits * FQ_CUDA_TILE / 8,
                         packed->tiles,
                         0,
                         synthetic};
    struct part scales = {matrix->scales, (uint64_t)groups * 2, 2, groups, 2, synthetic};
    struct part zeros = {matrix->zeros, (uint64_t)groups, 1, groups, 1, synthetic};
    int status;

    status = prepare_loader(&cuda->loader, err);
    if (status < 0)
        return status;
    status = fq_cuda_check(cudaMemsetAsync(weights->packed + codes_bytes, 0,
                                           weights->base.info.bytes - codes_bytes, cuda->copies),
                           err, "clear the padding of weights");
    if (status == 0)
        status = load_part(cuda, packed, &codes, err);
    if (status == 0)
        status = load_part(cuda, packed, &scales, err);
    if (status == 0 && matrix->zeros)
        status = load_part(cuda, packed, &zeros, err);
    if (status == 0)
        status =
            fq_cuda_check(fq_cuda_prepack_finish(packed, cuda->copies), err, "prepack weights");
    if (status < 0) {
        (void)cudaStreamSynchronize(cuda->copies); /* before the memory is given back */
        return status;
    }
    return fq_cuda_check(cudaStreamSynchronize(cuda->copies), err, "load weights");
}

static int make_weights(struct fq_backend *backend, const struct fq_matrix *matrix,
                        const struct fq_cuda_synthetic *synthetic, struct fq_weights **out,
                        struct fq_error *err) {
    struct fq_cuda_backend *cuda = (struct fq_cuda_backend *)backend;
    struct fq_cuda_weights *weights;
    struct parts parts;
    int status;

    if (matrix->group < matrix->k && matrix->group > GROUP_MAX)
        return fq_fail(err, FQ_UNSUPPORTED,
                       "group size %lld: the cuda backend takes up to %d, or one scale a row",
                       (long long)matrix->group, GROUP_MAX);
    status = fq_cuda_use(backend, err);
    if (status < 0)
        return status;
    weights = calloc(1, sizeof *weights);
    if (!weights)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for a matrix's description");
    weights->base.backend = backend;
    weights->base.info = (struct fq_weights_info){
        .n = matrix->n,
        .k = matrix->k,
        .group = matrix->group,
        .bits = matrix->bits,
        .scale_type = matrix->scale_type,
        .symmetric = !matrix->zeros,
        .bytes = plan(&weights->matrix, matrix->n, matrix->k, matrix->group, matrix->bits,
                      matrix->scale_type == FQ_BF16, !matrix->zeros, &parts),
    };
    pthread_mutex_lock(&cuda->lock);
    status =
        fq_cuda_slab_take(cuda, weights->base.info.bytes, &weights->slab, &weights->packed, err);
    if (status < 0)
        goto fail;
    place(weights, &parts);
    status = load(cuda, weights, matrix, synthetic, err);
    if (status < 0)
        goto fail_slab;
    pthread_mutex_unlock(&cuda->lock);
    *out = &weights->base;
    return 0;
fail_slab:
    fq_cuda_slab_give(cuda, weights->slab, weights->packed);
fail:
    pthread_mutex_unlock(&cuda->lock);
    free(weights);
    return status;
}

int fq_cuda_weights_new(struct fq_backend *backend, const struct fq_matrix *matrix,
                        struct fq_weights **out, struct fq_error *err) {
    return make_weights(backend, matrix, NULL, out, err);
}

int fq_cuda_weights_synthetic(struct fq_backend *backend, const struct fq_matrix *shape,
                              uint64_t seed, struct fq_weights **out, struct fq_error *err) {
    struct fq_cuda_synthetic synthetic = {
        .seed = seed,
        .k = (int)shape->k,
        .bits = shape->bits,
        .scale_bf16 = shape->scale_type == FQ_BF16,
        .base = fq_synthetic_base(shape),
    };

    return make_weights(backend, shape, &synthetic, out, err);
}

void fq_cuda_weights_free(struct fq_weights *base) {
    struct fq_cuda_backend *cuda = (struct fq_cuda_backend *)base->backend;
    struct fq_cuda_weights *weights = (struct fq_cuda_weights *)base;

    (void)fq_cuda_use(base->backend, NULL);
    if (weights->slab) {
        pthread_mutex_lock(&cuda->lock);
        fq_cuda_slab_give(cuda, weights->slab, weights->packed);
        pthread_mutex_unlock(&cuda->lock);
    } else {
        (void)cudaIpcCloseMemHandle(weights->imported);
    }
    (void)cudaGetLastError();
    free(weights);
}

/* ---- Sharing -------------------------------------------------------------------------------- */

int fq_cuda_weights_export(struct fq_weights *base, struct fq_weights_handle *handle,
                           struct fq_error *err) {
    struct fq_cuda_weights *weights = (struct fq_cuda_weights *)base;
    cudaIpcMemHandle_t ipc;
    int status;

    if (!weights->slab)
        return fq_fail(err, FQ_UNSUPPORTED,
                       "weights that another process exported cannot be exported again");
    status = fq_cuda_use(base->backend, err);
    if (status < 0)
        return status;
    status = fq_cuda_check(cudaIpcGetMemHandle(&ipc, weights->slab->base), err, "export weights");
    if (status < 0)
        return status;
    memset(handle, 0, sizeof *handle);
    handle->info = base->info;
    handle->layout = FQ_CUDA_LAYOUT;
    handle->memory.kind = FQ_MEMORY_DEVICE;
    handle->memory.fd = -1;
    memcpy(handle->memory.ipc, ipc.reserved, sizeof handle->memory.ipc);
    handle->memory.offset = (uint64_t)(weights->packed - weights->slab->base);
    handle->memory.bytes = base->info.bytes;
    return 0;
}

int fq_cuda_weights_import(struct fq_backend *backend, const struct fq_weights_handle *handle,
                           struct fq_weights **out, struct fq_error *err) {
    const struct fq_weights_info *info = &handle->info;
    struct fq_cuda_weights *weights;
    struct parts parts;
    uint64_t bytes;
    void *address;
    int status;

    if (handle->layout != FQ_CUDA_LAYOUT)
        return fq_fail(err, FQ_VERSION, "the weights have layout version %u; this build reads %u",
                       (unsigned)handle->layout, (unsigned)FQ_CUDA_LAYOUT);
    status = fq_cuda_use(backend, err);
    if (status < 0)
        return status;
    weights = calloc(1, sizeof *weights);
    if (!weights)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for a matrix's description");
    weights->base.backend = backend;
    weights->base.info = *info;
    bytes = plan(&weights->matrix, info->n, info->k, info->group, info->bits,
                 info->scale_type == FQ_BF16, info->symmetric, &parts);
    if (info->bytes != bytes || handle->memory.bytes != bytes ||
        handle->memory.offset % FQ_CUDA_PART_ALIGN) {
        status = fq_fail(
            err, FQ_INVALID,
            "the weights' handle tells %llu bytes at %llu; their shape takes %llu at a "
            "multiple of %d",
            (unsigned long long)handle->memory.bytes, (unsigned long long)handle->memory.offset,
            (unsigned long long)bytes, FQ_CUDA_PART_ALIGN);
        goto fail;
    }
    status = fq_cuda_ipc_open(&handle->memory, &weights->imported, &address, err);
    if (status < 0)
        goto fail;
    weights->packed = address;
    place(weights, &parts);
    *out = &weights->base;
    return 0;
fail:
    free(weights);
    return status;
}
