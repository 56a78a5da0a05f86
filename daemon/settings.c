/* SPDX-License-Identifier: Apache-2.0 */
/* The table of options, and its readers: getopt_long(3) and inih. */
#include "settings.h"

#include "log.h"
#include "socket-path.h"

#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <grp.h>
#include <ini.h>
#include <limits.h>
#include <pwd.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum option_kind {
    OPTION_STRING,
    OPTION_NUMBER,
    OPTION_SIZE, /* bytes: 1048576, 512M, 24G */
    OPTION_MODE, /* octal */
    OPTION_LEVEL,
    OPTION_USERS,
    OPTION_GROUPS,
    OPTION_MODEL,
    OPTION_FLAG, /* command line only */
};

struct option_row {
    const char *name;
    const char *argument; /* what --help calls it; NULL for a flag */
    enum option_kind kind;
    size_t offset; /* of the field in struct fq_settings */
    uint64_t min, max;
    const char *initial; /* the default, read as if it were given */
    bool reloads;        /* SIGHUP applies it */
    const char *help;
};

#define FIELD(name)  offsetof(struct fq_settings, name)
#define COUNT_MAX    1000000
#define BYTES_MAX    ((uint64_t)1 << 50)
#define CONFIG_ENTRY 0 /* index of "config" in the table */

static const struct option_row options[] = {
    {"config", "FILE", OPTION_STRING, FIELD(config), 0, 0, NULL, false,
     "read the options in FILE too"},
    {"socket", "PATH", OPTION_STRING, FIELD(socket), 0, 0, NULL, false, "listen on PATH"},
    {"mode", "OCTAL", OPTION_MODE, FIELD(mode), 0, 0777, "0660", false,
     "permissions of the socket"},
    {"backend", "NAME", OPTION_STRING, FIELD(backend), 0, 0, "auto", false,
     "auto, cuda, cpu or reference"},
    {"device", "ID", OPTION_STRING, FIELD(device), 0, 0, NULL, false, "the GPU, by index or UUID"},
    {"threads", "N", OPTION_NUMBER, FIELD(threads), 0, 4096, "0", false,
     "CPU threads; 0 is every core"},
    {"model", "NAME=PATH", OPTION_MODEL, 0, 0, 0, NULL, false,
     "load the directory or GGUF file PATH as NAME at start; may be repeated"},
    {"state", "FILE", OPTION_STRING, FIELD(state), 0, 0, NULL, false,
     "record models loaded on request in FILE, and load them again"},
    {"allow-users", "LIST", OPTION_USERS, FIELD(allow_users), 0, 0, NULL, true,
     "users who may connect"},
    {"allow-groups", "LIST", OPTION_GROUPS, FIELD(allow_groups), 0, 0, NULL, true,
     "groups whose members may connect"},
    {"admin-users", "LIST", OPTION_USERS, FIELD(admin_users), 0, 0, NULL, true,
     "users who may load, unload and shut down"},
    {"memory-budget", "SIZE", OPTION_SIZE, FIELD(memory_budget), 0, BYTES_MAX, "0", true,
     "memory for weights; 0 is what the device has"},
    {"max-inflight", "N", OPTION_NUMBER, FIELD(max_inflight), 1, COUNT_MAX, "256", true,
     "requests a session may have without a reply"},
    {"max-inflight-bytes", "SIZE", OPTION_SIZE, FIELD(max_inflight_bytes), 1, BYTES_MAX, "1G", true,
     "activations those may name"},
    {"max-buffers", "N", OPTION_NUMBER, FIELD(max_buffers), 1, COUNT_MAX, "256", true,
     "buffers a session may have"},
    {"max-buffer-bytes", "SIZE", OPTION_SIZE, FIELD(max_buffer_bytes), 1, BYTES_MAX, "4G", true,
     "bytes in all of them"},
    {"max-sessions", "N", OPTION_NUMBER, FIELD(max_sessions), 1, COUNT_MAX, "256", true,
     "connections at once"},
    {"log-level", "LEVEL", OPTION_LEVEL, FIELD(log_level), 0, 0, "info", true,
     "error, warning, info or debug"},
    {"check-config", NULL, OPTION_FLAG, FIELD(check_config), 0, 0, NULL, false,
     "check the options and the file, and exit"},
    {"help", NULL, OPTION_FLAG, FIELD(help), 0, 0, NULL, false, "print this and exit"},
    {"version", NULL, OPTION_FLAG, FIELD(version), 0, 0, NULL, false, "print the version and exit"},
};

