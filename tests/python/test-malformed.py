#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with one fault each.  Every case gets one line that names the file, the tensor where one is
at fault, and the fault; an exit status that is not 0; and no output.  `finequant-quantize convert` and
the quantizer open a checkpoint by the same call; the latter is tried with the dense ones."""
import json
import os
import struct
import subprocess
import sys
import tempfile

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import formats  # noqa: E402
from formats import Weight  # noqa: E402

PROGRAM = os.path.join(os.environ.get("top_builddir", "."), "finequant-quantize")
RANDOM = np.random.default_rng(8)
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NOT_FOUND, UNSUPPORTED, FORMAT = 8, 13, 14


def text(value):
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def raw(header, data=b"", length=None):
    """A safetensors file with any header."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(name="a.weight", dtype="F32", shape="[2,2]", begin=0, end=16):
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}'.encode()


def braces(*entries):
    return b"{" + b",".join(entries) + b"}"


ONE = formats.safetensors({"a.weight": np.ones((2, 2), np.float32)})
OTHER = formats.safetensors({"b.weight": np.ones((2, 2), np.float32)})


def header_cases():
    def case(name, file, words, status=FORMAT):
        return f"header: {name}", {SINGLE: file}, status, (SINGLE, *words)
    yield case("empty file", b"", ("0 bytes, too short",))
    yield case("seven bytes", b"\0" * 7, ("7 bytes, too short",))
    yield case("beyond the file", raw(b"{}", length=3), ("beyond the file",))
    yield case("over 100 MB", raw(b"{}", length=100000001), ("at most 100000000",))
    yield case("length of all ones", raw(b"{}", length=2 ** 64 - 1), ("at most 100000000",))
    yield case("no object", raw(b"[]"), ("does not begin with '{'",))
    yield case("cut JSON", raw(b'{"a":'), ("header, byte",))
    yield case("text after JSON", raw(b"{} x"), ("header, byte",))
    yield case("invalid UTF-8", raw(b'{"\xff":1}'), ("header, byte",))
    yield case("duplicate key", raw(braces(entry(), entry()), bytes(16)), ("duplicate", "a.weight"))
    yield case("metadata no object", raw(b'{"__metadata__":[]}'), ("__metadata__ is not an object",))
    yield case("metadata no string", raw(b'{"__metadata__":{"a":1}}'), ("__metadata__ 'a'",))

    def tensor(title, words, data=16, status=FORMAT, first=(), **fields):
        file = raw(braces(*first, entry(**fields)), bytes(data))
        return case(title, file, (f"tensor '{fields.get('name', 'a.weight')}'", *words), status)
    yield tensor("unknown type", ("dtype 'F4'",), dtype="F4", status=UNSUPPORTED)
    yield tensor("negative size", ("shape[0]",), shape="[-1]")
    yield tensor("shape is no array", ("shape is missing or not an array",), shape="4")
    yield tensor("nine axes", ("rank is 9",), shape="[1,1,1,1,1,1,1,1,1]", status=UNSUPPORTED)
    yield tensor("size overflows", ("overflows",), shape="[4611686018427387904,4]")
    yield tensor("smaller than its shape", ("span 16 bytes, its shape needs 24",), shape="[2,3]")
    yield tensor("larger than its shape", ("span 16 bytes, its shape needs 4",), shape="[]")
    yield tensor("offsets reversed", ("not within the 16 bytes",), begin=16, end=0)
    yield tensor("offsets beyond the data", ("not within the 12 bytes",), data=12)
    yield tensor("gap at the start", ("gap: begins at 4",), begin=4, end=20, data=20)
    yield tensor("gap", ("gap: begins at 20, the one before ends at 16",), name="b", first=(entry(),),
                 begin=20, end=36, data=36)
    yield tensor("overlap", ("overlap: begins at 12, the one before ends at 16",), name="b",
                 first=(entry(),), begin=12, end=28, data=28)
    yield case("tail", ONE + b"x", ("1 bytes after the last tensor",))
    yield case("cut data", ONE[:-1], ("tensor 'a.weight'", "not within the 15 bytes"))


