/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The methods of the protocol: a table of names, fields and functions.  To
 * add one, write its function in methods.c or a file of its own and add a row.
 * Loop's thread.
 */
#ifndef FQ_DAEMON_METHODS_H
#define FQ_DAEMON_METHODS_H

#include "message.h"
#include "pack.h"

struct fq_model;
struct fq_session;

/* Runs a request and answers it, now or later.  0, or a negative status with *err: the session
 * ends with that. */
int fq_method_run(struct fq_session *session, const struct fq_message *message,
                  struct fq_error *err);

/* One model as model.list has it: the value of `key`, or an element of an array with key NULL. */
void fq_pack_model(struct fq_pack *pack, const char *key, const struct fq_model *model);

/* gemm, in method-gemm.c: 0 when it was queued, else the error to answer. */
int fq_method_gemm(struct fq_session *session, const struct fq_message *message,
                   struct fq_error *err);

#endif
