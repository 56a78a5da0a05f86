#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What finequant-quantize chooses, against numpy: the statistic and the two steps of --group auto,
outliers in few matrices, and budgets.  Errors and bytes are counted here, from the files."""
import math
import os
import re
import sys
import tempfile

import numpy as np

from checkpoint import (check_same_refusal, matrices_of, mixture, quantize, relative, run,
                        write_checkpoint)


def summed_error(tensors, found):
    return sum(relative(tensors[module + ".weight"], entry[3]) for module, entry in found.items())


# ---- the statistic and the rule, written again ---------------------------------------------------


def candidates(k, least):
    groups, half = [k], k
    while half % 2 == 0 and (half == k or half > 256):
        half //= 2
        if half % 16 == 0 and half >= least:
            groups.append(half)
    return groups + [g for g in (256, 128, 64, 32, 16)
                     if least <= g < groups[-1] and k % g == 0]


def expected_error(weights, group, bits):
    weights = weights.astype(np.float64)
    largest = np.abs(weights).reshape(len(weights), -1, group).max(axis=2)
    step = 2 * largest / (2 ** bits - 1)
    return math.sqrt((step ** 2).mean() / 12 / (weights ** 2).mean())


def choose(weights, bits, alpha, least):
    groups = candidates(weights.shape[1], least)
    errors = [expected_error(weights, g, bits) for g in groups]
    at = 0
    while True:
        for i in range(at + 1, len(groups)):
            halvings = math.log2(groups[at] / groups[i])
            bits_more = 16 / groups[i] - 16 / groups[at]
            if (errors[i] <= errors[at] * (1 - alpha) ** halvings
                    and errors[i] <= errors[at] * 2 ** -bits_more):
                at = i
                break
        else:
            return groups[at]


def explained(*arguments):
    """{module: (group of the walk, group chosen)} from --explain; 0 is per channel."""
    text = run(*arguments, "--dry-run", "--explain", "--quiet").stdout
    found = {}
    for line in text.splitlines():
        said = re.match(r"     (alpha|its bytes shared out anew): (channel|\d+), ", line)
        if line.endswith(":") and not line.startswith(" "):
            name = line[:-1]
        elif said:
            group = 0 if said[2] == "channel" else int(said[2])
            found[name] = (group, group) if said[1] == "alpha" else (found[name][0], group)
    return found


def tables(said):
    """{first name: rows of a table of --explain, each a list of words}."""
    found, at = {}, None
    for line in said.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            at = found.setdefault(line[:-1].split(", ")[0], [])
        elif at is not None and line.startswith("  ") and re.search(r"\d$|%$|-$", line):
            at.append(line.split())
    return found


def check_steps_table(plan, tensors):
    """Each row against alpha's: gain a halving, what that is worth, what its scales cost."""
    assert plan.count("row is compared with alpha's") == 1
    for name, rows in tables(plan).items():
        array = tensors[name + ".weight"]
        marked = {row[0]: row[1:] for row in rows if row[0] in ("*", "->")}
        walked = marked.get("*", marked["->"])
        for row in (row[1:] if row[0] in marked else row for row in rows):
            if row == walked:
                assert len(row) in (3, 4) and "%" not in row[-1], row
                continue
            pair = [array.shape[1] if r[0] == "channel" else int(r[0]) for r in (row, walked)]
            coarse, fine = max(pair), min(pair)
            errors = [expected_error(array, g, 4) for g in (coarse, fine)]
            gain = 1 - (errors[1] / errors[0]) ** (1 / math.log2(coarse / fine))
            assert abs(float(row[3][:-1]) / 100 - gain) < 6e-4, (name, row, gain)
            assert abs(float(row[4]) - math.log2(errors[0] / errors[1])) < 2e-4, (name, row)
            assert abs(float(row[5]) - (16 / fine - 16 / coarse)) < 1e-4, (name, row)


def check_options_table(source):
    """Each row against the chosen one: bytes and error more or less."""
    plan = run(source, source + "-none", "--dry-run", "--explain", "--quiet", "-w", "4.6").stdout
    assert plan.count("'to chosen' is what") == 1
    found = tables(plan)
    assert len(found) == 10
    for name, rows in found.items():
        chosen, = (row[1:] for row in rows if row[0] == "->")
        assert chosen[4] == chosen[6] == "-" and len(rows) > 10, rows
        for row in rows:
            if row[0] == "->":
                continue
            for value, more in ((3, 4), (5, 6)):
                wanted = 100 * (float(row[value]) / float(chosen[value]) - 1)
                assert row[more][0] in "+-" and row[more][-1] == "%"
                assert abs(float(row[more][:-1]) - wanted) < 0.06 + abs(wanted) * 0.02, (name, row)


