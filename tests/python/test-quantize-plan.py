#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What finequant-quantize chooses, against numpy: the statistic and the rule of --group auto,
budgets, rules by name, tensors of experts, and weights that are no numbers.  Errors and bytes are
counted here, from the files."""
import json
import math
import os
import pty
import re
import subprocess
import sys
import tempfile

import numpy as np

from checkpoint import (PROGRAM, dequantize, quantize, read_checkpoint, read_quantization, relative,
                        scheme_of, write_checkpoint)


def run(*arguments):
    return subprocess.run([PROGRAM, *arguments], capture_output=True, text=True)


def matrices_of(out):
    """Counted from the files: {module: (bits, group, bytes, dequantized)}."""
    tensors, quantization = read_checkpoint(out), read_quantization(out)
    found = {}
    for name in tensors:
        if not name.endswith(".weight_packed"):
            continue
        module = name[:-len(".weight_packed")]
        scheme = scheme_of(quantization, module)
        size = sum(array.nbytes for key, array in tensors.items()
                   if key.startswith(module + ".weight_"))
        found[module] = (scheme["num_bits"], scheme["group_size"], size,
                         dequantize(tensors, quantization, module))
    return found


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


def mixture(random):
    tensors = {}
    for i in range(10):
        k = (256, 384, 1024)[i % 3]
        weights = random.normal(0, 1, (48, k)) if i % 2 else random.standard_t(4, (48, k))
        if i in (2, 5):
            weights[:, 17] *= 25
        tensors[f"l.{i}.weight"] = weights.astype(np.float32)
    tensors["norm.weight"] = np.ones(64, np.float32)
    tensors["embed.weight"] = random.normal(0, 1, (20, 64)).astype(np.float32)
    return tensors


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
    small = quantize(source, os.path.join(work, "small"), "--bits-per-weight", "2", check=False)
    assert small.returncode == 3 and "at least" in small.stderr, small
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


# ---- rules ---------------------------------------------------------------------------------------


def check_rules(work, random):
    def normal(*shape):
        return random.normal(0, 1, shape).astype(np.float32)

    tensors = {"model.embed_tokens.weight": normal(40, 256), "lm_head.weight": normal(40, 256),
               "model.norm.weight": np.ones(256, np.float32)}
    for i in range(2):
        layer = f"model.layers.{i}."
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
            tensors[layer + name + ".weight"] = normal(32, 256)
    tensors["model.layers.0.self_attn.k_proj.weight"][:, 9] *= 50
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = normal(3, 64, 256)
    tensors["model.layers.0.mlp.experts.down_proj"] = normal(3, 256, 32)
    tensors["model.layers.1.conv.weight"] = normal(8, 4, 32)  # three axes, but no experts
    tensors["model.layers.0.mlp.gate.weight"] = normal(3, 256)  # chooses experts
    tensors["model.layers.0.mlp.shared_expert_gate.weight"] = normal(1, 256)
    tensors["score.weight"] = normal(2, 256)
    source = os.path.join(work, "rules-in")
    write_checkpoint(source, tensors)

    out = os.path.join(work, "rules-default")
    quantize(source, out, "--group", "auto")
    found, after = matrices_of(out), read_checkpoint(out)
    experts = [f"model.layers.0.mlp.experts.{e}.{part}" for e in range(3)
               for part in ("gate_proj", "up_proj", "down_proj")]
    attention = [f"model.layers.{i}.self_attn.{c}_proj" for i in range(2) for c in "qkvo"]
    assert sorted(found) == sorted(experts + attention)
    ignore = read_quantization(out)["ignore"]
    for name in ("model.embed_tokens", "lm_head", "model.layers.1.conv", "score",
                 "model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate"):
        assert np.array_equal(after[name + ".weight"], tensors[name + ".weight"])
        assert name in ignore
    fused = tensors["model.layers.0.mlp.experts.gate_up_proj"]
    for e in range(3):  # each expert's rows are its own
        for part, rows in (("gate_proj", fused[e, :32]), ("up_proj", fused[e, 32:]),
                           ("down_proj", tensors["model.layers.0.mlp.experts.down_proj"][e])):
            assert relative(rows, found[f"model.layers.0.mlp.experts.{e}.{part}"][3]) < 0.2
    assert len({found[name][:2] for name in experts}) == 1  # vLLM's one scheme for all experts
    qkv = {found[f"model.layers.0.self_attn.{c}_proj"][:2] for c in "qkv"}
    assert len(qkv) == 1 and qkv != {found["model.layers.1.self_attn.q_proj"][:2]}
    targets = [t for g in read_quantization(out)["config_groups"].values() for t in g["targets"]]
    assert sorted(targets) == sorted(found)  # several schemes: names alone
    again = run("inspect", out, "--against", source, "--json")
    errors = {m["name"]: m["error"] for m in json.loads(again.stdout)["matrices"]}
    for e in range(3):
        name = f"model.layers.0.mlp.experts.{e}.up_proj"
        assert abs(errors[name] - relative(fused[e, 32:], found[name][3])) < 1e-9

    transposed = os.path.join(work, "rules-llama4")  # its experts are [E, K, N]
    write_checkpoint(transposed, tensors, model_type="llama4")
    quantize(transposed, transposed + "-out")
    assert sorted(matrices_of(transposed + "-out")) == sorted(attention)
    told = run(transposed, transposed + "-plan", "--dry-run")
    assert "2 tensors of layers stay dense" in told.stdout, told
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert np.array_equal(read_checkpoint(transposed + "-out")[name], tensors[name])
    assert name in read_quantization(transposed + "-out")["ignore"]

    cases = {
        ("--exclude", "*.o_proj"): set(found) - {n for n in found if n.endswith("o_proj")},
        ("--exclude", "*", "--include", "*.layers.1.*proj"): {n for n in found if ".1.self" in n},
        ("--include", "lm_head"): set(found) | {"lm_head"},
        ("--include", "lm_head", "--exclude", "*head"): set(found),
    }
    for number, (arguments, wanted) in enumerate(cases.items()):
        out = os.path.join(work, f"rules-{number}")
        quantize(source, out, *arguments)
        assert set(matrices_of(out)) == wanted, arguments
        head = "lm_head" in read_quantization(out)["ignore"]
        assert head == ("lm_head" not in wanted)

    out = os.path.join(work, "rules-override")
    quantize(source, out, "--override", "*q_proj=8,32", "--override", "*.1.self_attn.q_proj=3,channel",
             "--group", "64")
    found = matrices_of(out)
    assert found["model.layers.0.self_attn.q_proj"][:2] == (8, 32)
    assert found["model.layers.1.self_attn.q_proj"][:2] == (3, None)
    assert found["model.layers.0.self_attn.k_proj"][:2] == (4, 64)

    for arguments in (("--exclude", "nothing.*"), ("--override", "norm=4,64"), ("--exclude", "*")):
        refused = quantize(source, os.path.join(work, "no"), *arguments, check=False)
        assert refused.returncode == 3 and refused.stderr.count("\n") == 1, refused
        assert not os.path.exists(os.path.join(work, "no"))

    plan = run(source, os.path.join(work, "no"), "--dry-run")
    assert plan.returncode == 0 and not os.path.exists(os.path.join(work, "no"))
    report = quantize(source, os.path.join(work, "real"))
    assert f"all tensors {report['tensor_bytes_before'] / 1e6:.1f} -> " \
           f"{report['tensor_bytes_after'] / 1e6:.1f} MB" in plan.stdout
    assert plan.stderr.count("\n") == len(report["matrices"])


# ---- NaN, infinities, and what a scale in fp16 does not reach ------------------------------------


def check_same_refusal(source, out, words, *arguments):
    """One line, from a dry run the same as from the run that it stands for, and nothing made."""
    said = []
    for extra in ((), ("--dry-run",), ("--dry-run", "--json")):
        refused = run(source, out, "--quiet", *arguments, *extra)
        assert refused.returncode == 3 and not refused.stdout, (arguments, extra, refused)
        assert refused.stderr.count("\n") == 1 and words in refused.stderr, (arguments, refused)
        assert not os.path.exists(out) and not os.path.exists(out + ".partial")
        said.append(refused.stderr)
    assert len(set(said)) == 1, said


def check_plan_without_errors(work, random):
    """What nobody measured is null, and no 0."""
    source, out = os.path.join(work, "plain-in"), os.path.join(work, "plain-out")
    write_checkpoint(source, {"l.weight": random.normal(0, 1, (8, 64)).astype(np.float32)})
    plan = quantize(source, out, "--dry-run", "--group", "64")
    assert plan["error"] is None and [m["error"] for m in plan["matrices"]] == [None], plan
    plan = quantize(source, out, "--dry-run")
    assert plan["error"] is None and 0.05 < plan["matrices"][0]["error"] < 0.2, plan
    done = quantize(source, out, "--group", "64")
    assert 0.05 < done["error"] == done["matrices"][0]["error"] < 0.2, done
    tight = quantize(source, out + "-tight", "--dry-run", "--bits-per-weight", "3.6")
    assert tight["error"] is None and (tight["budget"]["uniform_error"] is None) == (
        tight["budget"]["uniform_bits"] == 0), tight


def check_extremes(work, random):
    """Weights beyond any fp16 scale are refused by name, value and limit; under all of them they
    become 0, and the report says so."""
    limits = {"8": 8351760, "4": 491280, "3": 229264}
    schemes = [("--bits", bits, "--scale", rule, *zeros) for bits in limits
               for rule in ("absmax", "mse") for zeros in ((), ("--asymmetric",))]
    for number, value in enumerate((3e38, 9e6)):
        weights = random.normal(0, 1, (8, 192)).astype(np.float32)
        weights[3, 7] = -value
        source = os.path.join(work, f"huge-{number}")
        write_checkpoint(source, {"a.weight": weights[:2].copy(), "b.weight": weights})
        for scheme in schemes + [("--bits-per-weight", "6")]:
            for group in ("auto", "channel", "64"):
                check_same_refusal(source, source + "-out", f"'b.weight': row 3, column 7 has magnitude "
                                   f"{value:g}; a scale in fp16, 65504 at most, reaches 8351760 with "
                                   f"8 bits, 491280 with 4 and 229264 with 3", *scheme, "--group", group)
    for number, scheme in enumerate(schemes):
        limit = limits[scheme[1]]
        for factor in (0.99, 1.01):
            weights = random.normal(0, 1, (8, 192)).astype(np.float32)
            weights[3, 7], weights[3, 8] = limit * factor, -limit * factor
            source = os.path.join(work, f"limit-{number}-{factor}")
            write_checkpoint(source, {"a.weight": weights})
            if factor > 1:
                check_same_refusal(source, source + "-out", "row 3, column 7 has magnitude", *scheme)
            else:
                assert quantize(source, source + "-out", *scheme)["error"] < 0.2

    tensors = {"gone.weight": random.normal(0, 1e-30, (8, 192)).astype(np.float32),
               "small.weight": random.normal(0, 1e-7, (8, 192)).astype(np.float32),
               "plain.weight": random.normal(0, 1, (8, 192)).astype(np.float32)}
    source = os.path.join(work, "tiny-in")
    write_checkpoint(source, tensors)
    for number, scheme in enumerate(schemes):
        out = os.path.join(work, f"tiny-{number}")
        report = quantize(source, out, *scheme)
        found, errors = matrices_of(out), {m["name"]: m["error"] for m in report["matrices"]}
        assert not found["gone"][3].any() and abs(errors["gone"] - 1) < 1e-6, errors
        assert 0.1 < errors["small"] < 0.35, (scheme, errors)
        assert abs(relative(tensors["small.weight"], found["small"][3]) - errors["small"]) < 1e-6
    told = run(source, os.path.join(work, "tiny-told"))
    assert "1 layers keep an error of 0.5 or more" in told.stdout, told



def check_nonfinite(work, random):
    tensors = {f"l.{i}.weight": random.normal(0, 1, (8, 64)).astype(np.float32) for i in range(4)}
    tensors["l.1.weight"][2, 5] = np.nan
    tensors["l.3.weight"][1, 1] = -np.inf
    source = os.path.join(work, "nan-in")
    write_checkpoint(source, tensors)
    out = os.path.join(work, "nan-out")
    refused = run(source, out, "--quiet")
    assert refused.returncode == 3, refused
    lines = refused.stderr.splitlines()
    assert len(lines) == 3 and "'l.1.weight': row 2, column 5 is NaN" in lines[0], lines
    assert "'l.3.weight': row 1, column 1 is infinite" in lines[1], lines
    assert not os.path.exists(out) and not os.path.exists(out + ".partial")
    check_same_refusal(source, out, "'l.1.weight': row 2, column 5 is NaN; finequant-quantize "
                       "--allow-nonfinite", "--group", "64")
    quantize(source, out, "--allow-nonfinite", "--bits", "8")
    found = matrices_of(out)
    assert found["l.1"][3][2, 5] == 0
    largest = np.abs(tensors["l.3.weight"][1][np.isfinite(tensors["l.3.weight"][1])]).max()
    assert abs(found["l.3"][3][1, 1] + largest) < 0.02 * largest

    del tensors["l.3.weight"]  # the only one is no list of one
    source, out = os.path.join(work, "nan-one-in"), os.path.join(work, "nan-one-out")
    write_checkpoint(source, tensors)
    for arguments in ((), ("--group", "64"), ("--asymmetric", "--group", "64"),
                      ("--bits-per-weight", "5")):
        check_same_refusal(source, out, "'l.1.weight': row 2, column 5 is NaN", *arguments)

    tensors = {"l.0.weight": random.normal(0, 1, (8, 64)).astype(np.float32),
               "l.0.mask": np.full(4, -np.inf, np.float32),  # means what it says
               "norm.weight": np.array([1, 1, np.nan], np.float32)}
    source, out = os.path.join(work, "nan-norm-in"), os.path.join(work, "nan-norm-out")
    write_checkpoint(source, tensors)
    for arguments in ((), ("--group", "64"), ("--bits-per-weight", "5")):
        check_same_refusal(source, out, "'norm.weight': element 2 is NaN", *arguments)
    assert run(source, out, "--quiet", "--dry-run", "--allow-nonfinite").returncode == 0
    quantize(source, out, "--allow-nonfinite")
    assert np.isnan(read_checkpoint(out)["norm.weight"][2])


# ---- progress ------------------------------------------------------------------------------------


def on_terminal(*command):
    """The exit status, and what was said on a terminal as standard error."""
    controller, terminal = pty.openpty()
    process = subprocess.Popen(command, stderr=terminal, stdout=subprocess.DEVNULL)
    os.close(terminal)
    said = b""
    while True:
        try:
            said += os.read(controller, 65536)
        except OSError:  # EIO: the other end is closed
            break
    os.close(controller)
    return process.wait(), said.decode()


def check_bar(work):
    """On a terminal a bar with the rate and the time left, of all that is to be done, looking and
    writing; else a line a layer (check_rules)."""
    source = os.path.join(work, "budget-in")
    status, said = on_terminal(PROGRAM, source, os.path.join(work, "bar"))
    assert status == 0 and "\n" not in said, said
    steps = said.split("\r")
    assert any(re.search(r"looking \[#*\.*\] +\d+%.* [\d.]+ GB/s, \d+:\d\d left", s) for s in steps)
    assert any(re.search(r"writing \[#{30}\] 100%, 10 of 10 layers", s) for s in steps), steps[-3:]
    for extra, last in (((), "writing"), (("--dry-run",), "checking"),
                        (("--group", "64", "--dry-run"), "checking"),
                        (("--bits-per-weight", "5"), "writing")):
        status, said = on_terminal(PROGRAM, source, os.path.join(work, f"bar{len(extra)}-{last}"), *extra)
        seen = [(m[1], int(m[2])) for m in re.finditer(r"K(\w+) \[[#.]+\] +(\d+)%", said)]
        parts = {word: [part for seen_word, part in seen if seen_word == word] for word, _ in seen}
        assert status == 0 and [part for _, part in seen] == sorted(part for _, part in seen), seen
        assert list(parts)[-1] == last and parts[last][-1] == 100, seen
        if "--group" not in extra:  # the first phase ends where the second goes on
            assert 30 < parts["looking"][-1] < 70, parts
            assert parts["looking"][-1] <= parts[last][0] < 100, parts


def check_errors_on_terminal(work, random):
    """An error has a line of its own there, whatever bar was on it."""
    tensors = {f"l.{i}.weight": random.normal(0, 1, (8, 64)).astype(np.float32) for i in range(3)}
    tensors["l.2.weight"][1, 1] = np.nan
    source = os.path.join(work, "terminal-in")
    write_checkpoint(source, tensors)
    for extra in ((), ("--group", "64"), ("--dry-run",)):
        status, said = on_terminal(PROGRAM, source, source + "-out", *extra)
        assert status == 3 and said.count("\n") == 1, said
        assert re.search(r"left\r\x1b\[Kfinequant-quantize: [^\r]*NaN[^\r]*\r\n$", said), said

    packed, scale = np.zeros((8, 8), np.int32), np.ones((8, 1), np.float16)
    quantized = {}
    for name in ("a", "b"):
        quantized |= {f"{name}.weight_packed": packed, f"{name}.weight_scale": scale.copy(),
                      f"{name}.weight_shape": np.array([8, 64])}
    quantized["b.weight_scale"][2, 0] = np.inf
    source = os.path.join(work, "terminal-packed")
    write_checkpoint(source, quantized, quantization_config={
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {
            "g": {"targets": ["Linear"], "weights": {
                "num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}}}})
    status, said = on_terminal(PROGRAM, "convert", source, source + "-out")
    assert status == 14 and said.count("\n") == 1, said
    assert re.search(r"symmetric\r\x1b\[Kfinequant-quantize: [^\r]*not finite\r\n$", said), said


# ---- inspect -------------------------------------------------------------------------------------


def check_inspect(work):
    source, out = os.path.join(work, "budget-in"), os.path.join(work, "width-4.6")
    tensors, found = read_checkpoint(source), matrices_of(out)
    picture = os.path.join(work, "picture.svg")
    shown = run("inspect", out, "--against", source, "--json", "--svg", picture)
    report = json.loads(shown.stdout)
    assert len(report["matrices"]) == len(found)
    for matrix in report["matrices"]:
        bits, group, size, dequantized = found[matrix["name"]]
        assert matrix["bits"] == bits and matrix["group"] in (group, matrix["k"])
        assert matrix["code_bytes"] + matrix["scale_bytes"] + matrix["zero_bytes"] + 16 == size
        error = relative(tensors[matrix["name"] + ".weight"], dequantized)
        assert abs(matrix["error"] - error) < 1e-9
    assert report["dense_bytes"] == tensors["norm.weight"].nbytes + tensors["embed.weight"].nbytes
    with open(picture) as file:
        drawn = file.read()
    import xml.etree.ElementTree
    root = xml.etree.ElementTree.fromstring(drawn)
    texts = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert sum("layer " in (t or "") for t in texts) == len(found)
    for matrix in report["matrices"]:
        assert f"{matrix['error'] * 100:.2f}%" in texts
    table = run("inspect", out).stdout.splitlines()
    assert len(table) == len(found) + 2 and "error" not in table[0]
    wrong = run("inspect", out, "--against", os.path.join(work, "nan-in"))
    assert wrong.returncode == 3 and wrong.stderr.count("\n") == 1, wrong
    assert run("inspect", source).returncode == 3  # nothing quantized there
    faulty = os.path.join(work, "nan-one-in")
    quantize(faulty, faulty + "-taken", "--allow-nonfinite")
    told = run("inspect", faulty + "-taken", "--against", faulty)  # no error of 0
    assert told.returncode == 3 and "the weights of 'l.1' are not all finite" in told.stderr, told
    assert told.stderr.count("\n") == 1 and not told.stdout


def main():
    random = np.random.default_rng(11)
    with tempfile.TemporaryDirectory() as work:
        check_auto(work, random)
        check_sharing(work, np.random.default_rng(5))
        check_outliers(work, random)
        check_budget(work, random)
        check_large(work, np.random.default_rng(6))
        check_rules(work, random)
        check_nonfinite(work, random)
        check_plan_without_errors(work, random)
        check_extremes(work, random)
        check_bar(work)
        check_errors_on_terminal(work, random)
        check_inspect(work)


if __name__ == "__main__":
    sys.exit(main())
