# SPDX-License-Identifier: Apache-2.0
"""What the daemon is for: every kind of matrix, bias, activation and place gives the right Y."""
import os

import numpy as np
from harness import (BACKEND, BOUNDS, SIZES, Daemon, Matrix, load, main, relative_error, rounded,
                     store, write_checkpoint, write_dense_checkpoint)

RANDOM = np.random.default_rng(1)
DTYPES = ["f16", "bf16"] + ([] if BACKEND == "cuda" else ["f32"])


def gemm_is_right_for_every_kind_of_matrix(directory):
    matrices = {}
    for bits in (8, 4, 3):
        for group in (16, 32, 64, 128, 0):
            for symmetric in (True, False):
                name = f"b{bits}.g{group}.{'s' if symmetric else 'z'}"
                # neither N nor K is a multiple of what kernels like
                matrices[name] = Matrix(RANDOM, 67, 336, bits, group, symmetric, bias=symmetric)
    path = write_checkpoint(os.path.join(directory, "all"), matrices)
    daemon = Daemon(directory, models=[("all", path)])
    with daemon.connect() as client:
        tensors = client.call("tensor.list", model="all")["tensors"]
        assert [t["name"] for t in tensors] == sorted(matrices)
        for tensor in tensors:
            matrix = matrices[tensor["name"]]
            assert (tensor["n"], tensor["k"], tensor["bits"]) == (67, 336, matrix.bits)
            assert tensor["group"] == (matrix.group or 336)
            assert tensor["symmetric"] == matrix.symmetric and tensor["scale"] == "f16"
            assert tensor["bias"] == (matrix.bias is not None) and tensor["bytes"] > 0
            for dtype in DTYPES:
                for m in (1, 5, 70):
                    x = rounded(RANDOM.standard_normal((m, 336)).astype(np.float32), dtype)
                    bias = matrix.bias is not None and m != 5
                    y = client.gemm(tensor, x, dtype, bias=bias)
                    error = relative_error(y, matrix.reference(x, matrix.bias if bias else None))
                    assert error <= BOUNDS[dtype], (tensor["name"], dtype, m, error)
    daemon.stop()


def activations_and_a_bias_of_the_clients_own(directory):
    matrix = Matrix(RANDOM, 48, 64)
    path = write_checkpoint(os.path.join(directory, "m"), {"layer": matrix})
    daemon = Daemon(directory, models=[("m", path)])
    with daemon.connect() as client:
        tensor = client.tensor("m", "layer")
        buffer = client.buffer(1 << 16)
        x = rounded(RANDOM.standard_normal((3, 64)).astype(np.float32), "f16")
        bias = rounded(RANDOM.standard_normal(48).astype(np.float32), "bf16")
        store(buffer, 0, x, "f16")
        store(buffer, 4096, bias, "bf16")
        for activation in ("none", "relu", "silu", "gelu_tanh"):
            client.wait(client.submit_gemm(
                tensor, (buffer, 0), (buffer, 8192), 3, "f16", activation=activation,
                bias={"buffer": buffer.id, "offset": 4096, "dtype": "bf16"}))
            y = load(buffer, 8192, (3, 48), "f16")
            assert relative_error(y, matrix.reference(x, bias, activation)) <= BOUNDS["f16"]
    daemon.stop()


def rows_may_be_apart_and_nothing_else_is_written(directory):
    matrix = Matrix(RANDOM, 40, 64)
    path = write_checkpoint(os.path.join(directory, "m"), {"layer": matrix})
    daemon = Daemon(directory, models=[("m", path)])
    with daemon.connect() as client:
        tensor = client.tensor("m", "layer")
        for m in (3, 80):
            stride = 64 + 40 + 9  # X's row, then Y's, then what must stay
            buffer = client.buffer(m * stride * 2)
            x = rounded(RANDOM.standard_normal((m, 64)).astype(np.float32), "f16")
            whole = np.full((m, stride), 77, np.float32)
            whole[:, :64] = x
            store(buffer, 0, whole, "f16")
            client.wait(client.submit_gemm(tensor, (buffer, 0, stride), (buffer, 128, stride), m,
                                           "f16"))
            after = load(buffer, 0, (m, stride), "f16")
            assert np.array_equal(after[:, :64], x) and np.all(after[:, 104:] == 77)
            assert relative_error(after[:, 64:104], matrix.reference(x)) <= BOUNDS["f16"]
    daemon.stop()


