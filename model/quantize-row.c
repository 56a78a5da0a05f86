/* SPDX-License-Identifier: Apache-2.0 */
/* Loading a row, and the two rules for a group's scale, as quantize-row.h says. */
#include "quantize-row.h"

#ifdef HAVE_CONFIG_H
#include <config.h>
#endif

#include "half.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define NOT_FINITE 0x7f800000u
/* What the largest scale in fp16 reaches: without a zero point, 2^bits − 1 steps both ways. */
#define SCALE_MAX           65504.0f
#define MAGNITUDE_MAX(bits) (SCALE_MAX * (float)((1 << (bits)) - 1) / 2)
/* The least scale in fp16, half of which is rounded to 0. */
#define SCALE_LEAST 0x1p-24f
/* The squares of smaller weights have not all their digits in float32, and none at last. */
#define SQUARABLE_LEAST 1e-15f

const struct fq_quantize_kernels *fq_quantize_kernels(void) {
#ifdef FQ_CPU_X86
    const char *wanted = getenv("FINEQUANT_CPU_KERNELS");
    bool generic = wanted && strcmp(wanted, "generic") == 0;
    bool lesser = generic || (wanted && strcmp(wanted, "avx2") == 0);

    if (!lesser && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return &fq_quantize_avx512;
    if (!generic && __builtin_cpu_supports("avx2"))
        return &fq_quantize_avx2;
#endif
    return &fq_quantize_generic;
}

static int row_init(struct fq_row *row, int64_t k, struct fq_error *err) {
    size_t blocks = ((size_t)k + FQ_QUANTIZE_BLOCK - 1) / FQ_QUANTIZE_BLOCK;
    size_t floats = blocks * FQ_QUANTIZE_BLOCK;

    *row = (struct fq_row){.kernels = fq_quantize_kernels(), .k = k, .blocks = blocks};
    row->memory = calloc(1, floats * 4 + blocks * 4 + floats + FQ_QUANTIZE_BLOCK);
    if (!row->memory)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for a row of %lld weights", (long long)k);
    row->weights = row->memory;
    row->magnitudes = (uint32_t *)(row->weights + floats);
    row->codes = (uint8_t *)(row->magnitudes + blocks);
    return 0;
}

static void row_fini(struct fq_row *row) {
    free(row->memory);
    row->memory = NULL;
}

/* NaN to 0, infinities to the largest finite magnitude of the row. */
static void make_finite(struct fq_row *row) {
    uint32_t largest = 0;
    float limit;

    for (int64_t i = 0; i < row->k; i++) {
        uint32_t bits = fq_f32_bits(row->weights[i]) & 0x7fffffffu;

        if (bits < NOT_FINITE && bits > largest)
            largest = bits;
    }
    limit = fq_f32_from_bits(largest);
    for (int64_t i = 0; i < row->k; i++) {
        uint32_t bits = fq_f32_bits(row->weights[i]);

        if ((bits & 0x7fffffffu) > NOT_FINITE)
            row->weights[i] = 0;
        else if ((bits & 0x7fffffffu) == NOT_FINITE)
            row->weights[i] = bits >> 31 ? -limit : limit;
    }
}

/* The first weight that is infinite, NaN or too large for any width, if there is one. */
static bool find_fault(const struct fq_row *row, struct fq_row_fault *fault) {
    for (size_t b = 0; b < row->blocks; b++) {
        if (row->magnitudes[b] <= fq_f32_bits(MAGNITUDE_MAX(8)))
            continue;
        for (size_t i = b * FQ_QUANTIZE_BLOCK;; i++) {
            uint32_t bits = fq_f32_bits(row->weights[i]) & 0x7fffffffu;

            if (bits != row->magnitudes[b] && bits < NOT_FINITE)
                continue;
            *fault = (struct fq_row_fault){.column = (int64_t)i,
                                           .kind = bits < NOT_FINITE ? FQ_ROW_SCALE_OVERFLOW
                                                                     : FQ_ROW_NOT_FINITE,
                                           .value = row->weights[i]};
            return true;
        }
    }
    return false;
}

static double sum_of_squares(const float *weights, int64_t count) {
    double sum = 0;

    for (int64_t i = 0; i < count; i++)
        sum += (double)weights[i] * (double)weights[i];
    return sum;
}

/* The magnitudes of the weights, and their power. */
static void take_stock(struct fq_row *row) {
    row->power = row->kernels->magnitudes(row->weights, row->blocks, row->magnitudes);
    if (fq_row_absmax(row, 0, row->k) < SQUARABLE_LEAST)
        row->power = sum_of_squares(row->weights, row->k);
}

static bool row_load(struct fq_row *row, const struct fq_dense *dense, int64_t n,
                     bool allow_nonfinite, struct fq_row_fault *fault) {
    size_t k = (size_t)row->k, first = (size_t)n * k;
    const char *data = dense->data;

    if (dense->type == FQ_F32)
        memcpy(row->weights, data + first * 4, k * 4);
    else if (dense->type == FQ_F16)
        row->kernels->widen_f16(data + first * 2, k, row->weights);
    else
        row->kernels->widen_bf16(data + first * 2, k, row->weights);
    take_stock(row);
    if (!find_fault(row, fault))
        return true;
    if (fault->kind == FQ_ROW_NOT_FINITE && allow_nonfinite) {
        make_finite(row);
        take_stock(row);
        if (!find_fault(row, fault)) {
            *fault = (struct fq_row_fault){.kind = FQ_ROW_FINE};
            return true;
        }
    }
    return false;
}

static size_t blocks_of(int64_t count) {
    return ((size_t)count + FQ_QUANTIZE_BLOCK - 1) / FQ_QUANTIZE_BLOCK;
}

float fq_row_absmax(const struct fq_row *row, int64_t column, int64_t count) {
    const uint32_t *magnitudes = row->magnitudes + column / FQ_QUANTIZE_BLOCK;
    size_t blocks = blocks_of(count);
    uint32_t largest = 0;

    for (size_t b = 0; b < blocks; b++)
        largest = magnitudes[b] > largest ? magnitudes[b] : largest;
    return fq_f32_from_bits(largest);
}

double fq_row_error(const struct fq_row *row, int64_t column, int64_t count,
                    const struct fq_fit *fit) {
    if (fit->scale != 0)
        return row->kernels->error(row->weights + column, blocks_of(count), fit->scale, fit->low,
                                   fit->high);
    return sum_of_squares(row->weights + column, count);
}

/* One that fp16 would have as 0 becomes the least that it has, which leaves more of the weights. */
static void set_scale(struct fq_fit *fit, float scale) {
    if (scale != 0 && fabsf(scale) < SCALE_LEAST)
        scale = copysignf(SCALE_LEAST, scale);
    fit->stored = fq_f32_to_f16(scale);
    fit->scale = fq_f16_to_f32(fit->stored);
}

/* Shrunk by so much, the largest weights are clipped and the others gain; more than 1 helps where
 * rounding the largest weights outwards leaves the others better off. */
static const struct shrink {
    int bits;
    float least, most;
} shrinks[] = {{8, 0.85f, 1.03f}, {4, 0.50f, 1.05f}, {3, 0.45f, 1.05f}};

#define SHRINK_STEPS 12 /* a multiple of 4, for the kernel */

/*
 * For given codes q the best scale is Σwq / Σq², and it leaves Σw² − (Σwq)² / Σq²: so each step of
 * the search costs two sums, and the step to take is that with the largest (Σwq)² / Σq².  Its scale
 * is then rounded to fp16, the codes with it, and absmax stays where that is no better.
 *
 * Without a zero point the codes reach from −2^(bits−1) to one less above, and a negative scale
 * turns that around: the search gives the longer tail the code more, so that the step can be
 * max|w| / 2^(bits−1).  That costs no bit; of int4's step it takes 6%, of int3's 13%.
 */
static void search(const struct fq_row *row, int64_t column, int64_t count, int bits,
                   bool asymmetric, struct fq_fit *fit) {
    const struct shrink *shrink = shrinks;
    float inverses[SHRINK_STEPS], wq[SHRINK_STEPS], qq[SHRINK_STEPS], best = 0, scale = 0, least,
                                                                      most, sign;
    struct fq_fit found = *fit;

    while (shrink->bits != bits)
        shrink++;
    row->kernels->bounds(row->weights + column, blocks_of(count), &least, &most);
    sign = !asymmetric && most > -least ? -1.0f : 1.0f;
    for (int step = 0; step < SHRINK_STEPS; step++) {
        float factor = shrink->least +
                       (shrink->most - shrink->least) * ((float)step / (float)(SHRINK_STEPS - 1));

        inverses[step] = sign / (fit->scale * factor);
    }
    row->kernels->correlate(row->weights + column, blocks_of(count), inverses, SHRINK_STEPS,
                            fit->low, fit->high, wq, qq);
    for (int step = 0; step < SHRINK_STEPS; step++) {
        if (qq[step] > 0 && wq[step] * (wq[step] / qq[step]) > best) {
            best = wq[step] * (wq[step] / qq[step]);
            scale = wq[step] / qq[step];
        }
    }
    set_scale(&found, scale);
    if (found.scale != 0 && (found.stored & 0x7c00u) != 0x7c00u &&
        fq_row_error(row, column, count, &found) < fq_row_error(row, column, count, fit))
        *fit = found;
}

/* Where in the group a weight of that magnitude stands; its first column if a range has it. */
static int64_t find_magnitude(const struct fq_row *row, int64_t column, int64_t count,
                              float largest) {
    for (int64_t i = column; i < column + count; i++)
        if (fabsf(row->weights[i]) == largest)
            return i;
    return column;
}

bool fq_row_fit(const struct fq_row *row, int64_t column, int64_t count, int bits,
                const struct fq_quantize_method *method, struct fq_fit *out,
                struct fq_row_fault *fault) {
    const double levels = (1 << bits) - 1;
    float zero = (float)(1 << (bits - 1)), largest, low = 0, high = 0;

    if (method->asymmetric) {
        row->kernels->bounds(row->weights + column, blocks_of(count), &low, &high);
        largest = -low > high ? -low : high;
        set_scale(out,
                  largest <= SCALE_LEAST / 2 ? 0 : (float)(((double)high - (double)low) / levels));
        if (out->scale > 0) {
            zero = nearbyintf(-low / out->scale);
            zero = zero > (float)levels ? (float)levels : zero;
        }
    } else {
        largest = fq_row_absmax(row, column, count);
        set_scale(out, largest <= SCALE_LEAST / 2 ? 0 : (float)(2.0 * (double)largest / levels));
    }
    if ((out->stored & 0x7c00u) == 0x7c00u) {
        *fault = (struct fq_row_fault){.column = find_magnitude(row, column, count, largest),
                                       .kind = FQ_ROW_SCALE_OVERFLOW,
                                       .value = largest};
        return false;
    }
    out->low = -zero;
    out->high = (float)levels - zero;
    if (method->scale == FQ_SCALE_MSE && out->scale > 0)
        search(row, column, count, bits, method->asymmetric, out);
    return true;
}

static int report(const struct fq_row_fault *fault, struct fq_error *err) {
    if (fault->kind == FQ_ROW_NOT_FINITE)
        return fq_fail(
            err, FQ_INVALID,
            "row %lld, column %lld is %s; finequant-quantize --allow-nonfinite takes NaN "
            "as 0 and infinities as the row's largest",
            (long long)fault->row, (long long)fault->column,
            isnan(fault->value) ? "NaN" : "infinite");
    return fq_fail(
        err, FQ_INVALID,
        "row %lld, column %lld has magnitude %g; a scale in fp16, %g at most, reaches %.7g "
        "with 8 bits, %g with 4 and %g with 3",
        (long long)fault->row, (long long)fault->column, fabs((double)fault->value),
        (double)SCALE_MAX, (double)MAGNITUDE_MAX(8), (double)MAGNITUDE_MAX(4),
        (double)MAGNITUDE_MAX(3));
}

int fq_rows(const struct fq_dense *dense, const struct fq_row_list *list, bool allow_nonfinite,
            fq_row_body body, void *context, struct fq_error *err) {
    const int64_t count = list ? list->count : dense->n;
    struct fq_row_fault first = {.kind = FQ_ROW_FINE};
    bool memory = true;

#pragma omp parallel
    {
        struct fq_row row;
        bool ready = row_init(&row, dense->k, NULL) == 0;

#pragma omp for schedule(static)
        for (int64_t n = 0; n < count; n++) {
            struct fq_row_fault fault = {.kind = FQ_ROW_FINE};
            const int64_t at = list ? list->rows[n] : n;

            if (ready && row_load(&row, dense, at, allow_nonfinite, &fault) &&
                body(&row, n, context, &fault))
                continue;
            fault.row = at;
#pragma omp critical(fq_quantize_fault)
            if (!ready)
                memory = false;
            else if (first.kind == FQ_ROW_FINE || fault.row < first.row)
                first = fault;
        }
        row_fini(&row);
    }
    if (!memory)
        return fq_fail(err, FQ_NO_MEMORY, "no memory for a row of %lld weights",
                       (long long)dense->k);
    return first.kind == FQ_ROW_FINE ? 0 : report(&first, err);
}
