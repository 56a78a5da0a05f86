#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Files that the gguf package writes, and blocks that it quantizes, through our reader: every weight is
the float value that it dequantizes.  Runs where gguf can be imported:
    make check PYTHON3=VENV/bin/python TESTS=tests/python/test-gguf.py"""
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import formats  # noqa: E402

try:
    import gguf
except ImportError as missing:
    print(f"SKIP: {missing}")
    sys.exit(77)

PROGRAM = os.path.join(os.environ.get("top_builddir", "."), "finequant-quantize")
Q4, Q8 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0


def main():
    random = np.random.default_rng(2)
    kinds = {"blk.0.attn_q.weight": Q4, "blk.0.attn_k.weight": Q8, "output.weight": Q4}
    with tempfile.TemporaryDirectory() as work:
        path, out = os.path.join(work, "m.gguf"), os.path.join(work, "out")
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(1)
        writer.add_embedding_length(128)
        writer.add_token_list(["<s>", "a", "é"])
        norm = random.standard_normal(128).astype(np.float32)
        writer.add_tensor("blk.0.attn_norm.weight", norm)
        expected = {}
        for name, kind in kinds.items():
            blocks = gguf.quants.quantize(random.standard_normal((40, 128)).astype(np.float32), kind)
            expected[name] = gguf.quants.dequantize(blocks, kind)
            writer.add_tensor(name, blocks, raw_dtype=kind)
        # experts: a stack of two matrices
        blocks = gguf.quants.quantize(random.standard_normal((2, 8, 64)).astype(np.float32), Q4)
        writer.add_tensor("blk.0.ffn_up_exps.weight", blocks, raw_dtype=Q4)
        for e in range(2):
            expected[f"blk.0.ffn_up_exps.{e}.weight"] = gguf.quants.dequantize(blocks, Q4)[e]
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        subprocess.run([PROGRAM, "convert", path, out, "--quiet"], check=True)
        config, tensors = formats.read_checkpoint(out)
        assert config["hidden_size"] == 128 and config["model_type"] == "llama", config
        assert np.array_equal(tensors["blk.0.attn_norm.weight"], norm)
        negative = 0
        for name, values in expected.items():
            module = name[:-len(".weight")]
            assert np.array_equal(formats.dequantize(config, tensors, module), values.astype(float)), name
            negative += int((tensors[f"{module}.weight_scale"] < 0).sum())
        assert negative > 0  # the package's Q4_0 takes the sign of the extreme
    print(f"ok {len(expected)} matrices, {negative} negative scales, gguf {version('gguf')}")


if __name__ == "__main__":
    sys.exit(main())
