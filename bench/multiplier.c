/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What bounds M = 2 to 4 on a processor with AVX512-VNNI: how many cycles the
 * multiplications alone of 128 weights of int4 take, in registers, with no load
 * of weights, no prefetch and no scale; and with the three operations besides
 * that unpack them.  A cycle is an addition that waits for the one before it.
 *
 *     gcc -O2 -mavx512f -mavx512vnni bench/multiplier.c -o multiplier && ./multiplier
 */
#include <immintrin.h>
#include <stdio.h>
#include <time.h>

#define ROUNDS 20000000

static double now(void) {
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static double cycle(void) {
    long sum = 0;
    double start = now();

    for (int i = 0; i < ROUNDS; i++)
        __asm__ volatile("add $1, %0\n add $1, %0\n add $1, %0\n add $1, %0\n"
                         "add $1, %0\n add $1, %0\n add $1, %0\n add $1, %0"
                         : "+r"(sum));
    return (now() - start) / ROUNDS / 8;
}

/* Cycles that `dots` vpdpbusd (8 to 24) take, each with an accumulator of its own, and the
 * unpacking of a register of int4 where `unpack`. */
static inline __attribute__((always_inline)) double cycles(int dots, int unpack, double cycle) {
    __m512i sum[24], low = _mm512_set1_epi8(3), high = low, words = low;
    const __m512i mask = _mm512_set1_epi8(15), sign = _mm512_set1_epi8(8);
    const int x = 0x01020304;

#pragma GCC unroll 24
    for (int i = 0; i < dots; i++)
        sum[i] = _mm512_setzero_si512();
    double start = now();
    for (int round = 0; round < ROUNDS; round++) {
        if (unpack)
            __asm__ volatile("vmovdqa64 %2, %0\n vpternlogd $0x6a, %4, %3, %0\n"
                             "vpsrld $4, %2, %1\n vpternlogd $0x6a, %4, %3, %1"
                             : "=&v"(low), "=&v"(high)
                             : "v"(words), "v"(mask), "v"(sign));
#pragma GCC unroll 24
        for (int i = 0; i < dots; i++)
            __asm__ volatile("vpdpbusd %2%{1to16%}, %1, %0"
                             : "+v"(sum[i])
                             : "v"(i % 2 ? high : low), "m"(x));
    }
    return (now() - start) / ROUNDS / cycle;
}

static void print(int m, int limbs, double alone, double all) {
    printf("M = %d, %d limbs: %5.2f cycles for 128 weights, %5.2f weights a cycle; unpacked %5.2f, "
           "%5.2f\n",
           m, limbs, alone, 128 / alone, all, 128 / all);
}

int main(void) {
    double one = cycle();

    printf("%.2f GHz\n", 1e-9 / one);
    print(2, 2, cycles(8, 0, one), cycles(8, 1, one));
    print(3, 2, cycles(12, 0, one), cycles(12, 1, one));
    print(4, 2, cycles(16, 0, one), cycles(16, 1, one));
    print(2, 3, cycles(12, 0, one), cycles(12, 1, one));
    print(3, 3, cycles(18, 0, one), cycles(18, 1, one));
    print(4, 3, cycles(24, 0, one), cycles(24, 1, one));
    return 0;
}
