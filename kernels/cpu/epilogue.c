/* SPDX-License-Identifier: Apache-2.0 */
/* Bias, activation, gate and residual in fp32, the same code for every instruction set.  Pure. */
#include "cpu.h"
#include "half.h"

#include <math.h>

static float gelu_tanh(float v) {
    return 0.5f * v * (1 + tanhf(0.7978845608028654f * (v + 0.044715f * v * v * v)));
}

static void add(const void *terms, enum fq_dtype type, int64_t column, float *values,
                int64_t count) {
    if (terms)
        for (int64_t i = 0; i < count; i++)
            values[i] += fq_load(terms, type, (size_t)(column + i));
}

static void activate(enum fq_activation activation, float *values, int64_t count) {
    switch (activation) {
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

void fq_cpu_epilogue(const struct fq_gemm *gemm, int64_t m, int64_t column, float *values,
                     float *gate, int64_t count) {
    add(gemm->bias, gemm->bias_type, column, values, count);
    if (gate) {
        add(gemm->gate_bias, gemm->bias_type, column, gate, count);
        activate(gemm->activation, gate, count);
        for (int64_t i = 0; i < count; i++)
            values[i] *= gate[i];
    } else {
        activate(gemm->activation, values, count);
    }
    add(fq_gemm_residual_row(gemm, m), gemm->type, column, values, count);
}
