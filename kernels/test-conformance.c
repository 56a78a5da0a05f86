/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What every backend must do, whatever it is made of: results within the
 * documented bounds of float64, nothing written outside of Y, nothing read that
 * matters outside of X, and rows whose bits depend on their own inputs alone.
 *
 *     test-conformance            every backend of this build that opens, and
 *                                 every instruction set of the cpu backend
 *     test-conformance cuda       that one; exits 77 where it has no device
 *     test-conformance cuda '*company*'
 *                                 of that, the tests whose names match
 *
 * The product of all parameters is too large: every combination of bits, group
 * size, scale type and zero points is run FINEQUANT_TEST_ROUNDS times with the
 * other parameters drawn from a generator seeded with FINEQUANT_TEST_SEED.  A
 * failure prints the seed and the case (test-case.h).  Sizes that are for one
 * implementation or another are in test-conformance-sizes.c.
 */
#include "test-conformance.h"

#include <inttypes.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define TARGETS_MAX 16

static uint64_t seed = 1;
static unsigned rounds = 3;

/* ---- The properties ---------------------------------------------------------------------- */

/* What is being checked: a copy, since a failed check leaves its stack frame by longjmp. */
static struct shape current;
static bool checking;

static void begin(const struct shape *shape) {
    current = *shape;
    checking = true;
}

void check_shape(struct fq_backend *backend, const struct shape *shape) {
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

struct fq_device_info open_target(const struct target *target, int threads,
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

void draw(struct shape *shape, const struct fq_device_info *info) {
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
    /* groups of 16, whose weights a GPU scales; pairs, two strips a worker, and more than three */
    for (size_t i = 0; i < COUNT(all_bits) * 4; i++) {
        static const int64_t ns[] = {130, 5000, 13000};
        const size_t round = i / COUNT(all_bits);
        const enum fq_dtype type = round % 2 ? FQ_BF16 : FQ_F16;
        struct shape shape = {.bits = all_bits[i % COUNT(all_bits)],
                              .zeros = round / 2,
                              .group = 16,
                              .scale_type = type};

        draw(&shape, &info);
        shape.type = type;
        shape.m = FQ_DECODE_ROWS;
        shape.n = info.device_memory ? ns[(i + round) % COUNT(ns)] : ns[0];
        shape.k = shape.n == ns[1] ? 3200 : 640;
        shape.group = 16;
        shape.gate_group = shape.n == ns[0] ? 16 : 0;
        shape.row_pointers = true;
        shape.x_aligned = i % 4 < 3;
        check_invariance(backend, &shape);
    }
    /* results around the largest number of fp32, where many a third of K's sum is larger and all of
     * it is not, one or two strips a worker: infinite alike in any company.  int4 in groups
     * of 16 has room for thirds of one. */
    for (size_t i = 0; info.device_memory && i < COUNT(all_bits) * 4; i++) {
        struct shape shape = {.bits = all_bits[i % COUNT(all_bits)], .scale_type = FQ_BF16};
        const size_t round = i / COUNT(all_bits);

        draw(&shape, &info);
        shape.type = FQ_BF16;
        shape.m = FQ_DECODE_ROWS;
        shape.n = round % 2 ? 4300 : 130;
        shape.k = 3200;
        shape.group = round % 2 ? 64 : 16;
        shape.scale_log2 = round / 2 ? 100 : 10;
        shape.x_log2 = 129;
        shape.outliers = false;
        shape.activation = FQ_ACTIVATION_NONE;
        shape.bias_type = 0;
        shape.residual = RESIDUAL_NONE;
        shape.gate_group = 0;
        shape.row_pointers = true;
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
    static const char *const sets[] = {"amx",    "avx512bf16", "avx512gfni", "avx512vnni",
                                       "avx512", "avxvnni",    "avx2",       "generic"};
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
        {"stays_within_the_bounds_however_it_is_dealt_out",
         stays_within_the_bounds_however_it_is_dealt_out},
        {"stays_within_the_bounds_on_many_rows_of_weights",
         stays_within_the_bounds_on_many_rows_of_weights},
        {"stays_within_the_bounds_in_full_stages", stays_within_the_bounds_in_full_stages},
        {"stays_within_the_bounds_on_two_strips_a_worker",
         stays_within_the_bounds_on_two_strips_a_worker},
        {"stays_within_the_bounds_on_deep_weights", stays_within_the_bounds_on_deep_weights},
        {"stays_within_the_bounds_on_weights_loaded_in_pieces",
         stays_within_the_bounds_on_weights_loaded_in_pieces},
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
    if (argc > 2)
        cmocka_set_test_filter(argv[2]);
    print_message("seed %" PRIu64 ", %u rounds\n", seed, rounds);
    return _cmocka_run_group_tests("conformance", tests, count * COUNT(properties), NULL, NULL) !=
           0;
}
