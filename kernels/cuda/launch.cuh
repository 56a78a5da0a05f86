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

/*
 * The same for a kernel that may start before the ones ahead of it in the stream are done
 * (programmatic dependent launch: it waits in grid_wait()), in clusters of `cluster` CTAs.
 */
template <class... P>
static cudaError_t launch_overlapped(void (*kernel)(P...), dim3 grid, unsigned threads,
                                     size_t shared, unsigned cluster, cudaStream_t stream,
                                     P... parameters) {
    void *pointers[] = {&parameters...};
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};

    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = cluster;
    attributes[1].val.clusterDim.y = 1;
    attributes[1].val.clusterDim.z = 1;
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = cluster > 1 ? 2 : 1;
    return cudaLaunchKernelExC(&config, reinterpret_cast<const void *>(kernel), pointers);
}

#endif
