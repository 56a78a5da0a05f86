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


def gated(matrix, gate, x, bias=None, gate_bias=None, activation="silu", residual=0):
    """float64 of activation(X·Vᵀ + gate_bias) ⊙ (X·Wᵀ + bias) + residual."""
    return gate.reference(x, gate_bias, activation) * matrix.reference(x, bias) + residual


def gates_and_residuals_of_every_kind(directory):
    matrices = {"up": Matrix(RANDOM, 67, 336, 4, 64, bias=True),
                "gate": Matrix(RANDOM, 67, 336, 4, 16, symmetric=False, bias=True),
                "up8": Matrix(RANDOM, 67, 336, 8, 32), "gate8": Matrix(RANDOM, 67, 336, 8, 0),
                "up3": Matrix(RANDOM, 67, 336, 3, 32), "gate3": Matrix(RANDOM, 67, 336, 3, 128)}
    path = write_checkpoint(os.path.join(directory, "m"), matrices)
    daemon = Daemon(directory, models=[("m", path)])
    with daemon.connect() as client:
        assert {"gate", "residual"} <= set(client.hello["capabilities"])
        for bits in ("", "8", "3"):
            up, gate = matrices["up" + bits], matrices["gate" + bits]
            tensor, other = client.tensor("m", "up" + bits), client.tensor("m", "gate" + bits)
            for m in (1, 5, 70):
                for dtype in DTYPES:
                    check_gates(client, dtype, m, (tensor, up), (other, gate))
    daemon.stop()


def check_gates(client, dtype, m, own, other):
    """A gate, a residual, and both, for one pair of (tensor, matrix)."""
    (tensor, up), (gate_tensor, gate) = own, other
    n, k = up.n, up.k
    x_at, y_at, residual_at = 0, 1 << 18, 1 << 19  # each has more room than 70 rows of 336 floats
    buffer = client.buffer(1 << 20)
    x = rounded(RANDOM.standard_normal((m, k)).astype(np.float32), dtype)
    residual = rounded(RANDOM.standard_normal((m, n)).astype(np.float32), dtype)
    store(buffer, x_at, x, dtype)
    with_bias = up.bias is not None
    bias, gate_bias = (up.bias, gate.bias) if with_bias else (None, None)
    for gates in (False, True):
        for place in (None, residual_at, y_at):  # y_at: in place
            if place:
                store(buffer, place, residual, dtype)
            rest = {}
            if gates:
                rest["gate"] = {"tensor": gate_tensor["id"], "bias": with_bias}
            if place:
                rest["residual"] = {"buffer": buffer.id, "offset": place}
            client.wait(client.submit_gemm(tensor, (buffer, x_at), (buffer, y_at), m, dtype,
                                           bias=with_bias, activation="silu", **rest))
            expected = (gated(up, gate, x, bias, gate_bias) if gates
                        else up.reference(x, bias, "silu")) + (residual if place else 0)
            error = relative_error(load(buffer, y_at, (m, n), dtype), expected)
            assert error <= BOUNDS[dtype], (gates, place, dtype, m, up.bits, error)
    client.call("buffer.destroy", buffer=buffer.id)


def gate_biases_of_the_clients_own(directory):
    up, gate = Matrix(RANDOM, 40, 64), Matrix(RANDOM, 40, 64)
    path = write_checkpoint(os.path.join(directory, "m"), {"up": up, "gate": gate})
    daemon = Daemon(directory, models=[("m", path)])
    with daemon.connect() as client:
        buffer = client.buffer(1 << 16)
        x = rounded(RANDOM.standard_normal((3, 64)).astype(np.float32), "f16")
        bias = rounded(RANDOM.standard_normal((2, 40)).astype(np.float32), "bf16")
        store(buffer, 0, x, "f16")
        store(buffer, 4096, bias, "bf16")
        at = [{"buffer": buffer.id, "offset": 4096 + 80 * i, "dtype": "bf16"} for i in (0, 1)]
        for own in (None, at[0]):
            for gates_own in (None, at[1]):
                client.wait(client.submit_gemm(
                    client.tensor("m", "up"), (buffer, 0), (buffer, 8192), 3, "f16",
                    activation="relu", bias=own,
                    gate={"tensor": client.tensor("m", "gate")["id"], "bias": gates_own}))
                expected = gated(up, gate, x, bias[0] if own else None,
                                 bias[1] if gates_own else None, "relu")
                error = relative_error(load(buffer, 8192, (3, 40), "f16"), expected)
                assert error <= BOUNDS["f16"], (own, gates_own, error)
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


def gated_rows_do_not_depend_on_their_company(directory):
    up, gate, third = (Matrix(RANDOM, 96, 256) for _ in range(3))
    path = write_checkpoint(os.path.join(directory, "m"), {"up": up, "gate": gate, "third": third})
    daemon = Daemon(directory, models=[("m", path)])
    clients = [daemon.connect() for _ in range(3)]
    gates = {name: {"tensor": clients[0].tensor("m", name)["id"]} for name in ("gate", "third")}
    kinds = [{}, {"gate": gates["gate"]}, {"gate": gates["third"]}]  # all over the same tensor
    kinds += [{**kind, "residual": True} for kind in kinds]
    count, x_row, y_row = 12, 256 * 2, 96 * 2
    x = rounded(RANDOM.standard_normal((count, 256)).astype(np.float32), "f16")
    residual = rounded(RANDOM.standard_normal((count, 96)).astype(np.float32), "f16")
    residual_at, y_at = count * x_row, count * (x_row + y_row)

    def submit(client, buffer, kind, i):
        rest = dict(kinds[kind])
        if "residual" in rest:
            rest["residual"] = {"buffer": buffer.id, "offset": residual_at + i * y_row}
        return client.submit_gemm(client.tensors["up"], (buffer, i * x_row),
                                  (buffer, y_at + (kind * count + i) * y_row), 1, "f16",
                                  activation="silu", **rest)

    buffers = []
    for client in clients:
        client.tensors = {"up": client.tensor("m", "up")}
        buffers.append(client.buffer(y_at + len(kinds) * count * y_row))
        store(buffers[-1], 0, x, "f16")
        store(buffers[-1], residual_at, residual, "f16")
    for kind in range(len(kinds)):
        for i in range(count):
            clients[0].wait(submit(clients[0], buffers[0], kind, i))
    alone = load(buffers[0], y_at, (len(kinds), count, 96), "f16")
    calls = [(client, submit(client, buffer, kind, i)) for i in range(count)
             for kind in range(len(kinds)) for client, buffer in zip(clients[1:], buffers[1:])]
    for client, call in calls:
        client.wait(call)
    for buffer in buffers[1:]:
        assert np.array_equal(load(buffer, y_at, alone.shape, "f16"), alone)
    for kind, rest in enumerate(kinds):
        matrix = {gates["gate"]["tensor"]: gate, gates["third"]["tensor"]: third}.get(
            rest.get("gate", {}).get("tensor"))
        expected = (gated(up, matrix, x) if matrix else up.reference(x, None, "silu")) + (
            residual if "residual" in rest else 0)
        assert relative_error(alone[kind], expected) <= BOUNDS["f16"], kind
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
          gates_and_residuals_of_every_kind, gate_biases_of_the_clients_own,
          gated_rows_do_not_depend_on_their_company, rows_may_be_apart_and_nothing_else_is_written,
          rows_do_not_depend_on_their_company, dense_checkpoints_are_quantized_while_loading])
