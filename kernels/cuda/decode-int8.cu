/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The decode kernels of int8 weights; see decode.cuh.
 */
#include "decode.cuh"

cudaError_t fq_cuda_decode_int8(const struct fq_cuda_launch *launch, cudaStream_t stream) {
    return decode_any<8>(*launch, stream);
}

cudaError_t fq_cuda_decode_int8_prepare(void) {
    return decode_prepare_any<8>();
}
