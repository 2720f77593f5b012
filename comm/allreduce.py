"""The compressed average, written once for every backend and device: two collectives per bucket.

phase 1   encode every rank's chunk of my buffer   → all_to_all → every rank's payload of my chunk
phase 2   encode their mean, plus my server residual → all_gather → one payload per chunk → decode

Two-phase compressed averaging with error feedback on both sides: Tang et al. 2021 (1-bit Adam, arXiv 2102.02888).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from onebit.comm.auto import Mode
from onebit.comm.compressed_work import CompressedWork
from onebit.comm.levels import LocalGroup
from onebit.comm.part import Part
from onebit.comm.planned import Planned
from onebit.comm.residual import Residual
from onebit.comm.stats import fp32_bytes
from onebit.comm.tensors import Tensors, as_list, check_targets
from onebit.compress.codec import Codec
from onebit.compress.errors import InputError

STAGES = ("encode", "all_to_all", "reduce_encode", "all_gather", "decode")  # keys of Stats.seconds
LOCAL_STAGES = ("local_mean", "local_gather")  # and inside a node, where there are two levels


class CompressedAllreduce(Planned):
    """Averages a fixed list of tensors over ranks, compressed, with error feedback; collective to make and to call.

    Buffers are allocated here, once, and keep their addresses. With one rank the average is the tensor itself:
    nothing is compressed.

    Args:
        like: the tensor, or list of tensors, that calls will pass: shapes, dtypes (fp32, bf16, fp16) and device are
            fixed by them, values are not read.
        backend: None, a name, a process group, a communicator or a Backend; see `make_backend`.
        codec: what goes on the wire.
        mode: ``"compressed"``; ``"plain"``: the transport sums float32, and error feedback waits; ``"auto"``: per
            bucket whichever `tune` finds faster here, which it measures first, in seconds, unless it has before.
        local_group: which ranks are one node, so that fp32 travels inside nodes and compressed payloads of a k-th of
            the elements per rank between them; every rank of a node's k keeps error feedback of its k-th alone. None:
            all ranks are one level. ``"auto"``: those that the launcher has started on one machine. An int: so many
            neighbouring ranks. A Backend: the group of this rank's node. All nodes have as many ranks. With one node
            the transport sums float32, as in ``mode="plain"``.
        bucket_mb: MiB of fp32 per bucket; None: 16 for CPU tensors, 512 for CUDA tensors. Buckets are pipelined: one's
            kernels run while another's bytes travel. The size changes no result but what ``"auto"`` picks.
        residual: error feedback to carry on; None: start from zero.

    Attributes:
        backend: the resolved Backend.
        residual: the error feedback; with `local_group` that of this rank's slice between nodes.
        levels: with `local_group` the groups inside and between nodes, each with its own `traffic`; else None.
        local_transport: what fp32 travels by inside a node: ``"shared memory"`` where its ranks can map the same, else
            the name of the backend; None on one level.
        modes: ``"compressed"`` or ``"plain"`` for each bucket, the same on every rank.
        stats: bytes and times so far.

    Raises:
        InputError: wrong dtype, device or option; nothing was exchanged.
        MismatchError: ranks differ in tensors or options; raised on all of them.
        BackendError: the backend is unknown or cannot be used.
        TransportError: a rank did not take part within the timeout.
    """

    def __init__(
        self,
        like: Tensors,
        backend: object = None,
        codec: Codec | None = None,
        *,
        mode: Mode = "compressed",
        local_group: LocalGroup = None,
        bucket_mb: float | None = None,
        residual: Residual | None = None,
    ) -> None:
        super().__init__(
            like, backend, codec, mode=mode, local_group=local_group, bucket_mb=bucket_mb, residual=residual
        )
        self._flight: CompressedWork | None = None
        two = self.levels if self.levels is not None and self.levels.compresses else None
        carrier = self.backend if two is None else two.between
        self._stages = {name: self.stats.stage(name, carrier, self._undo_flight) for name in STAGES}
        if two is not None:
            for name in LOCAL_STAGES:
                self._stages[name] = self.stats.stage(name, two.inside, self._undo_flight, local=True)

    def __call__(self, tensors: Tensors) -> None:
        """Replace `tensors` by their mean over ranks, in place; see `start`."""
        self.start(tensors, overlap=False).wait()

    def start(self, tensors: Tensors, *, overlap: bool = True) -> CompressedWork:
        """Encode `tensors` and start sending; the tensors must stay untouched until the work is done.

        Any strides are taken. A non-finite element makes the mean of its block NaN on every rank and leaves the error
        feedback of that block as it was, on the server and on the rank that has it; what the other ranks said is lost,
        unless `CompressedWork.undo` takes it back.

        Args:
            tensors: shaped as those that this was made for; every element in a place of its own, as they are written.
            overlap: False where the caller waits at once: on CUDA a small average then starts sooner. The same on every
                rank.

        Raises:
            InputError: not the tensors this was made for, or the last work is not done; nothing was changed.
            TransportError: the transport refused to start; the error feedback is as before.
        """
        listed = as_list(tensors)
        check_targets(self.backend.rank, listed, self._like)
        self._check_idle()
        rows = self._rows(listed, copy=True) if self._buckets else listed
        work = CompressedWork(self, *self.encoding(rows), listed)
        self._begin(work, overlap)
        return work

    def start_with(
        self,
        encode: Callable[[Part], None],
        undo: Callable[[Part], None] | None = None,
        *,
        overlap: bool = True,
        send: bool = True,
    ) -> CompressedWork:
        """As `start`, but `encode` fills `sent` and updates `residual` of each part; one part's bytes travel meanwhile.

        With one rank there are no parts, and nothing is called.

        Args:
            encode: called once per part, in order; its work is queued on torch's current stream.
                With `local_group`, where the mean of a node is encoded, it has to call the one of `encoding`, or
                ``part.fill``.
            undo: puts `residual` of a part that was encoded back; called by `CompressedWork.undo`, and when the
                transport fails. None: the caller does it where it catches the `TransportError`.
            overlap: as for `start`.
            send: False: a part is encoded when `CompressedWork.send` is called for it, or else by `finish`.

        Raises:
            InputError: the last work is not done, or a bucket is plain; nothing was changed.
            TransportError: the transport refused to start; the error feedback is as before if `undo` was given.
        """
        if "plain" in self.modes and self.levels is None:
            raise InputError(
                f"rank {self.backend.rank}: start_with() fills compressed payloads, and this average has plain buckets "
                f"(modes {', '.join(self.modes)}); make it with mode='compressed', or call start()"
            )
        self._check_idle()
        work = CompressedWork(self, encode, undo)
        self._begin(work, overlap, send)
        return work

    def encoding(self, rows: Sequence[Tensor]) -> tuple[Callable[[Part], None], Callable[[Part], None]]:
        """What `start_with` takes, `encode` and `undo`, for the codec's own encoder.

        Args:
            rows: contiguous tensors like those that this was made for; read when their part is encoded, and as they
                were then when it is undone.
        """
        return lambda part: part.encode(self._operators, rows), lambda part: part.undo_encode(self._operators, rows)

    @property
    def parts(self) -> Sequence[Part]:
        """What travels together, in order, with buffers that keep their addresses; none with one rank."""
        return [bucket.part for bucket in self._buckets]

    def _check_idle(self) -> None:
        if self._flight is not None:
            raise InputError(
                f"rank {self.backend.rank}: start() again before the last work's wait(); its buffers are still in use"
            )

    def _begin(self, work: CompressedWork, overlap: bool, send: bool = True) -> None:
        if self._buckets:
            self._flight = work
        self.stats.calls += 1
        self.stats.dense_bytes += fp32_bytes(self._numel, self.backend.size)
        work._in_line = not overlap and len(self._buckets) == 1
        if send:
            work._send_all(wait=not overlap)

    def _undo_flight(self) -> None:
        """A stage has failed: put back the error feedback of what was not averaged."""
        if self._flight is not None:
            self._flight._put_back(self._flight._undo_encode)

    def _done(self, targets: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
        """Copy results from row-major order to where they belong, and allow the next start."""
        for target, row in zip(targets, rows, strict=True):
            if target is not row:
                target.copy_(row)
        if not self._buckets and self._masks is not None:
            for target, mask in zip(targets, self._masks, strict=True):
                target.masked_fill_(mask, 0.0)
        self._flight = None


def compressed_allreduce(
    tensor: Tensors,
    residual: Residual | None = None,
    *,
    backend: object = None,
    codec: Codec | None = None,
) -> Tensors:
    """Replace `tensor` by its mean over ranks, in place, sending a few bits per element; collective.

    For many calls on the same tensors `CompressedAllreduce` is faster: it keeps its buffers and compares the ranks'
    input only once, while this compares it every time.

    Args:
        tensor: a tensor or list of tensors, fp32, bf16 or fp16, any strides but those of an expanded one; overwritten.
        residual: error feedback, kept from call to call; start with an empty `Residual()`. None: the error of this
            call is forgotten.
        backend, codec: as for `CompressedAllreduce`.

    Returns:
        `tensor`.

    Raises:
        InputError, MismatchError, BackendError, TransportError: as `CompressedAllreduce`.
    """
    CompressedAllreduce.for_one_call(tensor, backend, codec, residual=residual)(tensor)
    return tensor
