# SPDX-License-Identifier: Apache-2.0
"""finequantctl against a real daemon: every command, its JSON, its exit statuses."""
import json
import os
import subprocess
import sys

import numpy as np
from harness import Daemon, Matrix, main, write_checkpoint

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "python"))
import formats  # noqa: E402

COMMAND = os.path.join(os.environ.get("top_builddir", "."), "finequantctl")


def ctl(socket, *arguments, **how):
    done = subprocess.run([COMMAND, "--socket", socket, *arguments], check=False,
                          capture_output=True, text=True, timeout=120, **how)
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


def checkpoints_of_other_formats_are_loaded_and_shown(directory):
    random = np.random.default_rng(6)
    four, eight = formats.Weight(random, 32, 64, 4, 32, False), formats.Weight(random, 8, 32, 8, 32)
    path = formats.write_directory(
        os.path.join(directory, "awq"),
        {**formats.awq(four, "layer"), "layer.bias": np.ones(32, np.float16)},
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True})
    with open(os.path.join(directory, "x.gguf"), "wb") as file:
        file.write(formats.gguf({}, {"q.weight": ("Q8_0", [8, 32], formats.gguf_blocks(eight))}))
    daemon = Daemon(directory)
    assert ctl(daemon.socket, "load", "awq", path)[0] == 0
    # relative to where the command runs
    assert ctl(daemon.socket, "load", "gguf", "x.gguf", cwd=directory)[0] == 0
    for model, expected in (("awq", {"TENSOR": "layer", "N": "32", "K": "64", "BITS": "4", "GROUP": "32",
                                     "SCALE": "f16", "ZERO": "yes", "BIAS": "yes"}),
                            ("gguf", {"TENSOR": "q", "N": "8", "K": "32", "BITS": "8",
                                      "GROUP": "channel", "SCALE": "f16", "ZERO": "no", "BIAS": "no"})):
        heads, row = (line.split() for line in ctl(daemon.socket, "show", model)[1].splitlines())
        assert expected.items() <= dict(zip(heads, row)).items(), (heads, row)
    daemon.stop()


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
    main([every_command_answers, checkpoints_of_other_formats_are_loaded_and_shown,
          failures_have_a_line_and_a_status])
