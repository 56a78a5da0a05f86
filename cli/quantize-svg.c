/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The picture of finequant-quantize inspect: a bar of where the bytes are, and a
 * field for each matrix, a row a layer and a column a kind, coloured by the error
 * it keeps, or by its bits a weight where there is nothing to compare with.  The
 * experts of a layer share a field.
 */
#include "quantize-inspect.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WIDTH      1200
#define LEFT       90 /* of the fields: room for the layer's number */
#define MARGIN     24
#define ROW_HEIGHT 34
#define TEXT_MAX   200

/* Matrices of one layer and kind. */
struct field {
    int64_t layer;       /* -1: none in the name */
    char kind[TEXT_MAX]; /* the name without numbers and without what stands before the first */
    size_t count;
    int bits;             /* -1: several */
    int64_t group;        /* 0: per channel, -1: several */
    double error, weight; /* means; bits a weight */
};

struct picture {
    FILE *out;
    struct field *fields;
    size_t count;
    char (*kinds)[TEXT_MAX]; /* in the order they came */
    size_t kind_count;
    int64_t *layers; /* ascending */
    size_t layer_count;
    bool compared; /* the colour is the error */
    double least, most;
};

/* ---- grouping ----------------------------------------------------------------------------- */

static bool is_number(const char *text, size_t length) {
    return length > 0 && length < 10 && strspn(text, "0123456789") >= length;
}

static void parse_name(const char *name, struct field *field) {
    size_t length, used = 0;

    field->layer = -1;
    for (const char *part = name; *part; part += length + (part[length] == '.')) {
        length = strcspn(part, ".");
        if (is_number(part, length)) {
            if (field->layer < 0) {
                field->layer = strtoll(part, NULL, 10);
                used = 0;
            }
            continue;
        }
        used += (size_t)snprintf(field->kind + used, TEXT_MAX - used, "%s%.*s", used ? "." : "",
                                 (int)length, part);
        used = used < TEXT_MAX ? used : TEXT_MAX - 1;
    }
    field->kind[used] = '\0';
}

static void add_field(struct picture *picture, const struct inspected_matrix *matrix) {
    struct field one = {.count = 1,
                        .bits = matrix->bits,
                        .group = matrix->group < matrix->k ? matrix->group : 0,
                        .error = matrix->error,
                        .weight = 8 * (double)(matrix->codes + matrix->scales + matrix->zeros) /
                                  ((double)matrix->n * (double)matrix->k)};
    size_t k;

    parse_name(matrix->name, &one);
    for (size_t f = 0; f < picture->count; f++) {
        struct field *field = &picture->fields[f];

        if (field->layer != one.layer || strcmp(field->kind, one.kind) != 0)
            continue;
        field->count++;
        field->error += (one.error - field->error) / (double)field->count;
        field->weight += (one.weight - field->weight) / (double)field->count;
        field->bits = field->bits == one.bits ? one.bits : -1;
        field->group = field->group == one.group ? one.group : -1;
        return;
    }
    picture->fields[picture->count++] = one;
    if (one.layer < 0)
        return;
    for (k = 0; k < picture->kind_count && strcmp(picture->kinds[k], one.kind) != 0;)
        k++;
    if (k == picture->kind_count)
        strcpy(picture->kinds[picture->kind_count++], one.kind);
    for (k = 0; k < picture->layer_count && picture->layers[k] != one.layer;)
        k++;
    if (k == picture->layer_count)
        picture->layers[picture->layer_count++] = one.layer;
}

static int ascending(const void *left, const void *right) {
    int64_t a = *(const int64_t *)left, b = *(const int64_t *)right;

    return a < b ? -1 : a > b;
}

static double shade_of(const struct picture *picture, const struct field *field) {
    return picture->compared ? field->error : field->weight;
}

static int group_fields(struct picture *picture, const struct inspection *inspection,
                        struct fq_error *err) {
    picture->fields = calloc(inspection->count + 1, sizeof *picture->fields);
    picture->kinds = calloc(inspection->count + 1, sizeof *picture->kinds);
    picture->layers = calloc(inspection->count + 1, sizeof *picture->layers);
    if (!picture->fields || !picture->kinds || !picture->layers)
        return fq_fail(err, FQ_NO_MEMORY, "no memory to draw %zu matrices", inspection->count);
    picture->compared = !isnan(inspection->matrices[0].error);
    for (size_t i = 0; i < inspection->count; i++)
        add_field(picture, &inspection->matrices[i]);
    qsort(picture->layers, picture->layer_count, sizeof *picture->layers, ascending);
    picture->least = INFINITY;
    for (size_t f = 0; f < picture->count; f++) {
        picture->least = fmin(picture->least, shade_of(picture, &picture->fields[f]));
        picture->most = fmax(picture->most, shade_of(picture, &picture->fields[f]));
    }
    return 0;
}

/* ---- drawing ------------------------------------------------------------------------------ */