def index_cases():
    def case(name, weight_map, words, status=FORMAT, **files):
        shards = {"s1.safetensors": ONE, "s2.safetensors": OTHER}
        index = weight_map if isinstance(weight_map, bytes) else {"weight_map": weight_map}
        shards.update({key.replace("_", "."): value for key, value in files.items()})
        return f"index: {name}", {INDEX: index, **shards}, status, (INDEX, *words)
    for path in ("../s1.safetensors", "/etc/passwd", "..", "", "sub/s1.safetensors"):
        yield case(f"path {path!r}", {"a.weight": path}, ("'a.weight'", f"'{path}'", "only plain names"))
    yield case("shard missing", {"a.weight": "s3.safetensors"},
               ("tensor 'a.weight'", "s3.safetensors", "No such file"), NOT_FOUND)
    yield case("tensor not in its shard", {"a.weight": "s2.safetensors"},
               ("tensor 'a.weight' is not in s2.safetensors",))
    yield case("tensor in no shard", {"a.weight": "s1.safetensors", "c": "s2.safetensors"},
               ("tensor 'c' is not in s2.safetensors",))
    yield case("file is no string", {"a.weight": 1}, ("'a.weight' is not a string",))
    yield case("map is no object", [], ("weight_map is missing or not an object",))
    yield case("duplicate key", b'{"weight_map":{"a.weight":"s1.safetensors","a.weight":"x"}}',
               ("duplicate", "a.weight"))
    yield case("cut JSON", b'{"weight_map":{', ("line 1",))
    yield case("no object", b"[]", ("not a JSON object",))
    yield case("bad shard", {"a.weight": "s1.safetensors"}, ("s1.safetensors: 3 bytes, too short",),
               s1_safetensors=b"abc")
    yield case("tensor of a shard that the index does not name", {"a.weight": "s1.safetensors"},
               ("s1.safetensors: tensor 'x.weight' is not in",), s1_safetensors=formats.safetensors(
                   {"a.weight": np.ones((2, 2), np.float32), "x.weight": np.ones(1, np.float32)}))
    name, files, status, _ = case("both shards have it", {"a.weight": "s1.safetensors",
                                                          "b.weight": "s2.safetensors"}, ())
    files["s2.safetensors"] = formats.safetensors(
        {"a.weight": np.ones(1, np.float32), "b.weight": np.ones(1, np.float32)})
    yield name, files, status, ("tensor 'a.weight' is in both", "s1.safetensors", "s2.safetensors")
    yield "index: nothing at all", {"config.json": {}}, NOT_FOUND, (SINGLE, INDEX)


def replaced(tensors, name, value):
    """With one tensor changed, or without it."""
    tensors = dict(tensors)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    return tensors


def quantized(tensors, config):
    return {SINGLE: formats.safetensors(tensors), "config.json": {"quantization_config": config}}


