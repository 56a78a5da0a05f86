/* SPDX-License-Identifier: Apache-2.0 */
/*
 * finequantctl inside: the table of subcommands and what they share.  A
 * subcommand is a file ctl-NAME.c that ends in its table entry; a new one also
 * takes a line in the table of finequantctl.c.  One thread.
 */
#ifndef FQ_CLI_CTL_H
#define FQ_CLI_CTL_H

#include "finequant.h"

#include <jansson.h>
#include <stdbool.h>
#include <stdio.h>

/* What the command line says, and the connection that comes of it. */
struct ctl {
    const char *socket; /* NULL: the default */
    bool json;
    int timeout_ms;
    uint64_t count;           /* ping --count; 0: until interrupted */
    uint64_t interval_ms;     /* ping --interval */
    uint32_t bits;            /* load --bits; 0: the daemon's default */
    int64_t group;            /* load --group; FQ_GROUP_CHANNEL, or 0: the daemon's default */
    struct fq_client *client; /* connected on the first call */
};

struct ctl_command {
    const char *name, *alias; /* alias may be NULL */
    const char *arguments;    /* as usage shows them: "MODEL" */
    int argument_count;
    const char *options; /* the letters of the long options it takes beyond the common ones */
    const char *help;    /* one line */
    /* argv has argument_count entries.  Returns 0 or the negative status it has reported. */
    int (*run)(struct ctl *ctl, char **argv);
};

extern const struct ctl_command ctl_status, ctl_list, ctl_load, ctl_unload, ctl_show, ctl_clients,
    ctl_stats, ctl_ping, ctl_shutdown;

/* Connects if need be.  Reports a failure on stderr; 0 or the negative status. */
int ctl_connect(struct ctl *ctl);

/* Calls a method; params is consumed.  *result is owned by the caller.  Reports a failure. */
int ctl_call(struct ctl *ctl, const char *method, json_t *params, json_t **result);

/* Prints err for a person, with what to do where that is known; returns err->status. */
int ctl_report(const struct ctl *ctl, const struct fq_error *err);

/* Prints a result as JSON with --json, else through `show`; consumes result. */
int ctl_print(const struct ctl *ctl, json_t *result, void (*show)(const json_t *result));

/* Members of an object, 0 or "" where absent. */
uint64_t ctl_number(const json_t *object, const char *key);
const char *ctl_string(const json_t *object, const char *key);

/* ---- Text for people (ctl-text.c) --------------------------------------------------------- */

#define CTL_TEXT_SIZE 32

/* "1.4 GiB", "37 s", "2026-11-24 02:20:01" into text[CTL_TEXT_SIZE]; returns text. */
char *ctl_bytes(char *text, uint64_t bytes);
char *ctl_duration(char *text, uint64_t seconds);
char *ctl_time(char *text, uint64_t seconds_since_epoch);

/* A table whose columns are as wide as their widest cell; "-" before a title aligns right. */
#define CTL_TABLE_COLUMNS 12
struct ctl_table {
    int columns;
    size_t rows;
    char **cells; /* [rows][columns], owned */
};
/* Titles end with NULL, and are the first row. */
void ctl_table_init(struct ctl_table *table, const char *const *titles);
/* As many strings as there are columns; copied. */
void ctl_table_row(struct ctl_table *table, ...);
void ctl_table_print(struct ctl_table *table); /* and frees it */

#endif
