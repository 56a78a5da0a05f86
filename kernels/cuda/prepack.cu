/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From the canonical form to the layout of layout.h, on the device, piece by
 * piece as the loader brings it.
 */
#include "cuda-impl.h"
#include "launch.cuh"

#include <cuda_fp16.h>

/* Code `column` (counted from the piece's first) of one of the piece's rows. */
template <int BITS>
static __device__ __forceinline__ uint32_t code_at(const uint32_t *row, int column) {
    int bit = column * BITS, shift = bit & 31;
    uint32_t code = row[bit >> 5] >> shift;

    if (32 % BITS && shift + BITS > 32)
        code |= row[(bit >> 5) + 1] << (32 - shift);
    return code & ((1u << BITS) - 1);
}

/* Puts code a(i) of a step into a lane's words: what fragment() in dequant.cuh takes apart. */
template <int BITS>
static __device__ __forceinline__ void put_code(uint32_t (&words)[BITS], int step, int i,
                                                uint32_t code) {
    int pair = i >> 1, half = 16 * (i & 1);

    if (BITS == 8) {
        words[2 * step + pair / 2] |= code << (half + 8 * (pair % 2));
    } else if (BITS == 4) {
        words[step] |= code << (half + 4 * pair);
    } else if (step * 4 + pair < 15) {
        words[(step * 4 + pair) / 5] |= code << (half + 3 * ((step * 4 + pair) % 5));
    } else {
#pragma unroll
        for (int bit = 0; bit < 3; bit++)
            words[bit] |= (code >> bit & 1) << (half + 15);
    }
}

/* One warp a quarter of a tile; the piece's units are tiles. */
template <int BITS>
static __global__ void prepack_codes(fq_cuda_matrix matrix, fq_cuda_piece piece, uint32_t *out) {
    int64_t at = (int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int quarter = (int)(at % FQ_CUDA_QUARTERS);
    int unit = (int)(at / FQ_CUDA_QUARTERS % piece.units);
    int strip = (int)(at / FQ_CUDA_QUARTERS / piece.units);

    if (strip >= (piece.rows + FQ_CUDA_STRIP - 1) / FQ_CUDA_STRIP)
        return;

    uint32_t words[BITS] = {};
#pragma unroll
    for (int step = 0; step < FQ_CUDA_STEPS; step++) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int row = strip * FQ_CUDA_STRIP + quarter * FQ_CUDA_QUARTER + g + (i & 2 ? 8 : 0);
            int column =
                unit * FQ_CUDA_TILE + step * FQ_CUDA_STEP + 2 * t + (i & 1) + (i & 4 ? 8 : 0);

            if (row < piece.rows && piece.unit0 * FQ_CUDA_TILE + column < matrix.k)
                put_code<BITS>(
                    words, step, i,
                    code_at<BITS>((const uint32_t *)(piece.data + row * piece.stride), column));
        }
    }

    out += (((int64_t)(piece.row0 / FQ_CUDA_STRIP + strip) * matrix.tiles + piece.unit0 + unit) *
                FQ_CUDA_QUARTERS +
            quarter) *
           (FQ_CUDA_QUARTER_BYTES(BITS) / 4);
    if constexpr (BITS == 3) {
        for (int i = 0; i < 3; i++)
            out[i * 32 + lane] = words[i];
    } else {
#pragma unroll
        for (int i = 0; i < BITS; i += 4)
            ((uint4 *)out)[i * 8 + lane] =
                make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    }
}

/* One thread an element of the piece. */
template <class ELEMENT>
static __global__ void prepack_groups(fq_cuda_matrix matrix, fq_cuda_piece piece, ELEMENT *out) {
    int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    int row = (int)(at / piece.units), unit = (int)(at % piece.units);

    if (row >= piece.rows)
        return;
    int strip = (piece.row0 + row) / FQ_CUDA_STRIP, within = row % FQ_CUDA_STRIP;
    int at_quarter = within / FQ_CUDA_QUARTER * FQ_CUDA_QUARTER;
    int pair = within % 8, second = within / 8 % 2;

    out[((int64_t)strip * matrix.groups + piece.unit0 + unit) * FQ_CUDA_STRIP + at_quarter +
        pair * 2 + second] = ((const ELEMENT *)(piece.data + row * piece.stride))[unit];
}

/* The largest of all packed scales.  meta is zero before. */
static __global__ void find_largest_scale(fq_cuda_matrix matrix, fq_cuda_meta *meta) {
    const uint16_t *scales = (const uint16_t *)matrix.scales;
    int64_t count = (int64_t)matrix.strips * matrix.groups * FQ_CUDA_STRIP;
    float largest = 0.0f;

    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (int64_t)gridDim.x * blockDim.x) {
        float scale = matrix.scale_bf16 ? __uint_as_float((uint32_t)scales[i] << 16)
                                        : __half2float(__ushort_as_half(scales[i]));

        largest = fmaxf(largest, fabsf(scale)); /* a NaN loses */
    }
    for (int lanes = 16; lanes > 0; lanes /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
    if (threadIdx.x % 32 == 0)
        atomicMax(&meta->largest_scale, __float_as_uint(largest));
}

static unsigned blocks_for(int64_t threads) {
    return (unsigned)((threads + 255) / 256);
}

cudaError_t fq_cuda_prepack_codes(const struct fq_cuda_matrix *matrix,
                                  const struct fq_cuda_piece *piece, cudaStream_t stream) {
    int64_t strips = (piece->rows + FQ_CUDA_STRIP - 1) / FQ_CUDA_STRIP;
    unsigned blocks = blocks_for(strips * piece->units * FQ_CUDA_QUARTERS * 32);
    uint32_t *out = (uint32_t *)matrix->codes;

    switch (matrix->bits) {
    case 8:
        return launch(prepack_codes<8>, blocks, 256, 0, stream, *matrix, *piece, out);
    case 4:
        return launch(prepack_codes<4>, blocks, 256, 0, stream, *matrix, *piece, out);
    default:
        return launch(prepack_codes<3>, blocks, 256, 0, stream, *matrix, *piece, out);
    }
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

cudaError_t fq_cuda_prepack_finish(const struct fq_cuda_matrix *matrix, cudaStream_t stream) {
    return launch(find_largest_scale, 64, 256, 0, stream, *matrix, (fq_cuda_meta *)matrix->meta);
}

cudaError_t fq_cuda_prepack_version(int *version) {
    struct cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, prepack_codes<4>);

    if (error == cudaSuccess)
        *version = attributes.binaryVersion;
    return error;
}
