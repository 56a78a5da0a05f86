/* SPDX-License-Identifier: Apache-2.0 */
/* finequantctl unload: gives a model's memory back, after what is in flight. */
#include "ctl.h"

static void show(const json_t *result) {
    char text[CTL_TEXT_SIZE];

    printf("unloaded, %s given back\n", ctl_bytes(text, ctl_number(result, "bytes")));
}

static int run(struct ctl *ctl, char **argv) {
    json_t *result;
    int status = ctl_call(ctl, "model.unload", json_pack("{s:s}", "name", argv[0]), &result);

    return status ? status : ctl_print(ctl, result, show);
}

const struct ctl_command ctl_unload = {
    "unload", NULL, "MODEL", 1, "", "Unload a model and free its memory", run};