#define OPTION_COUNT (sizeof options / sizeof *options)

static int parse_number(const char *text, uint64_t *out, bool size) {
    static const char units[] = "KMGT";
    char *end;
    uint64_t value;

    if (!isdigit((unsigned char)*text))
        return -1;
    errno = 0;
    value = strtoull(text, &end, 10);
    if (errno)
        return -1;
    if (size && *end) {
        const char *unit = strchr(units, toupper((unsigned char)*end));
        unsigned shift = unit ? 10u * (unsigned)(unit - units + 1) : 0;

        if (!unit || value > UINT64_MAX >> shift)
            return -1;
        value <<= shift;
        end++;
        if (*end == 'i')
            end++;
        if (*end == 'B')
            end++;
    }
    *out = value;
    return *end ? -1 : 0;
}

static int set_number(uint64_t *field, const struct option_row *row, const char *value,
                      struct fq_error *err) {
    uint64_t number;

    if (parse_number(value, &number, row->kind == OPTION_SIZE) < 0 || number < row->min ||
        number > row->max)
        return fq_fail(err, FQ_USAGE, "%s is \"%s\", allowed is %s from %llu to %llu", row->name,
                       value, row->kind == OPTION_SIZE ? "a size (1048576, 512M, 24G)" : "a number",
                       (unsigned long long)row->min, (unsigned long long)row->max);
    *field = number;
    return 0;
}

static int set_mode(uint64_t *field, const struct option_row *row, const char *value,
                    struct fq_error *err) {
    char *end;
    unsigned long mode = strtoul(value, &end, 8);

    if (!isdigit((unsigned char)*value) || *end || mode > row->max)
        return fq_fail(err, FQ_USAGE, "%s is \"%s\", allowed is an octal number up to 0777",
                       row->name, value);
    *field = mode;
    return 0;
}

static int look_up_id(const char *name, bool group, uint32_t *id) {
    uint64_t number;

    if (parse_number(name, &number, false) == 0) {
        *id = (uint32_t)number;
        return number < UINT32_MAX ? 0 : -1;
    }
    if (group) {
        struct group *entry = getgrnam(name);

        *id = entry ? entry->gr_gid : 0;
        return entry ? 0 : -1;
    }
    struct passwd *entry = getpwnam(name);

    *id = entry ? entry->pw_uid : 0;
    return entry ? 0 : -1;
}

/* Replaces *ids by a list of names or numbers, separated by commas or spaces. */
static int set_ids(struct fq_ids *ids, const struct option_row *row, const char *value,
                   struct fq_error *err) {
    char *copy = strdup(value), *rest = copy;
    uint32_t *list = calloc(strlen(value) / 2 + 1, sizeof *list);
    size_t count = 0;
    int rc = 0;

    if (!copy || !list) {
        rc = fq_fail(err, FQ_NO_MEMORY, "%s: out of memory", row->name);
        goto out;
    }
    for (char *name; (name = strsep(&rest, ", \t"));) {
        if (!*name)
            continue;
        if (look_up_id(name, row->kind == OPTION_GROUPS, &list[count]) < 0) {
            rc = fq_fail(err, FQ_USAGE, "%s names \"%s\", and there is no such %s", row->name, name,
                         row->kind == OPTION_GROUPS ? "group" : "user");
            goto out;
        }
        count++;
    }
    free(ids->ids);
    ids->ids = list;
    ids->count = count;
    list = NULL;
out:
    free(list);
    free(copy);
    return rc;
}

