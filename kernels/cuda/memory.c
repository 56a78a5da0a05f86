/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory regions of the CUDA backend.  Host memory is the shared sealed memfd,
 * page-locked and mapped into the device's address space.  Device memory is a
 * cudaMalloc of its own, of whole 2 MiB: the driver packs smaller ones into one
 * block, and exporting one of those would share the neighbours too.
 */
#include "cuda-impl.h"

#include <stdlib.h>
#include <string.h>

#define GRANULE ((uint64_t)2 << 20)

struct cuda_memory {
    struct fq_memory base;
    void *imported; /* what cudaIpcOpenMemHandle gave; NULL for memory of our own */
};

static int lock_pages(struct fq_memory *memory, struct fq_error *err) {
    int status;

    status = fq_cuda_check(cudaHostRegister(memory->host, memory->bytes,
                                            cudaHostRegisterMapped | cudaHostRegisterPortable),
                           err, "page-lock host memory for the GPU");
    if (status < 0)
        return status;
    status = fq_cuda_check(cudaHostGetDevicePointer(&memory->address, memory->host, 0), err,
                           "map host memory for the GPU");
    if (status < 0)
        (void)cudaHostUnregister(memory->host);
    return status;
}

static int new_device_memory(struct fq_cuda_backend *cuda, uint64_t bytes, struct fq_memory *memory,
                             struct fq_error *err) {
    uint64_t rounded = (bytes + GRANULE - 1) / GRANULE * GRANULE;
    int status;

    if (rounded < bytes)
        return fq_fail(err, FQ_NO_MEMORY, "%llu bytes of device memory are more than there can be",
                       (unsigned long long)bytes);
    status = fq_cuda_check(cudaMalloc(&memory->address, rounded), err, "allocate device memory");
    if (status < 0)
        return status;
    status = fq_cuda_check(cudaMemsetAsync(memory->address, 0, rounded, cuda->copies), err,
                           "clear device memory");
    if (status == 0)
        status = fq_cuda_check(cudaStreamSynchronize(cuda->copies), err, "clear device memory");
    if (status < 0)
        (void)cudaFree(memory->address);
    memory->kind = FQ_MEMORY_DEVICE;
    memory->bytes = bytes;
    memory->fd = -1;
    return status;
}

int fq_cuda_memory_new(struct fq_backend *backend, enum fq_memory_kind kind, uint64_t bytes,
                       struct fq_memory **out, struct fq_error *err) {
    struct cuda_memory *memory;
    int status;

    status = fq_cuda_use(backend, err);
    if (status < 0)
        return status;
    memory = calloc(1, sizeof *memory);
    if (!memory)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for a region's description");
    if (kind == FQ_MEMORY_DEVICE) {
        status = new_device_memory((struct fq_cuda_backend *)backend, bytes, &memory->base, err);
        if (status < 0)
            goto fail;
    } else {
        status = fq_host_memory_init(&memory->base, bytes, err);
        if (status < 0)
            goto fail;
        status = lock_pages(&memory->base, err);
        if (status < 0)
            goto fail_host;
    }
    memory->base.backend = backend;
    *out = &memory->base;
    return 0;
fail_host:
    fq_host_memory_fini(&memory->base);
fail:
    free(memory);
    return status;
}

int fq_cuda_memory_import(struct fq_backend *backend, const struct fq_memory_handle *handle,
                          struct fq_memory **out, struct fq_error *err) {
    struct cuda_memory *memory;
    int status;

    status = fq_cuda_use(backend, err);
    if (status < 0)
        return status;
    memory = calloc(1, sizeof *memory);
    if (!memory)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for a region's description");
    if (handle->kind == FQ_MEMORY_DEVICE) {
        status = fq_cuda_ipc_open(handle, &memory->imported, &memory->base.address, err);
        if (status < 0)
            goto fail;
        memory->base.kind = FQ_MEMORY_DEVICE;
        memory->base.bytes = handle->bytes;
        memory->base.fd = -1;
    } else {
        status = fq_host_memory_init_from_fd(&memory->base, handle->fd, handle->bytes, err);
        if (status < 0)
            goto fail;
        status = lock_pages(&memory->base, err);
        if (status < 0)
            goto fail_host;
    }
    memory->base.backend = backend;
    *out = &memory->base;
    return 0;
fail_host:
    fq_host_memory_fini(&memory->base);
fail:
    free(memory);
    return status;
}

int fq_cuda_memory_export(struct fq_memory *base, struct fq_memory_handle *handle,
                          struct fq_error *err) {
    struct cuda_memory *memory = (struct cuda_memory *)base;
    cudaIpcMemHandle_t ipc;
    int status;

    if (base->kind == FQ_MEMORY_HOST)
        return fq_host_memory_export(base, handle, err);
    if (memory->imported)
        return fq_fail(err, FQ_UNSUPPORTED,
                       "device memory that another process exported cannot be exported again");
    status = fq_cuda_use(base->backend, err);
    if (status < 0)
        return status;
    status = fq_cuda_check(cudaIpcGetMemHandle(&ipc, base->address), err, "export device memory");
    if (status < 0)
        return status;
    memset(handle, 0, sizeof *handle);
    handle->kind = FQ_MEMORY_DEVICE;
    handle->fd = -1;
    memcpy(handle->ipc, ipc.reserved, sizeof handle->ipc);
    handle->bytes = base->bytes;
    return 0;
}

void fq_cuda_memory_free(struct fq_memory *base) {
    struct cuda_memory *memory = (struct cuda_memory *)base;

    (void)fq_cuda_use(base->backend, NULL);
    if (base->kind == FQ_MEMORY_HOST) {
        (void)cudaHostUnregister(base->host);
        fq_host_memory_fini(base);
    } else if (memory->imported) {
        (void)cudaIpcCloseMemHandle(memory->imported);
    } else {
        (void)cudaFree(base->address);
    }
    (void)cudaGetLastError();
    free(memory);
}

int fq_cuda_memory_copy(struct fq_memory *memory, uint64_t offset, void *host, uint64_t bytes,
                        bool to_device, struct fq_error *err) {
    cudaStream_t copies = ((struct fq_cuda_backend *)memory->backend)->copies;
    uint8_t *device = (uint8_t *)memory->address + offset;
    int status;

    status = fq_cuda_use(memory->backend, err);
    if (status < 0)
        return status;
    status = fq_cuda_check(
        to_device ? cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, copies)
                  : cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, copies),
        err, "copy device memory");
    if (status < 0)
        return status;
    return fq_cuda_check(cudaStreamSynchronize(copies), err, "copy device memory");
}
