/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A model of synthetic weights, and one decode step's products through it: how
 * they are queued, timed against a plain read, and checked.
 *
 * Within a layer each product takes what the one before it wrote; a layer begins
 * with an input of its own, as after a layer norm, so that values stay in range.
 * Every product has memory of its own for Y.
 */
#ifdef HAVE_CONFIG_H
#include <config.h>
#endif

#include "bench-model.h"
#include "half.h"
#include "synthetic.h"

#ifdef HAVE_CUDA
#include "bench-cuda.h"
#endif

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define TURNS       9 /* steps and reads on the host */
#define CHECK_COLS  16
#define HOST_READ   ((uint64_t)512 << 20) /* memory that a longer read goes round */
#define DEVICE_READ ((uint64_t)4 << 30)
#define SINK        256 /* bytes that a read may write to */

/* A product in one layer of one copy. */
struct bench_place {
    struct fq_weights *weights, *gate; /* owned; gate NULL without one */
    uint64_t y_at;                     /* of its Y, in elements for one row */
};

static struct fq_matrix shape_of(const struct bench_model *model,
                                 const struct bench_product *product) {
    return (struct fq_matrix){.n = product->n,
                              .k = product->k,
                              .bits = model->spec.bits,
                              .group = model->spec.group ? model->spec.group : product->k,
                              .scale_type = model->spec.dtype == FQ_BF16 ? FQ_BF16 : FQ_F16};
}

/* Every matrix is another one: the seed of a place's weights; the next is that of its gate. */
static uint64_t seed_of(size_t place) {
    return 2 * place + 1;
}

static int make_weights(struct bench_model *model, struct fq_error *err) {
    size_t products = (size_t)model->spec.arch->product_count;
    size_t wanted = (size_t)model->copies * (size_t)model->spec.layers * products;
    int64_t y_at = 0;
    int status = 0;

    model->places = calloc(wanted, sizeof *model->places);
    if (!model->places)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for %zu matrices' descriptions", wanted);
    while (model->place_count < wanted && status == 0) {
        size_t at = model->place_count++;
        struct bench_place *place = &model->places[at];
        const struct bench_product *product = &model->spec.arch->products[at % products];
        struct fq_matrix shape = shape_of(model, product);

        place->y_at = (uint64_t)y_at;
        y_at += product->n;
        status = fq_weights_synthetic(model->backend, &shape, seed_of(at), &place->weights, err);
        if (status == 0 && product->gated)
            status =
                fq_weights_synthetic(model->backend, &shape, seed_of(at) + 1, &place->gate, err);
    }
    return status;
}

static enum fq_memory_kind memory_kind(const struct bench_model *model) {
    return model->device.device_memory ? FQ_MEMORY_DEVICE : FQ_MEMORY_HOST;
}

static uint64_t x_bytes(const struct bench_model *model) {
    const struct bench_model_spec *spec = &model->spec;

    return (uint64_t)(spec->m_max * spec->arch->products[0].k) * fq_dtype_size((int)spec->dtype);
}

static uint64_t y_bytes(const struct bench_model *model) {
    const struct bench_model_spec *spec = &model->spec;

    return (uint64_t)(spec->m_max * model->y_row * model->copies) * fq_dtype_size((int)spec->dtype);
}

static int make_activations(struct bench_model *model, struct fq_error *err) {
    const struct bench_model_spec *spec = &model->spec;
    int64_t k = spec->arch->products[0].k;
    void *image = malloc(x_bytes(model));
    int status;

    if (!image)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for %lld rows", (long long)spec->m_max);
    for (int64_t i = 0; i < spec->m_max * k; i++)
        fq_store(image, (int)spec->dtype, (size_t)i,
                 fq_synthetic_value(0, i / k, i % k, spec->dtype));
    status = fq_memory_new(model->backend, memory_kind(model), x_bytes(model), &model->x, err);
    if (status == 0)
        status = fq_memory_new(model->backend, memory_kind(model), y_bytes(model), &model->y, err);
    if (status == 0)
        status = fq_memory_write(model->x, 0, image, x_bytes(model), err);
    free(image);
    return status;
}

