/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The prefill path without Hopper's instructions, m > FQ_DECODE_ROWS: tiles of 128 × 128, bound by
 * the tensor cores once m is large.  X and Y by base and stride.
 */
#include "gemm.cuh"
#include "tiles.h"

/*                     NT RW WN WM KT STAGES */
using prefill = tiling<8, 2, 4, 2, 1, 3, false>;

static_assert(prefill::STRIPS * FQ_CUDA_QUARTER == FQ_CUDA_PREFILL_BLOCK, "tiles.h counts these");
static_assert(prefill::XROWS == FQ_CUDA_PREFILL_BLOCK, "tiles.h counts these");
static_assert(FQ_CUDA_PREFILL_BLOCK * FQ_CUDA_PREFILL_BLOCK * 4 <= FQ_CUDA_PARTIAL_BYTES,
              "partials");

template <class T> static cudaError_t queue(const fq_cuda_launch &launch, cudaStream_t stream) {
    switch (launch.w.bits) {
    case 8:
        return queue_gemm<prefill, 8, T>(launch, stream);
    case 4:
        return queue_gemm<prefill, 4, T>(launch, stream);
    default:
        return queue_gemm<prefill, 3, T>(launch, stream);
    }
}

cudaError_t fq_cuda_prefill(const struct fq_cuda_launch *launch, cudaStream_t stream) {
    return launch->type == FQ_F16 ? queue<f16>(*launch, stream) : queue<bf16>(*launch, stream);
}

template <class T> static cudaError_t prepare() {
    cudaError_t error = prepare_gemm<prefill, 8, T>();

    if (error == cudaSuccess)
        error = prepare_gemm<prefill, 4, T>();
    if (error == cudaSuccess)
        error = prepare_gemm<prefill, 3, T>();
    return error;
}

cudaError_t fq_cuda_prefill_prepare(void) {
    cudaError_t error = prepare<f16>();

    return error == cudaSuccess ? prepare<bf16>() : error;
}
