/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Streams of the CUDA backend, and how a struct fq_gemm becomes launches: which
 * kernel, its shares of the work, row pointers, and the staging of rows that do
 * not lie as the kernel wants them.  Queues only: nothing here waits for the GPU,
 * but for the scratch memory's growth.
 *
 * X in host memory is always staged: every CTA reads all of X, and host memory
 * is not cached on the device.  Y is written once and a residual read once, so on
 * the decode path they stay on the host, and so does a residual on the other.
 */
#include "cuda-impl.h"
#include "plan.h"
#include "tiles.h"

#include <cudaTypedefs.h>
#include <stdlib.h>
#include <string.h>

#define STAGING_BYTES                                                                              \
    ((int64_t)64 << 20) /* X and Y of a chunk of host rows, unless rows are long */
#define STAGING_ROWS ((int64_t)FQ_CUDA_PREFILL_BLOCK) /* a chunk has at least these */

void fq_cuda_stream_free(struct fq_stream *base) {
    struct fq_cuda_stream *stream = (struct fq_cuda_stream *)base;

    (void)fq_cuda_use(base->backend, NULL);
    if (stream->stream) {
        (void)cudaStreamSynchronize(stream->stream);
        (void)cudaStreamDestroy(stream->stream);
    }
    (void)cudaFree(stream->partials);
    (void)cudaFree(stream->counters);
    (void)cudaFree(stream->scratch);
    (void)cudaGetLastError();
    free(stream);
}

int fq_cuda_stream_new(struct fq_backend *backend, struct fq_stream **out, struct fq_error *err) {
    int processors = ((struct fq_cuda_backend *)backend)->processors;
    size_t counters = (size_t)fq_cuda_counters(processors) * sizeof(unsigned);
    struct fq_cuda_stream *stream;
    void *memory;
    int status;

    status = fq_cuda_use(backend, err);
    if (status < 0)
        return status;
    stream = calloc(1, sizeof *stream);
    if (!stream)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for a stream");
    stream->base.backend = backend;
    status = fq_cuda_check(cudaStreamCreateWithFlags(&stream->stream, cudaStreamNonBlocking), err,
                           "create a CUDA stream");
    if (status < 0)
        goto fail;
    status = fq_cuda_check(
        cudaMalloc(&memory, (size_t)fq_cuda_slots(processors) * FQ_CUDA_PARTIAL_BYTES), err,
        "allocate a stream's partial sums");
    if (status < 0)
        goto fail;
    stream->partials = memory;
    status = fq_cuda_check(cudaMalloc(&memory, counters), err, "allocate a stream's counters");
    if (status < 0)
        goto fail;
    stream->counters = memory;
    status = fq_cuda_check(cudaMemsetAsync(stream->counters, 0, counters, stream->stream), err,
                           "clear a stream's counters");
    if (status < 0)
        goto fail;
    *out = &stream->base;
    return 0;
fail:
    fq_cuda_stream_free(&stream->base);
    return status;
}

void *fq_cuda_stream_native(struct fq_stream *stream) {
    return ((struct fq_cuda_stream *)stream)->stream;
}

static int grow_scratch(struct fq_cuda_stream *stream, uint64_t bytes, struct fq_error *err) {
    void *memory;
    int status;

    if (bytes <= stream->scratch_bytes)
        return 0;
    status = fq_cuda_check(cudaStreamSynchronize(stream->stream), err, "finish earlier work");
    if (status < 0)
        return status;
    (void)cudaFree(stream->scratch);
    stream->scratch = NULL;
    stream->scratch_bytes = 0;
    status = fq_cuda_check(cudaMalloc(&memory, bytes), err, "allocate staging for host rows");
    if (status < 0)
        return status;
    stream->scratch = memory;
    stream->scratch_bytes = bytes;
    return 0;
}

static int64_t align_row(int64_t elements) {
    return (elements + 7) / 8 * 8; /* 16 bytes */
}

static bool aligned(const void *address) {
    return ((uintptr_t)address & 15) == 0;
}

/* From one row to the next, in elements, by the first two. */
static int64_t row_distance(const void *const *rows) {
    return ((const uint8_t *)rows[1] - (const uint8_t *)rows[0]) / 2;
}

#define FARTHEST_ROWS ((int64_t)1 << 38) /* elements; the copy engine's limit is 2^40 bytes */

/* Whether rows, two at least, lie as the copy engine can take them: in order, equally far apart. */
static bool are_mappable(const void *const *rows, int count, int64_t columns) {
    const int64_t distance = row_distance(rows);

    if (!aligned(rows[0]) || distance % 8 || distance < columns || distance > FARTHEST_ROWS)
        return false;
    for (int i = 2; i < count; i++)
        if ((const uint16_t *)rows[i] != (const uint16_t *)rows[i - 1] + distance)
            return false;
    return true;
}