/* Bytes of the read's memory for steps of up to `bytes`: copies of it, or a part to go round. */
static uint64_t plain_bytes(const struct bench_model *model, uint64_t bytes) {
    uint64_t most = model->device.device_memory ? DEVICE_READ : HOST_READ;
    uint64_t stride = (bytes + 255) / 256 * 256;

    if (stride > most / 2)
        return most;
    return stride * (((uint64_t)model->spec.rotate_mib << 20) / stride + 2);
}

static uint64_t step_bytes(const struct bench_model *model, int64_t m) {
    const struct bench_model_spec *spec = &model->spec;
    uint64_t elements = 0;

    for (int i = 0; i < spec->arch->product_count; i++)
        elements += (uint64_t)(spec->arch->products[i].n + spec->arch->products[i].k);
    return model->weight_bytes +
           (uint64_t)(m * spec->layers) * elements * fq_dtype_size((int)spec->dtype);
}

void bench_step_init(struct bench_step *step, struct bench_model *model, int64_t m) {
    *step = (struct bench_step){model, m, step_bytes(model, m)};
}

/* Sizes of everything, and whether it fits into what is free. */
static int plan(struct bench_model *model, struct fq_error *err) {
    const struct bench_model_spec *spec = &model->spec;
    uint64_t rotate = (uint64_t)spec->rotate_mib << 20, needed;

    for (int i = 0; i < spec->arch->product_count; i++) {
        const struct bench_product *product = &spec->arch->products[i];
        struct fq_matrix shape = shape_of(model, product);
        int status = fq_matrix_check(&shape, err);

        if (status)
            return status;
        model->weight_bytes += (uint64_t)spec->layers * (product->gated ? 2 : 1) *
                               fq_weights_size(model->backend, &shape);
        model->y_row += spec->layers * product->n;
    }
    model->copies = model->weight_bytes > 2 * rotate ? 1 : (int)(rotate / model->weight_bytes) + 2;
    needed = model->weight_bytes * (uint64_t)model->copies + x_bytes(model) + y_bytes(model) +
             plain_bytes(model, step_bytes(model, spec->m_max));
    if (needed > model->device.memory_free)
        return fq_fail(
            err, FQ_NO_MEMORY,
            "%lld layers of %s with %d bits need %.1f GB on %s, of which %.1f GB are free",
            (long long)spec->layers, spec->arch->name, spec->bits, (double)needed / 1e9,
            model->device.name, (double)model->device.memory_free / 1e9);
    return 0;
}

static int make_plain(struct bench_model *model, struct fq_error *err) {
    uint64_t bytes = plain_bytes(model, step_bytes(model, model->spec.m_max));
    int status =
        fq_memory_new(model->backend, memory_kind(model), bytes + SINK, &model->plain, err);

#ifdef HAVE_CUDA
    cudaStream_t stream = fq_stream_native(model->stream);
    if (status == 0 && stream)
        status = bench_cuda_check(bench_cuda_fill(fq_memory_address(model->plain), 1,
                                                  (int64_t)(bytes / 2), FQ_F16, 0, 1, stream),
                                  "fill the memory to read", err);
#endif
    return status;
}

/* ---- A step ---------------------------------------------------------------------------------- */

/* Where a place's Y lies, from the start of all of them, in bytes. */
static uint64_t y_offset(const struct bench_model *model, const struct bench_place *place) {
    return place->y_at * (uint64_t)model->spec.m_max * fq_dtype_size((int)model->spec.dtype);
}

static struct fq_gemm gemm_of(const struct bench_step *step, const struct bench_place *place,
                              int index) {
    const struct bench_model *model = step->model;
    const struct bench_product *products = model->spec.arch->products, *product = &products[index];
    uint8_t *y = fq_memory_address(model->y);
    struct fq_gemm gemm = {.weights = place->weights,
                           .type = model->spec.dtype,
                           .m = step->m,
                           .x = fq_memory_address(model->x),
                           .y = y + y_offset(model, place),
                           .x_stride = product->k,
                           .y_stride = product->n,
                           .host = !model->device.device_memory};

    if (product->from >= 0) {
        gemm.x = y + y_offset(model, place - index + product->from);
        gemm.x_stride = products[product->from].n;
    }
    if (product->gated && model->fused) {
        gemm.gate = place->gate;
        gemm.activation = FQ_ACTIVATION_SILU;
    }
    return gemm;
}

