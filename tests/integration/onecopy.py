# SPDX-License-Identifier: Apache-2.0
"""The daemon holds one copy: its memory does not grow with the clients that use a model."""
import os

import numpy as np
from harness import BACKEND, BOUNDS, DTYPE, Daemon, Matrix, main, relative_error, write_checkpoint

SLACK = 4 << 20  # sessions, stacks and the allocator's own


def memory_is_the_same_for_one_four_and_sixteen_clients(directory):
    random = np.random.default_rng(2)
    matrices = {f"layer{i}": Matrix(random, 1024, 2048, bits=8) for i in range(8)}
    path = write_checkpoint(os.path.join(directory, "m"), matrices)
    daemon = Daemon(directory, models=[("m", path)])
    x = random.standard_normal((2, 2048)).astype(np.float32)
    references = {name: matrix.reference(x) for name, matrix in matrices.items()}
    seen, clients = {}, []
    for count in (1, 4, 16):
        while len(clients) < count:
            clients.append(daemon.connect())
        for client in clients:
            for tensor in client.call("tensor.list", model="m")["tensors"]:
                assert relative_error(client.gemm(tensor, x), references[tensor["name"]]) <= BOUNDS[DTYPE]
        stats = clients[0].call("stats")
        assert stats["sessions"] == count
        seen[count] = (stats["weight_bytes"], daemon.resident())
        print(f"{count} clients: {seen[count][0]} bytes of weights, {seen[count][1]} resident")
    weights = 8 * 1024 * 2048
    assert all(weights <= held < 1.2 * weights for held, _ in seen.values()), seen
    assert seen[1][0] == seen[4][0] == seen[16][0]
    if not os.environ.get("FINEQUANT_TEST_SANITIZED"):  # whose freed memory stays for a while
        assert seen[16][1] - seen[1][1] < SLACK, seen
    assert clients[0].call("model.unload", name="m")["bytes"] == seen[1][0]
    if BACKEND != "cuda" and not os.environ.get("FINEQUANT_TEST_SANITIZED"):
        assert seen[16][1] - daemon.resident() > weights * 0.9, "unloading gives the memory back"
    for client in clients:
        client.close()
    daemon.stop()


if __name__ == "__main__":
    main([memory_is_the_same_for_one_four_and_sixteen_clients])
