/* SPDX-License-Identifier: Apache-2.0 */
/*
 * finequantctl: an operator's view of a running finequantd.  This file parses
 * the command line and calls the daemon; each subcommand has a file of its own.
 * Exits with 0 or the number of the status that stopped it (finequant-protocol(7)).
 */
#ifdef HAVE_CONFIG_H
#include <config.h>
#endif

#include "ctl.h"

#include <errno.h>
#include <getopt.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

static const struct ctl_command *const commands[] = {
    &ctl_status,  &ctl_list,  &ctl_load, &ctl_unload,   &ctl_show,
    &ctl_clients, &ctl_stats, &ctl_ping, &ctl_shutdown,
};

#define COMMAND_COUNT (sizeof commands / sizeof *commands)

/* One row an option: what getopt takes, and what --help prints.  `letter` is short option and, in
 * struct ctl_command's options, what marks the commands that take it; upper case has no short form.
 */
static const struct {
    const char *name, *argument, *help;
    char letter;
    bool common;
} options[] = {
    {"socket", "PATH", "the daemon's socket (default: $FINEQUANT_SOCKET or the system's)", 's',
     true},
    {"json", NULL, "print the daemon's answer as JSON", 'j', true},
    {"timeout", "MS", "give up on an answer after so long (default: 0, never)", 't', true},
    {"help", NULL, "print this help", 'h', true},
    {"version", NULL, "print the version", 'V', true},
    {"count", "N", "stop after N pings (default: 10; 0: until interrupted)", 'c', false},
    {"interval", "MS", "pause between pings (default: 100)", 'i', false},
    {"bits", "N", "quantize dense matrices to 8, 4 or 3 bits while loading (default: 4)", 'b',
     false},
    {"group", "G", "with this group size, or 'channel' (default: 64)", 'g', false},
};

#define OPTION_COUNT (sizeof options / sizeof *options)

static void print_options(FILE *out, const struct ctl_command *command) {
    fputs("\nOptions:\n", out);
    for (size_t i = 0; i < OPTION_COUNT; i++) {
        char left[64];

        if (!options[i].common && !(command && strchr(command->options, options[i].letter)))
            continue;
        snprintf(left, sizeof left, "-%c, --%s%s%s", options[i].letter, options[i].name,
                 options[i].argument ? "=" : "", options[i].argument ? options[i].argument : "");
        fprintf(out, "  %-22s %s\n", left, options[i].help);
    }
}

static void print_help(FILE *out, const struct ctl_command *command) {
    if (command) {
        fprintf(out, "Usage: finequantctl %s [OPTION]...%s%s\n%s.\n", command->name,
                *command->arguments ? " " : "", command->arguments, command->help);
        if (command->alias)
            fprintf(out, "Also: finequantctl %s\n", command->alias);
        print_options(out, command);
        return;
    }
    fputs("Usage: finequantctl [OPTION]... COMMAND [ARGUMENT]...\n"
          "Look at and manage a running finequantd.\n\nCommands:\n",
          out);
    for (size_t i = 0; i < COMMAND_COUNT; i++) {
        char left[64];

        snprintf(left, sizeof left, "%s %s", commands[i]->name, commands[i]->arguments);
        fprintf(out, "  %-22s %s\n", left, commands[i]->help);
    }
    print_options(out, NULL);
    fputs("\n'finequantctl COMMAND --help' says more.  Manual: finequantctl(1).\n", out);
}

static int usage_error(const char *format, const char *value) {
    fputs("finequantctl: ", stderr);
    fprintf(stderr, format, value); /* format is one of the literals below */
    fputs("\nTry 'finequantctl --help'.\n", stderr);
    return -FQ_USAGE;
}

static bool parse_number(const char *text, uint64_t max, uint64_t *out) {
    char *end;

    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    *out = value;
    return *text >= '0' && *text <= '9' && !*end && errno == 0 && value <= max;
}

static int take_option(struct ctl *ctl, int letter, const char *value) {
    uint64_t number = 0;

    switch (letter) {
    case 's':
        ctl->socket = value;
        return 0;
    case 'j':
        ctl->json = true;
        return 0;
    case 't':
        if (!parse_number(value, INT_MAX, &number))
            return usage_error("--timeout=%s: milliseconds are wanted, 0 to 2147483647", value);
        ctl->timeout_ms = (int)number;
        return 0;
    case 'c':
        if (!parse_number(value, UINT32_MAX, &ctl->count))
            return usage_error("--count=%s: a whole number is wanted, 0 to 4294967295", value);
        return 0;
    case 'i':
        if (!parse_number(value, 3600000, &ctl->interval_ms))
            return usage_error("--interval=%s: milliseconds are wanted, 0 to 3600000", value);
        return 0;
    case 'b':
        if (!parse_number(value, 8, &number) || (number != 8 && number != 4 && number != 3))
            return usage_error("--bits=%s: allowed are 8, 4 and 3", value);
        ctl->bits = (uint32_t)number;
        return 0;
    case 'g':
        if (strcmp(value, "channel") == 0) {
            ctl->group = FQ_GROUP_CHANNEL;
            return 0;
        }
        if (!parse_number(value, INT32_MAX, &number) || number == 0 || number % 16)
            return usage_error("--group=%s: a multiple of 16 or 'channel' is wanted", value);
        ctl->group = (int64_t)number;
        return 0;
    }
    return -FQ_USAGE;
}

