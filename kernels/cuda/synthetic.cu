/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Pieces of synthetic matrices in the canonical form, made where the loader
 * would have put a checkpoint's: prepacking takes them from there, so nothing
 * here knows the prepacked layout.
 */
#include "cuda-impl.h"
#include "launch.cuh"

#include <cuda_fp16.h>

#define COLUMNS 32 /* a thread's: their codes fill `bits` words */

/* One thread COLUMNS columns of a row; the padding of a row's last word is 0. */
static __global__ void make_codes(fq_cuda_synthetic from, fq_cuda_piece piece) {
    int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    int chunks = piece.units * FQ_CUDA_TILE / COLUMNS, bits = from.bits;
    int row = (int)(at / chunks), chunk = (int)(at % chunks);

    if (row >= piece.rows)
        return;
    int column0 = piece.unit0 * FQ_CUDA_TILE + chunk * COLUMNS;
    int words = (int)(piece.stride / 4) - chunk * bits;
    uint32_t *to = (uint32_t *)(piece.data + row * piece.stride) + chunk * bits;
    uint64_t buffer = 0, hash = 0;
    int filled = 0, word = 0;

    for (int i = 0; i < COLUMNS; i++) {
        int column = column0 + i;

        if (i % FQ_SYNTHETIC_BLOCK == 0)
            hash = fq_synthetic_hash(from.seed, FQ_SYNTHETIC_CODES, piece.row0 + row,
                                     column / FQ_SYNTHETIC_BLOCK);
        if (column < from.k)
            buffer |= (uint64_t)fq_synthetic_code(hash, i % FQ_SYNTHETIC_BLOCK, bits) << filled;
        filled += bits;
        if (filled >= 32) {
            if (word < words)
                to[word] = (uint32_t)buffer;
            word++;
            buffer >>= 32;
            filled -= 32;
        }
    }
}

/* One thread a scale (`bytes` 2) or a zero point (1). */
static __global__ void make_groups(fq_cuda_synthetic from, int bytes, fq_cuda_piece piece) {
    int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    int row = (int)(at / piece.units), unit = (int)(at % piece.units);

    if (row >= piece.rows)
        return;
    uint8_t *to = (uint8_t *)piece.data + row * piece.stride;
    int n = piece.row0 + row, group = piece.unit0 + unit;

    if (bytes == 1) {
        to[unit] = fq_synthetic_zero(from.seed, n, group, from.bits);
        return;
    }
    float scale = fq_synthetic_scale(from.seed, n, group, from.base);
    ((uint16_t *)to)[unit] = from.scale_bf16 ? (uint16_t)(__float_as_uint(scale) >> 16)
                                             : __half_as_ushort(__float2half_rn(scale));
}

static unsigned blocks_for(int64_t threads) {
    return (unsigned)((threads + 255) / 256);
}

cudaError_t fq_cuda_synthetic_codes(const struct fq_cuda_synthetic *from,
                                    const struct fq_cuda_piece *piece, cudaStream_t stream) {
    int64_t threads = (int64_t)piece->rows * piece->units * (FQ_CUDA_TILE / COLUMNS);

    return launch(make_codes, dim3(blocks_for(threads)), 256, 0, stream, *from, *piece);
}

cudaError_t fq_cuda_synthetic_groups(const struct fq_cuda_synthetic *from, int bytes,
                                     const struct fq_cuda_piece *piece, cudaStream_t stream) {
    int64_t threads = (int64_t)piece->rows * piece->units;

    return launch(make_groups, dim3(blocks_for(threads)), 256, 0, stream, *from, bytes, *piece);
}
