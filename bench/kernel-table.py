#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times of the CUDA kernels beside a plain read of the same bytes and cuBLAS, as CSV.

    kernel-table.py KERNEL_TIMES OUT.csv

KERNEL_TIMES is the program of bench/kernel-times.c.  Needs PyTorch and Triton.  read_us is the
median time of reading as many bytes as the GEMM must move (weights, X and Y once), cublas_us that
of torch's fp16 or bf16 product with the dense matrix; both as replays of a CUDA graph that goes
round buffers of more than 512 MiB.
"""
import os
import statistics
import subprocess
import sys

import torch
import triton
import triton.language as tl

SHAPES = [(12288, 12288)]
KINDS = [(4, 64, "f16"), (4, 64, "bf16"), (8, 64, "f16"), (3, 64, "f16"), (4, 16, "f16"),
         (4, 128, "f16"), (4, 12288, "f16")]
ROWS = [1, 4, 16, 32, 64, 128, 256, 1024, 2048]
ROTATE = 512 << 20


@triton.jit
def read_kernel(source, out, count, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(source + at, mask=at < count, other=0)
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


def graph_us(calls, repeat=9):
    """Median time of one of `calls`, which are captured into one graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    samples = []
    for _ in range(repeat + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(samples[2:])


def read_us(count_bytes, buffer, out):
    count = count_bytes // 4
    step = (count + 1023) // 1024 * 1024
    places = max(1, buffer.numel() // step)
    grid = (132 * 8,)
    return graph_us([lambda i=i: read_kernel[grid](buffer[i % places * step:], out, count,
                                                   BLOCK=4096) for i in range(max(places, 8))])


def cublas_us(n, k, m, dtype):
    kind = torch.float16 if dtype == "f16" else torch.bfloat16
    copies = ROTATE // (n * k * 2) + 1
    weights = [torch.randn(n, k, device="cuda", dtype=kind) for _ in range(copies)]
    x = torch.randn(m, k, device="cuda", dtype=kind)
    y = torch.empty(m, n, device="cuda", dtype=kind)
    return graph_us([lambda w=w: torch.mm(x, w.t(), out=y) for w in weights * 3])


def main():
    program, path = sys.argv[1:3]
    rows = [int(m) for m in os.environ.get("ROWS", "").split()] or ROWS
    kinds = KINDS[:int(os.environ.get("KINDS", len(KINDS)))]
    buffer = torch.randint(1 << 30, (1 << 28,), device="cuda", dtype=torch.int32)
    out = torch.empty(132 * 8, device="cuda", dtype=torch.int32)
    dense = {}
    with open(path, "w", encoding="utf-8") as table:
        table.write(f"# {torch.cuda.get_device_name()}: bench/kernel-table.py KERNEL_TIMES "
                    "kernels-h200.csv\n")
        table.write("bits,group,zero,dtype,n,k,m,us,read_us,cublas_us,err\n")
        for n, k in SHAPES:
            for bits, group, dtype in kinds:
                command = [program, n, k, bits, group, dtype, *rows]
                lines = subprocess.run([str(word) for word in command], check=True, text=True,
                                       stdout=subprocess.PIPE).stdout.splitlines()
                for line in lines:
                    m, us, size, error = line.split()
                    m = int(m)
                    moved = int(size) + 2 * m * (n + k)
                    if (n, k, m, dtype) not in dense:
                        dense[n, k, m, dtype] = cublas_us(n, k, m, dtype)
                    row = (f"{bits},{group},0,{dtype},{n},{k},{m},{us},"
                           f"{read_us(moved, buffer, out):.2f},{dense[n, k, m, dtype]:.2f},{error}")
                    table.write(row + "\n")
                    table.flush()
                    print(row, flush=True)


if __name__ == "__main__":
    main()