static void put_text(struct picture *picture, double x, double y, const char *style,
                     const char *text) {
    fprintf(picture->out, "<text x='%.1f' y='%.1f' %s>", x, y, style);
    for (; *text; text++) {
        if (*text == '&')
            fputs("&amp;", picture->out);
        else if (*text == '<')
            fputs("&lt;", picture->out);
        else
            fputc(*text, picture->out);
    }
    fputs("</text>\n", picture->out);
}

/* From pale yellow over green to dark blue; 0 ≤ at ≤ 1. */
static void colour(double at, char text[8]) {
    static const double stops[][3] = {
        {255, 255, 217}, {161, 218, 180}, {65, 182, 196}, {34, 94, 168}, {8, 29, 88}};
    double place = at * 4;
    int stop = place >= 4 ? 3 : place > 0 ? (int)place : 0;
    int rgb[3];

    for (int i = 0; i < 3; i++)
        rgb[i] = (int)(stops[stop][i] + (stops[stop + 1][i] - stops[stop][i]) * (place - stop));
    snprintf(text, 8, "#%02x%02x%02x", rgb[0] & 255, rgb[1] & 255, rgb[2] & 255);
}

static double place_of(const struct picture *picture, double value) {
    return picture->most > picture->least
               ? (value - picture->least) / (picture->most - picture->least)
               : 0.3;
}

static double draw_bytes(struct picture *picture, const struct inspection *inspection, double y) {
    struct {
        const char *what, *fill;
        uint64_t bytes;
    } parts[] = {{"8-bit codes", "#225ea8", 0}, {"4-bit codes", "#41b6c4", 0},
                 {"3-bit codes", "#a1dab4", 0}, {"scales", "#fe9929", 0},
                 {"zero points", "#cc4c02", 0}, {"kept dense", "#bdbdbd", inspection->dense}};
    uint64_t total = inspection->dense;
    double x = MARGIN, legend = MARGIN;
    char text[TEXT_MAX];

    for (size_t i = 0; i < inspection->count; i++) {
        const struct inspected_matrix *matrix = &inspection->matrices[i];

        parts[matrix->bits == 8 ? 0 : matrix->bits == 4 ? 1 : 2].bytes += matrix->codes;
        parts[3].bytes += matrix->scales;
        parts[4].bytes += matrix->zeros;
        total += matrix->codes + matrix->scales + matrix->zeros;
    }
    put_text(picture, MARGIN, y, "class='head'", "Where the bytes are");
    for (size_t p = 0; p < sizeof parts / sizeof *parts; p++) {
        double width = (WIDTH - 2 * MARGIN) * (double)parts[p].bytes / (double)total;

        if (parts[p].bytes == 0)
            continue;
        fprintf(picture->out,
                "<rect x='%.1f' y='%.1f' width='%.1f' height='26' fill='%s' stroke='#fff'/>\n", x,
                y + 10, width, parts[p].fill);
        x += width;
        snprintf(text, sizeof text, "%s %.1f MB", parts[p].what, (double)parts[p].bytes / 1e6);
        fprintf(picture->out, "<rect x='%.1f' y='%.1f' width='12' height='12' fill='%s'/>\n",
                legend, y + 46, parts[p].fill);
        put_text(picture, legend + 18, y + 56, "class='small'", text);
        legend += 40 + 7.2 * (double)strlen(text);
    }
    return y + 92;
}

static void draw_legend(struct picture *picture, double y) {
    char text[TEXT_MAX], fill[8];
    double x = WIDTH - MARGIN - 360;

    for (int i = 0; i < 24; i++) {
        colour(i / 23.0, fill);
        fprintf(picture->out, "<rect x='%.1f' y='%.1f' width='8.5' height='12' fill='%s'/>\n",
                x + 80 + i * 8, y - 11, fill);
    }
    snprintf(text, sizeof text, picture->compared ? "%.2f%%" : "%.2f",
             picture->compared ? picture->least * 100 : picture->least);
    put_text(picture, x + 72, y, "class='small' text-anchor='end'", text);
    snprintf(text, sizeof text, picture->compared ? "%.2f%%" : "%.2f",
             picture->compared ? picture->most * 100 : picture->most);
    put_text(picture, x + 280, y, "class='small'", text);
}

static void draw_field(struct picture *picture, const struct field *field, double x, double y,
                       double width, const char *label) {
    double place = place_of(picture, shade_of(picture, field));
    const char *style = place > 0.55 ? "class='small light' text-anchor='middle'"
                                     : "class='small' text-anchor='middle'";
    char scheme[TEXT_MAX], text[2 * TEXT_MAX], fill[8], group[24] = "channel";

    colour(place, fill);
    fprintf(picture->out,
            "<rect x='%.1f' y='%.1f' width='%.1f' height='%d' fill='%s' rx='2'><title>", x, y,
            width - 2, ROW_HEIGHT - 2, fill);
    fprintf(picture->out, "%zu matrices, %.3f bits a weight</title></rect>\n", field->count,
            field->weight);
    if (field->group > 0)
        snprintf(group, sizeof group, "g%" PRId64, field->group);
    if (field->bits < 0 || field->group < 0)
        snprintf(scheme, sizeof scheme, "mixed");
    else
        snprintf(scheme, sizeof scheme, "%d bits %s", field->bits, group);
    if (field->count > 1)
        snprintf(text, sizeof text, "%s ×%zu", scheme, field->count);
    else
        snprintf(text, sizeof text, "%s", scheme);
    put_text(picture, x + width / 2 - 1, y + 14, style, label ? label : text);
    if (label)
        snprintf(text, sizeof text, picture->compared ? "%s, %.2f%%" : "%s", scheme,
                 field->error * 100);
    else
        snprintf(text, sizeof text, picture->compared ? "%.2f%%" : "%.2f",
                 picture->compared ? field->error * 100 : field->weight);
    put_text(picture, x + width / 2 - 1, y + 27, style, text);
}