def compressed_tensors_cases():
    good = formats.compressed_tensors(Weight(RANDOM, 24, 96, 4, 32, False), "m")
    scheme = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}

    def config(top=(), weights=(), group=()):
        return {"quant_method": "compressed-tensors", "format": "pack-quantized",
                "config_groups": {"g": {"targets": ["Linear"], "weights": {**scheme, **dict(weights)},
                                        **dict(group)}}, **dict(top)}

    def by_config(name, words, status=UNSUPPORTED, **change):
        return (f"compressed-tensors: {name}", quantized(good, config(**change)), status,
                ("config.json", *words))

    def by_tensor(name, tensor, value, words, status=FORMAT, at_fault=None, **change):
        return (f"compressed-tensors: {name}", quantized(replaced(good, tensor, value), config(**change)),
                status, (SINGLE, f"tensor '{at_fault or tensor}'", *words))
    yield by_config("unknown method", ("quant_method 'hqq'",), top={"quant_method": "hqq"})
    yield by_config("method is no string", ("quant_method",), FORMAT, top={"quant_method": 1})
    yield by_config("unknown format", ("format 'marlin-24'",), top={"format": "marlin-24"})
    yield by_config("no format", ("format ''",), top={"format": None})
    yield by_config("format of a group", ("g:", "format 'nvfp4-pack-quantized'"),
                    group={"format": "nvfp4-pack-quantized"})
    yield by_config("no groups", ("config_groups is not an object",), FORMAT, top={"config_groups": []})
    yield by_config("no weights", ("g: weights is missing",), FORMAT, group={"weights": None})
    yield by_config("floats", ("g: type 'float'",), weights={"type": "float"})
    yield by_config("five bits", ("g: num_bits 5",), weights={"num_bits": 5})
    yield by_config("4 + 2^32 bits", ("g: num_bits 4294967300",), weights={"num_bits": 4 + 2 ** 32})
    yield by_config("bits are a string", ("g: num_bits",), weights={"num_bits": "4"})
    yield by_config("symmetric is a number", ("g: symmetric",), FORMAT, weights={"symmetric": 1})
    yield by_config("blocks", ("g: strategy 'block'",), weights={"strategy": "block"})
    yield by_config("group of 8", ("g: group_size 8",), weights={"group_size": 8})
    yield by_config("group of 33", ("g: group_size 33",), weights={"group_size": 33})
    yield by_config("activations", ("g: quantized activations",), group={"input_activations": scheme})
    yield by_config("bad pattern", ("targets: pattern '('",), FORMAT, group={"targets": ["re:("]})
    yield by_config("target no string", ("targets holds what is not a string",), FORMAT,
                    group={"targets": [1]})
    yield ("compressed-tensors: ignored", quantized(good, config(top={"ignore": ["m"]})), FORMAT,
           ("'m' has packed weights", "ignores"))
    yield ("compressed-tensors: no target", quantized(good, config(group={"targets": ["re:x"]})), FORMAT,
           ("'m' has packed weights", "no target"))
    yield ("compressed-tensors: pattern without end",
           quantized({f"{'a' * 60}.{name}": value for name, value in good.items()},
                     config(group={"targets": ["re:(a+)+$"]})), FORMAT, ("(a+)+$", "steps"))
    yield ("compressed-tensors: no config", {SINGLE: formats.safetensors(good)}, FORMAT,
           (SINGLE, "m.weight_packed", "no quantization_config"))
    yield by_tensor("group does not fit K", "m.weight_scale", good["m.weight_scale"],
                    ("is [24, 3], must be [24, 1]",), weights={"group_size": 128})
    yield by_tensor("scales of another group", "m.weight_scale", good["m.weight_scale"],
                    ("is [24, 3], must be [24, 6]",), weights={"group_size": 16})
    yield by_tensor("columns of another width", "m.weight_packed", good["m.weight_packed"],
                    ("has 12 columns, 8 bits with K = 96 need 24",), weights={"num_bits": 8})
    yield by_tensor("no scale", "m.weight_scale", None, ("has no weight_scale",),
                    at_fault="m.weight_packed")
    yield by_tensor("no codes", "m.weight_packed", None, ("has no weight_packed",),
                    at_fault="m.weight_scale")
    yield by_tensor("no shape", "m.weight_shape", None, ("has no weight_shape",),
                    at_fault="m.weight_packed")
    yield by_tensor("no zero points", "m.weight_zero_point", None, ("has no weight_zero_point",),
                    at_fault="m.weight_packed")
    yield by_tensor("zero points unasked", "m.weight_zero_point", good["m.weight_zero_point"],
                    ("says symmetric",), weights={"symmetric": True})
    yield by_tensor("codes are floats", "m.weight_packed", np.ones((24, 12), np.float32),
                    ("is F32 of rank 2",))
    yield by_tensor("codes of rank 1", "m.weight_packed", np.ones(24, np.int32), ("of rank 1",))
    yield by_tensor("F32 scales", "m.weight_scale", np.ones((24, 3), np.float32), ("is F32",),
                    UNSUPPORTED)
    yield by_tensor("shape of three", "m.weight_shape", np.array([24, 96, 1]), ("not two integers",))
    yield by_tensor("negative shape", "m.weight_shape", np.array([24, -96]), ("says 24 by -96",))
    yield by_tensor("huge shape", "m.weight_shape", np.array([24, 1 << 62]), ("allowed is 1 to",))
    yield by_tensor("rows disagree", "m.weight_shape", np.array([25, 96]), ("has 24 rows",),
                    at_fault="m.weight_packed")
    yield by_tensor("activation order", "m.weight_g_idx", np.arange(96, dtype=np.int32) % 3,
                    ("activation order",), UNSUPPORTED)
    yield by_tensor("order of another length", "m.weight_g_idx", np.zeros(95, np.int32),
                    ("is not I32 of [96]",))
    yield by_tensor("bias of another length", "m.bias", np.zeros(23, np.float32), ("of [24]",))
    yield by_tensor("infinite scale", "m.weight_scale", np.full((24, 3), np.inf, np.float16),
                    ("[0, 0] is not finite",))
    three = formats.compressed_tensors(Weight(RANDOM, 24, 48, 3, 16), "m")
    yield ("compressed-tensors: three bits that could be either packing",
           quantized(three, config(weights={"num_bits": 3, "symmetric": True, "group_size": 16})),
           UNSUPPORTED, (SINGLE, "tensor 'm.weight_packed'", "cannot be told apart"))


