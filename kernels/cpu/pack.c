/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From the canonical form to the layout of cpu.h.  The memory is anonymous,
 * asked for in huge pages, and all that a matrix takes.
 */
#include "cpu.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

struct sizes {
    int64_t blocks, k_padded, groups, block_bytes;
    size_t codes, scales, zeros, total;
};

static struct sizes measure(const struct fq_matrix *matrix) {
    struct sizes sizes;

    sizes.blocks = (matrix->n + FQ_CPU_BLOCK - 1) / FQ_CPU_BLOCK;
    sizes.k_padded = (matrix->k + FQ_CPU_K_ALIGN - 1) / FQ_CPU_K_ALIGN * FQ_CPU_K_ALIGN;
    sizes.groups = fq_matrix_groups(matrix);
    sizes.block_bytes = sizes.k_padded * matrix->bits / 8 * FQ_CPU_BLOCK;
    sizes.codes = (size_t)(sizes.blocks * sizes.block_bytes);
    sizes.scales = (size_t)(sizes.blocks * sizes.groups * FQ_CPU_BLOCK) * 2;
    sizes.zeros = matrix->zeros ? sizes.scales / 2 : 0;
    sizes.total = sizes.codes + sizes.scales + sizes.zeros;
    return sizes;
}

uint64_t fq_cpu_weights_size(struct fq_backend *backend, const struct fq_matrix *matrix) {
    (void)backend;
    return measure(matrix).total;
}

/* Bit of the packed words at which the code of column k lies, within 32 columns.  3 bits: the last
 * eight would be a fourth word, which is spread over the three. */
static int bit_of(int bits, int k) {
    if (bits == 8)
        return k * 8;
    return k / 8 * 32 + k % 4 * 8 + k % 8 / 4 * bits;
}

#define WORDS 8 /* that 32 columns take at most */

/* The words of 32 columns from column `first` on; columns past k are zero weights. */
static void pack_words(const struct fq_matrix *matrix, int64_t row, int64_t first,
                       uint32_t *words) {
    const unsigned sign = 1u << (matrix->bits - 1);

    memset(words, 0, WORDS * sizeof *words);
    for (int k = 0; k < 32 && first + k < matrix->k; k++) {
        const int bit = bit_of(matrix->bits, k);

        words[bit / 32] |= (uint32_t)(fq_matrix_code(matrix, row, first + k) ^ sign) << bit % 32;
    }
    if (matrix->bits == 3)
        for (int i = 0; i < 3; i++)
            words[i] |= (words[3] >> 2 * i & 0x03030303u) << 6;
}

static void pack_codes(const struct fq_matrix *matrix, const struct sizes *sizes, int64_t block,
                       uint8_t *out) {
    const int64_t pitch = FQ_CPU_BLOCK * 4; /* bytes from a word to the next */

    for (int64_t r = 0; r < FQ_CPU_BLOCK; r++) {
        int64_t n = block * FQ_CPU_BLOCK + r;
        if (n >= matrix->n)
            break;
        for (int64_t k = 0; k < sizes->k_padded; k += FQ_CPU_K_ALIGN) {
            uint32_t words[WORDS];

            pack_words(matrix, n, k, words);
            for (int i = 0; i < matrix->bits; i++)
                memcpy(out + (k / FQ_CPU_K_ALIGN * matrix->bits + i) * pitch + r * 4, &words[i], 4);
        }
    }
}

static void pack_groups(const struct fq_matrix *matrix, const struct sizes *sizes, int64_t block,
                        uint16_t *scales, int8_t *zeros) {
    for (int64_t r = 0; r < FQ_CPU_BLOCK; r++) {
        int64_t n = block * FQ_CPU_BLOCK + r;
        if (n >= matrix->n)
            break;
        for (int64_t g = 0; g < sizes->groups; g++) {
            int64_t from = n * sizes->groups + g, to = g * FQ_CPU_BLOCK + r;

            memcpy(&scales[to], (const char *)matrix->scales + from * 2, 2);
            if (zeros)
                zeros[to] = (int8_t)(matrix->zeros[from] - (1 << (matrix->bits - 1)));
        }
    }
}

int fq_cpu_weights_new(struct fq_backend *backend, const struct fq_matrix *matrix,
                       struct fq_weights **out, struct fq_error *err) {
    struct sizes sizes = measure(matrix);
    struct fq_cpu_weights *weights = calloc(1, sizeof *weights);

    if (!weights)
        return fq_fail(err, FQ_NO_MEMORY, "no memory");
    void *mapping =
        mmap(NULL, sizes.total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) {
        free(weights);
        return fq_fail_errno(err, "%zu bytes for prepacked weights", sizes.total);
    }
    madvise(mapping, sizes.total, MADV_HUGEPAGE); /* a wish: small pages are slower, not wrong */

    uint8_t *codes = mapping;
    uint16_t *scales = (uint16_t *)(codes + sizes.codes);
    int8_t *zeros = matrix->zeros ? (int8_t *)(codes + sizes.codes + sizes.scales) : NULL;
    int threads = ((const struct cpu_backend *)backend)->threads;

#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t block = 0; block < sizes.blocks; block++) {
        int64_t groups_at = block * sizes.groups * FQ_CPU_BLOCK;

        pack_codes(matrix, &sizes, block, codes + block * sizes.block_bytes);
        pack_groups(matrix, &sizes, block, scales + groups_at, zeros ? zeros + groups_at : NULL);
    }
    *weights = (struct fq_cpu_weights){
        .base = {.backend = backend, .info = fq_matrix_info(matrix, sizes.total)},
        .blocks = sizes.blocks,
        .k_padded = sizes.k_padded,
        .groups = sizes.groups,
        .block_bytes = sizes.block_bytes,
        .codes = codes,
        .scales = scales,
        .zeros = zeros,
        .mapping = mapping,
        .mapping_bytes = sizes.total,
    };
    *out = &weights->base;
    return 0;
}

void fq_cpu_weights_free(struct fq_weights *base) {
    struct fq_cpu_weights *weights = (struct fq_cpu_weights *)base;

    munmap(weights->mapping, weights->mapping_bytes);
    free(weights);
}
