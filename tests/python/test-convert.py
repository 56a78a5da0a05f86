#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""finequant-quantize convert, from every format: each weight of the result is the same float64 value,
bit for bit, that numpy makes of the original; all else is copied."""
import json
import os
import subprocess
import sys
import tempfile

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import formats  # noqa: E402
from formats import Weight  # noqa: E402

PROGRAM = os.path.join(os.environ.get("top_builddir", "."), "finequant-quantize")
RANDOM = np.random.default_rng(4)
# What no layout knows; uint16 is BF16.
OTHERS = {"norm.weight": RANDOM.standard_normal(96).astype(np.float32),
          "embed.weight": RANDOM.integers(0, 1 << 15, (9, 96)).astype(np.uint16),
          "odd": np.arange(3, dtype=np.float16), "position_ids": np.arange(7, dtype=np.int64),
          "empty": np.zeros((0, 4), np.float32), "scalar": np.array(5, np.int32)}


def convert(source, out, *options):
    return subprocess.run([PROGRAM, "convert", source, out, *options], check=False,
                          capture_output=True, text=True)


def write(path, tensors, quantization, own_file=None):
    formats.write_directory(path, tensors, quantization, own_file, {"eps": 1e-12})
    with open(os.path.join(path, "tokenizer.json"), "w", encoding="ascii") as file:
        file.write("{}")


def check(source, out, weights, others, *options):
    run = convert(source, out, "--quiet", "--json", *options)
    assert run.returncode == 0, run
    report = json.loads(run.stdout)
    config, tensors = formats.read_checkpoint(out)
    for name, weight in weights.items():
        scheme = formats.scheme_of(config, name)
        assert scheme["num_bits"] == weight.bits and scheme["type"] == "int", (name, scheme)
        assert list(tensors[f"{name}.weight_shape"]) == [weight.n, weight.k]
        assert np.array_equal(formats.dequantize(config, tensors, name), weight.weights), name
    parts = {f"{name}.weight_{part}" for name in weights
             for part in ("packed", "scale", "shape", "zero_point")}
    assert set(tensors) - parts == set(others), set(tensors) - parts
    for name, value in others.items():
        assert tensors[name].dtype == value.dtype and np.array_equal(tensors[name], value), name
    assert report["matrices"] == len(weights) and report["copied"] == len(others), report
    assert report["tensor_bytes_after"] == sum(t.nbytes for t in tensors.values()), report
    return config, report


def some(bits=4, groups=(32, 0), **kind):
    return {f"layers.{i}.{'s' if symmetric else 'z'}":
            Weight(RANDOM, 24, 96, bits, group, symmetric, **kind)
            for i, group in enumerate(groups) for symmetric in (True, False)}


def from_gptq(work):
    for version in (1, 2):
        for bits in (8, 4, 3):
            weights = {name: Weight(RANDOM, 32, 96, bits, 32, symmetric)
                       for name, symmetric in (("a", True), ("b", False), ("c", False))}
            tensors = dict(OTHERS)
            for name, weight in weights.items():
                tensors.update(formats.gptq(weight, name, version, order=name == "b"))
            tensors["b.bias"] = np.ones(32, np.float16)
            own_file = "quantize_config.json" if bits == 4 else None
            source, out = (os.path.join(work, f"gptq-{version}-{bits}{end}") for end in ("", "-out"))
            write(source, tensors, {
                **({} if own_file else {"quant_method": "gptq"}), "bits": bits, "group_size": 32,
                "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}, own_file)
            config, report = check(source, out, weights, {**OTHERS, "b.bias": tensors["b.bias"]})
            assert report["format"] == "gptq" and config["eps"] == 1e-12
            # several are said by name
            targets = [g["targets"] for g in config["quantization_config"]["config_groups"].values()]
            assert sorted(targets) == [["a"], ["b", "c"]], targets
            assert sorted(os.listdir(out)) == ["config.json", "model.safetensors", "tokenizer.json"]


def from_awq(work):
    weights = {f"m.{symmetric}": Weight(RANDOM, 24, 96, 4, 32, symmetric) for symmetric in (True, False)}
    tensors = dict(OTHERS)
    for name, weight in weights.items():
        tensors.update(formats.awq(weight, name))
    source, out = os.path.join(work, "awq"), os.path.join(work, "awq-out")
    write(source, tensors, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True,
                            "version": "gemm"})
    check(source, out, weights, OTHERS)
    del weights["m.True"]
    source, out = os.path.join(work, "awq-one"), os.path.join(work, "awq-one-out")
    write(source, formats.awq(weights["m.False"], "m.False"),
          {"quant_method": "awq", "bits": 4, "group_size": 32})
    config, _ = check(source, out, weights, {})
    group, = config["quantization_config"]["config_groups"].values()
    assert group["targets"] == ["Linear"] and not group["weights"]["symmetric"], group


def from_gguf(work):
    weights = {"blk.0.attn_q": Weight(RANDOM, 7, 64, 8, 32, negative=True),
               "blk.0.ffn_up": Weight(RANDOM, 5, 96, 4, 32, negative=True)}
    norm = np.linspace(0, 1, 64, dtype=np.float32)
    half = RANDOM.standard_normal((3, 64)).astype(np.float16)
    source = os.path.join(work, "tiny.gguf")
    with open(source, "wb") as file:
        file.write(formats.gguf(
            {"general.architecture": "llama", "general.name": "Tiny", "llama.block_count": 1,
             "llama.embedding_length": 64, "llama.attention.layer_norm_rms_epsilon": 0.5,
             "tokenizer.ggml.tokens": ["a", "b"]},
            {"blk.0.attn_q.weight": ("Q8_0", [7, 64], formats.gguf_blocks(weights["blk.0.attn_q"])),
             "blk.0.attn_norm.weight": ("F32", [64], norm.tobytes()),
             "blk.0.ffn_up.weight": ("Q4_0", [5, 96], formats.gguf_blocks(weights["blk.0.ffn_up"])),
             "token_embd.weight": ("F16", [3, 64], half.tobytes())}))
    config, report = check(source, os.path.join(work, "gguf-out"), weights,
                           {"blk.0.attn_norm.weight": norm, "token_embd.weight": half})
    assert report["format"] == "gguf"
    assert config["model_type"] == "llama" and config["hidden_size"] == 64, config
    assert config["num_hidden_layers"] == 1 and config["rms_norm_eps"] == 0.5, config
    assert config["gguf"]["general.name"] == "Tiny" and "tokenizer.ggml.tokens" not in config["gguf"]
    assert "token_embd" in config["quantization_config"]["ignore"], config


def from_compressed_tensors(work):
    for bits, old in ((8, False), (4, False), (3, False), (3, True)):
        # K = 96 keeps both packings of three bits apart
        weights = some(bits)
        tensors, groups = dict(OTHERS), {}
        for name, weight in weights.items():
            tensors.update(formats.compressed_tensors(weight, name, old))
            groups[name] = {"targets": [f"re:{name}$"], "weights": {
                "num_bits": bits, "type": "int", "symmetric": weight.symmetric,
                "strategy": "group" if weight.group else "channel", "group_size": weight.group or None}}
        quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized",
                        "config_groups": groups}
        source = os.path.join(work, f"ct-{bits}-{old}")
        write(source, tensors, quantization)
        check(source, source + "-out", weights, OTHERS)
        config, _ = check(source, source + "-shards", weights, OTHERS, "--shard-size", "3K")
        assert len([f for f in os.listdir(source + "-shards") if f.endswith(".safetensors")]) > 2
        assert len(config["quantization_config"]["config_groups"]) == 4
        # what we wrote, converted again, is the same file
        assert convert(source + "-out", source + "-again").returncode == 0
        for name in ("model.safetensors", "config.json"):
            with open(os.path.join(source + "-out", name), "rb") as one, \
                    open(os.path.join(source + "-again", name), "rb") as two:
                assert one.read() == two.read(), name


def names_go_before_patterns_before_the_class(work):
    weights = {"a": Weight(RANDOM, 8, 96, 8, 32), "layers.0": Weight(RANDOM, 8, 96, 4, 32),
               "layers.1": Weight(RANDOM, 8, 96, 3, 16), "layers.10": Weight(RANDOM, 8, 96, 4, 32)}
    tensors = {}
    for name, weight in weights.items():
        tensors.update(formats.compressed_tensors(weight, name))

    def group(bits, size, *targets):
        return {"targets": targets, "weights": {"num_bits": bits, "strategy": "group", "group_size": size}}
    source = os.path.join(work, "precedence")
    write(source, tensors, {"quant_method": "compressed-tensors", "format": "pack-quantized",
                            "config_groups": {"class": group(8, 32, "Linear"),
                                              "pattern": group(4, 32, "re:layers"),
                                              "late": group(8, 64, "re:layers.0"),
                                              "name": group(3, 16, "x", "layers.1"),
                                              "again": group(8, 16, "layers.1")},
                            "ignore": ["b", "re:.*head"]})
    check(source, source + "-out", weights, {})


def what_a_killed_run_left_is_not_taken_up(work):
    weight = Weight(RANDOM, 8, 96, 4, 32)
    source, out = os.path.join(work, "begun"), os.path.join(work, "begun-out")
    write(source, formats.compressed_tensors(weight, "m"), {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {
            "g": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32, "strategy": "group"}}}})
    os.mkdir(out + ".partial")
    for name in ("finequant-resume.json", "model-00001-of-00002.safetensors"):
        with open(os.path.join(out + ".partial", name), "w", encoding="ascii") as file:
            file.write("{}")
    check(source, out, {"m": weight}, {})
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors", "tokenizer.json"]


def refusals_leave_nothing(work):
    before = sorted(os.listdir(work))
    dense = os.path.join(work, "dense")
    write(dense, OTHERS, None)
    poisoned = os.path.join(work, "poisoned")
    weight = Weight(RANDOM, 32, 96, 4, 32)
    weight.scales[3, 1] = np.inf
    write(poisoned, formats.gptq(weight, "a"), {"quant_method": "gptq", "bits": 4, "group_size": 32})
    plain = os.path.join(work, "ct-3-False")
    out = os.path.join(work, "nothing")
    for source, options, status, words in (
            (dense, (), 3, "no matrix is quantized"), (os.path.join(work, "none"), (), 8, "none"),
            (plain, ("--shard-size", "0"), 2, "--shard-size"), (plain, ("--bits", "4"), 2, "bits"),
            (poisoned, ("--quiet",), 14, "tensor 'a.scales': the scale at [1, 3] is not finite")):
        run = convert(source, out, *options)
        assert run.returncode == status and words in run.stderr, (source, run)
    run = convert(plain, plain)
    assert run.returncode == 9 and "exists" in run.stderr, run
    assert sorted(os.listdir(work)) == sorted(before + ["dense", "poisoned"])


def main():
    with tempfile.TemporaryDirectory() as work:
        for test in (from_gptq, from_awq, from_gguf, from_compressed_tensors,
                     names_go_before_patterns_before_the_class,
                     what_a_killed_run_left_is_not_taken_up, refusals_leave_nothing):
            test(work)
            print("ok", test.__name__)


if __name__ == "__main__":
    sys.exit(main())