/* Gives all products of a step to the stream; `call` picks the copy. */
static int queue_step(void *context, int call, struct fq_error *err) {
    const struct bench_step *step = context;
    struct bench_model *model = step->model;
    int products = model->spec.arch->product_count;
    size_t count = (size_t)(model->spec.layers * products);
    const struct bench_place *places = &model->places[(size_t)(call % model->copies) * count];
    int status = 0;

    for (size_t i = 0; i < count && status == 0; i++) {
        struct fq_gemm gemm = gemm_of(step, &places[i], (int)i % products);

        status = fq_gemm(model->stream, &gemm, err);
        if (status || gemm.gate || !places[i].gate)
            continue;
        gemm.weights = places[i].gate; /* the second of two products, over the first one's Y */
        status = fq_gemm(model->stream, &gemm, err);
    }
    return status;
}

/* ---- Making a model -------------------------------------------------------------------------- */

/* Whether the backend takes a gate: a step shows it. */
static int try_fusing(struct bench_model *model, struct fq_error *err) {
    struct bench_step step;
    int status;

    model->fused = true;
    bench_step_init(&step, model, 1);
    status = queue_step(&step, 0, err);
    if (status == -FQ_UNSUPPORTED) {
        model->fused = false;
        status = queue_step(&step, 0, err);
    }
    if (status == 0)
        status = fq_event_record(model->event, model->stream, err);
    return status ? status : fq_event_wait(model->event, err);
}

void bench_model_fini(struct bench_model *model) {
    for (size_t i = 0; i < model->place_count; i++) {
        fq_weights_free(model->places[i].weights);
        fq_weights_free(model->places[i].gate);
    }
    free(model->places);
    fq_memory_free(model->plain);
    fq_memory_free(model->y);
    fq_memory_free(model->x);
    fq_event_free(model->event);
    fq_stream_free(model->stream);
    fq_backend_free(model->backend);
}

int bench_model_init(struct bench_model *model, const struct bench_model_spec *spec,
                     struct fq_error *err) {
    int status;

    *model = (struct bench_model){.spec = *spec};
    status = fq_backend_new(spec->backend, NULL, &model->backend, err);
    if (status == 0)
        status = fq_backend_info(model->backend, &model->device, err);
    if (status == 0)
        status = fq_stream_new(model->backend, &model->stream, err);
    if (status == 0)
        status = fq_event_new(model->backend, &model->event, err);
    if (status == 0)
        status = plan(model, err);
    if (status == 0)
        status = make_weights(model, err);
    if (status == 0)
        status = make_activations(model, err);
    if (status == 0)
        status = make_plain(model, err);
    return status ? status : try_fusing(model, err);
}

int bench_step_error(const struct bench_step *step, double *error, struct fq_error *err) {
    const struct bench_model *model = step->model;
    int index = model->spec.arch->product_count - 1, type = (int)model->spec.dtype;
    const struct bench_product *products = model->spec.arch->products, *product = &products[index];
    size_t last = (size_t)model->spec.layers * (size_t)(index + 1) - 1;
    const struct bench_place *place = &model->places[last];
    struct fq_matrix shape = shape_of(model, product);
    uint64_t x_row = (uint64_t)products[product->from].n * fq_dtype_size(type);
    uint64_t y_row = (uint64_t)product->n * fq_dtype_size(type), row = (uint64_t)step->m - 1;
    uint64_t x_at = y_offset(model, place - index + product->from) + row * x_row;
    void *x = malloc(x_row), *y = malloc(y_row);
    double *w = malloc((size_t)product->k * sizeof *w), difference = 0, norm = 0;
    int status = 0;

    if (!x || !y || !w)
        status = fq_fail(err, FQ_NO_MEMORY, "no memory for a row");
    if (status == 0)
        status = fq_memory_read(model->y, x_at, x, x_row, err);
    if (status == 0)
        status = fq_memory_read(model->y, y_offset(model, place) + row * y_row, y, y_row, err);
    for (int i = 0; i < CHECK_COLS && status == 0; i++) {
        int64_t n = i * product->n / CHECK_COLS;
        struct fq_matrix *matrix;
        double sum = 0;

        status = fq_synthetic_new(&shape, seed_of(last), n, 1, &matrix, err);
        if (status)
            break;
        fq_matrix_dequantize_row(matrix, 0, w);
        fq_synthetic_free(matrix);
        for (int64_t k = 0; k < product->k; k++)
            sum += (double)fq_load(x, type, (size_t)k) * w[k];
        difference += pow((double)fq_load(y, type, (size_t)n) - sum, 2);
        norm += sum * sum;
    }
    *error = sqrt(difference / norm);
    free(w);
    free(y);
    free(x);
    return status;
}

