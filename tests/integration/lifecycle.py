# SPDX-License-Identifier: Apache-2.0
"""Start and end: options, the second instance, signals, unloading, the state file."""
import os
import select
import signal
import stat
import subprocess
import time

import numpy as np
from harness import (BACKEND, BOUNDS, DTYPE, DAEMON, Client, Closed, Daemon, Matrix, Refused, expect, load, main,
                     relative_error, small_model, store, write_checkpoint)


def run(*arguments):
    done = subprocess.run([DAEMON, *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def options_are_checked(directory):
    config = os.path.join(directory, "c.conf")

    def check(text):
        with open(config, "w", encoding="ascii") as file:
            file.write(text)
        return run(f"--config={config}", "--check-config")

    assert run("--version")[1].startswith("finequantd ")
    assert "--memory-budget" in run("--help")[1]
    assert check("[finequantd]\nthreads = 3\nmode=0600\nmodel = a=/x\nmemory-budget = 24G\n")[0] == 0
    for text, says in (("\nnothing = 1\n", "line 2"), ("threads = many\n", "threads"),
                       ("[other]\nthreads = 1\n", "[other]"), ("memory-budget = 3X\n", "3X"),
                       ("model = a\n", "NAME=PATH"), ("allow-users = nobody-such\n", "nobody-such"),
                       ("log-level = loud\n", "loud"), ("mode = 0999\n", "0999"),
                       ("max-inflight = 0\n", "max-inflight"), ("help = 1\n", "help")):
        status, _, errors = check(text)
        assert status == 2 and says in errors and config in errors, (text, errors)
    for options, status in ((["--threads"], 2), (["--nothing"], 2), (["more"], 2),
                            (["--config=/nonexistent"], 8), (["--socket=" + "x" * 200], 3),
                            (["--backend=abacus", f"--socket={directory}/s"], 3)):
        code, _, errors = run(*options)
        assert code == status and errors, (options, code, errors)
    assert not os.path.exists(f"{directory}/s")  # a failed start leaves no socket


def a_model_that_cannot_be_loaded_ends_the_start(directory):
    daemon = Daemon(directory, "--model", "m=/nonexistent", wait=False)
    assert daemon.wait() == 8 and "model m is not loaded" in daemon.log()


def one_instance_a_socket(directory):
    path, _ = small_model(directory)
    first = Daemon(directory)
    mode = os.stat(first.socket).st_mode
    assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o660
    second = Daemon(directory, wait=False)
    assert second.wait() == 9
    assert f"pid {first.pid}" in second.log() and first.socket in second.log()
    with first.connect() as client:
        client.call("ping")
    first.signal(signal.SIGKILL)
    first.wait()
    assert os.path.exists(first.socket)  # stale: the next one replaces it
    third = Daemon(directory, "--mode=0600", models=[("m", path)])
    assert stat.S_IMODE(os.stat(third.socket).st_mode) == 0o600
    with third.connect() as client:
        client.call("ping")
    third.stop()
    assert not os.path.exists(third.socket)


def big_model(directory):
    matrix = Matrix(np.random.default_rng(5), 384, 2048)
    return write_checkpoint(os.path.join(directory, "big"), {"layer": matrix}), matrix


class Busy:
    """A client with large requests in flight, whose results are checked at the end."""

    ROWS, COUNT = 1024, 6

    def __init__(self, daemon, matrix):
        self.matrix = matrix
        self.client = daemon.connect(name="busy")
        tensor = self.client.tensor("m", "layer")
        self.tensor = tensor
        self.x = np.random.default_rng(6).standard_normal((self.ROWS, matrix.k)).astype(np.float32)
        size = self.ROWS * matrix.n * 4
        self.start = self.ROWS * matrix.k * 4
        self.buffer = self.client.buffer(self.start + self.COUNT * size)
        store(self.buffer, 0, self.x, DTYPE)
        self.places = [self.start + i * size for i in range(self.COUNT)]
        self.calls = [self.client.submit_gemm(tensor, (self.buffer, 0), (self.buffer, place),
                                              self.ROWS) for place in self.places]
        self.client.call("ping")  # answered after the requests before it were queued

    def finish(self):
        for call in self.calls:
            self.client.wait(call)
        reference = self.matrix.reference(self.x[:3])
        for place in self.places:
            y = load(self.buffer, place, (3, self.matrix.n), DTYPE)
            assert relative_error(y, reference) <= BOUNDS[DTYPE]


def unload_waits_for_what_is_in_flight(directory):
    path, matrix = big_model(directory)
    daemon = Daemon(directory, "--threads=1", models=[("m", path)])
    with daemon.connect() as admin:
        busy = Busy(daemon, matrix)
        held = admin.call("stats")["weight_bytes"]
        call = admin.submit("model.unload", name="m")
        expect("not-found", admin.call, "tensor.list", model="m")
        expect("not-found", busy.client.wait,
               busy.client.submit_gemm(busy.tensor, (busy.buffer, 0), (busy.buffer, busy.start), 1))
        busy.finish()
        assert admin.wait(call)["bytes"] == held
        assert admin.call("stats")["weight_bytes"] == 0
        assert admin.call("model.list")["models"] == []
        reply = admin.call("model.load", name="m", path=path)
        again = admin.tensor("m", "layer")
        assert reply["model"]["requests"] == 0 and again["id"] != busy.tensor["id"]
        busy.client.close()
    daemon.stop()


def a_load_does_not_block_other_models_and_outlives_its_client(directory):
    path, matrix = big_model(directory)
    many = {f"layer{i:03}": Matrix(np.random.default_rng(i), 64, 512) for i in range(60)}
    slow = write_checkpoint(os.path.join(directory, "many"), many)
    daemon = Daemon(directory, models=[("m", path)])
    loader, client = daemon.connect(), daemon.connect()
    call = loader.submit("model.load", name="slow", path=slow)
    tensor = client.tensor("m", "layer")
    client.gemm(tensor, np.ones((2, matrix.k), np.float32))
    assert loader.wait(call)["model"]["matrices"] == 60
    steps = [n[1]["done"] for n in loader.notifications if n[0] == "model.progress"]
    assert steps == list(range(1, 61)), steps
    loader.call("model.unload", name="slow")
    loader.submit("model.load", name="slow", path=slow)
    loader.close()
    daemon.wait_log("model slow: ", after=daemon.wait_log("model slow unloaded"))
    assert {m["name"]: m["state"] for m in client.call("model.list")["models"]} == {
        "m": "ready", "slow": "ready"}
    client.close()
    daemon.stop()


def terminating_finishes_and_answers_what_is_in_flight(directory):
    if BACKEND == "cuda":
        return  # a GPU is done with this work before the signal arrives
    path, matrix = big_model(directory)
    for way in (signal.SIGTERM, signal.SIGINT, None):
        daemon = Daemon(directory, "--threads=1", models=[("m", path)])
        idle = daemon.connect()
        busy = Busy(daemon, matrix)
        if way:
            daemon.signal(way)
            daemon.wait_log("shutting down")
        else:
            idle.call("shutdown")
        late = busy.client.submit_gemm(busy.tensor, (busy.buffer, 0), (busy.buffer, busy.start), 1)
        try:
            busy.client.wait(late)
        except Refused as refused:
            assert refused.name == "busy"
        busy.finish()
        assert idle.wait_end() is None and ("shutdown", {}) in idle.notifications
        daemon.stop(told=True)
        try:
            Client(daemon.socket)
        except FileNotFoundError:
            pass


def a_second_signal_ends_at_once(directory):
    path, matrix = big_model(directory)
    daemon = Daemon(directory, "--threads=1", models=[("m", path)])
    busy = Busy(daemon, matrix)
    daemon.signal(signal.SIGTERM)
    daemon.wait_log("shutting down")
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() in (0, 19)  # 0: the drain was quicker
    try:
        busy.finish()
    except (Closed, ConnectionError):
        pass
    busy.client.close()


def an_idle_daemon_takes_no_time(directory):
    """Its threads may wait for work awake for a moment, but not for as long as they like."""
    path, matrix = big_model(directory)
    daemon = Daemon(directory, "--threads=2", models=[("m", path)])

    def processor_seconds():
        total = 0
        for task in os.listdir(f"/proc/{daemon.pid}/task"):
            with open(f"/proc/{daemon.pid}/task/{task}/schedstat", encoding="ascii") as stat:
                total += int(stat.read().split()[0])
        return total / 1e9

    with daemon.connect() as client:
        tensor = client.tensor("m", "layer")
        before = processor_seconds()
        for rows in (1, 4, 256):
            client.gemm(tensor, np.ones((rows, matrix.k), np.float32))
        assert processor_seconds() > before
        ended = os.pidfd_open(daemon.pid)
        # A spinning thread takes all of every window, on however busy a machine a good part of it.
        for _ in range(20):
            before, start = processor_seconds(), time.monotonic()
            assert not select.select([ended], [], [], 0.25)[0], "the daemon ended"
            share = (processor_seconds() - before) / (time.monotonic() - start)
            if share < 0.01:
                break
        os.close(ended)
        assert share < 0.01, f"idle, it takes {share:.3f} of a core"
    daemon.stop()


def hangup_rereads_what_can_change(directory):
    path, _ = small_model(directory)
    config = os.path.join(directory, "c.conf")

    def write(text):
        with open(config, "w", encoding="ascii") as file:
            file.write(text)

    write("max-buffers = 2\nlog-level = info\n")
    daemon = Daemon(directory, f"--config={config}")
    with daemon.connect() as client:
        mark = daemon.marks()
        write(f"max-buffers = 1\nlog-level = debug\nthreads = 2\nmodel = added={path}\n"
              "memory-budget = 1G\n")
        daemon.signal(signal.SIGHUP)
        mark = daemon.wait_log("threads differs", after=mark)
        daemon.wait_log("configuration reread", after=mark)
        daemon.wait_log("model added: ", after=mark)
        client.buffer(1)
        expect("quota", client.call, "buffer.create", bytes=1, kind="host")
        daemon.wait_log("quota", after=mark)  # debug logs refusals
        assert client.call("stats")["budget_bytes"] == 1 << 30
        write("max-buffers = none\n")
        mark = daemon.marks()
        daemon.signal(signal.SIGHUP)
        daemon.wait_log("stays as it was", after=mark)
        expect("quota", client.call, "buffer.create", bytes=1, kind="host")
        assert client.call("stats")["models"] == 1
    daemon.stop()


def models_loaded_on_request_come_back(directory):
    path, _ = small_model(directory)
    state = f"--state={directory}/models"
    daemon = Daemon(directory, state, models=[("configured", path)])
    with daemon.connect() as client:
        client.call("model.load", name="kept", path=path)
        client.call("model.load", name="dropped", path=path)
        client.call("model.unload", name="dropped")
    daemon.signal(signal.SIGKILL)
    daemon.wait()
    daemon = Daemon(directory, state)
    daemon.wait_log("model kept: ")
    with daemon.connect() as client:
        assert [m["name"] for m in client.call("model.list")["models"]] == ["kept"]
        client.call("model.unload", name="kept")
    daemon.stop()
    with open(f"{directory}/models", encoding="ascii") as file:
        assert file.read() == ""
    with open(f"{directory}/models", "w", encoding="ascii") as file:
        file.write(f"nonsense\n4 64 gone {directory}/none\n4 64 kept {path}\n")
    daemon = Daemon(directory, state)
    daemon.wait_log("names no model")
    daemon.wait_log("model gone is not loaded")
    daemon.wait_log("model kept: ")
    daemon.stop()


if __name__ == "__main__":
    main([options_are_checked, a_model_that_cannot_be_loaded_ends_the_start, one_instance_a_socket,
          unload_waits_for_what_is_in_flight,
          a_load_does_not_block_other_models_and_outlives_its_client,
          terminating_finishes_and_answers_what_is_in_flight, a_second_signal_ends_at_once,
          an_idle_daemon_takes_no_time, hangup_rereads_what_can_change, models_loaded_on_request_come_back])
