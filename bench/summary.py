#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Sums up a table of finequant-bench kernel --backend cuda against what it is meant to reach.

    summary.py TABLE.csv [FLOORS.csv CLOCKS.csv]

Prints Markdown.  For each matrix, bit width and dtype at group 64, at each m: time over the plain
read's and, behind it, how many times as fast as cuBLAS.  Then every goal with its rows: how many
reach it, and the row farthest from it.  Of several rows for one point the median counts.

With tables of bench/floors and of --clocks, also what one more tile of K takes, without a launch's
start and end: by 12288×49152 and 12288×12288, where most of 132 multiprocessors have three strips
of 64 rows; and what its arithmetic alone would take at the clock that 12288×49152 ran at.
"""
import statistics
import sys
from collections import defaultdict

from goals import HEADING, matrix_name, measured, print_goal, read_rows

KERNEL = "finequant-bench kernel --backend cuda"
OPT_175B = {(12288, 12288), (49152, 12288), (12288, 49152)}
MIB_64 = 64 << 20


def read_table(path):
    """{(bits, group, zero, dtype, n, k, m): {us, read_us, cublas_us, err}}"""
    columns = ("us", "read_us", "cublas_us", "err")
    found = defaultdict(lambda: defaultdict(list))
    for row in read_rows(path, KERNEL, ("bits", *columns)):
        key = (int(row["bits"]), row["group"], row["zero"], row["dtype"],
               *(int(row[name]) for name in ("n", "k", "m")))
        for name, value in measured(row, columns).items():
            found[key][name].append(value)
    return {key: {name: statistics.median(values) for name, values in row.items()}
            for key, row in found.items()}


def weight_bytes(bits, n, k):
    return n * k * bits / 8 + n * k / 64 * 2


def over_read(row):
    return row["us"] / row["read_us"]


def over_cublas(row):
    return row["cublas_us"] / row["us"] if "cublas_us" in row else None


# What is said of a goal, the rows it is for, what is measured, its bound, whether more is better.
def goals():
    def plain(least, most, big):
        return lambda bits, n, k, m: least <= m <= most and (
            weight_bytes(bits, n, k) >= MIB_64) == big

    def dense(widths, least, most, shapes=None):
        return lambda bits, n, k, m: bits in widths and least <= m <= most and (
            shapes is None or shapes(n, k))

    def opt(n, k):
        return (n, k) in OPT_175B

    def large(n, k):
        return n * k >= 12288 * 12288

    return [
        ("M 1-16, 64 MiB of weights and more: time over read", plain(1, 16, True), over_read, 1.15,
         False),
        ("M 1-16, below 64 MiB: time over read", plain(1, 16, False), over_read, 1.35, False),
        ("M 1-16, OPT-175B, int4 over cuBLAS", dense({4}, 1, 16, opt), over_cublas, 3.5, True),
        ("M 1-16, OPT-175B, int8 over cuBLAS", dense({8}, 1, 16, opt), over_cublas, 1.85, True),
        ("M 1-16, OPT-175B, int3 over cuBLAS", dense({3}, 1, 16, opt), over_cublas, 4.3, True),
        ("M 32-64, int4 over cuBLAS", dense({4}, 32, 64), over_cublas, 2.3, True),
        ("M 128-256, 12288 × 12288 and larger, int4 over cuBLAS", dense({4}, 128, 256, large),
         over_cublas, 1.0, True),
        ("M 1024 and more, int4 and int8 over cuBLAS", dense({4, 8}, 1024, 65536), over_cublas,
         0.97, True),
    ]


def name_of(key):
    return matrix_name(*key)


def print_goals(table):
    print(HEADING)
    for title, wanted, measure, bound, more in goals():
        values = [(measure(row), key) for key, row in table.items()
                  if key[1:3] == ("64", "0") and wanted(key[0], *key[4:])]
        print_goal(title, values, bound, more, name_of)
    values = []
    for key, row in table.items():  # the same matrix and m at group 64 predicts by the bytes
        base = table.get((key[0], "64", "0", *key[3:]))
        if base and key[1:3] != ("64", "0"):
            values.append((row["us"] / (base["us"] * row["read_us"] / base["read_us"]), key))
    print_goal("other groups and zero points: time over what the bytes predict", values, 1.1, False,
               name_of)
    errors = {"f16": 1e-3, "bf16": 5e-3}
    for dtype, bound in errors.items():
        print_goal(f"{dtype}: relative error, in thousandths",
                   [(row["err"] * 1e3, key) for key, row in table.items() if key[3] == dtype],
                   bound * 1e3, False, name_of)


def print_matrices(table):
    rows = {key: row for key, row in table.items() if key[1:3] == ("64", "0")}
    counts = sorted({key[6] for key in rows})
    print("| matrix | " + " | ".join(f"M={m}" for m in counts) + " |\n|---" +
          "|---" * len(counts) + "|")
    for bits, dtype, n, k in sorted({(key[0], key[3], *key[4:6]) for key in rows},
                                    key=lambda kind: (-kind[2] * kind[3], *kind)):
        cells = []
        for m in counts:
            row = rows.get((bits, "64", "0", dtype, n, k, m))
            dense = row and over_cublas(row)
            cells.append("" if not row else f"{over_read(row):.2f}" +
                         (f", {dense:.2f}×" if dense else ""))
        print(f"| {n}×{k} int{bits} {dtype} | " + " | ".join(cells) + " |")


STRIPS, DEEP, SHALLOW = 3, 49152, 12288


def print_floors(table, floors_path, clocks_path):
    floors = {(int(row["bits"]), row["dtype"], int(row["rows"])): float(row["all"])
              for row in read_rows(floors_path, "bench/floors", ("bits", "dtype", "rows", "all"))}
    clocks = defaultdict(list)
    for row in read_rows(clocks_path, KERNEL + " --clocks", ("bits", "mhz")):
        if (row["group"], row["zero"], row["n"], row["k"]) == ("64", "0", str(SHALLOW), str(DEEP)):
            clocks[int(row["bits"]), row["dtype"], int(row["m"])].append(float(row["mhz"]))
    print("\nNanoseconds for a tile of a strip; the arithmetic alone at the clock of the replays.\n")
    print("| | M | MHz | time | plain read | arithmetic | over the larger |\n" + "|---" * 7 + "|")
    tiles = STRIPS * (DEEP - SHALLOW) // 64 // 2  # of a CTA, which has half of K
    for (bits, dtype, rows), cycles in sorted(floors.items()):
        m = 1 if rows == 8 else rows
        deep, shallow = (table.get((bits, "64", "0", dtype, SHALLOW, k, m))
                         for k in (DEEP, SHALLOW))
        if not deep or not shallow or (bits, dtype, m) not in clocks:
            continue
        time, read = ((deep[name] - shallow[name]) * 1e3 / tiles for name in ("us", "read_us"))
        mhz = statistics.median(clocks[bits, dtype, m])
        floor = cycles / mhz * 1e3
        print(f"| int{bits} {dtype} | {m} | {mhz:.0f} | {time:.1f} | {read:.1f} | {floor:.1f} | "
              f"{time / max(read, floor):.2f} |")


def main():
    if len(sys.argv) not in (2, 4):
        sys.exit(__doc__)
    table = read_table(sys.argv[1])
    print_matrices(table)
    print_goals(table)
    if len(sys.argv) == 4:
        print_floors(table, sys.argv[2], sys.argv[3])


if __name__ == "__main__":
    main()
