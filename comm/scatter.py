"""The two phases of the compressed average alone: every rank the mean of its chunk; every rank's chunk to all.

Reduce-scatter is phase 1, all-gather is phase 2, each with its own side of one error feedback. One after the other they
are `CompressedAllreduce`, with what the caller does to a chunk between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from onebit.comm.bucket import Bucket
from onebit.comm.part import Part
from onebit.comm.planned import Planned
from onebit.comm.residual import Residual
from onebit.comm.stats import fp32_bytes
from onebit.comm.tensors import Tensors, as_list, check_same, check_targets, describe
from onebit.compress.codec import Codec, Operators
from onebit.compress.errors import InputError

Span = tuple[int, int, int]
"""Tensor, its first element in row-major order, number of elements."""


class Chunk:
    """The numbers of this rank's chunk of a bucket, one fp32 tensor per run of consecutive elements.

    Args:
        bucket: a bucket of compressed tensors.
        rank: whose chunk.

    Attributes:
        spans: the runs, in the list of tensors that the bucket belongs to.
        slots: the numbers, a tensor per span.
    """

    def __init__(self, bucket: Bucket, rank: int) -> None:
        whole = bucket.part.layout
        self._bucket = bucket
        self._layout = whole.by_segment(rank)
        self._bits = slice(rank * whole.chunk_numel // 8, (rank + 1) * whole.chunk_numel // 8)
        self.spans = [(bucket.part.used[s.tensor], s.offset, s.numel) for s in whole.chunk_segments(rank)]
        self.slots = self._new_slots(bucket)
        self._said = self._new_slots(bucket)

    @property
    def part(self) -> Part:
        """The chunk as what phase 2 sends, with the server's error feedback."""
        whole = self._bucket.part
        return Part(
            layout=self._layout,
            used=tuple(range(len(self.slots))),
            residual=self._bucket.server,
            mask=None if whole.mask is None else whole.mask[self._bits],
            sent=self._bucket.mine,
            gathered=self._bucket.mine,
            squared=whole.squared,
        )

    def take_mean(self, operators: Operators) -> None:
        """Fill the slots with the mean of the payloads that phase 1 has brought, summed in the order of ranks."""
        if not self.slots:
            return
        payloads, mask = self._bucket.payloads, self.part.mask
        for rank, payload in enumerate(payloads):
            said = self._said if rank else self.slots
            operators.decode(payload, mask, said, self._layout)
            torch._foreach_div_(said, float(len(payloads)))
            if rank:
                torch._foreach_add_(self.slots, said)

    def _new_slots(self, bucket: Bucket) -> list[Tensor]:
        numbers = torch.zeros(self._layout.padded_numel, device=bucket.mine.device)
        return [numbers[self._layout.residual_span(s)] for s in self._layout.segments]


class _Phase(Planned):
    """What both have in common: chunks, and one work under way at a time."""

    _stage_names: Sequence[str]

    def __init__(
        self,
        like: Tensors,
        backend: object = None,
        codec: Codec | None = None,
        *,
        bucket_mb: float | None = None,
        residual: Residual | None = None,
    ) -> None:
        super().__init__(like, backend, codec, bucket_mb=bucket_mb, residual=residual)
        self._chunks = [Chunk(bucket, self.backend.rank) for bucket in self._buckets]
        self._in_flight = False
        self._failed: Callable[[], None] | None = None
        self._stages = {name: self.stats.stage(name, self.backend, self._give_up) for name in self._stage_names}

    @property
    def spans(self) -> Sequence[Span]:
        """The elements that belong to this rank, in the order of its shard; every element belongs to one rank.

        A bucket's blocks are dealt to the ranks in order, as many to each, so a single tensor of one bucket is cut into
        runs of `size` consecutive elements, rounded up to blocks.
        """
        if self.backend.size == 1:
            return [(index, 0, kind.shape.numel()) for index, kind in enumerate(self._like) if kind.shape.numel()]
        return [span for chunk in self._chunks for span in chunk.spans]

    @property
    def shard_numel(self) -> int:
        """Number of elements that belong to this rank."""
        return sum(numel for _, _, numel in self.spans)

    def _begin(self, undo: Callable[[], None]) -> None:
        if self._in_flight:
            raise InputError(
                f"rank {self.backend.rank}: start() again before the last work's wait(); its buffers are still in use"
            )
        self._in_flight = bool(self._buckets)
        self._failed = undo
        self.stats.calls += 1
        self.stats.dense_bytes += fp32_bytes(self._numel, self.backend.size) // 2

    def _end(self) -> None:
        self._in_flight = False
        self._failed = None

    def _give_up(self) -> None:
        """A stage has failed: put back the error feedback of what was encoded."""
        if self._failed is not None:
            self._failed()
        self._end()


