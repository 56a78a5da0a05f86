/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Directory to directory: an ordinary Hugging Face checkpoint in, the same
 * checkpoint with its linear layers quantized out, in the compressed-tensors
 * pack-quantized layout.  One matrix is in memory at a time; what a killed run
 * had finished, the next one keeps.
 */
#ifndef FQ_MODEL_QUANTIZE_CHECKPOINT_H
#define FQ_MODEL_QUANTIZE_CHECKPOINT_H

#include "quantize-choose.h"
#include "quantize.h"

#define FQ_QUANTIZE_GROUP_AUTO ((int64_t)-1)
/* A relative error from which on a matrix is worth a warning: it keeps little of its weights. */
#define FQ_QUANTIZE_POOR 0.5

/* What the user says of matrices by name; the glob's * matches dots as well. */
struct fq_quantize_rule {
    enum {
        FQ_RULE_INCLUDE, /* of these and FQ_RULE_EXCLUDE the last that matches decides */
        FQ_RULE_EXCLUDE,
        FQ_RULE_OVERRIDE /* bits and group, whatever would be chosen; the last that matches */
    } kind;
    const char *pattern;
    int bits;
    int64_t group; /* 0: per channel */
};

/* What became, or in a plan will become, of one linear layer. */
struct fq_quantized_layer {
    const char *name; /* borrowed for the call */
    int64_t n, k;
    bool kept_dense;       /* 3-bit rows of this length are ambiguous in the layout */
    int bits;              /* 0 where kept dense, as the rest */
    int64_t group;         /* k: per channel */
    bool asymmetric;       /* has zero points */
    uint64_t bytes_before; /* the weights alone, without bias */
    uint64_t bytes_after;
    double error; /* ‖W − dequantized‖ / ‖W‖; in a plan what is expected, NaN where nothing was
                     looked at */
};

/* How far the work is.  Bytes are those of the input's tensors; where matrices are looked at
 * before they are written, that is a phase of its own. */
struct fq_quantize_progress {
    enum {
        FQ_QUANTIZE_MEASURE,
        FQ_QUANTIZE_WRITE
    } phase;
    uint64_t bytes_done, bytes_total; /* of the phase */
    uint64_t bytes_kept;              /* of bytes_done: no work, an earlier run did it, say */
    size_t layers_done, layers;       /* of the phase */
    /* The whole job, in what a byte costs that is written: what the phases before this one did,
     * what a byte costs in this one, and what is to come after it. */
    double work_before, work_a_byte, work_after;
    const struct fq_quantized_layer *layer; /* of FQ_QUANTIZE_WRITE, else NULL; NULL after others */
};

/* Why a scheme was chosen for matrices that share one. */
struct fq_quantize_explanation {
    const char *const *names;
    size_t count;
    const struct fq_choose_step *steps; /* of --group auto, else NULL */
    size_t step_count;
    enum fq_choose_stop stop; /* of alpha's walk, */
    size_t walked;            /* and where it stopped */
    /* Of a budget, or as many as steps for a unit that the second step of auto chooses for, too;
     * else NULL. */
    const struct fq_choose_option *options;
    size_t option_count;
    size_t chosen; /* of steps or options */
};

/* What a budget, and the second step of --group auto, minimise the sum of, over matrices of N by K
 * with the relative error e. */
enum fq_loss {
    FQ_LOSS_SQUARES, /* √(N·K)·e² */
    FQ_LOSS_ERROR    /* e */
};

struct fq_quantize_options {
    int bits;        /* 8, 4 or 3; 0: the budget chooses, 4 without one */
    unsigned widths; /* what a budget may choose from, where bits are 0: 1 << 8 and so on; 0: all */
    int64_t group;   /* a multiple of 16, 0 for per channel, or FQ_QUANTIZE_GROUP_AUTO */
    int64_t min_group;                /* of auto */
    double alpha;                     /* of auto: 0 ≤ alpha < 1 */
    struct fq_quantize_method method; /* asymmetric: where it pays */
    uint64_t budget;                  /* bytes of all tensors written; 0: none */
    double bits_per_weight;           /* the same, of the quantized weights; 0: none */
    enum fq_loss loss;                /* of either, and of auto */
    const struct fq_quantize_rule *rules;
    size_t rule_count;
    uint64_t shard_bytes; /* a new file is begun where this would be passed */
    bool dry_run;         /* plan, look at every weight, report each layer, write nothing */

    /* Each may be NULL; all on the caller's thread.  progress: not 0 ends the work with
     * -FQ_CANCELLED, and what is finished is kept for the next run.  problem: one of
     * several matrices that cannot be quantized; the work fails after the last. */
    int (*progress)(void *context, const struct fq_quantize_progress *progress);
    void (*explain)(void *context, const struct fq_quantize_explanation *explanation);
    void (*problem)(void *context, const char *message);
    void *context;
};

struct fq_quantize_summary {
    size_t layers, kept_dense, asymmetric;
    size_t uneven;   /* K no multiple of the group: vLLM refuses those */
    size_t unsuited; /* tensors left dense: transposed, or of other types than F32, F16, BF16 */
    size_t unusual;  /* 3 bits, or groups that vLLM's GPU kernels lack */
    int64_t weights; /* quantized ones */
    uint64_t bytes_before, bytes_after;     /* of the quantized layers' weights */
    uint64_t tensors_before, tensors_after; /* of all tensors, in bytes */
    double error;                           /* summed over the layers written now */
    size_t poor;                            /* layers written now that keep FQ_QUANTIZE_POOR */
    size_t shards, shards_kept;             /* kept: finished by an earlier run */
    bool resumable;                         /* it failed, and what is finished waits for the next */
    bool budgeted;                          /* the rest holds under a budget */
    uint64_t allowed;                       /* for the quantized weights */
    double expected;                        /* summed error of the choice, as measured for it */
    size_t measured_before;                 /* layers whose candidates an earlier run measured */
    struct fq_choose_uniform uniform;       /* the best of one width and group size */
};

/*
 * Quantizes the checkpoint IN into the directory OUT, which must not exist.  Other tensors are
 * copied as they are, and so are the tokenizer's and other small files beside them.  OUT appears
 * complete and synced, or not at all; until then it is OUT.partial, which the same call goes on
 * with.  A failure removes that, a kill or -FQ_CANCELLED does not.
 * Errors: those of fq_checkpoint_new and fq_quantize; -FQ_EXISTS; -FQ_BUSY where another process
 * fills OUT; -FQ_INVALID where OUT is within IN, IN is already quantized or has no linear layer, a
 * rule matches nothing, or the budget is too small; -FQ_IO; -FQ_CANCELLED.
 */
int fq_quantize_checkpoint(const char *in, const char *out,
                           const struct fq_quantize_options *options,
                           struct fq_quantize_summary *summary, struct fq_error *err);

struct fq_checkpoint;
/*
 * The dense weights, within the checkpoint they came from, of the matrix that was written as
 * NAME: a tensor of that name, or the expert's slice of a three-dimensional one.  -FQ_NOT_FOUND
 * where there is none of n by k.
 */
int fq_quantize_original(const struct fq_checkpoint *checkpoint, const char *name, int64_t n,
                         int64_t k, struct fq_dense *out);

#endif