def rows_do_not_depend_on_their_company(directory):
    matrix = Matrix(RANDOM, 256, 512)
    path = write_checkpoint(os.path.join(directory, "m"), {"layer": matrix})
    daemon = Daemon(directory, models=[("m", path)])
    clients = [daemon.connect() for _ in range(4)]
    count, size = 60, SIZES["bf16"]
    x = rounded(RANDOM.standard_normal((count, 512)).astype(np.float32), "bf16")
    alone = np.concatenate([clients[0].gemm(clients[0].tensor("m", "layer"), x[i:i + 1], "bf16")
                            for i in range(count)])
    work = []
    for client in clients:
        buffer = client.buffer(count * (512 + 256) * size)
        store(buffer, 0, x, "bf16")
        work.append((client, buffer, client.tensor("m", "layer")))
    calls = []
    for i in range(count):  # interleaved, so that launches mix the sessions
        for client, buffer, tensor in work:
            calls.append((client, client.submit_gemm(
                tensor, (buffer, i * 512 * size), (buffer, (count * 512 + i * 256) * size), 1,
                "bf16")))
    for client, call in calls:
        client.wait(call)
    for _, buffer, _ in work:
        assert np.array_equal(load(buffer, count * 512 * size, (count, 256), "bf16"), alone)
    stats = clients[0].call("stats")
    assert stats["requests"] == 5 * count and stats["rows"] == 5 * count, stats
    assert stats["launches"] <= stats["requests"]
    latency = stats["latency_us"]
    assert latency["count"] == stats["requests"]
    assert latency["min"] <= latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"]
    assert stats["errors"] == 0 and stats["queued"] == 0 and stats["models"] == 1
    model, = clients[0].call("model.list")["models"]
    assert model["requests"] == 5 * count and model["state"] == "ready" and model["queued"] == 0
    assert model["dense_bytes"] == 256 * 512 * 2 and 0 < model["bytes"] < model["dense_bytes"]
    assert stats["weight_bytes"] == model["bytes"]
    for client in clients:
        client.close()
    daemon.stop()


def dense_checkpoints_are_quantized_while_loading(directory):
    weights = RANDOM.standard_normal((64, 256)).astype(np.float32)
    path = write_dense_checkpoint(os.path.join(directory, "d"), {"layer": weights})
    daemon = Daemon(directory)
    with daemon.connect() as client:
        for bits, group, bound in ((8, 0, 0.02), (4, 32, 0.15), (None, None, 0.15)):
            reply = client.call("model.load", name="d", path=path, bits=bits, group=group)
            assert reply["model"]["state"] == "ready" and reply["model"]["matrices"] == 1
            tensor = client.tensor("d", "layer")
            assert tensor["bits"] == (bits or 4) and tensor["group"] == (256 if bits == 8
                                                                        else group or 64)
            x = rounded(RANDOM.standard_normal((4, 256)).astype(np.float32), "f16")
            y = client.gemm(tensor, x, "f16")
            assert relative_error(y, x.astype(np.float64) @ weights.T) < bound
            assert client.call("model.unload", name="d")["bytes"] > 0
        assert ("model.progress", {"name": "d", "done": 1, "total": 1}) in client.notifications
    daemon.stop()


if __name__ == "__main__":
    main([gemm_is_right_for_every_kind_of_matrix, activations_and_a_bias_of_the_clients_own,
          rows_may_be_apart_and_nothing_else_is_written, rows_do_not_depend_on_their_company,
          dense_checkpoints_are_quantized_while_loading])
