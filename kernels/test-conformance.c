/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What every backend must do, whatever it is made of: results within the
 * documented bounds of float64, nothing written outside of Y, nothing read that
 * matters outside of X, and rows whose bits depend on their own inputs alone.
 *
 *     test-conformance            every backend of this build that opens, and
 *                                 every instruction set of the cpu backend
 *     test-conformance cuda       that one; exits 77 where it has no device
 *
 * The product of all parameters is too large: every combination of bits, group
 * size, scale type and zero points is run FINEQUANT_TEST_ROUNDS times with the
 * other parameters drawn from a generator seeded with FINEQUANT_TEST_SEED.  A
 * failure prints the seed and the case (test-case.h).
 */
#include "test-case.h"

#include <inttypes.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define COUNT(array) (sizeof(array) / sizeof *(array))
#define TARGETS_MAX  16

struct target {
    const char *backend;
    const char *kernels; /* FINEQUANT_CPU_KERNELS, or NULL */
    char label[32];
};

static uint64_t seed = 1;
static unsigned rounds = 3;

/* ---- The properties ---------------------------------------------------------------------- */

#define PICK(array) ((array)[random_below(COUNT(array))])

/* What is being checked: a copy, since a failed check leaves its stack frame by longjmp. */
static struct shape current;
static bool checking;

static void begin(const struct shape *shape) {
    current = *shape;
    checking = true;
}

static void check_shape(struct fq_backend *backend, const struct shape *shape) {
    struct instance instance;
    struct plane y;

    begin(shape);
    instance_init(&instance, backend, shape);
    instance_init_y(&instance, &y, shape->y_gap);
    instance_run(&instance, &y);
    assert_only_rows_written(&y);
    instance_check(&instance, &y);
    plane_fini(&y);
    instance_fini(&instance);
    checking = false;
}

static const int all_bits[] = {8, 4, 3};
static const int64_t all_groups[] = {16, 32, 64, 128, 256, 48, 0 /* per channel */};
static const enum fq_dtype scale_types[] = {FQ_F16, FQ_BF16};

static struct fq_device_info open_target(const struct target *target, int threads,
                                         struct fq_backend **backend) {
    struct fq_backend_options options = {.threads = threads};
    struct fq_device_info info;
    struct fq_error err;

    if (target->kernels)
        setenv("FINEQUANT_CPU_KERNELS", target->kernels, 1);
    must(fq_backend_new(target->backend, &options, backend, &err), &err);
    if (target->kernels)
        unsetenv("FINEQUANT_CPU_KERNELS");
    must(fq_backend_info(*backend, &info, &err), &err);
    random_state = seed;
    return info;
}

static int begin_test(void **context) {
    (void)context;
    checking = false;
    return 0;
}

static int end_test(void **context) {
    (void)context;
    if (checking)
        shape_print(seed, &current);
    return 0;
}

/* A gate with groups and scales of its own, and a residual: each in half of the cases. */
static void draw_epilogue(struct shape *shape) {
    shape->gate_scale_type = PICK(scale_types);
    shape->gate_group = random_below(2) ? PICK(all_groups) : -1;
    shape->gate_zeros = random_below(2);
    shape->gate_bias = random_below(2);
    shape->residual = random_below(2)   ? RESIDUAL_NONE
                      : random_below(2) ? RESIDUAL_APART
                                        : RESIDUAL_IN_PLACE;
    if (shape->gate_group == 0 || shape->gate_group > shape->k)
        shape->gate_group = shape->k;
    if (shape->gate_group < 0)
        shape->gate_group = 0;
}

