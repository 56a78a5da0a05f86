/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The "cuda" backend: choosing and describing the device, streams' events, and
 * the table of operations.  The runtime is linked statically and finds the
 * driver when a backend is opened, so the program starts without one.  Every
 * entry point makes the device the calling thread's; nothing uses the default
 * stream.
 */
#include "cuda-impl.h"

#include <ctype.h>
#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CAPABILITY_MIN 8 /* major: mma.sync m16n8k16 with bf16, cp.async */

int fq_cuda_check(cudaError_t error, struct fq_error *err, const char *what) {
    enum fq_status status = FQ_DEVICE;

    if (error == cudaSuccess)
        return 0;
    if (error == cudaErrorMemoryAllocation)
        status = FQ_NO_MEMORY;
    (void)cudaGetLastError(); /* an error that is not sticky shall not be found by a later check */
    return fq_fail(err, status, "cannot %s: %s (%s)", what, cudaGetErrorName(error),
                   cudaGetErrorString(error));
}

int fq_cuda_use(const struct fq_backend *backend, struct fq_error *err) {
    const struct fq_cuda_backend *cuda = (const struct fq_cuda_backend *)backend;

    return fq_cuda_check(cudaSetDevice(cuda->device), err, "use the CUDA device");
}

/* ---- Choosing a device ---------------------------------------------------------------------- */

static void format_uuid(const struct cudaDeviceProp *properties, char *uuid, size_t size) {
    const unsigned char *b = (const unsigned char *)properties->uuid.bytes;

    snprintf(uuid, size, "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x",
             b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7], b[8], b[9], b[10], b[11], b[12], b[13],
             b[14], b[15]);
}

static int find_by_uuid(const char *wanted, int count, int *device, struct fq_error *err) {
    for (int i = 0; i < count; i++) {
        struct cudaDeviceProp properties;
        char uuid[48];
        int status;

        status = fq_cuda_check(cudaGetDeviceProperties(&properties, i), err, "describe a device");
        if (status < 0)
            return status;
        format_uuid(&properties, uuid, sizeof uuid);
        if (strcasecmp(uuid, wanted) == 0) {
            *device = i;
            return 0;
        }
    }
    return fq_fail(err, FQ_UNAVAILABLE, "no CUDA device has the UUID \"%s\"; %d %s present", wanted,
                   count, count == 1 ? "is" : "are");
}

static int choose_device(const char *wanted, int *device, struct fq_error *err) {
    cudaError_t error;
    char *end;
    long index;
    int count = 0;

    error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0) {
        (void)cudaGetLastError();
        return fq_fail(err, FQ_UNAVAILABLE, "no CUDA device: %s",
                       error == cudaSuccess ? "the driver lists none" : cudaGetErrorString(error));
    }
    *device = 0;
    if (!wanted || !*wanted)
        return 0;
    if (strncasecmp(wanted, "GPU-", 4) == 0)
        return find_by_uuid(wanted, count, device, err);
    index = strtol(wanted, &end, 10);
    if (!isdigit((unsigned char)wanted[0]) || *end || index > 1 << 16)
        return fq_fail(err, FQ_INVALID,
                       "CUDA device \"%s\": allowed are an index such as \"0\" and a UUID such as "
                       "\"GPU-01234567-89ab-cdef-0123-456789abcdef\"",
                       wanted);
    if (index >= count)
        return fq_fail(err, FQ_UNAVAILABLE, "no CUDA device %ld; %d %s present", index, count,
                       count == 1 ? "is" : "are");
    *device = (int)index;
    return 0;
}

/* ---- Open and close ------------------------------------------------------------------------- */

static int describe(struct fq_cuda_backend *cuda, int *major, struct fq_error *err) {
    struct fq_device_info *info = &cuda->info;
    struct cudaDeviceProp properties;
    int version, status;

    status = fq_cuda_check(cudaGetDeviceProperties(&properties, cuda->device), err,
                           "describe the CUDA device");
    if (status < 0)
        return status;
    if (properties.major < CAPABILITY_MIN)
        return fq_fail(err, FQ_UNAVAILABLE,
                       "%s has compute capability %d.%d; the kernels need 8.0 or newer",
                       properties.name, properties.major, properties.minor);
    status = fq_cuda_check(fq_cuda_prepack_version(&version), err,
                           "run this build's kernels on the CUDA device");
    if (status < 0)
        return status;
    *major = properties.major;
    cuda->processors = properties.multiProcessorCount;
    snprintf(info->backend, sizeof info->backend, "cuda");
    snprintf(info->name, sizeof info->name, "%.127s", properties.name);
    format_uuid(&properties, info->uuid, sizeof info->uuid);
    snprintf(info->kernels, sizeof info->kernels, "sm_%d", version);
    info->threads = 1;
    info->device_memory = true;
    return 0;
}