def gptq_cases():
    good = formats.gptq(Weight(RANDOM, 64, 96, 4, 32, False), "m")
    base = {"quant_method": "gptq", "bits": 4, "group_size": 32}

    def by_config(name, words, status=UNSUPPORTED, **change):
        config = {key: value for key, value in {**base, **change}.items() if value is not ...}
        return f"gptq: {name}", quantized(good, config), status, ("config.json", *words)

    def by_tensor(name, tensor, value, words, status=FORMAT, at_fault=None, **change):
        return (f"gptq: {name}", quantized(replaced(good, tensor, value), {**base, **change}), status,
                (SINGLE, f"tensor '{at_fault or tensor}'", *words))
    yield by_config("another layout", ("'gptq_p'",), checkpoint_format="gptq_p")
    yield by_config("marlin", ("'marlin'",), format="marlin")
    yield by_config("old marlin", ("is_marlin_format",), is_marlin_format=True)
    yield by_config("words of 16 bits", ("pack_dtype 'int16'",), pack_dtype="int16")
    yield by_config("two bits", ("bits is 2",), bits=2)
    yield by_config("no bits", ("bits is missing",), FORMAT, bits=...)
    yield by_config("no group", ("group_size is missing",), FORMAT, group_size=...)
    yield by_config("group of 8", ("group_size is 8",), group_size=8)
    yield by_config("dynamic is a list", ("dynamic is not an object",), FORMAT, dynamic=[1])
    yield by_config("dynamic bits", ("dynamic: '+:m'", "bits is 5"), dynamic={"+:m": {"bits": 5}})
    yield by_config("dynamic pattern", ("dynamic: '+:('", "pattern '('"), FORMAT, dynamic={"+:(": {}})
    yield by_config("dynamic is a number", ("dynamic: '+:m' is not an object",), FORMAT,
                    dynamic={"+:m": 4})
    yield by_tensor("excluded by dynamic", "m.qweight", good["m.qweight"], ("dynamic excludes",),
                    dynamic={"-:m": {}})
    yield by_tensor("no scales", "m.scales", None, ("has no scales",), at_fault="m.qweight")
    yield by_tensor("no zero points", "m.qzeros", None, ("has no qzeros",), at_fault="m.qweight")
    yield by_tensor("no codes", "m.qweight", None, ("has no qweight",), at_fault="m.qzeros")
    yield by_tensor("codes are floats", "m.qweight", np.ones((12, 64), np.float32), ("is F32",))
    yield by_tensor("too few rows", "m.qweight", good["m.qweight"][:-1].copy(),
                    ("is [11, 64], must be [12, 64]",))
    yield by_tensor("another N", "m.qweight", good["m.qweight"][:, :-8].copy(),
                    ("is [3, 8], must be [3, 7]",), at_fault="m.qzeros")
    yield by_tensor("scales of another group", "m.scales", good["m.scales"][:-1].copy(),
                    ("is [2, 64], must be [3, 64]",))
    yield by_tensor("scales of another N", "m.scales", good["m.scales"][:, 1:].copy(),
                    ("is [3, 63], must be [3, 64]",))
    yield by_tensor("zero points of another group", "m.qzeros", good["m.qzeros"][1:].copy(),
                    ("is [2, 8], must be [3, 8]",))
    yield by_tensor("F32 scales", "m.scales", np.ones((3, 64), np.float32), ("is F32",), UNSUPPORTED)
    yield by_tensor("scales of rank 1", "m.scales", np.ones(64, np.float16), ("is of rank 1",))
    yield by_tensor("activation order", "m.g_idx", good["m.g_idx"][::-1].copy(),
                    ("activation order", "column 0 is in group 2"), UNSUPPORTED)
    yield by_tensor("activation order that is not told", "m.g_idx", None, ("activation order (desc_act)",),
                    UNSUPPORTED, at_fault="m.qweight", desc_act=True)
    yield by_tensor("group that is not there", "m.g_idx", np.full(96, 7, np.int32),
                    ("column 0 is in group 7",), UNSUPPORTED)
    yield by_tensor("g_idx of I64", "m.g_idx", good["m.g_idx"].astype(np.int64), ("is not I32 of [96]",))
    yield by_tensor("NaN scale", "m.scales", np.full((3, 64), np.nan, np.float16), ("not finite",))
    yield ("gptq: no config", {SINGLE: formats.safetensors(good)}, FORMAT,
           (SINGLE, "'m.qweight'", "no quantization_config"))
    yield ("gptq: config of its own is cut", {SINGLE: formats.safetensors(good),
                                              "quantize_config.json": b'{"bits":'}, FORMAT,
           ("quantize_config.json", "line 1"))
    yield ("gptq: config of its own has two bits", {
        SINGLE: formats.safetensors(good), "quantize_config.json": {"bits": 2, "group_size": 32}},
        UNSUPPORTED, ("quantize_config.json", "bits is 2"))