static void draw(struct shape *shape, const struct fq_device_info *info) {
    static const int64_t ns[] = {1, 5, 64, 130, 200}, ks[] = {1, 15, 16, 100, 256, 300, 1000};
    static const int64_t ms[] = {1, 2, 3, 4, 5, 6, 7, 8, 16, 33, 64, 65, 129};
    static const enum fq_dtype types[] = {FQ_F16, FQ_BF16, FQ_F32};
    static const enum fq_dtype bias_types[] = {0, FQ_F16, FQ_BF16, FQ_F32};
    static const int64_t gaps[] = {0, 1, 8, 37};

    shape->n = PICK(ns);
    shape->k = PICK(ks);
    shape->m = PICK(ms);
    shape->type = types[random_below(info->f32_activations ? 3 : 2)];
    shape->bias_type = PICK(bias_types);
    shape->outliers = random_below(2);
    shape->row_pointers = shape->m <= FQ_DECODE_ROWS && random_below(2);
    shape->x_gap = PICK(gaps);
    shape->y_gap = PICK(gaps);
    shape->x_aligned = random_below(2);
    shape->y_aligned = random_below(2);
    shape->activation = (enum fq_activation)random_below(FQ_ACTIVATION_COUNT);
    shape->kind = info->device_memory && random_below(3) ? FQ_MEMORY_DEVICE : FQ_MEMORY_HOST;
    if (shape->group == 0 || shape->group > shape->k)
        shape->group = shape->k;
    draw_epilogue(shape);
}

static void stays_within_the_bounds_of_float64(void **context) {
    struct fq_backend *backend;
    struct fq_device_info info = open_target(*context, 0, &backend);

    for (unsigned round = 0; round < rounds; round++)
        for (size_t i = 0; i < COUNT(all_bits) * COUNT(all_groups) * 4; i++) {
            struct shape shape = {.zeros = i % 2,
                                  .scale_type = scale_types[i / 2 % 2],
                                  .bits = all_bits[i / 4 % COUNT(all_bits)],
                                  .group = all_groups[i / 4 / COUNT(all_bits)]};

            draw(&shape, &info);
            check_shape(backend, &shape);
        }
    fq_backend_free(backend);
}

