"""One rank that makes an average with mode="auto", and writes down what was measured and chosen.

python -m tests.comm.tuned_rank --backend=gloo --init_method=file:///shared/file --numel=N --output=FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from onebit.benchmarks.__main__ import leave
from onebit.benchmarks.group import join
from onebit.comm import CompressedAllreduce, tune
from onebit.compress import SignCodec


def main() -> int:
    flags = argparse.ArgumentParser()
    flags.add_argument("--backend")
    flags.add_argument("--init_method")
    flags.add_argument("--interface")
    flags.add_argument("--numel", type=int)
    flags.add_argument("--kernels")
    flags.add_argument("--output", type=Path)
    options = flags.parse_args()
    torch.set_num_threads(1)
    backend = join(options.backend, options.init_method)
    tensor, codec = torch.ones(options.numel), SignCodec(kernels=options.kernels)
    average = CompressedAllreduce(tensor, backend, codec, mode="auto")
    average(tensor)
    measured = tune(backend, codec=codec)
    outcome = {"modes": list(average.modes), "measured": str(measured), "right": bool((tensor == 1.0).all())}
    (options.output / f"{os.environ['RANK']}.json").write_text(json.dumps(outcome))
    backend.barrier()
    return 0


if __name__ == "__main__":
    sys.exit(leave(main()))
