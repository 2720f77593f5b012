"""What ranks must have in common to make steps together, compared before the first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from onebit.comm import agree
from onebit.comm.ddp import unattached
from onebit.comm.levels import local_group_fact
from onebit.comm.tensors import describe
from onebit.compress import InputError
from onebit.optim.local_steps import RATE
from onebit.optim.refusals import refused_devices
from onebit.optim.replicas import checksums
from onebit.optim.state_keys import ALWAYS, PER_RANK_IN_INTERVAL, SHAPED

if TYPE_CHECKING:
    from onebit.optim.base import CompressedOptimizer


def agree_to_start(optimizer: CompressedOptimizer, refusal: InputError | None) -> None:
    """Prove that all ranks hold the same parameters, values and states included, and the same options; collective.

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
    states = {}
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            name = f"parameter {i} of group {g} (load one rank's moments, or one checkpoint, on all ranks)"
            states[name] = optimizer.state.get(p, {})
    return facts | state_facts(states, optimizer._shard)


def state_facts(states: Mapping[str, Mapping[str, Any]], sliced: bool) -> dict[str, str]:
    """What all ranks must have in common of the states of parameters.

    Args:
        states: of parameters, by what a message calls them.
        sliced: what is shaped as a parameter may be a slice of it, each rank's its own.
    """
    facts: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, state in states.items():
        apart = SHAPED if sliced else PER_RANK_IN_INTERVAL if RATE in state else frozenset()
        for key in sorted((ALWAYS & state.keys()) - apart):
            if isinstance(state[key], Tensor):
                tensors[f"{key} of {name}"] = state[key]
            else:
                facts[f"{key} of {name}"] = str(state[key])
    return {**facts, **dict(zip(tensors, checksums(list(tensors.values())), strict=True))}