def awq_cases():
    good = formats.awq(Weight(RANDOM, 24, 96, 4, 32, False), "m")
    base = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}

    def by_config(name, words, **change):
        return (f"awq: {name}", quantized(good, {**base, **change}), UNSUPPORTED, ("config.json", *words))

    def by_tensor(name, tensor, value, words, status=FORMAT, at_fault=None, **change):
        return (f"awq: {name}", quantized(replaced(good, tensor, value), {**base, **change}), status,
                (SINGLE, f"tensor '{at_fault or tensor}'", *words))
    for version in ("gemv", "gemv_fast", "llm-awq", "exllama"):
        yield by_config(f"version {version}", (f"version '{version}'",), version=version)
    yield by_config("version is a number", ("version ''",), version=1)
    yield by_config("eight bits", ("bits is 8",), bits=8)
    yield by_config("no zero points", ("zero_point",), zero_point=False)
    yield by_config("group of 8", ("group_size is 8",), group_size=8)
    yield by_config("group is a string", ("group_size",), group_size="32")
    yield by_tensor("no scales", "m.scales", None, ("has no scales",), at_fault="m.qweight")
    yield by_tensor("no zero points", "m.qzeros", None, ("has no qzeros",), at_fault="m.qweight")
    yield by_tensor("scales of another N", "m.scales", good["m.scales"][:, :-1].copy(),
                    ("is [3, 23], must be [3, 24]",))
    yield by_tensor("zero points of another N", "m.qzeros", good["m.qzeros"][:, :-1].copy(),
                    ("is [3, 2], must be [3, 3]",))
    yield by_tensor("group does not fit K", "m.qzeros", good["m.qzeros"], ("must be [1, 3]",),
                    group_size=128)
    yield by_tensor("GPTQ's shape", "m.qweight", np.ones((12, 24), np.int32),
                    ("is [3, 3], must be [1, 24]",), at_fault="m.qzeros")
    yield by_tensor("no rows", "m.qweight", np.ones((0, 3), np.int32), ("k is 0",), UNSUPPORTED)