/* Sizes beyond every tile, pass and panel of the implementations. */
static void stays_within_the_bounds_on_larger_matrices(void **context) {
    static const struct {
        int64_t n, k, m;
        int bits;
        bool on_device;     /* gives all multiprocessors of a GPU something to do */
        bool on_hopper;     /* likewise, in forms that its kernels alone have */
        bool on_host;       /* X and Y are in host memory */
        enum fq_dtype type; /* 0: any; FQ_BF16: scales are, too, and there are no zero points */
        bool plain;         /* nothing but products and a bias, to where a copy engine can go */
        bool finished;      /* one matrix, with an activation, and a residual in Y's place */
    } sizes[] = {
        {.n = 513, .k = 1500, .m = 20, .bits = 8},
        {.n = 513, .k = 1500, .m = 20, .bits = 4},
        {.n = 513, .k = 1500, .m = 20, .bits = 3},
        {.n = 77, .k = 1111, .m = 500, .bits = 8},
        {.n = 77, .k = 1111, .m = 500, .bits = 4},
        {.n = 77, .k = 1111, .m = 500, .bits = 3},
        {8464, 520, 90, 4, .on_device = true},
        {8464, 520, 120, 8, .on_device = true},
        {8464, 520, 190, 4, .on_device = true},
        {8464, 520, 250, 8, .on_device = true},
        {8464, 520, 190, 3, .on_device = true},
        /* blocks of each shape that plan.c has, whole ones */
        {17000, 520, 90, 8, .on_hopper = true, .type = FQ_BF16},
        {17000, 520, 120, 3, .on_hopper = true, .type = FQ_BF16},
        {8504, 520, 283, 4, .on_hopper = true, .type = FQ_BF16},
        {14000, 520, 190, 8, .on_hopper = true, .type = FQ_BF16},
        {14000, 520, 220, 3, .on_hopper = true, .type = FQ_BF16},
        {6464, 1500, 500, 4, .on_hopper = true, .type = FQ_BF16},
        {17003, 400, 90, 4, .on_hopper = true, .type = FQ_F16, .finished = true},
        {17000, 400, 117, 8, .on_hopper = true, .type = FQ_F16, .finished = true},
        {8500, 520, 283, 3, .on_hopper = true, .type = FQ_BF16, .finished = true},
        {14000, 400, 220, 4, .on_hopper = true, .type = FQ_F16, .finished = true},
        /* several of them a worker, of one tile of K, of a few, and of more than a ring */
        {26000, 64, 300, 8, .on_hopper = true, .type = FQ_F16, .plain = true},
        {19000, 64, 335, 8, .on_hopper = true, .type = FQ_F16, .plain = true},
        {19000, 64, 397, 4, .on_hopper = true, .type = FQ_F16, .plain = true},
        {23000, 64, 490, 3, .on_hopper = true, .type = FQ_F16, .plain = true},
        {17000, 400, 190, 4, .on_hopper = true, .type = FQ_F16, .plain = true},
        {13000, 200, 600, 4, .on_hopper = true, .type = FQ_F16, .plain = true},
        {19000, 200, 335, 4, .on_hopper = true, .type = FQ_F16, .plain = true},
        {19000, 200, 397, 3, .on_hopper = true, .type = FQ_F16, .plain = true},
        {19000, 200, 459, 8, .on_hopper = true, .type = FQ_F16, .plain = true},
        {13000, 520, 407, 8, .on_hopper = true, .type = FQ_BF16, .plain = true},
        {13000, 520, 600, 4, .on_hopper = true, .type = FQ_F16, .plain = true},
        /* blocks of each shape in parts, shared by all workers; N is no multiple of 8 in one */
        {25500, 800, 66, 4, .on_hopper = true, .type = FQ_F16, .plain = true},
        {25504, 800, 66, 4, .on_hopper = true, .type = FQ_F16, .plain = true},
        {25504, 1200, 66, 8, .on_hopper = true, .type = FQ_F16, .plain = true},
        {25504, 800, 97, 4, .on_hopper = true, .type = FQ_F16, .plain = true},
        {26000, 1200, 97, 3, .on_hopper = true, .type = FQ_F16, .plain = true},
        {17000, 800, 283, 3, .on_hopper = true, .type = FQ_F16, .plain = true},
        {17000, 800, 283, 4, .on_hopper = true, .type = FQ_F16, .finished = true},
        {8504, 800, 345, 8, .on_hopper = true, .type = FQ_F16, .plain = true},
        {8504, 800, 407, 8, .on_hopper = true, .type = FQ_F16, .plain = true},
        {8504, 800, 469, 4, .on_hopper = true, .type = FQ_F16, .plain = true},
        /* and few of each, in three or four parts */
        {2000, 1200, 66, 4, .on_hopper = true, .type = FQ_F16, .plain = true},
        {3000, 2400, 97, 8, .on_hopper = true, .type = FQ_BF16},
        {4504, 800, 97, 3, .on_hopper = true, .type = FQ_F16, .plain = true},
        {6000, 2000, 97, 4, .on_hopper = true, .type = FQ_F16, .plain = true},
        {3000, 2800, 283, 8, .on_hopper = true, .type = FQ_F16, .plain = true},
        {4504, 2400, 159, 4, .on_hopper = true, .type = FQ_F16, .plain = true},
        {4504, 2000, 221, 4, .on_hopper = true, .type = FQ_F16, .plain = true},
        {4504, 2800, 252, 4, .on_hopper = true, .type = FQ_BF16},
        /* two launches, the second one of few rows, and of more */
        {15750, 2000, 257, 3, .on_hopper = true, .type = FQ_BF16},
        {33500, 2000, 276, 4, .on_hopper = true, .type = FQ_F16},
        /* rows of the host, two chunks of them, the second one of few rows */
        {140000, 64, 148, 8, .on_hopper = true, .on_host = true, .type = FQ_F16},
    };
    struct fq_backend *backend;
    struct fq_device_info info = open_target(*context, 0, &backend);

    for (size_t i = 0; i < COUNT(sizes); i++) {
        struct shape shape = {.bits = sizes[i].bits,
                              .scale_type = sizes[i].type == FQ_BF16 ? FQ_BF16 : scale_types[i % 2],
                              .group = i % 2 ? 64 : 128,
                              .zeros = i % 2 && sizes[i].type != FQ_BF16};

        if ((sizes[i].on_device && !info.device_memory) ||
            (sizes[i].on_hopper && strcmp(info.kernels, "sm_90a") != 0))
            continue;
        draw(&shape, &info);
        shape.n = sizes[i].n;
        shape.k = sizes[i].k;
        shape.m = sizes[i].m;
        shape.group = i % 2 || sizes[i].k == 64 ? 64 : 128;
        shape.gate_group = !shape.gate_group ? 0 : sizes[i].k == 64 ? 64 : 192 - shape.group;
        shape.row_pointers = false;
        if (sizes[i].on_host)
            shape.kind = FQ_MEMORY_HOST;
        if (sizes[i].type)
            shape.type = sizes[i].type;
        if (sizes[i].type == FQ_BF16) {
            shape.gate_scale_type = FQ_BF16;
            shape.gate_zeros = false;
        }
        if (sizes[i].plain) {
            shape.gate_group = 0;
            shape.activation = FQ_ACTIVATION_NONE;
            shape.residual = RESIDUAL_NONE;
            shape.y_aligned = true;
        } else if (sizes[i].finished) {
            shape.gate_group = 0;
            shape.activation = FQ_ACTIVATION_SILU;
            shape.residual = RESIDUAL_IN_PLACE;
        }
        check_shape(backend, &shape);
    }
    fq_backend_free(backend);
}

