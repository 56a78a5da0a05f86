#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Two processes give the daemon activations in CUDA memory, opened through CUDA IPC by libfinequant.

Each fills its device buffer by the driver API, asks for a gemm, and copies Y back: it must be within the
bound of float64 and equal, bit for bit, to what host buffers give.  Ending one client with SIGKILL while
it holds device buffers leaves the other served and gives the memory back.
"""
import ctypes
import os
import signal
import subprocess
import sys
import tempfile

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.environ.get("FINEQUANT_HARNESS", os.path.join(HERE, "..", "integration")))
sys.path.insert(0, os.environ.get("FINEQUANT_PYTHON", os.path.join(HERE, "..", "..", "client", "python")))

N, K, ROWS = 384, 1024, (1, 7, 64, 200)


def cuda_check(result, what):
    if result != 0:
        raise SystemExit(f"{what}: CUDA error {result}")


def enter_primary_context(cuda, uuid):
    """The context libfinequant opened the buffers in: the primary one of the daemon's GPU."""
    count, device, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    cuda_check(cuda.cuInit(0), "cuInit")
    cuda_check(cuda.cuDeviceGetCount(ctypes.byref(count)), "cuDeviceGetCount")
    for i in range(count.value):
        raw = (ctypes.c_ubyte * 16)()
        cuda_check(cuda.cuDeviceGet(ctypes.byref(device), i), "cuDeviceGet")
        cuda_check(cuda.cuDeviceGetUuid_v2(raw, device), "cuDeviceGetUuid")
        if bytes(raw).hex() == uuid.removeprefix("GPU-").replace("-", ""):
            cuda_check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "retain")
            cuda_check(cuda.cuCtxSetCurrent(context), "cuCtxSetCurrent")
            return
    raise SystemExit(f"the daemon's GPU {uuid} is not visible")


def client(socket, seed, linger):
    import finequant

    cuda = ctypes.CDLL("libcuda.so.1")
    random = np.random.default_rng(seed)
    with finequant.Client(socket=socket, name=f"device-{seed}") as connection:
        stats = connection.stats()
        enter_primary_context(cuda, stats["device"]["uuid"])
        tensor = connection.tensor("m", "layer")
        outputs = {}
        for m in ROWS:
            x = random.standard_normal((m, K)).astype(np.float16)
            results = []
            for kind in ("device", "host"):
                x_buffer = connection.buffer(x.nbytes, kind=kind)
                y_buffer = connection.buffer(m * N * 2, kind=kind)
                y = np.full((m, N), np.nan, np.float16)
                if kind == "device":
                    cuda_check(cuda.cuMemcpyHtoD_v2(ctypes.c_uint64(x_buffer.device), x.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(x.nbytes)), "copy in")
                    cuda_check(cuda.cuMemcpyHtoD_v2(ctypes.c_uint64(y_buffer.device), y.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(y.nbytes)), "poison")
                    cuda_check(cuda.cuCtxSynchronize(), "synchronize")
                else:
                    x_buffer.array(np.float16, x.shape)[:] = x
                    y_buffer.array(np.float16, y.shape)[:] = y
                connection.gemm(tensor, x_buffer, y_buffer, m=m, dtype="f16", activation="silu")
                if kind == "device":
                    cuda_check(cuda.cuMemcpyDtoH_v2(y.ctypes.data_as(ctypes.c_void_p), ctypes.c_uint64(y_buffer.device), ctypes.c_size_t(y.nbytes)), "copy out")
                else:
                    y = y_buffer.array(np.float16, y.shape).copy()
                results.append(y)
            if not np.array_equal(results[0].view(np.uint16), results[1].view(np.uint16)):
                raise SystemExit(f"m={m}: device and host buffers give different bits")
            outputs[f"x{m}"], outputs[f"y{m}"] = x, results[0]
        held = connection.buffer(64 << 20, kind="device")
        np.savez(os.path.join(os.path.dirname(socket), f"result-{seed}.npz"), **outputs)
        print("ready", held.nbytes, flush=True)
        if linger:
            sys.stdin.readline()


def main():
    from harness import Daemon, Matrix, relative_error, write_checkpoint

    with tempfile.TemporaryDirectory(prefix="fqg-") as directory:
        matrix = Matrix(np.random.default_rng(7), N, K)
        path = write_checkpoint(os.path.join(directory, "m"), {"layer": matrix})
        daemon = Daemon(directory, models=[("m", path)], backend="cuda")
        with daemon.connect() as observer:
            before = observer.call("stats")
            clients = [subprocess.Popen([sys.executable, __file__, "client", daemon.socket, str(seed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                       for seed in (1, 2)]
            for process in clients:
                line = process.stdout.readline()
                assert line.startswith("ready"), f"a client ended early: {line!r}"
            during = observer.call("stats")
            assert during["weight_bytes"] == before["weight_bytes"], "the weights were copied"
            assert during["buffer_bytes"] >= 2 * (64 << 20), during["buffer_bytes"]
            clients[0].send_signal(signal.SIGKILL)
            clients[0].wait()
            clients[1].stdin.write("go on\n")
            clients[1].stdin.flush()
            assert clients[1].wait(60) == 0, "the second client failed"
            for seed in (1, 2):
                saved = np.load(os.path.join(directory, f"result-{seed}.npz"))
                for m in ROWS:
                    x = saved[f"x{m}"].astype(np.float32)
                    error = relative_error(saved[f"y{m}"].astype(np.float64), matrix.reference(x, None, "silu"))
                    print(f"client {seed}, m={m}: error {error:.2e}, same bits as host buffers")
                    assert error <= 1e-3, error
            # both sessions have ended: the loop sees that before it answers what comes later
            for _ in range(1000):
                after = observer.call("stats")
                if after["sessions"] == 1:
                    break
            assert after["sessions"] == 1 and after["buffer_bytes"] == 0, after
            print(f"weights {before['weight_bytes']} bytes with 0, 1 and 2 clients; buffers freed after SIGKILL")
        daemon.stop()


if __name__ == "__main__":
    if sys.argv[1:2] == ["client"]:
        client(sys.argv[2], int(sys.argv[3]), linger=True)
    else:
        main()
