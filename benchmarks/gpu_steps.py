"""`python -m onebit.benchmarks.gpu_steps`: the kernels of 1-bit Adam's step alone; under torchrun, whole steps.

Alone, each kernel is compared with separate torch operations, element for element. Under torchrun OnebitAdam is timed
beside torch's fused AdamW, with and without NCCL's average of the gradients; parameters must be bit-equal on all ranks,
and with sharded state equal to those with replicated state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch.distributed as dist

from onebit.benchmarks.gpu_run import Place, flags_of, leave, report
from onebit.benchmarks.gpu_timing import MI
from onebit.benchmarks.row import Row
from onebit.benchmarks.step_kernels import step_kernels
from onebit.benchmarks.whole_steps import whole_steps


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Ends the process: 0: everything was right; 1: something was wrong."""
    flags = flags_of("gpu_steps", __doc__)
    flags.add_argument(
        "--per-node", type=int, default=1, help="OnebitAdam is timed on two levels, too, of nodes of so many ranks"
    )
    options = flags.parse_args(arguments)
    place = Place.taken()
    rows: list[Row] = []
    memory: dict[str, object] = {}
    if place.ranks == 1:
        rows = step_kernels(options.mega * MI, place.device, options.iters)
    else:
        dist.init_process_group("nccl", device_id=place.device)
        for name, shapes in (("", [(options.mega * MI,)]), (" BERT-Large", bert_large())):
            more, figures = whole_steps(name, shapes, place.device, options.iters, options.per_node)
            rows += more
            memory[name.strip() or "one tensor"] = figures
    if place.rank == 0:
        name = "step-kernels" if place.ranks == 1 else f"steps-{place.ranks}"
        report(name, place.ranks, options.iters, rows, options.output, memory=memory)
    leave(rows)


def bert_large() -> list[tuple[int, ...]]:
    """The 385 tensors of BERT-Large's word embeddings and 24 layers (Devlin et al. 2019, arXiv 1810.04805)."""
    hidden, wide = 1024, 4096
    square, vector = (hidden, hidden), (hidden,)
    layer = [*[square, vector] * 4, vector, vector, (wide, hidden), (wide,), (hidden, wide), vector, vector, vector]
    return [(30522, hidden), *layer * 24]


if __name__ == "__main__":
    main()
