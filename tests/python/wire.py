# SPDX-License-Identifier: Apache-2.0
"""A client of finequantd written from proto/PROTOCOL.md alone, without libfinequant.

    wire.py SOCKET MODEL TENSOR CHECKPOINT-DIRECTORY

Says hello, pings, describes the tensor, has two buffers made, asks for a product in fp16, and
checks it against the tensor as dequantized here from the checkpoint's safetensors.  Exits with 0,
1 where anything is not as the page says, 77 where numpy or msgpack is missing.
"""

import array
import json
import mmap
import os
import pathlib
import socket
import struct
import sys

try:
    import msgpack
    import numpy as np
except ImportError as missing:
    print(f"SKIP: {missing}")
    sys.exit(77)

REQUEST, REPLY, NOTIFICATION = 0, 1, 2
ROWS = 5


class Failure(Exception):
    pass


class Wire:
    """Section 1: frames, messages and descriptors."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(60)
        self.socket.connect(path)
        self.bytes = b""
        self.fds = []
        self.next_id = 1

    def receive(self, size):
        while len(self.bytes) < size:
            space = socket.CMSG_SPACE(8 * array.array("i").itemsize)
            data, controls, flags, _ = self.socket.recvmsg(65536, space, socket.MSG_CMSG_CLOEXEC)
            for level, kind, value in controls:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds = array.array("i")
                    fds.frombytes(value[:len(value) // fds.itemsize * fds.itemsize])
                    self.fds.extend(fds)
            if flags & socket.MSG_CTRUNC:
                raise Failure("descriptors were cut off")
            if not data:
                raise Failure("the daemon closed the connection")
            self.bytes += data
        taken, self.bytes = self.bytes[:size], self.bytes[size:]
        return taken

    def message(self):
        (length,) = struct.unpack("<I", self.receive(4))
        return msgpack.unpackb(self.receive(length), raw=False)

    def send(self, value):
        payload = msgpack.packb(value, use_bin_type=True)
        self.socket.sendall(struct.pack("<I", len(payload)) + payload)

    def call(self, method, **params):
        """The error triple, or None, and the result."""
        sent = self.next_id
        self.next_id += 1
        self.send([REQUEST, sent, method, params])
        while True:
            kind, *rest = self.message()
            if kind == NOTIFICATION and rest[0] == "error":
                raise Failure(f"the daemon ended the session: {rest[1]}")
            if kind == REPLY:
                answered, error, result = rest
                check(answered == sent, f"reply to {answered} came for {sent}")
                return error, result

    def ask(self, method, **params):
        error, result = self.call(method, **params)
        check(error is None, f"{method}: {error}")
        return result


def check(condition, message):
    if not condition:
        raise Failure(message)


def expect_error(wire, name, code, method, **params):
    error, result = wire.call(method, **params)
    check(error is not None and error[:2] == [code, name] and result is None,
          f"{method} {params} was answered {error} {result}, not {name}")


# ---- The checkpoint: compressed-tensors, pack-quantized -----------------------------------------

TYPES = {"F32": np.float32, "F16": np.float16, "I32": np.int32, "I64": np.int64, "BF16": np.uint16}


def read_tensors(directory, prefix):
    found = {}
    for path in sorted(pathlib.Path(directory).glob("*.safetensors")):
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            for name, entry in json.loads(file.read(size)).items():
                if name == "__metadata__" or not name.startswith(prefix + "."):
                    continue
                begin, end = entry["data_offsets"]
                file.seek(8 + size + begin)
                values = np.frombuffer(file.read(end - begin), TYPES[entry["dtype"]])
                if entry["dtype"] == "BF16":
                    values = (values.astype(np.uint32) << 16).view(np.float32)
                found[name[len(prefix) + 1:]] = values.reshape(entry["shape"])
    return found


def unpack_stream(words, bits, count):
    """[rows, words] int32 to [rows, count] codes: a dense stream a row, lowest bits first."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    fields = stream[:, :count * bits].reshape(len(words), count, bits)
    return (fields << np.arange(bits, dtype=np.uint8)).sum(axis=2, dtype=np.int64)


