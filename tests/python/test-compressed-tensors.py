#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Both ways between finequant-quantize and the compressed-tensors package: what it packs we read, what
we pack it unpacks, bit for bit.  Runs where torch and compressed_tensors can be imported:
    make check PYTHON3=VENV/bin/python TESTS=tests/python/test-compressed-tensors.py"""
import json
import os
import subprocess
import sys
import tempfile

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import formats  # noqa: E402

try:
    import torch
    import transformers
    import compressed_tensors
    from compressed_tensors.compressors import PackedQuantizationCompressor, pack_quantized
    from compressed_tensors.quantization import QuantizationConfig
except ImportError as missing:
    print(f"SKIP: {missing}")
    sys.exit(77)

PROGRAM = os.path.join(os.environ.get("top_builddir", "."), "finequant-quantize")
N, K = 72, 192


def config_of(scheme):
    """A quantization_config with one group, checked by the package."""
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized",
              "quantization_status": "compressed",
              "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}}}
    QuantizationConfig.model_validate(config)
    return config


def schemes():
    for bits in (8, 4, 3):
        for group in (32, 64, None):
            for symmetric in (True, False):
                yield {"num_bits": bits, "type": "int", "symmetric": symmetric,
                       "strategy": "group" if group else "channel", "group_size": group}


def packed_by_the_package(scheme, dtype):
    """(tensors, codes as int8, zero points as int8): weights on a grid, quantized by the package."""
    bits = scheme["num_bits"]
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    groups = K // (scheme["group_size"] or K)
    generator = torch.Generator().manual_seed(bits * 1000 + groups)
    codes = torch.randint(low, high + 1, (N, K), generator=generator)
    zeros = torch.randint(low, high + 1, (N, groups), generator=generator).to(torch.int8)
    scales = 2.0 ** torch.randint(-8, -3, (N, groups), generator=generator).to(dtype)
    used = zeros if not scheme["symmetric"] else torch.zeros_like(zeros)
    spread = K // groups
    weights = ((codes - used.repeat_interleave(spread, 1)) * scales.repeat_interleave(spread, 1)).to(dtype)
    state = {"weight": weights, "weight_scale": scales}
    if not scheme["symmetric"]:
        state["weight_zero_point"] = zeros
    quantization = QuantizationConfig.model_validate(config_of(scheme))
    state = PackedQuantizationCompressor.compress(state, quantization.config_groups["group_0"])
    return state, codes, used


def as_numpy(tensor):
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def run(*arguments):
    subprocess.run([PROGRAM, *arguments, "--quiet"], check=True)


def scheme_by_the_package(config, module):
    """The scheme that the package's own reading of our config gives a module."""
    groups = QuantizationConfig.model_validate(config["quantization_config"]).config_groups.values()
    return next(g for target in (module, "Linear") for g in groups if target in g.targets)


def unpacked_by_the_package(config, tensors, module):
    scheme = scheme_by_the_package(config, module).weights
    shape = torch.Size(tensors[f"{module}.weight_shape"].tolist())
    codes = pack_quantized.unpack_from_int32(
        torch.from_numpy(tensors[f"{module}.weight_packed"].copy()), scheme.num_bits, shape)
    if scheme.symmetric:
        return codes, None
    zeros = torch.from_numpy(tensors[f"{module}.weight_zero_point"].copy())
    return codes, pack_quantized.unpack_from_int32(
        zeros, scheme.num_bits, (shape[0], tensors[f"{module}.weight_scale"].shape[1]), packed_dim=0)


def what_it_packs_we_write_again(work):
    count = 0
    for scheme in schemes():
        for dtype in (torch.float16, torch.bfloat16):
            state, codes, zeros = packed_by_the_package(scheme, dtype)
            source, out = (os.path.join(work, f"{count}{end}") for end in ("", "-out"))
            count += 1
            tensors = {f"m.{name}": as_numpy(value) for name, value in state.items()}
            formats.write_directory(source, tensors, config_of(scheme))
            run("convert", source, out)
            config, ours = formats.read_checkpoint(out)
            assert sorted(ours) == sorted(tensors), (scheme, sorted(ours))
            for name, value in tensors.items():
                assert np.array_equal(ours[name], value) and ours[name].dtype == value.dtype, (scheme, name)
            read_codes, read_zeros = unpacked_by_the_package(config, ours, "m")
            assert torch.equal(read_codes.long(), codes), scheme
            assert read_zeros is None or torch.equal(read_zeros, zeros), scheme
    return f"{count} schemes"


