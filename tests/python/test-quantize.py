#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""finequant-quantize against numpy: its files are unpacked from the published layout alone and
compared with a quantization computed here."""
import json
import os
import struct
import subprocess
import sys
import tempfile

import numpy as np

PROGRAM = os.path.join(os.environ.get("top_builddir", "."), "finequant-quantize")
DTYPES = {"F32": np.float32, "F16": np.float16, "I32": np.int32, "I64": np.int64}


def write_safetensors(path, tensors):
    header, blobs, at = {}, [], 0
    for name, array in tensors.items():
        dtype = next(d for d, t in DTYPES.items() if array.dtype == t)
        blob = array.tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape),
                        "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def read_safetensors(path):
    with open(path, "rb") as file:
        raw = file.read()
    size = struct.unpack_from("<Q", raw)[0]
    header = json.loads(raw[8:8 + size])
    header.pop("__metadata__", None)
    out = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        data = raw[8 + size + begin:8 + size + end]
        out[name] = np.frombuffer(data, DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return out


def read_checkpoint(path):
    index = os.path.join(path, "model.safetensors.index.json")
    if not os.path.exists(index):
        return read_safetensors(os.path.join(path, "model.safetensors"))
    with open(index) as file:
        shards = sorted(set(json.load(file)["weight_map"].values()))
    out = {}
    for shard in shards:
        out.update(read_safetensors(os.path.join(path, shard)))
    return out


def unpack(words, k, bits):
    """Dense, lowest bits first: every row as one string of bits."""
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, :k * bits]
    return stream.reshape(len(words), k, bits) @ (1 << np.arange(bits))


def quantize(weights, bits, group):
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


def scheme_of(config, module):
    groups = config["quantization_config"]["config_groups"].values()
    for target in (module, "Linear"):
        for group in groups:
            if target in group["targets"]:
                return group["weights"]
    raise AssertionError(f"no scheme for {module}")


def check(source, out, bits, group, extra):
    run = subprocess.run([PROGRAM, source, out, "--bits", str(bits), "--group", group, "--quiet",
                          "--json", "--scale", "absmax", *extra], check=True, capture_output=True, text=True)
    report = {m["name"]: m for m in json.loads(run.stdout)["matrices"]}
    with open(os.path.join(out, "config.json")) as file:
        config = json.load(file)
    assert config["hidden_size"] == 320 and config["eps"] == 1e-12
    assert "lm_head" in config["quantization_config"]["ignore"]
    before, after = read_checkpoint(source), read_checkpoint(out)
    for module in ("block.q", "block.small"):
        weights = before[module + ".weight"]
        n, k = weights.shape
        scheme = scheme_of(config, module)
        size = k if scheme["strategy"] == "channel" else scheme["group_size"]
        assert size == (k if group == "channel" else min(int(group), k)), (module, size)
        assert scheme["num_bits"] == bits and scheme["symmetric"]
        codes, scales = quantize(weights, bits, size)
        assert list(after[module + ".weight_shape"]) == [n, k]
        assert np.array_equal(after[module + ".weight_scale"], scales), module
        assert np.array_equal(unpack(after[module + ".weight_packed"], k, bits), codes), module
        assert module + ".weight" not in after
        dequantized = (codes - 2 ** (bits - 1)) * np.repeat(scales.astype(float), size, 1)[:, :k]
        error = np.linalg.norm(weights - dequantized) / np.linalg.norm(weights.astype(float))
        assert abs(report[module]["error"] - error) < 1e-9, (module, report[module], error)
    for name in ("block.q.bias", "norm.weight", "embed_tokens.weight"):
        assert np.array_equal(before[name], after[name]), name


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
        os.mkdir(source)
        write_safetensors(os.path.join(source, "model.safetensors"), tensors)
        with open(os.path.join(source, "config.json"), "w") as file:
            json.dump({"model_type": "test", "hidden_size": 320, "eps": 1e-12}, file)
        for bits in (8, 4, 3):
            for group in ("64", "128", "channel"):
                for extra in ([], ["--shard-size", "8K"]):
                    out = os.path.join(work, f"out-{bits}-{group}-{len(extra)}")
                    check(source, out, bits, group, extra)
        status = {("--bits", "5"): 2, ("--group", "17"): 2, ("--shard-size", "0"): 2,
                  ("--nonsense",): 2, (): 9}
        for arguments, expected in status.items():
            run = subprocess.run([PROGRAM, source, work, *arguments], capture_output=True)
            assert run.returncode == expected, (arguments, run)
        run = subprocess.run([PROGRAM, os.path.join(work, "none"), os.path.join(work, "x")],
                             capture_output=True)
        assert run.returncode == 8, run
        assert sorted(os.listdir(work))[0] == "in" and not os.path.exists(os.path.join(work, "x"))


if __name__ == "__main__":
    sys.exit(main())
