/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What finequant-quantize's progress says of the whole job, looking at weights
 * and writing them: pure functions of the last report and the time.
 */
#ifndef FQ_CLI_QUANTIZE_PROGRESS_H
#define FQ_CLI_QUANTIZE_PROGRESS_H

#include "quantize-checkpoint.h"

/* How much of the job is done, 0 to 1. */
double quantize_progress_part(const struct fq_quantize_progress *progress);
/* Bytes a second, SECONDS after the phase began; without those that an earlier run had finished.  0
 * where nothing is known. */
double quantize_progress_rate(const struct fq_quantize_progress *progress, double seconds);
/* Seconds to the end of the job, as fast as this phase was so far; 0 where nothing is known. */
double quantize_progress_left(const struct fq_quantize_progress *progress, double seconds);

#endif
