/* SPDX-License-Identifier: Apache-2.0 */
/* The rules of quantize-choose.h. */
#include "quantize-choose.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- candidates --------------------------------------------------------------------------- */

/* Below this only powers of two are tried: the sizes that kernels have been written for. */
#define ODD_GROUP_LEAST 256

static bool divides_all(int64_t group, const int64_t *k, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (k[i] % group != 0 || k[i] <= group)
            return false;
    return true;
}

size_t fq_choose_groups(const int64_t *k, size_t count, int64_t min_group,
                        int64_t groups[FQ_CHOOSE_GROUPS_MAX]) {
    int64_t least = k[0], half;
    size_t found = 0;

    for (size_t i = 1; i < count; i++)
        least = k[i] < least ? k[i] : least;
    groups[found++] = 0;
    for (half = least; half % 2 == 0 && (half == least || half > ODD_GROUP_LEAST);) {
        half /= 2;
        if (half % 16 == 0 && half >= min_group && divides_all(half, k, count))
            groups[found++] = half;
    }
    for (int64_t power = ODD_GROUP_LEAST; power >= 16 && power >= min_group; power /= 2)
        if (divides_all(power, k, count) && (found == 1 || power < groups[found - 1]))
            groups[found++] = power;
    return found;
}

/* ---- alpha -------------------------------------------------------------------------------- */

static bool gains_alpha(const struct fq_choose_step *from, const struct fq_choose_step *to,
                        double alpha) {
    double halvings = log2((double)from->group / (double)to->group);

    return from->error > 0 && to->error <= from->error * pow(1 - alpha, halvings);
}

static bool is_worth_it(const struct fq_choose_step *from, const struct fq_choose_step *to) {
    return to->error <= from->error * exp2(from->bits - to->bits);
}

size_t fq_choose_by_alpha(const struct fq_choose_step *steps, size_t count, double alpha,
                          enum fq_choose_stop *stop) {
    size_t at = 0, next;

    do {
        *stop = at + 1 == count ? FQ_CHOOSE_FINEST : FQ_CHOOSE_ALPHA;
        for (next = at + 1; next < count; next++) {
            if (!gains_alpha(&steps[at], &steps[next], alpha))
                continue;
            if (is_worth_it(&steps[at], &steps[next]))
                break;
            *stop = FQ_CHOOSE_PRICE;
        }
        if (next < count)
            at = next;
    } while (next < count);
    return at;
}

/* ---- budget ------------------------------------------------------------------------------- */

/* A step along one unit's hull. */
struct segment {
    size_t unit, from, to;
    double slope; /* loss taken away, a byte */
};

static double slope_of(const struct fq_choose_option *from, const struct fq_choose_option *to) {
    return (from->loss - to->loss) / ((double)to->bytes - (double)from->bytes);
}

/* The cheapest option, of several the one with the least loss. */
static size_t cheapest(const struct fq_choose_unit *unit) {
    size_t best = 0;

    for (size_t i = 1; i < unit->count; i++) {
        const struct fq_choose_option *a = &unit->options[i], *b = &unit->options[best];

        if (a->bytes < b->bytes || (a->bytes == b->bytes && a->loss < b->loss))
            best = i;
    }
    return best;
}

/* The hull's next corner after FROM: the steepest way down; SIZE_MAX at its end. */
static size_t next_corner(const struct fq_choose_unit *unit, size_t from) {
    size_t best = SIZE_MAX;
    double steepest = 0;

    for (size_t i = 0; i < unit->count; i++) {
        const struct fq_choose_option *option = &unit->options[i];
        double slope;

        if (option->bytes <= unit->options[from].bytes || option->loss >= unit->options[from].loss)
            continue;
        slope = slope_of(&unit->options[from], option);
        if (slope > steepest ||
            (slope == steepest && best != SIZE_MAX && option->bytes > unit->options[best].bytes)) {
            steepest = slope;
            best = i;
        }
    }
    return best;
}

static int steepest_first(const void *left, const void *right) {
    const struct segment *a = left, *b = right;

    if (a->slope != b->slope)
        return a->slope > b->slope ? -1 : 1;
    if (a->unit != b->unit)
        return a->unit < b->unit ? -1 : 1;
    return 0;
}

static uint64_t total_bytes(const struct fq_choose_unit *units, size_t count) {
    uint64_t bytes = 0;

    for (size_t u = 0; u < count; u++)
        bytes += units[u].options[units[u].chosen].bytes;
    return bytes;
}

