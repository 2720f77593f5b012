"""The hook that averages a unit's sharded gradients over its replicas, compressed, with error feedback."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from onebit.comm.allreduce import CompressedAllreduce
from onebit.comm.backend import Backend
from onebit.comm.fsdp_hooks import UnitHook
from onebit.comm.fsdp_units import Unit
from onebit.comm.stats import Stats, fp32_bytes
from onebit.compress.codec import Codec


class ReplicaHook(UnitHook):
    """Replaces one unit's reduce-scattered gradient by its mean over replicas; FSDP calls it on a stream of its own.

    Every parameter's shard is a tensor of its own in the average, without the zeros that FSDP fills it up with.

    Args:
        unit: whose gradients.
        backend: the replicas of this rank's shard.
        codec, bucket_mb: as for `CompressedAllreduce`.
        start_step: how many averages are made in fp32 before the first compressed one.
    """

    def __init__(self, unit: Unit, backend: Backend, codec: Codec, start_step: int, bucket_mb: float | None) -> None:
        super().__init__(unit)
        self._backend = backend
        self._codec = codec
        self._start_step = start_step
        self._bucket_mb = bucket_mb
        self._reduce: CompressedAllreduce | None = None
        self._dense = Stats()
        self._stage = self._dense.stage("all_reduce", backend)

    def install(self) -> None:
        self.unit.module.set_all_reduce_hook(self.average)

    def remove(self) -> None:
        nothing: Any = None
        self.unit.module.set_all_reduce_hook(nothing)

    @property
    def stats(self) -> Stats:
        return Stats.total([self._dense, *([] if self._reduce is None else [self._reduce.stats])])

    def average(self, flat: Tensor) -> None:
        """FSDP's hook.

        Args:
            flat: (unit.numel,) of the dtype that FSDP reduces in, overwritten by the mean over replicas.

        Raises:
            InputError: not all trainable parameters have a gradient, or the dtype cannot be averaged; or the loaded
                error feedback is of other options, on every rank.
            TransportError: a peer is dead or too slow.
        """
        self.unit.check(self._backend.rank, flat)
        if flat.is_cuda:
            # It belongs to the stream of FSDP's reduce-scatter, which may give its memory to the next unit too soon.
            flat.record_stream(torch.cuda.current_stream(flat.device))
        shards = [flat[p.start : p.start + p.real[self.unit.shard]] for p in self.unit.pieces]
        if self._reduce is None:
            self._reduce = CompressedAllreduce(
                shards, self._backend, self._codec, bucket_mb=self._bucket_mb, residual=self.residual
            )
        if self.calls < self._start_step:
            self._average_dense(flat)
        else:
            self._reduce(shards)
        self.calls += 1

    def _average_dense(self, flat: Tensor) -> None:
        self._dense.calls += 1
        self._dense.dense_bytes += fp32_bytes(flat.numel(), self._backend.size)
        if self._backend.size == 1:
            return
        total = flat.float()  # the tensor itself where it is fp32
        with self._stage:
            self._backend.all_reduce(total).wait()
        flat.copy_(total.div_(self._backend.size))
