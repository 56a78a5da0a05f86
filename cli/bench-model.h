/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the two files of `finequant-bench model` share: a model's shape and a
 * model with synthetic weights, ready to be stepped (bench-model-step.c), for
 * bench-model.c, which holds the options, the shapes and the table.
 */
#ifndef FQ_CLI_BENCH_MODEL_H
#define FQ_CLI_BENCH_MODEL_H

#include "backend.h"
#include "bench.h"

#define BENCH_PRODUCTS_MAX 4

/* One product of a layer. */
struct bench_product {
    const char *name;
    int64_t n, k;
    int from;   /* the product whose Y holds X in its first k columns; -1: the layer's input */
    bool gated; /* two matrices: silu(X·Vᵀ) ⊙ (X·Wᵀ) */
};

struct bench_arch {
    const char *name;
    int layers, product_count;
    struct bench_product products[BENCH_PRODUCTS_MAX];
    double paper_ms[3]; /* FineQuant's, int4 g64 on two A100, at m = 1, 8 and 32; 0: none */
};

/* What a model is made of. */
struct bench_model_spec {
    const char *backend;
    const struct bench_arch *arch;
    int64_t layers; /* 1 to arch->layers */
    int bits;
    int64_t group; /* 0: per channel */
    enum fq_dtype dtype;
    int64_t m_max;      /* rows of the largest step */
    int64_t rotate_mib; /* of weights at least, by copies where the layers have less */
};

struct bench_model {
    struct bench_model_spec spec;
    struct fq_backend *backend;
    struct fq_stream *stream;
    struct fq_event *event;
    struct fq_device_info device;
    int copies;                 /* of all layers */
    struct bench_place *places; /* [copies][layers][product_count], owned */
    size_t place_count;
    bool fused;              /* the backend has gated products */
    uint64_t weight_bytes;   /* of one copy */
    int64_t y_row;           /* elements of all Y of one copy, for one row */
    struct fq_memory *x, *y; /* [m_max][k of the first product]; Y of one product after another */
    struct fq_memory *plain; /* what the plain read reads, and room for its result */
    uint64_t read_sum;       /* keeps reads from being optimised away */
};

/* One step of m rows. */
struct bench_step {
    struct bench_model *model;
    int64_t m;      /* up to m_max */
    uint64_t bytes; /* that it must move: weights, X and Y of each product once */
};

/* Refuses with -FQ_NO_MEMORY, before it takes any, where the model does not fit into what is free.
 * After a failure too, bench_model_fini is due. */
int bench_model_init(struct bench_model *model, const struct bench_model_spec *spec,
                     struct fq_error *err);
void bench_model_fini(struct bench_model *model);

void bench_step_init(struct bench_step *step, struct bench_model *model, int64_t m);
/* Median times of a step and of a plain read of its bytes, in turns. */
int bench_step_time(struct bench_step *step, double *us, double *read_us, struct fq_error *err);
/* ‖y − ref‖ / ‖ref‖ of the last product of the first copy, on some columns of its last row, from
 * the X that it was given, after bench_step_time.  NAN where Y is no number. */
int bench_step_error(const struct bench_step *step, double *error, struct fq_error *err);

#endif
