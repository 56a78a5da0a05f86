# SPDX-License-Identifier: Apache-2.0
"""Run quantized matrix products in finequantd, from Python, through libfinequant.

Needs nothing beyond the standard library; with numpy, Buffer.array gives views of shared memory.

    import finequant, numpy

    with finequant.Client(name="demo") as client:
        w = client.tensor("minilm", "encoder.layer.0.attention.self.query")
        x, y = client.buffer(w.k * 2), client.buffer(w.n * 2)
        x.array(numpy.float16, (1, w.k))[:] = 1
        client.gemm(w, x, y, m=1)
        print(y.array(numpy.float16, (1, w.n)))

The library is $FINEQUANT_LIBRARY, or libfinequant.so.0 where the loader finds it.  A call that
fails raises Error.  A Client may be used from many threads: libfinequant's waits release the GIL.
"""

import ctypes
import json
import os
from ctypes import (POINTER, Structure, byref, c_bool, c_char, c_char_p, c_int, c_int64, c_size_t,
                    c_uint32, c_uint64, c_void_p)

__all__ = ["Client", "Model", "Tensor", "Buffer", "Error"]

DTYPES = {"f32": 1, "f16": 2, "bf16": 3}
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
BUFFER_KINDS = {"host": 0, "device": 1}
BIAS_NONE, BIAS_CHECKPOINT, BIAS_BUFFER = 0, 1, 2


class _Error(Structure):
    _fields_ = [("status", c_int), ("message", c_char * 480)]


class _Options(Structure):
    _fields_ = [("socket", c_char_p), ("name", c_char_p), ("timeout_ms", c_int),
                ("reconnect", c_bool)]


class _Info(Structure):
    _fields_ = [("server", c_char * 64), ("backend", c_char * 16), ("device", c_char * 128),
                ("uuid", c_char * 48), ("kernels", c_char * 32), ("threads", c_uint32),
                ("memory_total", c_uint64), ("max_frame", c_uint64), ("max_inflight", c_uint64),
                ("max_inflight_bytes", c_uint64), ("max_buffers", c_uint64),
                ("max_buffer_bytes", c_uint64), ("max_rows", c_uint64), ("f32", c_bool),
                ("device_buffers", c_bool), ("admin", c_bool), ("gate", c_bool),
                ("residual", c_bool)]


_PROGRESS = ctypes.CFUNCTYPE(None, c_void_p, c_uint64, c_uint64)


class _Load(Structure):
    _fields_ = [("name", c_char_p), ("path", c_char_p), ("bits", c_uint32), ("group", c_int64),
                ("progress", _PROGRESS), ("data", c_void_p)]


class _Model(Structure):
    _fields_ = [("name", c_char * 128), ("path", c_char * 4096), ("state", c_char * 16)] + [
        (name, c_uint64) for name in ("done", "total", "matrices", "bytes", "dense_bytes",
                                      "requests", "rows", "queued", "loaded_at")]


class _Tensor(Structure):
    _fields_ = [("id", c_uint64), ("generation", c_uint64), ("name", c_char * 256),
                ("n", c_uint64), ("k", c_uint64), ("bits", c_uint32), ("group", c_uint64),
                ("scale", c_int), ("symmetric", c_bool), ("bias", c_bool), ("bytes", c_uint64)]


class _Place(Structure):
    _fields_ = [("buffer", c_void_p), ("offset", c_uint64), ("stride", c_uint64)]


class _Gemm(Structure):
    _fields_ = [("tensor", POINTER(_Tensor)), ("m", c_uint64), ("dtype", c_int), ("x", _Place),
                ("y", _Place), ("bias", c_int), ("bias_at", _Place), ("bias_dtype", c_int),
                ("activation", c_int), ("gate", POINTER(_Tensor)), ("gate_bias", c_int),
                ("gate_bias_at", _Place), ("residual", _Place)]


def _load_library():
    path = os.environ.get("FINEQUANT_LIBRARY")
    library = ctypes.CDLL(path or "libfinequant.so.0")
    error = POINTER(_Error)
    prototypes = {
        "fq_client_new": (c_int, POINTER(_Options), POINTER(c_void_p), error),
        "fq_client_free": (None, c_void_p),
        "fq_client_info": (None, c_void_p, POINTER(_Info)),
        "fq_client_generation": (c_uint64, c_void_p),
        "fq_client_fd": (c_int, c_void_p),
        "fq_client_ping": (c_int, c_void_p, error),
        "fq_client_shutdown": (c_int, c_void_p, error),
        "fq_client_model_load": (c_int, c_void_p, POINTER(_Load), POINTER(_Model), error),
        "fq_client_model_unload": (c_int, c_void_p, c_char_p, POINTER(c_uint64), error),
        "fq_client_model_list": (c_int, c_void_p, POINTER(POINTER(_Model)), POINTER(c_size_t),
                                 error),
        "fq_client_tensor_find": (c_int, c_void_p, c_char_p, c_char_p, POINTER(_Tensor), error),
        "fq_client_tensor_list": (c_int, c_void_p, c_char_p, POINTER(POINTER(_Tensor)),
                                  POINTER(c_size_t), error),
        "fq_buffer_new": (c_int, c_void_p, c_int, c_uint64, POINTER(c_void_p), error),
        "fq_buffer_free": (None, c_void_p),
        "fq_buffer_bytes": (c_uint64, c_void_p),
        "fq_buffer_host": (c_void_p, c_void_p),
        "fq_buffer_device": (c_uint64, c_void_p),
        "fq_client_gemm": (c_int, c_void_p, POINTER(_Gemm), error),
        "fq_client_submit": (c_int, c_void_p, POINTER(_Gemm), POINTER(c_uint64), error),
        "fq_client_wait": (c_int, c_void_p, c_uint64, error),
        "fq_client_poll": (c_int, c_void_p, c_uint64, error),
        "fq_client_call_json": (c_int, c_void_p, c_char_p, c_char_p, POINTER(c_void_p), error),
        "fq_status_name": (c_char_p, c_int),
    }
    for name, (result, *arguments) in prototypes.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


