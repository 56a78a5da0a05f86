/* SPDX-License-Identifier: Apache-2.0 */
/*
 * wgmma.m64nNk16 with its first operand in registers: D[64][N] += A[64][16] ·
 * B[16][N] over a warpgroup, fp32 sums.  A is the weights, in the fragment order
 * of layout.h; B is a tile of X in shared memory (wgmma_tile() in ptx-hopper.cuh).
 * Thread L of warp w holds, for column block j, d[4j..4j+3]: rows 16w + L/4 and
 * 8 further down, columns 8j + 2·(L % 4) and one more:
 *
 *     d[4j] d[4j+1]   row g          d[4j+2] d[4j+3]   row g+8
 *
 * The operand lists are as long as N is wide, so a macro writes each size twice,
 * for fp16 and for bf16.
 */
#ifndef FQ_KERNELS_CUDA_WGMMA_CUH
#define FQ_KERNELS_CUDA_WGMMA_CUH

#include "dequant.cuh"

#define FQ_D4(i)   "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FQ_D16(i)  FQ_D4(i), FQ_D4(i + 4), FQ_D4(i + 8), FQ_D4(i + 12)
#define FQ_D32(i)  FQ_D16(i), FQ_D16(i + 16)
#define FQ_D64(i)  FQ_D32(i), FQ_D32(i + 32)
#define FQ_D128(i) FQ_D64(i), FQ_D64(i + 64)

/* TYPE: "f16" or "bf16"; LIST: the N/2 registers of D; A0..: the operands after them; last, D
 * itself. */
#define FQ_WGMMA_ASM(N, TYPE, LIST, A0, A1, A2, A3, B, P, ...)                                     \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #P ", 0;\n"                              \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" LIST "}, "   \
                 "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", add, 1, 1, 0;\n}"             \
                 : __VA_ARGS__                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tile), "r"(add))

/* wgmma<N>::mma<T>(d, a, tile, add): d = (add ? d : 0) + A · B, queued. */
template <int N> struct wgmma;

#define FQ_WGMMA(N, LIST, A0, A1, A2, A3, B, P, ...)                                               \
    template <> struct wgmma<N> {                                                                  \
        template <class T>                                                                         \
        static __device__ __forceinline__ void mma(float (&d)[N / 2], const uint32_t (&a)[4],      \
                                                   uint64_t tile, int add) {                       \
            if constexpr (T::is_f16)                                                               \
                FQ_WGMMA_ASM(N, "f16", LIST, A0, A1, A2, A3, B, P, __VA_ARGS__);                   \
            else                                                                                   \
                FQ_WGMMA_ASM(N, "bf16", LIST, A0, A1, A2, A3, B, P, __VA_ARGS__);                  \
        }                                                                                          \
    }

#define FQ_R4 "%0, %1, %2, %3"
#define FQ_R8                                                                                      \
    FQ_R4                                                                                          \
    ", %4, %5, %6, %7"
#define FQ_R16                                                                                     \
    FQ_R8                                                                                          \
    ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FQ_R24                                                                                     \
    FQ_R16                                                                                         \
    ", %16, %17, %18, %19, %20, %21, %22, %23"
#define FQ_R32                                                                                     \
    FQ_R16                                                                                         \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, "                \
    "%31"
#define FQ_R48                                                                                     \
    FQ_R32                                                                                         \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, "                \
    "%47"
#define FQ_R64                                                                                     \
    FQ_R32                                                                                         \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, "                \
    "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "                  \
    "%62, %63"
#define FQ_R80                                                                                     \
    FQ_R64                                                                                         \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, "                \
    "%79"
#define FQ_R96                                                                                     \
    FQ_R64                                                                                         \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, "                \
    "%79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, "                  \
    "%94, %95"
#define FQ_R112                                                                                    \
    FQ_R96                                                                                         \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, "                 \
    "%109, %110, %111"
#define FQ_R128                                                                                    \
    FQ_R64                                                                                         \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, "                \
    "%79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, "                  \
    "%94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, "               \
    "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, "               \
    "%121, %122, %123, %124, %125, %126, %127"

FQ_WGMMA(8, FQ_R4, 4, 5, 6, 7, 8, 9, FQ_D4(0));
FQ_WGMMA(16, FQ_R8, 8, 9, 10, 11, 12, 13, FQ_D4(0), FQ_D4(4));
FQ_WGMMA(32, FQ_R16, 16, 17, 18, 19, 20, 21, FQ_D16(0));
FQ_WGMMA(48, FQ_R24, 24, 25, 26, 27, 28, 29, FQ_D16(0), FQ_D4(16), FQ_D4(20));
FQ_WGMMA(64, FQ_R32, 32, 33, 34, 35, 36, 37, FQ_D32(0));
FQ_WGMMA(96, FQ_R48, 48, 49, 50, 51, 52, 53, FQ_D32(0), FQ_D16(32));
FQ_WGMMA(128, FQ_R64, 64, 65, 66, 67, 68, 69, FQ_D64(0));
FQ_WGMMA(160, FQ_R80, 80, 81, 82, 83, 84, 85, FQ_D64(0), FQ_D16(64));
FQ_WGMMA(192, FQ_R96, 96, 97, 98, 99, 100, 101, FQ_D64(0), FQ_D32(64));
FQ_WGMMA(224, FQ_R112, 112, 113, 114, 115, 116, 117, FQ_D64(0), FQ_D32(64), FQ_D16(96));
FQ_WGMMA(256, FQ_R128, 128, 129, 130, 131, 132, 133, FQ_D128(0));

#undef FQ_WGMMA
#undef FQ_WGMMA_ASM

#endif