/* So many rows of W that each worker of a GPU has several strips of them, alone and in pairs. */
static void stays_within_the_bounds_on_many_rows_of_weights(void **context) {
    static const int64_t ms[] = {5, 13, 20, 40, 64};
    struct fq_backend *backend;
    struct fq_device_info info = open_target(*context, 0, &backend);

    for (size_t i = 0; info.device_memory && i < COUNT(ms) * COUNT(all_bits); i++) {
        struct shape shape = {.bits = all_bits[i % COUNT(all_bits)],
                              .scale_type = scale_types[i % 2],
                              .group = i % 3 ? 64 : 16,
                              .zeros = i % 4 == 3};

        draw(&shape, &info);
        shape.m = ms[i % COUNT(ms)];
        shape.n = i % 2 ? 13000 : 26000;
        shape.k = i % 2 ? 500 : 130;
        shape.group = i % 3 ? 64 : 16;
        shape.gate_group = i % 2 ? 64 : 0;
        shape.kind = FQ_MEMORY_DEVICE;
        shape.row_pointers = false;
        check_shape(backend, &shape);
    }
    fq_backend_free(backend);
}

/* Three strips of W to some workers of a GPU and a K of several full stages, scales of X's type and
 * groups of one or two tiles: the loops that most launches of a model go through. */
static void stays_within_the_bounds_in_full_stages(void **context) {
    static const int64_t ms[] = {8, 3, 16, 32, 48, 64};
    struct fq_backend *backend;
    struct fq_device_info info = open_target(*context, 0, &backend);

    for (size_t i = 0; info.device_memory && i < COUNT(ms) * COUNT(all_bits) * 2; i++) {
        const size_t row = i / COUNT(all_bits); /* of ms, twice */
        const bool zeros = row >= COUNT(ms);
        const int64_t group = (row + zeros) % 2 ? 128 : 64;
        const enum fq_dtype type = i % 2 ? FQ_BF16 : FQ_F16;
        struct shape shape = {.bits = all_bits[i % COUNT(all_bits)],
                              .scale_type = type,
                              .group = group,
                              .zeros = zeros};

        draw(&shape, &info);
        shape.m = ms[row % COUNT(ms)];
        shape.n = 8600;
        shape.k = 2200;
        shape.group = group;
        shape.gate_group = 0;
        shape.type = type;
        shape.kind = FQ_MEMORY_DEVICE;
        shape.row_pointers = false;
        check_shape(backend, &shape);
    }
    fq_backend_free(backend);
}

/* So many rows of W that each worker of a GPU has one or two strips of them: the ways in which a
 * worker parts K among its warps, with groups of which few fit a part. */
