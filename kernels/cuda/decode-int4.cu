/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The decode kernels of int4 weights; see decode.cuh.
 */
#include "decode.cuh"

cudaError_t fq_cuda_decode_int4(const struct fq_cuda_launch *launch, cudaStream_t stream) {
    return decode_any<4>(*launch, stream);
}

cudaError_t fq_cuda_decode_int4_prepare(void) {
    return decode_prepare_any<4>();
}
