/* SPDX-License-Identifier: Apache-2.0 */
/* Bias and activation in fp32, the same code for every instruction set.  Pure. */
#include "cpu.h"
#include "half.h"

#include <math.h>

static float gelu_tanh(float v) {
    return 0.5f * v * (1 + tanhf(0.7978845608028654f * (v + 0.044715f * v * v * v)));
}

void fq_cpu_epilogue(const struct fq_gemm *gemm, int64_t column, float *values, int64_t count) {
    if (gemm->bias)
        for (int64_t i = 0; i < count; i++)
            values[i] += fq_load(gemm->bias, gemm->bias_type, (size_t)(column + i));

    switch (gemm->activation) {
    case FQ_ACTIVATION_NONE:
        break;
    case FQ_ACTIVATION_RELU:
        for (int64_t i = 0; i < count; i++)
            values[i] = values[i] > 0 ? values[i] : 0;
        break;
    case FQ_ACTIVATION_GELU:
        for (int64_t i = 0; i < count; i++)
            values[i] = 0.5f * values[i] * (1 + erff(values[i] * 0.7071067811865476f));
        break;
    case FQ_ACTIVATION_GELU_TANH:
        for (int64_t i = 0; i < count; i++)
            values[i] = gelu_tanh(values[i]);
        break;
    case FQ_ACTIVATION_SILU:
        for (int64_t i = 0; i < count; i++)
            values[i] = values[i] / (1 + expf(-values[i]));
        break;
    }
}
