"""What NCCL's own average takes if it is cut over several process groups, beside ours: over sockets both gain by it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from onebit.benchmarks.case import Case, Setting
from onebit.benchmarks.collectives import Exchange, beside
from onebit.comm.striping import MOST


@dataclass
class Parts(Exchange):
    """parts: views of `tensor`, each with the process group that sums it."""

    parts: tuple[tuple[Tensor, Any], ...] = ()


def _inputs(setting: Setting) -> Parts:
    given = setting.normal()
    tensor = given.clone()
    return Parts(setting, given, tensor, parts=tuple((part, dist.new_group()) for part in tensor.tensor_split(MOST)))


def _run(state: Parts) -> None:
    works = [dist.all_reduce(part, group=group, async_op=True) for part, group in state.parts]
    for work in works:
        assert work is not None
        work.wait()


GROUPS: tuple[Case[Any], ...] = (
    beside("group", "all_reduce"),
    beside("group", "all_reduce-bf16"),
    replace(
        beside("group", "all_reduce"),
        name="group-all_reduce-split",
        summary=f"all_reduce of a part of the tensor in each of {MOST} process groups at once",
        role="several groups",
        inputs=_inputs,
        run=_run,
    ),
    beside("group", "compressed", "several groups"),
)
