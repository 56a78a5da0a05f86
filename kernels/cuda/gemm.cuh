/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The pipeline that the GEMM kernels for sm_80 and newer are, where Hopper's own do not run: W's
 * tiles and X's columns stream through shared memory by cp.async, W is dequantized in registers and
 * fed to mma.sync as the A operand (swap-AB: a row of W is a row of the mma, a row of X one of its
 * eight columns), sums of a group are scaled into fp32 accumulators.
 *
 *                          XROWS rows of X
 *                      +----------+----------+
 *                      |  warp m0 |  warp m1 |      a warp: RW strips of 16 rows of W
 *        +----------+  +----------+----------+              × NT column tiles of 8 rows of X
 *   W    | warp n0  |  |          |          |
 *  rows  +----------+  +          +          +      a stage: KT tiles of 64 columns
 *        | warp n1  |  |          |          |
 *        +----------+  +----------+----------+
 *          K →
 *
 * grid: x blocks of W's rows, y blocks of X's rows, z slices of K.  With several
 * slices each CTA leaves its sums in launch.partials; the one that arrives last
 * at an output tile adds all of them in the order of the slices.
 *
 * A strip is 16 rows here: a quarter of one of layout.h.  Of a gated pair, even strips
 * are the gate's and odd ones W's, the same rows of both side by side in one warp.
 *
 * The order in which one output is summed depends on the slices alone, not on
 * NT, RW, the warps or X's other rows: batch invariance rests on that.
 */
#ifndef FQ_KERNELS_CUDA_GEMM_CUH
#define FQ_KERNELS_CUDA_GEMM_CUH

#include "cuda-impl.h"
#include "dequant.cuh"
#include "epilogue.cuh"
#include "launch.cuh"

/* A kernel's compile-time shape; ROWS: X and Y by a pointer a row. */
template <int NT_, int RW_, int WN_, int WM_, int KT_, int STAGES_, bool ROWS_> struct tiling {
    static constexpr int NT = NT_, RW = RW_, WN = WN_, WM = WM_, KT = KT_, STAGES = STAGES_;
    static constexpr bool ROWS = ROWS_;
    static constexpr int THREADS = 32 * WN * WM;
    static constexpr int STRIPS = WN * RW;
    static constexpr int XROWS = 8 * NT * WM;
    static constexpr int XCHUNKS = KT * 8;            /* 16-byte pieces of a row of X */
    static constexpr int XSTRIDE = XCHUNKS * 16 + 16; /* odd in 16 bytes: ldmatrix hits all banks */
};

/* Where the parts of a stage lie in shared memory; scales and zeros depend on the matrix. */
template <class S, int BITS> struct stage_layout {
    static constexpr int TILE = FQ_CUDA_QUARTER_BYTES(BITS);
    static constexpr int W = S::XROWS * S::XSTRIDE;
    static constexpr int SCALES = W + S::STRIPS * S::KT * TILE;
    static constexpr int SCALE_BYTES = FQ_CUDA_SCALE_BYTES / FQ_CUDA_QUARTERS;
    static constexpr int ZERO_BYTES = FQ_CUDA_ZERO_BYTES / FQ_CUDA_QUARTERS;
    int slots_log2, zeros, bytes;

    __host__ __device__ explicit stage_layout(const fq_cuda_launch &launch)
        : slots_log2(launch.w.slots_log2) {
        if (launch.gate.codes && launch.gate.slots_log2 > slots_log2)
            slots_log2 = launch.gate.slots_log2;
        zeros = SCALES + (S::STRIPS * S::KT * SCALE_BYTES << slots_log2);
        bytes = zeros + (S::STRIPS * S::KT * ZERO_BYTES << slots_log2);
    }
};

/* Eight elements of a row of X that may be misaligned or end early, by way of registers. */
static __device__ __noinline__ void copy_elements(uint32_t to, const uint16_t *from, int count) {
    uint32_t v[4] = {0, 0, 0, 0};

#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < count)
            v[i / 2] |= (uint32_t)from[i] << (16 * (i & 1));
    sts_128(to, make_uint4(v[0], v[1], v[2], v[3]));
}

