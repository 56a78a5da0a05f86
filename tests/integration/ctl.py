# SPDX-License-Identifier: Apache-2.0
"""finequantctl against a real daemon: every command, its JSON, its exit statuses."""
import json
import os
import subprocess

import numpy as np
from harness import Daemon, Matrix, main, write_checkpoint

COMMAND = os.path.join(os.environ.get("top_builddir", "."), "finequantctl")


def ctl(socket, *arguments):
    done = subprocess.run([COMMAND, "--socket", socket, *arguments], check=False,
                          capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def every_command_answers(directory):
    path = write_checkpoint(os.path.join(directory, "m"),
                            {"layer": Matrix(np.random.default_rng(3), 64, 128)})
    daemon = Daemon(directory)
    socket = daemon.socket
    status, out, _ = ctl(socket, "load", "demo", path)
    assert status == 0 and "demo: ready, 1 matrices" in out, out
    for command, word in (("status", "finequantd"), ("list", "demo"), ("ps", "ready"),
                          ("clients", "finequantctl"), ("stats", "latency_us.p99")):
        status, out, err = ctl(socket, command)
        assert status == 0 and word in out, (command, status, out, err)
        assert isinstance(json.loads(ctl(socket, command, "--json")[1]), dict), command
    tensors = json.loads(ctl(socket, "show", "demo", "--json")[1])["tensors"]
    assert [(t["name"], t["n"], t["k"]) for t in tensors] == [("layer", 64, 128)]
    pings = json.loads(ctl(socket, "ping", "--count=5", "--interval=0", "--json")[1])
    assert pings["count"] == 5 and 0 < pings["min_us"] <= pings["median_us"] <= pings["p99_us"]
    status, out, _ = ctl(socket, "unload", "demo")
    assert status == 0 and "given back" in out, out
    assert ctl(socket, "shutdown")[0] == 0
    daemon.stop(told=True)


def failures_have_a_line_and_a_status(directory):
    daemon = Daemon(directory)
    for arguments, expected, word in (
            (("show", "nothing"), 8, "nothing"), (("unload", "nothing"), 8, "nothing"),
            (("load", "x", "/nonexistent"), 8, "/nonexistent"), (("dance",), 2, "dance"),
            (("show",), 2, "MODEL"), (("list", "more"), 2, "more"), ((), 2, "Usage"),
            (("ping", "--count=many"), 2, "many"), (("list", "--bits=4"), 2, "bits")):
        status, _, err = ctl(daemon.socket, *arguments)
        assert status == expected and word in err, (arguments, status, err)
    daemon.stop()
    status, _, err = ctl(daemon.socket, "status")
    assert status == 17 and "Is finequantd running?" in err, (status, err)


if __name__ == "__main__":
    main([every_command_answers, failures_have_a_line_and_a_status])
