/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From the canonical form to the layout of layout.h, on the device, piece by
 * piece as the loader brings it.
 */
#include "cuda-impl.h"
#include "launch.cuh"
#include "ptx.cuh"

#include <cuda_fp16.h>

#define WARPS          8  /* of a CTA of prepack_codes */
#define GROUPS         32 /* of a CTA of prepack_groups */
#define GROUPS_THREADS 256

static __host__ __device__ unsigned chunks(int count, int each) {
    return (unsigned)((count + each - 1) / each);
}

/*
 * A warp packs a quarter of a tile, or the same one of two.  Lane L (g = L / 4, t = L % 4) reads
 * step t of rows g and g + 8, 16 codes each, sorts them by the lane that owns them (t of layout.h),
 * and the four lanes of a g then exchange what is one another's.
 */
template <int BITS>
constexpr int STEP_WORDS = BITS == 8 ? 4 : 2; /* of a row; 3 bits: one and a half */
template <int BITS> constexpr int OWN_WORDS = BITS == 8 ? 2 : 1; /* of an owner in a step */

/* The words of step `step` from a row's tile, of which `left` bits, perhaps more, are codes of the
 * matrix: zeros for the rest.  3 bits: 8 codes in the lower 24 bits of each. */
template <int BITS>
static __device__ __forceinline__ void load_step(uint32_t (&words)[STEP_WORDS<BITS>],
                                                 const uint32_t *tile, int step, int left) {
    const int first = step * FQ_CUDA_STEP * BITS / 32;

    if (left >= FQ_CUDA_TILE * BITS) {
#pragma unroll
        for (int i = 0; i < STEP_WORDS<BITS>; i++)
            words[i] = tile[first + i];
    } else {
#pragma unroll
        for (int i = 0; i < STEP_WORDS<BITS>; i++) {
            int valid = left - 32 * (first + i);

            words[i] = valid <= 0 ? 0 : tile[first + i];
            if (valid > 0 && valid < 32)
                words[i] &= (1u << valid) - 1;
        }
    }
    if (BITS == 3) { /* 48 bits, of which an odd step's begin in the middle of a word */
        uint64_t codes = ((uint64_t)words[1] << 32 | words[0]) >> (step % 2 * 16);

        words[0] = (uint32_t)codes & 0xffffff;
        words[1] = (uint32_t)(codes >> 24) & 0xffffff;
    }
}

/* Of a step's 8 codes of 3 bits of one row: code 2t at bit 3t of the lower half, 2t + 1 of the
 * upper. */
static __device__ __forceinline__ uint32_t part_by_three(uint32_t codes) {
    /* the middle two of each four change places */
    uint32_t x = (codes & 0xe07e07u) | (codes >> 3 & 0x038038u) | (codes << 3 & 0x1c01c0u);

    return (x & 0x3fu) | (x >> 6 & 0xfc0u) | (x << 10 & 0x3f0000u) | (x << 4 & 0xfc00000u);
}

/* Fields of two words' halves change places: those of `mask` stay in a, those `shift` above in b.
 */
static __device__ __forceinline__ void swap_fields(uint32_t &a, uint32_t &b, uint32_t mask,
                                                   int shift) {
    uint32_t above = mask << shift, was = a;

    a = (a & mask) | (b << shift & above);
    b = (was >> shift & mask) | (b & above);
}

/* A step's codes of two rows, by the lane t that owns them: 8 and 4 bits as they are stored; 3 bits
 * pair p at bit 3p of each half. */
template <int BITS>
static __device__ __forceinline__ void codes_by_owner(uint32_t (&own)[OWN_WORDS<BITS>][4],
                                                      const uint32_t (&row_g)[STEP_WORDS<BITS>],
                                                      const uint32_t (&row_g8)[STEP_WORDS<BITS>]) {
    if constexpr (BITS == 8) {
#pragma unroll
        for (int i = 0; i < 8; i++)
            own[i % 2][i / 2] = prmt(row_g[i % 2 * 2 + i / 4], row_g8[i % 2 * 2 + i / 4],
                                     i / 2 % 2 ? 0x7362 : 0x5140);
    } else if constexpr (BITS == 4) {
#pragma unroll
        for (int t = 0; t < 4; t++) {
            uint32_t pairs = prmt(prmt(row_g[0], row_g8[0], t | (4 + t) << 4),
                                  prmt(row_g[1], row_g8[1], t | (4 + t) << 4), 0x5410);
            uint32_t first = pairs & 0x0f0f0f0fu, second = pairs >> 4 & 0x0f0f0f0fu;

            own[0][t] = prmt(first | first >> 4, second | second >> 4, 0x6420);
        }
    } else {
        uint32_t(&all)[4] = own[0]; /* first by pairs, then field t of pair p to field p of t */

#pragma unroll
        for (int pair = 0; pair < 4; pair++)
            all[pair] = part_by_three((pair % 2 ? row_g8 : row_g)[pair / 2]);
        swap_fields(all[0], all[1], 0x01c701c7u, 3);
        swap_fields(all[2], all[3], 0x01c701c7u, 3);
        swap_fields(all[0], all[2], 0x003f003fu, 6);
        swap_fields(all[1], all[3], 0x003f003fu, 6);
    }
}

