/* SPDX-License-Identifier: Apache-2.0 */
/* The kernels of finequant-bench itself: the plain read, filling with values, and clocks. */
#include "bench-cuda.h"

#include "cuda/launch.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define THREADS 256
#define BLOCKS_PER_SM                                                                              \
    4 /* of 256 threads with 8 loads each: 128 KiB in flight on a multiprocessor */
#define LOADS           8
#define UNLIKELY_ANSWER 0x2545f491u

/* Streams past L1; what L2 does with it is the hardware's choice, as for the weights of a GEMM.
 * Zero, and no load, unless `wanted`: by a predicate, since a branch would stand between loads. */
static __device__ __forceinline__ uint4 load_once(const uint4 *from, bool wanted) {
    uint4 value = make_uint4(0, 0, 0, 0);

    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.s32 p, %5, 0;\n"
                 "@p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
                 "}"
                 : "+r"(value.x), "+r"(value.y), "+r"(value.z), "+r"(value.w)
                 : "l"(from), "r"((int)wanted));
    return value;
}

/* The whole grid steps through memory side by side; all loads of a step before their first use. */
static __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    read_all(const uint4 *from, int64_t count, unsigned *sink) {
    int64_t step = (int64_t)gridDim.x * THREADS;
    unsigned sum = 0;

    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += LOADS * step) {
        uint4 values[LOADS];

#pragma unroll
        for (int j = 0; j < LOADS; j++)
            values[j] = load_once(from + i + j * step, i + j * step < count);
#pragma unroll
        for (int j = 0; j < LOADS; j++)
            sum ^= values[j].x ^ values[j].y ^ values[j].z ^ values[j].w;
    }
    if (sum == UNLIKELY_ANSWER)
        *sink = sum;
}

static __device__ __forceinline__ void store(__half *to, float value) {
    *to = __float2half_rn(value);
}

static __device__ __forceinline__ void store(__nv_bfloat16 *to, float value) {
    *to = __float2bfloat16_rn(value);
}

template <class T>
static __global__ void fill(T *to, int64_t rows, int64_t columns, enum fq_dtype dtype,
                            uint64_t seed, float scale) {
    int64_t step = (int64_t)gridDim.x * blockDim.x;

    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < rows * columns; i += step)
        store(to + i, scale * fq_synthetic_value(seed, i / columns, i % columns, dtype));
}

/* Large blocks, as many as multiprocessors: the hardware gives each one.  (A multiprocessor without
 * one would only be left out of the median.) */
static __global__ void __launch_bounds__(1024, 1) stamp(struct bench_stamp *stamps) {
    unsigned processor;
    struct bench_stamp now;

    if (threadIdx.x > 0)
        return;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(processor));
    asm volatile("mov.u64 %0, %%clock64;" : "=l"(now.cycles));
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now.ns));
    if (processor < BENCH_STAMPS)
        stamps[processor] = now;
}

/* Multiprocessors of the current device, times `each`. */
static cudaError_t blocks_of_device(int each, unsigned *blocks) {
    int device, processors = 0;
    cudaError_t error = cudaGetDevice(&device);

    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    *blocks = (unsigned)(processors * each);
    return error;
}

cudaError_t bench_cuda_read(const void *from, uint64_t bytes, unsigned *sink, cudaStream_t stream) {
    unsigned blocks;
    cudaError_t error = blocks_of_device(BLOCKS_PER_SM, &blocks);

    if (error != cudaSuccess)
        return error;
    return launch(read_all, dim3(blocks), THREADS, 0, stream, (const uint4 *)from,
                  (int64_t)(bytes / sizeof(uint4)), sink);
}

cudaError_t bench_cuda_stamp(struct bench_stamp *stamps, cudaStream_t stream) {
    unsigned blocks;
    cudaError_t error = blocks_of_device(1, &blocks);

    return error == cudaSuccess ? launch(stamp, dim3(blocks), 1024, 0, stream, stamps) : error;
}

cudaError_t bench_cuda_fill(void *to, int64_t rows, int64_t columns, enum fq_dtype dtype,
                            uint64_t seed, float scale, cudaStream_t stream) {
    unsigned blocks;
    cudaError_t error = blocks_of_device(8, &blocks);

    if (error != cudaSuccess)
        return error;
    if (dtype == FQ_BF16)
        return launch(fill<__nv_bfloat16>, dim3(blocks), THREADS, 0, stream, (__nv_bfloat16 *)to,
                      rows, columns, dtype, seed, scale);
    return launch(fill<__half>, dim3(blocks), THREADS, 0, stream, (__half *)to, rows, columns,
                  dtype, seed, scale);
}
