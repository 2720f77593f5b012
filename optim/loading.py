"""What a state must look like to be taken over; looked at as a whole before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from onebit.comm import Residual
from onebit.compress import InputError
from onebit.optim.local_steps import RATE, START
from onebit.optim.merging import slice_sizes
from onebit.optim.state_keys import (
    ADAM,
    COUNTS,
    DECOUPLED,
    EXTRA,
    FLOATS,
    FORMAT,
    INTERVAL,
    LEFT_OUT_STEPS,
    MASTER,
    OPTIMIZER,
    RESIDUALS,
    SCALARS,
    SHAPED,
    SKIPPED_STEPS,
    SLICES,
    STEP,
    VARIANCE_STEP,
    VERSION,
)

_MODE = "adamw_mode"

REMEDY = "it was changed, damaged, or made by something else; nothing was loaded"


def check_state(
    owner: str,
    state_dict: Any,
    groups: Sequence[Mapping[str, Any]],
    own_keys: Collection[str],
    check_options: Callable[[Mapping[str, Any]], None],
) -> None:
    """Raise InputError unless an optimizer can take this state over.

    Args:
        owner: the optimizer's name, for messages.
        state_dict: anything.
        groups: the optimizer's parameter groups.
        own_keys: what it keeps of a parameter beside Adam's state.
        check_options: raises for options of a group that are out of range; those not saved stay as they are.
    """
    _refuse_deepspeed(owner, state_dict)
    extra = state_dict.get(EXTRA) if isinstance(state_dict, Mapping) else None
    slices = extra.get(SLICES) if isinstance(extra, Mapping) else None
    version = extra.get(VERSION) if isinstance(extra, Mapping) else FORMAT
    if type(version) is not int or version != FORMAT:
        raise InputError(f"{owner} state has version {FORMAT}, got {version!r}")
    _check_groups(owner, state_dict, [group["params"] for group in groups])
    numels = []
    held = None
    if slices is not None:
        pairs = zip(state_dict["param_groups"], groups, strict=True)
        numbered = [dict(zip(saved["params"], group["params"], strict=True)) for saved, group in pairs]
        held = slice_sizes(slices, [{i: p for i, p in one.items() if state_dict["state"].get(i)} for one in numbered])
    for g, (saved, group) in enumerate(zip(state_dict["param_groups"], groups, strict=True)):
        # First, as an option that does not exist has a reason to tell.
        check_options({**group, **own_options(saved, group)})
        entries = [state_dict["state"].get(index, {}) for index in saved["params"]]
        for index, entry, p in zip(saved["params"], entries, group["params"], strict=True):
            shape = p.shape if held is None else torch.Size([held.get(index, 0)])
            _check_parameter(owner, index, entry, shape, own_keys)
        _check_progress(owner, g, saved, entries)
        numels.append([p.numel() for p, entry in zip(group["params"], entries, strict=True) if entry])
    if extra is not None:
        _check_extra(owner, extra, numels)


def own_options(saved: Mapping[str, Any], group: Mapping[str, Any]) -> Mapping[str, Any]:
    """A saved group, with the kind of weight decay that torch's Adam and AdamW tell under the name of this `group`."""
    if DECOUPLED in saved and _MODE in group and _MODE not in saved:
        return {**saved, _MODE: saved[DECOUPLED]}
    return saved


def refuse_slice(owner: str, state_dict: Mapping[str, Any]) -> None:
    """Raise InputError, with the way, for a state that `check_state` takes, but that is one rank's slice."""
    if SLICES in state_dict.get(EXTRA, {}):
        raise InputError(
            f"{owner}: the state to load is a rank's slice, as shard=True saves it, and this optimizer holds "
            "everything; onebit.optim.checkpoint.load and onebit.optim.sharded.load put the slices of all ranks "
            "together, and so does onebit.optim.elastic.reshard"
        )


def refuse_others(owner: str, state_dict: Any, algorithm: str | None = None) -> None:
    """Raise InputError, with the way, for the state of another compressed optimizer.

    Args:
        owner: the optimizer's name, for messages.
        state_dict: anything.
        algorithm: whose states it takes, as they are named there; None: those of none, as it compresses nothing.
    """
    extra = state_dict.get(EXTRA) if isinstance(state_dict, Mapping) else None
    if extra is None:
        return
    writer = extra.get(OPTIMIZER, algorithm) if isinstance(extra, Mapping) else algorithm
    if algorithm is None or type(writer) is not str or writer != algorithm:
        what = writer if type(writer) is str else "a compressed optimizer"
        whose = f"{algorithm}'s or torch's" if algorithm else "Adam's"
        raise InputError(
            f"{owner}: the state to load was written by {what}, expected {whose}: another algorithm has other options "
            f"and uses for its moments, and error feedback would be lost; load it into {what}. docs/migration.md has "
            "from_deepspeed(saved, optimizer), which takes its moments alone; nothing was loaded"
        )