static void stays_within_the_bounds_on_two_strips_a_worker(void **context) {
    static const int64_t ms[] = {5, 13, 20, 40, 64};
    static const int64_t ks[] = {60, 100, 500, 1600, 1984}, ns[] = {8400, 4200, 5000};
    struct fq_backend *backend;
    struct fq_device_info info = open_target(*context, 0, &backend);

    for (size_t i = 0; info.device_memory && i < COUNT(ms) * COUNT(all_bits) * 2; i++) {
        const int64_t group = i % 7 ? PICK(all_groups) : 80;
        struct shape shape = {.bits = all_bits[i % COUNT(all_bits)], .group = group};

        shape.scale_type = PICK(scale_types);
        shape.zeros = random_below(2);
        draw(&shape, &info);
        shape.m = ms[i / COUNT(all_bits) % COUNT(ms)];
        shape.n = ns[i / COUNT(all_bits) % COUNT(ns)];
        shape.k = ks[i % COUNT(ks)];
        shape.group = group && group < shape.k ? group : shape.k;
        if (shape.gate_group)
            shape.gate_group = i % 2 ? shape.group : 48;
        shape.kind = FQ_MEMORY_DEVICE;
        shape.row_pointers = false;
        check_shape(backend, &shape);
    }
    fq_backend_free(backend);
}

/* Few rows of weights and a long K, alone and in pairs: a CTA's ring goes round many times. */
static void stays_within_the_bounds_on_deep_weights(void **context) {
    static const int64_t ms[] = {5, 13, 20, 40, 64};
    struct fq_backend *backend;
    struct fq_device_info info = open_target(*context, 0, &backend);

    for (size_t i = 0; info.device_memory && i < COUNT(ms) * COUNT(all_bits) * 4; i++) {
        struct shape shape = {.bits = all_bits[i / 4 % COUNT(all_bits)],
                              .scale_type = scale_types[i % 2],
                              .group = 64,
                              .zeros = i / 2 % 2};

        draw(&shape, &info);
        shape.m = ms[i / 4 % COUNT(ms)];
        shape.n = i % 3 ? 60 : 150;
        shape.k = 4500;
        shape.group = 64;
        shape.gate_group = i % 2 ? 64 : 0;
        shape.kind = FQ_MEMORY_DEVICE;
        shape.row_pointers = false;
        shape.x_aligned = i % 5 < 3;
        check_shape(backend, &shape);
    }
    fq_backend_free(backend);
}

/* Scales of bf16 have the range of fp32.  The last size is for GPUs: on the CPU, what is below
 * 2^-115 of such small activations is lost (cpu/fixed.h). */
static void takes_scales_of_any_size(void **context) {
    static const int sizes[] = {-100, -20, 0, 20, 100, 117};
    static const int64_t ms[] = {5, 40, 70, 130, 200};
    struct fq_backend *backend;
    struct fq_device_info info = open_target(*context, 0, &backend);

    for (size_t i = 0; i < COUNT(sizes) * COUNT(ms) * COUNT(all_bits); i++) {
        const int64_t group = all_groups[i % COUNT(all_groups)];
        struct shape shape = {.bits = all_bits[i % COUNT(all_bits)],
                              .scale_type = FQ_BF16,
                              .scale_log2 = sizes[i / COUNT(all_bits) % COUNT(sizes)],
                              .group = group,
                              .zeros = i % 8 == 7};

        if (shape.scale_log2 > 100 && !info.device_memory)
            continue;
        draw(&shape, &info);
        shape.n = 150;
        shape.k = 700;
        shape.group = group ? group : shape.k;
        shape.m = ms[i % COUNT(ms)];
        shape.type = FQ_BF16;
        shape.gate_scale_type = FQ_BF16;
        if (shape.gate_group)
            shape.gate_group = 64;
        shape.row_pointers = false;
        check_shape(backend, &shape);
    }
    fq_backend_free(backend);
}

/* Rows order[0] to order[count - 1] of X give in `some` what they gave in `all`. */
static void check_rows(struct instance *instance, const struct shape *shape,
                       const struct plane *all, struct plane *some, const int64_t *order,
                       int64_t count) {
    instance_run_rows(instance, some, order, count);
    for (int64_t m = 0; m < count; m++)
        if (memcmp(plane_row_image(some, m), plane_row_image(all, order[m]),
                   (size_t)shape->n * fq_dtype_size(shape->type)) != 0)
            fail_msg("row %" PRId64 " differs between place %" PRId64 " of %" PRId64
                     " and its own place of 64",
                     order[m], m, count);
}

