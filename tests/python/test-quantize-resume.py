#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A killed finequant-quantize goes on where it was: the same bytes, finished files untouched.

The program is stopped at a known place without waiting for a time: it tells each layer on a pipe
that holds few of its lines, so that it can be no further ahead of the reader than those."""
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile

import numpy as np

from checkpoint import PROGRAM, quantize, write_checkpoint

LAYERS, STOP = 60, 20
OPTIONS = ["--shard-size", "30K", "--bits-per-weight", "4.3"]


def started(source, out, *arguments):
    """A process that has written STOP layers and not yet all."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    process = subprocess.Popen([PROGRAM, source, out, *OPTIONS, *arguments], stderr=writing,
                               stdout=subprocess.DEVNULL)
    os.close(writing)
    lines = os.fdopen(reading)
    for _ in range(STOP):
        assert next(lines).startswith("[")
    return process, lines


def kill_while_planning(source, out, how, *arguments):
    """Ends a process that has written down what it measured, but has not decided; its state."""
    state = os.path.join(out + ".partial", "finequant-resume.json")
    process = subprocess.Popen([PROGRAM, source, out, "--quiet", *arguments],
                               stderr=subprocess.DEVNULL)
    while process.poll() is None and not os.path.exists(state):
        pass
    process.send_signal(how)
    process.wait()
    with open(state) as file:
        return json.load(file)


def check_planning(work, random):
    """Planning under a budget goes on as well, and comes to the same choices."""
    tensors = {f"l.{i:02}.weight": random.standard_t(4, (1024, 1024)).astype(np.float32)
               for i in range(8)}
    tensors |= {f"s.{i}.weight": random.standard_t(3, (64, 512)).astype(np.float32)
                for i in range(8)}
    source, out = os.path.join(work, "plan-in"), os.path.join(work, "plan-out")
    arguments = ("--bits-per-weight", "4.3")
    write_checkpoint(source, tensors)
    assert quantize(source, out + "-whole", *arguments)["budget"]["measured_before"] == 0
    for how in (signal.SIGKILL, signal.SIGTERM):
        state = kill_while_planning(source, out, how, *arguments)
        assert "choices" not in state and 1 <= len(state["measured"]) < len(tensors), state.keys()
        report = quantize(source, out, *arguments)
        assert report["budget"]["measured_before"] == len(state["measured"]), report["budget"]
        assert files_of(out) == files_of(out + "-whole")
        shutil.rmtree(out)
    state = kill_while_planning(source, out, signal.SIGKILL, *arguments)
    state["measured"].popitem()  # what is not as this program writes it is measured again
    state["measured"]["l.00"] = {"options": [[4, 64, False, 0.0, 0.0, False]]}
    with open(os.path.join(out + ".partial", "finequant-resume.json"), "w") as file:
        json.dump(state, file)
    with open(os.path.join(out + ".partial", "finequant-resume.json.tmp-1"), "w") as file:
        file.write("{")
    quantize(source, out, *arguments)
    assert files_of(out) == files_of(out + "-whole")
    shutil.rmtree(out)
    os.mkdir(out + ".partial")  # killed before its first state file had its name
    with open(os.path.join(out + ".partial", "finequant-resume.json.tmp-1"), "w") as file:
        file.write("{")
    quantize(source, out, *arguments)
    assert files_of(out) == files_of(out + "-whole")
    kill_while_planning(source, out + "-other", signal.SIGKILL, *arguments)
    report = quantize(source, out + "-other", "--bits-per-weight", "4.4")  # asks otherwise
    assert report["budget"]["measured_before"] == 0


def files_of(directory):
    out = {}
    for name in sorted(os.listdir(directory)):
        with open(os.path.join(directory, name), "rb") as file:
            out[name] = hashlib.sha256(file.read()).hexdigest()
    return out


def finished(partial):
    return {name: os.stat(os.path.join(partial, name)) for name in os.listdir(partial)
            if name.endswith(".safetensors")}


def main():
    random = np.random.default_rng(3)
    pad = "x" * 120  # long names fill the pipe sooner
    tensors = {f"{pad}.{i}.weight": random.normal(0, 1, (64, 256)).astype(np.float16)
               for i in range(LAYERS)}
    with tempfile.TemporaryDirectory() as work:
        source, out = os.path.join(work, "in"), os.path.join(work, "out")
        partial = out + ".partial"
        write_checkpoint(source, tensors)
        quantize(source, os.path.join(work, "whole"), *OPTIONS)
        whole = files_of(os.path.join(work, "whole"))

        process, lines = started(source, out)
        busy = quantize(source, out, *OPTIONS, check=False)
        assert busy.returncode == 10 and "another process" in busy.stderr, busy
        process.kill()
        process.wait()
        lines.close()
        assert not os.path.exists(out)
        before = finished(partial)
        assert 5 <= len(before) < len(whole) - 3, before
        os.truncate(os.path.join(partial, min(before)), 1000)  # a disk that lost its last writes
        del before[min(before)]
        report = quantize(source, out, *OPTIONS)
        assert report["shards_kept"] == len(before), (report["shards_kept"], len(before))
        assert files_of(out) == whole
        for name, status in before.items():  # neither rewritten nor replaced
            now = os.stat(os.path.join(out, name))
            assert (now.st_ino, now.st_mtime_ns) == (status.st_ino, status.st_mtime_ns), name
        assert not os.path.exists(partial)

        other = os.path.join(work, "other")  # SIGTERM, then other options: from the beginning
        process, lines = started(source, other)
        process.send_signal(signal.SIGTERM)
        said = lines.read()
        assert process.wait() == 19 and "the same command goes on" in said, said
        assert not os.path.exists(other) and len(finished(other + ".partial")) >= 5
        report = quantize(source, other, "--shard-size", "30K", "--bits-per-weight", "4.2")
        assert report["shards_kept"] == 0
        assert sorted(os.listdir(work)) == ["in", "other", "out", "whole"]

        third = os.path.join(work, "third")  # the input changes: from the beginning
        process, lines = started(source, third)
        process.kill()
        process.wait()
        lines.close()
        os.utime(os.path.join(source, "model.safetensors"))
        assert quantize(source, third, *OPTIONS)["shards_kept"] == 0
        assert files_of(third) == whole

        fourth = os.path.join(work, "fourth")  # somebody's directory of that name stays his
        os.mkdir(fourth + ".partial")
        with open(os.path.join(fourth + ".partial", "config.json"), "w") as file:
            json.dump({}, file)
        refused = quantize(source, fourth, *OPTIONS, check=False)
        assert refused.returncode == 9 and os.listdir(fourth + ".partial") == ["config.json"]

    with tempfile.TemporaryDirectory() as work:
        check_planning(work, random)


if __name__ == "__main__":
    sys.exit(main())
