"""The hook that averages DDP's buckets in fp32 where the optimizer's next step needs it, and else sends nothing."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future

from onebit.comm.backend import Backend
from onebit.comm.stats import Stats, fp32_bytes
from onebit.compress.errors import InputError


class AveragingOptimizer(Protocol):
    """What the hook must know of an optimizer that averages by itself.

    Attributes:
        param_groups: as those of any torch optimizer.
        gradients_averaged: the hook tells here whether the gradients that backward leaves are means over ranks.
        averager: its hook, set by `onebit.comm.ddp.attach`.
    """

    param_groups: list[dict[str, Any]]
    gradients_averaged: bool
    averager: AveragingHook | None

    @property
    def backend(self) -> Backend:
        """What the optimizer averages through."""

    def averages_next_step(self) -> bool:
        """Whether the next step is made of the exact mean gradient; the same on every rank."""


class AveragingHook:
    """Averages for one optimizer; DDP calls it for each bucket in the same order on every rank.

    Attributes:
        stats: bytes that it has sent so far.
    """

    def __init__(self, group: dist.ProcessGroup, optimizer: AveragingOptimizer) -> None:
        self.stats = Stats()
        self._group = group
        self._optimizer = optimizer
        self._averaged: set[Tensor] = set()
        self._scaled: bool | None = None  # whether a GradScaler drives the steps; None: there was none yet

    def average(self, bucket: GradBucket) -> Future[Tensor]:
        """DDP's communication hook: the mean of a bucket over ranks, or the bucket as it is.

        Args:
            bucket: its buffer, (numel,) of one dtype, is overwritten by the result.

        Returns:
            A future of the buffer.
        """
        optimizer, buffer = self._optimizer, bucket.buffer()
        optimizer.gradients_averaged = self._scaled is False and optimizer.averages_next_step()
        if not optimizer.gradients_averaged:
            return completed(buffer)
        if bucket.index() == 0:
            self._averaged.clear()
            self.stats.calls += 1
        self._averaged.update(bucket.parameters())
        self._count(buffer.numel())
        total = buffer.float()  # the buffer itself where it is fp32
        future: Future[list[Tensor]] = dist.all_reduce(total, group=self._group, async_op=True).get_future()

        def mean(done: Future[list[Tensor]]) -> Tensor:
            (summed,) = done.value()
            buffer.copy_(summed.div_(self._group.size()))
            return buffer

        return future.then(mean)

    def before_step(self) -> InputError | None:
        """Look at the step that the optimizer is about to make; returns why its gradients cannot be used."""
        optimizer = self._optimizer
        scaled = any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf"))
        self._scaled = bool(self._scaled) or scaled
        if not optimizer.gradients_averaged:
            return None
        where = f"rank {self._group.rank()}: {type(optimizer).__name__}"
        if scaled:
            return InputError(
                f"{where}: a GradScaler drives this step and none drove the steps before, so DDP has averaged "
                "gradients whose scales may differ between ranks; call backward again, or let the scaler make all steps"
            )
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for index, p in enumerate(params):
            if p.grad is not None and p not in self._averaged:
                return InputError(
                    f"{where}: parameter {index}, of shape {tuple(p.shape)}, has a gradient that DDP did not average, "
                    "as it was frozen or absent when the model was wrapped; wrap the model anew, make a new optimizer "
                    "and load the old one's state_dict"
                )
        return None

    def _count(self, numel: int) -> None:
        self.stats.collectives += 1
        sent = fp32_bytes(numel, self._group.size())
        self.stats.wire_bytes += sent
        self.stats.dense_bytes += sent


def completed(buffer: Tensor) -> Future[Tensor]:
    """A future that has this result already."""
    future: Future[Tensor] = torch.futures.Future()
    future.set_result(buffer)
    return future
