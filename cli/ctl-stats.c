/* SPDX-License-Identifier: Apache-2.0 */
/* finequantctl stats: every counter, a line each, in the daemon's order. */
#include "ctl.h"

#include <inttypes.h>

static void show_object(const char *prefix, const json_t *object) {
    const char *key;
    json_t *value;

    json_object_foreach((json_t *)(uintptr_t)object, key, value) {
        char name[128];

        snprintf(name, sizeof name, "%s%s%s", prefix, *prefix ? "." : "", key);
        if (json_is_object(value))
            show_object(name, value);
        else if (json_is_string(value))
            printf("%-24s %s\n", name, json_string_value(value));
        else if (json_is_boolean(value))
            printf("%-24s %s\n", name, json_is_true(value) ? "true" : "false");
        else if (json_is_real(value))
            printf("%-24s %.1f\n", name, json_real_value(value));
        else
            printf("%-24s %" JSON_INTEGER_FORMAT "\n", name, json_integer_value(value));
    }
}

static void show(const json_t *result) {
    show_object("", result);
}

static int run(struct ctl *ctl, char **argv) {
    json_t *result;
    int status = ctl_call(ctl, "stats", NULL, &result);

    (void)argv;
    return status ? status : ctl_print(ctl, result, show);
}

const struct ctl_command ctl_stats = {"stats", NULL, "", 0, "", "Print every counter", run};
