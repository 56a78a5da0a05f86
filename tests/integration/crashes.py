# SPDX-License-Identifier: Apache-2.0
"""Clients killed at any moment: their buffers are freed and the others are served all the while."""
import os
import signal
import subprocess
import sys

import numpy as np
from harness import BOUNDS, DTYPE, Client, Daemon, Matrix, main, relative_error, write_checkpoint

ROUNDS = int(os.environ.get("FINEQUANT_CRASHES", "15"))
BUFFERS = 3


def victim(socket, moment):
    """Holds buffers and has requests in flight, says so at its moment, and goes on until it dies."""
    client = Client(socket, name="victim")
    tensor = client.tensor("m", "layer")
    buffers = [client.buffer(1 << 22) for _ in range(BUFFERS)]
    said = False
    count = 0
    while True:
        calls = []
        for buffer in buffers:
            for m in (1, 60, 500):
                calls.append(client.submit_gemm(tensor, (buffer, 0), (buffer, 1 << 21), m, "f16"))
                count += 1
                if not said and count > moment:
                    print("now", flush=True)
                    said = True
        client.send_bytes(b"\x40\x00")  # half a frame: the next message would be its rest
        client.send_bytes(b"\x00\x00" + b"\x94\x00\xce\x7f\xff\xff\xff\xa4ping\x81\xa1x\xd9\x2f" +
                          b"x" * 0x2f)
        for call in calls:
            client.wait(call)
        client.replies.clear()


def killed_clients_leave_nothing_behind(directory):
    matrix = Matrix(np.random.default_rng(11), 320, 1024)
    path = write_checkpoint(os.path.join(directory, "m"), {"layer": matrix})
    daemon = Daemon(directory, models=[("m", path)])
    witness = daemon.connect(name="witness")
    tensor = witness.tensor("m", "layer")
    x = np.random.default_rng(12).standard_normal((4, 1024)).astype(np.float32)
    reference = matrix.reference(x)
    before = daemon.descriptors()
    for i in range(ROUNDS):
        children = [subprocess.Popen([sys.executable, __file__, "victim", daemon.socket,
                                      str(3 * i + j)], stdout=subprocess.PIPE) for j in range(2)]
        for child in children:
            assert child.stdout.readline() == b"now\n"
        assert relative_error(witness.gemm(tensor, x), reference) <= BOUNDS[DTYPE]
        for child in children:
            child.send_signal(signal.SIGKILL)
        for child in children:
            child.wait()
            child.stdout.close()
        assert relative_error(witness.gemm(tensor, x), reference) <= BOUNDS[DTYPE]
    # the daemon hears of a death as of any message: it is a matter of some answers, not of time
    for _ in range(100000):
        stats = witness.call("stats")
        if stats["sessions"] == 1 and stats["buffer_bytes"] == 0 and stats["queued"] == 0:
            break
    assert stats["sessions"] == 1 and stats["buffer_bytes"] == 0 and stats["queued"] == 0, stats
    assert stats["sessions_total"] == 1 + 2 * ROUNDS
    assert [c["name"] for c in witness.call("client.list")["clients"]] == ["witness"]
    assert daemon.descriptors() == before, (daemon.descriptors(), before)
    assert relative_error(witness.gemm(tensor, x), reference) <= BOUNDS[DTYPE]
    witness.close()
    daemon.stop()


if __name__ == "__main__":
    if sys.argv[1:2] == ["victim"]:
        victim(sys.argv[2], int(sys.argv[3]))
    main([killed_clients_leave_nothing_behind])
