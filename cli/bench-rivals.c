/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What finequant-bench compares the cpu backend with, in the same run on the
 * same threads: a plain read of as many bytes, which no kernel can beat, and
 * OpenBLAS on the dense fp32 matrix.  Thread i of each keeps to core i: Linux
 * has been seen to leave two threads on one core for seconds, and OpenBLAS's own
 * threads inherit the core of a main thread that OMP_PROC_BIND binds.
 */
#ifdef HAVE_CONFIG_H
#include <config.h>
#endif

#include "bench.h"

#include <dirent.h>
#include <sched.h>
#include <stdlib.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef HAVE_OPENBLAS
#include <cblas.h>
#endif

#define PAGE 4096

/* Eight independent vectors a step, so that the additions never hold up the loads. */
#define READ_BODY(type)                                                                            \
    const type *at = (const type *)from, *end = at + bytes / sizeof(type);                         \
    type sum[8] = {{0}};                                                                           \
    uint64_t total = 0;                                                                            \
                                                                                                   \
    for (; end - at >= 8; at += 8)                                                                 \
        for (int i = 0; i < 8; i++)                                                                \
            sum[i] += at[i];                                                                       \
    for (; at < end; at++)                                                                         \
        sum[0] += *at;                                                                             \
    for (int i = 0; i < 8; i++)                                                                    \
        for (size_t lane = 0; lane < sizeof(type) / 8; lane++)                                     \
            total += sum[i][lane];                                                                 \
    return total;

typedef uint64_t vector16 __attribute__((vector_size(16), aligned(8)));

__attribute__((optimize("O3"))) static uint64_t read_generic(const void *from, size_t bytes) {
    READ_BODY(vector16)
}

#ifdef FQ_CPU_X86
typedef uint64_t vector32 __attribute__((vector_size(32), aligned(8)));
typedef uint64_t vector64 __attribute__((vector_size(64), aligned(8)));

__attribute__((optimize("O3"), target("avx2"))) static uint64_t read_avx2(const void *from,
                                                                          size_t bytes) {
    READ_BODY(vector32)
}

__attribute__((optimize("O3"), target("avx512f"))) static uint64_t read_avx512(const void *from,
                                                                               size_t bytes) {
    READ_BODY(vector64)
}
#endif

static uint64_t read_span(const void *from, size_t bytes) {
#ifdef FQ_CPU_X86
    if (__builtin_cpu_supports("avx512f"))
        return read_avx512(from, bytes);
    if (__builtin_cpu_supports("avx2"))
        return read_avx2(from, bytes);
#endif
    return read_generic(from, bytes);
}

uint64_t bench_read(const void *from, size_t bytes, int threads) {
    size_t share = (bytes / (size_t)threads + PAGE - 1) / PAGE * PAGE;
    uint64_t total = 0;

#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : total)
    for (int i = 0; i < threads; i++) {
        size_t start = (size_t)i * share < bytes ? (size_t)i * share : bytes;
        size_t end = start + share < bytes ? start + share : bytes;

        total += read_span((const char *)from + start, end - start);
    }
    return total;
}

/* The core of thread i: the i-th that this process may use, over again where there are fewer. */
static void pin(pid_t thread, int i, const cpu_set_t *usable) {
    int left = i % CPU_COUNT(usable), core = 0;
    cpu_set_t one;

    while (!CPU_ISSET(core, usable) || left-- > 0)
        core++;
    CPU_ZERO(&one);
    CPU_SET(core, &one);
    sched_setaffinity(thread, sizeof one, &one); /* a wish: figures are worse without, not wrong */
}

/* The threads that exist beside the caller: OpenBLAS's. */
static void pin_others(const cpu_set_t *usable) {
    DIR *tasks = opendir("/proc/self/task");
    int i = 1;

    if (!tasks)
        return;
    for (struct dirent *task; (task = readdir(tasks));) {
        pid_t thread = (pid_t)atoi(task->d_name);

        if (thread > 0 && thread != getpid())
            pin(thread, i++, usable);
    }
    closedir(tasks);
}

int bench_pin_threads(int threads) {
    static cpu_set_t usable;

    if (CPU_COUNT(&usable) == 0) {
        if (sched_getaffinity(0, sizeof usable, &usable) != 0)
            CPU_SET(0, &usable);
        if (bench_has_sgemm()) {
            static float some[256 * 256], product[256 * 256];

            bench_sgemm(256, 256, 256, some, some, product, CPU_COUNT(&usable)); /* makes them */
        }
        pin_others(&usable);
    }
    if (threads == 0)
        threads = CPU_COUNT(&usable);
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    pin(0, omp_get_thread_num(), &usable);
#endif
    return threads;
}

bool bench_has_sgemm(void) {
#ifdef HAVE_OPENBLAS
    return true;
#else
    return false;
#endif
}

void bench_sgemm(int64_t m, int64_t n, int64_t k, const float *x, const float *w, float *y,
                 int threads) {
#ifdef HAVE_OPENBLAS
    openblas_set_num_threads(threads);
    if (m == 1) {
        cblas_sgemv(CblasRowMajor, CblasNoTrans, (blasint)n, (blasint)k, 1, w, (blasint)k, x, 1, 0,
                    y, 1);
        return;
    }
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (blasint)m, (blasint)n, (blasint)k, 1, x,
                (blasint)k, w, (blasint)k, 0, y, (blasint)n);
#else
    (void)m, (void)n, (void)k, (void)x, (void)w, (void)y, (void)threads;
#endif
}