template <class S, int BITS, class T> class pipeline {
    static constexpr int XLOADS = (S::XROWS * S::XCHUNKS + S::THREADS - 1) / S::THREADS;
    static constexpr int WCHUNKS = S::KT * FQ_CUDA_QUARTER_BYTES(BITS) / 16; /* of one strip */
    static constexpr int WLOADS = (S::STRIPS * WCHUNKS + S::THREADS - 1) / S::THREADS;

    static_assert(S::STRIPS * S::KT * 4 * 2 <= S::THREADS, "load_groups() has a thread a piece");

    using codes_of = dequantizer<BITS, T, reading::common>;
    using zero_terms = typename codes_of::zero_terms;

    const fq_cuda_launch &launch;
    const stage_layout<S, BITS> layout;
    const uint32_t smem;
    const int tid, lane, warp_n, warp_m;
    const int strip0, m0;     /* of this CTA */
    const int even_bf16;      /* scale_bf16 of even strips */
    int tile_begin, tile_end; /* of this CTA's slice of K */
    const uint16_t
        *x_from[XLOADS]; /* this thread's piece of X at k = 0; anything where x_end is 0 */
    int x_end[XLOADS];   /* K, less where the piece starts in a tile; 0: no such row */
    bool x_slow;         /* some row of this thread is misaligned, or K's end is */
    const uint8_t *w_from[WLOADS]; /* this thread's piece of W at tile 0; NULL: beyond N */
    int group_slot, group_strip;   /* this thread's slot of scales; −1: none */

    float sums[S::RW][S::NT][4];

    static __device__ __forceinline__ int group_of_step(const fq_cuda_matrix &w, int step) {
        return w.group_shift >= 0 ? step >> w.group_shift : step / w.group_steps;
    }

    __device__ __forceinline__ const fq_cuda_matrix &matrix_of(int strip) const {
        return launch.gate.codes && strip % 2 == 0 ? launch.gate : launch.w;
    }

    /* Counted within its matrix. */
    __device__ __forceinline__ int strip_within(int strip) const {
        return launch.gate.codes ? strip / 2 : strip;
    }

    __device__ __forceinline__ bool has_strip(int strip) const {
        return strip_within(strip) < launch.w.strips * FQ_CUDA_QUARTERS;
    }

    __device__ __forceinline__ void load_x(uint32_t stage, int tile) {
        const int k = tile * FQ_CUDA_TILE;

#pragma unroll
        for (int j = 0; j < XLOADS; j++) {
            int index = tid + j * S::THREADS;
            uint32_t to = stage + index / S::XCHUNKS * S::XSTRIDE + index % S::XCHUNKS * 16;

            if (S::XROWS * S::XCHUNKS % S::THREADS && index >= S::XROWS * S::XCHUNKS)
                break;
            if (!x_slow)
                cp_async_zfill(to, k < x_end[j] ? x_from[j] + k : x_from[j], k < x_end[j] ? 16 : 0);
            else
                copy_elements(to, x_from[j] + k, x_end[j] - k);
        }
    }

    __device__ __forceinline__ void load_w(uint32_t stage, int tile) {
#pragma unroll
        for (int j = 0; j < WLOADS; j++) {
            int index = tid + j * S::THREADS;

            if (S::STRIPS * WCHUNKS % S::THREADS && index >= S::STRIPS * WCHUNKS)
                break;
            if (w_from[j] && (S::KT == 1 || tile + index % WCHUNKS / (WCHUNKS / S::KT) < tile_end))
                cp_async_once(stage + layout.W + index * 16,
                              w_from[j] + (int64_t)tile * FQ_CUDA_TILE_BYTES(BITS));
        }
    }

    /* Scales and zero points of a stage: one slot each k16 step, each second one or each tile.  A
     * thread has half of a slot. */
    __device__ __forceinline__ void load_groups(uint32_t stage, int tile) {
        int at = group_slot >> layout.slots_log2; /* [strip][tile of the stage] */
        int of = tile + at % S::KT, within = group_slot - (at << layout.slots_log2), part = tid & 1;

        if (group_slot < 0 || of >= tile_end)
            return;
        const fq_cuda_matrix &w = matrix_of(group_strip);
        int strip = strip_within(group_strip);
        int64_t from = ((int64_t)(strip / FQ_CUDA_QUARTERS) * w.groups +
                        group_of_step(w, of * 4 + (within << (2 - layout.slots_log2)))) *
                           FQ_CUDA_QUARTERS +
                       strip % FQ_CUDA_QUARTERS;
        cp_async_zfill(stage + layout.SCALES + tid * 16,
                       w.scales + from * layout.SCALE_BYTES + part * 16, 16);
        if (w.zeros && part == 0)
            cp_async_zfill(stage + layout.zeros + group_slot * 16,
                           w.zeros + from * layout.ZERO_BYTES, 16);
    }

    /* A symmetric matrix has the same zero point everywhere: it stays in all stages. */
    __device__ __forceinline__ void fill_zeros() {
        constexpr uint32_t all = (1u << (BITS - 1)) * 0x01010101u;

        for (int slot = tid; slot < S::STRIPS * S::KT << layout.slots_log2; slot += S::THREADS) {
            if (matrix_of(strip0 + (slot >> layout.slots_log2) / S::KT).zeros)
                continue;
            for (int i = 0; i < S::STAGES; i++)
                sts_128(smem + i * layout.bytes + layout.zeros + slot * 16,
                        make_uint4(all, all, all, all));
        }
    }

    __device__ __forceinline__ void load_stage(int index, int tile) {
        uint32_t stage = smem + index * layout.bytes;

        load_w(stage, tile);
        load_groups(stage, tile);
        load_x(stage, tile);
    }

    __device__ __forceinline__ zero_terms zeros_of(uint32_t stage, int slot) const {
        return codes_of::unpack_zeros(lds_16(stage + layout.zeros + slot * 16 + (lane >> 2) * 2));
    }

    /* Of strip r of the warp; those of a gated pair may have scales of two types. */
    __device__ __forceinline__ float2 scales_of(uint32_t stage, int slot, int r) const {
        const float2 scale =
            unpack_scales(lds_32(stage + layout.SCALES + slot * 32 + (lane >> 2) * 4),
                          r % 2 == 0 ? even_bf16 : launch.w.scale_bf16);

        return make_float2(scale.x * fragment_factor<BITS, T>, scale.y * fragment_factor<BITS, T>);
    }

    /* FINE: a scale each k16 step, else each second one, which branches would only slow. */
    template <bool FINE> __device__ __forceinline__ void compute_tile(uint32_t stage, int of) {
        const int slots_log2 = layout.slots_log2;
        const uint32_t x =
            stage + (warp_m * S::NT * 8 + (lane & 7)) * S::XSTRIDE + of * 128 + (lane >> 3) * 16;
        lane_codes<BITS> codes[S::RW];

#pragma unroll
        for (int r = 0; r < S::RW; r++)
            codes[r] = load_codes<BITS>(stage + layout.W +
                                        ((warp_n * S::RW + r) * S::KT + of) * layout.TILE +
                                        lane_offset<BITS>(lane));
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t b[S::NT][4];

#pragma unroll
            for (int j = 0; j < S::NT; j++)
                ldmatrix_x4(b[j], x + j * 8 * S::XSTRIDE + half * 64);
#pragma unroll
            for (int r = 0; r < S::RW; r++) {
                int slot = ((warp_n * S::RW + r) * S::KT + of << slots_log2) +
                           (2 * half >> (2 - slots_log2));
                zero_terms zero = zeros_of(stage, slot);
                float2 scale = scales_of(stage, slot, r);
                float part[S::NT][4];
                uint32_t a[4];

                codes_of::fragment(a, codes[r], 2 * half, zero);
#pragma unroll
                for (int j = 0; j < S::NT; j++)
                    T::mma_first(part[j], a, b[j][0], b[j][1]);
                if (FINE) {
                    add_scaled(r, part, scale);
                    zero = zeros_of(stage, slot + 1);
                    scale = scales_of(stage, slot + 1, r);
                }
                codes_of::fragment(a, codes[r], 2 * half + 1, zero);
#pragma unroll
                for (int j = 0; j < S::NT; j++) {
                    if (FINE)
                        T::mma_first(part[j], a, b[j][2], b[j][3]);
                    else
                        T::mma(part[j], a, b[j][2], b[j][3]);
                }
                add_scaled(r, part, scale);
            }
        }
    }

    __device__ __forceinline__ void add_scaled(int r, const float (&part)[S::NT][4], float2 scale) {
#pragma unroll
        for (int j = 0; j < S::NT; j++) {
            sums[r][j][0] = fmaf(part[j][0], scale.x, sums[r][j][0]);
            sums[r][j][1] = fmaf(part[j][1], scale.x, sums[r][j][1]);
            sums[r][j][2] = fmaf(part[j][2], scale.y, sums[r][j][2]);
            sums[r][j][3] = fmaf(part[j][3], scale.y, sums[r][j][3]);
        }
    }

  public:
    __device__ __forceinline__ pipeline(const fq_cuda_launch &l, void *shared)
        : launch(l), layout(l), smem(smem_address(shared)), tid(threadIdx.x), lane(tid & 31),
          warp_n((tid >> 5) % S::WN), warp_m((tid >> 5) / S::WN), strip0(blockIdx.x * S::STRIPS),
          m0(blockIdx.y * S::XROWS), even_bf16(l.gate.codes ? l.gate.scale_bf16 : l.w.scale_bf16) {
        tile_begin = (int)((int64_t)launch.w.tiles * blockIdx.z / gridDim.z);
        tile_end = (int)((int64_t)launch.w.tiles * (blockIdx.z + 1) / gridDim.z);
        x_slow = launch.w.k % 8 != 0;
#pragma unroll
        for (int j = 0; j < XLOADS; j++) {
            int index = tid + j * S::THREADS, m = m0 + index / S::XCHUNKS;
            int start = index % S::XCHUNKS * 8;

            x_from[j] = reinterpret_cast<const uint16_t *>(launch.w.codes);
            x_end[j] = 0;
            if (m < launch.m && index < S::XROWS * S::XCHUNKS) {
                if constexpr (S::ROWS)
                    x_from[j] = static_cast<const uint16_t *>(launch.x_rows[m]);
                else
                    x_from[j] = static_cast<const uint16_t *>(launch.x) + m * launch.x_stride;
                x_slow |= (reinterpret_cast<uintptr_t>(x_from[j]) & 15) != 0;
                x_from[j] += start;
                x_end[j] = launch.w.k - start;
            }
        }
#pragma unroll
        for (int j = 0; j < WLOADS; j++) {
            int index = tid + j * S::THREADS, strip = strip0 + index / WCHUNKS;

            w_from[j] = nullptr;
            if (index < S::STRIPS * WCHUNKS && has_strip(strip)) {
                int within = strip_within(strip), chunk = index % WCHUNKS;

                w_from[j] = matrix_of(strip).codes +
                            ((int64_t)(within / FQ_CUDA_QUARTERS) * launch.w.tiles +
                             chunk / (WCHUNKS / S::KT)) *
                                FQ_CUDA_TILE_BYTES(BITS) +
                            within % FQ_CUDA_QUARTERS * FQ_CUDA_QUARTER_BYTES(BITS) +
                            chunk % (WCHUNKS / S::KT) * 16;
            }
        }
        group_slot = tid >> 1;
        group_strip = strip0 + (group_slot >> layout.slots_log2) / S::KT;
        if (group_slot >= S::STRIPS * S::KT << layout.slots_log2 || !has_strip(group_strip))
            group_slot = -1;
#pragma unroll
        for (int r = 0; r < S::RW; r++)
#pragma unroll
            for (int j = 0; j < S::NT; j++)
                sums[r][j][0] = sums[r][j][1] = sums[r][j][2] = sums[r][j][3] = 0.0f;
    }

    __device__ __forceinline__ void run() {
        fill_zeros();
        if (layout.slots_log2 == 2)
            run_slice<true>();
        else
            run_slice<false>();
    }

    template <bool FINE> __device__ __forceinline__ void run_slice() {
        int stages = (tile_end - tile_begin + S::KT - 1) / S::KT;
        int read = 0, write = S::STAGES - 1;

#pragma unroll
        for (int i = 0; i < S::STAGES - 1; i++) {
            if (i < stages)
                load_stage(i, tile_begin + i * S::KT);
            cp_async_commit();
        }
        for (int i = 0; i < stages; i++) {
            cp_async_wait<S::STAGES - 2>();
            __syncthreads(); /* stage `read` is here for all, stage `write` is done with */
            if (i + S::STAGES - 1 < stages)
                load_stage(write, tile_begin + (i + S::STAGES - 1) * S::KT);
            cp_async_commit();
#pragma unroll
            for (int of = 0; of < S::KT; of++)
                if (S::KT == 1 || tile_begin + i * S::KT + of < tile_end)
                    compute_tile<FINE>(smem + read * layout.bytes, of);
            read = read + 1 == S::STAGES ? 0 : read + 1;
            write = write + 1 == S::STAGES ? 0 : write + 1;
        }
        cp_async_wait<0>();
    }

    /* Adds the slices' sums up, in their order; true for the CTA that then holds the total. */
    __device__ __forceinline__ bool reduce() {
        constexpr int QUADS = S::RW * S::NT;
        __shared__ bool last;
        int block = blockIdx.y * gridDim.x + blockIdx.x;
        float4 *partials = reinterpret_cast<float4 *>(launch.partials) +
                           (int64_t)block * gridDim.z * QUADS * S::THREADS + tid;
        float4 *mine = partials + (int64_t)blockIdx.z * QUADS * S::THREADS;

#pragma unroll
        for (int q = 0; q < QUADS; q++) {
            const float *v = sums[q / S::NT][q % S::NT];

            __stcg(mine + q * S::THREADS, make_float4(v[0], v[1], v[2], v[3]));
        }
        __threadfence();
        __syncthreads();
        if (tid == 0) {
            last = atomicAdd(&launch.counters[block], 1u) == gridDim.z - 1;
            if (last)
                launch.counters[block] = 0; /* for the next launch */
        }
        __syncthreads();
        if (!last)
            return false;
        __threadfence();
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
            float *v = sums[q / S::NT][q % S::NT];

            v[0] = v[1] = v[2] = v[3] = 0.0f;
        }
        for (int slice = 0; slice < (int)gridDim.z; slice++) {
#pragma unroll
            for (int q = 0; q < QUADS; q++) {
                float4 p = __ldcg(partials + ((int64_t)slice * QUADS + q) * S::THREADS);
                float *v = sums[q / S::NT][q % S::NT];

                v[0] += p.x;
                v[1] += p.y;
                v[2] += p.z;
                v[3] += p.w;
            }
        }
        return true;
    }

    __device__ __forceinline__ void store() {
#pragma unroll
        for (int j = 0; j < S::NT; j++) {
#pragma unroll
            for (int odd = 0; odd < 2; odd++) {
                int m = m0 + (warp_m * S::NT + j) * 8 + (lane & 3) * 2 + odd;
                typename T::type *y;
                const typename T::type *residual = nullptr;

                if (m >= launch.m)
                    continue;
                if constexpr (S::ROWS) {
                    y = static_cast<typename T::type *>(launch.y_rows[m]);
                    residual = static_cast<const typename T::type *>(launch.residual_rows[m]);
                } else {
                    y = static_cast<typename T::type *>(launch.y) + m * launch.y_stride;
                    if (launch.residual)
                        residual = static_cast<const typename T::type *>(launch.residual) +
                                   m * launch.residual_stride;
                }
                store_row(y, residual, j, odd);
            }
        }
    }

    /* This thread's results of one row of X: of a gated pair, strip r is the gate's and r + 1 W's.
     */
    __device__ __forceinline__ void store_row(typename T::type *y, const typename T::type *residual,
                                              int j, int odd) {
        const bool gated = launch.gate.codes != nullptr;

#pragma unroll
        for (int r = 0; r < S::RW; r++) {
            if (gated && r % 2 == 1)
                continue;
            int strip = strip_within(strip0 + warp_n * S::RW + r);
#pragma unroll
            for (int below = 0; below < 2; below++) {
                int n = strip * FQ_CUDA_QUARTER + (lane >> 2) + below * 8, i = odd + 2 * below;
                float own = sums[r][j][i], other = sums[(r + 1) % S::RW][j][i];

                if (n >= launch.w.n)
                    continue;
                float v = finish(launch, gated ? other : own, own, n);
                if (residual)
                    v += T::widen(residual[n]);
                y[n] = T::round(v);
            }
        }
    }
};

