#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What finequant-quantize's choices are worth: the tables bench/results/quantizer-*.csv.

    bench/quantizer-evidence.py minilm MODEL     all-MiniLM-L6-v2 (./quickstart puts it in .cache/)
    bench/quantizer-evidence.py outliers         seeded weights, outlier columns in 4 of 96 matrices

both with --build DIR (default: build) and --results DIR (default: bench/results).  `minilm` quantizes
the model in every way, asks `finequant-quantize inspect --against` for each matrix's error, and runs 240
sentences through the encoder with every linear layer computed by finequantd (cpu backend, fp32
activations); the cosine is that of the sentence embeddings with those of the fp32 weights in numpy.
"""
import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile

import numpy as np

TOP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
for folder in ("tests/quickstart", "tests/python", "client/python"):
    sys.path.insert(0, os.path.join(TOP, folder))

import minilm
from checkpoint import write_checkpoint

GROUPS = ("channel", "K/2", "256", "128", "64", "32", "16")
ALPHAS = ("0.02", "0.03", "0.05", "0.075", "0.1")
HALF = "encoder.layer.?.output.dense"  # K = 1536, all others 384

# What a budget of a uniform choice's bytes is given to: the columns of the tables of equal bytes.
EQUAL = {"auto": lambda bits: ("--bits", str(bits)),
         "with_zero_points": lambda bits: ("--bits", str(bits), "--asymmetric"),
         "any_width": lambda bits: ()}


def interpolated(uniform, size):
    """What uniform groups would have in so many bytes, between the two (bytes, value, ...) around them."""
    for below, above in zip(uniform, uniform[1:]):
        if below[0] <= size <= above[0]:
            part = (size - below[0]) / (above[0] - below[0])
            return [b + (a - b) * part for b, a in zip(below[1:], above[1:])]
    raise ValueError(size)


# ---- sentences: 240 of this grammar, the same every time --------------------------------------------

WHO = ("The engineer", "A young doctor", "My neighbour", "The old library", "Every student", "Our train",
       "The government", "A flock of birds", "The museum", "Her grandmother", "The compiler", "A small team")
DID = ("repaired", "forgot", "described", "painted", "measured", "sold", "discovered", "translated",
       "protected", "ordered", "rewrote", "celebrated")
WHAT = ("the broken bridge", "a letter from Lisbon", "three bottles of olive oil", "the results of the trial",
        "an ancient map", "the software for the harvest", "a song about winter", "the price of electricity",
        "a recipe for lentil soup", "the theory of tides", "two tickets to the opera", "the missing chapter")
WHEN = ("before sunrise", "during the storm", "without asking anyone", "for the second time this year",
        "because nobody else would", "although the deadline had passed", "in front of a large audience", "at last")


def sentences(count=240):
    random = np.random.default_rng(2308_09723)
    return [f"{random.choice(WHO)} {random.choice(DID)} {random.choice(WHAT)} {random.choice(WHEN)}."
            for _ in range(count)]


# ---- the encoder, whose linear layers are somebody else's -------------------------------------------


def embed(tensors, tokens, linear):
    """Mean-pooled, normalised sentence embeddings; linear(x, name) takes the rows of all sentences."""
    lengths = [len(ids) for ids in tokens]
    ends = np.cumsum(lengths)

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-12)
        return x * tensors[name + ".weight"] + tensors[name + ".bias"]

    def attend(q, k, v):
        out = np.empty_like(q)
        for begin, end in zip(ends - lengths, ends):
            heads = [x[begin:end].reshape(end - begin, minilm.HEADS, -1).swapaxes(0, 1) for x in (q, k, v)]
            scores = heads[0] @ heads[1].swapaxes(1, 2) / np.sqrt(minilm.HIDDEN // minilm.HEADS)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = scores / scores.sum(-1, keepdims=True) @ heads[2]
            out[begin:end] = mixed.swapaxes(0, 1).reshape(end - begin, -1)
        return out

    ids = np.concatenate(tokens)
    places = np.concatenate([np.arange(n) for n in lengths])
    x = norm(tensors["embeddings.word_embeddings.weight"][ids]
             + tensors["embeddings.position_embeddings.weight"][places]
             + tensors["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for i in range(minilm.LAYERS):
        layer = f"encoder.layer.{i}."
        q, k, v = (linear(x, f"{layer}attention.self.{part}") for part in ("query", "key", "value"))
        x = norm(linear(attend(q, k, v), layer + "attention.output.dense") + x,
                 layer + "attention.output.LayerNorm")
        inner = linear(x, layer + "intermediate.dense")
        inner = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
        x = norm(linear(inner, layer + "output.dense") + x, layer + "output.LayerNorm")
    pooled = np.stack([x[begin:end].mean(0) for begin, end in zip(ends - lengths, ends)])
    return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)


class Daemon:
    """A finequantd that has one model after the other."""

    def __init__(self, build, work, rows):
        self.build, self.socket = build, os.path.join(work, "socket")
        self.process = subprocess.Popen([os.path.join(build, "finequantd"), "--backend", "cpu", "--socket",
                                         self.socket], stderr=subprocess.DEVNULL)
        os.environ.setdefault("FINEQUANT_LIBRARY", os.path.join(build, ".libs", "libfinequant.so"))
        import finequant
        while not os.path.exists(self.socket):
            if self.process.poll() is not None:
                sys.exit("finequantd did not start")
        self.client = finequant.Client(socket=self.socket, name="evidence")
        self.x = self.client.buffer(rows * minilm.INNER * 4)
        self.y = self.client.buffer(rows * minilm.INNER * 4)

    def ctl(self, *arguments):
        subprocess.run([os.path.join(self.build, "finequantctl"), "--socket", self.socket, *arguments],
                       check=True, stdout=subprocess.DEVNULL)

    def linear(self, x, name):
        tensor = self.client.tensor("m", name)
        self.x.array(np.float32, x.shape)[:] = x
        self.client.gemm(tensor, self.x, self.y, m=len(x), dtype="f32", bias=True)
        return self.y.array(np.float32, (len(x), tensor.n)).copy()

    def embed(self, directory, tensors, tokens):
        self.ctl("load", "m", directory)
        out = embed(tensors, tokens, self.linear)
        self.ctl("unload", "m")
        return out

    def stop(self):
        self.client.close()
        self.process.terminate()
        self.process.wait()


# ---- running ----------------------------------------------------------------------------------------


class Quantizer:
    def __init__(self, build, source, work):
        self.program = os.path.join(build, "finequant-quantize")
        self.source, self.work, self.count = source, work, 0

    def __call__(self, *arguments):
        """(directory, report, [(matrix, bits, group, error)]) of one way to quantize."""
        out = os.path.join(self.work, f"out-{self.count}")
        self.count += 1
        report = json.loads(subprocess.run([self.program, self.source, out, "--quiet", "--json", *arguments],
                                           check=True, stdout=subprocess.PIPE).stdout)
        seen = subprocess.run([self.program, "inspect", out, "--against", self.source, "--json"], check=True,
                              stdout=subprocess.PIPE).stdout
        matrices = [(m["name"], m["bits"], m["group"] if m["group"] < m["k"] else "channel", m["error"])
                    for m in json.loads(seen)["matrices"]]
        return out, report, matrices


def table(results, name, command, header):
    file = open(os.path.join(results, name), "w", newline="")
    file.write(f"# {command}\n")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    return file, writer


def summed(matrices):
    return sum(m[3] for m in matrices)


def group_arguments(group, bits):
    if group == "K/2":
        return ("--group", "192", "--override", f"{HALF}={bits},768")
    return ("--group", group)


def run_minilm(options):
    tensors = minilm.read_safetensors(os.path.join(options.model, "model.safetensors"))
    tokens = [np.array(minilm.tokens_of(s, options.model)) for s in sentences()]
    truth = embed(tensors, tokens,
                  lambda x, name: x @ tensors[name + ".weight"].T + tensors[name + ".bias"])
    command = "bench/quantizer-evidence.py minilm .cache/all-MiniLM-L6-v2"
    with tempfile.TemporaryDirectory() as work:
        quantize = Quantizer(options.build, options.model, work)
        daemon = Daemon(options.build, work, sum(len(t) for t in tokens))
        whole, ways = table(options.results, "quantizer-minilm.csv", command,
                            ("bits", "group", "scale", "bits_per_weight", "bytes", "summed_error",
                             "worst_error", "mean_cosine", "least_cosine"))
        parts, each = table(options.results, "quantizer-minilm-matrices.csv", command,
                            ("bits", "group", "scale", "matrix", "error", "its_group"))
        even, equal = table(options.results, "quantizer-minilm-equal-bytes.csv", command,
                            ("bits", "uniform_group", "uniform_bytes", "uniform_error", "uniform_cosine",
                             *(f"{what}_{way}" for way in EQUAL for what in ("bytes", "error", "cosine"))))

        alphas, by_alpha = table(options.results, "quantizer-minilm-alpha.csv", command,
                                 ("bits", "alpha", "minimize", "bits_per_weight", "bytes", "summed_error",
                                  "uniform_error", "less_error", "mean_cosine", "uniform_cosine"))

        def measure(bits, group, scale, *arguments):
            out, report, matrices = quantize(*arguments, "--scale", scale)
            cosine = (daemon.embed(out, tensors, tokens) * truth).sum(1)
            ways.writerow((bits, group, scale, f"{report['bits_per_weight']:.4f}", report["bytes_after"],
                           f"{summed(matrices):.5f}", f"{max(m[3] for m in matrices):.5f}",
                           f"{cosine.mean():.6f}", f"{cosine.min():.6f}"))
            for name, _, own, error in matrices:
                each.writerow((bits, group, scale, name, f"{error:.6f}", own))
            whole.flush()
            return report["bytes_after"], summed(matrices), cosine.mean()

        dense, uniform = None, {4: [], 3: []}
        for bits in (8, 4, 3):
            for scale in ("absmax", "mse"):
                for group in GROUPS + ("auto", "auto, zero points"):
                    arguments = (("--group", "auto", *(("--asymmetric",) if "zero" in group else ()))
                                 if "auto" in group else group_arguments(group, bits))
                    size, error, cosine = measure(bits, group, scale, "--bits", str(bits), *arguments)
                    if "auto" in group or bits == 8 or scale == "absmax":
                        continue
                    if dense is None:
                        dense = sum(t.nbytes for t in tensors.values()) - sum(
                            tensors[name + ".weight"].nbytes for name in minilm.linear_shapes())
                    uniform[bits].append((size, error, cosine))
                    row = [bits, group, size, f"{error:.5f}", f"{cosine:.6f}"]
                    for way in EQUAL.values():
                        out, report, matrices = quantize("--budget", str(size + dense), *way(bits))
                        mine = (daemon.embed(out, tensors, tokens) * truth).sum(1).mean()
                        row += [report["bytes_after"], f"{summed(matrices):.5f}", f"{mine:.6f}"]
                    equal.writerow(row)
                    even.flush()
        for bits, same in uniform.items():
            for alpha in ALPHAS:
                for loss in ("squares", "error"):
                    out, report, matrices = quantize("--bits", str(bits), "--alpha", alpha, "--minimize", loss)
                    cosine = (daemon.embed(out, tensors, tokens) * truth).sum(1).mean()
                    size, error = report["bytes_after"], summed(matrices)
                    theirs = interpolated(same, size)
                    by_alpha.writerow((bits, alpha, loss, f"{report['bits_per_weight']:.4f}", size,
                                       f"{error:.5f}", f"{theirs[0]:.5f}", f"{1 - error / theirs[0]:.2%}",
                                       f"{cosine:.6f}", f"{theirs[1]:.6f}"))
                    alphas.flush()
        for width in ("3.3", "3.5", "4.0", "4.25", "4.5", "5.0", "6.0"):
            measure("mixed", "auto", "mse", "--bits-per-weight", width)
        daemon.stop()
        for file in (whole, parts, even, alphas):
            file.close()


# ---- outliers ---------------------------------------------------------------------------------------

MATRICES, SPOILT, ROWS, COLUMNS = 96, (11, 37, 52, 90), 128, 2048


def planted():
    random = np.random.default_rng(4_288)  # four of 288 matrices were to blame in the paper
    clean = {f"layers.{i // 6}.part{i % 6}.weight": random.normal(0, 0.02, (ROWS, COLUMNS)).astype(np.float16)
             for i in range(MATRICES)}
    spoilt = {name: array.copy() for name, array in clean.items()}
    for i in SPOILT:
        for column in random.integers(COLUMNS, size=2):
            spoilt[f"layers.{i // 6}.part{i % 6}.weight"][:, column] = 0.02 * 40 * random.choice((-1, 1), ROWS)
    return clean, spoilt


def run_outliers(options):
    command = "bench/quantizer-evidence.py outliers"
    clean, spoilt = planted()
    with tempfile.TemporaryDirectory() as work:
        for name, weights in (("clean", clean), ("spoilt", spoilt)):
            write_checkpoint(os.path.join(work, name), weights)
        file, rows = table(options.results, "quantizer-outliers.csv", command,
                           ("bits", "what", "bytes", "more_bytes", "summed_error", "error_of_the_spoilt",
                            "recovered", "refined", "refined_of_the_spoilt"))
        even, equal = table(options.results, "quantizer-outliers-equal-bytes.csv", command,
                            ("bits", "uniform_group", "uniform_bytes", "uniform_error",
                             *(f"{what}_{way}" for way in EQUAL for what in ("bytes", "error"))))
        names = {f"layers.{i // 6}.part{i % 6}" for i in SPOILT}
        quantize, intact = (Quantizer(options.build, os.path.join(work, name), outs)
                            for name, outs in (("spoilt", tempfile.mkdtemp(dir=work)),
                                               ("clean", tempfile.mkdtemp(dir=work))))
        for bits in (4, 3):
            base = summed(intact("--bits", str(bits), "--group", "channel")[2])
            rows.writerow((bits, "without outliers, channel", "", "", f"{base:.5f}", "", "", "", ""))
            first = None
            ways = [("channel", ("--group", "channel")), ("auto (alpha 0.075)", ()),
                    ("auto, alpha 0.02", ("--alpha", "0.02"))]
            for what, arguments in ways + [(f"group {g}", ("--group", g)) for g in
                                           ("1024", "256", "128", "64", "32", "16")]:
                _, report, matrices = quantize("--bits", str(bits), *arguments)
                size, error = report["bytes_after"], summed(matrices)
                first = first or (size, error)
                refined = {m[0] for m in matrices if m[2] != "channel"}
                rows.writerow((bits, what, size, f"{size / first[0] - 1:.2%}", f"{error:.5f}",
                               f"{np.mean([m[3] for m in matrices if m[0] in names]):.4f}",
                               f"{(first[1] - error) / (first[1] - base):.2%}", len(refined),
                               len(refined & names)))
                if what.startswith("auto"):
                    continue
                row = [bits, what.split()[-1] if what != "group 1024" else "K/2", size, f"{error:.5f}"]
                for way in EQUAL.values():
                    _, report, matrices = quantize("--budget", str(size), *way(bits))
                    row += [report["bytes_after"], f"{summed(matrices):.5f}"]
                equal.writerow(row)
        file.close()
        even.close()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("minilm", "outliers"))
    parser.add_argument("model", nargs="?")
    parser.add_argument("--build", default=os.path.join(TOP, "build"))
    parser.add_argument("--results", default=os.path.join(TOP, "bench", "results"))
    options = parser.parse_args()
    if options.what == "minilm" and not options.model:
        parser.error("minilm needs the directory of the model")
    (run_minilm if options.what == "minilm" else run_outliers)(options)


if __name__ == "__main__":
    main()
