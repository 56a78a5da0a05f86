#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes the fuzzers' seeds: small inputs that reach every branch of a reader that is not a refusal.
Run it after a change of an input's form: tests/fuzz/make-seeds.py tests/fuzz/seeds"""
import json
import os
import sys

import msgpack
import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "python"))
import formats  # noqa: E402

RANDOM = np.random.default_rng(20230809)


def layout_input(config, tensors, second=None, index=None):
    """An input of fuzz.h: config, index, lines, bytes."""
    def lines(some):
        return "".join(f"{name} {formats.SAFETENSORS_TYPES[array.dtype]} "
                       f"{' '.join(map(str, array.shape))}\n" for name, array in some.items())
    text = lines(tensors) + ("--\n" + lines(second) if second else "")
    both = {**tensors, **(second or {})}
    return b"\0".join((json.dumps(config).encode(), json.dumps(index).encode() if index else b"",
                       text.encode(), b"".join(array.tobytes() for array in both.values())))


def compressed_tensors_seeds():
    for bits, group, symmetric, old in ((4, 32, True, False), (4, 0, False, False),
                                        (8, 16, False, False), (3, 32, False, False),
                                        (3, 32, False, True)):
        weight = formats.Weight(RANDOM, 5, 64, bits, group, symmetric)
        scheme = {"num_bits": bits, "type": "int", "symmetric": symmetric,
                  "strategy": "group" if group else "channel", "group_size": group or None}
        config = {"format": "pack-quantized", "ignore": ["lm_head", "re:.*skip"],
                  "config_groups": {"g": {"targets": ["Linear"], "weights": scheme},
                                    "h": {"targets": ["re:a.*", "b"], "weights": scheme}}}
        tensors = formats.compressed_tensors(weight, "a", old)
        tensors["a.bias"] = np.zeros(5, np.float32)
        tensors["a.weight_g_idx"] = (np.arange(64) // weight.width).astype(np.int32)
        yield f"{bits}-{group}-{'old' if old else 'new'}", layout_input(config, tensors)
        other = formats.compressed_tensors(weight, "b", old)
        index = {"weight_map": {**{name: "one.safetensors" for name in tensors},
                                **{name: "two.safetensors" for name in other}}}
        if bits == 4:
            yield f"shards-{group}", layout_input(config, tensors, other, index)


def gptq_seeds():
    for bits, group, symmetric, version in ((4, 32, True, 1), (4, 32, False, 2), (8, 16, False, 1),
                                            (3, 32, False, 2), (4, -1, True, 1)):
        weight = formats.Weight(RANDOM, 32, 64, bits, max(group, 0), symmetric)
        config = {"bits": bits, "group_size": group, "desc_act": False, "sym": symmetric,
                  "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
                  "dynamic": {"+:a.*": {"bits": bits, "group_size": group}, "-:b\\.": {}}}
        tensors = formats.gptq(weight, "a", version, order=bits != 8)
        tensors["a.bias"] = np.zeros(32, np.float16)
        yield f"{bits}-{group}-v{version}", layout_input(config, tensors)


def awq_seeds():
    for group, symmetric in ((32, False), (-1, True)):
        weight = formats.Weight(RANDOM, 16, 64, 4, max(group, 0), symmetric)
        config = {"bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
        yield f"{group}", layout_input(config, formats.awq(weight, "a"))
        other = {"w_bit": 4, "q_group_size": group, "zero_point": True, "version": "GEMM"}
        yield f"{group}-own", layout_input(other, formats.awq(weight, "a"))


def gguf_seeds():
    eight = formats.Weight(RANDOM, 3, 64, 8, 32)
    four = formats.Weight(RANDOM, 4, 64, 4, 32, negative=True)
    norm = ("F32", [8], np.ones(8, np.float32).tobytes())
    metadata = {"general.architecture": "llama", "llama.block_count": 1, "x.bool": True,
                "x.float": 0.5, "x.strings": ["a", "bc"], "x.numbers": [1, 2, 3]}
    tensors = {"a.weight": ("Q8_0", [3, 64], formats.gguf_blocks(eight)), "norm.weight": norm,
               "b.weight": ("Q4_0", [4, 64], formats.gguf_blocks(four)),
               "c_exps.weight": ("Q4_0", [2, 2, 64], formats.gguf_blocks(four)),
               "a.bias": ("F32", [3], np.zeros(3, np.float32).tobytes())}
    yield "quantized", formats.gguf(metadata, tensors)
    yield "aligned", formats.gguf({**metadata, "general.alignment": 8}, tensors, 8)
    dense = np.ones((4, 32), np.float16)
    yield "dense", formats.gguf({}, {"a.weight": ("F16", [4, 32], dense.tobytes()), "n": norm})
    yield "empty", formats.gguf({}, {})


def safetensors_seeds():
    yield "tensors", formats.safetensors({
        "a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float16),
        "empty": np.zeros((4, 0), np.int32), "scalar": np.array(1, np.int64)})
    text = b'{"__metadata__":{"format":"pt"},"x":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}  '
    yield "metadata", len(text).to_bytes(8, "little") + text + b"abc"
    yield "nothing", (2).to_bytes(8, "little") + b"{}"


def message_seeds():
    for name, message in {
            "hello": [0, 1, "hello", {"version": 1, "client": "fuzz"}],
            "gemm": [0, 2, "gemm", {"tensor": 1 << 32, "m": 4, "dtype": "f16", "bias": True,
                                    "x": {"buffer": 1, "offset": 0}, "y": {"buffer": 1}}],
            "reply": [1, 3, None, {"fds": 1, "buffer": 7, "bytes": 4096}],
            "failure": [1, 4, [8, "not-found", "no model"], None],
            "notice": [2, "model.progress", {"name": "m", "done": 1, "total": 2}]}.items():
        yield name, msgpack.packb(message)


def main(root):
    makers = {"compressed-tensors": compressed_tensors_seeds, "gptq": gptq_seeds, "awq": awq_seeds,
              "gguf": gguf_seeds, "safetensors": safetensors_seeds, "message": message_seeds}
    for target, seeds in makers.items():
        os.makedirs(os.path.join(root, target), exist_ok=True)
        for name, data in seeds():
            with open(os.path.join(root, target, name), "wb") as file:
                file.write(data)


if __name__ == "__main__":
    main(*sys.argv[1:])
