/* SPDX-License-Identifier: Apache-2.0 */
/* Charging against a session's quotas. */
#include "account.h"

static int check(const char *what, uint64_t held, uint64_t asked, uint64_t limit,
                 struct fq_error *err) {
    if (asked <= limit && held <= limit - asked)
        return 0;
    return fq_fail(
        err, FQ_QUOTA, "this session has %llu %s and asks for %llu more, allowed are %llu",
        (unsigned long long)held, what, (unsigned long long)asked, (unsigned long long)limit);
}

int fq_account_request(struct fq_account *account, const struct fq_settings *limits, uint64_t bytes,
                       struct fq_error *err) {
    int rc = check("requests in flight", account->inflight, 1, limits->max_inflight, err);

    if (rc == 0 && bytes > 0)
        rc = check("bytes in flight", account->inflight_bytes, bytes, limits->max_inflight_bytes,
                   err);
    if (rc < 0)
        return rc;
    account->inflight++;
    account->inflight_bytes += bytes;
    return 0;
}

int fq_account_buffer(struct fq_account *account, const struct fq_settings *limits, uint64_t bytes,
                      struct fq_error *err) {
    int rc = check("buffers", account->buffers, 1, limits->max_buffers, err);

    if (rc == 0)
        rc = check("bytes in buffers", account->buffer_bytes, bytes, limits->max_buffer_bytes, err);
    if (rc < 0)
        return rc;
    account->buffers++;
    account->buffer_bytes += bytes;
    return 0;
}

void fq_account_end_request(struct fq_account *account, uint64_t bytes) {
    account->inflight--;
    account->inflight_bytes -= bytes;
}

void fq_account_end_buffer(struct fq_account *account, uint64_t bytes) {
    account->buffers--;
    account->buffer_bytes -= bytes;
}
