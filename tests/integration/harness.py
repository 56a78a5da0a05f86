# SPDX-License-Identifier: Apache-2.0
"""What the integration tests share: a daemon on a socket of its own, a client that speaks the wire
protocol, and synthetic checkpoints whose dequantized weights are known.

Nothing here sleeps: the daemon's log is read line by line, and everything else waits for a reply.
"""
import array
import atexit
import json
import mmap
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading

import msgpack
import numpy as np

PATIENCE = float(os.environ.get("FINEQUANT_TEST_PATIENCE", "120"))  # seconds until a wait fails
DAEMON = os.environ.get("FINEQUANTD") or os.path.join(
    os.environ.get("top_builddir", "."), "finequantd")
# "cpu" unless told otherwise, so that a run does the same everywhere
BACKEND = os.environ.get("FINEQUANT_TEST_BACKEND", "cpu")
SANITIZED = bool(os.environ.get("FINEQUANT_TEST_SANITIZED"))

SIZES = {"f32": 4, "f16": 2, "bf16": 2}
DTYPE = "f16" if BACKEND == "cuda" else "f32"  # the most exact one there is


class Refused(Exception):
    """An error reply, or the notification that ends a session."""

    def __init__(self, code, name, message):
        super().__init__(f"{name}: {message}")
        self.code, self.name, self.message = code, name, message


class Closed(Exception):
    """The daemon closed the connection."""


def workdir():
    """A temporary directory, short enough for a socket's path, that goes with the process."""
    path = tempfile.mkdtemp(prefix="fqd-", dir="/tmp")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


# ---- The daemon ----------------------------------------------------------------------------


class Daemon:
    last = None  # the one started last, for the report of a failure

    def __init__(self, directory, *options, models=(), wait=True, backend=BACKEND, **popen):
        self.directory = directory
        self.socket = os.path.join(directory, "d.sock")
        environment = {k: v for k, v in os.environ.items()
                       if k not in ("NOTIFY_SOCKET", "JOURNAL_STREAM", "STATE_DIRECTORY")}
        environment.setdefault("OMP_NUM_THREADS", "2")
        arguments = [DAEMON, "--socket", self.socket, "--backend", backend, *options]
        for name, path in models:
            arguments += ["--model", f"{name}={path}"]
        self.lines = []
        self.ended = False
        self.changed = threading.Condition()
        self.process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True,
                                        errors="replace", env=environment, **popen)
        Daemon.last = self
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        atexit.register(self.process.kill)
        if wait:
            self.wait_log(" listens on ")
            for name, _ in models:
                self.wait_log(f"model {name}: ")

    def _read(self):
        for line in self.process.stderr:
            with self.changed:
                self.lines.append(line.rstrip("\n"))
                self.changed.notify_all()
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    @property
    def pid(self):
        return self.process.pid

    def log(self):
        with self.changed:
            return "\n".join(self.lines)

    def wait_log(self, text, after=0):
        """Returns the index behind the first line from `after` on that holds `text`."""
        def found():
            return any(text in line for line in self.lines[after:]) or self.ended
        with self.changed:
            if not self.changed.wait_for(found, PATIENCE):
                raise AssertionError(f"the daemon did not log {text!r}:\n" + "\n".join(self.lines))
            for i in range(after, len(self.lines)):
                if text in self.lines[i]:
                    return i + 1
        raise AssertionError(f"the daemon ended without logging {text!r}:\n{self.log()}")

    def marks(self):
        with self.changed:
            return len(self.lines)

    def signal(self, number):
        self.process.send_signal(number)

    def wait(self):
        status = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        return status

    def stop(self, expected=0, told=False):
        """Ends it in good order, unless it was told to; holds it to its exit status, and fails on a
        sanitizer's report."""
        if not told:
            self.signal(signal.SIGTERM)
        status = self.wait()
        assert status == expected, f"exit status {status}, expected {expected}:\n{self.log()}"
        for word in ("AddressSanitizer", "LeakSanitizer", "runtime error"):
            assert word not in self.log(), self.log()

    def resident(self):
        """Bytes of physical memory of the process's own: file pages it maps are left out."""
        with open(f"/proc/{self.pid}/status", encoding="ascii") as status:
            fields = dict(line.split(":", 1) for line in status)
        return int(fields["RssAnon"].split()[0]) * 1024

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def connect(self, **how):
        return Client(self.socket, **how)


# ---- The client ----------------------------------------------------------------------------


class Buffer:
    def __init__(self, client, reply, fd):
        self.client, self.id, self.bytes = client, reply["buffer"], reply["bytes"]
        self.map = mmap.mmap(fd, self.bytes)
        os.close(fd)

    def array(self, dtype, count, offset=0):
        return np.frombuffer(self.map, dtype, count, offset)