/* FINEQUANT_CUDA_KERNELS=sm80 takes the kernels without Hopper's instructions on any device. */
static int choose_kernels(struct fq_cuda_backend *cuda, int major, struct fq_error *err) {
    const char *wanted = getenv("FINEQUANT_CUDA_KERNELS");
    int status, answer = 0;

    if (wanted && strcmp(wanted, "sm80") != 0 && strcmp(wanted, "sm90a") != 0)
        return fq_fail(err, FQ_INVALID,
                       "FINEQUANT_CUDA_KERNELS is \"%s\"; allowed are sm80 and sm90a", wanted);
    if (major == 9) {
        status = fq_cuda_check(fq_cuda_probe_hopper(&answer, cuda->copies), err,
                               "run this build's kernels on the CUDA device");
        if (status < 0)
            return status;
    }
    if (wanted && !answer && strcmp(wanted, "sm90a") == 0)
        return fq_fail(err, FQ_UNAVAILABLE,
                       "FINEQUANT_CUDA_KERNELS is sm90a: this build (--with-cuda-arch) or the "
                       "device has none of those kernels");
    cuda->hopper = answer && !(wanted && strcmp(wanted, "sm80") == 0);
    if (cuda->hopper)
        snprintf(cuda->info.kernels, sizeof cuda->info.kernels, "sm_90a");
    return 0;
}

static int prepare_kernels(bool hopper, struct fq_error *err) {
    static const struct {
        bool hopper;
        fq_cuda_preparer *prepare;
        const char *what;
    } kernels[] = {
        {true, fq_cuda_hopper_decode_int8_prepare, "prepare the int8 decode kernels"},
        {true, fq_cuda_hopper_decode_int4_prepare, "prepare the int4 decode kernels"},
        {true, fq_cuda_hopper_decode_int3_prepare, "prepare the int3 decode kernels"},
        {true, fq_cuda_hopper_prefill_int8_prepare, "prepare the int8 prefill kernels"},
        {true, fq_cuda_hopper_prefill_int4_prepare, "prepare the int4 prefill kernels"},
        {true, fq_cuda_hopper_prefill_int3_prepare, "prepare the int3 prefill kernels"},
        {false, fq_cuda_decode_int8_prepare, "prepare the int8 decode kernels"},
        {false, fq_cuda_decode_int4_prepare, "prepare the int4 decode kernels"},
        {false, fq_cuda_decode_int3_prepare, "prepare the int3 decode kernels"},
        {false, fq_cuda_prefill_prepare, "prepare the prefill kernels"},
    };

    for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++) {
        int status;

        if (kernels[i].hopper && !hopper)
            continue;
        status = fq_cuda_check(kernels[i].prepare(), err, kernels[i].what);
        if (status < 0)
            return status;
    }
    return 0;
}

static void cuda_close(struct fq_backend *backend) {
    struct fq_cuda_backend *cuda = (struct fq_cuda_backend *)backend;

    if (fq_cuda_use(backend, NULL) == 0) {
        for (int i = 0; i < 2; i++) {
            if (cuda->loader.moved[i])
                (void)cudaEventDestroy(cuda->loader.moved[i]);
            if (cuda->loader.host[i])
                (void)cudaFreeHost(cuda->loader.host[i]);
            if (cuda->loader.device[i])
                (void)cudaFree(cuda->loader.device[i]);
        }
        if (cuda->copies)
            (void)cudaStreamDestroy(cuda->copies);
    }
    pthread_mutex_destroy(&cuda->lock);
    free(cuda);
}

