/* SPDX-License-Identifier: Apache-2.0 */
/* finequantctl load: loads a checkpoint and follows its progress. */
#include "ctl.h"

#include <inttypes.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void progress(void *data, uint64_t done, uint64_t total) {
    const char *name = data;

    if (isatty(STDERR_FILENO))
        fprintf(stderr, "\r%s: %" PRIu64 " of %" PRIu64 " matrices%s", name, done, total,
                done == total ? "\n" : "");
}

/* The daemon has a working directory of its own: a relative path is meant from ours. */
static int absolute_path(char out[PATH_MAX], const char *path) {
    char here[PATH_MAX];

    if (*path == '/')
        snprintf(out, PATH_MAX, "%s", path);
    else if (!getcwd(here, sizeof here) ||
             snprintf(out, PATH_MAX, "%s/%s", here, path) >= PATH_MAX) {
        fprintf(stderr, "finequantctl: %s: cannot be made an absolute path\n", path);
        return -FQ_INVALID;
    }
    return 0;
}

static void show(const json_t *result) {
    const json_t *model;
    size_t i;
    char bytes[CTL_TEXT_SIZE];

    json_array_foreach(json_object_get(result, "models"), i, model)
        printf("%s: ready, %" PRIu64 " matrices, %s\n", ctl_string(model, "name"),
               ctl_number(model, "matrices"), ctl_bytes(bytes, ctl_number(model, "bytes")));
}

/* Of the models, the one just loaded: the same object that list prints. */
static int show_loaded(struct ctl *ctl, const char *name) {
    json_t *result, *model;
    json_t *mine = json_array();
    size_t i;
    int status = ctl_call(ctl, "model.list", NULL, &result);

    if (status) {
        json_decref(mine);
        return status;
    }
    json_array_foreach(json_object_get(result, "models"), i,
                       model) if (strcmp(ctl_string(model, "name"), name) == 0)
        json_array_append(mine, model);
    json_decref(result);
    return ctl_print(ctl, json_pack("{s:o}", "models", mine), show);
}

static int run(struct ctl *ctl, char **argv) {
    struct fq_error err = {0};
    char path[PATH_MAX];
    int status = absolute_path(path, argv[1]);

    if (status == 0)
        status = ctl_connect(ctl);
    if (status)
        return status;
    struct fq_model_load load = {
        .name = argv[0],
        .path = path,
        .bits = ctl->bits,
        .group = ctl->group,
        .progress = progress,
        .data = argv[0],
    };
    status = fq_client_model_load(ctl->client, &load, NULL, &err);
    if (status)
        return ctl_report(ctl, &err);
    return show_loaded(ctl, argv[0]);
}

const struct ctl_command ctl_load = {
    "load", NULL, "MODEL PATH", 2, "bg", "Load the checkpoint PATH as MODEL", run};