static double total_error(const struct fq_choose_unit *units, size_t count) {
    double error = 0;

    for (size_t u = 0; u < count; u++)
        error += units[u].options[units[u].chosen].error;
    return error;
}

static double total_loss(const struct fq_choose_unit *units, size_t count) {
    double loss = 0;

    for (size_t u = 0; u < count; u++)
        loss += units[u].options[units[u].chosen].loss;
    return loss;
}

/* Down the hulls from the cheapest choices; *left is what remains of the budget. */
static int walk_hulls(struct fq_choose_unit *units, size_t count, uint64_t *left,
                      struct fq_error *err) {
    size_t room = 0, found = 0;
    struct segment *segments;

    for (size_t u = 0; u < count; u++)
        room += units[u].count;
    segments = malloc(room * sizeof *segments + 1);
    if (!segments)
        return fq_fail(err, FQ_NO_MEMORY, "no memory to choose among %zu options", room);
    for (size_t u = 0; u < count; u++) {
        size_t from = cheapest(&units[u]), to;

        units[u].chosen = from;
        for (; (to = next_corner(&units[u], from)) != SIZE_MAX; from = to)
            segments[found++] =
                (struct segment){.unit = u,
                                 .from = from,
                                 .to = to,
                                 .slope = slope_of(&units[u].options[from], &units[u].options[to])};
    }
    qsort(segments, found, sizeof *segments, steepest_first);
    for (size_t s = 0; s < found; s++) {
        struct fq_choose_unit *unit = &units[segments[s].unit];
        uint64_t more = unit->options[segments[s].to].bytes - unit->options[segments[s].from].bytes;

        if (unit->chosen != segments[s].from || more > *left)
            continue;
        unit->chosen = segments[s].to;
        *left -= more;
    }
    free(segments);
    return 0;
}

/* Whatever improvement still fits, the best a byte first; one that costs nothing before all. */
static void fill_up(struct fq_choose_unit *units, size_t count, uint64_t left) {
    for (;;) {
        size_t best_unit = SIZE_MAX, best_option = 0;
        double steepest = 0;

        for (size_t u = 0; u < count; u++) {
            const struct fq_choose_option *now = &units[u].options[units[u].chosen];

            for (size_t i = 0; i < units[u].count; i++) {
                const struct fq_choose_option *option = &units[u].options[i];
                double slope;

                if (option->loss >= now->loss || option->bytes > now->bytes + left)
                    continue;
                slope = option->bytes <= now->bytes ? INFINITY : slope_of(now, option);
                if (slope <= steepest)
                    continue;
                steepest = slope;
                best_unit = u;
                best_option = i;
            }
        }
        if (best_unit == SIZE_MAX)
            return;
        left += units[best_unit].options[units[best_unit].chosen].bytes;
        left -= units[best_unit].options[best_option].bytes;
        units[best_unit].chosen = best_option;
    }
}

/* What changing one unit's choice would do. */
struct move {
    size_t unit, option;
    int64_t bytes; /* more, or less than 0 */
    double loss;   /* the same */
};

/* All moves that save bytes, or all that take loss away.  Returns how many. */
static size_t list_moves(const struct fq_choose_unit *units, size_t count, bool saving,
                         struct move *moves) {
    size_t found = 0;

    for (size_t u = 0; u < count; u++) {
        const struct fq_choose_option *now = &units[u].options[units[u].chosen];

        for (size_t i = 0; i < units[u].count; i++) {
            const struct fq_choose_option *option = &units[u].options[i];

            if (saving ? option->bytes < now->bytes : option->loss < now->loss)
                moves[found++] =
                    (struct move){.unit = u,
                                  .option = i,
                                  .bytes = (int64_t)option->bytes - (int64_t)now->bytes,
                                  .loss = option->loss - now->loss};
        }
    }
    return found;
}

/* Beyond so many options what single pairs can gain is lost in the sum. */
#define EXCHANGE_OPTIONS_MAX 10000

/*
 * Takes bytes from one unit and gives them to another while that pays: the hulls' corners need not
 * meet the budget, and few large units leave much of it.  Fills up after each exchange.
 */