static int cuda_open(const struct fq_backend_options *options, struct fq_backend **out,
                     struct fq_error *err) {
    struct fq_cuda_backend *cuda;
    cudaError_t error;
    int device, major, status;

    status = choose_device(options ? options->device : NULL, &device, err);
    if (status < 0)
        return status;
    cuda = calloc(1, sizeof *cuda);
    if (!cuda)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for the cuda backend");
    cuda->base.ops = &fq_cuda_ops;
    cuda->device = device;
    pthread_mutex_init(&cuda->lock, NULL);
    status = fq_cuda_use(&cuda->base, err);
    if (status < 0)
        goto fail;
    error = cudaSetDeviceFlags(cudaDeviceScheduleBlockingSync);
    if (error != cudaErrorSetOnActiveProcess) /* then the device is in use here already: keep it */
        status = fq_cuda_check(error, err, "let the CUDA device's waits sleep");
    else
        (void)cudaGetLastError();
    if (status < 0)
        goto fail;
    status = describe(cuda, &major, err);
    if (status < 0)
        goto fail;
    status = fq_cuda_check(cudaStreamCreateWithFlags(&cuda->copies, cudaStreamNonBlocking), err,
                           "create a CUDA stream");
    if (status < 0)
        goto fail;
    status = choose_kernels(cuda, major, err);
    if (status < 0)
        goto fail;
    status = prepare_kernels(cuda->hopper, err);
    if (status < 0)
        goto fail;
    *out = &cuda->base;
    return 0;
fail:
    cuda_close(&cuda->base);
    return status;
}

static int cuda_info(struct fq_backend *backend, struct fq_device_info *info,
                     struct fq_error *err) {
    struct fq_cuda_backend *cuda = (struct fq_cuda_backend *)backend;
    size_t available, total;
    int status;

    status = fq_cuda_use(backend, err);
    if (status < 0)
        return status;
    status = fq_cuda_check(cudaMemGetInfo(&available, &total), err, "ask for the free memory");
    if (status < 0)
        return status;
    *info = cuda->info;
    info->memory_total = total;
    info->memory_free = available;
    return 0;
}

/* ---- CUDA IPC ------------------------------------------------------------------------------- */

int fq_cuda_driver_entry(const char *name, int version, void *entry, struct fq_error *err) {
    enum cudaDriverEntryPointQueryResult found;
    void *address = NULL;
    int status;

#if CUDART_VERSION >= 12050
    status = fq_cuda_check(cudaGetDriverEntryPointByVersion(name, &address, (unsigned)version,
                                                            cudaEnableDefault, &found),
                           err, "look a function of the CUDA driver up");
#else
    (void)version;
    status = fq_cuda_check(cudaGetDriverEntryPoint(name, &address, cudaEnableDefault, &found), err,
                           "look a function of the CUDA driver up");
#endif
    if (status < 0)
        return status;
    if (found != cudaDriverEntryPointSuccess || !address)
        return fq_fail(err, FQ_DEVICE, "the CUDA driver has no %s", name);
    memcpy(entry, &address, sizeof address); /* ISO C has no cast from object to function pointer */
    return 0;
}

/* The allocation that an address lies in. */
static int allocation_bytes(void *base, size_t *bytes, struct fq_error *err) {
    CUresult (*range)(CUdeviceptr *, size_t *, CUdeviceptr) = NULL;
    CUdeviceptr start;
    CUresult result;
    int status;

    status = fq_cuda_driver_entry("cuMemGetAddressRange", 11000, &range, err);
    if (status < 0)
        return status;
    result = range(&start, bytes, (CUdeviceptr)(uintptr_t)base);
    if (result != CUDA_SUCCESS)
        return fq_fail(err, FQ_DEVICE, "cannot find an allocation's size: driver error %d",
                       (int)result);
    return 0;
}