static void check_invariance(struct fq_backend *backend, const struct shape *shape) {
    static const int64_t counts[] = {1, 2, 3, 4, 5, 6, 8, 9, 16, 17, 33, 48, 63, 64};
    int64_t order[FQ_DECODE_ROWS];
    struct instance instance;
    struct plane all, some;

    begin(shape);
    instance_init(&instance, backend, shape);
    instance_init_y(&instance, &all, shape->y_gap);
    instance_init_y(&instance, &some, 1);
    for (int64_t m = 0; m < FQ_DECODE_ROWS; m++)
        order[m] = m;
    instance_run_rows(&instance, &all, order, FQ_DECODE_ROWS);
    for (size_t i = 0; i < COUNT(counts); i++) {
        /* the first ones, as a GPU can copy them at once, then some in any order */
        for (int64_t m = 0; m < FQ_DECODE_ROWS; m++)
            order[m] = m;
        check_rows(&instance, shape, &all, &some, order, counts[i]);
        for (size_t m = FQ_DECODE_ROWS - 1; m > 0; m--) {
            size_t other = random_below(m + 1);
            int64_t row = order[m];

            order[m] = order[other];
            order[other] = row;
        }
        check_rows(&instance, shape, &all, &some, order, counts[i]);
    }
    plane_fini(&some);
    plane_fini(&all);
    instance_fini(&instance);
    checking = false;
}

static void rows_do_not_depend_on_their_company(void **context) {
    struct fq_backend *backend;
    struct fq_device_info info = open_target(*context, 0, &backend);

    for (size_t i = 0; i < COUNT(all_bits) * 4; i++) {
        struct shape shape = {.bits = all_bits[i / 4],
                              .zeros = i % 2,
                              .group = i / 2 % 2 ? 0 : 64,
                              .scale_type = scale_types[i % 2]};

        draw(&shape, &info);
        shape.m = FQ_DECODE_ROWS;
        shape.n = i % 3 ? 130 : 33;
        shape.k = info.device_memory && i % 3 == 0 ? 5000 : i % 2 ? 1000 : 640;
        shape.group = i / 2 % 2 ? shape.k : 64;
        if (shape.gate_group)
            shape.gate_group = i % 2 ? shape.group : 32;
        shape.row_pointers = true;
        shape.x_aligned = i % 4 < 3;
        check_invariance(backend, &shape);
    }
    /* two strips a worker of a GPU, which are parted in one way up to 32 rows and in another beyond
     */
    for (size_t i = 0; info.device_memory && i < COUNT(all_bits) * 3; i++) {
        static const int64_t groups[] = {64, 48, 256, 128};
        struct shape shape = {.bits = all_bits[i % COUNT(all_bits)],
                              .zeros = i % 4 == 3,
                              .group = groups[i % COUNT(groups)],
                              .scale_type = scale_types[i / 2 % 2]};
        const int64_t group = shape.group;

        draw(&shape, &info);
        shape.m = FQ_DECODE_ROWS;
        shape.n = i / COUNT(all_bits) % 2 ? 5000 : 4300;
        shape.k = i % 2 ? 3000 : 3200; /* of fewer columns a third would be too much */
        shape.group = group;
        shape.gate_group = 0;
        shape.row_pointers = true;
        shape.x_aligned = i % 4 < 3;
        check_invariance(backend, &shape);
    }
    fq_backend_free(backend);
}