/* ---- Timing ---------------------------------------------------------------------------------- */

/* Part `at` of a read of `bytes`, which goes round the memory where that is smaller: its offset,
 * and how long it is. */
static uint64_t read_part(const struct bench_model *model, uint64_t bytes, int call, uint64_t at,
                          uint64_t *length) {
    uint64_t room = fq_memory_bytes(model->plain) - SINK, stride = (bytes + 255) / 256 * 256;

    *length = bytes - at < room ? bytes - at : room;
    return stride > room ? 0 : (uint64_t)call % (room / stride) * stride;
}

static int time_on_host(struct bench_step *step, double *us, double *read_us,
                        struct fq_error *err) {
    struct bench_samples steps = {0}, reads = {0};
    struct bench_model *model = step->model;
    int status = 0;

    for (int turn = 0; turn < TURNS && status == 0; turn++) {
        double start = bench_now_us();

        status = queue_step(step, turn, err);
        if (status == 0)
            status = bench_samples_add(&steps, bench_now_us() - start, err);
        start = bench_now_us();
        for (uint64_t at = 0, length; at < step->bytes; at += length) {
            uint64_t from = read_part(model, step->bytes, turn, at, &length);

            model->read_sum += bench_read((uint8_t *)fq_memory_host(model->plain) + from, length,
                                          model->device.threads);
        }
        if (status == 0)
            status = bench_samples_add(&reads, bench_now_us() - start, err);
    }
    *us = bench_samples_at(&steps, 0.5);
    *read_us = bench_samples_at(&reads, 0.5);
    bench_samples_fini(&steps);
    bench_samples_fini(&reads);
    return status;
}

#ifdef HAVE_CUDA
static int queue_read(void *context, int call, struct fq_error *err) {
    const struct bench_step *step = context;
    const struct bench_model *model = step->model;
    cudaStream_t stream = fq_stream_native(model->stream);
    uint8_t *plain = fq_memory_address(model->plain);
    unsigned *sink = (unsigned *)(plain + fq_memory_bytes(model->plain) - SINK);
    uint64_t bytes = (step->bytes + 15) / 16 * 16;
    int status = 0;

    for (uint64_t at = 0, length; at < bytes && status == 0; at += length) {
        uint64_t from = read_part(model, bytes, call, at, &length);

        status = bench_cuda_check(bench_cuda_read(plain + from, length, sink, stream),
                                  "launch the plain read", err);
    }
    return status;
}

static int time_graphs(struct bench_step *step, double *us, double *read_us, struct fq_error *err) {
    struct bench_contender contenders[] = {
        {.queue = queue_step, .context = step, .rotation = step->model->copies},
        {.queue = queue_read, .context = step, .rotation = 1},
    };
    cudaStream_t stream = fq_stream_native(step->model->stream);
    double times[2];
    int status = bench_contender_capture(&contenders[0], stream, err);

    if (status == 0)
        status = bench_contender_capture(&contenders[1], stream, err);
    if (status == 0) /* NaN: what is checked later, the graphs must have written */
        status = bench_cuda_check(cudaMemsetAsync(fq_memory_address(step->model->y), 0xff,
                                                  fq_memory_bytes(step->model->y), stream),
                                  "clear Y", err);
    if (status == 0)
        status = bench_contenders_time(contenders, 2, stream, times, NULL, err);
    bench_contender_fini(&contenders[0]);
    bench_contender_fini(&contenders[1]);
    if (status == 0) {
        *us = times[0];
        *read_us = times[1];
    }
    return status;
}
#endif

int bench_step_time(struct bench_step *step, double *us, double *read_us, struct fq_error *err) {
#ifdef HAVE_CUDA
    if (fq_stream_native(step->model->stream))
        return time_graphs(step, us, read_us, err);
#endif
    return time_on_host(step, us, read_us, err);
}