int fq_cuda_ipc_open(const struct fq_memory_handle *handle, void **base, void **address,
                     struct fq_error *err) {
    cudaIpcMemHandle_t ipc;
    cudaError_t error;
    size_t bytes;
    int status;

    _Static_assert(sizeof ipc.reserved == FQ_IPC_HANDLE_BYTES, "struct fq_memory_handle");
    memcpy(ipc.reserved, handle->ipc, sizeof ipc.reserved);
    error = cudaIpcOpenMemHandle(base, ipc, cudaIpcMemLazyEnablePeerAccess);
    if (error == cudaErrorInvalidValue || error == cudaErrorInvalidResourceHandle ||
        error == cudaErrorDeviceUninitialized || error == cudaErrorMapBufferObjectFailed) {
        (void)cudaGetLastError();
        return fq_fail(err, FQ_INVALID,
                       "cannot open a CUDA IPC handle: %s; it must name a live cudaMalloc "
                       "allocation of another process on this device",
                       cudaGetErrorName(error));
    }
    status = fq_cuda_check(error, err, "open a CUDA IPC handle");
    if (status < 0)
        return status;
    status = allocation_bytes(*base, &bytes, err);
    if (status == 0 && (handle->offset > bytes || handle->bytes > bytes - handle->offset))
        status =
            fq_fail(err, FQ_INVALID,
                    "the CUDA IPC handle's allocation has %zu bytes; %llu from %llu on do not "
                    "fit",
                    bytes, (unsigned long long)handle->bytes, (unsigned long long)handle->offset);
    if (status < 0) {
        (void)cudaIpcCloseMemHandle(*base);
        return status;
    }
    *address = (uint8_t *)*base + handle->offset;
    return 0;
}

/* ---- Events --------------------------------------------------------------------------------- */

static int cuda_event_new(struct fq_backend *backend, struct fq_event **out, struct fq_error *err) {
    struct fq_cuda_event *event;
    int status;

    status = fq_cuda_use(backend, err);
    if (status < 0)
        return status;
    event = calloc(1, sizeof *event);
    if (!event)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for an event");
    event->base.backend = backend;
    status = fq_cuda_check(
        cudaEventCreateWithFlags(&event->event, cudaEventBlockingSync | cudaEventDisableTiming),
        err, "create a CUDA event");
    if (status < 0) {
        free(event);
        return status;
    }
    *out = &event->base;
    return 0;
}

static void cuda_event_free(struct fq_event *base) {
    struct fq_cuda_event *event = (struct fq_cuda_event *)base;

    if (fq_cuda_use(base->backend, NULL) == 0)
        (void)cudaEventDestroy(event->event);
    free(event);
}

static int cuda_event_record(struct fq_event *base, struct fq_stream *stream,
                             struct fq_error *err) {
    struct fq_cuda_event *event = (struct fq_cuda_event *)base;
    int status = fq_cuda_use(base->backend, err);

    if (status < 0)
        return status;
    return fq_cuda_check(cudaEventRecord(event->event, ((struct fq_cuda_stream *)stream)->stream),
                         err, "record a CUDA event");
}

static int cuda_event_query(struct fq_event *base, struct fq_error *err) {
    struct fq_cuda_event *event = (struct fq_cuda_event *)base;
    int status = fq_cuda_use(base->backend, err);
    cudaError_t error;

    if (status < 0)
        return status;
    error = cudaEventQuery(event->event);
    if (error == cudaErrorNotReady)
        return 0;
    status = fq_cuda_check(error, err, "finish what the GPU was given");
    return status < 0 ? status : 1;
}

static int cuda_event_wait(struct fq_event *base, struct fq_error *err) {
    struct fq_cuda_event *event = (struct fq_cuda_event *)base;
    int status = fq_cuda_use(base->backend, err);

    if (status < 0)
        return status;
    return fq_cuda_check(cudaEventSynchronize(event->event), err, "finish what the GPU was given");
}

const struct fq_backend_ops fq_cuda_ops = {
    .name = "cuda",
    .open = cuda_open,
    .close = cuda_close,
    .info = cuda_info,
    .memory_new = fq_cuda_memory_new,
    .memory_import = fq_cuda_memory_import,
    .memory_export = fq_cuda_memory_export,
    .memory_free = fq_cuda_memory_free,
    .memory_copy = fq_cuda_memory_copy,
    .weights_size = fq_cuda_weights_size,
    .weights_new = fq_cuda_weights_new,
    .weights_synthetic = fq_cuda_weights_synthetic,
    .weights_free = fq_cuda_weights_free,
    .weights_export = fq_cuda_weights_export,
    .weights_import = fq_cuda_weights_import,
    .stream_new = fq_cuda_stream_new,
    .stream_free = fq_cuda_stream_free,
    .stream_native = fq_cuda_stream_native,
    .gemm = fq_cuda_gemm,
    .event_new = cuda_event_new,
    .event_free = cuda_event_free,
    .event_record = cuda_event_record,
    .event_query = cuda_event_query,
    .event_wait = cuda_event_wait,
};
