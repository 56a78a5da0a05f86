#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What finequant-quantize writes, loaded by vLLM's own code: CompressedTensorsConfig.from_config, its
choice of a scheme for each layer, the fused layers of a Llama (qkv_proj, gate_up_proj) with their
weight loaders, and the dequantization of CompressedTensorsWNA16, held to ours bit for bit.  Runs where
vllm can be imported, and needs no GPU:
    make check PYTHON3=VENV/bin/python TESTS=tests/python/test-vllm.py
In vLLM's batch-invariant mode, since that one dequantizes in torch; its product, a Triton kernel, is
torch's here.  What the Marlin kernels say of each layer's type, group and shape is asked of them for
compute capability 9.0; they are not run."""
import os
import sys
import tempfile

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import formats  # noqa: E402
from checkpoint import quantize, write_checkpoint  # noqa: E402

os.environ.update(VLLM_BATCH_INVARIANT="1", VLLM_LOGGING_LEVEL="ERROR", OMP_NUM_THREADS="2",
                  VLLM_NO_USAGE_STATS="1", VLLM_DO_NOT_TRACK="1")
try:
    import torch
    import compressed_tensors
    import vllm
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.layers.linear import (MergedColumnParallelLinear, QKVParallelLinear,
                                                   RowParallelLinear)
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors as theirs
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16
    from vllm.model_executor.layers.quantization.utils import marlin_utils
except ImportError as missing:
    print(f"SKIP: {missing}")
    sys.exit(77)

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS = 256, 512, 4, 2, 2
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# Older releases of compressed-tensors unpack ten 3-bit codes a word, though vLLM makes room for a dense
# stream: with those, 3 bits are loaded and not looked at.
DENSE_THREE = compressed_tensors_wNa16.unpack_from_int32(
    torch.zeros(1, 6, dtype=torch.int32), 3, torch.Size((1, 64))).numel() == 64
WAYS = {
    "int4, group 64": ("--group", "64"),
    "int4, group 128": ("--group", "128"),
    "int4, group 32": ("--group", "32"),
    "int4, one a row": ("--group", "channel"),
    "int8, group 64": ("--bits", "8", "--group", "64"),
    "int8, one a row": ("--bits", "8", "--group", "channel"),
    "int4, the default": (),
    "8, 4 and 3 bits, a budget": ("--bits-per-weight", "4.6"),
    "int4 and int8 by name": ("--group", "64", "--override", "*.down_proj=8,128"),
    "int3, group 64": ("--bits", "3", "--group", "64"),
    "zero points, int4": ("--asymmetric", "--group", "64"),
    "zero points, a budget": ("--asymmetric", "--bits-per-weight", "4.6"),
}


def weights(random):
    """A Llama whose weights lean to one side, so that zero points pay, with outliers in one matrix."""
    shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
              "self_attn.v_proj": (HIDDEN // 2, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
              "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
              "mlp.down_proj": (HIDDEN, INNER)}
    out = {}
    for layer in range(LAYERS):
        for part, shape in shapes.items():
            array = random.normal(0.01, 0.02, shape)
            if layer == 1 and part == "mlp.down_proj":
                array[:, 77] += 1
            out[f"model.layers.{layer}.{part}.weight"] = array.astype(np.float16)
    out["lm_head.weight"] = random.normal(0, 0.02, (64, HIDDEN)).astype(np.float16)
    return out


def layers_of(config):
    """(vLLM's layer, the modules that it is made of) for each linear layer of the model."""
    for i in range(LAYERS):
        prefix = f"model.layers.{i}."
        common = {"bias": False, "params_dtype": torch.float16, "quant_config": config}
        yield (QKVParallelLinear(HIDDEN, HIDDEN // HEADS, HEADS, KV_HEADS,
                                 prefix=prefix + "self_attn.qkv_proj", **common),
               [(prefix + "self_attn." + part, part[0]) for part in FUSED["qkv_proj"]])
        yield (RowParallelLinear(HIDDEN, HIDDEN, prefix=prefix + "self_attn.o_proj", **common),
               [(prefix + "self_attn.o_proj", None)])
        yield (MergedColumnParallelLinear(HIDDEN, [INNER, INNER], prefix=prefix + "mlp.gate_up_proj",
                                          **common),
               [(prefix + "mlp." + part, place) for place, part in enumerate(FUSED["gate_up_proj"])])
        yield (RowParallelLinear(INNER, HIDDEN, prefix=prefix + "mlp.down_proj", **common),
               [(prefix + "mlp.down_proj", None)])


def load(layer, modules, tensors):
    """Every tensor of the modules through the parameters' own loaders.  Returns how many."""
    parameters, count = dict(layer.named_parameters()), 0
    for module, place in modules:
        for name, value in tensors.items():
            if not name.startswith(module + "."):
                continue
            parameter = parameters[name[len(module) + 1:]]
            arguments = () if place is None else (place,)
            parameter.weight_loader(parameter, torch.from_numpy(value.copy()), *arguments)
            count += 1
    return count


def marlin_takes(layer):
    """Whether the Marlin kernels of a Hopper GPU take the layer: "" or what they say."""
    scheme = layer.scheme
    types = marlin_utils.query_marlin_supported_quant_types(not scheme.symmetric, False, 90)
    if scheme.quant_type not in types:
        return f"{scheme.num_bits} bits"
    if scheme.group_size not in marlin_utils.MARLIN_SUPPORTED_GROUP_SIZES:
        return f"group {scheme.group_size}"
    fine, why = marlin_utils.check_marlin_supports_shape(
        layer.output_size_per_partition, layer.input_size_per_partition, layer.input_size,
        scheme.group_size)
    return "" if fine else why


def check(source, out, arguments):
    """Quantizes and loads; returns what was found, in words."""
    quantize(source, out, *arguments)
    hf_config, tensors = formats.read_checkpoint(out)
    config = theirs.CompressedTensorsConfig.from_config(dict(hf_config["quantization_config"]))
    config.packed_modules_mapping = {whole: list(parts) for whole, parts in FUSED.items()}
    schemes, refused, zeros = set(), set(), 0
    for layer, modules in layers_of(config):
        assert isinstance(layer.scheme, compressed_tensors_wNa16.CompressedTensorsWNA16), layer
        assert load(layer, modules, tensors) == len(modules) * (3 + (not layer.scheme.symmetric))
        layer.quant_method.process_weights_after_loading(layer)
        schemes.add((layer.scheme.num_bits, layer.scheme.group_size))
        zeros += not layer.scheme.symmetric
        refused |= {marlin_takes(layer)} - {""}
        if layer.scheme.num_bits == 3 and not DENSE_THREE:
            continue
        identity = torch.eye(layer.input_size, dtype=torch.float16)
        found = layer.quant_method.apply(layer, identity).T.numpy()
        wanted = np.concatenate([formats.dequantize(hf_config, tensors, name) for name, _ in modules])
        assert np.array_equal(found, wanted.astype(np.float16)), modules
    assert zeros == 0 or "--asymmetric" in arguments
    assert zeros > 0 or "--asymmetric" not in arguments
    text = ", ".join(f"{bits} bits group {group if group > 0 else 'channel'}" for bits, group in sorted(schemes))
    return (f"{text}{f', {zeros} of {4 * LAYERS} with zero points' if zeros else ''}; Marlin "
            + (f"refuses {', '.join(sorted(refused))}" if refused else "takes all"))


def main():
    print(f"vllm {vllm.__version__}, compressed-tensors {compressed_tensors.__version__}, "
          f"torch {torch.__version__}"
          + ("" if DENSE_THREE else "; 3 bits are loaded, not dequantized: ten a word in this package"))
    compressed_tensors_wNa16.matmul_batch_invariant = torch.matmul
    with tempfile.TemporaryDirectory() as work, set_current_vllm_config(
            VllmConfig(device_config=DeviceConfig(device="cpu"))):
        init_distributed_environment(1, 0, f"file://{work}/rendezvous", 0, "gloo")
        initialize_model_parallel(1, 1)
        source = os.path.join(work, "in")
        write_checkpoint(source, weights(np.random.default_rng(33)))
        for number, (what, arguments) in enumerate(WAYS.items()):
            print(f"ok {what}: {check(source, os.path.join(work, str(number)), arguments)}")


if __name__ == "__main__":
    sys.exit(main())