static int add_model(struct fq_settings *settings, const char *value, struct fq_error *err) {
    const char *equals = strchr(value, '=');
    struct fq_model_spec *models;
    char path[PATH_MAX];

    if (!equals || equals == value || !equals[1])
        return fq_fail(err, FQ_USAGE, "model is \"%s\", allowed is NAME=PATH", value);
    if (!realpath(equals + 1, path)) /* the loader says what is wrong with it */
        snprintf(path, sizeof path, "%s", equals + 1);
    models = realloc(settings->models, (settings->model_count + 1) * sizeof *models);
    if (!models)
        return fq_fail(err, FQ_NO_MEMORY, "model %s: out of memory", value);
    settings->models = models;
    models += settings->model_count;
    models->name = strndup(value, (size_t)(equals - value));
    models->path = strdup(path);
    if (!models->name || !models->path) {
        free(models->name);
        free(models->path);
        return fq_fail(err, FQ_NO_MEMORY, "model %s: out of memory", value);
    }
    settings->model_count++;
    return 0;
}

static int set_string(char **field, const char *value) {
    char *copy = strdup(value);

    if (!copy)
        return -FQ_NO_MEMORY;
    free(*field);
    *field = copy;
    return 0;
}

static int apply(struct fq_settings *settings, const struct option_row *row, const char *value,
                 struct fq_error *err) {
    void *field = (char *)settings + row->offset;

    switch (row->kind) {
    case OPTION_STRING:
        if (!*value)
            return fq_fail(err, FQ_USAGE, "%s is empty", row->name);
        return set_string(field, value);
    case OPTION_NUMBER:
    case OPTION_SIZE:
        return set_number(field, row, value, err);
    case OPTION_MODE:
        return set_mode(field, row, value, err);
    case OPTION_LEVEL:
        if (fq_log_level_parse(value) < 0)
            return fq_fail(err, FQ_USAGE, "%s is \"%s\", allowed are error, warning, info, debug",
                           row->name, value);
        *(uint64_t *)field = (uint64_t)fq_log_level_parse(value);
        return 0;
    case OPTION_USERS:
    case OPTION_GROUPS:
        return set_ids(field, row, value, err);
    case OPTION_MODEL:
        return add_model(settings, value, err);
    case OPTION_FLAG:
        *(bool *)field = true;
        return 0;
    }
    return -FQ_INTERNAL;
}

struct file_reader {
    struct fq_settings *settings;
    struct fq_error *err;
    int rc;
};

/* inih's handler: 0 stops, and makes this line the one that is reported. */
static int read_entry(void *user, const char *section, const char *name, const char *value) {
    struct file_reader *reader = user;

    if (*section && strcmp(section, "finequantd") != 0) {
        reader->rc =
            fq_fail(reader->err, FQ_USAGE, "section [%s], allowed is [finequantd]", section);
        return 0;
    }
    for (size_t i = CONFIG_ENTRY + 1; i < OPTION_COUNT; i++)
        if (options[i].kind != OPTION_FLAG && strcmp(options[i].name, name) == 0) {
            reader->rc = apply(reader->settings, &options[i], value, reader->err);
            return reader->rc == 0;
        }
    reader->rc = fq_fail(reader->err, FQ_USAGE, "no option is named \"%s\"", name);
    return 0;
}

static int read_file(struct fq_settings *settings, const char *path, struct fq_error *err) {
    struct file_reader reader = {settings, err, 0};
    FILE *file = fopen(path, "re");
    int line;

    if (!file)
        return fq_fail_errno(err, "%s", path);
    line = ini_parse_file(file, read_entry, &reader);
    fclose(file);
    if (line == 0)
        return 0;
    if (reader.rc == 0)
        fq_fail(err, FQ_USAGE, "neither NAME = VALUE nor a comment");
    return fq_fail_in(err, "%s, line %d", path, line);
}

/* One pass over the command line; `only` >= 0 applies that option alone. */
static int read_arguments(struct fq_settings *settings, int argc, char **argv, int only,
                          struct fq_error *err) {
    struct option longs[OPTION_COUNT + 1] = {0};
    int index, c;

    for (size_t i = 0; i < OPTION_COUNT; i++) {
        longs[i].name = options[i].name;
        longs[i].has_arg = options[i].argument ? required_argument : no_argument;
    }
    optind = 0;
    opterr = 0;
    while ((c = getopt_long(argc, argv, ":", longs, &index)) != -1) {
        const char *given = argv[optind - 1];

        if (c == ':')
            return fq_fail(err, FQ_USAGE, "%s needs a value; see --help", given);
        if (c != 0)
            return fq_fail(err, FQ_USAGE, "no option %s; see --help", given);
        if (only < 0 || only == index) {
            int rc = apply(settings, &options[index], optarg, err);

            if (rc < 0)
                return rc;
        }
    }
    if (optind < argc)
        return fq_fail(err, FQ_USAGE, "\"%s\" is not an option; see --help", argv[optind]);
    return 0;
}

