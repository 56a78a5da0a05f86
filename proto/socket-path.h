/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where the daemon listens and a client looks when nobody says otherwise.
 * Reads the environment: call it before other threads change that.
 */
#ifndef FQ_PROTO_SOCKET_PATH_H
#define FQ_PROTO_SOCKET_PATH_H

#include "error.h"

/*
 * $FINEQUANT_SOCKET, else /run/finequant/finequantd.sock for root, else
 * $XDG_RUNTIME_DIR/finequantd.sock, else /run/finequant/finequantd.sock.
 * Errors: -FQ_INVALID when the result does not fit into size bytes.
 */
int fq_socket_path(char *path, size_t size, struct fq_error *err);

#endif