/* words[i] of each of four lanes side by side, for the one whose t is i: afterwards words[i] is
 * what the one whose t is i had for this one. */
static __device__ __forceinline__ void exchange(uint32_t (&words)[4], int t) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & bit)
                continue;
            uint32_t got = __shfl_xor_sync(0xffffffffu, t & bit ? words[i] : words[i + bit], bit);

            words[t & bit ? i : i + bit] = got;
        }
    }
}

/* A lane's words from its codes of all four steps: what fragment() in dequant.cuh takes apart. */
static __device__ __forceinline__ void words_of_3(uint32_t (&words)[3],
                                                  const uint32_t (&steps)[FQ_CUDA_STEPS]) {
    words[0] = steps[0] | (steps[1] & 0x00070007u) << 12;
    words[1] = (steps[1] >> 3 & 0x01ff01ffu) | (steps[2] & 0x003f003fu) << 9;
    words[2] = (steps[2] >> 6 & 0x003f003fu) | (steps[3] & 0x01ff01ffu) << 6;
#pragma unroll
    for (int bit = 0; bit < 3; bit++)
        words[bit] |= steps[3] << (6 - bit) & 0x80008000u;
}

/* Tiles of which a warp takes a quarter each: few bytes a warp would leave memory idle. */
template <int BITS> constexpr int WARP_TILES = BITS == 8 ? 1 : 2;
/* Of a CTA, in a strip. */
template <int BITS> constexpr int CTA_TILES = WARPS / FQ_CUDA_QUARTERS *WARP_TILES<BITS>;

/* A quarter of a tile from lanes' codes of rows g and g + 8 to out. */
template <int BITS>
static __device__ __forceinline__ void put_quarter(uint32_t *out,
                                                   const uint32_t (&codes)[2][STEP_WORDS<BITS>]) {
    int lane = threadIdx.x % 32;
    uint32_t own[OWN_WORDS<BITS>][4];

    codes_by_owner<BITS>(own, codes[0], codes[1]);
#pragma unroll
    for (int i = 0; i < OWN_WORDS<BITS>; i++)
        exchange(own[i], lane % 4);
    if constexpr (BITS == 8) {
#pragma unroll
        for (int i = 0; i < 2; i++)
            ((uint4 *)out)[i * 32 + lane] =
                make_uint4(own[0][2 * i], own[1][2 * i], own[0][2 * i + 1], own[1][2 * i + 1]);
    } else if constexpr (BITS == 4) {
        ((uint4 *)out)[lane] = make_uint4(own[0][0], own[0][1], own[0][2], own[0][3]);
    } else {
        uint32_t words[3];

        words_of_3(words, own[0]);
#pragma unroll
        for (int i = 0; i < 3; i++)
            out[i * 32 + lane] = words[i];
    }
}

/* The piece's units are tiles. */
template <int BITS>
static __global__ void __launch_bounds__(WARPS * 32)
    prepack_codes(fq_cuda_matrix matrix, fq_cuda_piece piece, uint32_t *out) {
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    unsigned across = chunks(piece.units, CTA_TILES<BITS>);
    int strip = blockIdx.x / across, quarter = warp % FQ_CUDA_QUARTERS;
    int unit = blockIdx.x % across * CTA_TILES<BITS> + warp / FQ_CUDA_QUARTERS * WARP_TILES<BITS>;
    uint32_t codes[WARP_TILES<BITS>][2][STEP_WORDS<BITS>];

#pragma unroll
    for (int tile = 0; tile < WARP_TILES<BITS>; tile++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int row = strip * FQ_CUDA_STRIP + quarter * FQ_CUDA_QUARTER + g + 8 * i;
            int left = matrix.k - (piece.unit0 + unit + tile) * FQ_CUDA_TILE;

            left = left < FQ_CUDA_TILE ? left : FQ_CUDA_TILE;
            if (row >= piece.rows || unit + tile >= piece.units)
                left = 0;
            load_step<BITS>(codes[tile][i],
                            (const uint32_t *)(piece.data + row * piece.stride) +
                                (unit + tile) * 2 * BITS,
                            t, left * BITS);
        }
    }
    out += (((int64_t)(piece.row0 / FQ_CUDA_STRIP + strip) * matrix.tiles + piece.unit0 + unit) *
                FQ_CUDA_QUARTERS +
            quarter) *
           (FQ_CUDA_QUARTER_BYTES(BITS) / 4);
