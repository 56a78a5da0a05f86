#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""finequant-quantize against numpy: its files are unpacked from the published layout alone and
compared with a quantization computed here."""
import os
import subprocess
import sys
import tempfile

import numpy as np

import formats
from checkpoint import (PROGRAM, codes_of, dequantize, quantize, read_checkpoint,
                        read_quantization, relative, scheme_of, shard, unpack,
                        write_checkpoint)


def absmax(weights, bits, group):
    """The paper's quantizer in float64: codes and scales."""
    n, k = weights.shape
    codes, scales = np.empty((n, k), int), []
    for begin in range(0, k, group):
        block = weights[:, begin:begin + group].astype(np.float64)
        scale = (2 * np.abs(block).max(axis=1) / (2 ** bits - 1)).astype(np.float32)
        scale = scale.astype(np.float16)
        q = np.rint(block / scale.astype(np.float64)[:, None])
        codes[:, begin:begin + group] = np.clip(q, -2 ** (bits - 1), 2 ** (bits - 1) - 1)
        scales.append(scale)
    return codes + 2 ** (bits - 1), np.stack(scales, axis=1)


def check_absmax(source, out, bits, group, extra):
    report = quantize(source, out, "--bits", str(bits), "--group", group, "--scale", "absmax",
                      *extra)
    layers = {m["name"]: m for m in report["matrices"]}
    quantization = read_quantization(out)
    assert "lm_head" in quantization["ignore"]
    before, after = read_checkpoint(source), read_checkpoint(out)
    for module in ("block.q", "block.small"):
        weights = before[module + ".weight"]
        n, k = weights.shape
        scheme = scheme_of(quantization, module)
        size = k if scheme["strategy"] == "channel" else scheme["group_size"]
        assert size == (k if group == "channel" else min(int(group), k)), (module, size)
        assert scheme["num_bits"] == bits and scheme["symmetric"]
        codes, scales = absmax(weights, bits, size)
        assert list(after[module + ".weight_shape"]) == [n, k]
        assert np.array_equal(after[module + ".weight_scale"], scales), module
        assert np.array_equal(unpack(after[module + ".weight_packed"], k, bits), codes), module
        assert module + ".weight" not in after
        error = relative(weights, dequantize(after, quantization, module))
        assert abs(layers[module]["error"] - error) < 1e-6 * error, (layers[module], error)
    for name in ("block.q.bias", "norm.weight", "embed_tokens.weight"):
        assert np.array_equal(before[name], after[name]), name


def best_scales(block, bits):
    """The least squared error that any of 400 scales of either sign leaves, per row of the block."""
    top = 2 * np.abs(block).max(axis=1, keepdims=True) / (2 ** bits - 1)
    low, high = -2 ** (bits - 1), 2 ** (bits - 1) - 1
    errors = []
    for shrink in np.linspace(0.3, 1.2, 400):
        for sign in (1, -1):
            scale = sign * (top * shrink).astype(np.float16).astype(np.float64)
            q = np.clip(np.rint(block / scale), low, high)
            errors.append(((block - q * scale) ** 2).sum(axis=1))
    return np.min(errors, axis=0)


def check_mse(source, work):
    """The search leaves no more than absmax in any group, and nearly what the best scale would."""
    before = read_checkpoint(source)
    for bits in (8, 4, 3):
        left = {}
        for rule in ("absmax", "mse"):
            out = os.path.join(work, f"{rule}-{bits}")
            quantize(source, out, "--bits", str(bits), "--group", "64", "--scale", rule)
            tensors, quantization = read_checkpoint(out), read_quantization(out)
            weights = before["block.q.weight"].astype(np.float64)
            codes, zeros, scales, _ = codes_of(tensors, quantization, "block.q")
            nearest = np.clip(np.rint(weights / scales), -2 ** (bits - 1), 2 ** (bits - 1) - 1)
            assert np.array_equal(codes - zeros, nearest)  # rounded with the scale that is stored
            squares = (weights - (codes - zeros) * scales) ** 2
            left[rule] = squares.reshape(len(weights), -1, 64).sum(axis=2)
            blocks = weights.reshape(len(weights), -1, 64)
            longer_above = blocks.max(axis=2) > -blocks.min(axis=2)
            turned = tensors["block.q.weight_scale"] < 0  # the side with a code more is the longer
            assert turned.any() == (rule == "mse") and (longer_above | ~turned).all()
        assert (left["mse"] <= left["absmax"] * (1 + 1e-6)).all()
        best = np.stack([best_scales(weights[:, b:b + 64], bits) for b in range(0, 320, 64)], 1)
        assert left["mse"].sum() < 1.03 * best.sum(), (bits, left["mse"].sum() / best.sum())
        assert bits == 8 or left["mse"].sum() < 0.88 * left["absmax"].sum()


