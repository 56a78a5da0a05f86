/* SPDX-License-Identifier: Apache-2.0 */
/* What the files of the client library share beyond the connection. */
#ifndef FQ_CLIENT_CLIENT_H
#define FQ_CLIENT_CLIENT_H

#include "connection.h"

struct fq_buffer {
    struct fq_client *client;
    uint64_t generation; /* of the connection that made it */
    uint64_t id, bytes;
    void *host;                    /* the mapping, or NULL */
    uint64_t device_base, address; /* CUdeviceptr: what was opened, and where the region begins */
};

#endif