def what_gptq_and_awq_become_it_unpacks(work):
    random = np.random.default_rng(6)
    count = 0
    cases = [("gptq", bits, symmetric) for bits in (8, 4, 3) for symmetric in (True, False)]
    for method, bits, symmetric in [*cases, ("awq", 4, True), ("awq", 4, False)]:
        weight = formats.Weight(random, N // 8 * 8, K, bits, 64, symmetric)
        source, out = (os.path.join(work, f"{method}{count}{end}") for end in ("", "-out"))
        count += 1
        tensors = formats.gptq(weight, "m") if method == "gptq" else formats.awq(weight, "m")
        formats.write_directory(source, tensors, {"quant_method": method, "bits": bits, "group_size": 64,
                                                  **({"zero_point": True} if method == "awq" else {})})
        run("convert", source, out)
        config, ours = formats.read_checkpoint(out)
        codes, zeros = unpacked_by_the_package(config, ours, "m")
        assert np.array_equal(codes.long().numpy() + (1 << bits - 1), weight.codes), (method, bits, symmetric)
        assert symmetric == (zeros is None)
        assert symmetric or np.array_equal(zeros.long().numpy() + (1 << bits - 1), weight.zeros)
        packed = pack_quantized.pack_to_int32(codes, bits)
        assert np.array_equal(packed.numpy(), ours["m.weight_packed"]), (method, bits)
    return f"{count} matrices"


def what_we_quantize_it_unpacks(work):
    random = np.random.default_rng(9)
    source = os.path.join(work, "dense")
    formats.write_directory(source, {
        "a.weight": random.standard_normal((N, K)).astype(np.float32),
        "b.weight": random.standard_normal((N, 2 * K)).astype(np.float16)})
    count = 0
    for bits in ("8", "4", "3"):
        for group in ("32", "channel"):
            out = os.path.join(work, f"q{bits}-{group}")
            run(source, out, "--bits", bits, "--group", group)
            config, ours = formats.read_checkpoint(out)
            for module in ("a", "b"):
                codes, zeros = unpacked_by_the_package(config, ours, module)
                own = formats.unstream(ours[f"{module}.weight_packed"], codes.shape[1], int(bits))
                assert np.array_equal(codes.long().numpy() + (1 << int(bits) - 1), own), (bits, group, module)
                packed = pack_quantized.pack_to_int32(codes, int(bits))
                assert np.array_equal(packed.numpy(), ours[f"{module}.weight_packed"])
                if zeros is not None:
                    packed = pack_quantized.pack_to_int32(zeros, int(bits), packed_dim=0)
                    assert np.array_equal(packed.numpy(), ours[f"{module}.weight_zero_point"])
                state = {name: torch.from_numpy(ours[f"{module}.{name}"].copy())
                         for name in ("weight_packed", "weight_scale", "weight_shape",
                                      "weight_zero_point") if f"{module}.{name}" in ours}
                state["weight_scale"] = state["weight_scale"].double()
                dense = PackedQuantizationCompressor.decompress(
                    state, scheme_by_the_package(config, module))["weight"]
                assert np.array_equal(dense.numpy(), formats.dequantize(config, ours, module)), module
                count += 1
    return f"{count} matrices"


def a_converted_model_runs_in_transformers(work):
    """GPTQ with two widths → ours → transformers: the logits are those of the dequantized weights.
    Symmetric, since these versions do not take zero points back that they wrote themselves."""
    random = np.random.default_rng(3)
    torch.manual_seed(1)
    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=4, vocab_size=100,
                                      max_position_embeddings=64)
    model = transformers.LlamaForCausalLM(config)
    tensors, dense = {}, {}
    for name, value in model.state_dict().items():
        tensors[name] = dense[name] = value.float().numpy()
        if name.endswith("proj.weight"):
            weight = formats.Weight(random, *value.shape, 8 if "down_proj" in name else 4, 32)
            weight.scales = (weight.scales * np.float16(0.1)).astype(np.float16)
            del tensors[name]
            tensors.update(formats.gptq(weight, name[:-len(".weight")]))
            dense[name] = weight.weights.astype(np.float32)
    source, out = os.path.join(work, "llama"), os.path.join(work, "llama-out")
    formats.write_directory(source, tensors, {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"+:.*down_proj": {"bits": 8}}},
        None, json.loads(config.to_json_string()))
    run("convert", source, out)
    return same_logits(out, model, dense)


def same_logits(out, model, dense):
    """That transformers loads OUT, and its logits are those of MODEL with the weights of DENSE."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    model.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in dense.items()})
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        ours, theirs = loaded(tokens).logits, model(tokens).logits
    assert torch.equal(ours, theirs), (ours - theirs).abs().max()
    return f"transformers {transformers.__version__}, {ours.numel()} logits"


def what_we_quantize_runs_in_transformers(work):
    """Every symmetric way to quantize a Llama whose weights lean to one side, so that scales of both
    signs are written: the logits are those of the weights that our file holds."""
    torch.manual_seed(2)
    config = transformers.LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, vocab_size=100,
                                      max_position_embeddings=64)
    model = transformers.LlamaForCausalLM(config)
    tensors = {name: (value.float().numpy() + 0.01 * name.endswith("proj.weight")).astype(np.float32)
               for name, value in model.state_dict().items()}
    source = os.path.join(work, "llama-dense")
    formats.write_directory(source, tensors, None, None, json.loads(config.to_json_string()))
    ways = (("--group", "64"), ("--bits", "8", "--group", "channel"), ("--bits", "8", "--group", "32"),
            (), ("--alpha", "0.02"), ("--group", "32", "--override", "*.down_proj=8,64"))
    for number, way in enumerate(ways):
        out = os.path.join(work, f"llama-{number}")
        run(source, out, "--quiet", *way)
        hf_config, written = formats.read_checkpoint(out)
        dense = {name: value for name, value in tensors.items()}
        negative = 0
        for name in tensors:
            if name.endswith("proj.weight"):
                module = name[:-len(".weight")]
                negative += int((written[module + ".weight_scale"] < 0).sum())
                # as the package does it: codes times scale, rounded once in fp32
                dense[name] = formats.dequantize(hf_config, written, module).astype(np.float32)
        assert negative > 0
        same_logits(out, model, dense)
    return f"transformers {transformers.__version__}, {len(ways)} ways"


def main():
    print(f"compressed-tensors {compressed_tensors.__version__}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as work:
        for test in (what_it_packs_we_write_again, what_gptq_and_awq_become_it_unpacks,
                     what_we_quantize_it_unpacks, a_converted_model_runs_in_transformers,
                     what_we_quantize_runs_in_transformers):
            print("ok", test.__name__, test(work))


if __name__ == "__main__":
    sys.exit(main())
