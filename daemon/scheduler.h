/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which requests run next.  Ready requests wait in flows, one a session and
 * tensor.  The session whose turn it is, by deficit round robin over the
 * multiply-adds it was served, chooses the tensor; the launch then takes up to
 * FQ_DECODE_ROWS ready rows of that tensor with the same element type, gate,
 * biases and activation from any sessions, by row pointers; all with a residual
 * or none.  A larger request is a launch of its own.  There is no timer: while launches run the
 * queues fill. Loop's thread.
 */
#ifndef FQ_DAEMON_SCHEDULER_H
#define FQ_DAEMON_SCHEDULER_H

#include "backend.h"
#include "buffers.h"
#include "list.h"

struct fq_batch;
struct fq_call;
struct fq_daemon;
struct fq_flow;
struct fq_session;
struct fq_tensor;

/* The buffers that a gemm can name. */
enum fq_operand {
    FQ_OPERAND_X,
    FQ_OPERAND_Y,
    FQ_OPERAND_BIAS,
    FQ_OPERAND_GATE_BIAS,
    FQ_OPERAND_RESIDUAL,
    FQ_OPERAND_COUNT
};

/* One gemm, from its arrival to its reply. */
struct fq_request {
    struct fq_list link;  /* in its flow */
    struct fq_call *call; /* owned: its session and the id to answer */
    struct fq_tensor *tensor;
    struct fq_gemm gemm;                         /* base and stride form */
    struct fq_buffer *buffers[FQ_OPERAND_COUNT]; /* references; NULL where it names none */
    uint64_t arrived;                            /* uv_hrtime() */
};

/* What the scheduler keeps in a session; embedded there. */
struct fq_turn {
    struct fq_list link;  /* in the ring, while anything of the session waits */
    struct fq_list flows; /* its flows with waiting requests; the first is next */
    int64_t deficit;      /* work it may still be given this round; negative: overdrawn */
};

struct fq_scheduler {
    struct fq_list ring; /* of struct fq_turn; the first has its turn */
    uint64_t queued;
};

void fq_scheduler_init(struct fq_scheduler *scheduler);
void fq_turn_init(struct fq_turn *turn);

/* Queues a request, which the scheduler owns from here on.  -FQ_NO_MEMORY leaves it the caller's.
 */
int fq_scheduler_add(struct fq_scheduler *scheduler, struct fq_request *request,
                     struct fq_error *err);

/* Fills the batch with what runs next; false when nothing waits. */
bool fq_scheduler_next(struct fq_scheduler *scheduler, struct fq_batch *batch);

/* Frees what waits of one session, without an answer: it is gone. */
void fq_scheduler_drop(struct fq_scheduler *scheduler, struct fq_session *session);

/* Answers everything that waits with this error. */
void fq_scheduler_fail_all(struct fq_scheduler *scheduler, const struct fq_error *error);

/* Answers a request (error NULL: well) and frees it, with its buffers and charges. */
void fq_request_finish(struct fq_request *request, const struct fq_error *error);

#endif