static int exchange(struct fq_choose_unit *units, size_t count, uint64_t budget,
                    struct fq_error *err) {
    size_t room = 0;
    struct move *savings, *gains;

    for (size_t u = 0; u < count; u++)
        room += units[u].count;
    if (room > EXCHANGE_OPTIONS_MAX)
        return 0;
    savings = malloc(2 * room * sizeof *savings + 1);
    if (!savings)
        return fq_fail(err, FQ_NO_MEMORY, "no memory to choose among %zu options", room);
    gains = savings + room;
    for (;;) {
        int64_t left = (int64_t)(budget - total_bytes(units, count));
        size_t saving_count = list_moves(units, count, true, savings);
        size_t gain_count = list_moves(units, count, false, gains);
        const struct move *saving = NULL, *gain = NULL;
        double best = -1e-12;

        for (size_t s = 0; s < saving_count; s++)
            for (size_t g = 0; g < gain_count; g++)
                if (savings[s].unit != gains[g].unit && savings[s].bytes + gains[g].bytes <= left &&
                    savings[s].loss + gains[g].loss < best) {
                    best = savings[s].loss + gains[g].loss;
                    saving = &savings[s];
                    gain = &gains[g];
                }
        if (!saving)
            break;
        units[saving->unit].chosen = saving->option;
        units[gain->unit].chosen = gain->option;
        fill_up(units, count, budget - total_bytes(units, count));
    }
    free(savings);
    return 0;
}

/* The unit's option nearest to one width and group: not narrower, not coarser where it can be. */
static size_t nearest(const struct fq_choose_unit *unit, int bits, int64_t group) {
    size_t best = SIZE_MAX;
    int64_t wanted = group ? group : INT64_MAX, best_size = 0;
    int best_bits = 0;

    for (size_t i = 0; i < unit->count; i++) {
        const struct fq_choose_option *option = &unit->options[i];
        int64_t size = option->group ? option->group : unit->k;
        bool closer;

        if (option->asymmetric || option->bits < bits)
            continue;
        if (best == SIZE_MAX || option->bits != best_bits)
            closer = best == SIZE_MAX || option->bits < best_bits;
        else if (size <= wanted)
            closer = best_size > wanted || size > best_size;
        else
            closer = best_size > wanted && size < best_size;
        if (closer) {
            best = i;
            best_size = size;
            best_bits = option->bits;
        }
    }
    return best == SIZE_MAX ? cheapest(unit) : best;
}

void fq_choose_take_uniform(struct fq_choose_unit *units, size_t count,
                            const struct fq_choose_uniform *uniform) {
    for (size_t u = 0; u < count; u++)
        units[u].chosen = nearest(&units[u], uniform->bits, uniform->group);
}

/* Whether one of the units before U has the width and group of one of U's options, too. */
static bool is_seen(const struct fq_choose_unit *units, size_t u,
                    const struct fq_choose_option *option) {
    for (size_t v = 0; v < u; v++)
        for (size_t j = 0; j < units[v].count; j++)
            if (units[v].options[j].bits == option->bits &&
                units[v].options[j].group == option->group)
                return true;
    return false;
}

/* Into a list sorted by error, which has room for ROOM. */
static size_t insert(struct fq_choose_uniform *list, size_t found, size_t room,
                     const struct fq_choose_uniform *uniform) {
    size_t at = found < room ? found : room;

    if (at == room && list[room - 1].error <= uniform->error)
        return found;
    for (at = at == room ? room - 1 : at; at > 0 && list[at - 1].error > uniform->error; at--)
        list[at] = list[at - 1];
    list[at] = *uniform;
    return found < room ? found + 1 : room;
}

size_t fq_choose_uniforms(struct fq_choose_unit *units, size_t count, uint64_t budget,
                          double margin, struct fq_choose_uniform *list, size_t room) {
    size_t found = 0;

    for (size_t u = 0; u < count; u++) {
        for (size_t i = 0; i < units[u].count; i++) {
            const struct fq_choose_option *option = &units[u].options[i];
            struct fq_choose_uniform uniform = {.bits = option->bits, .group = option->group};

            if (option->asymmetric || is_seen(units, u, option))
                continue;
            fq_choose_take_uniform(units, count, &uniform);
            uniform.bytes = total_bytes(units, count);
            uniform.error = total_error(units, count);
            if (uniform.bytes <= budget)
                found = insert(list, found, room, &uniform);
        }
    }
    while (found > 1 && list[found - 1].error > list[0].error * (1 + margin))
        found--;
    return found;
}

/* Of every width and group size that any unit has; leaves the best in the units' choices. */
static void best_uniform(struct fq_choose_unit *units, size_t count, uint64_t budget,
                         struct fq_choose_uniform *uniform) {
    *uniform = (struct fq_choose_uniform){.error = INFINITY};
    if (fq_choose_uniforms(units, count, budget, 0, uniform, 1) > 0)
        fq_choose_take_uniform(units, count, uniform);
}

