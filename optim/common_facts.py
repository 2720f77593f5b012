"""What ranks must have in common to make steps together, compared before the first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from onebit.comm import agree
from onebit.comm.ddp import unattached
from onebit.comm.levels import local_group_fact
from onebit.comm.tensors import describe
from onebit.compress import InputError
from onebit.optim.refusals import refused_devices
from onebit.optim.replicas import checksums

if TYPE_CHECKING:
    from onebit.optim.base import CompressedOptimizer


def agree_to_start(optimizer: CompressedOptimizer, refusal: InputError | None) -> None:
    """Prove that all ranks hold the same parameters, values included, and the same options; collective.

    Args:
        refusal: an error that this rank has found in its own gradients, raised here where nothing worse is; all ranks
            hear of it.

    Raises:
        MismatchError: ranks differ, or another one refuses; on every rank.
        InputError: this rank refuses.
    """
    refusal = refused_devices(optimizer) or unattached(optimizer) or refusal
    facts = _common_facts(optimizer) if optimizer.backend.size > 1 and refusal is None else {}
    agree(optimizer.backend, f"{type(optimizer).__name__}.step", facts, refusal)


def _common_facts(optimizer: CompressedOptimizer) -> dict[str, str]:
    """Options, and the forms and values of all parameters, each with what a message calls it."""
    facts = {"the codec": str(optimizer._codec), "bucket_mb": str(optimizer._bucket_size())}
    facts.update({"local_group": local_group_fact(optimizer._local_group)})
    facts.update({"shard": str(optimizer._shard)})
    facts.update({"check_every": str(optimizer._check_every), "overlap": str(optimizer._overlap is not None)})
    for g, group in enumerate(optimizer.param_groups):
        facts[f"the number of parameters of group {g}"] = str(len(group["params"]))
        for key, value in group.items():
            if key != "params":
                facts[f"option {key} of group {g}"] = str(value.tolist() if isinstance(value, Tensor) else value)
        for i, p in enumerate(group["params"]):
            facts[f"parameter {i} of group {g}"] = describe(p)
    for g, group in enumerate(optimizer.param_groups):
        sums = checksums([optimizer._common_value(p) for p in group["params"]])
        for i, found in enumerate(sums):
            facts[f"the values of parameter {i} of group {g} (onebit.comm.broadcast makes them equal)"] = found
    return facts
