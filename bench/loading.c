/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Prints what loading weights onto a GPU takes, as CSV: prepacking on the device alone, beside a
 * copy from device memory to device memory of as many bytes, and all of fq_weights_new() from
 * memory that has been read before, beside a copy of as many bytes from page-locked memory.  Least
 * of some repetitions, whose two sides are taken in turns.
 *
 *     loading
 */
#include "backend.h"
#include "cuda/cuda-impl.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define N           16384
#define K           16384
#define REPETITIONS 9

static int fail(const char *what, const char *why) {
    fprintf(stderr, "loading: cannot %s: %s\n", what, why);
    return 1;
}

static double now(void) {
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e6 + (double)time.tv_nsec * 1e-3;
}

/* What is measured: queues work on stream 0. */
typedef cudaError_t work(void *context);

/* Least microseconds of either, by events. */
static cudaError_t measure(work *ours, void *context, work *floor, void *floor_context, float *us,
                           float *floor_us) {
    cudaEvent_t begin = NULL, end = NULL;
    cudaError_t error = cudaEventCreate(&begin);

    if (error == cudaSuccess)
        error = cudaEventCreate(&end);
    *us = *floor_us = 1e30f;
    for (int i = 0; i < 2 * REPETITIONS && error == cudaSuccess; i++) {
        float ms, *least = i % 2 ? floor_us : us;

        error = cudaEventRecord(begin, NULL);
        if (error == cudaSuccess)
            error = i % 2 ? floor(floor_context) : ours(context);
        if (error == cudaSuccess)
            error = cudaEventRecord(end, NULL);
        if (error == cudaSuccess)
            error = cudaEventSynchronize(end);
        if (error == cudaSuccess)
            error = cudaEventElapsedTime(&ms, begin, end);
        if (error == cudaSuccess && ms * 1e3f < *least)
            *least = ms * 1e3f;
    }
    (void)cudaEventDestroy(begin);
    (void)cudaEventDestroy(end);
    return error;
}

static void print(const char *part, const struct fq_matrix *shape, double mib, double us,
                  double floor_us) {
    printf("%s,%d,%lld,%.1f,%.1f,%.1f,%.2f\n", part, shape->bits, (long long)shape->group, mib, us,
           floor_us, us / floor_us);
    fflush(stdout);
}

/* ---- On the device ------------------------------------------------------------------------- */

struct prepack {
    const struct fq_cuda_matrix *matrix;
    struct fq_cuda_piece piece;
    int element; /* bytes of a scale or zero point; 0: codes */
};

static cudaError_t run_prepack(void *context) {
    const struct prepack *prepack = context;

    return prepack->element
               ? fq_cuda_prepack_groups(prepack->matrix, prepack->element, &prepack->piece, NULL)
               : fq_cuda_prepack_codes(prepack->matrix, &prepack->piece, NULL);
}

struct copy {
    void *to;
    const void *from;
    size_t bytes;
};

static cudaError_t run_copy(void *context) {
    const struct copy *copy = context;

    return cudaMemcpyAsync(copy->to, copy->from, copy->bytes, cudaMemcpyDefault, NULL);
}

/* One of the matrix's three arrays, as a whole in device memory, to where it belongs. */
static int measure_prepack(const struct fq_matrix *shape, const struct fq_cuda_matrix *matrix,
                           const char *part, const uint8_t *to, int element) {
    const size_t row_bytes =
        element ? (size_t)(fq_matrix_groups(shape) * element) : (size_t)fq_matrix_row_bytes(shape);
    const size_t bytes = row_bytes * N;
    struct prepack prepack = {.matrix = matrix, .element = element};
    struct copy copy = {.bytes = bytes};
    void *from = NULL, *other = NULL;
    cudaError_t error = cudaMalloc(&from, bytes);
    float us, floor_us;

    if (error == cudaSuccess)
        error = cudaMalloc(&other, bytes);
    if (error == cudaSuccess) /* each what is at its place, in the wrong order: any codes will do */
        error = cudaMemcpy(from, to, bytes, cudaMemcpyDeviceToDevice);
    copy.to = other;
    copy.from = from;
    prepack.piece = (struct fq_cuda_piece){
        .data = from,
        .stride = (int64_t)row_bytes,
        .rows = N,
        .units = element ? (int)fq_matrix_groups(shape) : matrix->tiles,
    };
    if (error == cudaSuccess)
        error = measure(run_prepack, &prepack, run_copy, &copy, &us, &floor_us);
    if (error == cudaSuccess)
        print(part, shape, (double)bytes / 1048576, us, floor_us);
    (void)cudaFree(from);
    (void)cudaFree(other);
    return error == cudaSuccess ? 0 : fail("measure prepacking", cudaGetErrorString(error));
}