def _refuse_deepspeed(owner: str, state_dict: Any) -> None:
    """Raise InputError, with the way, for the state of a 1-bit optimizer of DeepSpeed as it is."""
    entries = state_dict.get("state") if isinstance(state_dict, Mapping) else None
    for entry in entries.values() if isinstance(entries, Mapping) else ():
        if isinstance(entry, Mapping) and {"worker_error", "server_error"} & entry.keys():
            raise InputError(
                f"{owner}: the state to load is one of DeepSpeed's 1-bit optimizers (it has worker_error or "
                "server_error): its error feedback belongs to other blocks, its step is no tensor. docs/migration.md "
                "has from_deepspeed(saved, optimizer), which makes of it what load_state_dict takes; nothing was loaded"
            )


def _check_groups(owner: str, state_dict: Any, params: Sequence[Sequence[Tensor]]) -> None:
    """Raise InputError unless a state's parameter groups have the numbers of parameters that `params` has.

    Args:
        owner: the optimizer's name, for messages.
        state_dict: anything.
        params: the parameters of every group.
    """
    if not isinstance(state_dict, Mapping):
        raise InputError(f"{owner}: a state to load must be a dict, as of state_dict(), got {_kind(state_dict)}")
    for key, kind in (("state", Mapping), ("param_groups", (list, tuple))):
        if not isinstance(state_dict.get(key), kind):
            raise InputError(f"{owner}: the state to load has no {key!r}, or not as state_dict() makes it; {REMEDY}")
    groups = state_dict["param_groups"]
    for g, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            raise InputError(f"{owner}: group {g} of the state to load does not list its parameters; {REMEDY}")
    got, expected = [len(group["params"]) for group in groups], [len(group) for group in params]
    if len(got) != len(expected):
        raise InputError(
            f"{owner}: the state to load has a different number of parameter groups: {len(got)}, expected "
            f"{len(expected)}; make the optimizer with the groups that were saved"
        )
    if got != expected:
        raise InputError(
            f"{owner}: the groups of the state to load have {got} parameters, expected {expected}; make the optimizer "
            "with the parameters that were saved, in their order"
        )
    indices = [index for group in groups for index in group["params"]]
    if not all(type(index) is int for index in indices) or len(set(indices)) != len(indices):
        raise InputError(f"{owner}: the state to load does not number its parameters by different ints; {REMEDY}")
    unknown = [key for key in state_dict["state"] if key not in indices]
    if unknown:
        raise InputError(f"{owner}: the state to load has entries {unknown[:5]}, which are of no parameter; {REMEDY}")


def _check_parameter(owner: str, index: int, entry: Any, shape: torch.Size, own_keys: Collection[str]) -> None:
    """Raise InputError unless this can be the state of a parameter.

    Args:
        owner, index: the optimizer and the parameter's number, for messages.
        entry: anything.
        shape: of the parameter, or of this rank's slice of it.
        own_keys: what this optimizer keeps beside Adam's state.
    """
    where = f"{owner}: the state to load of parameter {index}"
    if not isinstance(entry, Mapping):
        raise InputError(f"{where} must be a dict, got {_kind(entry)}; {REMEDY}")
    if not entry:
        return
    needed = [
        *ADAM,
        *(_interval_keys(entry) if INTERVAL & entry.keys() else ()),
        *(SCALARS if SCALARS & entry.keys() else ()),
    ]
    lacking = [key for key in needed if key not in entry]
    if lacking:
        raise InputError(f"{where} lacks {', '.join(lacking)}; {REMEDY}")
    unknown = [str(key) for key in entry if key not in {*ADAM, VARIANCE_STEP, MASTER, *own_keys}]
    if unknown:
        raise InputError(f"{where} has {', '.join(unknown)}, of which {owner} knows nothing; leave them out")
    for key, value in entry.items():
        if key in FLOATS:
            fits = type(value) is float and 0 <= value < float("inf")
            expected = "a finite float of at least 0"
        elif key in SHAPED:
            fits = _is_plain(value) and value.shape == shape
            expected = f"floating point numbers of shape {tuple(shape)}"
        else:
            fits = _is_plain(value) and value.numel() == 1 and (key not in COUNTS or 0 <= float(value) < float("inf"))
            expected = "a tensor of one number" + (" of at least 0" if key in COUNTS else "")
        if not fits:
            raise InputError(f"{where} has {key} {_kind(value)}, expected {expected}; {REMEDY}")
    made, updated = float(entry[STEP]), float(entry.get(VARIANCE_STEP, entry[STEP]))
    if (made > 0) != (updated > 0):
        raise InputError(f"{where} has {made:g} steps and a variance that stands for {updated:g}; {REMEDY}")


