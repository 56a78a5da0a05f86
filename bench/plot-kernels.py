#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws time over M, log-log, from a table of finequant-bench kernel, as SVG.

    plot-kernels.py TABLE.csv PICTURE.svg [--n N --k K] [--group G] [--dtype T] [--peak TFLOPS]

One line for each bit width, one for the dense BLAS of the table (cuBLAS or OpenBLAS), and for each
bit width the roofline: the larger of the measured plain read of its bytes and 2·M·N·K over the peak.
The peak, if not given, is the best rate that anything reaches in the table with the same dtype (and
threads): the dense BLAS or ours.  Of several rows for the same point the median is drawn.  Needs
nothing but Python.
"""
import argparse
import csv
import html
import math
import re
import statistics
import sys

WIDTH, HEIGHT = 960, 640
LEFT, RIGHT, TOP, BOTTOM = 84, 150, 78, 64
COLOURS = {8: "#0072b2", 4: "#d55e00", 3: "#009e73"}
DENSE_COLOUR = "#333333"


def read_table(path):
    """The comment lines, and the rows as dictionaries."""
    comments, lines = [], []
    with open(path, encoding="utf-8") as table:
        for line in table:
            (comments if line.startswith("#") else lines).append(line)
    rows = list(csv.DictReader(lines))
    if not rows or not {"bits", "group", "dtype", "n", "k", "m", "us", "read_us"} <= set(rows[0]):
        sys.exit(f"plot-kernels.py: {path} is no table of finequant-bench kernel")
    return comments, rows


def number(text):
    """A field of the table: nothing and "-" mean not measured."""
    return float(text) if text not in ("", "-", None) else None


def choose(rows, options):
    """The rows of one shape, group, dtype, zero points and number of threads: what is not asked
    for is as in the first row that fits."""
    for name in ("n", "k", "group", "dtype", "zero", "threads"):
        if name not in rows[0]:
            continue
        wanted = getattr(options, name)
        wanted = rows[0][name] if wanted is None else wanted
        rows = [row for row in rows if row[name] == wanted]
        if not rows:
            sys.exit(f"plot-kernels.py: no row has {name} {wanted}")
    return rows


def peak_of(rows, chosen, dense):
    """FLOP/s of the best product of the same kind in the whole table."""
    same = [name for name in ("dtype", "threads") if name in chosen[0]]
    return max(2e6 * int(row["m"]) * int(row["n"]) * int(row["k"]) / number(row[column])
               for row in rows for column in ("us", dense)
               if number(row[column]) and all(row[name] == chosen[0][name] for name in same))


def medians(pairs):
    """[(m, value)] to sorted points, one for each m."""
    by_m = {}
    for m, value in pairs:
        if value is not None:
            by_m.setdefault(m, []).append(value)
    return [(m, statistics.median(values)) for m, values in sorted(by_m.items())]


def roofline(reads, us_per_row):
    """The larger of the read and the arithmetic at each m, and where the one passes the other."""
    points = []
    for m, read in reads:
        if points and points[-1][1] > us_per_row * points[-1][0] and us_per_row * m > read:
            corner = points[-1][1] / us_per_row
            if corner < m:
                points.append((corner, points[-1][1]))
        points.append((m, max(read, us_per_row * m)))
    return points


def series_of(chosen, dense, peak):
    """[(label, colour, dashed, points)], the lines of the picture."""
    flops = 2 * int(chosen[0]["n"]) * int(chosen[0]["k"])
    lines = []
    for bits in sorted({int(row["bits"]) for row in chosen}, reverse=True):
        own = [row for row in chosen if int(row["bits"]) == bits]
        reads = medians((int(row["m"]), number(row["read_us"])) for row in own)
        if reads:
            lines.append((f"int{bits} roofline", COLOURS[bits], True,
                          roofline(reads, flops / peak * 1e6)))
        lines.append((f"int{bits}", COLOURS[bits], False,
                      medians((int(row["m"]), number(row["us"])) for row in own)))
    name = {"cublas_us": "cuBLAS", "sgemm_us": "OpenBLAS"}[dense]
    points = medians((int(row["m"]), number(row[dense])) for row in chosen)
    if points:
        kind = chosen[0]["dtype"] if dense == "cublas_us" else "f32"
        lines.append((f"{name} {kind}", DENSE_COLOUR, False, points))
    return lines


class Axes:
    """Where a point lies in the picture."""

    def __init__(self, lines):
        xs = [m for line in lines for m, _ in line[3]]
        ys = [us for line in lines for _, us in line[3]]
        self.x0, self.x1 = min(xs), max(max(xs), 2 * min(xs))
        self.y0 = 10 ** (math.floor(math.log10(min(ys)) * 2) / 2)
        self.y1 = 10 ** (math.ceil(math.log10(max(ys)) * 2) / 2)

    def x(self, m):
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(m / self.x0) / math.log(self.x1 / self.x0)

    def y(self, us):
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * math.log(us / self.y0) / math.log(
            self.y1 / self.y0)


def time_text(us):
    return f"{us / 1e6:g} s" if us >= 1e6 else f"{us / 1000:g} ms" if us >= 1000 else f"{us:g} µs"


def draw_grid(axes, out):
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for power in range(math.ceil(math.log2(axes.x0)), math.floor(math.log2(axes.x1)) + 1):
        x = axes.x(2 ** power)
        out.append(f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}"/>')
        out.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">'
                   f'{2 ** power}</text>')
    for exponent in range(math.floor(math.log10(axes.y0)), math.ceil(math.log10(axes.y1)) + 1):
        for digit in (1, 2, 5):
            us = digit * 10 ** exponent
            if not axes.y0 * 0.999 <= us <= axes.y1 * 1.001:
                continue
            y = axes.y(us)
            out.append(f'<line class="{"decade" if digit == 1 else "grid"}" x1="{LEFT}" '
                       f'y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
            out.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">'
                       f'{time_text(us)}</text>')
    out.append(f'<rect x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{bottom - TOP}" '
               'fill="none" stroke="#666"/>')
    out.append(f'<text class="name" x="{(LEFT + right) / 2}" y="{HEIGHT - 18}" '
               'text-anchor="middle">M, rows of X</text>')
    middle = (TOP + bottom) / 2
    out.append(f'<text class="name" x="22" y="{middle}" text-anchor="middle" '
               f'transform="rotate(-90 22 {middle})">time of one product</text>')


def draw_line(axes, line, out):
    _, colour, dashed, points = line
    path = " ".join(f"{axes.x(m):.1f},{axes.y(us):.1f}" for m, us in points)
    style = 'stroke-width="1.6" stroke-dasharray="7 4" opacity="0.75"' if dashed else \
        'stroke-width="2.4"'
    out.append(f'<polyline fill="none" stroke="{colour}" {style} points="{path}"/>')
    if not dashed:
        out.extend(f'<circle cx="{axes.x(m):.1f}" cy="{axes.y(us):.1f}" r="3.2" fill="{colour}"/>'
                   for m, us in points)


def draw_legend(lines, out):
    x, y = WIDTH - RIGHT + 14, TOP + 10
    for label, colour, dashed, _ in sorted(lines, key=lambda line: line[2]):
        style = 'stroke-width="1.6" stroke-dasharray="7 4" opacity="0.75"' if dashed else \
            'stroke-width="2.4"'
        out.append(f'<line x1="{x}" y1="{y}" x2="{x + 26}" y2="{y}" stroke="{colour}" {style}/>')
        out.append(f'<text class="tick" x="{x + 32}" y="{y + 4}">{html.escape(label)}</text>')
        y += 22


def draw(title, subtitle, lines):
    axes = Axes(lines)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
           f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="Helvetica, Arial, sans-serif">',
           "<style>.grid{stroke:#e4e4e4}.decade{stroke:#b8b8b8}.tick{font-size:12px;fill:#333}"
           ".name{font-size:14px;fill:#111}.title{font-size:18px;fill:#111}</style>",
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
           f'<text class="title" x="{LEFT}" y="32">{html.escape(title)}</text>',
           f'<text class="name" x="{LEFT}" y="56">{html.escape(subtitle)}</text>']
    draw_grid(axes, out)
    for line in lines:
        draw_line(axes, line, out)
    draw_legend(lines, out)
    out.append("</svg>\n")
    return "\n".join(out)


def device_of(comments):
    """What a comment names: "# NVIDIA H200, cuBLAS 13.0: command", "# cpu: AMD EPYC, avx512: ..."."""
    for comment in comments:
        found = re.match(r"# (?!finequant-bench)(?:\w+: )?([^:,]+)[,:]", comment)
        if found:
            return found.group(1).strip()
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("table")
    parser.add_argument("picture")
    for name in ("n", "k", "group", "dtype", "zero", "threads"):
        parser.add_argument(f"--{name}", help="of the rows to draw (default: the first row's)")
    parser.add_argument("--peak", type=float, metavar="TFLOPS",
                        help="arithmetic peak (default: the best rate in the table)")
    options = parser.parse_args()
    comments, rows = read_table(options.table)
    dense = "cublas_us" if "cublas_us" in rows[0] else "sgemm_us"
    chosen = choose(rows, options)
    peak = options.peak * 1e12 if options.peak else peak_of(rows, chosen, dense)
    first = chosen[0]
    group = "one scale a row" if first["group"] == "channel" else f"groups of {first['group']}"
    parts = [f"{first['n']} × {first['k']}", first["dtype"], group]
    if first["zero"] == "1":
        parts.append("zero points")
    if "threads" in first:
        parts.append("1 thread" if first["threads"] == "1" else f"{first['threads']} threads")
    rate = f"{peak / 1e12:.3g} TFLOP/s" if peak >= 1e12 else f"{peak / 1e9:.3g} GFLOP/s"
    subtitle = f"roofline: a plain read of the bytes, or 2·M·N·K at {rate}"
    device = device_of(comments)
    title = ", ".join(parts) + (f" on {device}" if device else "")
    picture = draw(title, subtitle, series_of(chosen, dense, peak))
    with open(options.picture, "w", encoding="utf-8") as out:
        out.write(picture)


if __name__ == "__main__":
    main()
