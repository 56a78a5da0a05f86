/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Launching a kernel through the runtime's function.  The <<<>>> form runs the
 * stub that nvcc generates, which looks the kernel up in a guarded static
 * variable: that would need libstdc++, or be a race without it (the build says
 * -fno-threadsafe-statics).  This form never runs the stub.
 */
#ifndef FQ_KERNELS_CUDA_LAUNCH_CUH
#define FQ_KERNELS_CUDA_LAUNCH_CUH

#include <cuda_runtime_api.h>

template <class... P>
static cudaError_t launch(void (*kernel)(P...), dim3 grid, unsigned threads, size_t shared,
                          cudaStream_t stream, P... parameters) {
    void *pointers[] = {&parameters...};

    return cudaLaunchKernel(reinterpret_cast<const void *>(kernel), grid, dim3(threads), pointers,
                            shared, stream);
}

#endif
