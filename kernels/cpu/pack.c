/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From the canonical form to the layout of cpu.h.  The memory is anonymous,
 * asked for in huge pages, and all that a matrix takes.
 */
#include "cpu.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* The sign bit of every code: xor turns code into code − 2^(bits−1), two's complement.  For 3 bits
 * the pattern has a period of three words. */
static uint32_t sign_pattern(int bits, int64_t word) {
    static const uint32_t three[] = {0x24924924u, 0x49249249u, 0x92492492u};

    return bits == 8 ? 0x80808080u : bits == 4 ? 0x88888888u : three[word % 3];
}

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

/* Word `word` of a row, with the codes past k made zero weights. */
static uint32_t signed_word(const struct fq_matrix *matrix, const uint8_t *row, int64_t word) {
    int64_t row_words = fq_matrix_row_bytes(matrix) / 4;
    int64_t bits_left = matrix->k * matrix->bits - word * 32;
    uint32_t value = 0;

    if (word < row_words)
        memcpy(&value, row + word * 4, 4);
    value ^= sign_pattern(matrix->bits, word);
    if (bits_left <= 0)
        return 0;
    if (bits_left < 32)
        value &= (1u << bits_left) - 1;
    return value;
}

static void pack_codes(const struct fq_matrix *matrix, const struct sizes *sizes, int64_t block,
                       uint8_t *out) {
    int64_t words = sizes->k_padded * matrix->bits / 32;

    for (int64_t r = 0; r < FQ_CPU_BLOCK; r++) {
        int64_t n = block * FQ_CPU_BLOCK + r;
        if (n >= matrix->n)
            break;
        const uint8_t *row = (const uint8_t *)matrix->codes + n * fq_matrix_row_bytes(matrix);

        for (int64_t word = 0; word < words; word++) {
            uint32_t value = signed_word(matrix, row, word);

            if (matrix->bits == 8)
                for (int i = 0; i < 4; i++)
                    out[(word * 4 + i) * FQ_CPU_BLOCK + r] = (uint8_t)(value >> 8 * i);
            else
                memcpy(out + (word * FQ_CPU_BLOCK + r) * 4, &value, 4);
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

#pragma omp parallel for schedule(static)
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
