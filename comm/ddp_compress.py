"""The hook that averages DDP's gradients compressed, with error feedback that belongs to parameters, not to buckets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from onebit.comm.allreduce import CompressedAllreduce, CompressedWork, bucket_mb_for
from onebit.comm.registry import make_backend
from onebit.comm.residual import Residual
from onebit.comm.stats import Stats
from onebit.compress import SignCodec
from onebit.compress.errors import InputError

VERSION = 1
BUCKET_MB = 25.0  # DDP's own: what its gradients arrive in


class CompressedHook:
    """Replaces every gradient by its compressed mean over ranks; see `onebit.comm.ddp.compress_gradients`.

    DDP forms its buckets anew after the first iteration. The hook has buckets of its own, of whole parameters from the
    model's last to its first; one starts to travel, in this order, when backward has come to all its gradients, and all
    are complete when backward returns. The first iteration only learns which gradients there are, and overlaps nothing.

    A gradient that is not finite makes the mean of its block NaN on every rank, and the error feedback of that block
    stays as it was on the server and on the rank that has it. If an optimizer then skips its step, as with
    `torch.amp.GradScaler`, what the other blocks have said is lost with the step; so is what is said of a parameter
    that no rank has used (``find_unused_parameters``), for which DDP drops the mean. When the scaler's scale has
    changed, call `rescale`.

    Args:
        model: whose gradients; it sets the process group.
        codec: what goes on the wire.
        bucket_mb: MiB of fp32 gradients that start together; None: 25. The size changes no result.

    Attributes:
        model: the DDP model.

    Raises:
        InputError: an option is out of range.
    """

    def __init__(
        self, model: DistributedDataParallel, codec: SignCodec | None = None, *, bucket_mb: float | None = None
    ) -> None:
        self.model = model
        self._codec = SignCodec() if codec is None else codec
        self._bucket_numel = int(bucket_mb_for([], BUCKET_MB if bucket_mb is None else bucket_mb) * 2**20) // 4
        self._backend = make_backend(model.process_group, device=model.device)
        self._buckets: list[_Bucket] = []
        self._loaded: list[Residual] | None = None
        self._gradients: dict[Tensor, Tensor] = {}
        self._waiting: list[tuple[Future[Tensor], Tensor]] = []
        self._works: list[CompressedWork] = []

    @property
    def stats(self) -> Stats:
        """Bytes and times of all averages of this rank so far; a new object each time."""
        return Stats.total(bucket.reduce.stats for bucket in self._buckets)

    def average(self, bucket: GradBucket) -> Future[Tensor]:
        """DDP's communication hook: takes a bucket of this rank's gradients, and completes all with the last one.

        Args:
            bucket: its buffer is overwritten by the means when the returned future is done.

        Returns:
            A future of the buffer, done when the hook was called for the last bucket of the backward pass.

        Raises:
            TransportError: a peer is dead or too slow.
        """
        if bucket.index() == 0:
            self._forget()
        future: Future[Tensor] = torch.futures.Future()
        self._waiting.append((future, bucket.buffer()))
        self._gradients.update(zip(bucket.parameters(), bucket.gradients(), strict=True))
        if bucket.is_last() and (not self._buckets or self._loaded is not None):
            self._make_buckets()
        self._start()
        if bucket.is_last():
            self._finish()
        return future

    def rescale(self, factor: float) -> None:
        """Multiply the error feedback by `factor`, new over old scale, when a loss scale has changed."""
        for residual in self._residuals():
            residual.rescale(factor)

    def state_dict(self) -> dict[str, Any]:
        """Return the error feedback of this rank; every rank has its own to save."""
        return {"version": VERSION, "residuals": [residual.state_dict() for residual in self._residuals()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the error feedback of the same rank and world size, from the next backward pass on.

        Raises:
            InputError: it is no such state; nothing was changed. Whether it fits the model shows in the next backward
                pass, which then raises.
        """
        version = state.get("version") if isinstance(state, Mapping) else None
        if version != VERSION or not isinstance(state.get("residuals"), Sequence):
            raise InputError(
                f"rank {self._backend.rank}: CompressedHook: the state to load has version {version!r}, expected "
                f"{VERSION} and residuals; was it made by state_dict()?"
            )
        loaded = [Residual() for _ in state["residuals"]]
        for residual, saved in zip(loaded, state["residuals"], strict=True):
            residual.load_state_dict(saved)
        self._loaded = loaded

    def _residuals(self) -> list[Residual]:
        return [bucket.reduce.residual for bucket in self._buckets] if self._loaded is None else self._loaded

    def _make_buckets(self) -> None:
        """Form the hook's own buckets of all parameters that have come; collective."""
        place: dict[Tensor, int] = {p: i for i, p in enumerate(self.model.parameters())}
        groups: list[list[Tensor]] = [[]]
        for p in sorted(self._gradients, key=lambda p: -place[p]):
            if groups[-1] and sum(q.numel() for q in groups[-1]) + p.numel() > self._bucket_numel:
                groups.append([])
            groups[-1].append(p)
        residuals = [Residual() for _ in groups] if not self._loaded else self._loaded
        if len(residuals) != len(groups):
            raise InputError(
                f"rank {self._backend.rank}: CompressedHook: the loaded state has {len(residuals)} buckets, and this "
                f"model has {len(groups)}; use the model and the bucket_mb of the state"
            )
        self._buckets = [
            _Bucket(params, self._reduce([self._gradients[p] for p in params], residual))
            for params, residual in zip(groups, residuals, strict=True)
        ]
        self._loaded = None

    def _reduce(self, gradients: list[Tensor], residual: Residual) -> CompressedAllreduce:
        return CompressedAllreduce(gradients, self._backend, self._codec, residual=residual)

    def _start(self) -> None:
        """Start what has all its gradients, in order."""
        for bucket in self._buckets[len(self._works) :]:
            if not all(p in self._gradients for p in bucket.params):
                return
            self._works.append(bucket.reduce.start([self._gradients[p] for p in bucket.params]))

    def _finish(self) -> None:
        for work in self._works:
            work.wait()
        for future, buffer in self._waiting:
            future.set_result(buffer)
        self._forget()

    def _forget(self) -> None:
        """Let go of this backward pass, or of one that did not come to its end."""
        self._gradients.clear()
        self._waiting.clear()
        self._works.clear()


class _Bucket:
    """Parameters whose gradients travel together, and their average."""

    def __init__(self, params: Sequence[Tensor], reduce: CompressedAllreduce) -> None:
        self.params = params
        self.reduce = reduce
