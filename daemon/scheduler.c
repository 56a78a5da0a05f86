/* SPDX-License-Identifier: Apache-2.0 */
/* Flows, the ring of sessions and the gathering of rows into launches. */
#include "config.h"

#include "scheduler.h"

#include "daemon.h"
#include "session.h"

#include <stdlib.h>
#include <string.h>

/* What a round gives each session, in 2^20 multiply-adds: a full decode launch of a 4096×4096
 * matrix. */
#define QUANTUM ((int64_t)FQ_DECODE_ROWS * 16)

/* The waiting requests of one session for one tensor; exists while there are any. */
struct fq_flow {
    struct fq_list of_session; /* in the session's turn */
    struct fq_list of_tensor;  /* in the tensor's list */
    struct fq_session *session;
    struct fq_tensor *tensor;
    struct fq_list requests;
};

void fq_scheduler_init(struct fq_scheduler *scheduler) {
    fq_list_init(&scheduler->ring);
    scheduler->queued = 0;
}

void fq_turn_init(struct fq_turn *turn) {
    fq_list_init(&turn->link);
    fq_list_init(&turn->flows);
    turn->deficit = 0;
}

static struct fq_request *first_of(const struct fq_flow *flow) {
    return fq_list_entry(flow->requests.next, struct fq_request, link);
}

static int64_t work_of(const struct fq_request *request) {
    const struct fq_tensor *tensor = request->tensor;
    int64_t elements = tensor->info.n * tensor->info.k * (request->gemm.gate ? 2 : 1);

    return request->gemm.m * ((elements + (1 << 20) - 1) >> 20);
}

static struct fq_flow *flow_of(struct fq_session *session, struct fq_tensor *tensor) {
    struct fq_flow *flow;

    fq_list_each(node, &session->turn.flows) {
        flow = fq_list_entry(node, struct fq_flow, of_session);
        if (flow->tensor == tensor)
            return flow;
    }
    flow = malloc(sizeof *flow);
    if (!flow)
        return NULL;
    flow->session = session;
    flow->tensor = tensor;
    fq_list_init(&flow->requests);
    fq_list_append(&session->turn.flows, &flow->of_session);
    fq_list_append(&tensor->flows, &flow->of_tensor);
    return flow;
}

int fq_scheduler_add(struct fq_scheduler *scheduler, struct fq_request *request,
                     struct fq_error *err) {
    struct fq_session *session = request->call->session;
    struct fq_flow *flow = flow_of(session, request->tensor);

    if (!flow)
        return fq_fail(err, FQ_NO_MEMORY, "a queue: out of memory");
    if (fq_list_empty(&session->turn.link)) {
        if (session->turn.deficit > 0)
            session->turn.deficit = 0; /* a debt stays */
        fq_list_append(&scheduler->ring, &session->turn.link);
    }
    fq_list_append(&flow->requests, &request->link);
    scheduler->queued++;
    request->tensor->model->queued++;
    return 0;
}

/* Takes the first request out of its flow, which goes when that was the last. */
static struct fq_request *take(struct fq_scheduler *scheduler, struct fq_flow *flow) {
    struct fq_request *request = first_of(flow);
    struct fq_session *session = flow->session;

    fq_list_remove(&request->link);
    scheduler->queued--;
    request->tensor->model->queued--;
    if (fq_list_empty(&flow->requests)) {
        fq_list_remove(&flow->of_session);
        fq_list_remove(&flow->of_tensor);
        free(flow);
    }
    if (fq_list_empty(&session->turn.flows))
        fq_list_remove(&session->turn.link);
    return request;
}

/* Gives every session as many rounds as the one nearest to its turn lacks. */
static void start_rounds(struct fq_scheduler *scheduler) {
    int64_t best = INT64_MIN, rounds;

    fq_list_each(node, &scheduler->ring) {
        int64_t deficit = fq_list_entry(node, struct fq_turn, link)->deficit;

        if (deficit > best)
            best = deficit;
    }
    rounds = -best / QUANTUM + 1;
    fq_list_each(node, &scheduler->ring) {
        struct fq_turn *turn = fq_list_entry(node, struct fq_turn, link);

        turn->deficit += rounds * QUANTUM;
        if (turn->deficit > QUANTUM) /* nobody saves up more than a round */
            turn->deficit = QUANTUM;
    }
}

/* The session whose turn it is; the ring is not empty. */
static struct fq_turn *choose(struct fq_scheduler *scheduler) {
    for (;;) {
        fq_list_each(node, &scheduler->ring) {
            struct fq_turn *turn = fq_list_entry(node, struct fq_turn, link);

            if (turn->deficit > 0)
                return turn;
        }
        start_rounds(scheduler);
    }
}

