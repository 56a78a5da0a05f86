#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How fast finequant-quantize goes through a checkpoint of Llama-7B's shapes, and in how much memory.

    bench/quantizer-rate.py --layers 32 --program build/finequant-quantize --csv FILE DIR

writes seeded bf16 weights into DIR (13 GB for 32 layers; they stay until the end), drops them from the
page cache, quantizes them in several ways, each beside a plain copy on the same disk, plans a budget (a dry
run), and removes it all.  --ways 0 plans only.
"""
import argparse
import csv
import json
import os
import re
import shutil
import struct
import subprocess
import sys

import numpy as np

HIDDEN, INNER, VOCABULARY = 4096, 11008, 32000
A_SHARD = 4  # layers
WAYS = (("auto, mse (the default)", ()),
        ("auto, absmax", ("--scale", "absmax")),
        ("group 64, mse", ("--group", "64")),
        ("group 64, absmax", ("--group", "64", "--scale", "absmax")))
PLAN = ("planning --bits-per-weight 4.3", ("--bits-per-weight", "4.3", "--dry-run"))


def shapes(layer):
    name = f"model.layers.{layer}."
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield f"{name}self_attn.{part}.weight", (HIDDEN, HIDDEN)
    for part in ("gate_proj", "up_proj"):
        yield f"{name}mlp.{part}.weight", (INNER, HIDDEN)
    yield f"{name}mlp.down_proj.weight", (HIDDEN, INNER)


def bf16(values):
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def generate(directory, layers):
    """Every matrix is the same four million normal weights, each time from another place on."""
    random = np.random.default_rng(7)
    pool = bf16(random.normal(0, 0.02, 1 << 22))
    index = {}
    os.makedirs(directory)
    for first in range(0, layers, A_SHARD):
        file = f"model-{first // A_SHARD + 1:05d}.safetensors"
        tensors = [t for i in range(first, min(first + A_SHARD, layers)) for t in shapes(i)]
        if first == 0:
            tensors.insert(0, ("model.embed_tokens.weight", (VOCABULARY, HIDDEN)))
        header, at = {}, 0
        for name, shape in tensors:
            size = 2 * shape[0] * shape[1]
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            at += size
            index[name] = file
        text = json.dumps(header).encode()
        with open(os.path.join(directory, file), "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for _, (n, k) in tensors:
                left, begin = n * k, int(random.integers(len(pool)))
                while left:
                    part = pool[begin:begin + left]
                    out.write(part.tobytes())
                    left, begin = left - len(part), 0
            out.flush()
            os.fsync(out.fileno())
            os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with open(os.path.join(directory, "model.safetensors.index.json"), "w") as out:
        json.dump({"weight_map": index}, out)
    with open(os.path.join(directory, "config.json"), "w") as out:
        json.dump({"model_type": "llama", "hidden_size": HIDDEN}, out)


def forget(directory):
    for name in os.listdir(directory):
        with open(os.path.join(directory, name), "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(program, source, out, arguments):
    """Seconds, GB/s of ours and of the copy, and the peak of resident memory in MB."""
    command = [program, source, out, "--quiet", "--json", "--compare-copy", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said, complaint = process.communicate()
    if process.returncode:
        sys.exit(complaint)
    report = json.loads(said)
    rates = [float(x) for x in re.findall(r"([\d.]+) GB/s", complaint)]  # none of a plan
    return report["seconds"], *(rates or ("", "")), report["peak_resident_bytes"] / 1e6


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--program", default="build/finequant-quantize")
    parser.add_argument("--ways", type=int, default=len(WAYS), help="the first so many of them")
    parser.add_argument("--csv", required=True)
    parser.add_argument("directory")
    options = parser.parse_args()
    source, out = (os.path.join(options.directory, name) for name in ("rate-in", "rate-out"))
    generate(source, options.layers)
    with open(options.csv, "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        file.write(f"# bench/quantizer-rate.py --layers {options.layers} --ways {options.ways}, "
                   f"{os.cpu_count()} cores\n")
        table.writerow(("way", "input_gb", "seconds", "gb_per_s", "copy_gb_per_s", "peak_mb"))
        size = sum(os.path.getsize(os.path.join(source, n)) for n in os.listdir(source)) / 1e9
        for what, arguments in (*WAYS[:options.ways], PLAN):
            forget(source)
            seconds, ours, copied, peak = measure(options.program, source, out, arguments)
            table.writerow((what, f"{size:.2f}", f"{seconds:.1f}", ours, copied, f"{peak:.0f}"))
            file.flush()
            if os.path.exists(out):
                shutil.rmtree(out)
    shutil.rmtree(source)


if __name__ == "__main__":
    main()