def _check_progress(owner: str, g: int, group: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> None:
    """Raise InputError unless a group can have come as far as it says.

    Args:
        owner, g: the optimizer and the group's number, for messages.
        group: what is to be loaded, options of torch's own optimizers included.
        entries: the states of its parameters, each by itself checked.
    """
    step, at, history = group.get(STEP, 0), group.get("frozen_at"), group.get("freeze_history", ())
    for key, value in ((STEP, step), ("frozen_at", 0 if at is None else at)):
        if type(value) is not int or value < 0:
            raise InputError(f"{owner}: group {g} of the state to load has {key}={value!r}, expected an int; {REMEDY}")
    if not _is_history(history):
        raise InputError(f"{owner}: group {g} of the state to load has a freeze_history of another form; {REMEDY}")
    odd = [key for key, value in group.items() if isinstance(value, Tensor) and value.layout != torch.strided]
    if odd:
        raise InputError(f"{owner}: group {g} of the state to load has {odd[0]} as a sparse tensor; {REMEDY}")
    if len({RATE in entry for entry in entries if entry}) > 1:
        raise InputError(
            f"{owner}: in group {g} of the state to load some parameters are between synchronisations and others are "
            f"not; {REMEDY}"
        )


def _check_extra(owner: str, extra: Any, numels: Sequence[Sequence[int]]) -> None:
    """Raise InputError unless this can be what a state has beside that of torch's own optimizers.

    Args:
        owner: the optimizer's name, for messages.
        extra: anything.
        numels: per group the sizes of the parameters that have a state, whose average the error feedback belongs to.
    """
    known = {VERSION, OPTIMIZER, SKIPPED_STEPS, LEFT_OUT_STEPS, RESIDUALS, SLICES}
    if not isinstance(extra, Mapping) or not {VERSION, SKIPPED_STEPS, RESIDUALS} <= extra.keys() <= known:
        raise InputError(f"{owner}: the state to load lacks, or has more than, {', '.join(sorted(known))}; {REMEDY}")
    for key in (SKIPPED_STEPS, LEFT_OUT_STEPS):
        if type(extra.get(key, 0)) is not int or extra.get(key, 0) < 0:
            raise InputError(f"{owner}: the state to load has {key}={extra[key]!r}, expected an int; {REMEDY}")
    residuals = extra[RESIDUALS]
    if not isinstance(residuals, (list, tuple)) or len(residuals) != len(numels):
        raise InputError(f"{owner}: the state to load must have error feedback for {len(numels)} groups; {REMEDY}")
    for g, (residual, expected) in enumerate(zip(residuals, numels, strict=True)):
        Residual.check(residual)
        if "numels" in residual and list(residual["numels"]) != list(expected):
            raise InputError(
                f"{owner}: the error feedback to load for group {g} is of tensors with {list(residual['numels'])} "
                f"elements, and the parameters with a state have {list(expected)}; {REMEDY}"
            )


def _interval_keys(entry: Mapping[str, Any]) -> frozenset[str]:
    return INTERVAL - {START} if MASTER in entry else INTERVAL


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided


def _is_history(value: Any) -> bool:
    """Whether it is what `onebit.optim.freeze.observe` makes."""
    if not isinstance(value, (tuple, list)) or len(value) not in (0, 3):
        return False
    if not value:
        return True
    last, rose, norms = value
    pairs = isinstance(norms, (tuple, list)) and all(isinstance(n, (tuple, list)) and len(n) == 2 for n in norms)
    return pairs and all(type(x) in (int, float) for x in (last, rose, *(x for pair in norms for x in pair)))


def _kind(value: Any) -> str:
    """What came, in few words."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return repr(value) if isinstance(value, (int, float, bool)) else type(value).__name__
