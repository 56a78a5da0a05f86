# SPDX-License-Identifier: Apache-2.0
"""What summary.py and summary-cpu.py have in common: a table of finequant-bench kernel, and a goal's line."""
import csv
import sys

HEADING = "\n| goal | bound | rows that reach it | farthest |\n|---|---|---|---|"


def read_rows(path, of, columns):
    """The rows, as dictionaries, of a table of what `of` names; ends the program where it lacks one
    of the columns."""
    with open(path, encoding="utf-8") as table:
        rows = list(csv.DictReader(line for line in table if not line.startswith("#")))
    if not rows or not set(columns) <= set(rows[0]):
        sys.exit(f"{sys.argv[0]}: {path} is no table of {of}")
    return rows


def measured(row, columns):
    """{column: number} of those that have one."""
    return {name: float(row[name]) for name in columns if row[name] not in ("", "-")}


def print_goal(title, values, bound, more, name):
    """values: [(value or None, key)]; more: whether the larger the better; name(key): how a row is called."""
    values = [(value, key) for value, key in values if value is not None]
    sign = "≥" if more else "≤"
    if not values:
        print(f"| {title} | {sign} {bound} | not measured | |")
        return
    reached = sum(value >= bound if more else value <= bound for value, _ in values)
    worst, key = (min if more else max)(values)
    print(f"| {title} | {sign} {bound} | {reached} of {len(values)} | {worst:.2f} ({name(key)}) |")


def matrix_name(bits, group, zero, dtype, n, k, m):
    return f"int{bits} g{group}{' zero' if zero == '1' else ''} {dtype} {n}×{k} M={m}"
