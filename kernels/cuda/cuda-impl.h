/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the files of the CUDA backend share: its objects (host side, C) and the
 * launchers that the .cu files give to the C files.  Nothing outside this
 * folder includes it.
 */
#ifndef FQ_KERNELS_CUDA_CUDA_IMPL_H
#define FQ_KERNELS_CUDA_CUDA_IMPL_H

#ifdef __cplusplus
extern "C" {
#endif

#include "backend-impl.h"
#include "layout.h"
#include "shares.h"
#include "synthetic.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pthread.h>

/* ---- Host objects --------------------------------------------------------------------------- */

/* A cudaMalloc block that holds weights only, so that exporting it shares nothing else. */
struct fq_cuda_slab {
    struct fq_cuda_slab *next;
    uint8_t *base;
    uint64_t bytes;
    struct fq_cuda_span *spans; /* what is taken, by rising offset */
};

/* The staging area of loads: while one half is filled by the host, the other travels. */
#define FQ_CUDA_PIECE_BYTES ((uint64_t)16 << 20)

struct fq_cuda_loader {
    uint8_t *host[2];     /* page-locked, FQ_CUDA_PIECE_BYTES each; NULL until the first load */
    uint8_t *device[2];   /* the same on the device */
    cudaEvent_t moved[2]; /* the prepack of what host[i] held is done */
};

struct fq_cuda_backend {
    struct fq_backend base;
    int device;
    int processors; /* multiprocessors */
    bool hopper;    /* Hopper's own kernels run, else those for sm_80 and newer */
    struct fq_device_info info;
    cudaStream_t copies;  /* loads, and copies that the caller waits for */
    pthread_mutex_t lock; /* over slabs and loader */
    struct fq_cuda_slab *slabs;
    struct fq_cuda_loader loader;
};

struct fq_cuda_weights {
    struct fq_weights base;
    struct fq_cuda_matrix matrix;
    uint8_t *packed;
    struct fq_cuda_slab *slab; /* where it lies; NULL: imported */
    void *imported;            /* what cudaIpcOpenMemHandle gave, or NULL */
};

struct fq_cuda_stream {
    struct fq_stream base;
    cudaStream_t stream;
    float *partials;    /* split-K sums, FQ_CUDA_PARTIAL_BYTES a slot; see tiles.h */
    unsigned *counters; /* arrivals at an output tile: zero between launches */
    uint8_t *scratch;   /* staged or arranged rows of X, staged ones of Y; grows */
    uint64_t scratch_bytes;
};

struct fq_cuda_event {
    struct fq_event base;
    cudaEvent_t event;
};

/* 0, or the status that stands for a CUDA error, with its name: "cannot do: cudaErrorX (text)". */
int fq_cuda_check(cudaError_t error, struct fq_error *err, const char *what);
/* Makes the backend's device the calling thread's. */
int fq_cuda_use(const struct fq_backend *backend, struct fq_error *err);
/* Looks a function of the driver up, which the runtime does not wrap; *entry is its address. */
int fq_cuda_driver_entry(const char *name, int version, void *entry, struct fq_error *err);
/* Opens an exported allocation and finds offset..offset+bytes inside it; *base is what to close. */
int fq_cuda_ipc_open(const struct fq_memory_handle *handle, void **base, void **address,
                     struct fq_error *err);

/* memory.c */
int fq_cuda_memory_new(struct fq_backend *backend, enum fq_memory_kind kind, uint64_t bytes,
                       struct fq_memory **out, struct fq_error *err);
int fq_cuda_memory_import(struct fq_backend *backend, const struct fq_memory_handle *handle,
                          struct fq_memory **out, struct fq_error *err);
int fq_cuda_memory_export(struct fq_memory *memory, struct fq_memory_handle *handle,
                          struct fq_error *err);
void fq_cuda_memory_free(struct fq_memory *memory);
int fq_cuda_memory_copy(struct fq_memory *memory, uint64_t offset, void *host, uint64_t bytes,
                        bool to_device, struct fq_error *err);

/* weights.c */
uint64_t fq_cuda_weights_size(struct fq_backend *backend, const struct fq_matrix *matrix);
int fq_cuda_weights_new(struct fq_backend *backend, const struct fq_matrix *matrix,
                        struct fq_weights **out, struct fq_error *err);
int fq_cuda_weights_synthetic(struct fq_backend *backend, const struct fq_matrix *shape,
                              uint64_t seed, struct fq_weights **out, struct fq_error *err);
void fq_cuda_weights_free(struct fq_weights *weights);
int fq_cuda_weights_export(struct fq_weights *weights, struct fq_weights_handle *handle,
                           struct fq_error *err);
int fq_cuda_weights_import(struct fq_backend *backend, const struct fq_weights_handle *handle,
                           struct fq_weights **out, struct fq_error *err);

/* slab.c: device memory of weights.  The backend's lock is held. */
int fq_cuda_slab_take(struct fq_cuda_backend *backend, uint64_t bytes, struct fq_cuda_slab **slab,
                      uint8_t **address, struct fq_error *err);
void fq_cuda_slab_give(struct fq_cuda_backend *backend, struct fq_cuda_slab *slab,
                       uint8_t *address);

/* gemm.c */
int fq_cuda_stream_new(struct fq_backend *backend, struct fq_stream **out, struct fq_error *err);
void fq_cuda_stream_free(struct fq_stream *stream);
void *fq_cuda_stream_native(struct fq_stream *stream);
int fq_cuda_gemm(struct fq_stream *stream, const struct fq_gemm *gemm, struct fq_error *err);

/* Kernels that scale weights round each to X's type.  Of few terms the errors do not average out:
 * in bf16 they can add up to more than the bound, and in fp16 what a bias leaves of a sum can be
 * less than its errors allow.  Below so many terms, kernels that scale sums take over. */
static inline int fq_cuda_exact_below(int type) {
    return type == FQ_BF16 ? 512 : FQ_CUDA_TILE;
}

/* ---- Launchers ------------------------------------------------------------------------------ */

/* One launch of a GEMM kernel: passed by value, as a parameter. */
struct fq_cuda_launch {
    struct fq_cuda_matrix w;
    struct fq_cuda_matrix gate; /* codes NULL: no gate */
    int m;
    float *partials; /* sums of split blocks, and arrivals at each: the stream's */
    unsigned *counters;
    const void *bias, *gate_bias;
    int bias_type;  /* enum fq_dtype */
    int activation; /* enum fq_activation */
    int type;       /* FQ_F16 or FQ_BF16 */

    int splits; /* tiles.h: slices of K that CTAs of their own sum */

    int clusters, blocks; /* Hopper, decode: shares.h; blocks of each cluster */
    int block_strips; /* of a block at most, of each matrix of a pair; prefill: of a pair's both */
    int strips_each;  /* of a cluster; the first strips_longer have one more */
    int strips_longer;
    int third;                    /* tiles of a third of a CTA's, where they are parted; or 0 */
    int third_groups;             /* groups that it has of W, 0 where all of K is one group */
    int gate_third_groups;        /* and of the gate */
    struct fq_cuda_shares shares; /* Hopper, prefill */
    int slots;                    /* the launcher's: groups that a strip has in a stage, at most */
    int stages, stage_bytes;      /* the launcher's */
    int stage_tiles;              /* the decode launcher's: tiles of K in a stage, an even number */
    int parted;                   /* the decode launcher's: see decode_cta */
    int turns;                    /* the decode launcher's: stages that a third has of a block */
    int segments_log2, scaling;   /* the decode launcher's: enum class scaling */
    int block_m, blocks_n;        /* prefill: rows of X of a block; blocks along W */
    int y_mapped;                 /* prefill: Y is to be stored by its tensor map */
    int x_mapped;                 /* decode, m > FQ_CUDA_DIRECT_ROWS: X comes by its tensor map */
    const void *arranged;         /* otherwise: X by fq_cuda_arrange_rows */

    const void *x; /* m > FQ_DECODE_ROWS: base and stride in elements */
    void *y;
    const void *residual; /* or NULL */
    int64_t x_stride, y_stride, residual_stride;
    const void *x_rows[FQ_DECODE_ROWS]; /* m ≤ FQ_DECODE_ROWS: a pointer a row */
    void *y_rows[FQ_DECODE_ROWS];
    const void *residual_rows[FQ_DECODE_ROWS]; /* each NULL where there is no residual */
};

/* Queue one launch.  hopper-decode.cuh and hopper-prefill.cuh by bits; decode.cuh, prefill.cu. */
typedef cudaError_t fq_cuda_launcher(const struct fq_cuda_launch *launch, cudaStream_t stream);
/* maps: of X, where m > FQ_DECODE_ROWS or launch->x_mapped, and of Y, where launch->y_mapped. */
typedef cudaError_t fq_cuda_mapped_launcher(const struct fq_cuda_launch *launch,
                                            const CUtensorMap *maps, cudaStream_t stream);
fq_cuda_mapped_launcher fq_cuda_hopper_decode_int8, fq_cuda_hopper_decode_int4,
    fq_cuda_hopper_decode_int3, fq_cuda_hopper_prefill_int8, fq_cuda_hopper_prefill_int4,
    fq_cuda_hopper_prefill_int3;
fq_cuda_launcher fq_cuda_decode_int8, fq_cuda_decode_int4, fq_cuda_decode_int3, fq_cuda_prefill;

/* Let the kernels use the shared memory they need on the current device; once a backend. */
typedef cudaError_t fq_cuda_preparer(void);
fq_cuda_preparer fq_cuda_hopper_decode_int8_prepare, fq_cuda_hopper_decode_int4_prepare,
    fq_cuda_hopper_decode_int3_prepare, fq_cuda_hopper_prefill_int8_prepare,
    fq_cuda_hopper_prefill_int4_prepare, fq_cuda_hopper_prefill_int3_prepare;
fq_cuda_preparer fq_cuda_decode_int8_prepare, fq_cuda_decode_int4_prepare,
    fq_cuda_decode_int3_prepare, fq_cuda_prefill_prepare;
/* 1 where this build has sm_90a's machine code for the current device, else 0. */
cudaError_t fq_cuda_probe_hopper(int *answer, cudaStream_t stream);

/*
 * A piece of a canonical array in device memory: rows row0.. (a multiple of FQ_CUDA_STRIP) and
 * units unit0.. of every row, rows `stride` bytes apart.  A unit is a tile of codes, a scale or a
 * zero point. What lies beyond the matrix's n and k packs as zero.
 */
struct fq_cuda_piece {
    const uint8_t *data;
    int64_t stride;
    int row0, rows;
    int unit0, units;
};
cudaError_t fq_cuda_prepack_codes(const struct fq_cuda_matrix *matrix,
                                  const struct fq_cuda_piece *piece, cudaStream_t stream);
/* Scales (bytes 2) or zero points (bytes 1). */
cudaError_t fq_cuda_prepack_groups(const struct fq_cuda_matrix *matrix, int bytes,
                                   const struct fq_cuda_piece *piece, cudaStream_t stream);
/* After the scales: fills the matrix's struct fq_cuda_meta, which is zero before. */
cudaError_t fq_cuda_prepack_finish(const struct fq_cuda_matrix *matrix, cudaStream_t stream);
/* Fills a piece, whose data is then written, of the matrix that a seed stands for: see synthetic.h.
 */
struct fq_cuda_synthetic {
    uint64_t seed;
    int k, bits;
    int scale_bf16;
    float base; /* fq_synthetic_base of the shape */
};
cudaError_t fq_cuda_synthetic_codes(const struct fq_cuda_synthetic *from,
                                    const struct fq_cuda_piece *piece, cudaStream_t stream);
cudaError_t fq_cuda_synthetic_groups(const struct fq_cuda_synthetic *from, int bytes,
                                     const struct fq_cuda_piece *piece, cudaStream_t stream);
/* The machine code that runs: 90 for sm_90. */
cudaError_t fq_cuda_prepack_version(int *version);

/* Up to FQ_DECODE_ROWS rows of `count` two-byte elements, row i to to + i · stride; zeros between.
 */
struct fq_cuda_gather {
    const void *rows[FQ_DECODE_ROWS];
    uint16_t *to;
    int64_t stride; /* elements, a multiple of 8 */
    int64_t count;
    int m;
};
cudaError_t fq_cuda_gather_rows(const struct fq_cuda_gather *gather, cudaStream_t stream);

/*
 * Rows of X in the order of the Hopper decode kernel's stages: for each tile of 64 columns, one
 * behind the other, `rows_padded` rows as wgmma_piece() of ptx-hopper.cuh places them; zeros past
 * k.  Rows past m are left alone: no result depends on them.
 */
struct fq_cuda_arrange {
    const void *rows[FQ_DECODE_ROWS];
    uint8_t *to; /* [tiles][rows_padded][128 bytes], on 16 bytes */
    int m, rows_padded, k, tiles;
};
cudaError_t fq_cuda_arrange_rows(const struct fq_cuda_arrange *arrange, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
