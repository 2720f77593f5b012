"""The uncompressed average under the same contract: what warm-up uses, and what compression is measured against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from onebit.comm.backend import Backend, Work
from onebit.comm.bucket_size import bucket_mb_for
from onebit.comm.stats import Stage, Stats, fp32_bytes
from onebit.comm.tensors import Kind, Tensors, agree_on_tensors, as_list, check_same, check_targets, resolve
from onebit.compress.errors import InputError
from onebit.compress.layout import ceil_div


class DenseAllreduce:
    """Averages a fixed list of tensors over ranks in fp32; collective to make and to call.

    Every element is summed in rank order by one rank, all_to_all then all_gather, so the result depends neither on the
    backend nor on the bucket size, and is bit-equal on all ranks. It sends what a bandwidth-optimal allreduce sends.

    Args:
        like, backend, bucket_mb: as for `CompressedAllreduce`.

    Attributes:
        backend: the resolved Backend.
        stats: bytes and times so far.

    Raises:
        InputError, MismatchError, BackendError, TransportError: as for `CompressedAllreduce`.
    """

    def __init__(self, like: Tensors, backend: object = None, *, bucket_mb: float | None = None) -> None:
        tensors = as_list(like)
        self.backend: Backend = resolve(tensors, backend)
        bucket_mb = bucket_mb_for(tensors, bucket_mb)
        agree_on_tensors(self.backend, "DenseAllreduce", tensors, {"bucket_mb": bucket_mb})
        self.stats = Stats()
        self._like = [Kind.of(t) for t in tensors]
        self._device = tensors[0].device if tensors else torch.device("cpu")
        self._numel = sum(t.numel() for t in tensors)
        most = max(int(bucket_mb * 2**20) // 4, 1)
        cuts = range(0, self._numel if self.backend.size > 1 else 0, most)
        sizes = [t.numel() for t in tensors]
        self._buckets = [
            _DenseBucket(self.backend, sizes, start, min(start + most, self._numel), self._device) for start in cuts
        ]
        self._in_flight = False

    def __call__(self, tensors: Tensors, out: Tensors | None = None) -> None:
        """Write the mean over ranks of `tensors` to `out`, or over `tensors` themselves; see `start`.

        Raises:
            InputError: as of `start` and `DenseWork.wait`; nothing was sent.
            TransportError: as of `start` and `DenseWork.wait`.
        """
        listed = as_list(tensors)
        targets = listed if out is None else as_list(out)
        check_targets(self.backend.rank, targets, self._like)
        self.start(listed).wait(targets)

    def start(self, tensors: Tensors) -> DenseWork:
        """Start averaging `tensors`, which are read before this returns.

        Raises:
            InputError: not the tensors this was made for, or the last work is not done; nothing was changed.
            TransportError: the transport refused to start.
        """
        listed = as_list(tensors)
        check_same(self.backend.rank, listed, self._like)
        work = self.open(listed)
        for index in range(len(self._buckets)):
            work.send(index)
        return work

    def open(self, tensors: Sequence[Tensor]) -> DenseWork:
        """As `start`, but a bucket is read and sent when `DenseWork.send` is called for it, or else by `wait`.

        Args:
            tensors: their places in this list may be filled until a bucket that uses them is sent.

        Raises:
            InputError: the last work is not done; nothing was changed.
        """
        if self._in_flight:
            raise InputError(f"rank {self.backend.rank}: start() again before the last work's wait()")
        self.stats.calls += 1
        self.stats.dense_bytes += fp32_bytes(self._numel, self.backend.size)
        self._in_flight = bool(self._buckets)
        return DenseWork(self, tensors)

    @property
    def buckets(self) -> Sequence[Sequence[int]]:
        """Which tensors are, wholly or in part, in each bucket, in order; none with one rank."""
        return [bucket.tensors for bucket in self._buckets]

    def _stage(self, name: str) -> Stage:
        return self.stats.stage(name, self.backend, self._end)

    def _end(self) -> None:
        self._in_flight = False


class DenseWork:
    """One uncompressed average under way."""

    def __init__(self, owner: DenseAllreduce, tensors: Sequence[Tensor]) -> None:
        self._owner = owner
        self._tensors = tensors
        self._buckets = owner._buckets
        self._to_send = set(range(len(self._buckets)))
        self._to_pass_on = set(self._to_send)

    def send(self, index: int) -> None:
        """Read one bucket and start sending it; every rank in the same order.

        Raises:
            TransportError: the transport refused to start.
        """
        self._to_send.discard(index)
        with self._owner._stage("all_to_all"):
            self._buckets[index].exchange(self._tensors)

    def spoil(self, index: int) -> None:
        """Instead of `send`: read nothing and send NaN, so that the mean is NaN on all ranks."""
        self._to_send.discard(index)
        with self._owner._stage("all_to_all"):
            self._buckets[index].exchange(None)

    def pass_on(self, index: int) -> None:
        """Wait for what comes of a bucket that was sent, and send its mean; `wait` does it for those that are left.

        Raises:
            TransportError: a peer is dead or too slow.
        """
        self._to_pass_on.discard(index)
        with self._owner._stage("all_to_all"):
            self._buckets[index].reduce()

    @property
    def unsent(self) -> Sequence[int]:
        """The buckets that were not sent yet, in order."""
        return sorted(self._to_send)

    def cancel(self) -> None:
        """Instead of `wait`: the mean is not wanted, as something has failed."""
        self._owner._end()

    def wait(self, out: Tensors | None = None) -> None:
        """Write the mean to `out`, shaped as the tensors given to `start`; None: over those.

        Raises:
            InputError: other shapes, dtypes or device, or elements that share memory; nothing was written, and the work
                waits for another `out`.
            TransportError: a peer is dead or too slow; nothing was written.
        """
        owner = self._owner
        targets = self._tensors if out is None else as_list(out)
        check_targets(owner.backend.rank, targets, owner._like)
        owner._end()
        for index in self.unsent:
            self.send(index)
        for index in sorted(self._to_pass_on):
            self.pass_on(index)
        for bucket in self._buckets:
            with owner._stage("all_gather"):
                bucket.wait()
        for bucket in self._buckets:
            bucket.write(targets)
        if not self._buckets:
            for target, tensor in zip(targets, self._tensors, strict=True):
                if target is not tensor:
                    target.copy_(tensor)


class _DenseBucket:
    """Elements [start, end) of the concatenation of all tensors."""

    def __init__(self, backend: Backend, sizes: Sequence[int], start: int, end: int, device: torch.device) -> None:
        self._backend = backend
        self._pieces = list(_pieces(sizes, start, end))
        self.tensors = [t for t, _, _ in self._pieces]
        self._numel = end - start
        padded = ceil_div(self._numel, backend.size) * backend.size
        self._mine, self._theirs = torch.zeros(2, padded, device=device)
        self._slots = list(self._mine[: self._numel].split([numel for _, _, numel in self._pieces]))
        self._work: Work | None = None

    def exchange(self, tensors: Sequence[Tensor] | None) -> None:
        """Send what is here of these tensors, or NaN in its place."""
        if tensors is None:
            self._mine[: self._numel].fill_(torch.nan)
        else:  # on CUDA this is a few kernels, however many tensors there are
            torch._foreach_copy_(self._slots, [_flat(tensors[t], offset, numel) for t, offset, numel in self._pieces])
        self._work = self._backend.all_to_all(self._theirs, self._mine)

    def reduce(self) -> None:
        self.wait()
        rows = self._theirs.view(self._backend.size, -1)
        total = rows[0]
        for row in rows[1:]:
            total += row
        self._work = self._backend.all_gather(self._mine, total.div_(self._backend.size))

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()

    def write(self, tensors: Sequence[Tensor]) -> None:
        targets = [_flat(tensors[t], offset, numel) for t, offset, numel in self._pieces]
        torch._foreach_copy_(targets, self._slots)
        for (t, offset, numel), written in zip(self._pieces, targets, strict=True):
            if not tensors[t].is_contiguous():  # what was written is a copy
                _write_flat(tensors[t], offset, numel, written)


def _flat(tensor: Tensor, offset: int, numel: int) -> Tensor:
    """Elements [offset, offset + numel) in row-major order: those of the tensor itself if it is contiguous."""
    flat = tensor.reshape(-1)
    return flat if numel == tensor.numel() else flat[offset : offset + numel]


def _write_flat(tensor: Tensor, offset: int, numel: int, values: Tensor) -> None:
    """Write elements [offset, offset + numel) of a tensor of any strides."""
    rows = tensor.contiguous()
    rows.view(-1)[offset : offset + numel] = values
    tensor.copy_(rows)


def _pieces(sizes: Sequence[int], start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield tensor, offset and number of elements of what [start, end) covers."""
    first = 0
    for tensor, size in enumerate(sizes):
        low, high = max(first, start), min(first + size, end)
        if low < high:
            yield tensor, low - first, high - low
        first += size
