/* SPDX-License-Identifier: Apache-2.0 */
/* The kernels of floors.h. */
#include "floors.h"

#include "cuda/hopper.cuh"

#define GROUPS  FQ_CUDA_DECODE_GROUPS
#define THREADS (128 * GROUPS)
#define RING    4 /* tiles of codes that a warpgroup goes round */
#define ROUNDS  2000

/* Bytes of shared memory: X, up to 16 rows of two tiles, or a tile of up to 64 rows; each
 * warpgroup's codes; scales. */
#define X_PITCH      (2 * 128 + 16) /* of rows, as in hopper-decode-cta.cuh */
#define X_BYTES      (64 * 128)
#define CODES_BYTES  (RING * FQ_CUDA_TILE_BYTES(8))
#define SCALES_BYTES (RING * FQ_CUDA_SCALE_BYTES)
#define SHARED       (1024 + X_BYTES + GROUPS * CODES_BYTES + SCALES_BYTES)

template <int N, int BITS, class T, bool ALL>
__global__ void __launch_bounds__(THREADS, 1) step(int64_t *cycles, float *sink, int rounds) {
#ifdef FQ_HOPPER_CODE
    constexpr bool DIRECT = N <= FQ_CUDA_DIRECT_ROWS;
    static_assert(FQ_CUDA_DIRECT_ROWS * X_PITCH <= X_BYTES);
    extern __shared__ uint8_t shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const uint32_t x = (smem_address(shared) + 1023) / 1024 * 1024;
    const uint32_t codes = x + X_BYTES + threadIdx.x / 128 * CODES_BYTES +
                           warp * FQ_CUDA_QUARTER_BYTES(BITS) + lane_offset<BITS>(lane);
    const uint32_t scales = x + X_BYTES + GROUPS * CODES_BYTES + warp * 32 + lane / 4 * 4;
    float sums[N / 2] = {}, parts[2][N / 2];
    uint32_t a[2][FQ_CUDA_STEPS][4];
    int64_t start;

    for (uint32_t i = threadIdx.x * 16; i < SHARED - 1024; i += THREADS * 16)
        sts_128(x + i, make_uint4(0x10325476u * (i + 1), 0x3c003c00u, i, 0x2c002c00u));
    for (int t = 0; t < 2; t++) {
        for (int j = 0; j < N / 2; j++)
            parts[t][j] = sink[j];
        for (int j = 0; j < FQ_CUDA_STEPS * 4; j++)
            a[t][j / 4][j % 4] = __float_as_uint(sink[j]);
    }
    asm volatile("fence.proxy.async;" ::: "memory");
    __syncthreads();

    const auto dequantize = [&](int t, int tile) {
        using codes_of = dequantizer<BITS, T, decode_reading(BITS, N)>;
        const lane_codes<BITS> c = load_codes<BITS>(codes + tile * FQ_CUDA_TILE_BYTES(BITS));

#pragma unroll
        for (int s = 0; s < FQ_CUDA_STEPS; s++)
            codes_of::fragment(a[t][s], c, s, codes_of::middle_zeros());
    };
    const auto multiply = [&](int t) {
        if constexpr (DIRECT) {
            uint32_t two[N / 8][4]; /* steps of X */

#pragma unroll
            for (int s = 0; s < FQ_CUDA_STEPS; s++) {
#pragma unroll
                for (int j = 0; j < N / 8; j++) {
                    if (s % 2 == 0)
                        ldmatrix_x4(two[j], x + (j * 8 + lane % 8) * X_PITCH + lane / 8 * 16 +
                                                t * 128 + s * 32);
                    float(&part)[4] = reinterpret_cast<float(&)[4]>(parts[t][4 * j]);

                    if (s == 0)
                        T::mma_first(part, a[t][s], two[j][s % 2 * 2], two[j][s % 2 * 2 + 1]);
                    else
                        T::mma(part, a[t][s], two[j][s % 2 * 2], two[j][s % 2 * 2 + 1]);
                }
            }
        } else {
#pragma unroll
            for (int s = 0; s < FQ_CUDA_STEPS; s++)
                settle(a[t][s]);
            wgmma_fence();
#pragma unroll
            for (int s = 0; s < FQ_CUDA_STEPS; s++)
                wgmma<N>::template mma<T>(parts[t], a[t][s],
                                          wgmma_descriptor(wgmma_tile(x) + s * WGMMA_STEP), s > 0);
            wgmma_commit();
        }
    };
    const auto add = [&](int t, int tile) {
        if (!DIRECT)
            settle(parts[t]);
        if (ALL) {
            const float2 scale =
                unpack_scales(lds_32(scales + tile * FQ_CUDA_SCALE_BYTES), !T::is_f16);

#pragma unroll
            for (int j = 0; j < N / 2; j++)
                sums[j] = fmaf(parts[t][j], j & 2 ? scale.y : scale.x, sums[j]);
        } else { /* a use of it, or it would be left out */
#pragma unroll
            for (int j = 0; j < N / 2; j += N / 2 - 1)
                sums[j] += parts[t][j];
        }
    };

    start = clock64();
#pragma unroll 1
    for (int i = 0; i < rounds; i++) { /* two tiles, as decode_summer has them */
        const int tile = i * 2 % RING;

        if (DIRECT) {
#pragma unroll
            for (int t = 0; t < 2; t++)
                if (ALL)
                    dequantize(t, tile + t);
#pragma unroll
            for (int t = 0; t < 2; t++)
                multiply(t);
#pragma unroll
            for (int t = 0; t < 2; t++)
                add(t, tile + t);
            continue;
        }
        multiply(0);
        if (ALL)
            dequantize(1, tile + 1);
        multiply(1);
        wgmma_wait<1>();
        add(0, tile);
        if (ALL)
            dequantize(0, tile);
        wgmma_wait<0>();
        add(1, tile + 1);
    }
    __syncthreads();
    if (threadIdx.x == 0)
        *cycles = clock64() - start;
    for (int j = 0; j < N / 2; j++)
        sink[threadIdx.x * (N / 2) + j] = sums[j];
#endif
}

