/* SPDX-License-Identifier: Apache-2.0 */
/* Reading the state file, and replacing it by rename(2). */
#include "config.h"

#include "state.h"

#include "daemon.h"
#include "log.h"

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int write_models(const struct fq_registry *registry, const char *path) {
    FILE *file = fopen(path, "we");
    int failed;

    if (!file)
        return -1;
    fq_list_each(node, &registry->models) {
        const struct fq_model *model = fq_list_entry(node, struct fq_model, link);

        if (model->recorded && model->state != FQ_MODEL_UNLOADING)
            fprintf(file, "%d %" PRId64 " %s %s\n", model->bits, model->group, model->name,
                    model->path);
    }
    failed = fflush(file) != 0 || fsync(fileno(file)) != 0;
    return fclose(file) != 0 || failed ? -1 : 0;
}

void fq_state_save(struct fq_daemon *daemon) {
    const char *path = daemon->settings.state;
    char fresh[PATH_MAX];

    if (!path || daemon->draining)
        return;
    if (snprintf(fresh, sizeof fresh, "%s.new", path) >= (int)sizeof fresh)
        errno = ENAMETOOLONG;
    else if (write_models(&daemon->registry, fresh) == 0 && rename(fresh, path) == 0)
        return;
    fq_log(FQ_LOG_WARNING, "%s: the loaded models are not recorded: %s", path, strerror(errno));
}

/* One line; false where it is not as fq_state_save writes them. */
static bool restore_line(struct fq_daemon *daemon, const char *line) {
    char name[FQ_MODEL_NAME_MAX + 1];
    struct fq_load load = {.name = name, .restored = true};
    struct fq_error error;
    int used = 0;

    if (sscanf(line, "%d %" SCNd64 " %127s %n", &load.bits, &load.group, name, &used) != 3 ||
        used == 0)
        return false;
    load.path = line + used;
    if (fq_registry_load(&daemon->registry, &load, NULL, &error) < 0)
        fq_log(FQ_LOG_WARNING, "model %s is not loaded again: %s", name, error.message);
    return true;
}

void fq_state_restore(struct fq_daemon *daemon) {
    const char *path = daemon->settings.state;
    FILE *file = path ? fopen(path, "re") : NULL;
    char *line = NULL;
    size_t room = 0;
    ssize_t length;

    if (!file) {
        if (path && errno != ENOENT)
            fq_log(FQ_LOG_WARNING, "%s: %s", path, strerror(errno));
        return;
    }
    while ((length = getline(&line, &room, file)) > 0) {
        line[strcspn(line, "\n")] = '\0';
        if (!restore_line(daemon, line))
            fq_log(FQ_LOG_WARNING, "%s: \"%s\" names no model", path, line);
    }
    free(line);
    fclose(file);
}