/* Rows [0, m) by base and stride become row pointers where the decode path wants them. */
static void set_rows(struct fq_cuda_launch *launch, int m, const void *x, int64_t x_stride, void *y,
                     int64_t y_stride, const void *residual, int64_t residual_stride) {
    launch->m = m;
    launch->x = x;
    launch->y = y;
    launch->residual = residual;
    launch->x_stride = x_stride;
    launch->y_stride = y_stride;
    launch->residual_stride = residual_stride;
    for (int i = 0; i < m && m <= FQ_DECODE_ROWS; i++) {
        launch->x_rows[i] = (const uint16_t *)x + i * x_stride;
        launch->y_rows[i] = (uint16_t *)y + i * y_stride;
        launch->residual_rows[i] =
            residual ? (const uint16_t *)residual + i * residual_stride : NULL;
    }
}

/* ---- Which kernel, and its shares ----------------------------------------------------------- */

static int64_t greatest_common_divisor(int64_t a, int64_t b) {
    while (b) {
        const int64_t rest = a % b;

        a = b;
        b = rest;
    }
    return a;
}

/* The least multiple of `steps` that is whole groups of a matrix. */
static int64_t whole_groups(const struct fq_cuda_matrix *w, int64_t steps) {
    if (w->groups == 1)
        return steps;
    return steps / greatest_common_divisor(steps, w->group_steps) * w->group_steps;
}

static int groups_in(const struct fq_cuda_matrix *w, int tiles) {
    return w->groups == 1 ? 0 : tiles * FQ_CUDA_STEPS / w->group_steps;
}

/* Parts a CTA's tiles in thirds, of a run of so many strips, where they are to be: shares.h. */
static void share_tiles(struct fq_cuda_launch *launch, int run) {
    const struct fq_cuda_matrix *w = &launch->w, *gate = launch->gate.codes ? &launch->gate : NULL;
    const int most = fq_cuda_decode_most_tiles(w->tiles);
    int64_t steps = whole_groups(w, 2 * FQ_CUDA_STEPS); /* an even number of tiles */
    int third;

    launch->third = launch->third_groups = launch->gate_third_groups = 0;
    if (gate)
        steps = whole_groups(gate, steps);
    if (run > (gate || w->bits == 8 ? 1 : FQ_CUDA_THIRDS_STRIPS) ||
        steps > (int64_t)most * FQ_CUDA_STEPS)
        return;
    third = fq_cuda_decode_third(w->tiles, (int)steps / FQ_CUDA_STEPS);
    if (third * run >= most) /* of groups so large, a warpgroup to each strip does as well */
        return;
    launch->third = third;
    launch->third_groups = groups_in(w, launch->third);
    if (gate)
        launch->gate_third_groups = groups_in(gate, launch->third);
}

/* Deals the strips of W out: shares.h. */
static void share_strips(struct fq_cuda_launch *launch, int clusters) {
    int strips = launch->w.strips, most, run;

    most = FQ_CUDA_DECODE_GROUPS *
           (launch->gate.codes || launch->m > FQ_CUDA_SLOTS_ROWS ? 1 : FQ_CUDA_DECODE_SLOTS);
    launch->clusters = strips < clusters ? strips : clusters;
    launch->strips_each = strips / launch->clusters;
    launch->strips_longer = strips % launch->clusters;
    run = launch->strips_each + (launch->strips_longer > 0);
    launch->blocks = (run + most - 1) / most;
    launch->block_strips = (run + launch->blocks - 1) / launch->blocks;
    share_tiles(launch, run);
}

/* X or Y, m rows of some columns, as the copy engine sees it: boxes of 64 columns by some rows. */
static int map_rows(const void *data, int m, int columns, int64_t row_stride, int box_rows,
                    CUtensorMap *map, struct fq_error *err) {
    const cuuint64_t size[2] = {(cuuint64_t)columns, (cuuint64_t)m};
    const cuuint64_t stride[1] = {(cuuint64_t)row_stride * 2};
    const cuuint32_t box[2] = {FQ_CUDA_TILE, (cuuint32_t)box_rows};
    const cuuint32_t step[2] = {1, 1};
    PFN_cuTensorMapEncodeTiled_v12000 encode = NULL;
    CUresult result;
    int status;

    status = fq_cuda_driver_entry("cuTensorMapEncodeTiled", 12000, &encode, err);
    if (status < 0)
        return status;
    result = encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, (void *)data, size, stride, box, step,
                    CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        return fq_fail(err, FQ_DEVICE,
                       "cannot describe %d rows of %d, %lld bytes apart: driver error %d", m,
                       columns, (long long)stride[0], (int)result);
    return 0;
}

