/* SPDX-License-Identifier: Apache-2.0 */
/* The default socket, as PROTOCOL.md, section 1, has it. */
#include "socket-path.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

int fq_socket_path(char *path, size_t size, struct fq_error *err) {
    const char *named = getenv("FINEQUANT_SOCKET");
    const char *runtime = getenv("XDG_RUNTIME_DIR");
    int length;

    if (named && *named)
        length = snprintf(path, size, "%s", named);
    else if (geteuid() != 0 && runtime && *runtime == '/')
        length = snprintf(path, size, "%s/finequantd.sock", runtime);
    else
        length = snprintf(path, size, "/run/finequant/finequantd.sock");
    if (length < 0 || (size_t)length >= size)
        return fq_fail(err, FQ_INVALID, "the socket's path has %d bytes, allowed are %zu", length,
                       size - 1);
    return 0;
}