class CompressedReduceScatter(_Phase):
    """Gives every rank the mean over ranks of its share of a fixed list of tensors; collective to make and to call.

    It is phase 1 of `CompressedAllreduce`: this rank's tensors plus the worker's error feedback are encoded, a payload
    for every rank, and what the payloads of a chunk say is averaged in fp32, in the order of ranks. With one rank the
    shard is the tensors themselves.

    Args:
        like, backend, codec, bucket_mb, residual: as for `CompressedAllreduce`. A residual may be shared with a
            `CompressedAllGather` of the same tensors, codec and bucket size, which uses its server's side.

    Attributes:
        backend, residual, stats: as of `CompressedAllreduce`.

    Raises:
        InputError, MismatchError, BackendError, TransportError: as for `CompressedAllreduce`.
    """

    _writes = False
    _stage_names = ("encode", "all_to_all", "mean")

    def __call__(self, tensors: Tensors) -> Tensor:
        """Return this rank's shard of the mean of `tensors`; see `start`."""
        return self.start(tensors, overlap=False).wait()

    def start(self, tensors: Tensors, *, overlap: bool = True) -> ReduceScatterWork:
        """Encode `tensors` and start sending; they must stay untouched until the work is done, and are not changed.

        A non-finite element makes the mean of its block NaN; the error feedback of that block stays as it was on the
        rank that has it.

        Args:
            tensors: shaped as those that this was made for; any strides.
            overlap: False where the caller waits at once: on CUDA a small one then starts sooner. The same on every
                rank.

        Raises:
            InputError: not the tensors this was made for, or the last work is not done; nothing was changed.
            TransportError: the transport refused to start; the error feedback is as before.
        """
        listed = as_list(tensors)
        check_same(self.backend.rank, listed, self._like)
        work = ReduceScatterWork(self, listed)
        self._begin(work._undo)
        work._start(not overlap and len(self._buckets) == 1)
        return work


class ReduceScatterWork:
    """One reduce-scatter under way."""

    def __init__(self, owner: CompressedReduceScatter, given: Sequence[Tensor]) -> None:
        self._owner = owner
        self._given = given
        self._rows: Sequence[Tensor] = ()

    def wait(self) -> Tensor:
        """Return the shard, (shard_numel,) fp32, a new tensor: the elements of `spans` one after the other.

        Raises:
            TransportError: a peer is dead or too slow; the error feedback is as before `start` to within rounding.
        """
        owner = self._owner
        if not owner._buckets:
            owner._end()
            flat = [t.float().reshape(-1) for t in owner._taking_part(self._given)]
            return torch.cat(flat) if flat else torch.zeros(0)
        for bucket in owner._buckets:
            with owner._stages["all_to_all"]:
                bucket.wait_exchange()
        with owner._stages["mean"]:
            for chunk in owner._chunks:
                chunk.take_mean(owner._operators)
        for bucket in owner._buckets:
            bucket.encoded = False
        owner._end()
        slots = [slot for chunk in owner._chunks for slot in chunk.slots]
        return torch.cat(slots) if slots else torch.zeros(0, device=owner._device)

    def _start(self, in_line: bool) -> None:
        owner = self._owner
        self._rows = owner._rows(self._given, copy=True) if owner._buckets else ()
        for bucket in owner._buckets:
            with owner._stages["encode"]:
                bucket.encode(lambda part: part.encode(owner._operators, self._rows))
            with owner._stages["all_to_all"]:
                bucket.exchange(in_line)

    def _undo(self) -> None:
        for bucket in self._owner._buckets:
            if bucket.encoded:
                bucket.part.undo_encode(self._owner._operators, self._rows)
            bucket.encoded = False


class CompressedAllGather(_Phase):
    """Gives all ranks every rank's shard of a fixed list of tensors; collective to make and to call.

    It is phase 2 of `CompressedAllreduce`: this rank's shard plus the server's error feedback is encoded, and all ranks
    decode the payloads of all shards, so they get the same bits, of their own shard too. With one rank the tensors are
    the shard itself.

    Args:
        like: the tensors that are written, as for `CompressedAllreduce`; the shard is of them.
        backend, codec, bucket_mb, residual: as for `CompressedReduceScatter`.

    Attributes:
        backend, residual, stats: as of `CompressedAllreduce`.

    Raises:
        InputError, MismatchError, BackendError, TransportError: as for `CompressedAllreduce`.
    """

    _stage_names = ("encode", "all_gather", "decode")

    def __call__(self, shard: Tensor, out: Tensors) -> None:
        """Write what all ranks' shards say to `out`; see `start`.

        Raises:
            InputError: as of `start` and `AllGatherWork.wait`; nothing was sent or changed.
            TransportError: as of `start` and `AllGatherWork.wait`.
        """
        targets = as_list(out)
        check_targets(self.backend.rank, targets, self._like)
        self.start(shard, overlap=False).wait(targets)

    def start(self, shard: Tensor, *, overlap: bool = True) -> AllGatherWork:
        """Encode `shard`, which is read before this returns, and start sending.

        A non-finite element makes its block NaN on every rank and leaves the error feedback of that block as it was.

        Args:
            shard: (shard_numel,) fp32, the elements of `spans` one after the other, on the device of the tensors.
            overlap: as for `CompressedReduceScatter.start`.

        Raises:
            InputError: another shape, dtype or device, or the last work is not done; nothing was changed.
            TransportError: the transport refused to start; the error feedback is as before.
        """
        fits = isinstance(shard, Tensor) and shard.dtype == torch.float32 and shard.device == self._device
        if not fits or tuple(shard.shape) != (self.shard_numel,):
            got = f"{describe(shard)} on {shard.device}" if isinstance(shard, Tensor) else type(shard).__name__
            raise InputError(
                f"rank {self.backend.rank}: the shard must be float32 ({self.shard_numel},) on {self._device}, as "
                f"CompressedReduceScatter of the same tensors returns it, got {got}"
            )
        work = AllGatherWork(self, shard.detach())
        self._begin(work._undo)
        work._start(not overlap and len(self._buckets) == 1)
        return work