static int measure_on_device(struct fq_backend *backend, const struct fq_matrix *shape) {
    struct fq_weights *weights;
    const struct fq_cuda_matrix *matrix;
    struct fq_error err;
    int status = fq_weights_synthetic(backend, shape, 1, &weights, &err);

    if (status < 0)
        return fail("make weights", err.message);
    matrix = &((const struct fq_cuda_weights *)weights)->matrix;
    status = measure_prepack(shape, matrix, "prepack codes", matrix->codes, 0);
    if (status == 0)
        status = measure_prepack(shape, matrix, "prepack scales", matrix->scales, 2);
    if (status == 0)
        status = measure_prepack(shape, matrix, "prepack zeros", matrix->zeros, 1);
    fq_weights_free(weights);
    return status;
}

/* ---- From the host ------------------------------------------------------------------------- */

/* As many bytes as the matrix has out of page-locked memory, a piece of the loader's at a time. */
static int copy_pieces(struct fq_cuda_backend *cuda, uint64_t bytes, double *us) {
    const double begin = now();
    cudaError_t error = cudaSuccess;

    for (uint64_t at = 0; at < bytes && error == cudaSuccess; at += FQ_CUDA_PIECE_BYTES) {
        const uint64_t left = bytes - at;

        error = cudaMemcpyAsync(cuda->loader.device[0], cuda->loader.host[0],
                                left < FQ_CUDA_PIECE_BYTES ? left : FQ_CUDA_PIECE_BYTES,
                                cudaMemcpyHostToDevice, cuda->copies);
    }
    if (error == cudaSuccess)
        error = cudaStreamSynchronize(cuda->copies);
    *us = now() - begin;
    return error == cudaSuccess ? 0 : fail("copy", cudaGetErrorString(error));
}

static int measure_load(struct fq_backend *backend, const struct fq_matrix *matrix) {
    const uint64_t bytes = (uint64_t)fq_matrix_bytes(matrix);
    double least = 1e30, floor = 1e30;

    for (int i = 0; i < REPETITIONS; i++) {
        const double begin = now();
        struct fq_weights *weights;
        struct fq_error err;
        double us;

        if (fq_weights_new(backend, matrix, &weights, &err) < 0)
            return fail("load weights", err.message);
        us = now() - begin;
        fq_weights_free(weights);
        least = us < least ? us : least;
        if (copy_pieces((struct fq_cuda_backend *)backend, bytes, &us))
            return 1;
        floor = us < floor ? us : floor;
    }
    print("load", matrix, (double)bytes / 1048576, least, floor);
    return 0;
}

static int measure_from_host(struct fq_backend *backend, const struct fq_matrix *shape) {
    const size_t code_bytes = (size_t)(fq_matrix_row_bytes(shape) * N);
    const size_t groups = (size_t)fq_matrix_groups(shape) * N;
    struct fq_matrix matrix = *shape;
    uint8_t *codes = malloc(code_bytes), *scales = malloc(2 * groups), *zeros = malloc(groups);
    int status = codes && scales && zeros ? 0 : fail("load", "no memory");

    for (size_t i = 0; i < code_bytes && status == 0; i++)
        codes[i] = (uint8_t)(i * 2654435761u >> 13);
    for (size_t i = 0; i < groups && status == 0; i++) {
        ((uint16_t *)(void *)scales)[i] = 0x2c00;
        zeros[i] = (uint8_t)(i & 7);
    }
    matrix.codes = codes;
    matrix.scales = scales;
    matrix.zeros = zeros;
    if (status == 0)
        status = measure_load(backend, &matrix);
    free(codes);
    free(scales);
    free(zeros);
    return status;
}

int main(void) {
    static const int all_bits[] = {8, 4, 3};
    static const uint8_t zeros = 0;
    struct fq_backend *backend;
    struct fq_error err;
    int status = 0;

    if (fq_backend_new("cuda", NULL, &backend, &err) < 0)
        return fail("open the GPU", err.message);
    printf("part,bits,group,mib,us,copy_us,ratio\n");
    for (int i = 0; i < 3 * 2 && status == 0; i++) {
        struct fq_matrix shape = {.n = N,
                                  .k = K,
                                  .bits = all_bits[i / 2],
                                  .group = i % 2 ? 16 : 64,
                                  .scale_type = FQ_F16,
                                  .zeros = &zeros};

        status = measure_on_device(backend, &shape);
        if (status == 0)
            status = measure_from_host(backend, &shape);
    }
    fq_backend_free(backend);
    return status;
}
