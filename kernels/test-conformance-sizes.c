/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Properties of the conformance test whose sizes are chosen for what implementations do with them:
 * beyond every tile, pass and panel, and, for GPUs, so that all multiprocessors have something to
 * do, in each of the ways in which it is dealt out.
 */
#include "cuda/test-sizes.h"
#include "test-conformance.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

static bool is_hopper(const struct fq_device_info *info) {
    return strcmp(info->kernels, "sm_90a") == 0;
}

/* The index-th of a list: odd ones have groups of 64, and zero points, even ones groups of 128. */
static void check_size(struct fq_backend *backend, const struct fq_device_info *info, size_t index,
                       const struct test_size *size, bool on_host) {
    const bool odd = index % 2, bf16 = size->type == FQ_BF16;
    struct shape shape = {.bits = size->bits,
                          .scale_type = bf16 ? FQ_BF16 : scale_types[odd],
                          .group = odd ? 64 : 128,
                          .zeros = odd && !bf16};

    draw(&shape, info);
    shape.n = size->n;
    shape.k = size->k;
    shape.m = size->m;
    shape.group = odd || size->k == 64 ? 64 : 128;
    shape.gate_group = !shape.gate_group ? 0 : size->k == 64 ? 64 : 192 - shape.group;
    shape.row_pointers = false;
    if (on_host)
        shape.kind = FQ_MEMORY_HOST;
    if (size->type)
        shape.type = size->type;
    if (bf16) {
        shape.gate_scale_type = FQ_BF16;
        shape.gate_zeros = false;
    }
    if (size->results != TEST_ANY)
        shape.gate_group = 0;
    if (size->results == TEST_PLAIN) {
        shape.activation = FQ_ACTIVATION_NONE;
        shape.residual = RESIDUAL_NONE;
        shape.y_aligned = true;
    } else if (size->results == TEST_FINISHED) {
        shape.activation = FQ_ACTIVATION_SILU;
        shape.residual = RESIDUAL_IN_PLACE;
    }
    check_shape(backend, &shape);
}

void stays_within_the_bounds_on_larger_matrices(void **context) {
    static const struct {
        struct test_size size;
        bool on_device; /* gives all multiprocessors of a GPU something to do */
        bool on_hopper; /* likewise, in forms that its kernels alone have */
        bool on_host;   /* X and Y are in host memory */
    } sizes[] = {
        {.size = {513, 1500, 20, 8, 0, TEST_ANY}},
        {.size = {513, 1500, 20, 4, 0, TEST_ANY}},
        {.size = {513, 1500, 20, 3, 0, TEST_ANY}},
        {.size = {77, 1111, 500, 8, 0, TEST_ANY}},
        {.size = {77, 1111, 500, 4, 0, TEST_ANY}},
        {.size = {77, 1111, 500, 3, 0, TEST_ANY}},
        {{8464, 520, 90, 4, 0, TEST_ANY}, .on_device = true},
        {{8464, 520, 120, 8, 0, TEST_ANY}, .on_device = true},
        {{8464, 520, 190, 4, 0, TEST_ANY}, .on_device = true},
        {{8464, 520, 250, 8, 0, TEST_ANY}, .on_device = true},
        {{8464, 520, 190, 3, 0, TEST_ANY}, .on_device = true},
        /* two launches, the second one of few rows, and of more */
        {{15750, 2000, 257, 3, FQ_BF16, TEST_ANY}, .on_hopper = true},
        {{33500, 2000, 276, 4, FQ_F16, TEST_ANY}, .on_hopper = true},
        /* rows of the host, two chunks of them, the second one of few rows */
        {{140000, 64, 148, 8, FQ_F16, TEST_ANY}, .on_hopper = true, .on_host = true},
    };
    struct fq_backend *backend;
    struct fq_device_info info = open_target(*context, 0, &backend);

    for (size_t i = 0; i < COUNT(sizes); i++)
        if ((!sizes[i].on_device || info.device_memory) &&
            (!sizes[i].on_hopper || is_hopper(&info)))
            check_size(backend, &info, i, &sizes[i].size, sizes[i].on_host);
    fq_backend_free(backend);
}

/* Of Hopper's kernels for many rows of X: cuda/test-sizes.h. */
void stays_within_the_bounds_however_it_is_dealt_out(void **context) {
    struct fq_backend *backend;
    struct fq_device_info info = open_target(*context, 0, &backend);

    for (size_t i = 0; is_hopper(&info) && i < COUNT(prefill_sizes); i++)
        check_size(backend, &info, i, &prefill_sizes[i].size, false);
    fq_backend_free(backend);
}

/* So many rows of W that each worker of a GPU has several strips of them, alone and in pairs. */
void stays_within_the_bounds_on_many_rows_of_weights(void **context) {
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
 * groups of one or two tiles, the loops that most launches of a model go through, or of 16. */
void stays_within_the_bounds_in_full_stages(void **context) {
    static const int64_t ms[] = {8, 3, 16, 32, 48, 64};
    struct fq_backend *backend;
    struct fq_device_info info = open_target(*context, 0, &backend);

    for (size_t i = 0; info.device_memory && i < COUNT(ms) * COUNT(all_bits) * 4; i++) {
        const size_t row = i / COUNT(all_bits); /* of ms, four times */
        const bool shortest = row >= 2 * COUNT(ms);
        const bool zeros = row / COUNT(ms) % 2 != 0;
        const int64_t group = shortest ? 16 : (row + zeros) % 2 ? 128 : 64;
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
void stays_within_the_bounds_on_two_strips_a_worker(void **context) {
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
void stays_within_the_bounds_on_deep_weights(void **context) {
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

/* Weights that a GPU's loader brings in more than one piece of 16 MiB: of whole rows, of codes and
 * of scales, and of parts of rows, where not even 64 whole ones fit. */
void stays_within_the_bounds_on_weights_loaded_in_pieces(void **context) {
    static const struct {
        int bits;
        int64_t n, k, group;
    } sizes[] = {
        {8, 9000, 2000, 64}, {4, 18000, 2000, 64}, {3, 24000, 2000, 64}, {3, 70000, 2000, 16},
        {8, 70, 270016, 64}, {4, 70, 530000, 64},  {3, 70, 710000, 64},
    };
    struct fq_backend *backend;
    struct fq_device_info info = open_target(*context, 0, &backend);

    for (size_t i = 0; info.device_memory && i < COUNT(sizes); i++) {
        struct shape shape = {.bits = sizes[i].bits,
                              .scale_type = scale_types[i % 2],
                              .group = sizes[i].group,
                              .zeros = true};

        draw(&shape, &info);
        shape.n = sizes[i].n;
        shape.k = sizes[i].k;
        shape.m = 3;
        shape.group = sizes[i].group;
        shape.gate_group = 0;
        shape.kind = FQ_MEMORY_DEVICE;
        shape.row_pointers = false;
        check_shape(backend, &shape);
    }
    fq_backend_free(backend);
}