class AllGatherWork:
    """One all-gather under way."""

    def __init__(self, owner: CompressedAllGather, shard: Tensor) -> None:
        self._owner = owner
        self._shard = shard if owner._buckets else shard.clone()

    def wait(self, out: Tensors) -> None:
        """Write the tensors.

        Args:
            out: shaped as the tensors that this was made for; any strides; rounded to their dtypes.

        Raises:
            InputError: other shapes, dtypes or device, or elements that share memory; nothing was written, and the work
                waits for another `out`.
            TransportError: a peer is dead or too slow; nothing was written, and the error feedback is as before `start`
                to within rounding.
        """
        owner = self._owner
        targets = as_list(out)
        check_targets(owner.backend.rank, targets, owner._like)
        for bucket in owner._buckets:
            with owner._stages["all_gather"]:
                bucket.wait_gather()
        rows = owner._rows(targets, copy=False)
        with owner._stages["decode"]:
            for bucket in owner._buckets:
                bucket.part.decode(owner._operators, rows)
                bucket.encoded = False
        if not owner._buckets:
            for row, piece in zip(rows, torch.split(self._shard, [row.numel() for row in rows]), strict=True):
                row.copy_(piece.view(row.shape))
            rows = list(owner._taking_part(rows))
        owner._end()
        for target, row in zip(targets, rows, strict=True):
            if target is not row:
                target.copy_(row)

    def _start(self, in_line: bool) -> None:
        owner = self._owner
        pieces = iter(torch.split(self._shard, [numel for _, _, numel in owner.spans]) if owner._buckets else ())
        for bucket, chunk in zip(owner._buckets, owner._chunks, strict=True):
            if chunk.slots:
                torch._foreach_copy_(chunk.slots, [next(pieces) for _ in chunk.slots])
            with owner._stages["encode"]:
                bucket.encode_mean(partial(chunk.part.encode, owner._operators, chunk.slots))
            with owner._stages["all_gather"]:
                bucket.gather(in_line)

    def _undo(self) -> None:
        for bucket, chunk in zip(self._owner._buckets, self._owner._chunks, strict=True):
            if bucket.encoded:
                chunk.part.undo_encode(self._owner._operators, chunk.slots)
            bucket.encoded = False


def compressed_reduce_scatter(
    tensor: Tensors, residual: Residual | None = None, *, backend: object = None, codec: Codec | None = None
) -> Tensor:
    """Return this rank's share of the mean of `tensor` over ranks, sending a few bits per element; collective.

    For many calls on the same tensors `CompressedReduceScatter` is faster; its `spans` say which elements these are.

    Args:
        tensor: a tensor or list of tensors, fp32, bf16 or fp16, any strides; not changed.
        residual: error feedback, kept from call to call; start with an empty `Residual()`. None: the error of this
            call is forgotten.
        backend, codec: as for `CompressedAllreduce`.

    Returns:
        (shard_numel,) fp32. Of a single tensor of up to one bucket rank r has the elements from r·c to (r + 1)·c, c
        being the numel divided by the number of ranks, rounded up to whole blocks.

    Raises:
        InputError, MismatchError, BackendError, TransportError: as `CompressedReduceScatter`.
    """
    return CompressedReduceScatter.for_one_call(tensor, backend, codec, residual=residual)(tensor)


def compressed_all_gather(
    shard: Tensor,
    out: Tensors,
    residual: Residual | None = None,
    *,
    backend: object = None,
    codec: Codec | None = None,
) -> Tensors:
    """Write every rank's shard to `out` on all ranks, sending a few bits per element; collective.

    Args:
        shard: (shard_numel,) fp32, as `compressed_reduce_scatter` of tensors like `out` returns it.
        out: a tensor or list of tensors, fp32, bf16 or fp16, any strides but those of an expanded one; overwritten.
        residual: as for `compressed_reduce_scatter`; the same object serves both.
        backend, codec: as for `CompressedAllreduce`.

    Returns:
        `out`.

    Raises:
        InputError, MismatchError, BackendError, TransportError: as `CompressedAllGather`.
    """
    CompressedAllGather.for_one_call(out, backend, codec, residual=residual)(shard, out)
    return out