def dequantize(directory, name, n, k, bits, group):
    parts = read_tensors(directory, name)
    check("weight_packed" in parts, f"{name}.weight_packed is not in {directory}")
    groups = -(-k // group)
    codes = unpack_stream(parts["weight_packed"], bits, k)
    scales = parts["weight_scale"].reshape(n, groups).astype(np.float64)
    zeros = np.full((n, groups), 1 << (bits - 1))
    if "weight_zero_point" in parts:
        zeros = unpack_stream(parts["weight_zero_point"].T, bits, n).T
    at = np.arange(k) // group
    return (codes - zeros[:, at]) * scales[:, at], parts.get("bias")


# ---- The session --------------------------------------------------------------------------------

def map_buffer(wire, size):
    made = wire.ask("buffer.create", bytes=size, kind="host")
    check(made["bytes"] == size and made["fds"] == 1 and len(wire.fds) == 1,
          f"buffer.create answered {made} with {len(wire.fds)} descriptors")
    fd = wire.fds.pop()
    check(os.fstat(fd).st_size >= size, "the memfd is smaller than the buffer")
    memory = mmap.mmap(fd, size)
    os.close(fd)
    check(not any(memory[:]), "a new buffer is not zero-filled")
    return made["buffer"], memory


def main(path, model, tensor, directory):
    wire = Wire(path)
    hello = wire.ask("hello", version=1, client="wire.py")
    check(hello["version"] == 1, f"the daemon speaks {hello['version']}")
    for key in ("frame", "inflight", "inflight_bytes", "buffers", "buffer_bytes", "rows"):
        check(isinstance(hello["limits"][key], int), f"limits.{key} is missing")
    check(wire.ask("ping") == {}, "ping has a result")
    shape = wire.ask("tensor.describe", model=model, tensor=tensor)["tensor"]
    n, k = shape["n"], shape["k"]

    expect_error(wire, "method", 6, "no.such.method")
    expect_error(wire, "invalid", 3, "ping", surplus=1)
    expect_error(wire, "not-found", 8, "tensor.describe", model=model, tensor=tensor + "?")
    expect_error(wire, "invalid", 3, "buffer.create", bytes=0, kind="host")

    generator = np.random.default_rng(7)
    x = generator.standard_normal((ROWS, k)).astype(np.float16)
    x_id, x_memory = map_buffer(wire, ROWS * k * 2)
    y_id, y_memory = map_buffer(wire, ROWS * (n + 3) * 2)
    x_memory[:] = x.tobytes()
    y_memory[:] = b"\xff" * len(y_memory)
    asked = dict(tensor=shape["id"], m=ROWS, dtype="f16", x={"buffer": x_id, "offset": 0},
                 y={"buffer": y_id, "offset": 0, "stride": n + 3})
    expect_error(wire, "invalid", 3, "gemm", **{**asked, "m": ROWS + 1000000})
    expect_error(wire, "not-found", 8, "gemm", **{**asked, "tensor": 1 << 40})
    check(wire.ask("gemm", **asked, bias=shape["bias"], activation="relu") == {},
          "gemm has a result")

    y = np.frombuffer(y_memory, np.uint16).reshape(ROWS, n + 3)
    check((y[:, n:] == 0xffff).all(), "what lies between the rows of Y was written")
    y = y[:, :n].view(np.float16).astype(np.float64)
    weights, bias = dequantize(directory, tensor, n, k, shape["bits"], shape["group"])
    check((bias is not None) == shape["bias"], "tensor.describe and the checkpoint differ on bias")
    product = x.astype(np.float64) @ weights.T
    if bias is not None:
        product = product + bias.astype(np.float64)
    wanted = np.maximum(product, 0)
    error = np.linalg.norm(y - wanted) / np.linalg.norm(wanted)
    check(error <= 1e-3, f"relative error {error:.2e} is above 1e-3")

    if {"gate", "residual"} <= set(hello["capabilities"]):  # gated by itself, and added to itself
        gate = {"tensor": shape["id"], "bias": shape["bias"]}
        wire.ask("gemm", **asked, bias=shape["bias"], activation="relu", gate=gate,
                 residual=asked["y"])
        gated = np.frombuffer(y_memory, np.float16).reshape(ROWS, n + 3)[:, :n].astype(np.float64)
        wanted = np.maximum(product, 0) * product + y
        off = np.linalg.norm(gated - wanted) / np.linalg.norm(wanted)
        check(off <= 1e-3, f"relative error {off:.2e} with gate and residual is above 1e-3")

    for buffer in (x_id, y_id):
        check(wire.ask("buffer.destroy", buffer=buffer) == {}, "buffer.destroy has a result")
    expect_error(wire, "not-found", 8, "buffer.destroy", buffer=x_id)
    print(f"{model} {tensor} [{n}, {k}] {shape['bits']} bits: relative error {error:.1e}")


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except (Failure, OSError) as failure:
        print(f"FAIL: {failure}")
        sys.exit(1)
