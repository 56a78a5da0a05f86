/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the operator asks for: one table of options serves the command line,
 * the configuration file and --help, under the same names.  A value on the
 * command line wins over the file's; models of both are loaded.
 * Plain data, owned by whoever initialised it; loop's thread.
 */
#ifndef FQ_DAEMON_SETTINGS_H
#define FQ_DAEMON_SETTINGS_H

#include "error.h"

#include <stdbool.h>
#include <stdio.h>
#include <sys/types.h>

/* A model to load at start. */
struct fq_model_spec {
    char *name;
    char *path; /* absolute */
};

/* User or group ids. */
struct fq_ids {
    uint32_t *ids;
    size_t count;
};

struct fq_settings {
    char *config; /* the file's path, or NULL */
    char *socket;
    char *state; /* where models loaded on request are recorded, or NULL */
    uint64_t mode;
    char *backend;
    char *device; /* or NULL */
    uint64_t threads;
    struct fq_model_spec *models;
    size_t model_count;
    struct fq_ids allow_users, allow_groups; /* both empty: whoever can open the socket */
    struct fq_ids admin_users;               /* beside root and the daemon's own user */
    uint64_t memory_budget;                  /* bytes for weights; 0: what the device has */
    uint64_t max_inflight, max_inflight_bytes;
    uint64_t max_buffers, max_buffer_bytes;
    uint64_t max_sessions;
    uint64_t log_level;

    bool help, version, check_config; /* command line only */
};

/*
 * Defaults, then the file that --config names, then the command line.  Errors: -FQ_USAGE, naming
 * the option or the file's line; -FQ_NOT_FOUND, -FQ_IO for the file.  *settings needs _fini either
 * way.
 */
int fq_settings_init(struct fq_settings *settings, int argc, char **argv, struct fq_error *err);
void fq_settings_fini(struct fq_settings *settings);

/*
 * Moves what can change while running from *fresh to *running: log level, users and groups, quotas
 * and the budget.  Says through warn() which other options differ and wait for a restart.  Both
 * still need _fini.
 */
void fq_settings_reload(struct fq_settings *running, struct fq_settings *fresh,
                        void (*warn)(const char *option));

bool fq_ids_have(const struct fq_ids *ids, uint32_t id);

/* Writes the options, one a line with its default, for --help. */
void fq_settings_help(FILE *out);

#endif