class Client:
    def __init__(self, path, hello=True, name="test"):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(path)
        self.next_id = 0
        self.replies = {}
        self.notifications = []
        self.ended = None  # the notification "error"
        self.fds = []
        self.pending = b""
        self.hello = self.call("hello", version=1, client=name) if hello else None

    def close(self):
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # Sending

    def send_bytes(self, data):
        self.socket.sendall(data)

    def send_message(self, message):
        payload = msgpack.packb(message, use_bin_type=True)
        self.send_bytes(struct.pack("<I", len(payload)) + payload)

    def submit(self, method, **params):
        self.next_id += 1
        self.send_message([0, self.next_id, method, params])
        return self.next_id

    # Receiving

    def _read(self, count):
        while len(self.pending) < count:
            try:
                data, control, flags, _ = self.socket.recvmsg(
                    65536, socket.CMSG_SPACE(8 * array.array("i").itemsize))
            except ConnectionError as error:
                raise Closed() from error
            assert not flags & socket.MSG_CTRUNC
            for level, kind, payload in control:
                assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
                fds = array.array("i")
                fds.frombytes(payload)
                self.fds += fds
            if not data:
                raise Closed()
            self.pending += data
        taken, self.pending = self.pending[:count], self.pending[count:]
        return taken

    def receive(self):
        """One message, filed."""
        length, = struct.unpack("<I", self._read(4))
        message = msgpack.unpackb(self._read(length), raw=False, strict_map_key=True)
        if message[0] == 1:
            self.replies[message[1]] = (message[2], message[3])
        else:
            assert message[0] == 2, message
            self.notifications.append((message[1], message[2]))
            if message[1] == "error":
                self.ended = message[2]
        return message

    def wait(self, call):
        while call not in self.replies:
            try:
                self.receive()
            except Closed:
                if self.ended:
                    raise Refused(self.ended["code"], self.ended["name"],
                                  self.ended["message"]) from None
                raise
        error, result = self.replies.pop(call)
        if error is not None:
            assert result is None
            raise Refused(*error)
        return result

    def call(self, method, **params):
        return self.wait(self.submit(method, **params))

    def wait_end(self):
        """Reads until the daemon closes; the name of the error it gave, or None."""
        try:
            while True:
                self.receive()
        except Closed:
            return self.ended and self.ended["name"]

    # What the tests do often

    def buffer(self, size):
        reply = self.call("buffer.create", bytes=int(size), kind="host")
        assert reply["fds"] == 1
        return Buffer(self, reply, self.fds.pop(0))

    def tensor(self, model, name):
        return self.call("tensor.describe", model=model, tensor=name)["tensor"]

    def submit_gemm(self, tensor, x, y, m, dtype=DTYPE, **rest):
        """x and y: (buffer, offset) or (buffer, offset, stride)."""
        def place(spec):
            keys = ("buffer", "offset", "stride")
            return dict(zip(keys, (spec[0].id, *spec[1:])))
        return self.submit("gemm", tensor=tensor["id"], m=m, dtype=dtype, x=place(x), y=place(y),
                           **rest)

    def gemm(self, tensor, values, dtype=DTYPE, bias=None, activation=None):
        """Y for the float32 values, by a buffer that lives for this call."""
        m, k = values.shape
        size, n = SIZES[dtype], tensor["n"]
        x_bytes = -(-m * k * size // 64) * 64
        buffer = self.buffer(x_bytes + m * n * size)
        store(buffer, 0, values, dtype)
        self.wait(self.submit_gemm(tensor, (buffer, 0), (buffer, x_bytes), m, dtype, bias=bias,
                                   activation=activation))
        result = load(buffer, x_bytes, (m, n), dtype)
        self.call("buffer.destroy", buffer=buffer.id)
        return result


def to_bf16(values):
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7fff + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def store(buffer, offset, values, dtype):
    values = np.asarray(values, np.float32)
    data = {"f32": lambda: values, "f16": lambda: values.astype(np.float16),
            "bf16": lambda: to_bf16(values)}[dtype]().tobytes()
    buffer.map[offset:offset + len(data)] = data


def load(buffer, offset, shape, dtype):
    """A float32 copy of an array in a buffer."""
    count = int(np.prod(shape))
    raw = buffer.map[offset:offset + count * SIZES[dtype]]
    if dtype == "bf16":
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(
            shape)
    return np.frombuffer(raw, {"f32": np.float32, "f16": np.float16}[dtype]).astype(
        np.float32).reshape(shape)


def rounded(values, dtype):
    """The values as they arrive: rounded to the element type."""
    if dtype == "bf16":
        return (to_bf16(values).astype(np.uint32) << 16).view(np.float32)
    return values.astype({"f32": np.float32, "f16": np.float16}[dtype]).astype(np.float32)


BOUNDS = {"f32": 1e-5, "f16": 1e-3, "bf16": 5e-3}


def relative_error(result, reference):
    return float(np.linalg.norm(result - reference) / np.linalg.norm(reference))


# ---- Checkpoints ---------------------------------------------------------------------------


def pack_rows(codes, bits):
    """[R, C] codes → [R, ceil(C·bits/32)] words, lowest bits first, one dense stream a row."""
    rows, columns = codes.shape
    words = -(-columns * bits // 32)
    stream = np.zeros((rows, words * 32), np.uint8)
    stream[:, :columns * bits] = (codes[:, :, None] >> np.arange(bits) & 1).reshape(rows, -1)
    return np.packbits(stream, axis=1, bitorder="little").view("<i4")


def write_safetensors(path, tensors):
    names = {np.dtype("<f4"): "F32", np.dtype("<f2"): "F16", np.dtype("<i4"): "I32",
             np.dtype("<i8"): "I64"}
    header, offset = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.tobytes())


class Matrix:
    """A quantized matrix of random codes: `weights` is its float64 value, `bias` may be None."""

    def __init__(self, random, n, k, bits=4, group=64, symmetric=True, bias=False):
        self.n, self.k, self.bits, self.group, self.symmetric = n, k, bits, group, symmetric
        width = group or k
        groups = -(-k // width)
        self.codes = random.integers(0, 1 << bits, (n, k))
        self.scales = (random.uniform(0.5, 2, (n, groups)) / (1 << bits)).astype(np.float16)
        self.zeros = (np.full((n, groups), 1 << bits - 1) if symmetric
                      else random.integers(0, 1 << bits, (n, groups)))
        self.bias = random.standard_normal(n).astype(np.float32) if bias else None
        column = np.arange(k) // width
        self.weights = (self.codes - self.zeros[:, column]) * self.scales.astype(
            np.float64)[:, column]

    def tensors(self, name):
        result = {
            f"{name}.weight_packed": pack_rows(self.codes, self.bits),
            f"{name}.weight_scale": self.scales,
            f"{name}.weight_shape": np.array([self.n, self.k], np.int64),
        }
        if not self.symmetric:  # packed along N
            result[f"{name}.weight_zero_point"] = np.ascontiguousarray(
                pack_rows(np.ascontiguousarray(self.zeros.T), self.bits).T)
        if self.bias is not None:
            result[f"{name}.bias"] = self.bias
        return result

    def scheme(self, name):
        return {"targets": [name],
                "weights": {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric,
                            "strategy": "group" if self.group else "channel",
                            **({"group_size": self.group} if self.group else {})}}

    def reference(self, x, bias=None, activation="none"):
        y = x.astype(np.float64) @ self.weights.T + (0 if bias is None else bias)
        return {"none": lambda v: v, "relu": lambda v: np.maximum(v, 0),
                "silu": lambda v: v / (1 + np.exp(-v)),
                "gelu_tanh": lambda v: 0.5 * v * (1 + np.tanh(
                    np.sqrt(2 / np.pi) * (v + 0.044715 * v ** 3)))}[activation](y)


def write_checkpoint(directory, matrices):
    """matrices: {name: Matrix}."""
    os.makedirs(directory)
    tensors = {}
    for name, matrix in matrices.items():
        tensors.update(matrix.tensors(name))
    write_safetensors(os.path.join(directory, "model.safetensors"), tensors)
    groups = {f"group_{i}": matrix.scheme(name) for i, (name, matrix) in enumerate(matrices.items())}
    with open(os.path.join(directory, "config.json"), "w", encoding="ascii") as file:
        json.dump({"architectures": ["Synthetic"], "quantization_config": {
            "quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": groups, "ignore": []}}, file)
    return directory


def write_dense_checkpoint(directory, weights):
    """weights: {name: float32 [n, k]}."""
    os.makedirs(directory)
    write_safetensors(os.path.join(directory, "model.safetensors"),
                      {f"{name}.weight": value for name, value in weights.items()})
    with open(os.path.join(directory, "config.json"), "w", encoding="ascii") as file:
        json.dump({"architectures": ["Synthetic"]}, file)
    return directory


def small_model(directory, n=96, k=128, **kind):
    """A checkpoint of one matrix, "layer": (path, Matrix)."""
    matrix = Matrix(np.random.default_rng(7), n, k, **kind)
    return write_checkpoint(os.path.join(directory, "small"), {"layer": matrix}), matrix


# ---- Running -------------------------------------------------------------------------------


def expect(name, function, /, *arguments, says=None, **named):
    """The call is refused with the error `name`, whose message holds `says`."""
    try:
        function(*arguments, **named)
    except Refused as refused:
        assert refused.name == name, f"expected {name}, got {refused}"
        assert says is None or says in refused.message, f"{says!r} is not in {refused.message!r}"
        return refused
    raise AssertionError(f"expected {name}, and it was done")


def main(tests):
    """Runs the functions, each with a directory of its own."""
    for test in tests:
        try:
            test(workdir())
        except BaseException:
            print(f"not ok {test.__name__}; the last daemon's log:", file=sys.stderr)
            if Daemon.last:
                Daemon.last.process.kill()
                Daemon.last.reader.join(PATIENCE)
                print(Daemon.last.log(), file=sys.stderr)
            raise
        print(f"ok {test.__name__}", flush=True)
    sys.exit(0)
