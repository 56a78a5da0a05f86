#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What finequant-quantize tells: the plan of a dry run, progress and errors on a terminal, and
inspect's tables, JSON and picture."""
import json
import os
import pty
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree

import numpy as np

from checkpoint import (PROGRAM, matrices_of, mixture, quantize, read_checkpoint, relative, run,
                        write_checkpoint)


# ---- the plan -------------------------------------------------------------------------------------


def check_plan_without_errors(work, random):
    """What nobody measured is null, and no 0."""
    source, out = os.path.join(work, "plain-in"), os.path.join(work, "plain-out")
    write_checkpoint(source, {"l.weight": random.normal(0, 1, (8, 64)).astype(np.float32)})
    plan = quantize(source, out, "--dry-run", "--group", "64")
    assert plan["error"] is None and [m["error"] for m in plan["matrices"]] == [None], plan
    plan = quantize(source, out, "--dry-run")
    assert plan["error"] is None and 0.05 < plan["matrices"][0]["error"] < 0.2, plan
    done = quantize(source, out, "--group", "64")
    assert 0.05 < done["error"] == done["matrices"][0]["error"] < 0.2, done
    tight = quantize(source, out + "-tight", "--dry-run", "--bits-per-weight", "3.6")
    assert tight["error"] is None and (tight["budget"]["uniform_error"] is None) == (
        tight["budget"]["uniform_bits"] == 0), tight


# ---- progress ------------------------------------------------------------------------------------


def on_terminal(*command):
    """The exit status, and what was said on a terminal as standard error."""
    controller, terminal = pty.openpty()
    process = subprocess.Popen(command, stderr=terminal, stdout=subprocess.DEVNULL)
    os.close(terminal)
    said = b""
    while True:
        try:
            said += os.read(controller, 65536)
        except OSError:  # EIO: the other end is closed
            break
    os.close(controller)
    return process.wait(), said.decode()


def check_bar(work, source):
    """On a terminal a bar with the rate and the time left, of all that is to be done, looking and
    writing; else a line a layer (check_rules)."""
    status, said = on_terminal(PROGRAM, source, os.path.join(work, "bar"))
    assert status == 0 and "\n" not in said, said
    steps = said.split("\r")
    assert any(re.search(r"looking \[#*\.*\] +\d+%.* [\d.]+ GB/s, \d+:\d\d left", s) for s in steps)
    assert any(re.search(r"writing \[#{30}\] 100%, 10 of 10 layers", s) for s in steps), steps[-3:]
    for extra, last in (((), "writing"), (("--dry-run",), "checking"),
                        (("--group", "64", "--dry-run"), "checking"),
                        (("--bits-per-weight", "5"), "writing")):
        status, said = on_terminal(PROGRAM, source, os.path.join(work, f"bar{len(extra)}-{last}"), *extra)
        seen = [(m[1], int(m[2])) for m in re.finditer(r"K(\w+) \[[#.]+\] +(\d+)%", said)]
        parts = {word: [part for seen_word, part in seen if seen_word == word] for word, _ in seen}
        assert status == 0 and [part for _, part in seen] == sorted(part for _, part in seen), seen
        assert list(parts)[-1] == last and parts[last][-1] == 100, seen
        if "--group" not in extra:  # the first phase ends where the second goes on
            assert 30 < parts["looking"][-1] < 70, parts
            assert parts["looking"][-1] <= parts[last][0] < 100, parts


def check_errors_on_terminal(work, random):
    """An error has a line of its own there, whatever bar was on it."""
    tensors = {f"l.{i}.weight": random.normal(0, 1, (8, 64)).astype(np.float32) for i in range(3)}
    tensors["l.2.weight"][1, 1] = np.nan
    source = os.path.join(work, "terminal-in")
    write_checkpoint(source, tensors)
    for extra in ((), ("--group", "64"), ("--dry-run",)):
        status, said = on_terminal(PROGRAM, source, source + "-out", *extra)
        assert status == 3 and said.count("\n") == 1, said
        assert re.search(r"left\r\x1b\[Kfinequant-quantize: [^\r]*NaN[^\r]*\r\n$", said), said

    packed, scale = np.zeros((8, 8), np.int32), np.ones((8, 1), np.float16)
    quantized = {}
    for name in ("a", "b"):
        quantized |= {f"{name}.weight_packed": packed, f"{name}.weight_scale": scale.copy(),
                      f"{name}.weight_shape": np.array([8, 64])}
    quantized["b.weight_scale"][2, 0] = np.inf
    source = os.path.join(work, "terminal-packed")
    write_checkpoint(source, quantized, quantization_config={
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {
            "g": {"targets": ["Linear"], "weights": {
                "num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}}}})
    status, said = on_terminal(PROGRAM, "convert", source, source + "-out")
    assert status == 14 and said.count("\n") == 1, said
    assert re.search(r"symmetric\r\x1b\[Kfinequant-quantize: [^\r]*not finite\r\n$", said), said


# ---- inspect -------------------------------------------------------------------------------------


def check_inspect(work, source):
    out = os.path.join(work, "width-4.6")
    quantize(source, out, "--bits-per-weight", "4.6")
    tensors, found = read_checkpoint(source), matrices_of(out)
    picture = os.path.join(work, "picture.svg")
    shown = run("inspect", out, "--against", source, "--json", "--svg", picture)
    report = json.loads(shown.stdout)
    assert len(report["matrices"]) == len(found)
    for matrix in report["matrices"]:
        bits, group, size, dequantized = found[matrix["name"]]
        assert matrix["bits"] == bits and matrix["group"] in (group, matrix["k"])
        assert matrix["code_bytes"] + matrix["scale_bytes"] + matrix["zero_bytes"] + 16 == size
        error = relative(tensors[matrix["name"] + ".weight"], dequantized)
        assert abs(matrix["error"] - error) < 1e-9
    assert report["dense_bytes"] == tensors["norm.weight"].nbytes + tensors["embed.weight"].nbytes
    with open(picture) as file:
        drawn = file.read()
    root = xml.etree.ElementTree.fromstring(drawn)
    texts = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert sum("layer " in (t or "") for t in texts) == len(found)
    for matrix in report["matrices"]:
        assert f"{matrix['error'] * 100:.2f}%" in texts
    table = run("inspect", out).stdout.splitlines()
    assert len(table) == len(found) + 2 and "error" not in table[0]
    faulty = os.path.join(work, "nan-in")
    weights = np.ones((8, 64), np.float32)
    weights[2, 5] = np.nan
    write_checkpoint(faulty, {"l.1.weight": weights})
    wrong = run("inspect", out, "--against", faulty)
    assert wrong.returncode == 3 and wrong.stderr.count("\n") == 1, wrong
    assert run("inspect", source).returncode == 3  # nothing quantized there
    quantize(faulty, faulty + "-taken", "--allow-nonfinite")
    told = run("inspect", faulty + "-taken", "--against", faulty)  # no error of 0
    assert told.returncode == 3 and "the weights of 'l.1' are not all finite" in told.stderr, told
    assert told.stderr.count("\n") == 1 and not told.stdout


def main():
    random = np.random.default_rng(11)
    with tempfile.TemporaryDirectory() as work:
        source = os.path.join(work, "in")
        write_checkpoint(source, mixture(random))
        check_plan_without_errors(work, random)
        check_bar(work, source)
        check_errors_on_terminal(work, random)
        check_inspect(work, source)


if __name__ == "__main__":
    sys.exit(main())
