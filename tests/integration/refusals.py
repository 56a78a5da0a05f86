# SPDX-License-Identifier: Apache-2.0
"""Every named error: a table of requests, what they are refused with, and that the session goes on;
and what ends a session."""
import os
import struct

import msgpack
import numpy as np
from harness import (BACKEND, Client, Closed, Daemon, Matrix, expect, main, small_model,
                     write_checkpoint)

U64 = 2 ** 64 - 1


def requests_are_refused_by_name_and_the_session_goes_on(directory):
    path, _ = small_model(directory, n=96, k=128, symmetric=True)
    broken = os.path.join(directory, "broken")
    os.makedirs(broken)
    for name, text in (("config.json", b"{}"), ("model.safetensors", b"\xff" * 64)):
        with open(os.path.join(broken, name), "wb") as file:
            file.write(text)
    random = np.random.default_rng(3)
    others = write_checkpoint(os.path.join(directory, "others"), {
        "layer": Matrix(random, 96, 128), "gate": Matrix(random, 96, 128, group=32),
        "wide": Matrix(random, 97, 128), "deep": Matrix(random, 96, 160),
        "eight": Matrix(random, 96, 128, bits=8)})
    daemon = Daemon(directory, models=[("m", path), ("others", others)])
    client = daemon.connect()
    tensor = client.tensor("m", "layer")
    own, gate, wide, deep, eight = (client.tensor("others", name)["id"]
                                    for name in ("layer", "gate", "wide", "deep", "eight"))
    buffer = client.buffer(4096)
    f32, f16 = ({"buffer": buffer.id, "offset": 0, "dtype": dtype} for dtype in ("f32", "f16"))
    x, y = {"buffer": buffer.id, "offset": 0}, {"buffer": buffer.id, "offset": 2048}

    def gemm(**change):
        params = {"tensor": tensor["id"], "m": 1, "dtype": "f16", "x": x, "y": y, **change}
        return "gemm", {key: value for key, value in params.items() if value is not Ellipsis}

    table = [
        ("method", "no.such", {}, "no.such"),
        ("invalid", "ping", {"extra": 1}, "extra"),
        ("invalid", "hello", {"version": 1, "client": "again"}, "before"),
        ("invalid", "tensor.list", {}, "model"),
        ("invalid", "tensor.list", {"model": 3}, "model"),
        ("invalid", "tensor.list", {"model": ""}, "model"),
        ("not-found", "tensor.list", {"model": "none"}, "none"),
        ("not-found", "tensor.describe", {"model": "m", "tensor": "none"}, "none"),
        ("exists", "model.load", {"name": "m", "path": path}, "m"),
        ("invalid", "model.load", {"name": "a b", "path": path}, "a b"),
        ("invalid", "model.load", {"name": "n" * 128, "path": path}, "127"),
        ("invalid", "model.load", {"name": "n", "path": "relative"}, "relative"),
        ("invalid", "model.load", {"name": "n", "path": path, "bits": 5}, "5"),
        ("invalid", "model.load", {"name": "n", "path": path, "group": 24}, "24"),
        ("invalid", "model.load", {"name": "n", "path": path, "bits": U64}, "bits"),
        ("not-found", "model.load", {"name": "n", "path": directory + "/none"}, "none"),
        ("format", "model.load", {"name": "n", "path": broken}, "model.safetensors"),
        ("not-found", "model.unload", {"name": "none"}, "none"),
        ("invalid", "buffer.create", {"bytes": 0, "kind": "host"}, "0"),
        ("invalid", "buffer.create", {"bytes": 1, "kind": "disk"}, "disk"),
        ("quota", "buffer.create", {"bytes": U64, "kind": "host"}, "allowed"),
        ("not-found", "buffer.destroy", {"buffer": 99}, "99"),
        ("not-found", *gemm(tensor=7), "7"),
        ("not-found", *gemm(tensor=U64), str(U64)),
        ("not-found", *gemm(x={"buffer": 99, "offset": 0}), "99"),
        ("invalid", *gemm(tensor=...), "tensor"),
        ("invalid", *gemm(tensor=-1), "tensor"),
        ("invalid", *gemm(m=0), "m is 0"),
        ("invalid", *gemm(m=65537), "65537"),
        ("invalid", *gemm(m=U64), "m is"),
        ("invalid", *gemm(dtype="f64"), "f64"),
        ("invalid", *gemm(activation="tanh"), "tanh"),
        ("invalid", *gemm(x=3), "x"),
        ("invalid", *gemm(x={**x, "more": 1}), "more"),
        ("invalid", *gemm(x={**x, "offset": 1}), "offset"),
        ("invalid", *gemm(x={**x, "offset": 4096}), "4096"),
        ("invalid", *gemm(x={**x, "offset": U64 - 1}), "beyond"),
        ("invalid", *gemm(x={**x, "stride": 127}), "127"),
        ("invalid", *gemm(x={**x, "stride": U64}, m=2), "beyond"),
        ("invalid", *gemm(y={**y, "offset": 4096 - 190}), "y"),
        ("invalid", *gemm(y={**y, "offset": 128}), "overlaps x"),
        ("invalid", *gemm(m=11), "beyond"),
        ("invalid", *gemm(bias=True), "bias"),
        ("invalid", *gemm(bias=1), "bias"),
        ("invalid", *gemm(bias={"buffer": buffer.id, "offset": 0, "dtype": "i8"}), "i8"),
        ("invalid", *gemm(bias={"buffer": buffer.id, "offset": 4000, "dtype": "f32"}), "beyond"),
        ("invalid", *gemm(bias={"buffer": buffer.id, "offset": 2000, "dtype": "f16"}),
         "overlaps the bias"),
        ("invalid", *gemm(gate=own), "gate"),
        ("invalid", *gemm(gate={}), "gate"),
        ("invalid", *gemm(gate={"tensor": own, "more": 1}), "more"),
        ("not-found", *gemm(gate={"tensor": 7}), "gate"),
        ("invalid", *gemm(gate={"tensor": gate}), "of model others, allowed is m"),
        ("invalid", *gemm(tensor=own, gate={"tensor": wide}), "97 by 128"),
        ("invalid", *gemm(tensor=own, gate={"tensor": deep}), "96 by 160"),
        ("invalid", *gemm(tensor=own, gate={"tensor": eight}), "with 8 bits"),
        ("invalid", *gemm(tensor=own, gate={"tensor": gate, "bias": True}), "gate.bias is true"),
        ("invalid", *gemm(tensor=own, gate={"tensor": gate, "bias": 1}), "gate.bias"),
        ("invalid", *gemm(tensor=own, gate={"tensor": gate, "bias": {**f16, "offset": 4000}}),
         "gate.bias"),
        ("invalid", *gemm(tensor=own, gate={"tensor": gate, "bias": {**f16, "offset": 2000}}),
         "overlaps the gate's bias"),
        ("invalid", *gemm(tensor=own, bias=f16, gate={"tensor": gate, "bias": f32}),
         "gate.bias is f32, allowed is f16"),
        ("invalid", *gemm(residual=3), "residual"),
        ("not-found", *gemm(residual={"buffer": 99, "offset": 0}), "residual"),
        ("invalid", *gemm(residual={**x, "offset": 4000}), "residual"),
        ("invalid", *gemm(residual={**x, "stride": 95}), "residual"),
        ("invalid", *gemm(residual={**y, "offset": 2050}), "overlaps the residual"),
        ("invalid", *gemm(residual={**y, "stride": 97}, m=2), "overlaps the residual"),
    ]
    if BACKEND == "cuda":
        table.append(("unsupported", *gemm(dtype="f32"), "f32"))
    else:
        table.append(("unsupported", "buffer.create", {"bytes": 1, "kind": "device"}, "device"))
    for name, method, params, says in table:
        expect(name, client.call, method, says=says, **params)
    assert client.call("stats")["errors"] == len(table)
    client.wait(client.submit("gemm", **gemm(bias=None, activation=None)[1]))
    client.close()
    daemon.stop()