static uint64_t least_bytes(const struct fq_choose_unit *units, size_t count) {
    uint64_t least = 0;

    for (size_t u = 0; u < count; u++)
        least += units[u].options[cheapest(&units[u])].bytes;
    return least;
}

int fq_choose_check(const struct fq_choose_unit *units, size_t count, uint64_t budget,
                    struct fq_error *err) {
    const uint64_t least = least_bytes(units, count);

    if (least <= budget)
        return 0;
    return fq_fail(err, FQ_INVALID,
                   "the budget leaves %" PRIu64
                   " bytes for the quantized weights, they need %" PRIu64 " at least",
                   budget, least);
}

/* The least loss in the budget, as far as it is found: from the cheapest choices on, and from the
 * best uniform ones.  -FQ_INVALID where even the cheapest exceed the budget. */
static int least_loss(struct fq_choose_unit *units, size_t count, uint64_t budget,
                      struct fq_choose_uniform *uniform, struct fq_error *err) {
    size_t *mixed = malloc(count * sizeof *mixed + 1);
    uint64_t left;
    double loss;
    int rc;

    if (!mixed) {
        rc = fq_fail(err, FQ_NO_MEMORY, "no memory to choose for %zu matrices", count);
        goto out;
    }
    if ((rc = fq_choose_check(units, count, budget, err)) < 0)
        goto out;
    left = budget - least_bytes(units, count);
    if ((rc = walk_hulls(units, count, &left, err)) < 0)
        goto out;
    fill_up(units, count, left);
    if ((rc = exchange(units, count, budget, err)) < 0)
        goto out;
    loss = total_loss(units, count);
    for (size_t u = 0; u < count; u++)
        mixed[u] = units[u].chosen;
    best_uniform(units, count, budget, uniform);
    if (uniform->bits) {
        fill_up(units, count, budget - uniform->bytes);
        if ((rc = exchange(units, count, budget, err)) < 0)
            goto out;
    }
    if (!uniform->bits || loss <= total_loss(units, count))
        for (size_t u = 0; u < count; u++)
            units[u].chosen = mixed[u];
out:
    free(mixed);
    return rc;
}

/* The same with the error itself for the loss. */
static int least_error(struct fq_choose_unit *units, size_t count, uint64_t budget,
                       struct fq_choose_uniform *uniform, struct fq_error *err) {
    struct fq_choose_unit *copies = malloc(count * sizeof *copies + 1);
    struct fq_choose_option *options = NULL;
    size_t room = 0, used = 0;
    int rc;

    for (size_t u = 0; u < count; u++)
        room += units[u].count;
    options = malloc(room * sizeof *options + 1);
    if (!copies || !options) {
        rc = fq_fail(err, FQ_NO_MEMORY, "no memory to choose among %zu options", room);
        goto out;
    }
    for (size_t u = 0; u < count; u++) {
        copies[u] = units[u];
        copies[u].options = options + used;
        for (size_t i = 0; i < units[u].count; i++) {
            options[used] = units[u].options[i];
            options[used].loss = options[used].error;
            used++;
        }
    }
    rc = least_loss(copies, count, budget, uniform, err);
    for (size_t u = 0; u < count && rc == 0; u++)
        units[u].chosen = copies[u].chosen;
out:
    free(copies);
    free(options);
    return rc;
}

int fq_choose_by_budget(struct fq_choose_unit *units, size_t count, uint64_t budget,
                        struct fq_choose_uniform *uniform, struct fq_error *err) {
    int rc = least_loss(units, count, budget, uniform, err);

    if (rc == 0 && uniform->bits && total_error(units, count) >= uniform->error)
        rc = least_error(units, count, budget, uniform, err);
    return rc;
}

int fq_choose_again(struct fq_choose_unit *units, size_t count, struct fq_error *err) {
    const double loss = total_loss(units, count), error = total_error(units, count);
    size_t *walked = malloc(count * sizeof *walked + 1);
    struct fq_choose_uniform uniform;
    int rc;

    if (!walked)
        return fq_fail(err, FQ_NO_MEMORY, "no memory to choose for %zu matrices", count);
    for (size_t u = 0; u < count; u++)
        walked[u] = units[u].chosen;
    rc = fq_choose_by_budget(units, count, total_bytes(units, count), &uniform, err);
    if (rc < 0 || (loss <= total_loss(units, count) && error <= total_error(units, count)))
        for (size_t u = 0; u < count; u++)
            units[u].chosen = walked[u];
    free(walked);
    return rc;
}
