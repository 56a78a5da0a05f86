/* SPDX-License-Identifier: Apache-2.0 */
/* The Hopper prefill kernels for int3 weights: see hopper-prefill.cuh. */
#include "hopper-prefill.cuh"

cudaError_t fq_cuda_hopper_prefill_int3(const struct fq_cuda_launch *launch, const CUtensorMap *maps,
                                        cudaStream_t stream) {
    return queue_prefill_any<3>(*launch, maps, stream);
}

cudaError_t fq_cuda_hopper_prefill_int3_prepare(void) {
    return prepare_prefill_any<3>();
}