def frame(payload):
    return struct.pack("<I", len(payload)) + payload


def pack(*message):
    return frame(msgpack.packb(list(message)))


def broken_frames_end_their_session_and_no_other(directory):
    daemon = Daemon(directory)
    witness = daemon.connect()
    hello = pack(0, 1, "hello", {"version": 1, "client": "t"})
    deep = b"\x91" * 40 + b"\xc0"
    cases = {
        "length 0": struct.pack("<I", 0),
        "length above the limit": struct.pack("<I", (1 << 20) + 1),
        "no msgpack": frame(b"\xc1"),
        "no array": frame(b"\x01"),
        "an empty array": frame(b"\x90"),
        "an unknown kind": pack(7, 1, "ping", {}),
        "a reply": pack(1, 1, None, {}),
        "a notification": pack(2, "ping", {}),
        "an id that is no number": pack(0, "1", "ping", {}),
        "an id beyond 32 bits": pack(0, 1 << 32, "ping", {}),
        "params that are no map": pack(0, 2, "ping", []),
        "more after it": frame(msgpack.packb([0, 2, "ping", {}]) + b"\xc0"),
        "a cut array": frame(b"\x94\x00"),
        "a huge array": frame(b"\xdd\xff\xff\xff\xff"),
        "a huge map": frame(b"\x94\x00\x01\xa4ping\xdf\xff\xff\xff\xff"),
        "a huge string": frame(b"\x94\x00\x01\xdb\xff\xff\xff\xff"),
        "deep nesting": frame(b"\x94\x00\x01\xa4ping" + deep),
    }
    for label, data in cases.items():
        client = Client(daemon.socket, hello=False)
        client.send_bytes(hello + data)
        assert client.wait_end() == "protocol", label
        assert client.replies[1][0] is None, label
        client.close()
        witness.call("ping")
    witness.close()
    daemon.stop()


