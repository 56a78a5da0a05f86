/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What one session holds of the daemon: everything that is limited is charged
 * here and nowhere else.  The limits are the settings', read at each charge,
 * so that SIGHUP changes them for open sessions too.  Loop's thread.
 */
#ifndef FQ_DAEMON_ACCOUNT_H
#define FQ_DAEMON_ACCOUNT_H

#include "settings.h"

struct fq_account {
    uint64_t inflight;       /* requests without a reply */
    uint64_t inflight_bytes; /* of X and Y that they name */
    uint64_t buffers;
    uint64_t buffer_bytes;
};

/* Each charges, or returns -FQ_QUOTA with what is held, asked for and allowed. */
int fq_account_request(struct fq_account *account, const struct fq_settings *limits, uint64_t bytes,
                       struct fq_error *err);
int fq_account_buffer(struct fq_account *account, const struct fq_settings *limits, uint64_t bytes,
                      struct fq_error *err);

void fq_account_end_request(struct fq_account *account, uint64_t bytes);
void fq_account_end_buffer(struct fq_account *account, uint64_t bytes);

#endif