def gguf_cases():
    four = Weight(RANDOM, 4, 64, 4, 32)
    eight = Weight(RANDOM, 2, 64, 8, 32)
    norm = ("F32", [8], bytes(32))
    tensors = {"a.weight": ("Q4_0", [4, 64], formats.gguf_blocks(four)), "n.weight": norm,
               "b.weight": ("Q8_0", [2, 64], formats.gguf_blocks(eight))}
    good = formats.gguf({"general.architecture": "llama"}, tensors)

    def case(name, file, words, status=FORMAT):
        return f"gguf: {name}", file, status, ("x.gguf", *words)

    def changed(at, value, file=good):
        return file[:at] + value + file[at + len(value):]

    def tensor(name, words, kind, shape, data, status=FORMAT, called="a.weight"):
        return case(name, formats.gguf({}, {called: (kind, shape, data)}), (f"tensor '{called}'", *words),
                    status)
    yield case("another magic", changed(0, b"GGML"), ("does not begin with 'GGUF'",))
    yield case("version 2", formats.gguf({}, tensors, version=2), ("version 2",), UNSUPPORTED)
    yield case("big-endian", changed(4, b"\0\0\0\3"), ("big-endian",), UNSUPPORTED)
    yield case("too many tensors", changed(8, struct.pack("<Q", 1 << 40)), ("1099511627776 tensors",))
    yield case("too many keys", changed(16, struct.pack("<Q", 1 << 60)), ("metadata keys do not fit",))
    yield case("key beyond the file", changed(24, struct.pack("<Q", 1 << 63)), ("metadata key 1 of 1",))
    yield case("key is not UTF-8", changed(32, b"\xff"), ("metadata key 1",))
    yield case("type of metadata", changed(52, struct.pack("<I", 99)),
               ("metadata 'general.architecture'", "type is not known"))
    for value, words in ((3, "power of two"), (0, "power of two"), ("32", "power of two")):
        yield case(f"alignment {value!r}", formats.gguf({"general.alignment": value}, {}),
                   ("general.alignment", words))
    pair = formats.gguf({"k": 1, "l": 2}, {})
    yield case("key is there twice", pair.replace(b"l", b"k"), ("metadata 'k'", "twice"))
    yield case("split file", formats.gguf({"split.count": 2}, {}), ("split.count", "merge"), UNSUPPORTED)
    nested = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + formats.gguf_string("k") + struct.pack(
        "<IIQ", 9, 9, 1) + bytes(64)
    yield case("array of arrays", nested, ("metadata 'k'", "no scalar or string"))
    endless = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + formats.gguf_string("k") + struct.pack(
        "<IIQ", 9, 10, 1 << 61) + bytes(64)
    yield case("array whose size overflows", endless, ("metadata 'k'", "ends in its array"))
    for number, kind in ((3, "Q4_1"), (6, "Q5_0"), (12, "Q4_K"), (14, "Q6_K"), (20, "IQ4_NL"), (39, "MXFP4")):
        yield tensor(f"type {kind}", (f"type {kind}; served are Q8_0 and Q4_0",), number, [1, 256],
                     bytes(512), UNSUPPORTED)
    yield tensor("unknown type", ("type 77 is not known",), 77, [1, 32], bytes(32), UNSUPPORTED)
    yield tensor("type removed from the format", ("type 4 is not known",), 4, [1, 32], bytes(32),
                 UNSUPPORTED)
    yield tensor("half a block", ("rows of 48 are not whole blocks",), "Q4_0", [2, 48], bytes(64))
    yield tensor("no size", ("size 1 is 0",), "Q4_0", [0, 32], b"")
    yield tensor("size overflows", ("overflows",), "F32", [1 << 62, 4], b"")
    yield tensor("five axes", ("rank is 5",), "F32", [1] * 5, bytes(4))
    yield tensor("quantized vector", ("Q8_0 of rank 1",), "Q8_0", [32], bytes(34), UNSUPPORTED)
    yield tensor("quantized, no weight", ("NAME.weight alone",), "Q8_0", [1, 32], bytes(34), UNSUPPORTED,
                 "a.bias")
    yield tensor("beyond the file", ("not within the 32 bytes",), "F32", [64], bytes(32))
    at = good.index(b"n.weight") + len("n.weight") + 4 + 8 + 4
    offset = len(formats.gguf_blocks(four)) // 32 * 32 + (32 if len(formats.gguf_blocks(four)) % 32 else 0)
    yield case("offset off alignment", changed(at, struct.pack("<Q", offset + 1)),
               ("tensor 'n.weight'", "no multiple of the alignment 32"))
    yield case("gap", changed(at, struct.pack("<Q", offset + 32)), ("tensor 'n.weight'", "gap"))
    yield case("overlap", changed(at, struct.pack("<Q", 0)), ("tensor 'n.weight'", "overlap"))
    yield case("tail", good + bytes(32), ("bytes after the last tensor",))
    double = formats.gguf({}, {"a.weight": norm, "b.weight": norm}).replace(b"b.weight", b"a.weight")
    yield case("tensor is there twice", double, ("tensor 'a.weight'", "x.gguf"))
    infinite = changed(len(good) - 160, b"\x00\x7c")  # the last tensor: 136 bytes, padded to 160
    yield case("infinite scale", infinite, ("tensor 'b.weight'", "row 0, block 0 is not finite"))
    for size in (0, 3, 4, 20, 23, 24, 40, 60, 100, len(good) - 161, len(good) - 30):
        yield case(f"cut to {size} bytes", good[:size], ())