def sessions_open_with_hello(directory):
    daemon = Daemon(directory)
    for data, name in ((pack(0, 1, "ping", {}), "protocol"),
                       (struct.pack("<I", 4097), "protocol"),
                       (pack(0, 1, "hello", {"version": 1, "client": ""}), None),
                       (pack(0, 1, "hello", {"version": 2, "client": "t"}), None)):
        client = Client(daemon.socket, hello=False)
        client.send_bytes(data)
        assert client.wait_end() == name, data
        if name is None:
            error, result = client.replies[1]
            assert result is None and error[1] == ("version" if b"\x02" in data else "invalid")
        client.close()
    client = Client(daemon.socket, hello=False)  # byte by byte is fine
    for byte in pack(0, 1, "hello", {"version": 1, "client": "slow"}):
        client.send_bytes(bytes([byte]))
    assert client.wait(1)["version"] == 1
    client.close()
    daemon.stop()


def descriptors_are_refused(directory):
    import socket as sockets
    daemon = Daemon(directory)
    before = daemon.descriptors()
    client = daemon.connect()
    with open(os.devnull, "rb") as null:
        sockets.send_fds(client.socket, [pack(0, 2, "ping", {})], [null.fileno()] * 3)
    assert client.wait_end() == "protocol"
    client.close()
    with daemon.connect() as other:  # the first is closed before the second is answered
        other.call("ping")
        assert daemon.descriptors() <= before + 1
    daemon.stop()


def a_peer_that_is_killed_in_a_frame_disturbs_nobody(directory):
    daemon = Daemon(directory)
    witness = daemon.connect()
    for cut in (1, 3, 4, 9):
        client = daemon.connect()
        client.send_bytes(pack(0, 2, "stats", {})[:cut])
        client.close()
    witness.call("ping")
    try:
        witness.send_bytes(pack(0, np.uint32(9).item(), "ping", {}))
        witness.wait(9)
    except Closed:
        raise AssertionError("the witness was closed") from None
    witness.close()
    daemon.stop()


if __name__ == "__main__":
    main([requests_are_refused_by_name_and_the_session_goes_on,
          broken_frames_end_their_session_and_no_other, sessions_open_with_hello,
          descriptors_are_refused, a_peer_that_is_killed_in_a_frame_disturbs_nobody])
