/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From the canonical form to the layout of layout.h, on the device, piece by
 * piece as the loader brings it; and the gathering of rows that lie in host
 * memory.
 */
#include "cuda-impl.h"
#include "launch.cuh"

/* Code `column` (counted from the piece's first) of one of the piece's rows. */
static __device__ __forceinline__ uint32_t code_at(const uint32_t *row, int column, int bits) {
    int bit = column * bits, shift = bit & 31;
    uint32_t code = row[bit >> 5] >> shift;

    if (shift + bits > 32)
        code |= row[(bit >> 5) + 1] << (32 - shift);
    return code & ((1u << bits) - 1);
}

/* Puts code a(i) of a step into a lane's words: what fragment() in dequant.cuh takes apart. */
static __device__ __forceinline__ void put_code(uint32_t (&words)[8], int bits, int step, int i,
                                                uint32_t code) {
    int nibble = 4 * ((i >> 1) + 4 * (i & 1));

    if (bits == 8) {
        words[2 * step + (i >> 2)] |= code << (8 * (i & 3));
    } else if (bits == 4) {
        words[step] |= code << nibble;
    } else {
        words[step >> 1] |= (code & 3) << (nibble + 2 * (step & 1));
        words[2] |= (code >> 2) << (nibble + step);
    }
}

/* One warp a tile; the piece's units are tiles. */
static __global__ void prepack_codes(fq_cuda_matrix matrix, fq_cuda_piece piece, uint32_t *out) {
    int64_t at = (int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, bits = matrix.bits;
    int strip = (int)(at / piece.units), unit = (int)(at % piece.units);

    if (strip >= (piece.rows + 15) / 16)
        return;

    uint32_t words[8] = {};
#pragma unroll
    for (int step = 0; step < 4; step++) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int row = strip * 16 + g + (i & 2 ? 8 : 0);
            int column = unit * 64 + step * 16 + 2 * t + (i & 1) + (i & 4 ? 8 : 0);

            if (row < piece.rows && piece.unit0 * 64 + column < matrix.k)
                put_code(
                    words, bits, step, i,
                    code_at((const uint32_t *)(piece.data + row * piece.stride), column, bits));
        }
    }

    uint32_t *tile =
        out + ((int64_t)(piece.row0 / 16 + strip) * matrix.tiles + piece.unit0 + unit) *
                  (FQ_CUDA_TILE_BYTES(bits) / 4);
    if (bits == 8) {
        ((uint4 *)tile)[lane] = make_uint4(words[0], words[1], words[2], words[3]);
        ((uint4 *)tile)[32 + lane] = make_uint4(words[4], words[5], words[6], words[7]);
    } else if (bits == 4) {
        ((uint4 *)tile)[lane] = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
        ((uint2 *)tile)[lane] = make_uint2(words[0], words[1]);
        tile[64 + lane] = words[2];
    }
}

/* One thread an element of the piece, rounded up to whole strips. */
template <class ELEMENT>
static __global__ void prepack_groups(fq_cuda_matrix matrix, fq_cuda_piece piece, ELEMENT *out) {
    int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    int row = (int)(at / piece.units), unit = (int)(at % piece.units);

    if (row >= piece.rows)
        return;
    int strip = (piece.row0 + row) / 16, within = row % 16;

    out[(((int64_t)strip * matrix.groups + piece.unit0 + unit) * 8 + within % 8) * 2 + within / 8] =
        ((const ELEMENT *)(piece.data + row * piece.stride))[unit];
}

static unsigned blocks_for(int64_t threads) {
    return (unsigned)((threads + 255) / 256);
}

cudaError_t fq_cuda_prepack_codes(const struct fq_cuda_matrix *matrix,
                                  const struct fq_cuda_piece *piece, cudaStream_t stream) {
    int64_t tiles = (int64_t)((piece->rows + 15) / 16) * piece->units;

    return launch(prepack_codes, dim3(blocks_for(tiles * 32)), 256, 0, stream, *matrix, *piece,
                  (uint32_t *)matrix->codes);
}

cudaError_t fq_cuda_prepack_groups(const struct fq_cuda_matrix *matrix, int bytes,
                                   const struct fq_cuda_piece *piece, cudaStream_t stream) {
    unsigned blocks = blocks_for((int64_t)piece->rows * piece->units);

    if (bytes == 2)
        return launch(prepack_groups<uint16_t>, blocks, 256, 0, stream, *matrix, *piece,
                      (uint16_t *)matrix->scales);
    return launch(prepack_groups<uint8_t>, blocks, 256, 0, stream, *matrix, *piece,
                  (uint8_t *)matrix->zeros);
}

cudaError_t fq_cuda_prepack_version(int *version) {
    struct cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, prepack_codes);

    if (error == cudaSuccess)
        *version = attributes.binaryVersion;
    return error;
}

/* A row a block row; eight elements a thread and turn, in one access where the row is aligned. */
static __global__ void gather_rows(const __grid_constant__ fq_cuda_gather gather) {
    const uint16_t *from = (const uint16_t *)gather.rows[blockIdx.y];
    uint16_t *to = gather.to + blockIdx.y * gather.stride;
    bool aligned = ((uintptr_t)from & 15) == 0;

    for (int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 8; i < gather.count;
         i += (int64_t)gridDim.x * blockDim.x * 8) {
        if (aligned && i + 8 <= gather.count) {
            *(uint4 *)(to + i) = *(const uint4 *)(from + i);
        } else {
            for (int64_t j = i; j < i + 8 && j < gather.count; j++)
                to[j] = from[j];
        }
    }
}

cudaError_t fq_cuda_gather_rows(const struct fq_cuda_gather *gather, cudaStream_t stream) {
    unsigned blocks = blocks_for((gather->count + 7) / 8);

    return launch(gather_rows, dim3(blocks < 64 ? blocks : 64, gather->m), 256, 0, stream, *gather);
}