def check_auto(work, random):
    tensors = {
        "plain.weight": random.normal(0, 1, (24, 512)),
        "tails.weight": random.standard_t(3, (24, 768)),
        "columns.weight": random.normal(0, 1, (24, 1024)),
        "spread.weight": random.normal(0, 1, (24, 512)),
        "flat.weight": random.choice((-1.0, 1.0), (24, 512)),
        "odd.weight": random.normal(0, 1, (24, 100)),
    }
    tensors["columns.weight"][:, 300] *= 40
    tensors["spread.weight"][:, ::64] *= 30  # the first three halvings find one in each half
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    source = os.path.join(work, "auto-in")
    write_checkpoint(source, tensors)
    chosen = set()
    for number, (bits, alpha, least) in enumerate(((4, 0.02, 16), (4, 0.12, 16), (3, 0.02, 64),
                                                   (8, 0, 16), (4, 0.9, 16))):
        out = os.path.join(work, f"auto-{number}")
        arguments = ("--bits", str(bits), "--alpha", str(alpha), "--min-group", str(least), "--scale",
                     "absmax")
        walks = explained(source, out, *arguments)
        report = quantize(source, out, *arguments)
        for layer in report["matrices"]:
            name, k = layer["name"], layer["k"]
            wanted = choose(tensors[name + ".weight"], bits, alpha, least)
            assert walks[name][0] == (wanted if wanted < k else 0), (layer, wanted, alpha)
            assert layer["kept_dense"] or layer["group"] == (walks[name][1] or k), (layer, walks)
            assert not layer["kept_dense"] or bits == 3
            chosen.add(walks[name][0])
    assert len(chosen) >= 4, chosen  # else nothing was put to the test
    plan = run(source, os.path.join(work, "none"), "--dry-run", "--explain", "--quiet").stdout
    for name, array in tensors.items():
        assert name[:-len(".weight")] in plan
        for group in candidates(array.shape[1], 16):
            assert f"{expected_error(array, group, 4):.4f}" in plan, (name, group)
    check_steps_table(plan, tensors)
    assert not os.path.exists(os.path.join(work, "none"))


# ---- the second step: the walk's bytes, shared out anew ---------------------------------------------


