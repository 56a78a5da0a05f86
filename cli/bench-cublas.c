/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuBLAS as finequant-bench uses it: one function, found at run time, so that
 * neither the build nor the program needs the library.  The few declarations
 * below are cuBLAS's C interface as of versions 12 and 13.
 */
#include "bench-cuda.h"

#include <dlfcn.h>
#include <library_types.h>
#include <stdio.h>
#include <stdlib.h>

#define OP_NONE        0            /* CUBLAS_OP_N */
#define OP_TRANSPOSE   1            /* CUBLAS_OP_T */
#define COMPUTE_F32    68           /* CUBLAS_COMPUTE_32F */
#define ALGORITHM_AUTO (-1)         /* CUBLAS_GEMM_DEFAULT: cuBLAS's own heuristic */
#define WORKSPACE      (32ul << 20) /* bytes, what NVIDIA recommends for Hopper; needed in graphs */

typedef struct cublasContext *handle_t;

struct bench_cublas {
    void *library;
    handle_t handle;
    void *workspace;
    int (*destroy)(handle_t handle);
    int (*gemm)(handle_t handle, int op_a, int op_b, int m, int n, int k, const void *alpha,
                const void *a, cudaDataType a_type, int lda, const void *b, cudaDataType b_type,
                int ldb, const void *beta, void *c, cudaDataType c_type, int ldc, int compute,
                int algorithm);
};

static const char *const names[] = {"libcublas.so.13", "libcublas.so.12"};

/* dlsym's result into a function pointer, which ISO C cannot cast. */
static int find(void *library, const char *symbol, void *pointer, struct fq_error *err) {
    void *found = dlsym(library, symbol);

    if (!found)
        return fq_fail(err, FQ_UNAVAILABLE, "this cuBLAS has no %s", symbol);
    memcpy(pointer, &found, sizeof found);
    return 0;
}

static int check(int cublas_status, const char *what, struct fq_error *err) {
    return cublas_status == 0
               ? 0
               : fq_fail(err, FQ_DEVICE, "%s: cuBLAS status %d", what, cublas_status);
}

void bench_cublas_free(struct bench_cublas *cublas) {
    if (!cublas)
        return;
    if (cublas->handle)
        (void)cublas->destroy(cublas->handle);
    (void)cudaFree(cublas->workspace);
    dlclose(cublas->library);
    free(cublas);
}

static int set_up(struct bench_cublas *cublas, cudaStream_t stream, char *name,
                  struct fq_error *err) {
    int (*create)(handle_t *), (*set_stream)(handle_t, cudaStream_t);
    int (*set_workspace)(handle_t, void *, size_t), (*get_version)(handle_t, int *);
    int version = 0;
    const struct {
        const char *symbol;
        void *pointer;
    } symbols[] = {
        {"cublasCreate_v2", &create},          {"cublasDestroy_v2", &cublas->destroy},
        {"cublasSetStream_v2", &set_stream},   {"cublasSetWorkspace_v2", &set_workspace},
        {"cublasGetVersion_v2", &get_version}, {"cublasGemmEx", &cublas->gemm},
    };
    int status = 0;

    for (size_t i = 0; i < sizeof symbols / sizeof *symbols && status == 0; i++)
        status = find(cublas->library, symbols[i].symbol, symbols[i].pointer, err);
    if (status == 0)
        status = check(create(&cublas->handle), "cublasCreate", err);
    if (status == 0)
        status = check(set_stream(cublas->handle, stream), "cublasSetStream", err);
    if (status == 0)
        status = bench_cuda_check(cudaMalloc(&cublas->workspace, WORKSPACE),
                                  "allocate cuBLAS's workspace", err);
    if (status == 0)
        status = check(set_workspace(cublas->handle, cublas->workspace, WORKSPACE),
                       "cublasSetWorkspace", err);
    if (status == 0)
        status = check(get_version(cublas->handle, &version), "cublasGetVersion", err);
    if (status == 0)
        snprintf(name, 64, "cuBLAS %d.%d.%d", version / 10000, version / 100 % 100, version % 100);
    return status;
}

int bench_cublas_new(const char *path, cudaStream_t stream, struct bench_cublas **out, char *name,
                     struct fq_error *err) {
    struct bench_cublas *cublas = calloc(1, sizeof *cublas);

    *out = NULL;
    if (!cublas)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for cuBLAS's description");
    if (path)
        cublas->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    for (size_t i = 0; i < sizeof names / sizeof *names && !path && !cublas->library; i++)
        cublas->library = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
    if (!cublas->library) {
        free(cublas);
        if (path)
            return fq_fail(err, FQ_UNAVAILABLE, "--cublas: %s", dlerror());
        snprintf(name, 64, "no %s or %s", names[0], names[1]);
        return 0;
    }
    int status = set_up(cublas, stream, name, err);
    if (status)
        bench_cublas_free(cublas);
    else
        *out = cublas;
    return status;
}

int bench_cublas_gemm(struct bench_cublas *cublas, enum fq_dtype dtype, int64_t m, int64_t n,
                      int64_t k, const void *x, const void *w, void *y, struct fq_error *err) {
    cudaDataType type = dtype == FQ_BF16 ? CUDA_R_16BF : CUDA_R_16F;
    const float one = 1, zero = 0;

    /* cuBLAS counts by columns: its Yᵀ[n][m] is W[n][k] · X[m][k]ᵀ, both read as [k][...]. */
    return check(cublas->gemm(cublas->handle, OP_TRANSPOSE, OP_NONE, (int)n, (int)m, (int)k, &one,
                              w, type, (int)k, x, type, (int)k, &zero, y, type, (int)n, COMPUTE_F32,
                              ALGORITHM_AUTO),
                 "cublasGemmEx", err);
}
