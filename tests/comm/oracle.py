"""Averages over n ranks in float64 NumPy, one block after the other: written from the design, not from the code."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

UNIT = 2.0**-24  # the relative error of one fp32 operation
PACKED = 1024  # elements that travel together where all elements of a tensor share a scale


def dense_mean(ranks: Sequence[Sequence[Floats]]) -> list[Floats]:
    """Mean of every tensor over ranks; `ranks` holds one list of tensors per rank."""
    return [np.mean(np.stack(list(tensors)), axis=0) for tensors in zip(*ranks, strict=True)]


def dense_slack(ranks: Sequence[Sequence[Floats]]) -> list[Floats]:
    """How far an fp32 mean may be from `dense_mean`: n - 1 sums and a division round what is at most the sum of |x|."""
    n = len(ranks)
    return [n * UNIT * np.sum(np.abs(np.stack(list(tensors))), axis=0) / n for tensors in zip(*ranks, strict=True)]


# The longest sum is of a block of 1024, in rows of 128: 8 + 7 roundings. With what comes before and after it, encode
# and reduce_encode together round fewer than 32 + n times, and a call may carry an old error on twice: in c and in the
# scale that is taken from it. Errors do not conspire that far, so twice of what one call adds is allowed per call made.
# A wrong sign, element or residual is off by a whole scale, thousands of times more.
def tolerance(world_size: int, call: int, largest: float) -> float:
    """How far a compressed average in fp32 may be from `CompressedMean` after some calls; no |x| is above `largest`."""
    return 2 * (call + 1) * (32 + world_size) * UNIT * largest


class CompressedMean:
    """All ranks of a two-phase compressed average with error feedback on both sides.

    Every rank says sign and scale of c = x + worker residual, block by block, and keeps what it did not say. The mean
    of what was said, plus the server residual, is said in the same way, to everybody.

    Attributes:
        worker: per rank and tensor, flat; what the rank has not said yet.
        server: per tensor, flat; what has not been said of the mean yet, no matter which rank looks after it.
        closest: the smallest |c| / scale above 0 that decided a sign so far. A c closer to 0 than fp32's rounding may
            be on the other side there.
    """

    def __init__(
        self,
        world_size: int,
        numels: Sequence[int],
        block_size: int | None = 1024,
        scale: str = "mean",
        masks: Sequence[Bools] | None = None,
    ) -> None:
        self.world_size = world_size
        self.numels = list(numels)
        self.worker: list[list[Floats]] = [[np.zeros(n) for n in numels] for _ in range(world_size)]
        self.server: list[Floats] = [np.zeros(n) for n in numels]
        self.masks = [np.zeros(n, bool) for n in numels] if masks is None else [m.reshape(-1) for m in masks]
        self.closest = math.inf
        self._block_size = block_size
        self._scale = scale

    def __call__(self, ranks: Sequence[Sequence[Floats]]) -> list[Floats]:
        """The flat means; `ranks` holds one list of tensors per rank. One rank alone compresses nothing."""
        flat = [[np.asarray(x, np.float64).reshape(-1) for x in tensors] for tensors in ranks]
        if self.world_size == 1:
            return [np.where(mask, 0.0, x) for x, mask in zip(flat[0], self.masks, strict=True)]
        means = []
        for t in range(len(self.numels)):
            said = [self._say(t, flat[r][t], self.worker[r][t], on_server=False) for r in range(self.world_size)]
            with np.errstate(invalid="ignore"):
                mean = np.mean(np.stack(said), axis=0)
            means.append(self._say(t, mean, self.server[t], on_server=True))
        return means

    def reshard(self, world_size: int) -> CompressedMean:
        """The same feedback among another number of ranks: everybody holds the mean of the worker residuals."""
        new = CompressedMean(world_size, self.numels, self._block_size, self._scale, self.masks)
        means = dense_mean(self.worker)
        new.worker = [[mean.copy() for mean in means] for _ in range(world_size)]
        new.server = [part.copy() for part in self.server]
        return new

    def _say(self, t: int, x: Floats, residual: Floats, on_server: bool) -> Floats:
        """What is said of x + residual; `residual` becomes what is not."""
        said = np.zeros(x.size)
        for span in self._spans(x.size, on_server):
            live = ~self.masks[t][span]
            with np.errstate(invalid="ignore"):
                c = (x[span] + residual[span])[live]
            if not np.isfinite(c).all():
                said[span][live] = np.nan
                continue
            s = self._scale_of(c)
            step = np.where(c >= 0, s, -s)
            if s > 0 and c.any():
                self.closest = min(self.closest, float(np.abs(c[c != 0]).min()) / s)
            said[span][live] = step
            residual[span][live] = c - step
            residual[span][~live] = 0.0
        return said

    def _scale_of(self, c: Floats) -> float:
        if not c.size:
            return 0.0
        return math.fsum(np.abs(c)) / c.size if self._scale == "mean" else math.sqrt(math.fsum(c * c) / c.size)

    def _spans(self, numel: int, on_server: bool) -> Iterator[slice]:
        """Elements that share a scale: blocks; or the whole tensor on the way up, and each rank's share of it back."""
        if self._block_size is not None:
            yield from (
                slice(start, min(start + self._block_size, numel)) for start in range(0, numel, self._block_size)
            )
        elif not on_server:
            yield slice(0, numel)
        else:
            packs = math.ceil(numel / PACKED)
            bounds = [rank * packs // self.world_size * PACKED for rank in range(self.world_size + 1)]
            yield from (slice(a, min(b, numel)) for a, b in itertools.pairwise(bounds) if a < b)


def wire_bytes(world_size: int, numels: Sequence[int], block_size: int = 1024) -> int:
    """Bytes one rank sends per average of one bucket: n - 1 payloads in each of the two phases."""
    blocks = sum(math.ceil(n / block_size) for n in numels)
    per_rank = math.ceil(blocks / world_size)
    payload = _to_16(per_rank * block_size // 8) + _to_16(4 * per_rank)
    return 2 * (world_size - 1) * payload


def _to_16(n_bytes: int) -> int:
    return math.ceil(n_bytes / 16) * 16