static void add_to_batch(struct fq_scheduler *scheduler, struct fq_batch *batch,
                         struct fq_flow *flow) {
    struct fq_session *session = flow->session;
    struct fq_request *request = take(scheduler, flow);
    const struct fq_gemm *gemm = &request->gemm;
    size_t size = fq_dtype_size(gemm->type);

    session->turn.deficit -= work_of(request);
    if (gemm->m <= FQ_DECODE_ROWS)
        for (int64_t i = 0; i < gemm->m; i++) {
            int64_t row = batch->gemm.m + i;

            batch->x_rows[row] = (const char *)gemm->x + (size_t)(i * gemm->x_stride) * size;
            batch->y_rows[row] = (char *)gemm->y + (size_t)(i * gemm->y_stride) * size;
            if (gemm->residual)
                batch->residual_rows[row] =
                    (const char *)gemm->residual + (size_t)(i * gemm->residual_stride) * size;
        }
    batch->gemm.m += gemm->m;
    batch->requests[batch->count++] = request;
}

static bool joins(const struct fq_gemm *batch, const struct fq_gemm *gemm) {
    return gemm->m <= FQ_DECODE_ROWS - batch->m && gemm->type == batch->type &&
           gemm->bias == batch->bias && gemm->bias_type == batch->bias_type &&
           gemm->gate == batch->gate && gemm->gate_bias == batch->gate_bias &&
           gemm->activation == batch->activation && gemm->host == batch->host &&
           !gemm->residual == !batch->residual;
}

/* One pass over the tensor's flows, a request from each; true while any joined. */
static bool gather(struct fq_scheduler *scheduler, struct fq_batch *batch,
                   struct fq_tensor *tensor) {
    size_t before = batch->count;

    fq_list_each(node, &tensor->flows) {
        struct fq_flow *flow = fq_list_entry(node, struct fq_flow, of_tensor);

        if (joins(&batch->gemm, &first_of(flow)->gemm))
            add_to_batch(scheduler, batch, flow);
    }
    return batch->count > before && batch->gemm.m < FQ_DECODE_ROWS;
}

bool fq_scheduler_next(struct fq_scheduler *scheduler, struct fq_batch *batch) {
    struct fq_turn *turn;
    struct fq_flow *flow;
    struct fq_tensor *tensor;

    if (fq_list_empty(&scheduler->ring))
        return false;
    turn = choose(scheduler);
    flow = fq_list_entry(turn->flows.next, struct fq_flow, of_session);
    tensor = flow->tensor;
    fq_list_remove(&flow->of_session); /* the session's other tensors come first next time */
    fq_list_append(&turn->flows, &flow->of_session);

    batch->count = 0;
    batch->gemm = first_of(flow)->gemm;
    batch->gemm.m = 0;
    add_to_batch(scheduler, batch, flow);
    if (!fq_list_empty(&turn->link) && turn->deficit <= 0) { /* to the end of the ring */
        fq_list_remove(&turn->link);
        fq_list_append(&scheduler->ring, &turn->link);
    }
    if (batch->gemm.m > FQ_DECODE_ROWS)
        return true;
    while (batch->gemm.m < FQ_DECODE_ROWS && gather(scheduler, batch, tensor))
        ;
    batch->gemm.x = NULL;
    batch->gemm.y = NULL;
    batch->gemm.x_rows = batch->x_rows;
    batch->gemm.y_rows = batch->y_rows;
    if (batch->gemm.residual) {
        batch->gemm.residual = NULL;
        batch->gemm.residual_rows = batch->residual_rows;
    }
    return true;
}

void fq_scheduler_drop(struct fq_scheduler *scheduler, struct fq_session *session) {
    while (!fq_list_empty(&session->turn.flows)) {
        struct fq_flow *flow = fq_list_entry(session->turn.flows.next, struct fq_flow, of_session);

        fq_request_finish(take(scheduler, flow),
                          &(struct fq_error){-FQ_CLOSED, "the session has ended"});
    }
}

void fq_scheduler_fail_all(struct fq_scheduler *scheduler, const struct fq_error *error) {
    while (!fq_list_empty(&scheduler->ring)) {
        struct fq_turn *turn = fq_list_entry(scheduler->ring.next, struct fq_turn, link);
        struct fq_flow *flow = fq_list_entry(turn->flows.next, struct fq_flow, of_session);

        fq_request_finish(take(scheduler, flow), error);
    }
}

void fq_request_finish(struct fq_request *request, const struct fq_error *error) {
    struct fq_session *session = fq_session_ref(request->call->session);
    struct fq_metrics *metrics = &session->daemon->metrics;
    struct fq_model *model = request->tensor->model;

    if (!session->closed) {
        metrics->requests++;
        fq_histogram_add(&metrics->latency, uv_hrtime() - request->arrived);
    }
    if (error) {
        fq_call_reply_error(request->call, error);
    } else {
        metrics->rows += (uint64_t)request->gemm.m;
        session->rows += (uint64_t)request->gemm.m;
        session->requests++;
        model->rows += (uint64_t)request->gemm.m;
        model->requests++;
        fq_call_reply_empty(request->call);
    }
    for (int i = 0; i < FQ_OPERAND_COUNT; i++)
        fq_buffer_unref(request->buffers[i]);
    fq_model_end(model);
    fq_session_unref(session);
    free(request);
}
