# SPDX-License-Identifier: Apache-2.0
"""Reference packings, written in numpy from the descriptions of the formats: what the tests hold our
readers against, and make malformed files from.

A Weight is a quantized matrix whose float64 value is known; the functions below turn it into the
tensors of one format, or into blocks of GGUF.  Bits are put in streams as bits, not as words, so that
no index arithmetic is shared with the readers.
"""
import json
import os
import struct

import numpy as np

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column, of eight, that nibble i of a word holds
GGUF_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "BF16": 30}


class Weight:
    """W[n, k] = (codes − zeros) · scales, one scale and zero point for `group` columns."""

    def __init__(self, random, n, k, bits=4, group=64, symmetric=True, negative=False):
        self.n, self.k, self.bits, self.group, self.symmetric = n, k, bits, group, symmetric
        self.width = group if group and group < k else k
        groups = -(-k // self.width)
        self.codes = random.integers(0, 1 << bits, (n, k))
        self.scales = (random.uniform(0.5, 2, (n, groups)) / (1 << bits)).astype(np.float16)
        if negative:
            self.scales *= random.choice((-1, 1), (n, groups)).astype(np.float16)
        self.zeros = np.full((n, groups), 1 << bits - 1)
        if not symmetric:
            self.zeros = random.integers(0, 1 << bits, (n, groups))
            self.zeros.flat[0] = 0  # what GPTQ's first format keeps as all ones

    @property
    def weights(self):
        column = np.arange(self.k) // self.width
        return (self.codes - self.zeros[:, column]) * self.scales.astype(np.float64)[:, column]


def stream(codes, bits):
    """[R, C] codes → [R, ceil(C·bits/32)] int32: each row as one string of bits, lowest first."""
    rows, columns = codes.shape
    words = -(-columns * bits // 32)
    out = np.zeros((rows, words * 32), np.uint8)
    out[:, :columns * bits] = (codes[:, :, None] >> np.arange(bits) & 1).reshape(rows, -1)
    return np.packbits(out, axis=1, bitorder="little").view("<i4")


def ten_a_word(codes):
    """[R, C] 3-bit codes → [R, ceil(C/10)] int32: ten codes a word, its upper two bits unused."""
    rows, columns = codes.shape
    padded = np.zeros((rows, -(-columns // 10) * 10), np.int64)
    padded[:, :columns] = codes
    return (padded.reshape(rows, -1, 10) << 3 * np.arange(10)).sum(axis=2).astype("<i4")


def compressed_tensors(weight, name, old_three_bits=False):
    def pack(codes):
        return ten_a_word(codes) if old_three_bits else stream(codes, weight.bits)
    tensors = {f"{name}.weight_packed": pack(weight.codes),
               f"{name}.weight_scale": weight.scales,
               f"{name}.weight_shape": np.array([weight.n, weight.k], np.int64)}
    if not weight.symmetric:  # packed along N
        tensors[f"{name}.weight_zero_point"] = np.ascontiguousarray(
            pack(np.ascontiguousarray(weight.zeros.T)).T)
    return tensors


def gptq(weight, name, version=1, order=True):
    mask = (1 << weight.bits) - 1
    stored = weight.zeros - 1 & mask if version == 1 else weight.zeros
    tensors = {f"{name}.qweight": np.ascontiguousarray(stream(weight.codes, weight.bits).T),
               f"{name}.qzeros": stream(np.ascontiguousarray(stored.T), weight.bits),
               f"{name}.scales": np.ascontiguousarray(weight.scales.T)}
    if order:
        tensors[f"{name}.g_idx"] = (np.arange(weight.k) // weight.width).astype(np.int32)
    return tensors


def awq_words(codes):
    """[R, N] → [R, N/8] int32."""
    eights = codes.reshape(len(codes), -1, 8)[:, :, AWQ_ORDER].astype(np.uint32)
    return (eights << 4 * np.arange(8, dtype=np.uint32)).sum(axis=2, dtype=np.uint32).view("<i4")


def awq(weight, name):
    return {f"{name}.qweight": awq_words(weight.codes.T),
            f"{name}.qzeros": awq_words(weight.zeros.T),
            f"{name}.scales": np.ascontiguousarray(weight.scales.T)}


def gguf_blocks(weight):
    """The bytes of a Weight with groups of 32, symmetric: Q8_0 for 8 bits, Q4_0 for 4."""
    assert weight.width == 32 and weight.symmetric
    codes = weight.codes.reshape(weight.n, -1, 32)
    scales = weight.scales.reshape(weight.n, -1, 1).view(np.uint8)
    if weight.bits == 8:
        quants = (codes - 128).astype(np.int8).view(np.uint8)
    else:
        quants = (codes[:, :, :16] | codes[:, :, 16:] << 4).astype(np.uint8)
    return np.concatenate((scales, quants), axis=2).tobytes()


# ---- Files ---------------------------------------------------------------------------------


SAFETENSORS_TYPES = {np.dtype("<f4"): "F32", np.dtype("<f2"): "F16", np.dtype("<i4"): "I32",
                     np.dtype("<i8"): "I64", np.dtype("<u2"): "BF16", np.dtype("<f8"): "F64"}


def safetensors(tensors):
    """{name: array} → bytes; uint16 stands for BF16."""
    header, blobs, at = {}, [], 0
    for name, array in tensors.items():
        blobs.append(np.ascontiguousarray(array).tobytes())
        header[name] = {"dtype": SAFETENSORS_TYPES[array.dtype], "shape": list(array.shape),
                        "data_offsets": [at, at + len(blobs[-1])]}
        at += len(blobs[-1])
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(blobs)


def write_directory(path, tensors, quantization=None, own_file=None, config=()):
    """A checkpoint directory, with its quantization in config.json or in a file of its own; the path."""
    os.makedirs(path)
    with open(os.path.join(path, "model.safetensors"), "wb") as file:
        file.write(safetensors(tensors))
    config = {"model_type": "synthetic", **dict(config)}
    if quantization and not own_file:
        config["quantization_config"] = quantization
    for name, value in (("config.json", config), (own_file, quantization)):
        if name:
            with open(os.path.join(path, name), "w", encoding="ascii") as file:
                json.dump(value, file)
    return path


def gguf_string(text):
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def gguf_value(value):
    """A metadata value with its type: bool, int (u32), float (f32), str, or a list of one of them."""
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_string(value)
    items = [gguf_value(item) for item in value]
    return struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", len(items)) + b"".join(
        item[4:] for item in items)


def gguf(metadata, tensors, alignment=32, version=3):
    """tensors: {name: (type's name, [outermost, ..., K], bytes)}."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        head += gguf_string(key) + gguf_value(value)
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        head += gguf_string(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", GGUF_TYPES.get(kind, kind), len(data))
        data += raw + bytes(-len(raw) % alignment)
    return head + bytes(-len(head) % alignment) + data


# ---- Reading back --------------------------------------------------------------------------


def read_safetensors(path):
    """{name: array} of one file; BF16 comes as uint16."""
    with open(path, "rb") as file:
        raw = file.read()
    size, = struct.unpack_from("<Q", raw)
    dtypes = {name: dtype for dtype, name in SAFETENSORS_TYPES.items()}
    out = {}
    for name, entry in json.loads(raw[8:8 + size]).items():
        if name != "__metadata__":
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            out[name] = np.frombuffer(raw[begin:end], dtypes[entry["dtype"]]).reshape(entry["shape"])
    return out


def read_checkpoint(path):
    """(config.json, {name: array}) of a directory, sharded or not."""
    with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    index = os.path.join(path, "model.safetensors.index.json")
    if not os.path.exists(index):
        return config, read_safetensors(os.path.join(path, "model.safetensors"))
    with open(index, encoding="ascii") as file:
        weight_map = json.load(file)["weight_map"]
    tensors = {}
    for shard in sorted(set(weight_map.values())):
        part = read_safetensors(os.path.join(path, shard))
        assert all(weight_map[name] == shard for name in part)
        tensors.update(part)
    assert sorted(tensors) == sorted(weight_map)
    return config, tensors


def unstream(words, count, bits):
    """The reverse of stream()."""
    raw = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    return raw[:, :count * bits].reshape(len(words), count, bits) @ (1 << np.arange(bits))


def scheme_of(config, module):
    """What a quantization_config says of a module: names go before the class."""
    groups = config["quantization_config"]["config_groups"].values()
    found = [g["weights"] for target in (module, "Linear") for g in groups if target in g["targets"]]
    return found[0]


def dequantize(config, tensors, module):
    """float64 weights of one compressed-tensors module in the dense packing."""
    scheme = scheme_of(config, module)
    bits = scheme["num_bits"]
    n, k = tensors[f"{module}.weight_shape"]
    scales = tensors[f"{module}.weight_scale"]
    codes = unstream(tensors[f"{module}.weight_packed"], k, bits)
    zeros = np.full(scales.shape, 1 << bits - 1)
    if not scheme["symmetric"]:
        packed = tensors[f"{module}.weight_zero_point"]
        zeros = unstream(np.ascontiguousarray(packed.T), n, bits).T
    column = np.arange(k) // (scheme["group_size"] if scheme["strategy"] == "group" else k)
    return (codes - zeros[:, column]) * scales.astype(np.float64)[:, column]
