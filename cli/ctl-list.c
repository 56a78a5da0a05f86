/* SPDX-License-Identifier: Apache-2.0 */
/* finequantctl list: the models, a line each. */
#include "ctl.h"

#include <inttypes.h>

static const char *state_text(char *text, const json_t *model) {
    uint64_t total = ctl_number(model, "total");

    if (total && !ctl_number(model, "loaded_at"))
        snprintf(text, CTL_TEXT_SIZE, "%s %" PRIu64 "%%", ctl_string(model, "state"),
                 ctl_number(model, "done") * 100 / total);
    else
        snprintf(text, CTL_TEXT_SIZE, "%s", ctl_string(model, "state"));
    return text;
}

static void show(const json_t *result) {
    struct ctl_table table;
    const json_t *model;
    size_t i;

    ctl_table_init(&table, (const char *const[]){"MODEL", "STATE", "-MATRICES", "-SIZE", "-OF FP16",
                                                 "-REQUESTS", "-QUEUED", "LOADED", "PATH", NULL});
    json_array_foreach(json_object_get(result, "models"), i, model) {
        char state[CTL_TEXT_SIZE], matrices[CTL_TEXT_SIZE], size[CTL_TEXT_SIZE],
            share[CTL_TEXT_SIZE], requests[CTL_TEXT_SIZE], queued[CTL_TEXT_SIZE],
            loaded[CTL_TEXT_SIZE];
        uint64_t dense = ctl_number(model, "dense_bytes"), bytes = ctl_number(model, "bytes");

        snprintf(matrices, sizeof matrices, "%" PRIu64, ctl_number(model, "matrices"));
        snprintf(share, sizeof share, "%.0f%%",
                 dense ? 100.0 * (double)bytes / (double)dense : 0.0);
        snprintf(requests, sizeof requests, "%" PRIu64, ctl_number(model, "requests"));
        snprintf(queued, sizeof queued, "%" PRIu64, ctl_number(model, "queued"));
        ctl_table_row(&table, ctl_string(model, "name"), state_text(state, model), matrices,
                      ctl_bytes(size, bytes), share, requests, queued,
                      ctl_time(loaded, ctl_number(model, "loaded_at")), ctl_string(model, "path"));
    }
    ctl_table_print(&table);
}

static int run(struct ctl *ctl, char **argv) {
    json_t *result;
    int status = ctl_call(ctl, "model.list", NULL, &result);

    (void)argv;
    return status ? status : ctl_print(ctl, result, show);
}

const struct ctl_command ctl_list = {
    "list", "ps", "", 0, "", "List the models that are loaded or loading", run};
