"""What one rank can plot of a compressed optimizer: phases, bytes, skipped steps, error feedback and times."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onebit.comm import Part
from onebit.compress import Codec

if TYPE_CHECKING:
    from onebit.optim.base import CompressedOptimizer

Metrics = dict[str, float | int | str]


def metrics(optimizer: CompressedOptimizer, compression_error: bool = False) -> Metrics:
    """Return what `CompressedOptimizer.metrics` documents."""
    skipped = optimizer.skipped_steps  # waits until the device has made the steps that the rest tells of
    stats = optimizer.stats
    groups = optimizer._of_groups()
    found: Metrics = {
        "step": max(group["step"] for group in optimizer.param_groups),
        "skipped_steps": skipped,
        "collectives": stats.collectives,
        "wire_bytes": stats.wire_bytes,
        "dense_bytes": stats.dense_bytes,
        "residual_norm": _length(reducers.residual.norm() for reducers in groups),
    }
    found |= {f"phase/{index}": optimizer.phase(index) for index in range(len(groups))}
    found |= {f"seconds/{stage}": seconds for stage, seconds in stats.seconds.items()}
    overlapped, buckets = optimizer.overlapped
    if buckets:
        found |= {"overlapped_buckets": overlapped, "buckets": buckets}
    if compression_error:
        error = _relative_error([part for reducers in groups for part in reducers.parts], optimizer._codec)
        found |= {} if error is None else {"compression_error": error}
    return found


def _relative_error(parts: list[Part], codec: Codec) -> float | None:
    """‖c - C(c)‖ / ‖c‖, c what was last encoded with its feedback.

    None: no average was made, or not to its end, or the codec keeps no error.
    """
    unsaid, whole = [], []
    for part in parts:
        operators = codec.unchecked(part.sent.device)
        if part.residual is None or not operators.all_finite([part.gathered], [part.layout]):
            return None
        unsaid.append(torch.linalg.vector_norm(part.residual))
        whole.append(torch.linalg.vector_norm(part.said(operators) + part.residual))
    length = _length(whole)
    return _length(unsaid) / length if length else None


def _length(norms: Iterable[Tensor]) -> float:
    """The norm of all, from the norms of pieces that may lie on different devices."""
    return float(torch.tensor([float(norm) for norm in norms]).norm())
