/* SPDX-License-Identifier: Apache-2.0 */
/* Sizes, times and tables for people.  Out of memory ends the command: nothing is half printed. */
#include "ctl.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

char *ctl_bytes(char *text, uint64_t bytes) {
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    double value = (double)bytes;
    size_t unit = 0;

    while (value >= 1024 && unit + 1 < sizeof units / sizeof *units) {
        value /= 1024;
        unit++;
    }
    snprintf(text, CTL_TEXT_SIZE, unit && value < 100 ? "%.1f %s" : "%.0f %s", value, units[unit]);
    return text;
}

char *ctl_duration(char *text, uint64_t seconds) {
    uint64_t days = seconds / 86400, hours = seconds / 3600 % 24, minutes = seconds / 60 % 60;

    if (days)
        snprintf(text, CTL_TEXT_SIZE, "%" PRIu64 " d %" PRIu64 " h", days, hours);
    else if (hours)
        snprintf(text, CTL_TEXT_SIZE, "%" PRIu64 " h %" PRIu64 " min", hours, minutes);
    else if (minutes)
        snprintf(text, CTL_TEXT_SIZE, "%" PRIu64 " min %" PRIu64 " s", minutes, seconds % 60);
    else
        snprintf(text, CTL_TEXT_SIZE, "%" PRIu64 " s", seconds);
    return text;
}

char *ctl_time(char *text, uint64_t seconds_since_epoch) {
    time_t seconds = (time_t)seconds_since_epoch;
    struct tm local;

    if (!seconds || !localtime_r(&seconds, &local))
        snprintf(text, CTL_TEXT_SIZE, "-");
    else
        strftime(text, CTL_TEXT_SIZE, "%Y-%m-%d %H:%M:%S", &local);
    return text;
}

static void *or_die(void *memory) {
    if (!memory) {
        fputs("finequantctl: no memory\n", stderr);
        exit(FQ_NO_MEMORY);
    }
    return memory;
}

static char **add_row(struct ctl_table *table) {
    size_t columns = (size_t)table->columns;

    table->cells =
        or_die(realloc(table->cells, (table->rows + 1) * columns * sizeof *table->cells));
    return table->cells + table->rows++ * columns;
}

void ctl_table_init(struct ctl_table *table, const char *const *titles) {
    *table = (struct ctl_table){0};
    while (titles[table->columns])
        table->columns++;
    char **row = add_row(table);
    for (int c = 0; c < table->columns; c++)
        row[c] = or_die(strdup(titles[c]));
}

void ctl_table_row(struct ctl_table *table, ...) {
    char **row = add_row(table);
    va_list cells;

    va_start(cells, table);
    for (int c = 0; c < table->columns; c++)
        row[c] = or_die(strdup(va_arg(cells, const char *)));
    va_end(cells);
}

void ctl_table_print(struct ctl_table *table) {
    int width[CTL_TABLE_COLUMNS] = {0};
    bool right[CTL_TABLE_COLUMNS] = {false};

    for (int c = 0; c < table->columns; c++) {
        right[c] = table->cells[c][0] == '-';
        if (right[c])
            memmove(table->cells[c], table->cells[c] + 1, strlen(table->cells[c]));
        for (size_t r = 0; r < table->rows; r++) {
            int length = (int)strlen(table->cells[r * (size_t)table->columns + (size_t)c]);
            width[c] = length > width[c] ? length : width[c];
        }
    }
    for (size_t r = 0; r < table->rows; r++)
        for (int c = 0; c < table->columns; c++) {
            char *cell = table->cells[r * (size_t)table->columns + (size_t)c];
            bool last = c + 1 == table->columns;

            if (right[c])
                printf("%*s", width[c], cell);
            else
                printf("%-*s", last ? 0 : width[c], cell);
            fputs(last ? "\n" : "  ", stdout);
            free(cell);
        }
    free(table->cells);
}
