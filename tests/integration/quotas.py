# SPDX-License-Identifier: Apache-2.0
"""Limits of a session are errors at once, of that session alone; the memory budget; connections."""
import os

import numpy as np
from harness import BACKEND, Client, Daemon, Matrix, expect, main, small_model, write_checkpoint


def each_limit_is_an_error_of_its_session_alone(directory):
    path, _ = small_model(directory, n=64, k=64)
    daemon = Daemon(directory, "--max-buffers=3", "--max-buffer-bytes=1M",
                    "--max-inflight-bytes=1000", models=[("m", path)])
    client, other = daemon.connect(), daemon.connect()
    limits = client.hello["limits"]
    assert (limits["buffers"], limits["buffer_bytes"], limits["inflight_bytes"]) == (3, 1 << 20,
                                                                                     1000)
    first = client.buffer(1 << 19)
    second = client.buffer(1 << 19)
    expect("quota", client.call, "buffer.create", bytes=1, kind="host", says="1048576")
    other.buffer(1 << 20)
    client.call("buffer.destroy", buffer=second.id)
    for _ in range(2):
        client.buffer(1)
    expect("quota", client.call, "buffer.create", bytes=1, kind="host", says="buffers")
    assert client.call("stats")["buffer_bytes"] == (1 << 20) + (1 << 19) + 2
    tensor = client.tensor("m", "layer")
    place = (first, 0), (first, 4096)
    client.wait(client.submit_gemm(tensor, *place, 3, "f16"))  # 768 bytes
    expect("quota", client.wait, client.submit_gemm(tensor, *place, 4, "f16"), says="1000")
    client.wait(client.submit_gemm(tensor, *place, 3, "f16"))
    me = [c for c in client.call("client.list")["clients"] if c["buffers"] == 3]
    assert len(me) == 1 and me[0]["inflight"] == 0 and me[0]["requests"] == 2 and me[0]["rows"] == 6
    client.close()
    other.close()
    daemon.stop()


def requests_in_flight_are_limited(directory):
    # one large product keeps the executor busy while the quota fills behind it
    matrix = Matrix(np.random.default_rng(3), 512, 4096)
    path = write_checkpoint(os.path.join(directory, "big"), {"layer": matrix})
    daemon = Daemon(directory, "--max-inflight=4", "--threads=1", models=[("m", path)])
    client, other = daemon.connect(), daemon.connect()
    tensor = client.tensor("m", "layer")
    rows = 4096
    buffer = client.buffer(rows * (4096 + 512) * 2)
    place = (buffer, 0), (buffer, rows * 4096 * 2)
    calls = [client.submit_gemm(tensor, *place, rows, "f16") for _ in range(8)]
    refused = 0
    for call in calls:
        try:
            client.wait(call)
        except Exception as error:
            assert getattr(error, "name", None) == "quota" and "4" in error.message, error
            refused += 1
    assert 1 <= refused <= 4, refused
    other.call("ping")
    assert other.call("stats")["queued"] == 0
    client.close()
    other.close()
    daemon.stop()


def a_load_beyond_the_budget_says_what_there_is_and_who_holds_it(directory):
    path, _ = small_model(directory, n=256, k=1024)
    daemon = Daemon(directory, "--memory-budget=200K", models=[("first", path)])
    with daemon.connect() as client:
        refused = expect("no-memory", client.call, "model.load", name="second", path=path,
                         says="second needs")
        assert "held by first" in refused.message, refused.message
        held = client.call("stats")
        assert held["budget_bytes"] == 200 << 10 and 0 < held["weight_bytes"] <= 200 << 10
        assert [m["name"] for m in client.call("model.list")["models"]] == ["first"]
        client.call("model.unload", name="first")
        assert client.call("stats")["weight_bytes"] == 0
        client.call("model.load", name="second", path=path)
    daemon.stop()


def connections_are_limited(directory):
    daemon = Daemon(directory, "--max-sessions=2")
    first, second = daemon.connect(), daemon.connect()
    third = Client(daemon.socket, hello=False)
    assert third.wait_end() == "busy"
    third.close()
    second.close()
    while True:  # its slot is free once the daemon has seen it go
        fourth = Client(daemon.socket, hello=False)
        try:
            call = fourth.submit("hello", version=1, client="fourth")
            fourth.wait(call)
            break
        except (ConnectionError, Exception) as error:
            assert isinstance(error, ConnectionError) or error.name == "busy", error
    fourth.call("ping")
    first.call("ping")
    daemon.stop()


def a_lack_of_descriptors_is_waited_out(directory):
    import resource
    if BACKEND == "cuda":
        return  # the driver needs more descriptors than this limit leaves
    limit = 40

    def lower():
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    daemon = Daemon(directory, preexec_fn=lower)
    clients = []
    call = None
    for _ in range(limit):  # more than there are descriptors
        clients.append(Client(daemon.socket, hello=False))
        call = clients[-1].submit("hello", version=1, client="many")
    daemon.wait_log("accept: ")
    for client in clients[:20]:
        client.close()
    clients[-1].wait(call)  # the last in line is served
    for client in clients[20:]:
        client.close()
    daemon.stop()


if __name__ == "__main__":
    main([each_limit_is_an_error_of_its_session_alone, requests_in_flight_are_limited,
          a_load_beyond_the_budget_says_what_there_is_and_who_holds_it, connections_are_limited,
          a_lack_of_descriptors_is_waited_out])
