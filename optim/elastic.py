"""The states of n ranks become one of m ranks, and what the n had not told each other yet is kept."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onebit.comm import Residual
from onebit.compress import InputError
from onebit.optim.local_steps import MEAN, RATE
from onebit.optim.merging import merged
from onebit.optim.state_keys import EXTRA, LEFT_OUT_STEPS, MOMENTUM, OPTIMIZER, PER_RANK_IN_INTERVAL, RESIDUALS, STEP

_log = logging.getLogger(__name__)

State = Mapping[str, Any]


def reshard(
    states: Sequence[State], rank: int, world_size: int, *, node: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Return the state with which a rank of `world_size` ranks goes on from the states of all ranks that there were.

    Conserved is what the next average would have made of it:

    * error feedback: every rank gets the mean of the workers', and its part of the servers'; see `Residual.reshard`.
      With `local_group` a node takes the place of a rank, in the old states, the new one or both; as many as before
      keep their workers' own. One rank, or one node, compresses nothing, so it gets it as momentum: e/β₁ more, and its
      next momentum, β₁·m + (1-β₁)·g, is the average that the ranks owe, to the last bit of fp32. (β₁ = 0 has no
      momentum to keep it in: then it is dropped.) Ranks that were one have none.
    * the slices of ``shard=True`` are put together; an optimizer that has slices cuts its own from the whole.
    * an interval of local steps, in which momenta differ by rank: every rank gets the mean of the momenta and of their
      means over the interval, which is what the ranks would have agreed on at its end. Its end stays where it was.

    Rank 0 says so in the log, once.

    Args:
        states: ``state_dict()`` of every old rank, in their order; not changed, and shares tensors with the result.
        rank, world_size: the new rank, and how many there are.
        node: with `local_group`, the new rank's node, counted from 0, and how many nodes there are; None: every rank is
            one by itself.

    Returns:
        What the optimizer of this rank can load. Of what each rank counts by itself it has the counts of the old rank
        of its number.

    Raises:
        InputError: ranks are missing, out of order, or the states are of different steps, parameters or optimizers.
    """
    if not 0 <= rank < world_size:
        raise InputError(f"reshard: rank must be in [0, world_size), got {rank} of {world_size}")
    place, places = (rank, world_size) if node is None else node
    _check_one_run(states)
    states = merged(states)
    extras = [state[EXTRA] for state in states]
    residuals, stay = [], True
    for g in range(len(states[0]["param_groups"])):
        feedback = [extra[RESIDUALS][g] for extra in extras]
        _check_order(g, feedback)
        if len(feedback[0]) == 1:
            residuals.append(feedback[0])
        else:
            residuals.append(_of_place(feedback, place, places))
            stay = stay and feedback[0]["world_size"] == places
    extra = dict(extras[min(rank, len(extras) - 1)])
    if rank >= len(extras) and LEFT_OUT_STEPS in extra:
        extra[LEFT_OUT_STEPS] = 0
    state = {**states[0], "state": _common(states), EXTRA: {**extra, RESIDUALS: residuals}}
    dropped = places == 1 and _take_as_momentum(state)
    if rank == 0 and not (stay and world_size == len(states)):
        none = all(len(one) == 1 for one in extras[0][RESIDUALS])
        _log.warning("%s", _report(len(states), world_size, places, _Fate(none, stay, dropped)))
    return state


def _check_one_run(states: Sequence[State]) -> None:
    """Raise InputError unless the states are of the same step of the same run."""
    if not states:
        raise InputError("reshard: there is no state; give those of all ranks")
    for rank, state in enumerate(states):
        for g, (group, first) in enumerate(zip(state["param_groups"], states[0]["param_groups"], strict=True)):
            if group.get(STEP) != first.get(STEP):
                raise InputError(
                    f"reshard: in group {g} rank {rank} has made {group.get(STEP)} steps and rank 0 {first.get(STEP)}: "
                    "the states are of different saves; take those of one"
                )
        if EXTRA not in state:
            raise InputError(f"reshard: the state of rank {rank} is not one of a compressed optimizer")
        writer, writer_of_first = state[EXTRA].get(OPTIMIZER), states[0][EXTRA].get(OPTIMIZER)
        if writer != writer_of_first:
            raise InputError(
                f"reshard: the state of rank {rank} was written by {writer} and that of rank 0 by {writer_of_first}; "
                "take those of one save"
            )
        if {i: entry.keys() for i, entry in state["state"].items()} != {
            i: entry.keys() for i, entry in states[0]["state"].items()
        }:
            raise InputError(
                f"reshard: the states of ranks {rank} and 0 have different entries; take those of one save"
            )


