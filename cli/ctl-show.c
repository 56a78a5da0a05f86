/* SPDX-License-Identifier: Apache-2.0 */
/* finequantctl show: the matrices of a model, a line each. */
#include "ctl.h"

#include <inttypes.h>

static void show(const json_t *result) {
    struct ctl_table table;
    const json_t *tensor;
    size_t i;

    ctl_table_init(&table, (const char *const[]){"TENSOR", "-N", "-K", "-BITS", "-GROUP", "SCALE",
                                                 "ZERO", "BIAS", "-SIZE", NULL});
    json_array_foreach(json_object_get(result, "tensors"), i, tensor) {
        char n[CTL_TEXT_SIZE], k[CTL_TEXT_SIZE], bits[CTL_TEXT_SIZE], group[CTL_TEXT_SIZE],
            size[CTL_TEXT_SIZE];

        snprintf(n, sizeof n, "%" PRIu64, ctl_number(tensor, "n"));
        snprintf(k, sizeof k, "%" PRIu64, ctl_number(tensor, "k"));
        snprintf(bits, sizeof bits, "%" PRIu64, ctl_number(tensor, "bits"));
        if (ctl_number(tensor, "group") == ctl_number(tensor, "k"))
            snprintf(group, sizeof group, "channel");
        else
            snprintf(group, sizeof group, "%" PRIu64, ctl_number(tensor, "group"));
        ctl_table_row(&table, ctl_string(tensor, "name"), n, k, bits, group,
                      ctl_string(tensor, "scale"),
                      json_is_true(json_object_get(tensor, "symmetric")) ? "no" : "yes",
                      json_is_true(json_object_get(tensor, "bias")) ? "yes" : "no",
                      ctl_bytes(size, ctl_number(tensor, "bytes")));
    }
    ctl_table_print(&table);
}

static int run(struct ctl *ctl, char **argv) {
    json_t *result;
    int status = ctl_call(ctl, "tensor.list", json_pack("{s:s}", "model", argv[0]), &result);

    return status ? status : ctl_print(ctl, result, show);
}

const struct ctl_command ctl_show = {"show", NULL, "MODEL", 1, "", "List a model's matrices", run};
