# SPDX-License-Identifier: Apache-2.0
"""tests/python/wire.py, a client written from PROTOCOL.md alone, against a real daemon."""
import os
import subprocess
import sys

import numpy as np
from harness import BACKEND, Daemon, Matrix, main, write_checkpoint

WIRE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "python", "wire.py")


def a_client_from_the_document_alone_gets_the_right_result(directory):
    random = np.random.default_rng(11)
    matrices = {"layer.four": Matrix(random, 96, 256, 4, 64, True, bias=True),
                "layer.three": Matrix(random, 64, 128, 3, 32, False)}
    path = write_checkpoint(os.path.join(directory, "m"), matrices)
    daemon = Daemon(directory, models=[("m", path)], backend=BACKEND)
    for name in matrices:
        done = subprocess.run([sys.executable, WIRE, daemon.socket, "m", name, path], check=False,
                              capture_output=True, text=True, timeout=120)
        print(done.stdout, end="")
        assert done.returncode == 0, (name, done.returncode, done.stderr)
    daemon.stop()


if __name__ == "__main__":
    main([a_client_from_the_document_alone_gets_the_right_result])