def _check_order(g: int, feedback: Sequence[Mapping[str, Any]]) -> None:
    for rank, one in enumerate(feedback):
        Residual.check(one)
        nodes = one.get("world_size", len(feedback)) < len(feedback)  # then `Residual.reshard` sees that all are there
        if len(one) != len(feedback[0]) or (not nodes and one.get("rank", rank) != rank):
            raise InputError(
                f"reshard: in place {rank} of {len(feedback)} is the error feedback of rank {one.get('rank')} for "
                f"group {g}; give one state of every rank, in their order"
            )


def _common(states: Sequence[State]) -> dict[int, dict[str, Any]]:
    """What is kept of every parameter: rank 0's, and in an interval of local steps the mean of what differs."""
    entries = {index: dict(entry) for index, entry in states[0]["state"].items()}
    for index, entry in entries.items():
        if RATE in entry:
            for key in PER_RANK_IN_INTERVAL:
                entry[key] = _mean([state["state"][index][key] for state in states])
    return entries


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor in tensors:
        total += tensor
    return (total / len(tensors)).float()


def _take_as_momentum(state: dict[str, Any]) -> bool:
    """Turn error feedback into momentum, for one rank that has no use for it; whether some was dropped instead."""
    dropped = False
    for g, group in enumerate(state["param_groups"]):
        feedback, beta1 = state[EXTRA][RESIDUALS][g], group["betas"][0]
        state[EXTRA][RESIDUALS][g] = {"version": feedback["version"]}
        if len(feedback) == 1:
            continue
        if beta1 == 0:
            dropped = True
            continue
        entries = [state["state"][i] for i in group["params"] if state["state"].get(i)]
        owed = torch.split(_whole(feedback), list(feedback["numels"]))
        for entry, rest in zip(entries, owed, strict=True):
            rest = rest.view(entry[MOMENTUM].shape).to(entry[MOMENTUM].device)
            entry[MOMENTUM] = entry[MOMENTUM] + rest / beta1
            if MEAN in entry:  # the next mean is (1-w)·a + w·(β₁·m + ...), so both terms need it
                entry[MEAN] = entry[MEAN] + rest
    return dropped


def _whole(feedback: Mapping[str, Any]) -> Tensor:
    """(sum of numels,) fp32: what a resharded state adds to the next average, of the workers and of the servers."""
    owed: Tensor = feedback["worker"].clone()
    starts = torch.tensor([0, *feedback["numels"]]).cumsum(0).tolist()
    at = 0
    for tensor, offset, numel in feedback["server_spans"].tolist():
        first = starts[tensor] + offset
        owed[first : first + numel] += feedback["server"][at : at + numel]
        at += numel
    return owed


def _of_place(feedback: Sequence[Mapping[str, Any]], place: int, places: int) -> dict[str, Any]:
    """The error feedback of a rank, or node, among `places`; where there were as many each keeps its workers' own."""
    old = feedback[0]["world_size"]
    if all(one["server"].numel() == sum(one["numels"]) for one in feedback):  # made anew: all of a node have the same
        feedback = list({one["rank"]: one for one in feedback}.values())
    made = Residual.reshard(feedback, places)[place]
    if old != places:
        return made
    own = [one["worker"].view(torch.int32) for one in feedback if one["rank"] == place]
    worker = own[0].clone()
    for other in own[1:]:  # slices of a node: where one has something the others have zeros, so every bit is kept
        worker |= other
    return {**made, "worker": worker.view(torch.float32)}


class _Fate(NamedTuple):
    """What has become of error feedback: there was none; every rank or node keeps its own; some was dropped."""

    none: bool
    stays: bool
    dropped: bool


def _report(old: int, new: int, places: int, fate: _Fate) -> str:
    nodes = "" if places == new else f" in {places} node{'s' * (places > 1)}"
    said = f"a checkpoint of {old} rank{'s' * (old > 1)} goes on with {new}{nodes}: "
    if fate.none:
        return said + f"{'one rank has' if old == 1 else 'there was'} no error feedback, so it starts at 0"
    if fate.stays:
        return said + "every node keeps its error feedback"
    if places > 1:
        who = "every node has" if nodes else "every rank has"
        return said + f"{who} the mean of the workers' error feedback and its part of the servers'"
    if fate.dropped:
        return said + "error feedback of groups with betas[0] = 0 is dropped, as they have no momentum to keep it in"
    one = "one node" if nodes else "one rank"
    return said + f"{one} compresses nothing, so the error feedback is now part of the momentum"
