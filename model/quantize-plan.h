/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which matrices of a checkpoint are quantized, and how: found by quantize-plan.c,
 * decided by quantize-decide*.c, written by quantize-checkpoint.c.  Internal to model/; one thread.
 */
#ifndef FQ_MODEL_QUANTIZE_PLAN_H
#define FQ_MODEL_QUANTIZE_PLAN_H

#include "checkpoint.h"
#include "quantize-checkpoint.h"

#include <jansson.h>

/* One matrix: a two-dimensional tensor, an expert's slice of a three-dimensional one, or half of
 * such a slice where it holds gate and up. */
struct fq_plan_matrix {
    char *name; /* the module's, as it will be written */
    const struct fq_checkpoint_tensor *source;
    struct fq_dense dense; /* within the source */
    uint64_t bytes;        /* of it */
    size_t unit;
    bool overridden; /* bits and group are the user's */
    bool kept_dense;
    bool asymmetric;
    int bits;
    int64_t group;   /* 0: per channel */
    double expected; /* error, NaN where nothing was looked at */
};

/* Matrices that share a scheme, because vLLM fuses them into one layer. */
struct fq_plan_unit {
    size_t *members; /* indices of matrices */
    size_t count;
};

struct fq_plan {
    const struct fq_quantize_options *options;
    struct fq_checkpoint *checkpoint;
    struct fq_plan_matrix *matrices; /* by source tensor, then by their place in it */
    size_t count;
    struct fq_plan_unit *units;
    size_t unit_count;
    uint64_t bytes; /* of all tensors */
    double looked;  /* what deciding took, as struct fq_quantize_progress counts work */
    size_t
        unsuited; /* tensors that are layers by their names, but transposed or no F32, F16, BF16 */
};

/* Opens IN, finds the matrices and applies the rules. */
int fq_plan_init(struct fq_plan *plan, const char *in, const struct fq_quantize_options *options,
                 struct fq_error *err);
void fq_plan_fini(struct fq_plan *plan);

/* The matrices of a tensor: *first, and how many; 0 where it is copied as it is. */
size_t fq_plan_of_tensor(const struct fq_plan *plan, const struct fq_checkpoint_tensor *tensor,
                         size_t *first);
/* As it will be in the output: name, shape, bits, group and symmetry. */
struct fq_checkpoint_matrix fq_plan_describe(const struct fq_plan_matrix *matrix);
/* Bytes of the tensors that a matrix would be written as. */
uint64_t fq_plan_bytes(const struct fq_plan_matrix *matrix, int bits, int64_t group,
                       bool asymmetric);
/* Whether its layout could not be told from another, so that it is written as it is. */
bool fq_plan_stays_dense(const struct fq_plan_matrix *matrix);
/* Starts reading a matrix, if there is one of that index, while something else is computed. */
void fq_plan_read_ahead(const struct fq_plan *plan, size_t matrix);
/* Tells the kernel that the pages of a matrix will not be needed again soon. */
void fq_plan_drop(const struct fq_plan_matrix *matrix);

/* What planning has measured, so that a later run need not. */
struct fq_plan_notes {
    json_t *measured; /* of an earlier run of the same plan, or empty; an object, and added to */
    void (*save)(void *context); /* called whenever something was added */
    void *context;
};

/* Chooses bits, group and zero points for every matrix; fills in the summary's budget.  NOTES may
 * be NULL. */
int fq_plan_decide(struct fq_plan *plan, struct fq_quantize_summary *summary,
                   struct fq_plan_notes *notes, struct fq_error *err);

/* Fills in the work of a progress whose bytes are those that deciding looks at. */
void fq_plan_looked(struct fq_plan *plan, struct fq_quantize_progress *progress);

/* The choices as JSON, and back: 0, or -FQ_FORMAT where they are not of this plan. */
json_t *fq_plan_choices(const struct fq_plan *plan);
int fq_plan_take_choices(struct fq_plan *plan, const json_t *choices);

#endif
