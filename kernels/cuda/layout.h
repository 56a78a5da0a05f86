/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The prepacked form of a matrix in device memory, shared by the host code that
 * sizes it, the kernels that write it and the kernels that read it.  A change
 * here changes FQ_CUDA_LAYOUT, which an importing process compares.
 *
 * N is padded to strips of 16 rows, K to tiles of 64 columns.  A tile is what
 * one warp feeds to four mma.m16n8k16 as their A operand, one k16 step each:
 *
 *      k →  0 ............ 15 | 16 ........ 31 | 32 ...... 47 | 48 ...... 63
 *   n 0    +-----------------+----------------+--------------+-------------+
 *     :    |     step 0      |     step 1     |    step 2    |   step 3    |
 *   n 15   +-----------------+----------------+--------------+-------------+
 *
 * Of one step, lane L (g = L / 4, t = L % 4) owns eight codes a0..a7:
 *
 *               k = 2t, 2t+1     k = 2t+8, 2t+9
 *     row g        a0, a1            a4, a5
 *     row g+8      a2, a3            a6, a7
 *
 * so that its codes of all four steps lie side by side:
 *
 *   int4  512 bytes   [lane][step] words; code a(2p) is nibble p, a(2p+1) nibble
 *                     p+4: masking with 0x000f000f gives the pair p in place
 *   int8  1024 bytes  [step / 2][lane][step % 2][2] words; bytes a0..a3, a4..a7
 *   int3  384 bytes   two planes.  [lane][step / 2] words with the low two bits, then
 *                     [lane] words with the high bit.  Nibbles as in int4; of a
 *                     nibble the low plane holds two steps, the high plane four
 *
 * The matrix: [strip][tile] codes, then [strip][group][8] pairs of scales
 * {row g, row g+8}, then, with zero points, the same of bytes.  Each of the three
 * parts starts on 256 bytes.  Padding has code 0 and scale 0.
 */
#ifndef FQ_KERNELS_CUDA_LAYOUT_H
#define FQ_KERNELS_CUDA_LAYOUT_H

#include <stdint.h>

#define FQ_CUDA_LAYOUT 1 /* version, see struct fq_weights_handle */

#define FQ_CUDA_STRIP 16 /* rows of a tile */
#define FQ_CUDA_TILE  64 /* columns of a tile */
#define FQ_CUDA_STEP  16 /* columns of one mma */
#define FQ_CUDA_LANES 32

#define FQ_CUDA_TILE_BYTES(bits) (128 * (bits))
#define FQ_CUDA_SCALE_BYTES      32 /* of one strip and group */
#define FQ_CUDA_ZERO_BYTES       16
#define FQ_CUDA_PART_ALIGN       256

/* A prepacked matrix as kernels see it. */
struct fq_cuda_matrix {
    const uint8_t *codes;
    const uint8_t *scales;
    const uint8_t *zeros; /* NULL: symmetric, the zero point is 2^(bits−1) */
    int n, k, bits;
    int strips, tiles;
    int groups;      /* along the padded K */
    int group_steps; /* k16 steps a group; of no use where group_shift ≥ 0 */
    int group_shift; /* group of a step = step >> group_shift; −1: step / group_steps */
    int slots_log2;  /* log2 of the scales a row may need within one tile: 0, 1 or 2 */
    int scale_bf16;
};

#endif