int fq_settings_init(struct fq_settings *settings, int argc, char **argv, struct fq_error *err) {
    const char *state = getenv("STATE_DIRECTORY");
    char path[PATH_MAX];
    int rc;

    memset(settings, 0, sizeof *settings);
    for (size_t i = 0; i < OPTION_COUNT; i++)
        if (options[i].initial && (rc = apply(settings, &options[i], options[i].initial, err)) < 0)
            return rc;
    if ((rc = fq_socket_path(path, sizeof path, err)) < 0 ||
        (rc = set_string(&settings->socket, path)) < 0)
        return rc;
    if (state) {
        snprintf(path, sizeof path, "%.*s/models", (int)strcspn(state, ":"), state);
        if ((rc = set_string(&settings->state, path)) < 0)
            return rc;
    }
    if ((rc = read_arguments(settings, argc, argv, CONFIG_ENTRY, err)) < 0)
        return rc;
    if (settings->config && (rc = read_file(settings, settings->config, err)) < 0)
        return rc;
    return read_arguments(settings, argc, argv, -1, err);
}

void fq_settings_fini(struct fq_settings *settings) {
    for (size_t i = 0; i < settings->model_count; i++) {
        free(settings->models[i].name);
        free(settings->models[i].path);
    }
    free(settings->models);
    for (size_t i = 0; i < OPTION_COUNT; i++) {
        void *field = (char *)settings + options[i].offset;

        if (options[i].kind == OPTION_STRING)
            free(*(char **)field);
        else if (options[i].kind == OPTION_USERS || options[i].kind == OPTION_GROUPS)
            free(((struct fq_ids *)field)->ids);
    }
    memset(settings, 0, sizeof *settings);
}

static void swap_bytes(void *a, void *b, size_t size) {
    char spare[sizeof(struct fq_ids)];

    memcpy(spare, a, size);
    memcpy(a, b, size);
    memcpy(b, spare, size);
}

static bool strings_differ(const char *a, const char *b) {
    return a && b ? strcmp(a, b) != 0 : a != b;
}

void fq_settings_reload(struct fq_settings *running, struct fq_settings *fresh,
                        void (*warn)(const char *option)) {
    for (size_t i = 0; i < OPTION_COUNT; i++) {
        const struct option_row *row = &options[i];
        void *old = (char *)running + row->offset, *new = (char *)fresh + row->offset;
        bool ids = row->kind == OPTION_USERS || row->kind == OPTION_GROUPS;

        if (row->reloads)
            swap_bytes(old, new, ids ? sizeof(struct fq_ids) : sizeof(uint64_t));
        else if (row->kind == OPTION_STRING ? strings_differ(*(char **)old, *(char **)new)
                 : row->kind == OPTION_MODE || row->kind == OPTION_NUMBER
                     ? *(uint64_t *)old != *(uint64_t *)new
                     : false)
            warn(row->name);
    }
}

bool fq_ids_have(const struct fq_ids *ids, uint32_t id) {
    for (size_t i = 0; i < ids->count; i++)
        if (ids->ids[i] == id)
            return true;
    return false;
}

void fq_settings_help(FILE *out) {
    for (size_t i = 0; i < OPTION_COUNT; i++) {
        char left[40];

        snprintf(left, sizeof left, "--%s%s%s", options[i].name, options[i].argument ? "=" : "",
                 options[i].argument ? options[i].argument : "");
        fprintf(out, "  %-28s %s", left, options[i].help);
        if (options[i].initial)
            fprintf(out, " (default: %s)", options[i].initial);
        fputc('\n', out);
    }
}
