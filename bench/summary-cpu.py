#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Sums up a table of finequant-bench kernel --backend cpu against what it is meant to reach.

    summary-cpu.py TABLE.csv

Prints Markdown.  For each matrix, bit width and dtype at group 64, the part of the plain read's
rate at each m up to 4; then every goal with its rows: how many reach it, and the row farthest from
it.  Every row counts by itself, against the read beside it; other groups against the row of group 64
that stands before them.
"""
import sys

from goals import HEADING, matrix_name, measured, print_goal, read_rows

FEW = (1, 2, 3, 4)


def read_table(path):
    """[((bits, group, zero, dtype, threads, n, k, m), {us, read_us, sgemm_us})]"""
    return [((int(row["bits"]), row["group"], row["zero"], row["dtype"],
              *(int(row[name]) for name in ("threads", "n", "k", "m"))),
             measured(row, ("us", "read_us", "sgemm_us")))
            for row in read_rows(path, "finequant-bench kernel --backend cpu",
                                 ("bits", "threads", "sgemm_us", "read_us", "us"))]


def of_read(row):
    return row["read_us"] / row["us"]


def of_sgemm(row):
    return row["sgemm_us"] / row["us"] if "sgemm_us" in row else None


def name_of(key):
    return f"{matrix_name(*key[:4], *key[5:])}, {key[4]} threads"


def goal(title, bound, values, more=True):
    print_goal(title, values, bound, more, name_of)


def print_goals(table):
    plain = [(key, row) for key, row in table if key[1:3] == ("64", "0")]

    def ratio(measure, wanted):
        return [(measure(row), key) for key, row in plain if wanted(key[0], key[3], key[7])]

    print(HEADING)
    for m in FEW:
        for bits, bound in ((8, 0.75), (4, 0.75), (3, 0.6)):
            goal(f"int{bits}, M = {m}: part of the read", bound,
                       ratio(of_read, lambda b, _, at, bits=bits, m=m: b == bits and at == m))
    goal("int4, M = 1: times sgemv", 5, ratio(of_sgemm, lambda b, _, m: b == 4 and m == 1))
    goal("M ≥ 64, fp32: times sgemm", 0.85,
               ratio(of_sgemm, lambda _, dtype, m: dtype == "f32" and m >= 64))
    goal("M ≥ 64, bf16: times sgemm", 1,
               ratio(of_sgemm, lambda _, dtype, m: dtype == "bf16" and m >= 64))
    others, bases = [], {}
    for key, row in table:  # the same matrix and m at group 64 predicts by the bytes
        if key[1:3] == ("64", "0"):
            bases[key] = row
        elif (base := bases.get((key[0], "64", "0", *key[3:]))):
            others.append((of_read(base) / of_read(row), key))
    for title, bound, small in (("group 16: time over what the bytes predict", 1.25, True),
                                ("other groups: time over what the bytes predict", 1.1, False)):
        goal(title, bound, [pair for pair in others if (pair[1][1] == "16") == small], False)


def print_parts(table):
    rows = {}
    for key, row in table:
        if key[1:3] == ("64", "0") and key[7] in FEW:
            rows.setdefault((key[0], *key[3:]), []).append(row)
    print("| part of the read | GB/s | " + " | ".join(f"M={m}" for m in FEW) + " |\n|---|---" +
          "|---" * len(FEW) + "|")
    for bits, dtype, threads, n, k in sorted({key[:5] for key in rows},
                                             key=lambda kind: (kind[3], -kind[0], kind[1])):
        cells = [rows.get((bits, dtype, threads, n, k, m), []) for m in FEW]
        reads = [n * k * (bits / 8 + 2 / 64) / row["read_us"] / 1e3 for cell in cells for row in cell]
        print(f"| {n}×{k} int{bits} {dtype}, {threads} threads | {min(reads):.0f}–{max(reads):.0f} | " +
              " | ".join(", ".join(f"{of_read(row):.2f}" for row in cell) for cell in cells) + " |")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    table = read_table(sys.argv[1])
    print_parts(table)
    print_goals(table)


if __name__ == "__main__":
    main()