_library = _load_library()
_libc = ctypes.CDLL(None)
_libc.free.argtypes = [c_void_p]
_libc.free.restype = None


class Error(Exception):
    """A call failed.  `name` is the status ("not-found"), `status` its positive number."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = -status
        self.name = _library.fq_status_name(status).decode()


def _call(name, *arguments):
    """Calls a function whose last parameter is a struct fq_error; returns its result."""
    error = _Error()
    result = getattr(_library, name)(*arguments, byref(error))
    if result < 0:
        raise Error(result, error.message.decode(errors="replace"))
    return result


def _fields(structure):
    """A ctypes structure as a dict, strings decoded."""
    values = ((name, getattr(structure, name)) for name, *_ in structure._fields_)
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values}


class Tensor:
    """One matrix of a model: name, n, k, bits, group, scale, symmetric, bias, bytes."""

    def __init__(self, raw):
        self._raw = raw
        for name, value in _fields(raw).items():
            setattr(self, name, value)
        self.scale = next(name for name, number in DTYPES.items() if number == raw.scale)

    def __repr__(self):
        return f"<Tensor {self.name} [{self.n}, {self.k}] {self.bits} bits>"


class Model:
    """A loaded model by name: a shorthand for the client's calls about it."""

    def __init__(self, client, name):
        self.client, self.name = client, name

    def tensor(self, name):
        return self.client.tensor(self.name, name)

    def tensors(self):
        return self.client.tensors(self.name)

    def unload(self):
        return self.client.unload(self.name)