def good_ones():
    """What the format allows and a reader may stumble over: converted, status 0."""
    weight = Weight(RANDOM, 24, 96, 4, 32)
    tensors = {"z": np.zeros((), np.float16), **formats.gptq(weight, "m"),
               "empty": np.zeros((3, 0), np.float32)}
    yield "rank 0 and empty tensors, data off alignment", quantized(
        tensors, {"quant_method": "gptq", "bits": 4, "group_size": 32})
    text_first = formats.safetensors(formats.awq(weight, "m"))
    size, = struct.unpack_from("<Q", text_first)
    spaced = struct.pack("<Q", size + 3) + text_first[8:8 + size] + b"   " + text_first[8 + size:]
    yield "spaces after the header", {SINGLE: spaced, "config.json": {"quantization_config": {
        "quant_method": "awq", "bits": 4, "group_size": 32}}}


def write(work, files):
    """The input's path."""
    if isinstance(files, bytes):
        path = os.path.join(work, "x.gguf")
        with open(path, "wb") as file:
            file.write(files)
        return path
    path = os.path.join(work, "in")
    os.mkdir(path)
    for name, value in files.items():
        with open(os.path.join(path, name), "wb") as file:
            file.write(text(value))
    return path


def run(files, *command):
    with tempfile.TemporaryDirectory() as work:
        source = write(work, files)
        done = subprocess.run([PROGRAM, *command, source, os.path.join(work, "out"), "--quiet"],
                              check=False, capture_output=True, text=True)
        return done.returncode, done.stderr, sorted(os.listdir(work)) == [os.path.basename(source), "out"]


def main():
    count = 0
    for cases in (header_cases, index_cases, compressed_tensors_cases, gptq_cases, awq_cases, gguf_cases):
        for name, files, expected, words in cases():
            dense = cases in (header_cases, index_cases)
            for command in ((["convert"], []) if dense else (["convert"],)):
                status, said, made = run(files, *command)
                assert status == expected, (name, status, said)
                assert said.count("\n") == 1 and said.endswith("\n"), (name, said)
                assert said.startswith("finequant-quantize: "), (name, said)
                for word in words:
                    assert word in said, (name, word, said)
                assert not made, (name, "made an output")
                count += 1
    for name, files in good_ones():
        status, said, made = run(files, "convert")
        assert status == 0 and not said and made, (name, status, said)
    print(f"ok {count} malformed checkpoints")


if __name__ == "__main__":
    sys.exit(main())