/* An infinity in X, and a NaN, are lost on their own rows alone, and not there either. */
static void check_spoilt_rows(struct fq_backend *backend, const struct shape *shape) {
    static const int64_t counts[] = {3, 8, 40, FQ_DECODE_ROWS};
    const int64_t infinite = 1, nan = 2;
    int64_t order[FQ_DECODE_ROWS];
    struct instance instance;
    struct plane clean, spoilt;

    begin(shape);
    instance_init(&instance, backend, shape);
    instance_init_y(&instance, &clean, 0);
    instance_init_y(&instance, &spoilt, 0);
    for (int64_t m = 0; m < FQ_DECODE_ROWS; m++)
        order[m] = m;
    instance_run_rows(&instance, &clean, order, FQ_DECODE_ROWS);
    plane_set(&instance.x, infinite, (int64_t)random_below((size_t)shape->k), INFINITY);
    plane_set(&instance.x, nan, (int64_t)random_below((size_t)shape->k), NAN);
    plane_upload(&instance.x);
    for (size_t i = 0; i < COUNT(counts); i++) {
        instance_run_rows(&instance, &spoilt, order, counts[i]);
        for (int64_t m = 0; m < counts[i]; m++) {
            const bool whole = m != infinite && m != nan;

            if (whole && memcmp(plane_row_image(&spoilt, m), plane_row_image(&clean, m),
                                (size_t)shape->n * fq_dtype_size(shape->type)) != 0)
                fail_msg("row %" PRId64 " of %" PRId64 " differs beside rows that are not finite",
                         m, counts[i]);
            for (int64_t n = 0; n < shape->n && !whole; n++)
                if (isfinite(plane_element(&spoilt, m, n)))
                    fail_msg("column %" PRId64 " of row %" PRId64
                             ", which is not finite, of %" PRId64 " is",
                             n, m, counts[i]);
        }
    }
    plane_fini(&spoilt);
    plane_fini(&clean);
    instance_fini(&instance);
    checking = false;
}

static void rows_that_are_not_finite_spoil_no_others(void **context) {
    struct fq_backend *backend;
    struct fq_device_info info = open_target(*context, 0, &backend);

    for (size_t i = 0; i < COUNT(all_bits) * 4; i++) {
        struct shape shape = {.bits = all_bits[i / 4],
                              .zeros = i % 2,
                              .group = i / 2 % 2 ? 16 : 64,
                              .scale_type = scale_types[i % 2]};

        draw(&shape, &info);
        shape.m = FQ_DECODE_ROWS;
        shape.n = i % 3 ? 130 : 33;
        shape.k = i % 2 ? 1000 : 640;
        shape.group = i / 2 % 2 ? 16 : 64;
        shape.activation = FQ_ACTIVATION_NONE; /* which could make a number of an infinity */
        shape.gate_group = 0;
        shape.row_pointers = true;
        check_spoilt_rows(backend, &shape);
    }
    fq_backend_free(backend);
}

/* The same inputs to the same bits: run after run, and on any number of threads. */
static void repeats_bit_for_bit(void **context) {
    static const int threads[] = {1, 1, 2, 3};
    struct fq_backend *backends[COUNT(threads)];
    struct fq_device_info info;

    for (size_t i = 0; i < COUNT(threads); i++)
        info = open_target(*context, threads[i], &backends[i]);
    for (size_t i = 0; i < COUNT(all_bits) * 4; i++) {
        struct shape shape = {
            .bits = all_bits[i / 4], .scale_type = FQ_F16, .zeros = i % 2, .group = 64};
        struct plane y[COUNT(threads)];

        draw(&shape, &info);
        shape.n = i / 2 % 2 ? 200 : 40;
        shape.k = i / 2 % 2 ? 1000 : 3000; /* few rows of W and a long K: split */
        shape.group = 64;
        shape.gate_group = shape.gate_group ? 128 : 0;
        shape.m = i % 2 ? 129 : 33;
        shape.row_pointers = false;
        begin(&shape);
        const uint64_t start = random_state;
        for (size_t run = 0; run < COUNT(threads); run++) {
            struct instance instance;

            random_state = start;
            instance_init(&instance, backends[run], &shape);
            instance_init_y(&instance, &y[run], 0);
            instance_run(&instance, &y[run]);
            instance_fini(&instance);
            assert_int_equal(y[run].start, y[0].start);
            assert_memory_equal(y[run].image, y[0].image, y[0].bytes);
        }
        for (size_t run = 0; run < COUNT(threads); run++)
            plane_fini(&y[run]);
        checking = false;
    }
    for (size_t i = 0; i < COUNT(threads); i++)
        fq_backend_free(backends[i]);
}

/* ---- Which backends ---------------------------------------------------------------------- */

