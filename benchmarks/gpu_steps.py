"""`python -m onebit.benchmarks.gpu_steps`: the kernels of 1-bit Adam's step alone; under torchrun, whole steps.

Alone, each kernel is compared with separate torch operations, element for element. Under torchrun OnebitAdam is timed
beside torch's fused AdamW, with and without NCCL's average of the gradients; parameters must be bit-equal on all ranks,
and with sharded state equal to those with replicated state.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from onebit.benchmarks import record
from onebit.benchmarks.gpu_timing import report
from onebit.benchmarks.row import Row
from onebit.benchmarks.step_kernels import step_kernels
from onebit.benchmarks.whole_steps import whole_steps

MI = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """0: everything was right; 1: something was wrong."""
    flags = argparse.ArgumentParser(prog="python -m onebit.benchmarks.gpu_steps", description=__doc__)
    flags.add_argument("--output", type=Path, default=record.default_folder(), help="folder for the JSON results")
    flags.add_argument("--mega", type=int, default=300, help="Mi elements of the one tensor")
    flags.add_argument("-n", "--iters", type=int, default=15, help="timed rounds")
    flags.add_argument(
        "--per-node", type=int, default=1, help="OnebitAdam is timed on two levels, too, of nodes of so many ranks"
    )
    options = flags.parse_args(arguments)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    rows: list[Row] = []
    memory: dict[str, object] = {}
    if ranks == 1:
        rows = step_kernels(options.mega * MI, device, options.iters)
    else:
        dist.init_process_group("nccl", device_id=device)
        for name, shapes in (("", [(options.mega * MI,)]), (" BERT-Large", bert_large())):
            more, memory[name.strip() or "one tensor"] = whole_steps(
                name, shapes, device, options.iters, options.per_node
            )
            rows += more
    wrong = sum(row.wrong or 0 for row in rows)
    if int(os.environ.get("RANK", "0")) == 0:
        name = "step-kernels" if ranks == 1 else f"steps-{ranks}"
        report(name, ranks, options.iters, rows, options.output, memory=memory)
    sys.stdout.flush()
    os._exit(min(wrong, 1))  # as in onebit.benchmarks.gpu


def bert_large() -> list[tuple[int, ...]]:
    """The 385 tensors of BERT-Large's word embeddings and 24 layers (Devlin et al. 2019, arXiv 1810.04805)."""
    hidden, wide = 1024, 4096
    square, vector = (hidden, hidden), (hidden,)
    layer = [*[square, vector] * 4, vector, vector, (wide, hidden), (wide,), (hidden, wide), vector, vector, vector]
    return [(30522, hidden), *layer * 24]


if __name__ == "__main__":
    sys.exit(main())
