/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The decode path without Hopper's instructions, m ≤ FQ_DECODE_ROWS: bound by reading W once.  Four
 * shapes by the columns of eight that m fills; the more of them, the more rows of W share what was
 * read of X.  One .cu file a bit width, so that they compile side by side.
 */
#ifndef FQ_KERNELS_CUDA_DECODE_CUH
#define FQ_KERNELS_CUDA_DECODE_CUH

#include "gemm.cuh"
#include "tiles.h"

/*                      NT RW WN WM KT STAGES */
using decode_8 = tiling<1, 1, 4, 1, 2, 4, true>;
using decode_16 = tiling<2, 2, 4, 1, 1, 4, true>;
using decode_32 = tiling<4, 2, 4, 1, 1, 4, true>;
using decode_64 = tiling<8, 2, 8, 1, 1, 3, true>;

static_assert(decode_64::STRIPS * FQ_CUDA_QUARTER == FQ_CUDA_DECODE_BLOCK, "tiles.h counts these");
static_assert(decode_8::STRIPS * 4 == decode_64::STRIPS, "fq_cuda_counters()");
static_assert(decode_64::STRIPS * 16 * decode_64::XROWS * 4 <= FQ_CUDA_PARTIAL_BYTES, "partials");

template <int BITS, class T>
static cudaError_t decode(const fq_cuda_launch &launch, cudaStream_t stream) {
    if (launch.m <= 8 && !launch.gate.codes) /* a gated pair wants two strips a warp */
        return queue_gemm<decode_8, BITS, T>(launch, stream);
    if (launch.m <= 16)
        return queue_gemm<decode_16, BITS, T>(launch, stream);
    if (launch.m <= 32)
        return queue_gemm<decode_32, BITS, T>(launch, stream);
    return queue_gemm<decode_64, BITS, T>(launch, stream);
}

template <int BITS>
static cudaError_t decode_any(const fq_cuda_launch &launch, cudaStream_t stream) {
    return launch.type == FQ_F16 ? decode<BITS, f16>(launch, stream)
                                 : decode<BITS, bf16>(launch, stream);
}

template <int BITS, class T> static cudaError_t decode_prepare() {
    cudaError_t error = prepare_gemm<decode_8, BITS, T>();

    if (error == cudaSuccess)
        error = prepare_gemm<decode_16, BITS, T>();
    if (error == cudaSuccess)
        error = prepare_gemm<decode_32, BITS, T>();
    if (error == cudaSuccess)
        error = prepare_gemm<decode_64, BITS, T>();
    return error;
}

template <int BITS> static cudaError_t decode_prepare_any() {
    cudaError_t error = decode_prepare<BITS, f16>();

    return error == cudaSuccess ? decode_prepare<BITS, bf16>() : error;
}

#endif
