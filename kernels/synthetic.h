/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Matrices without a checkpoint, for measuring and testing: every code, scale
 * and zero point is a hash of (seed, row, place), so the host can compute any
 * row of a matrix that a device has made for itself.  Compiled for both; pure
 * functions, any thread.
 *
 * The values are such that Y is about as large as X: codes are spread evenly
 * round 2^(bits−1) (0 becomes that middle, or the mean of W would not be 0),
 * scales are 0.5 to 1.5 times a base that makes the variance of W 1/k, and zero
 * points are the middle or one beside it.  A scale has bf16's eight significant
 * bits, so it is exact in fp16 and bf16 alike.
 */
#ifndef FQ_KERNELS_SYNTHETIC_H
#define FQ_KERNELS_SYNTHETIC_H

#include "matrix.h"

#include <string.h>

#ifdef __CUDACC__
#define FQ_SYNTHETIC static __host__ __device__ __forceinline__
#else
#define FQ_SYNTHETIC static inline
#endif

#define FQ_SYNTHETIC_BLOCK 8 /* columns whose codes one hash gives, a byte each */

/* What a hash is for: different streams of one seed are independent. */
enum fq_synthetic_stream {
    FQ_SYNTHETIC_CODES = 1,
    FQ_SYNTHETIC_SCALES,
    FQ_SYNTHETIC_ZEROS,
    FQ_SYNTHETIC_VALUES
};

/* 0 ≤ row < 2^32, 0 ≤ at < 2^28. */
FQ_SYNTHETIC uint64_t fq_synthetic_hash(uint64_t seed, enum fq_synthetic_stream stream, int64_t row,
                                        int64_t at) {
    uint64_t counter = (uint64_t)stream << 60 | (uint64_t)row << 28 | (uint64_t)at;
    uint64_t z = (counter + seed * 0xd1342543de82ef95u) * 0x9e3779b97f4a7c15u; /* splitmix64's */

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* The code that a byte of a block's hash stands for. */
FQ_SYNTHETIC unsigned fq_synthetic_code(uint64_t hash, int place, int bits) {
    unsigned code = (unsigned)(hash >> (8 * place)) & ((1u << bits) - 1);

    return code ? code : 1u << (bits - 1);
}

FQ_SYNTHETIC float fq_synthetic_scale(uint64_t seed, int64_t row, int64_t group, float base) {
    uint64_t hash = fq_synthetic_hash(seed, FQ_SYNTHETIC_SCALES, row, group);
    float scale = base * (0.5F + (float)(hash >> 40) * 0x1p-24F);
    uint32_t bits;

    memcpy(&bits, &scale, sizeof bits);
    bits &= 0xffff0000u;
    memcpy(&scale, &bits, sizeof bits);
    return scale;
}

FQ_SYNTHETIC uint8_t fq_synthetic_zero(uint64_t seed, int64_t row, int64_t group, int bits) {
    uint64_t hash = fq_synthetic_hash(seed, FQ_SYNTHETIC_ZEROS, row, group);

    return (uint8_t)((1u << (bits - 1)) + (unsigned)(hash % 3) - 1);
}

/* Element [row][column] of activations to go with them: evenly spread in (−1, 1), none of them 0,
 * with bf16's significant bits, or otherwise fp16's, so exact in the type. */
FQ_SYNTHETIC float fq_synthetic_value(uint64_t seed, int64_t row, int64_t column,
                                      enum fq_dtype dtype) {
    uint64_t hash = fq_synthetic_hash(seed, FQ_SYNTHETIC_VALUES, row, column);
    int bits = dtype == FQ_BF16 ? 8 : 11;

    return (float)(2 * (int)(hash >> (64 - bits)) + 1 - (1 << bits)) / (float)(1 << bits);
}

#ifdef __cplusplus
extern "C" {
#endif

/* What fq_synthetic_scale takes as its base for that shape. */
float fq_synthetic_base(const struct fq_matrix *shape);

/*
 * Rows row0 to row0 + rows of the matrix that `shape` and the seed stand for, in canonical form: a
 * matrix of n = rows, owned by the caller.  Pointers of the shape are not followed: `zeros` other
 * than NULL asks for zero points.  The shape must pass fq_matrix_check.  Errors: -FQ_NO_MEMORY.
 */
int fq_synthetic_new(const struct fq_matrix *shape, uint64_t seed, int64_t row0, int64_t rows,
                     struct fq_matrix **out, struct fq_error *err);
void fq_synthetic_free(struct fq_matrix *matrix); /* NULL is fine */

#ifdef __cplusplus
}
#endif
#endif
