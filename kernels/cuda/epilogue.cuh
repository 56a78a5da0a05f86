/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What is done to a finished fp32 sum: bias, activation, gate, residual, one
 * rounding.  To add an activation, add it to enum fq_activation and a case to each
 * activate().
 */
#ifndef FQ_KERNELS_CUDA_EPILOGUE_CUH
#define FQ_KERNELS_CUDA_EPILOGUE_CUH

#include "cuda-impl.h"
#include "dequant.cuh"

static __device__ __forceinline__ float load_bias(const void *bias, int type, int n) {
    if (type == FQ_F32)
        return static_cast<const float *>(bias)[n];
    if (type == FQ_F16)
        return __half2float(static_cast<const __half *>(bias)[n]);
    return __bfloat162float(static_cast<const __nv_bfloat16 *>(bias)[n]);
}

/* The quotients are of the fast exponential: right to 2^-18, and to 2^-16 where hardly anything is
 * left of v; Y has 2^-11 at most. */
static __device__ __forceinline__ float activate(float v, int activation) {
    switch (activation) {
    case FQ_ACTIVATION_RELU:
        return v > 0.0f || v != v ? v : 0.0f; /* a NaN stays one */
    case FQ_ACTIVATION_GELU:
        return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
    case FQ_ACTIVATION_GELU_TANH:
        return __fdividef(v, 1.0f + __expf(-1.5957691216057307f * (v + 0.044715f * v * v * v)));
    case FQ_ACTIVATION_SILU:
        return __fdividef(v, 1.0f + __expf(-v));
    default:
        return v;
    }
}

/*
 * The sum of row n of W with some row of X, and of the gate's row n where there is a gate: all but
 * the residual and the rounding.
 */
static __device__ __forceinline__ float finish(const fq_cuda_launch &launch, float sum, float gate,
                                               int n) {
    if (launch.bias)
        sum += load_bias(launch.bias, launch.bias_type, n);
    if (!launch.gate.codes)
        return activate(sum, launch.activation);
    if (launch.gate_bias)
        gate += load_bias(launch.gate_bias, launch.bias_type, n);
    return sum * activate(gate, launch.activation);
}

/*
 * The same for COUNT results side by side, from row n of W on.  Whatever is the same for all of
 * them is asked once: this stands between a block's last product and the next one's first.
 */
template <int COUNT>
static __device__ __forceinline__ void add_bias(const fq_cuda_launch &launch, float (&v)[COUNT],
                                                const void *bias, int n) {
    const int count = launch.w.n - n;

    if (launch.bias_type == FQ_F32) {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            v[i] += i < count ? static_cast<const float *>(bias)[n + i] : 0.0f;
        return;
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const uint16_t bits = i < count ? static_cast<const uint16_t *>(bias)[n + i] : 0;

        v[i] += launch.bias_type == FQ_F16 ? __half2float(__ushort_as_half(bits))
                                           : __uint_as_float((uint32_t)bits << 16);
    }
}

template <int COUNT>
static __device__ __forceinline__ void activate(float (&v)[COUNT], int activation) {
    const auto each = [&](int which) {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            v[i] = activate(v[i], which);
    };

    if (activation == FQ_ACTIVATION_NONE) /* ahead of a table of jumps */
        return;
    switch (activation) {
    case FQ_ACTIVATION_RELU:
        each(FQ_ACTIVATION_RELU);
        break;
    case FQ_ACTIVATION_GELU:
        each(FQ_ACTIVATION_GELU);
        break;
    case FQ_ACTIVATION_GELU_TANH:
        each(FQ_ACTIVATION_GELU_TANH);
        break;
    case FQ_ACTIVATION_SILU:
        each(FQ_ACTIVATION_SILU);
        break;
    default:
        break;
    }
}

/* Sums with their bias become what the gate's sums with theirs make of them. */
template <int COUNT>
static __device__ __forceinline__ void apply_gate(float (&sums)[COUNT], float (&gate)[COUNT],
                                                  int activation) {
    activate(gate, activation);
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        sums[i] *= gate[i];
}

/* Sums become what finish() makes of them. */
template <int COUNT>
static __device__ __forceinline__ void finish(const fq_cuda_launch &launch, float (&sums)[COUNT],
                                              float (&gate)[COUNT], int n) {
    if (launch.bias)
        add_bias(launch, sums, launch.bias, n);
    if (!launch.gate.codes) {
        activate(sums, launch.activation);
        return;
    }
    if (launch.gate_bias)
        add_bias(launch, gate, launch.gate_bias, n);
    apply_gate(sums, gate, launch.activation);
}

#endif