/* X where the copy engine cannot take it from its rows: arranged in the stream's scratch memory. */
static int arrange_rows(struct fq_cuda_stream *stream, struct fq_cuda_launch *launch,
                        struct fq_error *err) {
    const struct fq_cuda_matrix *w = &launch->w;
    struct fq_cuda_arrange arrange = {.m = launch->m,
                                      .rows_padded = fq_cuda_decode_rows(launch->m),
                                      .k = w->k,
                                      .tiles = w->tiles};
    int status = grow_scratch(stream, (uint64_t)w->tiles * arrange.rows_padded * 128, err);

    if (status < 0)
        return status;
    arrange.to = stream->scratch;
    launch->arranged = stream->scratch;
    memcpy(arrange.rows, launch->x_rows, (size_t)launch->m * sizeof *launch->x_rows);
    return fq_cuda_check(fq_cuda_arrange_rows(&arrange, stream->stream), err,
                         "arrange the rows of X");
}

static int launch_hopper_decode(struct fq_cuda_stream *stream, struct fq_cuda_launch *launch,
                                struct fq_error *err) {
    const struct fq_cuda_backend *cuda = (const struct fq_cuda_backend *)stream->base.backend;
    const struct fq_cuda_matrix *w = &launch->w;
    CUtensorMap map = {0};
    int status = 0;

    share_strips(launch, cuda->processors / FQ_CUDA_DECODE_SPLIT);
    if (launch->m > FQ_CUDA_DIRECT_ROWS)
        status = launch->x_mapped
                     ? map_rows(launch->x_rows[0], launch->m, w->k, row_distance(launch->x_rows),
                                fq_cuda_decode_mapped_rows(launch->m), &map, err)
                     : arrange_rows(stream, launch, err);
    if (status < 0)
        return status;
    return fq_cuda_check((w->bits == 8 ? fq_cuda_hopper_decode_int8
                          : w->bits == 4
                              ? fq_cuda_hopper_decode_int4
                              : fq_cuda_hopper_decode_int3)(launch, &map, stream->stream),
                         err, "launch a GEMM");
}

/* Whether the prefill's results are their sums and a bias, in rows that the copy engine can store:
 * it leaves out what lies past their end, but only whole 16 bytes of it. */
static bool is_mappable(const struct fq_cuda_launch *launch) {
    return !launch->gate.codes && !launch->residual && launch->activation == FQ_ACTIVATION_NONE &&
           aligned(launch->y) && launch->y_stride % 8 == 0 && launch->w.n % 8 == 0;
}

static int launch_hopper_prefill(struct fq_cuda_stream *stream, struct fq_cuda_launch *launch,
                                 const struct fq_cuda_gemm_size *size, struct fq_error *err) {
    const struct fq_cuda_matrix *w = &launch->w;
    const struct fq_cuda_prefill_plan plan = fq_cuda_plan_prefill(size, launch->m);
    CUtensorMap maps[2] = {0};
    int status;

    launch->blocks_n = plan.blocks_n;
    launch->block_m = plan.rows;
    launch->block_strips = plan.strips;
    launch->shares = fq_cuda_share_out(plan.blocks, w->tiles, size->workers, plan.parts, plan.more);
    status = map_rows(launch->x, launch->m, w->k, launch->x_stride,
                      launch->block_m / FQ_CUDA_CLUSTER, &maps[0], err);
    if (status < 0)
        return status;
    launch->y_mapped = is_mappable(launch);
    if (launch->y_mapped)
        status = map_rows(launch->y, launch->m, w->n, launch->y_stride,
                          FQ_CUDA_STORED_ROWS(launch->block_m), &maps[1], err);
    if (status < 0)
        return status;
    return fq_cuda_check((w->bits == 8 ? fq_cuda_hopper_prefill_int8
                          : w->bits == 4
                              ? fq_cuda_hopper_prefill_int4
                              : fq_cuda_hopper_prefill_int3)(launch, maps, stream->stream),
                         err, "launch a GEMM");
}

