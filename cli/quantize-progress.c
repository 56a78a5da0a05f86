/* SPDX-License-Identifier: Apache-2.0 */
/* Fraction, rate and time left, as quantize-progress.h says. */
#include "quantize-progress.h"

double quantize_progress_part(const struct fq_quantize_progress *progress) {
    const double each = progress->work_a_byte;
    const double done = progress->work_before + (double)progress->bytes_done * each;
    const double total =
        progress->work_before + (double)progress->bytes_total * each + progress->work_after;

    return done < total ? done / total : 1;
}

double quantize_progress_rate(const struct fq_quantize_progress *progress, double seconds) {
    return seconds > 0 ? (double)(progress->bytes_done - progress->bytes_kept) / seconds : 0;
}

double quantize_progress_left(const struct fq_quantize_progress *progress, double seconds) {
    const double rate = quantize_progress_rate(progress, seconds);
    const double here = (double)(progress->bytes_total - progress->bytes_done);

    if (rate <= 0 || progress->work_a_byte <= 0)
        return 0;
    return (here + progress->work_after / progress->work_a_byte) / rate;
}
