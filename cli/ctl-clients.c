/* SPDX-License-Identifier: Apache-2.0 */
/* finequantctl clients: the sessions, a line each. */
#include "ctl.h"

#include <inttypes.h>
#include <time.h>

static void show(const json_t *result) {
    struct ctl_table table;
    const json_t *client;
    size_t i;

    ctl_table_init(&table,
                   (const char *const[]){"-ID", "NAME", "-PID", "-UID", "-REQUESTS", "-ROWS",
                                         "-IN FLIGHT", "-BUFFERS", "-BYTES", "FOR", NULL});
    json_array_foreach(json_object_get(result, "clients"), i, client) {
        static const char *const keys[] = {"id",   "pid",      "uid",    "requests",
                                           "rows", "inflight", "buffers"};
        char text[sizeof keys / sizeof *keys][CTL_TEXT_SIZE];
        char bytes[CTL_TEXT_SIZE], since[CTL_TEXT_SIZE];
        uint64_t connected = ctl_number(client, "connected_at"), now = (uint64_t)time(NULL);

        for (size_t k = 0; k < sizeof keys / sizeof *keys; k++)
            snprintf(text[k], CTL_TEXT_SIZE, "%" PRIu64, ctl_number(client, keys[k]));
        ctl_table_row(&table, text[0], ctl_string(client, "name"), text[1], text[2], text[3],
                      text[4], text[5], text[6],
                      ctl_bytes(bytes, ctl_number(client, "buffer_bytes")),
                      ctl_duration(since, now > connected ? now - connected : 0));
    }
    ctl_table_print(&table);
}

static int run(struct ctl *ctl, char **argv) {
    json_t *result;
    int status = ctl_call(ctl, "client.list", NULL, &result);

    (void)argv;
    return status ? status : ctl_print(ctl, result, show);
}

const struct ctl_command ctl_clients = {"clients", NULL, "", 0, "", "List the connected clients",
                                        run};
