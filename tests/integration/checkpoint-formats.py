# SPDX-License-Identifier: Apache-2.0
"""Every format a checkpoint may have, served as it is: GEMM against float64 over weights that numpy
dequantized."""
import os
import sys

import numpy as np
from harness import BOUNDS, DTYPE, Daemon, expect, main, relative_error, rounded

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "python"))
import formats  # noqa: E402
from formats import Weight  # noqa: E402

RANDOM = np.random.default_rng(5)


def write(directory, name, *contents):
    return formats.write_directory(os.path.join(directory, name), *contents)


def check(client, model, weights, biases=()):
    """weights: {tensor: Weight}; biases: {tensor: float64 [n]}."""
    tensors = {t["name"]: t for t in client.call("tensor.list", model=model)["tensors"]}
    assert sorted(tensors) == sorted(weights), (sorted(tensors), sorted(weights))
    for name, weight in weights.items():
        tensor = tensors[name]
        symmetric = bool((weight.zeros == 1 << weight.bits - 1).all())
        shown = (tensor["n"], tensor["k"], tensor["bits"], tensor["group"], tensor["symmetric"],
                 tensor["scale"], tensor["bias"])
        assert shown == (weight.n, weight.k, weight.bits, weight.width, symmetric, "f16",
                         name in biases), (model, name, shown)
        for m in (1, 7, 65):
            x = rounded(RANDOM.standard_normal((m, weight.k)).astype(np.float32), DTYPE)
            y = client.gemm(tensor, x, DTYPE, bias=name in biases)
            reference = x.astype(np.float64) @ weight.weights.T
            if name in biases:
                reference += biases[name]
            error = relative_error(y, reference)
            assert error <= BOUNDS[DTYPE], (model, name, m, error)


def bias(n, dtype=np.float16):
    return RANDOM.standard_normal(n).astype(dtype)


def gptq_is_served(directory):
    daemon = Daemon(directory)
    with daemon.connect() as client:
        for version in (1, 2):
            for bits in (8, 4, 3):
                for group in (32, 128, 0):
                    kinds = [Weight(RANDOM, 64, 192, bits, group, symmetric)
                             for symmetric in (True, False)]
                    biases = {"m.1": bias(64)}
                    tensors = {**formats.gptq(kinds[0], "m.0", version, order=False),
                               **formats.gptq(kinds[1], "m.1", version), "m.1.bias": biases["m.1"],
                               "embed.weight": np.ones((4, 192), np.float16)}
                    quantization = {
                        "bits": bits, "group_size": group or -1, "desc_act": False, "sym": True,
                        **({"checkpoint_format": "gptq_v2"} if version == 2 else {})}
                    name = f"v{version}-{bits}-{group}"
                    # the older way has a file of its own, which names no method
                    own_file = "quantize_config.json" if group == 32 else None
                    if not own_file:
                        quantization["quant_method"] = "gptq"
                    path = write(directory, name, tensors, quantization, own_file)
                    client.call("model.load", name=name, path=path)
                    check(client, name, {"m.0": kinds[0], "m.1": kinds[1]}, biases)
                    client.call("model.unload", name=name)
    daemon.stop()


def gptq_dynamic_decides_by_the_first_match(directory):
    weights = {"layers.0.q": Weight(RANDOM, 32, 128, 8, 64), "layers.0.k": Weight(RANDOM, 32, 128, 4, 32),
               "layers.1.k": Weight(RANDOM, 32, 128, 3, 128, False)}
    tensors = {}
    for name, weight in weights.items():
        tensors.update(formats.gptq(weight, name, 2))
    path = write(directory, "dynamic", tensors, {
        "quant_method": "gptq", "bits": 3, "group_size": 128, "checkpoint_format": "gptq_v2",
        "dynamic": {"+:.*\\.q$": {"bits": 8, "group_size": 64}, "layers\\.0\\.": {"bits": 4, "group_size": 32},
                    "-:lm_head": {}}})
    daemon = Daemon(directory, models=[("d", path)])
    with daemon.connect() as client:
        check(client, "d", weights)
    daemon.stop()


def awq_is_served(directory):
    daemon = Daemon(directory)
    with daemon.connect() as client:
        for group in (32, 128, 0):
            # K need not be whole words of eight
            kinds = {f"m.{i}": Weight(RANDOM, 72, k, 4, group, symmetric)
                     for i, (symmetric, k) in enumerate(((True, 192), (False, 192), (False, 203)))}
            biases = {"m.1": bias(72, np.float32)}
            tensors = {"m.1.bias": biases["m.1"], "norm.weight": np.ones(192, np.float16)}
            for name, weight in kinds.items():
                tensors.update(formats.awq(weight, name))
            quantization = {"quant_method": "awq", "bits": 4, "group_size": group or -1,
                            "zero_point": True, "version": "gemm"}
            own_file = None
            if group == 32:
                own_file = "quant_config.json"
                quantization = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
            path = write(directory, f"g{group}", tensors, quantization, own_file)
            client.call("model.load", name="awq", path=path)
            check(client, "awq", kinds, biases)
            client.call("model.unload", name="awq")
    daemon.stop()