def check_asymmetric(work, random):
    """Zero points where the weights are off centre, none where they are not, and packed along N."""
    tensors = {"off.weight": random.gamma(2, 0.05, (37, 256)).astype(np.float32) + 0.1,
               "centred.weight": random.normal(0, 0.05, (37, 256)).astype(np.float32)}
    tensors["centred.weight"][:, 3], tensors["centred.weight"][:, 5] = 0.25, -0.25
    source = os.path.join(work, "asymmetric-in")
    write_checkpoint(source, tensors)
    for bits in (8, 4, 3):
        for rule in ("absmax", "mse"):
            out = os.path.join(work, f"asymmetric-{bits}-{rule}")
            report = quantize(source, out, "--bits", str(bits), "--group", "channel", "--scale", rule,
                              "--asymmetric")
            layers = {m["name"]: m for m in report["matrices"]}
            after, quantization = read_checkpoint(out), read_quantization(out)
            assert layers["off"]["asymmetric"] and not scheme_of(quantization, "off")["symmetric"]
            weights = tensors["off.weight"].astype(np.float64)
            codes, zeros, scales, _ = codes_of(after, quantization, "off")
            assert 0 <= zeros.min() and zeros.max() < 2 ** bits
            nearest = np.clip(np.rint(weights / scales) + zeros, 0, 2 ** bits - 1)
            assert np.array_equal(codes, nearest)
            error = relative(weights, (codes - zeros) * scales)
            assert abs(layers["off"]["error"] - error) < 1e-6 * error
            if rule == "absmax":  # the range with zero in it, over the steps
                step = np.maximum(weights.max(axis=1), 0) - np.minimum(weights.min(axis=1), 0)
                step = (step / (2 ** bits - 1)).astype(np.float32).astype(np.float16)
                assert np.array_equal(after["off.weight_scale"][:, 0], step)
                assert not layers["centred"]["asymmetric"]
                assert "centred.weight_zero_point" not in after


def check_refusals(source, work):
    status = {("--bits", "5"): 2, ("--group", "17"): 2, ("--shard-size", "0"): 2,
              ("--nonsense",): 2, ("--alpha", "1"): 2, ("--min-group", "8"): 2,
              ("--scale", "median"): 2, ("--override", "a=4"): 2, ("--override", "=4,64"): 2,
              ("--budget", "1Q"): 2, ("--minimize", "cubes"): 2,
              ("--minimize", "error", "--group", "64"): 2, ("--bits", "8,4"): 2,
              ("--bits", "8,", "--budget", "1G"): 2, ("--bits", "8,2", "--budget", "1G"): 2,
              ("--bits", "", "--budget", "1G"): 2, ("--alpha", "0.1", "--budget", "1G"): 2,
              ("--alpha", "0", "--bits-per-weight", "4"): 2, ("--alpha", "0.1", "--group", "64"): 2,
              ("--budget", "1G", "--bits-per-weight", "4"): 2,
              ("--min-group", "64", "--group", "64"): 2, ("--explain", "--group", "64"): 2,
              ("--explain", "--json"): 2,
              ("extra",): 2, ("--bits",): 2, ("-b",): 2, ("-Z",): 2, ("--json=1",): 2, ("--m=4",): 2,
              (): 9}
    for arguments, expected in status.items():
        run = subprocess.run([PROGRAM, source, work, *arguments], capture_output=True, text=True)
        assert run.returncode == expected, (arguments, run)
        assert run.stderr.startswith("finequant-quantize: ") and run.stderr.count("\n") == 1, run
        if arguments[0:1] in (("--alpha",), ("--minimize",)) and len(arguments) == 4:
            assert all(name in run.stderr for name in arguments[::2]), run  # both are named
    for command, option, words in (("convert", "--bits=4", "see finequant-quantize convert --help"),
                                   ("inspect", "--against", "'--against' needs an argument"),
                                   ("inspect", "--json=1", "'--json=1' takes no argument"),
                                   ("inspect", "-jZ", "'-Z' is unknown or ambiguous")):
        run = subprocess.run([PROGRAM, command, source, option], capture_output=True, text=True)
        assert run.returncode == 2 and words in run.stderr and run.stderr.count("\n") == 1, run
    everything = quantize(source, os.path.join(work, "x"), "--exclude", "*", check=False)
    assert everything.returncode == 3 and "--exclude '*' leaves no matrix" in everything.stderr
    run = subprocess.run([PROGRAM, os.path.join(work, "none"), os.path.join(work, "x")],
                         capture_output=True)
    assert run.returncode == 8, run
    assert not os.path.exists(os.path.join(work, "x"))