static const struct ctl_command *find_command(const char *name) {
    for (size_t i = 0; i < COMMAND_COUNT; i++)
        if (strcmp(commands[i]->name, name) == 0 ||
            (commands[i]->alias && strcmp(commands[i]->alias, name) == 0))
            return commands[i];
    return NULL;
}

/* ---- What subcommands share --------------------------------------------------------------- */

int ctl_report(const struct ctl *ctl, const struct fq_error *err) {
    fprintf(stderr, "finequantctl: %s\n", err->message);
    if (err->status == -FQ_UNAVAILABLE && !ctl->client)
        fputs("Is finequantd running?  Start it with 'finequantd', or name its socket with "
              "--socket.\n",
              stderr);
    return err->status;
}

int ctl_connect(struct ctl *ctl) {
    struct fq_client_options client_options = {
        .socket = ctl->socket,
        .name = "finequantctl",
        .timeout_ms = ctl->timeout_ms,
    };
    struct fq_error err = {0};

    if (ctl->client || fq_client_new(&client_options, &ctl->client, &err) == 0)
        return 0;
    ctl->client = NULL;
    return ctl_report(ctl, &err);
}

int ctl_call(struct ctl *ctl, const char *method, json_t *params, json_t **result) {
    struct fq_error err = {0};
    char *text = params ? json_dumps(params, JSON_COMPACT) : NULL;
    char *answer = NULL;

    json_decref(params);
    *result = NULL;
    int status = ctl_connect(ctl);
    if (status == 0) {
        status = fq_client_call_json(ctl->client, method, text ? text : "{}", &answer, &err);
        if (status)
            ctl_report(ctl, &err);
        else
            *result = json_loads(answer, 0, NULL);
    }
    free(text);
    free(answer);
    if (status == 0 && !*result) {
        fputs("finequantctl: the library's answer is not JSON\n", stderr);
        status = -FQ_INTERNAL;
    }
    return status;
}

int ctl_print(const struct ctl *ctl, json_t *result, void (*show)(const json_t *result)) {
    if (ctl->json) {
        json_dumpf(result, stdout, JSON_INDENT(2));
        putchar('\n');
    } else {
        show(result);
    }
    json_decref(result);
    return 0;
}

uint64_t ctl_number(const json_t *object, const char *key) {
    return (uint64_t)json_number_value(json_object_get(object, key));
}

const char *ctl_string(const json_t *object, const char *key) {
    const char *value = json_string_value(json_object_get(object, key));

    return value ? value : "";
}

/* ---- The command line --------------------------------------------------------------------- */

static int check_usage(const struct ctl_command *command, const char *used, int arguments,
                       char **argv) {
    for (; *used; used++)
        if (!strchr(command->options, *used))
            for (size_t i = 0; i < OPTION_COUNT; i++)
                if (options[i].letter == *used && !options[i].common)
                    return usage_error("--%s is not an option of this command", options[i].name);
    if (arguments > command->argument_count)
        return usage_error("unexpected argument '%s'", argv[command->argument_count]);
    if (arguments < command->argument_count)
        return usage_error("missing argument; the command takes %s", command->arguments);
    return 0;
}

static int run(struct ctl *ctl, int argc, char **argv) {
    struct option longs[OPTION_COUNT + 1] = {0};
    char shorts[2 * OPTION_COUNT + 1] = "", used[OPTION_COUNT + 1] = "";
    size_t short_count = 0, used_count = 0;
    bool help = false;
    int letter;

    for (size_t i = 0; i < OPTION_COUNT; i++) {
        longs[i] =
            (struct option){options[i].name, options[i].argument ? required_argument : no_argument,
                            NULL, options[i].letter};
        shorts[short_count++] = options[i].letter;
        if (options[i].argument)
            shorts[short_count++] = ':';
    }
    while ((letter = getopt_long(argc, argv, shorts, longs, NULL)) != -1) {
        if (letter == '?')
            return -FQ_USAGE;
        if (letter == 'V') {
            puts("finequantctl " PACKAGE_VERSION);
            return 0;
        }
        if (letter == 'h') {
            help = true;
            continue;
        }
        int status = take_option(ctl, letter, optarg);
        if (status)
            return status;
        if (!strchr(used, letter))
            used[used_count++] = (char)letter;
    }
    if (optind == argc) {
        print_help(help ? stdout : stderr, NULL);
        return help ? 0 : -FQ_USAGE;
    }
    const struct ctl_command *command = find_command(argv[optind]);
    if (!command)
        return usage_error("no command '%s'", argv[optind]);
    if (help) {
        print_help(stdout, command);
        return 0;
    }
    int status = check_usage(command, used, argc - optind - 1, argv + optind + 1);
    return status ? status : command->run(ctl, argv + optind + 1);
}

int main(int argc, char **argv) {
    struct ctl ctl = {.count = 10, .interval_ms = 100};
    int status = run(&ctl, argc, argv);

    fq_client_free(ctl.client);
    if (fflush(stdout) != 0 && status == 0) {
        fprintf(stderr, "finequantctl: writing the output: %s\n", strerror(errno));
        status = -FQ_IO;
    }
    return -status;
}
