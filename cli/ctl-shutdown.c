/* SPDX-License-Identifier: Apache-2.0 */
/* finequantctl shutdown: the daemon finishes what it has and ends. */
#include "ctl.h"

static void show(const json_t *result) {
    (void)result;
    puts("the daemon drains and ends");
}

static int run(struct ctl *ctl, char **argv) {
    json_t *result;
    int status = ctl_call(ctl, "shutdown", NULL, &result);

    (void)argv;
    return status ? status : ctl_print(ctl, result, show);
}

const struct ctl_command ctl_shutdown = {
    "shutdown", NULL, "", 0, "", "Finish what is in flight and end the daemon", run};
