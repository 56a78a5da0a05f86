/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Device memory of the daemon, opened in this process through libcuda, which
 * is loaded when the first device buffer is made and not before.  A device
 * belongs to one client; its functions may be called from any thread.
 */
#ifndef FQ_CLIENT_DEVICE_H
#define FQ_CLIENT_DEVICE_H

#include "error.h"

#define FQ_DEVICE_HANDLE_BYTES 64 /* a cudaIpcMemHandle_t */

struct fq_device;

/* The GPU of that uuid ("GPU-..."), through its primary context.
 * Errors: -FQ_UNAVAILABLE (no libcuda, no such GPU), -FQ_DEVICE, -FQ_NO_MEMORY. */
int fq_device_new(const char *uuid, struct fq_device **out, struct fq_error *err);
void fq_device_free(struct fq_device *device); /* NULL is fine */

/* Opens an exported allocation; *base is a CUdeviceptr.  Error: -FQ_DEVICE. */
int fq_device_open(struct fq_device *device, const uint8_t handle[FQ_DEVICE_HANDLE_BYTES],
                   uint64_t *base, struct fq_error *err);
void fq_device_close(struct fq_device *device, uint64_t base);

#endif