def structured(random):
    """Matrices of several sizes, all with something that groups follow, more or less."""
    tensors = {}
    for i in range(12):
        n, k = ((16, 1536), (256, 768), (32, 384))[i % 3]
        weights = random.standard_t(12 + i, (n, k))
        weights *= np.exp(random.normal(0, 0.15 * (i % 4), k // 32)).repeat(32)
        tensors[f"m.{i}.weight"] = weights.astype(np.float32)
    return tensors


def totals(tensors, found):
    """Bytes, summed error and Σ √(N·K)·e²."""
    errors = {module: relative(tensors[module + ".weight"], entry[3])
              for module, entry in found.items()}
    return (sum(entry[2] for entry in found.values()), sum(errors.values()),
            sum(math.sqrt(tensors[m + ".weight"].size) * e * e for m, e in errors.items()))


def check_sharing(work, random):
    tensors = structured(random)
    source = os.path.join(work, "shared-in")
    write_checkpoint(source, tensors)
    moved = 0
    for number, arguments in enumerate(((), ("--alpha", "0.1"), ("--bits", "3"),
                                        ("--alpha", "0.02", "--minimize", "error"))):
        out = os.path.join(work, f"shared-{number}")
        bits = arguments[1] if "--bits" in arguments else "4"
        plan = explained(source, out, *arguments)
        assert sorted(plan) == sorted(name[:-len(".weight")] for name in tensors), plan
        quantize(source, out, *arguments)
        ours = matrices_of(out)
        assert {m: e[1] or 0 for m, e in ours.items()} == {m: p[1] for m, p in plan.items()}
        rules = [rule for module, (group, _) in plan.items()
                 for rule in ("--override", f"{module}={bits},{group or 'channel'}")]
        quantize(source, out + "-walk", *rules)
        walked = totals(tensors, matrices_of(out + "-walk"))
        mine = totals(tensors, ours)
        kind = 1 if "error" in arguments else 2
        assert mine[0] <= walked[0] and mine[kind] <= walked[kind] * (1 + 1e-9), (mine, walked)
        for group in ("channel", "128", "64", "32", "16"):
            uniform = out + "-" + group
            quantize(source, uniform, "--bits", bits, "--group", group)
            theirs = totals(tensors, matrices_of(uniform))
            assert theirs[0] > walked[0] or mine[1] <= theirs[1] * (1 + 1e-9), (group, mine, theirs)
        moved += mine[kind] < 0.99 * walked[kind]
    assert moved >= 2, moved  # else there was nothing to share out


# ---- outliers in few matrices, after the paper's failure -----------------------------------------


def planted(random, count=48, spoilt=(7, 30), n=64, k=1024):
    tensors = {f"m.{i}.weight": random.normal(0, 0.02, (n, k)).astype(np.float32)
               for i in range(count)}
    clean = {name: array.copy() for name, array in tensors.items()}
    for i in spoilt:
        tensors[f"m.{i}.weight"][:, random.integers(k)] = 0.02 * 40 * random.choice((-1, 1), n)
    return tensors, clean


def check_outliers(work, random):
    tensors, clean = planted(random)
    results = {}
    for what, weights, arguments in (("channel", tensors, ("--group", "channel")),
                                     ("clean", clean, ("--group", "channel")),
                                     ("auto", tensors, ())):
        source = os.path.join(work, f"planted-{what}")
        write_checkpoint(source, weights)
        quantize(source, source + "-out", *arguments)
        found = matrices_of(source + "-out")
        results[what] = (found, summed_error(weights, found), sum(m[2] for m in found.values()))
    spoilt = [relative(tensors[f"m.{i}.weight"], results["channel"][0][f"m.{i}"][3])
              for i in (7, 30)]
    assert min(spoilt) > 4 * results["clean"][1] / 48, spoilt  # it collapses
    lost = results["channel"][1] - results["clean"][1]
    recovered = (results["channel"][1] - results["auto"][1]) / lost
    refined = sorted(name for name, entry in results["auto"][0].items() if entry[1])
    assert recovered >= 0.94, recovered
    assert results["auto"][2] <= 1.01 * results["channel"][2]
    assert set(refined) >= {"m.7", "m.30"} and len(refined) <= 4, refined


# ---- budgets -------------------------------------------------------------------------------------


def check_budget(work, random):
    tensors = mixture(random)
    source = os.path.join(work, "budget-in")
    write_checkpoint(source, tensors)
    dense = tensors["norm.weight"].nbytes + tensors["embed.weight"].nbytes
    uniform = {}
    for bits in (8, 4, 3):
        for group in ("channel", "128", "64", "32", "16"):
            out = os.path.join(work, f"uniform-{bits}-{group}")
            quantize(source, out, "--bits", str(bits), "--group", group)
            found = matrices_of(out)
            uniform[bits, group] = (sum(m[2] for m in found.values()), summed_error(tensors, found))
    for (bits, group), (allowed, error) in uniform.items():
        for fixed in ((), ("--bits", str(bits))):
            out = os.path.join(work, f"budget-{bits}-{group}-{len(fixed)}")
            report = quantize(source, out, "--budget", str(allowed + dense), *fixed)
            found = matrices_of(out)
            mine = summed_error(tensors, found)
            assert sum(m[2] for m in found.values()) == report["bytes_after"] <= allowed
            assert report["budget"]["allowed"] == allowed
            assert mine <= error * (1 + 1e-6), (bits, group, fixed, mine, error)
            assert group in ("channel", "16") or mine < 0.99 * error, (bits, group, mine, error)
            assert abs(report["budget"]["error"] - mine) < 1e-5 * mine
            assert report["budget"]["uniform_bytes"] <= allowed
            named = report["budget"]["uniform_error"]
            assert mine <= named * (1 + 1e-6) and named <= error * (1 + 1e-6), (mine, named, error)
            assert not fixed or all(m[0] == bits for m in found.values())
    weights = sum(a.size for name, a in tensors.items() if name.startswith("l."))
    for width in (3.3, 4.6, 6):
        out = os.path.join(work, f"width-{width}")
        quantize(source, out, "--bits-per-weight", str(width))
        found = matrices_of(out)
        spent = 8 * sum(m[2] for m in found.values()) / weights
        assert 0.97 * width < spent <= width, (width, spent)
        assert len({m[:2] for m in found.values()}) > 1
        plain = quantize(source, out + "-error", "--bits-per-weight", str(width), "--minimize",
                         "error")
        assert plain["bytes_after"] * 8 <= width * weights
        assert plain["budget"]["error"] <= summed_error(tensors, found) * (1 + 1e-6), (width, plain)
    for widths, width in (({8, 4}, 6.2), ({4, 3}, 3.6), ({8, 3}, 5)):
        out = os.path.join(work, f"widths-{width}")
        wanted = ",".join(map(str, sorted(widths, reverse=True)))
        report = quantize(source, out, "--bits", wanted, "--bits-per-weight", str(width))
        assert {m[0] for m in matrices_of(out).values()} == widths == set(report["bits"]), widths
    check_options_table(source)
    for budget in (("--budget", "20K"), ("--bits-per-weight", "4")):  # all is fixed beyond it
        check_same_refusal(source, os.path.join(work, "fixed"), "--override leaves too little", *budget,
                           "--override", "*=8,channel")
    check_same_refusal(source, os.path.join(work, "fixed"), "--override fixes", "--bits-per-weight", "4",
                       "--override", "*.[1-9]=8,16")
    check_uniform_with_override(source, os.path.join(work, "partly"))
    small = run(source, os.path.join(work, "small"), "--bits-per-weight", "2")  # and reads no weight
    assert small.returncode == 3 and small.stderr.count("\n") == 1, small
    assert "2 bits a weight: the budget leaves" in small.stderr and "at least" in small.stderr, small
    assert not os.path.exists(os.path.join(work, "small"))


def check_uniform_with_override(source, out):
    """The bytes of the best uniform choice are told with those that are fixed, as the budget's are."""
    fixed = ("--override", "l.3=8,32")
    budget = quantize(source, out, "--bits-per-weight", "4.6", *fixed)["budget"]
    same = ("--bits", str(budget["uniform_bits"]), "--group", str(budget["uniform_group"] or "channel"))
    uniform = quantize(source, out + "-uniform", *same, *fixed)
    assert uniform["bytes_after"] == budget["uniform_bytes"] <= budget["allowed"], (uniform, budget)


def check_large(work, random):
    """Large matrices are looked at twice: what is told of them is exact all the same."""
    tensors = {}
    for i in range(4):
        weights = random.standard_t(4, (2048, 512)) * np.exp(random.normal(0, 0.5, (2048, 1)))
        weights[:, i] *= 20
        tensors[f"l.{i}.weight"] = weights.astype(np.float32)
    tensors["l.3.weight"][700] *= 50
    tensors["small.weight"] = random.standard_t(3, (64, 512)).astype(np.float32)
    source = os.path.join(work, "large-in")
    write_checkpoint(source, tensors)
    out = os.path.join(work, "large-out")
    report = quantize(source, out, "--bits-per-weight", "4.3")
    mine = summed_error(tensors, matrices_of(out))
    budget = report["budget"]
    assert abs(budget["error"] / mine - 1) < 1e-6, (budget, mine)
    same = ("--bits", str(budget["uniform_bits"]), "--group", str(budget["uniform_group"] or "channel"))
    uniform = quantize(source, out + "-uniform", *same)
    theirs = summed_error(tensors, matrices_of(out + "-uniform"))
    assert abs(budget["uniform_error"] / theirs - 1) < 1e-6, (budget, theirs)
    assert uniform["bytes_after"] == budget["uniform_bytes"] <= budget["allowed"]
    assert mine <= theirs * (1 + 1e-9), (mine, theirs)
    told = run(source, out + "-plan", "--bits-per-weight", "4.3", "--dry-run", "--explain", "--quiet")
    assert told.stdout.count("~") > 40, told  # else nothing was estimated
    chosen = [line for line in told.stdout.splitlines() if line.startswith("  ->")]
    assert len(chosen) == 5 and not any("~" in line for line in chosen), chosen


def main():
    random = np.random.default_rng(11)
    with tempfile.TemporaryDirectory() as work:
        check_auto(work, random)
        check_sharing(work, np.random.default_rng(5))
        check_outliers(work, random)
        check_budget(work, random)
        check_large(work, np.random.default_rng(6))


if __name__ == "__main__":
    sys.exit(main())
