/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The quantizer's inner loops, compiled once an instruction set (quantize-kernel.c)
 * and chosen at run time.  All take float32 in blocks of 16, which a caller pads
 * with zeros: a zero weight has the code of zero and no error, whatever the scale.
 *
 * Sums are formed in 16 lanes and never contracted, whatever the width of the
 * vectors, so that a checkpoint does not depend on the processor that wrote it.
 * Internal to model/; pure functions, any thread.
 */
#ifndef FQ_MODEL_QUANTIZE_KERNEL_H
#define FQ_MODEL_QUANTIZE_KERNEL_H

#include <stddef.h>
#include <stdint.h>

#define FQ_QUANTIZE_BLOCK 16

struct fq_quantize_kernels {
    const char *name;
    /* fp16 and bf16 to float32; any alignment, any count. */
    void (*widen_f16)(const void *from, size_t count, float *to);
    void (*widen_bf16)(const void *from, size_t count, float *to);
    /* For each block the bits of its largest magnitude, as an integer: they order like the
     * magnitudes, and from 0x7f800000 on something is not finite.  Also the sum of squares. */
    double (*magnitudes)(const float *weights, size_t blocks, uint32_t *out);
    /* Smallest and largest weight of all the blocks. */
    void (*bounds)(const float *weights, size_t blocks, float *low, float *high);
    /* For each of COUNT inverse scales, a multiple of 4, with q = clamp(round(w · inverse), low,
     * high): Σ w·q and Σ q². */
    void (*correlate)(const float *weights, size_t blocks, const float *inverses, size_t count,
                      float low, float high, float *wq, float *qq);
    /* Σ (w − s·q)², q as in correlate but for the quotient, which is w / s: exact in its ties. */
    double (*error)(const float *weights, size_t blocks, float scale, float low, float high);
    /* The same, and the codes q − low. */
    double (*round)(const float *weights, size_t blocks, float scale, float low, float high,
                    uint8_t *codes);
    /* Codes of 3 or 4 bits to a dense stream, lowest bits first; a whole number of 32 codes. */
    void (*pack3)(const uint8_t *codes, size_t count, uint8_t *out);
    void (*pack4)(const uint8_t *codes, size_t count, uint8_t *out);
};

extern const struct fq_quantize_kernels fq_quantize_generic, fq_quantize_avx2, fq_quantize_avx512;

/* The best set of this processor; FINEQUANT_CPU_KERNELS names a lesser one, as for the cpu
 * backend.  Never NULL. */
const struct fq_quantize_kernels *fq_quantize_kernels(void);

#endif