template <int BITS, class T, bool ALL> static auto choose_rows(int rows) {
    switch (rows) {
    case 8:
        return step<8, BITS, T, ALL>;
    case 16:
        return step<16, BITS, T, ALL>;
    case 32:
        return step<32, BITS, T, ALL>;
    default:
        return step<64, BITS, T, ALL>;
    }
}

template <int BITS, class T> static auto choose_parts(const fq_floor &floor) {
    return floor.products_only ? choose_rows<BITS, T, false>(floor.rows)
                               : choose_rows<BITS, T, true>(floor.rows);
}

template <class T> static auto choose_bits(const fq_floor &floor) {
    return floor.bits == 8   ? choose_parts<8, T>(floor)
           : floor.bits == 4 ? choose_parts<4, T>(floor)
                             : choose_parts<3, T>(floor);
}

int fq_floor_measure(const fq_floor *floor, double *cycles, const char **error) {
    const auto kernel = floor->bf16 ? choose_bits<bf16>(*floor) : choose_bits<f16>(*floor);
    int64_t *counted = nullptr;
    float *sink = nullptr;
    cudaError_t status = cudaMallocManaged(&counted, sizeof *counted);

    if (status == cudaSuccess)
        status = cudaMalloc(&sink, THREADS * 64 * sizeof *sink);
    if (status == cudaSuccess)
        status = cudaMemset(sink, 0, THREADS * 64 * sizeof *sink);
    if (status == cudaSuccess)
        status = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                      cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED);
    for (int i = 0; i < 2 && status == cudaSuccess; i++) { /* the first one warms up */
        *counted = 0;
        status = launch(kernel, dim3(1), THREADS, SHARED, nullptr, counted, sink, ROUNDS);
        if (status == cudaSuccess)
            status = cudaDeviceSynchronize();
    }
    if (status == cudaSuccess && *counted == 0) /* the kernel is empty: no code for sm_90a */
        status = cudaErrorNoKernelImageForDevice;
    if (status == cudaSuccess)
        *cycles = (double)*counted / (2.0 * ROUNDS * GROUPS);
    *error = cudaGetErrorString(status);
    (void)cudaFree(sink);
    (void)cudaFree(counted);
    return status;
}