class Buffer:
    """Memory that the daemon made for this client.  Freed by free(), `with`, or with the
    client; memory() and array() are not to be used afterwards."""

    def __init__(self, client, size, kind="host"):
        self._handle = None
        self._client = client
        handle = c_void_p()
        _call("fq_buffer_new", client._open(), BUFFER_KINDS[kind], size, byref(handle))
        self._handle = handle.value
        client._buffers.append(self)

    def _open(self):
        if self._handle is None:
            raise ValueError("the buffer was freed")
        return self._handle

    @property
    def nbytes(self):
        return _library.fq_buffer_bytes(self._open())

    @property
    def device(self):
        """The CUdeviceptr of a device buffer, 0 for a host buffer."""
        return _library.fq_buffer_device(self._open())

    def memory(self):
        """A writable memoryview of a host buffer."""
        host = _library.fq_buffer_host(self._open())
        if not host:
            raise ValueError("a device buffer cannot be read here")
        raw = (c_char * self.nbytes).from_address(host)
        return memoryview(raw).cast("B")

    def array(self, dtype, shape, offset=0):
        """A numpy array over a host buffer, from `offset` bytes on."""
        import numpy

        return numpy.ndarray(shape, dtype, self.memory(), offset)

    def free(self):
        if self._handle is not None:
            _library.fq_buffer_free(self._handle)
            self._handle = None
            if self in self._client._buffers:
                self._client._buffers.remove(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.free()


class Client:
    """A connection to finequantd.

    socket: its path; None for $FINEQUANT_SOCKET or the default.  name: shown by `finequantctl
    clients`.  timeout_ms: the longest wait for a reply, 0 for ever.  reconnect: after the
    connection ended, the next call makes a new one; buffers and tensors must then be had again.
    """

    def __init__(self, socket=None, name=None, timeout_ms=0, reconnect=False):
        self._handle = None
        self._buffers = []
        options = _Options(os.fsencode(socket) if socket else None, name.encode() if name else None,
                           timeout_ms, reconnect)
        handle = c_void_p()
        _call("fq_client_new", byref(options), byref(handle))
        self._handle = handle.value

    def _open(self):
        if self._handle is None:
            raise ValueError("the client was closed")
        return self._handle

    def close(self):
        """Frees the buffers and disconnects."""
        for buffer in list(self._buffers):
            buffer.free()
        if self._handle is not None:
            _library.fq_client_free(self._handle)
            self._handle = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __del__(self):
        self.close()

    @property
    def info(self):
        """What the daemon said of itself: a dict of struct fq_client_info."""
        info = _Info()
        _library.fq_client_info(self._open(), byref(info))
        return _fields(info)

    @property
    def generation(self):
        return _library.fq_client_generation(self._open())

    def fileno(self):
        """The socket, for select(); see poll()."""
        return _library.fq_client_fd(self._open())

    def call(self, method, **params):
        """Any method of the protocol, with its params as keywords; returns the result's dict."""
        result = c_void_p()
        _call("fq_client_call_json", self._open(), method.encode(), json.dumps(params).encode(),
              byref(result))
        try:
            return json.loads(ctypes.string_at(result.value))
        finally:
            _libc.free(result)

    def ping(self):
        _call("fq_client_ping", self._open())

    def shutdown(self):
        _call("fq_client_shutdown", self._open())

    def stats(self):
        return self.call("stats")

    def models(self):
        """Every model of the daemon, a dict each."""
        return self.call("model.list")["models"]

    def load(self, name, path, bits=0, group=0, progress=None):
        """Loads a checkpoint directory and waits.  group -1 is one scale a row; progress is called
        with (done, total).  Returns a Model."""
        def report(_, done, total):
            progress(done, total)

        callback = _PROGRESS(report) if progress else _PROGRESS()
        request = _Load(name.encode(), os.fsencode(path), bits, group, callback, None)
        _call("fq_client_model_load", self._open(), byref(request), None)
        return Model(self, name)

    def model(self, name):
        return Model(self, name)

    def unload(self, name):
        """Returns the bytes given back."""
        freed = c_uint64()
        _call("fq_client_model_unload", self._open(), name.encode(), byref(freed))
        return freed.value

    def tensor(self, model, name):
        raw = _Tensor()
        _call("fq_client_tensor_find", self._open(), model.encode(), name.encode(), byref(raw))
        return Tensor(raw)

    def tensors(self, model):
        array, count = POINTER(_Tensor)(), c_size_t()
        _call("fq_client_tensor_list", self._open(), model.encode(), byref(array), byref(count))
        try:
            return [Tensor(_Tensor.from_buffer_copy(array[i])) for i in range(count.value)]
        finally:
            _libc.free(array)

    def buffer(self, size, kind="host"):
        return Buffer(self, size, kind)

    @staticmethod
    def _bias(bias):
        """The kind, place and dtype of what a caller gives as a bias."""
        if not isinstance(bias, tuple):
            return BIAS_CHECKPOINT if bias else BIAS_NONE, _Place(), 0
        buffer, offset, dtype = bias
        return BIAS_BUFFER, _Place(buffer._open(), offset, 0), DTYPES[dtype]

    def _gemm(self, tensor, x, y, m, dtype, bias, activation, x_offset=0, y_offset=0, x_stride=0,
              y_stride=0, gate=None, gate_bias=False, residual=None, residual_offset=0,
              residual_stride=0):
        request = _Gemm(ctypes.pointer(tensor._raw), m, DTYPES[dtype],
                        _Place(x._open(), x_offset, x_stride),
                        _Place(y._open(), y_offset, y_stride),
                        activation=ACTIVATIONS[activation])
        request.bias, request.bias_at, own_dtype = self._bias(bias)
        request.gate_bias, request.gate_bias_at, gate_dtype = self._bias(gate_bias)
        if own_dtype and gate_dtype and own_dtype != gate_dtype:
            raise ValueError("bias and gate_bias have different dtypes")
        request.bias_dtype = own_dtype or gate_dtype
        if gate is not None:
            request.gate = ctypes.pointer(gate._raw)
        if residual is not None:
            request.residual = _Place(residual._open(), residual_offset, residual_stride)
        return request

    def gemm(self, tensor, x, y, m, dtype="f16", bias=False, activation="none", **how):
        """Y = activation(X·Wᵀ + bias) + residual, complete on return; with a gate V
        Y = activation(X·Vᵀ + gate_bias) ⊙ (X·Wᵀ + bias) + residual.

        x, y: Buffers.  dtype: of X, Y and the residual ("f16").  x_offset, y_offset in bytes,
        x_stride, y_stride in elements (0: rows follow one another).  bias, gate_bias: True for the
        checkpoint's, or (buffer, offset, dtype).  activation: "none", "relu", "gelu", "gelu_tanh",
        "silu".  gate: a Tensor of the same model, shape and bits.  residual: a Buffer, with
        residual_offset and residual_stride; it may be y's own place.
        """
        request = self._gemm(tensor, x, y, m, dtype, bias, activation, **how)
        _call("fq_client_gemm", self._open(), byref(request))

    def submit(self, tensor, x, y, m, dtype="f16", bias=False, activation="none", **how):
        """As gemm, but returns a ticket at once, for wait() or poll()."""
        request = self._gemm(tensor, x, y, m, dtype, bias, activation, **how)
        ticket = c_uint64()
        _call("fq_client_submit", self._open(), byref(request), byref(ticket))
        return ticket.value

    def wait(self, ticket):
        _call("fq_client_wait", self._open(), ticket)

    def poll(self, ticket):
        """True: complete, the ticket is spent.  False: not yet."""
        return _call("fq_client_poll", self._open(), ticket) == 1
