/* SPDX-License-Identifier: Apache-2.0 */
/* The Hopper prefill kernels for int4 weights: see hopper-prefill.cuh. */
#include "hopper-prefill.cuh"

cudaError_t fq_cuda_hopper_prefill_int4(const struct fq_cuda_launch *launch, const CUtensorMap *maps,
                                        cudaStream_t stream) {
    return queue_prefill_any<4>(*launch, maps, stream);
}

cudaError_t fq_cuda_hopper_prefill_int4_prepare(void) {
    return prepare_prefill_any<4>();
}
