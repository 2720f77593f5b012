"""Which buckets travel compressed: those that the caller says, or those that a measurement says are faster so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from onebit.comm.backend import Backend
from onebit.compress import Codec
from onebit.compress.errors import InputError

Mode = Literal["compressed", "plain", "auto"]
BucketMode = Literal["compressed", "plain"]

MODES = ("compressed", "plain", "auto")


def check_mode(mode: object) -> None:
    """Raise unless `mode` is one of `MODES`.

    Raises:
        InputError: it is not.
    """
    if mode not in MODES:
        raise InputError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")


def mode_fact(mode: Mode, backend: Backend, device: torch.device, codec: Codec) -> str:
    """What ranks must agree on, so that all of them measure or none."""
    if mode != "auto":
        return mode
    from onebit.comm.tuning import is_tuned  # which measures averages that this chooses for

    return f"auto, {'measured before' if is_tuned(backend, device, codec) else 'to be measured'}"


def choose(
    mode: Mode, numels: Sequence[int], backend: Backend, device: torch.device, codec: Codec
) -> tuple[BucketMode, ...]:
    """How each bucket of `numels` real elements is to travel; ``"auto"`` is collective, and all ranks choose alike.

    Raises:
        TransportError: ``"auto"``: a rank did not take part in the measurement within the timeout.
    """
    if mode != "auto":
        return (mode,) * len(numels)
    from onebit.comm.tuning import tune

    return tuple(tune(backend, device=device, codec=codec).pick(numel) for numel in numels) if numels else ()
