"""Reads a saved state of Adam: this project's own, torch's, DeepSpeed's and apex's, all checked before any is used."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onebit.comm.tensors import describe
from onebit.compress import InputError
from onebit.optim.loading import refuse_others
from onebit.optim.state_keys import DECOUPLED

_log = logging.getLogger(__name__)

MODES = ("adamw_mode", "adam_w_mode")  # the names that it has here, those of DeepSpeedCPUAdam and FusedAdam
HOW = ("foreach", "fused", "differentiable", "capturable")  # how torch computes, which is nothing to take over

_LAYOUTS = (
    "expected {'state': {index: {'step', 'exp_avg', 'exp_avg_sq'}}, 'param_groups': [...]}, as torch.optim.AdamW, "
    "DeepSpeedCPUAdam and the FusedAdam of DeepSpeed and apex save it (the last with 'step' in the group)"
)


@dataclass(frozen=True)
class Saved:
    """A state that fits an optimizer.

    Attributes:
        groups: the options of each group, without its parameters.
        states: of each parameter, in the order of the groups: a 0-dim fp32 `step` on the CPU and tensors of the
            parameter's shape, as they were saved; empty where the parameter has made no step.
    """

    groups: list[dict[str, Any]]
    states: list[dict[str, Tensor]]


def read_state(
    owner: str,
    saved: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    *,
    mode: str,
    own: Sequence[str] = (),
    extra: Sequence[str] = (),
) -> Saved:
    """Translate `saved` for an optimizer with these `groups`; nothing is changed and no tensor is copied.

    Known layouts: that of torch.optim.Adam and AdamW (`step` a tensor); of DeepSpeedCPUAdam and DeepSpeed's FusedAdam
    (`step` an int); of apex's FusedAdam and older ones of DeepSpeed (`step` an int or a tensor in the group, valid for
    each of its parameters that has moments). The partitions that ZeRO saves are flat and a rank's own: they are
    refused.

    Args:
        owner: the optimizer's name, for messages.
        mode: what the optimizer calls ``decoupled_weight_decay``.
        own: options that stay as they are, whatever was saved.
        extra: tensors of a parameter's state beside exp_avg and exp_avg_sq, which may be missing.

    Raises:
        InputError: another layout, a compressed optimizer's state, other groups, other shapes, or options and tensors
            that the optimizer cannot use.
    """
    refuse_others(f"{owner}.load_state_dict", saved)
    if not isinstance(saved.get("state"), Mapping) or not isinstance(saved.get("param_groups"), (list, tuple)):
        raise InputError(
            f"{owner}.load_state_dict: {_LAYOUTS}, got the keys {sorted(map(str, saved))}; take a ZeRO checkpoint "
            "apart with DeepSpeed's own tools first"
        )
    found = saved["param_groups"]
    if [len(g["params"]) for g in found] != [len(g["params"]) for g in groups]:
        raise InputError(
            f"{owner}.load_state_dict: expected groups of {[len(g['params']) for g in groups]} parameters, got groups "
            f"of {[len(g['params']) for g in found]}; load the state into an optimizer of the same parameters"
        )
    merged, states, ignored = [], [], set()
    for index, (now, then) in enumerate(zip(groups, found, strict=True)):
        merged.append(_options(owner, index, now, then, mode, own))
        for p, key in zip(now["params"], then["params"], strict=True):
            entry = saved["state"].get(key) or {}
            states.append(_tensors(f"{owner}.load_state_dict: parameter {key}", p, entry, then.get("step"), extra))
            ignored |= set(entry) - {"step", "exp_avg", "exp_avg_sq", *extra}
    if ignored:
        _log.warning("%s.load_state_dict has no use for %s and leaves them out", owner, ", ".join(sorted(ignored)))
    return Saved(merged, states)


def _options(
    owner: str, index: int, now: Mapping[str, Any], then: Mapping[str, Any], mode: str, own: Sequence[str]
) -> dict[str, Any]:
    """A group's options: its own where nothing was saved, and those that tell how to compute rather than what."""
    if then.get("amsgrad"):
        raise InputError(
            f"{owner}.load_state_dict: group {index} was saved with amsgrad=True, which this optimizer does not have; "
            "go on with torch.optim.AdamW, or set amsgrad of the saved group to False"
        )
    options = {key: value for key, value in now.items() if key != "params"}
    for key, value in then.items():
        if key in (DECOUPLED, *MODES):
            options[mode] = bool(value)
        elif key not in ("params", "step", "amsgrad", *own) and (key not in HOW or key in options):
            options[key] = copy.deepcopy(value)
    return options


def _tensors(
    where: str, p: Tensor, entry: Mapping[str, Any], group_step: Any, extra: Sequence[str]
) -> dict[str, Tensor]:
    """The state of one parameter."""
    if not entry:
        return {}
    if "max_exp_avg_sq" in entry:
        raise InputError(f"{where} was saved with amsgrad=True, which this optimizer does not have")
    state = {"step": _step(where, entry.get("step", group_step))}
    for key in ("exp_avg", "exp_avg_sq", *(key for key in extra if key in entry)):
        value = entry.get(key)
        if not isinstance(value, Tensor):
            raise InputError(f"{where} has no tensor {key!r}, only {sorted(map(str, entry))}; {_LAYOUTS}")
        if value.shape != p.shape or not value.is_floating_point():
            raise InputError(
                f"{where}: expected {key!r} of shape {tuple(p.shape)} in floating point, got {describe(value)}; load "
                "the state into an optimizer of the same parameters, in the same order"
            )
        state[key] = value
    return state


def _step(where: str, value: Any) -> Tensor:
    """A step count as torch keeps it, from a number or a tensor with one element."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise InputError(f"{where}: expected a step count, in its state or in its group, got {value!r}")
    return torch.tensor(float(value), dtype=torch.float32)
