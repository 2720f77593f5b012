"""The hook that averages DDP's gradients compressed, with error feedback that belongs to parameters, not to buckets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from onebit.comm.allreduce import CompressedAllreduce
from onebit.comm.bucket_size import bucket_mb_for
from onebit.comm.compressed_work import CompressedWork
from onebit.comm.registry import make_backend
from onebit.comm.residual import Residual
from onebit.comm.stats import Stats
from onebit.compress.codec import Codec, as_codec

BUCKET_MB = 25.0  # DDP's own: what its gradients arrive in


class CompressedHook:
    """Replaces every gradient by its compressed mean over ranks; see `onebit.comm.ddp.compress_gradients`.

    DDP forms its buckets anew after the first iteration. The hook has buckets of its own, of gradients from the model's
    last parameter to its first; one starts to travel, in this order, when backward has come to all of it, and all are
    complete when backward returns. The first iteration only learns which gradients there are, and overlaps nothing.

    A gradient that is not finite makes the mean of its block NaN on every rank, and the error feedback of that block
    stays as it was on the server and on the rank that has it. If an optimizer then skips its step, as with
    `torch.amp.GradScaler`, what the other blocks have said is lost with the step; so is what is said of a parameter
    that no rank has used (``find_unused_parameters``), for which DDP drops the mean. When the scaler's scale has
    changed, call `rescale`.

    Args:
        model: whose gradients; it sets the process group.
        codec: what goes on the wire.
        bucket_mb: MiB of fp32 that travel together; None: 25. The size changes no result.

    Attributes:
        model: the DDP model.

    Raises:
        InputError: an option is out of range.
    """

    def __init__(
        self, model: DistributedDataParallel, codec: Codec | None = None, *, bucket_mb: float | None = None
    ) -> None:
        self.model = model
        self._codec = as_codec(codec)
        self._bucket_mb = bucket_mb_for([], BUCKET_MB if bucket_mb is None else bucket_mb)
        self._backend = make_backend(model.process_group, device=model.device)
        self._residual = Residual()
        self._reduce: CompressedAllreduce | None = None
        self._params: list[Tensor] = []
        self._arrived: dict[Tensor, Tensor] = {}
        self._rows: list[Tensor] = []
        self._waiting: list[tuple[Future[Tensor], Tensor]] = []
        self._work: CompressedWork | None = None
        self._sent = 0

    @property
    def stats(self) -> Stats:
        """Bytes and times of all averages of this rank so far; a new object each time."""
        return Stats.total([] if self._reduce is None else [self._reduce.stats])

    def average(self, bucket: GradBucket) -> Future[Tensor]:
        """DDP's communication hook: takes a bucket of this rank's gradients, and completes all with the last one.

        Args:
            bucket: its buffer is overwritten by the means when the returned future is done.

        Returns:
            A future of the buffer, done when the hook was called for the last bucket of the backward pass.

        Raises:
            InputError: the loaded error feedback is of another model; on every rank.
            TransportError: a peer is dead or too slow.
        """
        future: Future[Tensor] = torch.futures.Future()
        self._waiting.append((future, bucket.buffer()))
        self._arrived.update(zip(bucket.parameters(), bucket.gradients(), strict=True))
        if self._reduce is None and bucket.is_last():
            self._reduce = self._make()
        if self._reduce is not None:
            self._send(self._reduce)
        if bucket.is_last():
            self._finish()
        return future

    def rescale(self, factor: float) -> None:
        """Multiply the error feedback by `factor`, new over old scale, when a loss scale has changed."""
        self._residual.rescale(factor)

    def state_dict(self) -> dict[str, Any]:
        """Return the error feedback of this rank, as `onebit.comm.Residual`; every rank has its own to save."""
        return self._residual.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the error feedback of the same rank and world size; before the first backward it waits until then.

        Raises:
            InputError: it is no such state, or of another model; nothing was changed.
        """
        self._residual.load_state_dict(state)

    def _make(self) -> CompressedAllreduce:
        """The average of all gradients that there are; collective."""
        self._params = [p for p in reversed(list(self.model.parameters())) if p in self._arrived]
        gradients = [self._arrived[p] for p in self._params]
        self._rows = list(gradients)
        return CompressedAllreduce(
            gradients, self._backend, self._codec, bucket_mb=self._bucket_mb, residual=self._residual
        )

    def _send(self, reduce: CompressedAllreduce) -> None:
        """Start what has all its gradients, in order."""
        if self._work is None:
            self._work = reduce.start_with(*reduce.encoding(self._rows), send=False)
        for part in reduce.parts[self._sent :]:
            if not all(self._params[i] in self._arrived for i in part.used):
                return
            for i in part.used:
                self._rows[i] = self._arrived[self._params[i]]
            self._work.send(self._sent)
            self._sent += 1

    def _finish(self) -> None:
        assert self._work is not None
        self._work.finish()
        self._work.decode([self._arrived[p] for p in self._params])
        for future, buffer in self._waiting:
            future.set_result(buffer)
        self._work, self._sent = None, 0
        self._arrived.clear()
        self._waiting.clear()
