/* SPDX-License-Identifier: Apache-2.0 */
/* libcuda by dlopen: the few functions and types of the driver API that opening memory takes. */
#include "device.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int cuda_result; /* CUresult: 0 is success */
typedef int cuda_device;
typedef void *cuda_context;

struct cuda_uuid {
    unsigned char bytes[16];
};
struct cuda_handle {
    unsigned char bytes[FQ_DEVICE_HANDLE_BYTES];
};

#define IPC_LAZY_PEER_ACCESS 1u

struct fq_device {
    void *library;
    cuda_device ordinal;
    cuda_context context; /* the primary one, retained */
    cuda_result (*init)(unsigned);
    cuda_result (*count)(int *);
    cuda_result (*get)(cuda_device *, int);
    cuda_result (*uuid)(struct cuda_uuid *, cuda_device);
    cuda_result (*retain)(cuda_context *, cuda_device);
    cuda_result (*release)(cuda_device);
    cuda_result (*push)(cuda_context);
    cuda_result (*pop)(cuda_context *);
    cuda_result (*ipc_open)(uint64_t *, struct cuda_handle, unsigned);
    cuda_result (*ipc_close)(uint64_t);
    cuda_result (*error_name)(cuda_result, const char **);
};

static int fail_cuda(const struct fq_device *device, cuda_result result, const char *what,
                     struct fq_error *err) {
    const char *name = NULL;

    if (device->error_name(result, &name) != 0 || !name)
        name = "an unknown error";
    return fq_fail(err, FQ_DEVICE, "%s: %s (%d)", what, name, result);
}

static int load_library(struct fq_device *device, struct fq_error *err) {
    /* POSIX wants this detour to turn an object pointer into a function pointer. */
    const struct {
        const char *name;
        void **function;
    } symbols[] = {
        {"cuInit", (void **)&device->init},
        {"cuDeviceGetCount", (void **)&device->count},
        {"cuDeviceGet", (void **)&device->get},
        {"cuDeviceGetUuid_v2", (void **)&device->uuid},
        {"cuDevicePrimaryCtxRetain", (void **)&device->retain},
        {"cuDevicePrimaryCtxRelease_v2", (void **)&device->release},
        {"cuCtxPushCurrent_v2", (void **)&device->push},
        {"cuCtxPopCurrent_v2", (void **)&device->pop},
        {"cuIpcOpenMemHandle_v2", (void **)&device->ipc_open},
        {"cuIpcCloseMemHandle", (void **)&device->ipc_close},
        {"cuGetErrorName", (void **)&device->error_name},
    };

    device->library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!device->library)
        return fq_fail(err, FQ_UNAVAILABLE, "device buffers need libcuda.so.1: %s", dlerror());
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
        *symbols[i].function = dlsym(device->library, symbols[i].name);
        if (!*symbols[i].function)
            return fq_fail(err, FQ_UNAVAILABLE, "libcuda.so.1 has no %s: it is too old",
                           symbols[i].name);
    }
    return 0;
}

static void format_uuid(const struct cuda_uuid *uuid, char text[48]) {
    const unsigned char *b = uuid->bytes;

    snprintf(text, 48, "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x",
             b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7], b[8], b[9], b[10], b[11], b[12], b[13],
             b[14], b[15]);
}

static int find_device(struct fq_device *device, const char *wanted, struct fq_error *err) {
    int count = 0;
    cuda_result result = device->init(0);

    if (result == 0)
        result = device->count(&count);
    if (result != 0)
        return fail_cuda(device, result, "CUDA cannot be started", err);
    for (int i = 0; i < count; i++) {
        struct cuda_uuid uuid;
        char text[48];

        result = device->get(&device->ordinal, i);
        if (result == 0)
            result = device->uuid(&uuid, device->ordinal);
        if (result != 0)
            return fail_cuda(device, result, "a GPU cannot be asked for its UUID", err);
        format_uuid(&uuid, text);
        if (strcmp(text, wanted) == 0)
            return 0;
    }
    return fq_fail(err, FQ_UNAVAILABLE,
                   "the daemon's GPU %s is not among the %d that this process sees", wanted, count);
}

int fq_device_new(const char *uuid, struct fq_device **out, struct fq_error *err) {
    struct fq_device *device = calloc(1, sizeof *device);
    int rc;

    if (!device)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for a device");
    rc = load_library(device, err);
    if (rc == 0)
        rc = find_device(device, uuid, err);
    if (rc == 0) {
        cuda_result result = device->retain(&device->context, device->ordinal);

        if (result != 0) {
            device->context = NULL;
            rc = fail_cuda(device, result, "the GPU's primary context cannot be had", err);
        }
    }
    if (rc < 0) {
        fq_device_free(device);
        return rc;
    }
    *out = device;
    return 0;
}

void fq_device_free(struct fq_device *device) {
    if (!device)
        return;
    if (device->context)
        device->release(device->ordinal);
    if (device->library)
        dlclose(device->library);
    free(device);
}

int fq_device_open(struct fq_device *device, const uint8_t handle[FQ_DEVICE_HANDLE_BYTES],
                   uint64_t *base, struct fq_error *err) {
    struct cuda_handle copy;
    cuda_context popped;
    cuda_result result = device->push(device->context);

    if (result != 0)
        return fail_cuda(device, result, "the GPU's context cannot be entered", err);
    memcpy(copy.bytes, handle, sizeof copy.bytes);
    result = device->ipc_open(base, copy, IPC_LAZY_PEER_ACCESS);
    device->pop(&popped);
    if (result != 0)
        return fail_cuda(device, result, "the daemon's device memory cannot be opened", err);
    return 0;
}

void fq_device_close(struct fq_device *device, uint64_t base) {
    cuda_context popped;

    if (device->push(device->context) != 0)
        return;
    device->ipc_close(base);
    device->pop(&popped);
}