def gguf_is_served_from_its_file(directory):
    eight = Weight(RANDOM, 48, 160, 8, 32, negative=True)
    four = Weight(RANDOM, 40, 192, 4, 32, negative=True)
    stack = Weight(RANDOM, 3 * 16, 64, 4, 32, negative=True)
    shift = RANDOM.standard_normal(48).astype(np.float32)
    path = os.path.join(directory, "tiny.gguf")
    for alignment in (32, 8):
        with open(path, "wb") as file:
            file.write(formats.gguf(
                {"general.architecture": "llama", "general.alignment": alignment},
                {"blk.0.attn_q.weight": ("Q8_0", [48, 160], formats.gguf_blocks(eight)),
                 "blk.0.attn_q.bias": ("F32", [48], shift.tobytes()),
                 "blk.0.attn_norm.weight": ("F32", [160], np.ones(160, np.float32).tobytes()),
                 "blk.0.ffn_gate_exps.weight": ("Q4_0", [3, 16, 64], formats.gguf_blocks(stack)),
                 "output.weight": ("Q4_0", [40, 192], formats.gguf_blocks(four))}, alignment))
        experts = {}
        for e in range(3):
            experts[f"blk.0.ffn_gate_exps.{e}"] = part = Weight(RANDOM, 16, 64, 4, 32)
            rows = slice(16 * e, 16 * e + 16)
            part.codes, part.scales, part.zeros = stack.codes[rows], stack.scales[rows], stack.zeros[rows]
        daemon = Daemon(directory, models=[("g", path)])
        with daemon.connect() as client:
            check(client, "g", {"blk.0.attn_q": eight, "output": four, **experts},
                  {"blk.0.attn_q": shift.astype(np.float64)})
        daemon.stop()


def a_dense_gguf_is_quantized_while_loading(directory):
    dense = RANDOM.standard_normal((32, 96)).astype(np.float16)
    path = os.path.join(directory, "dense.gguf")
    with open(path, "wb") as file:
        file.write(formats.gguf({}, {
            "blk.0.ffn_up.weight": ("F16", [32, 96], dense.tobytes()),
            "token_embd.weight": ("F16", [32, 96], dense.tobytes()),
            "output.weight": ("F16", [32, 96], dense.tobytes())}))
    daemon = Daemon(directory)
    with daemon.connect() as client:
        client.call("model.load", name="g", path=path, bits=8, group=32)
        tensor, = client.call("tensor.list", model="g")["tensors"]
        assert (tensor["name"], tensor["bits"], tensor["group"]) == ("blk.0.ffn_up", 8, 32)
        x = rounded(RANDOM.standard_normal((3, 96)).astype(np.float32), DTYPE)
        y = client.gemm(tensor, x, DTYPE)
        assert relative_error(y, x.astype(np.float64) @ dense.astype(np.float64).T) < 0.02
    daemon.stop()


def compressed_tensors_of_both_ages_are_served(directory):
    daemon = Daemon(directory)
    with daemon.connect() as client:
        for old in (False, True):
            for symmetric in (True, False):
                weights = {f"m.{group}": Weight(RANDOM, 67, 200, 3, group, symmetric)
                           for group in (32, 0)}
                tensors, groups = {}, {}
                for name, weight in weights.items():
                    tensors.update(formats.compressed_tensors(weight, name, old))
                    groups[name] = {"targets": [name], "weights": {
                        "num_bits": 3, "type": "int", "symmetric": symmetric,
                        "strategy": "group" if weight.group else "channel",
                        "group_size": weight.group or None}}
                path = write(directory, f"{old}-{symmetric}", tensors, {
                    "quant_method": "compressed-tensors", "format": "pack-quantized",
                    "config_groups": groups})
                client.call("model.load", name="ct", path=path)
                check(client, "ct", weights)
                client.call("model.unload", name="ct")
    daemon.stop()


def what_is_not_served_is_refused_by_name(directory):
    path = write(directory, "hqq", {"a.qweight": np.zeros((1, 1), np.int32)}, {"quant_method": "hqq"})
    daemon = Daemon(directory)
    with daemon.connect() as client:
        expect("unsupported", client.call, "model.load", name="m", path=path,
               says="quant_method 'hqq', served are compressed-tensors, gptq and awq")
        with open(os.path.join(directory, "x"), "wb") as file:
            file.write(b"no checkpoint")
        expect("format", client.call, "model.load", name="m", path=file.name, says="does not begin with 'GGUF'")
    daemon.stop()
    daemon = Daemon(directory, models=[("m", path)], wait=False)
    daemon.stop(13, told=True)
    assert "quant_method 'hqq'" in daemon.log()


if __name__ == "__main__":
    main([gptq_is_served, gptq_dynamic_decides_by_the_first_match, awq_is_served,
          gguf_is_served_from_its_file, a_dense_gguf_is_quantized_while_loading,
          compressed_tensors_of_both_ages_are_served, what_is_not_served_is_refused_by_name])