/* Brings the rows of X into scratch memory if the copy engine cannot take them as they lie. */
static int align_rows(struct fq_cuda_stream *stream, struct fq_cuda_launch *launch,
                      struct fq_error *err) {
    const int64_t k = launch->w.k, stride = align_row(k);
    int status;

    if (aligned(launch->x) && launch->x_stride % 8 == 0)
        return 0;
    status = grow_scratch(stream, (uint64_t)launch->m * stride * 2, err);
    if (status < 0)
        return status;
    status = fq_cuda_check(cudaMemcpy2DAsync(stream->scratch, stride * 2, launch->x,
                                             launch->x_stride * 2, k * 2, (size_t)launch->m,
                                             cudaMemcpyDeviceToDevice, stream->stream),
                           err, "align the rows of X");
    launch->x = stream->scratch;
    launch->x_stride = stride;
    return status;
}

/* More than FQ_DECODE_ROWS rows: one launch, or more for what would fill its last blocks badly
 * (plan.h). */
static int launch_hopper_rows(struct fq_cuda_stream *stream, const struct fq_cuda_launch *whole,
                              struct fq_error *err) {
    const struct fq_cuda_backend *cuda = (const struct fq_cuda_backend *)stream->base.backend;
    const struct fq_cuda_gemm_size size = {
        .bits = whole->w.bits,
        .gated = whole->gate.codes != NULL,
        .strips = whole->w.strips * (whole->gate.codes ? 2 : 1),
        .tiles = whole->w.tiles,
        .workers = cuda->processors / FQ_CUDA_CLUSTER,
    };
    struct fq_cuda_launch rest = *whole;
    int status = align_rows(stream, &rest, err);

    while (status == 0 && rest.m > 0) {
        struct fq_cuda_launch launch = rest;
        const int rows = rest.m > FQ_DECODE_ROWS ? fq_cuda_plan_rows(&size, rest.m) : rest.m;

        set_rows(&launch, rows, rest.x, rest.x_stride, rest.y, rest.y_stride, rest.residual,
                 rest.residual_stride);
        if (rows > FQ_DECODE_ROWS) {
            status = launch_hopper_prefill(stream, &launch, &size, err);
        } else {
            launch.x_mapped =
                rows > FQ_CUDA_DIRECT_ROWS && are_mappable(launch.x_rows, rows, launch.w.k);
            status = launch_hopper_decode(stream, &launch, err);
        }
        rest.m -= rows;
        rest.x = (const uint16_t *)rest.x + rows * rest.x_stride;
        rest.y = (uint16_t *)rest.y + rows * rest.y_stride;
        if (rest.residual)
            rest.residual = (const uint16_t *)rest.residual + rows * rest.residual_stride;
    }
    return status;
}

static int launch_gemm(struct fq_cuda_stream *stream, struct fq_cuda_launch *launch,
                       struct fq_error *err) {
    const struct fq_cuda_backend *cuda = (const struct fq_cuda_backend *)stream->base.backend;
    const struct fq_cuda_matrix *w = &launch->w;
    int n = launch->gate.codes ? 2 * w->n : w->n;
    cudaError_t error;

    if (cuda->hopper && launch->m <= FQ_DECODE_ROWS)
        return launch_hopper_decode(stream, launch, err);
    if (cuda->hopper && w->k >= fq_cuda_exact_below(launch->type))
        return launch_hopper_rows(stream, launch, err);
    if (launch->m > FQ_DECODE_ROWS) {
        launch->splits = fq_cuda_prefill_splits(n, launch->m, w->tiles, cuda->processors);
        error = fq_cuda_prefill(launch, stream->stream);
    } else {
        launch->splits = fq_cuda_decode_splits(n, w->tiles, cuda->processors);
        error = w->bits == 8   ? fq_cuda_decode_int8(launch, stream->stream)
                : w->bits == 4 ? fq_cuda_decode_int4(launch, stream->stream)
                               : fq_cuda_decode_int3(launch, stream->stream);
    }
    return fq_cuda_check(error, err, "launch a GEMM");
}

/* ---- Rows
 * ------------------------------------------------------------------------------------------ */

/* launch has its row pointers: X's rows are gathered on the device. */
static int decode_gathered(struct fq_cuda_stream *stream, struct fq_cuda_launch *launch,
                           struct fq_error *err) {
    struct fq_cuda_gather gather = {
        .stride = align_row(launch->w.k), .count = launch->w.k, .m = launch->m};
    int status;

    status = grow_scratch(stream, (uint64_t)gather.m * gather.stride * 2, err);
    if (status < 0)
        return status;
    gather.to = (uint16_t *)stream->scratch;
    for (int i = 0; i < launch->m; i++) {
        gather.rows[i] = launch->x_rows[i];
        launch->x_rows[i] = gather.to + i * gather.stride;
    }
    status =
        fq_cuda_check(fq_cuda_gather_rows(&gather, stream->stream), err, "gather the rows of X");
    if (status < 0)
        return status;
    return launch_gemm(stream, launch, err);
}

