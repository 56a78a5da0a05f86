/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sizes for each way in which plan.c deals a prefill out, on the 66 workers of an H100 or H200:
 * blocks of every shape, whole and in parts.  The conformance test runs them where the kernels are
 * Hopper's, and test-plan.c holds each of them to what it is here for, so that they follow when the
 * plan's times change.
 */
#ifndef FQ_KERNELS_CUDA_TEST_SIZES_H
#define FQ_KERNELS_CUDA_TEST_SIZES_H

#include "backend.h"

/* What is wanted beside products and, perhaps, a bias: PLAIN nothing, to rows of Y that a copy
 * engine can store; FINISHED, of one matrix, an activation and a residual in Y's place; ANY of all.
 */
enum test_results {
    TEST_ANY,
    TEST_PLAIN,
    TEST_FINISHED
};

struct test_size {
    int64_t n, k, m;
    int bits;
    enum fq_dtype type; /* 0: any; FQ_BF16: scales are, too, and there are no zero points */
    enum test_results results;
};

/* Blocks of a prefill: WHOLE one a worker at most, SEVERAL more; SHARED, in parts, by all workers;
 * FEW, in three or four parts, a worker to each. */
enum test_dealing {
    TEST_WHOLE,
    TEST_SEVERAL,
    TEST_SHARED,
    TEST_FEW
};

static const struct prefill_size {
    struct test_size size;
    int rows, strips; /* of X and W in a block, if there is no gate */
    enum test_dealing dealing;
} prefill_sizes[] = {
    {{8504, 520, 90, 4, FQ_BF16, TEST_ANY}, 96, 4, TEST_WHOLE},
    {{17000, 520, 90, 8, FQ_BF16, TEST_ANY}, 96, 6, TEST_WHOLE},
    {{8504, 520, 120, 8, FQ_BF16, TEST_ANY}, 128, 4, TEST_WHOLE},
    {{17000, 520, 120, 3, FQ_BF16, TEST_ANY}, 128, 6, TEST_WHOLE},
    {{8504, 520, 283, 4, FQ_BF16, TEST_ANY}, 160, 6, TEST_WHOLE},
    {{14000, 520, 190, 8, FQ_BF16, TEST_ANY}, 192, 4, TEST_WHOLE},
    {{14000, 520, 220, 3, FQ_BF16, TEST_ANY}, 224, 4, TEST_WHOLE},
    {{6464, 1500, 500, 4, FQ_BF16, TEST_ANY}, 256, 4, TEST_WHOLE},
    {{17003, 400, 90, 4, FQ_F16, TEST_FINISHED}, 96, 6, TEST_WHOLE},
    {{17000, 400, 117, 8, FQ_F16, TEST_FINISHED}, 128, 6, TEST_WHOLE},
    {{8500, 520, 283, 3, FQ_BF16, TEST_FINISHED}, 160, 6, TEST_WHOLE},
    {{14000, 400, 220, 4, FQ_F16, TEST_FINISHED}, 224, 4, TEST_WHOLE},
    /* blocks of one tile of K, of a few, and of more than a ring */
    {{26000, 64, 300, 8, FQ_F16, TEST_PLAIN}, 160, 6, TEST_SEVERAL},
    {{19000, 64, 335, 8, FQ_F16, TEST_PLAIN}, 192, 4, TEST_SEVERAL},
    {{19000, 64, 397, 4, FQ_F16, TEST_PLAIN}, 224, 4, TEST_SEVERAL},
    {{23000, 64, 490, 3, FQ_F16, TEST_PLAIN}, 256, 4, TEST_SEVERAL},
    {{25504, 400, 66, 3, FQ_F16, TEST_PLAIN}, 96, 4, TEST_SEVERAL},
    {{17000, 400, 190, 4, FQ_F16, TEST_PLAIN}, 96, 6, TEST_SEVERAL},
    {{13000, 200, 600, 4, FQ_F16, TEST_PLAIN}, 128, 4, TEST_SEVERAL},
    {{17000, 400, 221, 8, FQ_F16, TEST_PLAIN}, 128, 6, TEST_SEVERAL},
    {{19000, 200, 335, 4, FQ_F16, TEST_PLAIN}, 192, 4, TEST_SEVERAL},
    {{19000, 200, 397, 3, FQ_F16, TEST_PLAIN}, 224, 4, TEST_SEVERAL},
    {{19000, 200, 459, 8, FQ_F16, TEST_PLAIN}, 256, 4, TEST_SEVERAL},
    {{13000, 520, 407, 8, FQ_BF16, TEST_PLAIN}, 224, 4, TEST_SEVERAL},
    {{13000, 520, 600, 4, FQ_F16, TEST_PLAIN}, 128, 4, TEST_SEVERAL},
    /* the first one's rows are no multiple of 16 bytes: not for a copy engine after all */
    {{25500, 800, 66, 4, FQ_F16, TEST_PLAIN}, 96, 4, TEST_SHARED},
    {{25504, 800, 66, 4, FQ_F16, TEST_PLAIN}, 96, 4, TEST_SHARED},
    {{25504, 1200, 66, 8, FQ_F16, TEST_PLAIN}, 96, 6, TEST_SHARED},
    {{25504, 800, 97, 4, FQ_F16, TEST_PLAIN}, 128, 4, TEST_SHARED},
    {{26000, 1200, 97, 3, FQ_F16, TEST_PLAIN}, 128, 6, TEST_SHARED},
    {{17000, 800, 283, 3, FQ_F16, TEST_PLAIN}, 160, 6, TEST_SHARED},
    {{17000, 800, 283, 4, FQ_F16, TEST_FINISHED}, 160, 6, TEST_SHARED},
    {{8504, 800, 345, 8, FQ_F16, TEST_PLAIN}, 192, 4, TEST_SHARED},
    {{8504, 800, 407, 8, FQ_F16, TEST_PLAIN}, 224, 4, TEST_SHARED},
    {{8504, 800, 469, 4, FQ_F16, TEST_PLAIN}, 256, 4, TEST_SHARED},
    {{2000, 1200, 66, 4, FQ_F16, TEST_PLAIN}, 96, 4, TEST_FEW},
    {{3000, 2400, 97, 8, FQ_BF16, TEST_ANY}, 96, 6, TEST_FEW},
    {{4504, 800, 97, 3, FQ_F16, TEST_PLAIN}, 128, 4, TEST_FEW},
    {{6000, 2000, 97, 4, FQ_F16, TEST_PLAIN}, 128, 6, TEST_FEW},
    {{3000, 2800, 283, 8, FQ_F16, TEST_PLAIN}, 160, 6, TEST_FEW},
    {{4504, 2400, 159, 4, FQ_F16, TEST_PLAIN}, 192, 4, TEST_FEW},
    {{4504, 2000, 221, 4, FQ_F16, TEST_PLAIN}, 224, 4, TEST_FEW},
    {{4504, 2800, 252, 4, FQ_BF16, TEST_ANY}, 256, 4, TEST_FEW},
};

#endif
