# SPDX-License-Identifier: Apache-2.0
"""Malformed frames from a seeded mutator: the daemon stays up, its memory flat, and another client
is served all the while.  FINEQUANT_FUZZ_MB says how much (a full run has 1024), FINEQUANT_FUZZ_SEED
which."""
import os
import random
import socket
import struct

import msgpack
import numpy as np
from harness import BOUNDS, DTYPE, Daemon, main, relative_error, small_model

AMOUNT = int(float(os.environ.get("FINEQUANT_FUZZ_MB", "8")) * 1e6)
SEED = int(os.environ.get("FINEQUANT_FUZZ_SEED", "1"))
SLACK = 8 << 20  # bytes the resident size may move


class Mutator:
    """Streams that begin as valid sessions and go wrong somewhere."""

    def __init__(self, seed, path):
        self.random = random.Random(seed)
        self.path = path

    def value(self, depth=0):
        pick = self.random
        kind = pick.randrange(9 if depth < 3 else 7)
        if kind < 7:
            return (None, True, pick.choice([0, 1, 63, 64, 65537, 2**32, 2**64 - 1]),
                    -pick.getrandbits(40), pick.random(), "x" * pick.choice([0, 1, 255, 300]),
                    pick.randbytes(pick.randrange(20)))[kind]
        if kind == 7:
            return [self.value(depth + 1) for _ in range(pick.randrange(4))]
        return {str(i): self.value(depth + 1) for i in range(pick.randrange(4))}

    def message(self):
        pick = self.random
        place = {"buffer": pick.choice([1, 2, 3]), "offset": pick.choice([0, 2, 1024, 65534])}
        method, params = pick.choice([
            ("ping", {}), ("stats", {}), ("model.list", {}), ("client.list", {}),
            ("tensor.list", {"model": "m"}),
            ("tensor.describe", {"model": "m", "tensor": "layer"}),
            ("buffer.create", {"bytes": pick.choice([1, 65536]), "kind": "host"}),
            ("buffer.destroy", {"buffer": pick.choice([1, 2])}),
            ("model.load", {"name": "m", "path": self.path}),
            ("model.load", {"name": "x", "path": "/nonexistent", "bits": 4}),
            ("model.unload", {"name": "x"}),
            ("gemm", {"tensor": pick.choice([1 << 32, 0]), "m": pick.choice([1, 3, 65536]),
                      "dtype": "f16", "x": place, "y": {**place, "offset": 32768},
                      "bias": pick.choice([None, True, {**place, "dtype": "f32"}])}),
        ])
        params = dict(params)
        if params and pick.random() < 0.3:
            params[pick.choice(list(params))] = self.value()
        if pick.random() < 0.1:
            params[pick.choice(["more", "fds", ""])] = self.value()
        return [0, pick.choice([pick.getrandbits(32), 7]), method, params]

    def frame(self):
        pick = self.random
        payload = bytearray(msgpack.packb(self.message(), use_bin_type=True))
        kind = pick.random()
        if kind < 0.25:  # bytes changed
            for _ in range(pick.randrange(1, 4)):
                payload[pick.randrange(len(payload))] = pick.getrandbits(8)
        elif kind < 0.35:  # cut
            del payload[pick.randrange(len(payload)):]
        elif kind < 0.45:  # a declared count that the bytes do not hold
            at = pick.randrange(len(payload))
            payload[at:at + 1] = pick.choice([b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"]) + \
                struct.pack(">I", pick.choice([2**32 - 1, 2**31, 1 << 20]))
        elif kind < 0.5:  # noise, up to the largest frame
            payload = bytearray(pick.randbytes(pick.choice([1, 100, 1000, 6000] * 10 + [60000, 1 << 20])))
        elif kind < 0.53:
            payload = bytearray(b"\x91" * pick.choice([15, 17, 5000]) + b"\xc0")
        length = len(payload)
        if pick.random() < 0.03:
            length = pick.choice([0, length + 1, 1 << 20, (1 << 20) + 1, 2**32 - 1])
        return struct.pack("<I", length) + bytes(payload)

    def session(self):
        """All the bytes of one session; most say hello properly."""
        hello = b""
        if self.random.random() < 0.95:
            payload = msgpack.packb([0, 0, "hello", {"version": 1, "client": "mutator"}])
            hello = struct.pack("<I", len(payload)) + payload
        return hello + b"".join(self.frame() for _ in range(self.random.randrange(1, 40)))


def play(path, data):
    """Sends it all, or as much as the daemon takes; reads what comes."""
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.connect(path)
    peer.setblocking(False)
    sent = 0
    try:
        while sent < len(data):
            try:
                sent += peer.send(data[sent:sent + 262144])
            except BlockingIOError:
                pass
            try:
                if not peer.recv(1 << 20):
                    break
            except BlockingIOError:
                pass
    except ConnectionError:
        pass
    peer.close()
    return sent


def malformed_frames_leave_the_daemon_up_and_its_memory_flat(directory):
    path, matrix = small_model(directory)
    daemon = Daemon(directory, "--max-buffer-bytes=16M")
    witness = daemon.connect()
    witness.call("model.load", name="m", path=path)
    tensor = witness.tensor("m", "layer")
    x = np.random.default_rng(9).standard_normal((2, matrix.k)).astype(np.float32)
    reference = matrix.reference(x)
    mutator = Mutator(SEED, path)
    total = sessions = 0
    settled = None
    while total < AMOUNT:
        total += play(daemon.socket, mutator.session())
        sessions += 1
        if sessions % 16 == 0:
            assert relative_error(witness.gemm(tensor, x), reference) <= BOUNDS[DTYPE]
        if settled is None and total > AMOUNT / 4:
            settled = daemon.resident()
    for _ in range(100000):
        stats = witness.call("stats")
        if stats["sessions"] == 1:
            break
    after = daemon.resident()
    print(f"seed {SEED}: {total} bytes in {sessions} sessions, {stats['errors']} errors; resident "
          f"{settled} after a quarter, {after} at the end")
    assert stats["sessions"] == 1 and stats["buffer_bytes"] == 0 and stats["errors"] > sessions / 4
    assert relative_error(witness.gemm(tensor, x), reference) <= BOUNDS[DTYPE]
    if not os.environ.get("FINEQUANT_TEST_SANITIZED"):
        assert after - settled < SLACK
    witness.close()
    daemon.stop()


if __name__ == "__main__":
    main([malformed_frames_leave_the_daemon_up_and_its_memory_flat])
