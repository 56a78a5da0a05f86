/* SPDX-License-Identifier: Apache-2.0 */
/* The Hopper decode kernels for int8 weights: see hopper-decode.cuh. */
#include "hopper-decode.cuh"

cudaError_t fq_cuda_hopper_decode_int8(const struct fq_cuda_launch *launch, const CUtensorMap *maps,
                                       cudaStream_t stream) {
    return queue_decode_any<8>(*launch, *maps, stream);
}

cudaError_t fq_cuda_hopper_decode_int8_prepare(void) {
    return prepare_decode_any<8>();
}