template <class S, int BITS, class T>
__global__ void __launch_bounds__(S::THREADS)
    gemm_kernel(const __grid_constant__ fq_cuda_launch args) {
    extern __shared__ __align__(128) uint8_t shared[];
    pipeline<S, BITS, T> p(args, shared);

    p.run();
    if (gridDim.z == 1 || p.reduce())
        p.store();
}

template <class S, int BITS, class T>
static cudaError_t queue_gemm(const fq_cuda_launch &args, cudaStream_t stream) {
    int strips = args.w.strips * FQ_CUDA_QUARTERS * (args.gate.codes ? 2 : 1);
    dim3 grid((strips + S::STRIPS - 1) / S::STRIPS, (args.m + S::XROWS - 1) / S::XROWS,
              args.splits);
    size_t shared = (size_t)S::STAGES * stage_layout<S, BITS>(args).bytes;

    return launch(gemm_kernel<S, BITS, T>, grid, S::THREADS, shared, stream, args);
}

/* Raises the limit of dynamic shared memory to what the most demanding matrix needs. */
template <class S, int BITS, class T> static cudaError_t prepare_gemm() {
    fq_cuda_launch worst = {};

    worst.w.slots_log2 = 2;
    return cudaFuncSetAttribute(gemm_kernel<S, BITS, T>,
                                cudaFuncAttributeMaxDynamicSharedMemorySize,
                                S::STAGES * stage_layout<S, BITS>(worst).bytes);
}

#endif