#pragma unroll
    for (int tile = 0; tile < WARP_TILES<BITS>; tile++)
        if (unit + tile < piece.units)
            put_quarter<BITS>(out + tile * (FQ_CUDA_TILE_BYTES(BITS) / 4), codes[tile]);
}

/* A CTA takes GROUPS units of a strip, row by row, and puts them down unit by unit. */
template <class ELEMENT>
static __global__ void __launch_bounds__(GROUPS_THREADS)
    prepack_groups(fq_cuda_matrix matrix, fq_cuda_piece piece, ELEMENT *out) {
    __shared__ ELEMENT elements[FQ_CUDA_STRIP][GROUPS + 2];
    unsigned across = chunks(piece.units, GROUPS);
    int strip = blockIdx.x / across;
    int row0 = strip * FQ_CUDA_STRIP, unit0 = blockIdx.x % across * GROUPS;
    int rows = min(piece.rows - row0, FQ_CUDA_STRIP), units = min(piece.units - unit0, GROUPS);

#pragma unroll
    for (int i = threadIdx.x; i < FQ_CUDA_STRIP * GROUPS; i += GROUPS_THREADS) {
        int row = i / GROUPS, unit = i % GROUPS;

        if (row < rows && unit < units)
            elements[row][unit] =
                ((const ELEMENT *)(piece.data + (row0 + row) * piece.stride))[unit0 + unit];
    }
    __syncthreads();
    out += ((int64_t)(piece.row0 / FQ_CUDA_STRIP + strip) * matrix.groups + piece.unit0 + unit0) *
           FQ_CUDA_STRIP;
#pragma unroll
    for (int i = threadIdx.x; i < GROUPS * FQ_CUDA_STRIP; i += GROUPS_THREADS) {
        int unit = i / FQ_CUDA_STRIP, at = i % FQ_CUDA_STRIP;
        int row = at / FQ_CUDA_QUARTER * FQ_CUDA_QUARTER + at % 2 * 8 + at / 2 % 8;

        if (row < rows && unit < units)
            out[i] = elements[row][unit];
    }
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

/* CTAs over a piece, each so many of a strip's units. */
static unsigned grid_of(const struct fq_cuda_piece *piece, int units) {
    return chunks(piece->units, units) * chunks(piece->rows, FQ_CUDA_STRIP);
}

cudaError_t fq_cuda_prepack_codes(const struct fq_cuda_matrix *matrix,
                                  const struct fq_cuda_piece *piece, cudaStream_t stream) {
    uint32_t *out = (uint32_t *)matrix->codes;

    switch (matrix->bits) {
    case 8:
        return launch(prepack_codes<8>, grid_of(piece, CTA_TILES<8>), WARPS * 32, 0, stream,
                      *matrix, *piece, out);
    case 4:
        return launch(prepack_codes<4>, grid_of(piece, CTA_TILES<4>), WARPS * 32, 0, stream,
                      *matrix, *piece, out);
    default:
        return launch(prepack_codes<3>, grid_of(piece, CTA_TILES<3>), WARPS * 32, 0, stream,
                      *matrix, *piece, out);
    }
}

cudaError_t fq_cuda_prepack_groups(const struct fq_cuda_matrix *matrix, int bytes,
                                   const struct fq_cuda_piece *piece, cudaStream_t stream) {
    const unsigned grid = grid_of(piece, GROUPS);

    if (bytes == 2)
        return launch(prepack_groups<uint16_t>, grid, GROUPS_THREADS, 0, stream, *matrix, *piece,
                      (uint16_t *)matrix->scales);
    return launch(prepack_groups<uint8_t>, grid, GROUPS_THREADS, 0, stream, *matrix, *piece,
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
