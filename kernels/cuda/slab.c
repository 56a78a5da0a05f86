/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Device memory of prepacked weights.  A matrix of 4 MiB or more has a
 * cudaMalloc of its own; smaller ones share slabs of 8 MiB, so that a model of
 * many small matrices does not pay the driver's 2 MiB granularity for each.  A
 * slab holds weights only, since exporting one matrix lets the importer map the
 * whole slab, and it is freed with its last matrix.
 */
#include "cuda-impl.h"

#include <stdlib.h>

#define GRANULE     ((uint64_t)2 << 20)
#define SLAB_BYTES  ((uint64_t)8 << 20)
#define SHARE_BELOW ((uint64_t)4 << 20)

struct fq_cuda_span {
    struct fq_cuda_span *next;
    uint64_t offset, bytes;
};

/* Where to put the link to a new span: first fit; NULL where the slab has no such gap. */
static struct fq_cuda_span **find_gap(struct fq_cuda_slab *slab, uint64_t bytes, uint64_t *offset) {
    struct fq_cuda_span **link = &slab->spans;
    uint64_t from = 0;

    for (;; link = &(*link)->next) {
        uint64_t to = *link ? (*link)->offset : slab->bytes;

        if (to - from >= bytes) {
            *offset = from;
            return link;
        }
        if (!*link)
            return NULL;
        from = (*link)->offset + (*link)->bytes;
    }
}

static int new_slab(struct fq_cuda_backend *backend, uint64_t bytes, struct fq_cuda_slab **out,
                    struct fq_error *err) {
    struct fq_cuda_slab *slab = calloc(1, sizeof *slab);
    void *base;
    int status;

    if (!slab)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for a slab's description");
    slab->bytes = bytes < SHARE_BELOW ? SLAB_BYTES : (bytes + GRANULE - 1) / GRANULE * GRANULE;
    status =
        fq_cuda_check(cudaMalloc(&base, slab->bytes), err, "allocate device memory for weights");
    if (status < 0) {
        free(slab);
        return status;
    }
    slab->base = base;
    slab->next = backend->slabs;
    backend->slabs = slab;
    *out = slab;
    return 0;
}

static void free_slab(struct fq_cuda_backend *backend, struct fq_cuda_slab *slab) {
    struct fq_cuda_slab **link = &backend->slabs;

    while (*link != slab)
        link = &(*link)->next;
    *link = slab->next;
    (void)cudaFree(slab->base);
    free(slab);
}

int fq_cuda_slab_take(struct fq_cuda_backend *backend, uint64_t bytes, struct fq_cuda_slab **out,
                      uint8_t **address, struct fq_error *err) {
    struct fq_cuda_slab *slab;
    struct fq_cuda_span *span, **link = NULL;
    uint64_t offset;
    int status;

    bytes = (bytes + FQ_CUDA_PART_ALIGN - 1) / FQ_CUDA_PART_ALIGN * FQ_CUDA_PART_ALIGN;
    span = calloc(1, sizeof *span);
    if (!span)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for a slab's description");
    for (slab = bytes < SHARE_BELOW ? backend->slabs : NULL; slab; slab = slab->next)
        if (slab->bytes == SLAB_BYTES && (link = find_gap(slab, bytes, &offset)))
            break;
    if (!link) {
        status = new_slab(backend, bytes, &slab, err);
        if (status < 0) {
            free(span);
            return status;
        }
        link = find_gap(slab, bytes, &offset);
    }
    span->next = *link;
    span->offset = offset;
    span->bytes = bytes;
    *link = span;
    *out = slab;
    *address = slab->base + offset;
    return 0;
}

void fq_cuda_slab_give(struct fq_cuda_backend *backend, struct fq_cuda_slab *slab,
                       uint8_t *address) {
    struct fq_cuda_span **link = &slab->spans, *span;

    while (slab->base + (*link)->offset != address)
        link = &(*link)->next;
    span = *link;
    *link = span->next;
    free(span);
    if (!slab->spans)
        free_slab(backend, slab);
}