def check_compare_copy(work, sharded):
    """All files of a sharded input, and nothing of the copy stays."""
    files = [os.path.join(sharded, name) for name in os.listdir(sharded)
             if name.endswith(".safetensors")]
    assert len(files) > 2
    out = os.path.join(work, "copied")
    for extra, stream in ((["--json"], "stderr"), ([], "stdout")):
        done = subprocess.run([PROGRAM, sharded, f"{out}{len(extra)}", "--quiet", "--compare-copy",
                               *extra], capture_output=True, text=True)
        size = sum(os.path.getsize(name) for name in files)
        assert done.returncode == 0, done
        assert f"a plain copy of {size} bytes of {len(files)} files: " in getattr(done, stream), done
    assert not [name for name in os.listdir(out + "0") if name.startswith("copy")]
    single = os.path.join(work, "dense.gguf")
    with open(single, "wb") as file:
        file.write(formats.gguf({}, {"a.weight": ("F32", [4, 64], bytes(range(64)) * 16)}))
    done = subprocess.run([PROGRAM, single, out + "2", "--quiet", "--compare-copy"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done
    assert f"a plain copy of {os.path.getsize(single)} bytes of 1 files: " in done.stdout, done


def check_places(source, work):
    """Where the output cannot go: one line, in a dry run as well, and nothing made."""
    inside = os.path.join(work, "inside")
    os.symlink(source, inside)
    places = {"": (2, "argument 2 of IN OUT is empty"), source: (9, "must be a new directory"),
              os.path.join(source, "out"): (3, "is within the input"),
              os.path.join(inside, "out"): (3, "is within the input"),
              os.path.join(work, "none", "out"): (8, "the directory it goes into"),
              os.path.join(source, "config.json", "out"): (15, "the directory it goes into")}
    if os.geteuid() != 0:  # whom nothing stops
        os.mkdir(os.path.join(work, "read-only"), 0o555)
        places[os.path.join(work, "read-only", "out")] = (7, "Permission denied")
    before = sorted(os.listdir(source)), sorted(os.listdir(work))
    for place, (status, words) in places.items():
        for extra in ([], ["--dry-run"]):
            refused = quantize(source, place, *extra, check=False)
            assert refused.returncode == status and not refused.stdout, (place, refused)
            assert refused.stderr.count("\n") == 1 and words in refused.stderr, (place, refused)
            assert place in refused.stderr
    refused = quantize("", os.path.join(work, "x"), check=False)
    assert refused.returncode == 2 and "argument 1 of IN OUT is empty" in refused.stderr, refused
    assert before == (sorted(os.listdir(source)), sorted(os.listdir(work)))


def main():
    random = np.random.default_rng(7)
    weights = random.normal(0, 0.05, (33, 320)).astype(np.float32)
    weights[3, 5] = 4.0  # an outlier spoils its own group only
    tensors = {
        "block.q.weight": weights,
        "block.q.bias": random.normal(0, 1, 33).astype(np.float32),
        "block.small.weight": random.normal(0, 1, (16, 32)).astype(np.float16),
        "norm.weight": np.ones(320, np.float32),
        "embed_tokens.weight": random.normal(0, 1, (50, 320)).astype(np.float32),
    }
    with tempfile.TemporaryDirectory() as work:
        source = os.path.join(work, "in")
        write_checkpoint(source, tensors, hidden_size=320, eps=1e-12)
        for bits in (8, 4, 3):
            for group in ("64", "128", "channel"):
                for extra in ([], ["--shard-size", "8K"]):
                    out = os.path.join(work, f"out-{bits}-{group}-{len(extra)}")
                    check_absmax(source, out, bits, group, extra)
        check_mse(source, work)
        check_asymmetric(work, random)
        check_refusals(source, work)
        check_places(source, work)
        check_compare_copy(work, shard(source, os.path.join(work, "sharded")))
        assert not [name for name in os.listdir(work) if "partial" in name]


if __name__ == "__main__":
    sys.exit(main())
