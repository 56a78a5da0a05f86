# SPDX-License-Identifier: Apache-2.0
"""libfinequant against the daemon, through the Python binding: products with everything that a
request can have, by gemm and by submit.  The binding's structures are held to the header by it."""
import os
import sys

import numpy as np
from harness import BACKEND, BOUNDS, SANITIZED, Daemon, Matrix, main, relative_error, write_checkpoint

if SANITIZED:
    print("SKIP: a library with AddressSanitizer cannot be loaded into Python")
    sys.exit(77)
os.environ.setdefault("FINEQUANT_LIBRARY", os.path.join(
    os.environ.get("top_builddir", "."), ".libs", "libfinequant.so"))
sys.path.insert(0, os.environ.get("FINEQUANT_PYTHON") or os.path.join(
    os.environ.get("top_srcdir", "."), "client", "python"))
import finequant  # noqa: E402

RANDOM = np.random.default_rng(5)
N, K, M = 72, 192, 5


def expected(up, gate, x, how):
    bias = up.bias if how.get("bias") is True else how.get("own_bias")
    gate_bias = gate.bias if how.get("gate_bias") is True else how.get("own_gate")
    activation = how.get("activation", "none")
    if "gate" in how:
        return gate.reference(x, gate_bias, activation) * up.reference(x, bias)
    return up.reference(x, bias, activation)


def products_with_all_that_a_request_can_have(directory):
    up, gate = (Matrix(RANDOM, N, K, bias=True) for _ in range(2))
    path = write_checkpoint(os.path.join(directory, "m"), {"up": up, "gate": gate})
    daemon = Daemon(directory, models=[("m", path)])
    with finequant.Client(socket=daemon.socket, name="library") as client:
        info = client.info
        assert info["gate"] and info["residual"] and info["backend"] == BACKEND, info
        tensor, other = client.tensor("m", "up"), client.tensor("m", "gate")
        x, y, rest = client.buffer(M * K * 2), client.buffer(M * N * 2), client.buffer(1 << 16)
        values = RANDOM.standard_normal((M, K)).astype(np.float16)
        residual = RANDOM.standard_normal((M, N + 3)).astype(np.float16)
        own = RANDOM.standard_normal((2, N)).astype(np.float32)
        x.array(np.float16, (M, K))[:] = values
        rest.array(np.float16, (M, N + 3), 4096)[:] = residual
        rest.array(np.float32, (2, N))[:] = own
        biases = [(rest, 0, "f32"), (rest, N * 4, "f32")]
        apart = {"residual": rest, "residual_offset": 4096, "residual_stride": N + 3}
        cases = [
            {},
            {"bias": True, "activation": "relu"},
            {"bias": biases[0], "own_bias": own[0]},
            {"gate": other, "activation": "silu"},
            {"gate": other, "activation": "silu", "gate_bias": True},
            {"gate": other, "activation": "silu", "bias": biases[0], "own_bias": own[0],
             "gate_bias": biases[1], "own_gate": own[1], **apart},
            {"bias": True, "gate": other, "gate_bias": True, "activation": "gelu_tanh",
             "residual": y},
            {"residual": y},
            apart,
        ]
        for how in cases:
            wanted = expected(up, gate, values.astype(np.float64), how)
            if "residual" in how:
                wanted = wanted + residual[:, :N]
            asked = {key: value for key, value in how.items() if not key.startswith("own_")}
            for run in (client.gemm, lambda *a, **b: client.wait(client.submit(*a, **b))):
                y.array(np.float16, (M, N))[:] = residual[:, :N]
                run(tensor, x, y, M, **asked)
                error = relative_error(y.array(np.float16, (M, N)).astype(np.float64), wanted)
                assert error <= BOUNDS["f16"], (how, error)
    daemon.stop()


def wrong_requests_raise_by_name(directory):
    up, gate = Matrix(RANDOM, N, K), Matrix(RANDOM, N, K, bits=8)
    path = write_checkpoint(os.path.join(directory, "m"), {"up": up, "gate": gate})
    daemon = Daemon(directory, models=[("m", path)])
    with finequant.Client(socket=daemon.socket, name="library") as client:
        tensor, other = client.tensor("m", "up"), client.tensor("m", "gate")
        x, y = client.buffer(K * 2), client.buffer(N * 2)
        for how, name, says in (({"gate": other}, "invalid", "with 8 bits"),
                                ({"gate_bias": True}, "invalid", "without a gate"),
                                ({"bias": True}, "invalid", "has none"),
                                ({"residual": y, "residual_offset": 2}, "invalid", "residual")):
            try:
                client.gemm(tensor, x, y, 1, **how)
            except finequant.Error as error:
                assert error.name == name and says in str(error), (how, error)
                continue
            raise AssertionError(f"{how} was done")
    daemon.stop()


if __name__ == "__main__":
    main([products_with_all_that_a_request_can_have, wrong_requests_raise_by_name])
