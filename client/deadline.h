/* SPDX-License-Identifier: Apache-2.0 */
/* Times to wait until: milliseconds of CLOCK_MONOTONIC, or FQ_FOREVER. */
#ifndef FQ_CLIENT_DEADLINE_H
#define FQ_CLIENT_DEADLINE_H

#include <stdint.h>
#include <time.h>

#define FQ_FOREVER (-1)

static inline int64_t fq_deadline_now(void) {
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* timeout_ms 0: for ever. */
static inline int64_t fq_deadline_after(int timeout_ms) {
    return timeout_ms > 0 ? fq_deadline_now() + timeout_ms : FQ_FOREVER;
}

/* What is left, as poll() takes it. */
static inline int fq_deadline_poll(int64_t deadline) {
    if (deadline == FQ_FOREVER)
        return -1;
    int64_t left = deadline - fq_deadline_now();
    return left < 0 ? 0 : left > INT32_MAX ? INT32_MAX : (int)left;
}

#endif