static const struct field *find_field(const struct picture *picture, int64_t layer,
                                      const char *kind) {
    for (size_t f = 0; f < picture->count; f++)
        if (picture->fields[f].layer == layer && strcmp(picture->fields[f].kind, kind) == 0)
            return &picture->fields[f];
    return NULL;
}

static double draw_layers(struct picture *picture, double y) {
    double width = picture->kind_count ? (WIDTH - LEFT - MARGIN) / (double)picture->kind_count : 0;
    size_t other = 0, a_row = 6;

    for (size_t k = 0; k < picture->kind_count; k++)
        put_text(picture, LEFT + (double)k * width + width / 2, y,
                 "class='small' text-anchor='middle'", picture->kinds[k]);
    y += 8;
    for (size_t l = 0; l < picture->layer_count; l++, y += ROW_HEIGHT) {
        char text[TEXT_MAX];

        snprintf(text, sizeof text, "layer %" PRId64, picture->layers[l]);
        put_text(picture, LEFT - 10, y + 20, "class='small' text-anchor='end'", text);
        for (size_t k = 0; k < picture->kind_count; k++) {
            const struct field *field = find_field(picture, picture->layers[l], picture->kinds[k]);

            if (field)
                draw_field(picture, field, LEFT + (double)k * width, y, width, NULL);
        }
    }
    for (size_t f = 0; f < picture->count; f++) {
        const struct field *field = &picture->fields[f];
        double wide = (WIDTH - LEFT - MARGIN) / (double)a_row;

        if (field->layer >= 0)
            continue;
        if (other % a_row == 0)
            y += 8;
        draw_field(picture, field, LEFT + (double)(other % a_row) * wide, y, wide, field->kind);
        if (++other % a_row == 0)
            y += ROW_HEIGHT;
    }
    return other % a_row ? y + ROW_HEIGHT : y;
}

static void draw(struct picture *picture, const struct inspection *inspection) {
    size_t others = 0;
    const char *name = strrchr(inspection->directory, '/');
    double height, y = MARGIN + 16, bits;
    char text[2 * TEXT_MAX];

    for (size_t f = 0; f < picture->count; f++)
        others += picture->fields[f].layer < 0;
    height = 240 + ROW_HEIGHT * (double)(picture->layer_count + (others + 5) / 6) +
             8 * (double)((others + 5) / 6);
    bits = 8 * (double)inspection_bytes(inspection) / (double)inspection->weights;
    fprintf(picture->out,
            "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 %d %.0f' width='%d' "
            "height='%.0f'>\n<style>text{font-family:sans-serif;fill:#222}.title{font-size:20px;"
            "font-weight:bold}.head{font-size:14px;font-weight:bold}.small{font-size:12px}"
            ".light{fill:#fff}</style>\n<rect width='100%%' height='100%%' fill='#fff'/>\n",
            WIDTH, height, WIDTH, height);
    snprintf(text, sizeof text, "%.100s: %zu matrices, %.3f bits a weight, %.1f MB",
             name && name[1] ? name + 1 : inspection->directory, inspection->count, bits,
             (double)inspection_bytes(inspection) / 1e6);
    put_text(picture, MARGIN, y, "class='title'", text);
    y = draw_bytes(picture, inspection, y + 34);
    put_text(picture, MARGIN, y, "class='head'",
             picture->compared ? "What error each matrix keeps: ‖W − dequantized‖ / ‖W‖"
                               : "Bits a weight of each matrix, with scales");
    draw_legend(picture, y);
    draw_layers(picture, y + 28);
    fputs("</svg>\n", picture->out);
}

int inspection_svg(const struct inspection *inspection, const char *path, struct fq_error *err) {
    struct picture picture = {0};
    int rc = group_fields(&picture, inspection, err);

    if (rc == 0 && !(picture.out = fopen(path, "we")))
        rc = fq_fail_errno(err, "%.200s", path);
    if (rc == 0) {
        draw(&picture, inspection);
        if (fflush(picture.out) != 0 || ferror(picture.out))
            rc = fq_fail_errno(err, "%.200s: writing", path);
    }
    if (picture.out && fclose(picture.out) != 0 && rc == 0)
        rc = fq_fail_errno(err, "%.200s: writing", path);
    free(picture.fields);
    free(picture.kinds);
    free(picture.layers);
    return rc;
}