/* Adds a backend if it opens; returns the status of opening. */
static int add_target(struct target *targets, size_t *count, const char *backend,
                      const char *kernels) {
    struct target *target = &targets[*count];
    struct fq_backend *opened;
    struct fq_error err;

    if (kernels)
        setenv("FINEQUANT_CPU_KERNELS", kernels, 1);
    int status = fq_backend_new(backend, NULL, &opened, &err);
    if (kernels)
        unsetenv("FINEQUANT_CPU_KERNELS");
    if (status) {
        print_message("%s %s skipped: %s\n", backend, kernels ? kernels : "", err.message);
        return status;
    }
    fq_backend_free(opened);
    target->backend = backend;
    target->kernels = kernels;
    snprintf(target->label, sizeof target->label, "%s%s%s", backend, kernels ? "-" : "",
             kernels ? kernels : "");
    (*count)++;
    return 0;
}

static int find_targets(const char *wanted, struct target *targets, size_t *count) {
    static const char *const sets[] = {"amx",     "avx512bf16", "avx512vnni", "avx512",
                                       "avxvnni", "avx2",       "generic"};
    bool known = false;
    int status = 0;

    for (int i = 0; fq_backend_list(i); i++) {
        const char *backend = fq_backend_list(i);

        if (wanted && strcmp(wanted, backend) != 0)
            continue;
        known = true;
        if (strcmp(backend, "cpu") != 0)
            status = add_target(targets, count, backend, NULL);
        else
            for (size_t set = 0; set < COUNT(sets); set++)
                if (add_target(targets, count, backend, sets[set]) == 0)
                    status = 0;
        if (status && status != -FQ_UNAVAILABLE)
            return status; /* no device is a reason to skip, no memory is not */
    }
    return known ? status : add_target(targets, count, wanted, NULL);
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        CMUnitTestFunction body;
    } properties[] = {
        {"stays_within_the_bounds_of_float64", stays_within_the_bounds_of_float64},
        {"stays_within_the_bounds_on_larger_matrices", stays_within_the_bounds_on_larger_matrices},
        {"stays_within_the_bounds_on_many_rows_of_weights",
         stays_within_the_bounds_on_many_rows_of_weights},
        {"stays_within_the_bounds_in_full_stages", stays_within_the_bounds_in_full_stages},
        {"stays_within_the_bounds_on_two_strips_a_worker",
         stays_within_the_bounds_on_two_strips_a_worker},
        {"stays_within_the_bounds_on_deep_weights", stays_within_the_bounds_on_deep_weights},
        {"takes_scales_of_any_size", takes_scales_of_any_size},
        {"rows_do_not_depend_on_their_company", rows_do_not_depend_on_their_company},
        {"rows_that_are_not_finite_spoil_no_others", rows_that_are_not_finite_spoil_no_others},
        {"repeats_bit_for_bit", repeats_bit_for_bit},
    };
    static struct target targets[TARGETS_MAX];
    static char names[TARGETS_MAX * COUNT(properties)][96];
    static struct CMUnitTest tests[TARGETS_MAX * COUNT(properties)];
    const char *seed_text = getenv("FINEQUANT_TEST_SEED");
    const char *rounds_text = getenv("FINEQUANT_TEST_ROUNDS");
    size_t count = 0;

    if (seed_text)
        seed = strtoull(seed_text, NULL, 0);
    if (rounds_text)
        rounds = (unsigned)strtoul(rounds_text, NULL, 0);
    int status = find_targets(argc > 1 ? argv[1] : NULL, targets, &count);
    if (count == 0)
        return status == -FQ_UNAVAILABLE || status == -FQ_UNSUPPORTED ? 77 : 1;
    for (size_t i = 0; i < count * COUNT(properties); i++) {
        size_t target = i / COUNT(properties), property = i % COUNT(properties);

        snprintf(names[i], sizeof names[i], "%s: %s", targets[target].label,
                 properties[property].name);
        tests[i] = (struct CMUnitTest){names[i], properties[property].body, begin_test, end_test,
                                       &targets[target]};
    }
    print_message("seed %" PRIu64 ", %u rounds\n", seed, rounds);
    return _cmocka_run_group_tests("conformance", tests, count * COUNT(properties), NULL, NULL) !=
           0;
}
