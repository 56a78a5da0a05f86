# SPDX-License-Identifier: Apache-2.0
"""Checkpoints for the quantizer's tests: written plainly, read back and unpacked from the published
layouts alone, in numpy; and the program run on them, with what several tests ask of it."""
import json
import os
import struct
import subprocess

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


def write_checkpoint(directory, tensors, **config):
    os.mkdir(directory)
    write_safetensors(os.path.join(directory, "model.safetensors"), tensors)
    with open(os.path.join(directory, "config.json"), "w") as file:
        json.dump({"model_type": "test"} | config, file)


def shard(source, directory):
    """The checkpoint again with a file for each tensor, and an index."""
    tensors = read_checkpoint(source)
    os.mkdir(directory)
    files = {name: f"model-{i + 1:05}-of-{len(tensors):05}.safetensors"
             for i, name in enumerate(sorted(tensors))}
    for name, file in files.items():
        write_safetensors(os.path.join(directory, file), {name: tensors[name]})
    with open(os.path.join(directory, "model.safetensors.index.json"), "w") as file:
        json.dump({"weight_map": files}, file)
    return directory


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


def read_quantization(path):
    with open(os.path.join(path, "config.json")) as file:
        return json.load(file)["quantization_config"]


def scheme_of(quantization, module):
    """A name goes before the class, as every reader has it."""
    for target in (module, "Linear"):
        for group in quantization["config_groups"].values():
            if target in group["targets"]:
                return group["weights"]
    raise AssertionError(f"no scheme for {module}")


def unpack(words, k, bits):
    """Dense, lowest bits first: every row as one string of bits."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    return stream[:, :k * bits].reshape(len(words), k, bits) @ (1 << np.arange(bits))


def codes_of(tensors, quantization, module):
    """(codes, zeros a column, scales a column, scheme) of one module, all [N, K]."""
    scheme = scheme_of(quantization, module)
    n, k = (int(x) for x in tensors[module + ".weight_shape"])
    bits = scheme["num_bits"]
    group = k if scheme["strategy"] == "channel" else scheme["group_size"]
    codes = unpack(tensors[module + ".weight_packed"], k, bits)
    scales = tensors[module + ".weight_scale"].astype(np.float64)
    if scheme["symmetric"]:
        zeros = np.full(scales.shape, 2 ** (bits - 1))
    else:
        zeros = unpack(tensors[module + ".weight_zero_point"].T, n, bits).T
    column = np.arange(k) // group
    assert scales.shape == (n, -(-k // group)), (module, scales.shape)
    return codes, zeros[:, column], scales[:, column], scheme


def dequantize(tensors, quantization, module):
    codes, zeros, scales, _ = codes_of(tensors, quantization, module)
    return (codes - zeros) * scales


def relative(weights, approximation):
    weights = weights.astype(np.float64)
    return np.linalg.norm(weights - approximation) / np.linalg.norm(weights)


def quantize(source, out, *arguments, check=True):
    """Runs the program quietly; its report, or the finished process where check is False."""
    run = subprocess.run([PROGRAM, source, out, "--quiet", "--json", *arguments],
                         capture_output=True, text=True)
    if not check:
        return run
    assert run.returncode == 0, run
    return json.loads(run.stdout)


def mixture(random):
    """Matrices of three widths, some with outliers or long tails, and two tensors that stay dense."""
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
