#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Which tensors finequant-quantize takes, by the rules and by name, experts among them, and which
weights it refuses: those that are no numbers, and those that no scale in fp16 reaches."""
import json
import os
import sys
import tempfile

import numpy as np

from checkpoint import (check_same_refusal, matrices_of, quantize, read_checkpoint,
                        read_quantization, relative, run, write_checkpoint)


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


def main():
    random = np.random.default_rng(11)
    with tempfile.TemporaryDirectory() as work:
        check_rules(work, random)
        check_nonfinite(work, random)
        check_extremes(work, random)


if __name__ == "__main__":
    sys.exit(main())
