/* SPDX-License-Identifier: Apache-2.0 */
/* finequantctl status: is a daemon there, what does it run on, what does it hold. */
#include "ctl.h"

#include <inttypes.h>

static void show(const json_t *stats) {
    const json_t *device = json_object_get(stats, "device");
    char a[CTL_TEXT_SIZE], b[CTL_TEXT_SIZE];
    uint64_t budget = ctl_number(stats, "budget_bytes");

    printf("%s, process %" PRIu64 ", up %s%s\n", ctl_string(stats, "server"),
           ctl_number(stats, "pid"), ctl_duration(a, ctl_number(stats, "uptime")),
           json_is_true(json_object_get(stats, "draining")) ? ", draining" : "");
    printf("  backend   %s (%s), %s%s%s, %" PRIu64 " threads\n", ctl_string(stats, "backend"),
           ctl_string(device, "kernels"), ctl_string(device, "name"),
           *ctl_string(device, "uuid") ? " " : "", ctl_string(device, "uuid"),
           ctl_number(device, "threads"));
    printf("  models    %" PRIu64 ", %s of weights", ctl_number(stats, "models"),
           ctl_bytes(a, ctl_number(stats, "weight_bytes")));
    if (budget)
        printf(" of a budget of %s", ctl_bytes(b, budget));
    printf("\n  memory    %s free of %s\n", ctl_bytes(a, ctl_number(stats, "memory_free")),
           ctl_bytes(b, ctl_number(stats, "memory_total")));
    printf("  sessions  %" PRIu64 " now, %" PRIu64 " since the start, %s of buffers\n",
           ctl_number(stats, "sessions"), ctl_number(stats, "sessions_total"),
           ctl_bytes(a, ctl_number(stats, "buffer_bytes")));
    printf("  requests  %" PRIu64 " served, %" PRIu64 " queued, %" PRIu64 " failed\n",
           ctl_number(stats, "requests"), ctl_number(stats, "queued"), ctl_number(stats, "errors"));
}

static int run(struct ctl *ctl, char **argv) {
    json_t *result;
    int status = ctl_call(ctl, "stats", NULL, &result);

    (void)argv;
    return status ? status : ctl_print(ctl, result, show);
}

const struct ctl_command ctl_status = {
    "status", NULL, "", 0, "", "Say what the daemon runs on and holds", run};
