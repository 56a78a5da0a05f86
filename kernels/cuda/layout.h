/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The prepacked form of a matrix in device memory, shared by the host code that
 * sizes it, the kernels that write it and the kernels that read it.  A change
 * here changes FQ_CUDA_LAYOUT, which an importing process compares.
 *
 * N is padded to strips of 64 rows, K to tiles of 64 columns.  A tile of a strip
 * is what a warpgroup feeds to four wgmma.m64nNk16 as their register operand;
 * each of its four quarters, 16 rows, is what a warp feeds to four
 * mma.m16n8k16, one k16 step each:
 *
 *      k →  0 ............ 15 | 16 ........ 31 | 32 ...... 47 | 48 ...... 63
 *   n 0    +-----------------+----------------+--------------+-------------+
 *     :    |     step 0      |     step 1     |    step 2    |   step 3    |  quarter 0
 *   n 15   +-----------------+----------------+--------------+-------------+
 *     :                                                                       quarters 1 to 3
 *
 * Of one step, lane L (g = L / 4, t = L % 4) owns eight codes a0..a7, in four pairs:
 *
 *               k = 2t, 2t+1     k = 2t+8, 2t+9
 *     row g        a0, a1            a4, a5
 *     row g+8      a2, a3            a6, a7
 *
 * so that its codes of all four steps lie side by side.  The halves of a word hold
 * the two codes of a pair at the same place, whence one mask takes both:
 *
 *   int4  512 bytes a quarter   [lane][step] words; pair p is nibble p of each half
 *   int8  1024 bytes            [step / 2][lane][step % 2][2] words: pairs 0 and 1, 2 and 3;
 *                               pair p is byte p % 2 of each half
 *   int3  384 bytes             [3][lane] words.  The 16 pairs of the four steps in
 *                               order: five to a word, at bits 0, 3, 6, 9 and 12 of each
 *                               half; the sixteenth has bit 15 of each of the three
 *
 * The matrix: [strip][tile][quarter] codes, then [strip][group][quarter][8] pairs of
 * scales {row g, row g+8}, then, with zero points, the same of bytes, then one
 * struct fq_cuda_meta.  Each part starts on 256 bytes.  Padding has code 0 and scale 0.
 */
#ifndef FQ_KERNELS_CUDA_LAYOUT_H
#define FQ_KERNELS_CUDA_LAYOUT_H

#include <stdint.h>

#define FQ_CUDA_LAYOUT 3 /* version, see struct fq_weights_handle */

#define FQ_CUDA_STRIP    64 /* rows of a tile */
#define FQ_CUDA_QUARTER  16 /* rows of a quarter */
#define FQ_CUDA_QUARTERS 4
#define FQ_CUDA_TILE     64 /* columns of a tile */
#define FQ_CUDA_STEP     16 /* columns of one mma */
#define FQ_CUDA_STEPS    4  /* steps of a tile */
#define FQ_CUDA_LANES    32

#define FQ_CUDA_QUARTER_BYTES(bits) (128 * (bits))
#define FQ_CUDA_TILE_BYTES(bits)    (FQ_CUDA_QUARTERS * FQ_CUDA_QUARTER_BYTES(bits))
#define FQ_CUDA_SCALE_BYTES         128 /* of one strip and group */
#define FQ_CUDA_ZERO_BYTES          64
#define FQ_CUDA_PART_ALIGN          256

/* What is known of a matrix only once its scales are there. */
struct fq_cuda_meta {
    /* The largest |scale|, as the bits of a float: they order as the numbers do. */
    uint32_t largest_scale;
};

/* A prepacked matrix as kernels see it. */
struct fq_cuda_matrix {
    const uint8_t *codes;
    const uint8_t *scales;
    const uint8_t *zeros; /* NULL: symmetric, the zero point is 2^(bits−1) */
    const struct fq_cuda_meta *meta;
    int n, k, bits;
    int strips, tiles;
    int groups;             /* along the padded K */
    int group_steps;        /* k16 steps a group; all of K, where that is one group */
    int group_shift;        /* group of a step = step >> group_shift; −1: step / group_steps */
    uint32_t group_inverse; /* 2^31 / group_steps, rounded up; 0 where all of K is one group */
    int slots_log2;         /* log2 of the scales a row may need within one tile: 0, 1 or 2 */
    int scale_bf16;
};

#endif