static int decode(struct fq_cuda_stream *stream, struct fq_cuda_launch *launch, bool host,
                  struct fq_error *err) {
    bool hopper = ((const struct fq_cuda_backend *)stream->base.backend)->hopper;
    bool gather = host;

    if (hopper && launch->m > FQ_CUDA_DIRECT_ROWS) { /* the kernel takes them wherever they lie */
        launch->x_mapped = !host && are_mappable(launch->x_rows, launch->m, launch->w.k);
        return launch_gemm(stream, launch, err);
    }
    for (int i = 0; hopper && i < launch->m; i++)
        gather |= !aligned(launch->x_rows[i]);
    return gather ? decode_gathered(stream, launch, err) : launch_gemm(stream, launch, err);
}

static int prefill_from_host(struct fq_cuda_stream *stream, struct fq_cuda_launch *launch,
                             const struct fq_gemm *gemm, struct fq_error *err) {
    int64_t n = launch->w.n, k = launch->w.k;
    int64_t x_stride = align_row(k), y_stride = align_row(n);
    int64_t rows = STAGING_BYTES / ((x_stride + y_stride) * 2);
    uint16_t *x, *y;
    int status;

    rows = rows < STAGING_ROWS ? STAGING_ROWS : rows / STAGING_ROWS * STAGING_ROWS;
    rows = rows < gemm->m ? rows : gemm->m;
    status = grow_scratch(stream, (uint64_t)rows * (x_stride + y_stride) * 2, err);
    if (status < 0)
        return status;
    x = (uint16_t *)stream->scratch;
    y = x + rows * x_stride;
    for (int64_t row = 0; row < gemm->m; row += rows) {
        int m = (int)(gemm->m - row < rows ? gemm->m - row : rows);

        status = fq_cuda_check(
            cudaMemcpy2DAsync(x, x_stride * 2, (const uint16_t *)gemm->x + row * gemm->x_stride,
                              gemm->x_stride * 2, k * 2, m, cudaMemcpyDefault, stream->stream),
            err, "stage host rows");
        if (status < 0)
            return status;
        set_rows(launch, m, x, x_stride, y, y_stride,
                 gemm->residual ? (const uint16_t *)gemm->residual + row * gemm->residual_stride
                                : NULL,
                 gemm->residual_stride);
        launch->x_mapped = true; /* the rest, if it goes to decode: in order, equally far apart */
        status = launch_gemm(stream, launch, err);
        if (status < 0)
            return status;
        status = fq_cuda_check(cudaMemcpy2DAsync((uint16_t *)gemm->y + row * gemm->y_stride,
                                                 gemm->y_stride * 2, y, y_stride * 2, n * 2, m,
                                                 cudaMemcpyDefault, stream->stream),
                               err, "bring host rows back");
        if (status < 0)
            return status;
    }
    return 0;
}

int fq_cuda_gemm(struct fq_stream *base, const struct fq_gemm *gemm, struct fq_error *err) {
    struct fq_cuda_stream *stream = (struct fq_cuda_stream *)base;
    struct fq_cuda_launch launch;
    int status;

    status = fq_cuda_use(base->backend, err);
    if (status < 0)
        return status;
    launch.w = ((const struct fq_cuda_weights *)gemm->weights)->matrix;
    launch.gate.codes = NULL;
    if (gemm->gate)
        launch.gate = ((const struct fq_cuda_weights *)gemm->gate)->matrix;
    launch.partials = stream->partials;
    launch.counters = stream->counters;
    launch.bias = gemm->bias;
    launch.gate_bias = gemm->gate_bias;
    launch.bias_type = gemm->bias_type;
    launch.activation = gemm->activation;
    launch.type = gemm->type;
    set_rows(&launch, (int)gemm->m, gemm->x, gemm->x_stride, gemm->y, gemm->y_stride,
             gemm->residual, gemm->residual_stride);
    if (gemm->x_rows) {
        memcpy(launch.x_rows, gemm->x_rows, (size_t)gemm->m * sizeof *gemm->x_rows);
        memcpy(launch.y_rows, gemm->y_rows, (size_t)gemm->m * sizeof *gemm->y_rows);
    }
    if (gemm->residual_rows)
        memcpy(launch.residual_rows, gemm->residual_rows,
               (size_t)gemm->m * sizeof *gemm->residual_rows);
    if (gemm->m <= FQ_DECODE_ROWS)
        return decode(stream, &launch, gemm->host, err);
    return gemm->host ? prefill_from_host(stream, &launch, gemm, err)
                      : launch_gemm(stream, &launch, err);
}
