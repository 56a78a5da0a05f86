/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows of X that do not lie as the GEMM kernels want them: in host memory, not on
 * 16 bytes, or, for the Hopper kernels, not yet in the order of a tile.
 */
#include "cuda-impl.h"
#include "launch.cuh"
#include "ptx-hopper.cuh"

static unsigned blocks_for(int64_t threads) {
    return (unsigned)((threads + 255) / 256);
}

/* A row a block row; eight elements a thread and turn, in one access where the row is aligned. */
static __global__ void gather_rows(const __grid_constant__ fq_cuda_gather gather) {
    const uint16_t *from = (const uint16_t *)gather.rows[blockIdx.y];
    uint16_t *to = gather.to + blockIdx.y * gather.stride;
    bool aligned = ((uintptr_t)from & 15) == 0;

    for (int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 8; i < gather.stride;
         i += (int64_t)gridDim.x * blockDim.x * 8) {
        if (aligned && i + 8 <= gather.count) {
            *(uint4 *)(to + i) = *(const uint4 *)(from + i);
        } else {
            for (int64_t j = i; j < i + 8; j++)
                to[j] = j < gather.count ? from[j] : 0;
        }
    }
}

cudaError_t fq_cuda_gather_rows(const struct fq_cuda_gather *gather, cudaStream_t stream) {
    unsigned blocks = blocks_for(gather->stride / 8);

    return launch(gather_rows, dim3(blocks < 64 ? blocks : 64, gather->m), 256, 0, stream, *gather);
}

/* 16 bytes of a row from element k on, zeros past the row's end. */
static __device__ __forceinline__ uint4 load_piece(const uint16_t *row, int k, int end) {
    uint32_t v[4] = {0, 0, 0, 0};

    if (k + 8 <= end && ((uintptr_t)(row + k) & 15) == 0)
        return *(const uint4 *)(row + k);
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (k + i < end)
            v[i / 2] |= (uint32_t)row[k + i] << (16 * (i & 1));
    return make_uint4(v[0], v[1], v[2], v[3]);
}

/* A thread a piece: eight to a row and tile.  On architectures before Hopper never launched. */
static __global__ void arrange_rows(const __grid_constant__ fq_cuda_arrange arrange) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    int at = blockIdx.x * blockDim.x + threadIdx.x, piece = at % 8, tile = at / 8;
    int row = blockIdx.y;

    grid_launch_dependents();
    grid_wait();
    if (tile < arrange.tiles)
        *(uint4 *)(arrange.to + ((int64_t)tile * arrange.rows_padded * 128) +
                   wgmma_piece(row, piece)) =
            load_piece((const uint16_t *)arrange.rows[row], tile * FQ_CUDA_TILE + piece * 8,
                       arrange.k);
#endif
}

cudaError_t fq_cuda_arrange_rows(const struct fq_cuda_arrange *arrange, cudaStream_t stream) {
    return launch_overlapped(arrange_rows,
                             dim3(blocks_for((int64_t)arrange->tiles * 8), arrange->m), 256, 0, 1,
                             stream, *arrange);
}

/* 1 in sm_90a's machine code alone. */
static __global__ void probe_hopper(int *answer) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    *answer = 1;
#else
    *answer = 0;
#endif
}

cudaError_t fq_cuda_probe_hopper(int *answer, cudaStream_t stream) {
    int *device;
    cudaError_t error = cudaMalloc(&device, sizeof *device);

    if (error != cudaSuccess)
        return error;
    error = launch(probe_hopper, 1, 1, 0, stream, device);
    if (error == cudaSuccess)
        error = cudaMemcpyAsync(answer, device, sizeof *answer, cudaMemcpyDeviceToHost, stream);
    if (error == cudaSuccess)
        error = cudaStreamSynchronize(stream);
    (void)cudaFree(device);
    return error;
}
