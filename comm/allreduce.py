"""The compressed average, written once for every backend and device: two collectives per bucket.

phase 1   encode every rank's chunk of my buffer   → all_to_all → every rank's payload of my chunk
phase 2   encode their mean, plus my server residual → all_gather → one payload per chunk → decode

Two-phase compressed averaging with error feedback on both sides: Tang et al. 2021 (1-bit Adam, arXiv 2102.02888).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from onebit.comm.auto import BucketMode, Mode, check_mode, choose, mode_fact
from onebit.comm.backend import Backend
from onebit.comm.bucket import Bucket
from onebit.comm.part import Part
from onebit.comm.plain import PlainBucket, PlainPart
from onebit.comm.residual import Place, Residual
from onebit.comm.stats import Stats, fp32_bytes
from onebit.comm.tensors import Kind, Tensors, agree_on_tensors, all_finite, as_list, check_same, resolve
from onebit.compress.codec import Codec, as_codec
from onebit.compress.errors import InputError
from onebit.compress.layout import Layout

STAGES = ("encode", "all_to_all", "reduce_encode", "all_gather", "decode")  # keys of Stats.seconds

# A bucket should travel about as long as the next one takes to encode. Between hosts that is a few milliseconds; over
# NVLink it is less than the 0.2 ms that it takes to launch a bucket's work, so there buckets only keep buffers small.
BUCKET_MB = {"cpu": 16.0, "cuda": 512.0}


class CompressedAllreduce:
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
        bucket_mb: MiB of fp32 per bucket; None: 16 for CPU tensors, 512 for CUDA tensors. Buckets are pipelined: one's
            kernels run while another's bytes travel. The size changes no result but what ``"auto"`` picks.
        residual: error feedback to carry on; None: start from zero.

    Attributes:
        backend: the resolved Backend.
        residual: the error feedback.
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
        bucket_mb: float | None = None,
        residual: Residual | None = None,
    ) -> None:
        check_mode(mode)
        tensors = as_list(like)
        self.codec = as_codec(codec)
        self.backend: Backend = resolve(tensors, backend)
        if not isinstance(residual, (Residual, NoneType)):
            raise InputError(f"residual must be an onebit.comm.Residual or None, got {type(residual).__name__}")
        self.residual = Residual() if residual is None else residual
        bucket_mb = bucket_mb_for(tensors, bucket_mb)
        place = self._plan(tensors, max(int(bucket_mb * 2**20) // 4, 1))
        fact = mode_fact(mode, self.backend, place.device, self.codec)
        options = {"codec": self.codec, "bucket_mb": bucket_mb, "mode": fact}
        agree_on_tensors(self.backend, "CompressedAllreduce", tensors, options, self.residual.refusal(place))
        self.stats = Stats()
        self._like = [Kind.of(t) for t in tensors]
        self._device = place.device
        self._numel = sum(place.numels)
        self._operators = self.codec.unchecked(place.device)
        numels = [layout.numel for layout in place.layouts]
        self.modes: Sequence[BucketMode] = choose(mode, numels, self.backend, place.device, self.codec)
        self._buckets = self._make_buckets(place)
        self._masks: Sequence[Tensor] | None = None
        self._staging: dict[int, Tensor] = {}
        self._flight: CompressedWork | None = None
        self._stages = {name: self.stats.stage(name, self.backend, self._undo_flight) for name in STAGES}

    def __call__(self, tensors: Tensors) -> None:
        """Replace `tensors` by their mean over ranks, in place; see `start`."""
        self.start(tensors, overlap=False).wait()

    def start(self, tensors: Tensors, *, overlap: bool = True) -> CompressedWork:
        """Encode `tensors` and start sending; the tensors must stay untouched until the work is done.

        Any strides are taken. A non-finite element makes the mean of its block NaN on every rank and leaves the error
        feedback of that block as it was, on the server and on the rank that has it; what the other ranks said is lost,
        unless `CompressedWork.undo` takes it back.

        Args:
            tensors: shaped as those that this was made for.
            overlap: False where the caller waits at once: on CUDA a small average then starts sooner.

        Raises:
            InputError: not the tensors this was made for, or the last work is not done; nothing was changed.
            TransportError: the transport refused to start; the error feedback is as before.
        """
        listed = as_list(tensors)
        check_same(self.backend.rank, listed, self._like)
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
            undo: puts `residual` of a part that was encoded back; called by `CompressedWork.undo`, and when the
                transport fails. None: the caller does it where it catches the `TransportError`.
            overlap: as for `start`.
            send: False: a part is encoded when `CompressedWork.send` is called for it, or else by `finish`.

        Raises:
            InputError: the last work is not done, or a bucket is plain; nothing was changed.
            TransportError: the transport refused to start; the error feedback is as before if `undo` was given.
        """
        if "plain" in self.modes:
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

    def set_mask(self, masks: Sequence[Tensor] | None) -> None:
        """Take elements out of the average from now on: they are sent as nothing, hold no residual and become 0.

        Args:
            masks: one bool tensor per tensor, True for an element that takes no part, the same on every rank; None: all
                take part.

        Raises:
            InputError: wrong number, dtype or size of masks.
        """
        if masks is not None and len(masks) != len(self._like):
            raise InputError(f"set_mask: expected {len(self._like)} masks, one per tensor, got {len(masks)}")
        self._masks = None if self._buckets else masks  # buckets keep theirs as bits
        for bucket in self._buckets:
            bucket.set_mask(masks)

    def state_dict(self) -> dict[str, Any]:
        """Return the error feedback of this rank; every rank has its own to save."""
        return self.residual.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the error feedback of the same rank and world size; see `Residual.load_state_dict`."""
        self.residual.load_state_dict(state)

    def _plan(self, tensors: Sequence[Tensor], bucket_numel: int) -> Place:
        """How these tensors are laid out in buckets; with one rank in none."""
        layouts: list[Layout] = []
        dtypes = sorted({t.dtype for t in tensors}, key=str) if self.backend.size > 1 else []
        for dtype in dtypes:  # a bucket holds one dtype; the other tensors count as empty
            numels = [t.numel() if t.dtype == dtype else 0 for t in tensors]
            planned = self.codec.plan(numels, self.backend.size, bucket_numel)
            layouts += [layout for layout in planned if layout.blocks]
        return Place(
            numels=tuple(t.numel() for t in tensors),
            layouts=tuple(layouts),
            rank=self.backend.rank,
            world_size=self.backend.size,
            device=tensors[0].device if tensors else torch.device("cpu"),
            feedback=self.codec.error_feedback,
        )

    def _make_buckets(self, place: Place) -> list[Bucket]:
        self.residual.bind(place)
        kinds = [PlainBucket if mode == "plain" else Bucket for mode in self.modes]
        parts = zip(kinds, place.layouts, self.residual.per_bucket(), strict=True)
        return [
            kind(self._operators, layout, self.backend, worker, server, place.device)
            for kind, layout, (worker, server) in parts
        ]

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
            work._send_all()

    def _undo_flight(self) -> None:
        """A stage has failed: put back the error feedback of what was not averaged."""
        if self._flight is not None:
            self._flight._put_back(self._flight._undo_encode)

    def _rows(self, tensors: Sequence[Tensor], copy: bool) -> list[Tensor]:
        """The tensors in row-major order: themselves, or for other strides a buffer, filled if `copy`."""
        rows = []
        for index, t in enumerate(tensors):
            if not t.is_contiguous():
                if index not in self._staging:
                    self._staging[index] = torch.empty_like(t, memory_format=torch.contiguous_format)
                t = self._staging[index].copy_(t) if copy else self._staging[index]
            rows.append(t)
        return rows

    def _done(self, targets: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
        """Copy results from row-major order to where they belong, and allow the next start."""
        for target, row in zip(targets, rows, strict=True):
            if target is not row:
                target.copy_(row)
        if not self._buckets and self._masks is not None:
            for target, mask in zip(targets, self._masks, strict=True):
                target.masked_fill_(mask, 0.0)
        self._flight = None

    def _taking_part(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The tensors with 0 for what is masked."""
        if self._masks is None:
            return tensors
        return [t.masked_fill(mask, 0.0) for t, mask in zip(tensors, self._masks, strict=True)]


class CompressedWork:
    """One compressed average under way; it ends with one of `wait`, `decode`, `accept`, `undo` and `settle_server`."""

    def __init__(
        self,
        owner: CompressedAllreduce,
        encode: Callable[[Part], None],
        undo_encode: Callable[[Part], None] | None,
        given: Sequence[Tensor] | None = None,
    ) -> None:
        self._owner = owner
        self._buckets = owner._buckets
        self._encode = encode
        self._undo_encode = undo_encode
        self._given = given
        self._to_send = set(range(len(self._buckets)))
        self._to_pass_on = set(self._to_send)
        self._lost: set[int] = set()
        self._in_line = False
        self._received = False
        self._stages = owner._stages

    def send(self, index: int) -> None:
        """Encode one part and start sending it, where `start_with` was told not to; every rank in the same order.

        Raises:
            TransportError: the transport refused to start; the error feedback of all parts is as before.
        """
        self._send(index, in_line=False)

    def spoil(self, index: int) -> None:
        """Instead of `send`: send NaN for this part and encode nothing, so that `all_finite` is false on all ranks.

        Where no element of the part takes part, as all are masked, the others do not hear of it.
        """
        self._to_send.discard(index)
        self._buckets[index].spoil()
        with self._stages["all_to_all"]:
            self._buckets[index].exchange(in_line=False)

    def pass_on(self, index: int) -> None:
        """Wait for phase 1 of a part that was sent and start phase 2; `finish` does it for those that are left.

        Raises:
            TransportError: a peer is dead or too slow; the error feedback of all parts is as before.
        """
        in_line = len(self._buckets) == 1  # what follows waits for it
        bucket = self._buckets[index]
        self._to_pass_on.discard(index)
        with self._stages["all_to_all"]:
            bucket.wait_exchange()
        with self._stages["reduce_encode"]:
            bucket.reduce_encode()
        with self._stages["all_gather"]:
            bucket.gather(in_line)

    def forget(self, index: int) -> None:
        """What this part has encoded has been overwritten since: an undoing makes its error feedback 0."""
        self._lost.add(index)

    def wait(self) -> None:
        """Replace the tensors given to `start` by their mean over ranks.

        Raises:
            InputError: `start_with` made this work, so there are no tensors; nothing was changed.
            TransportError: a peer is dead or too slow. Buckets that were complete are averaged, the others keep their
                values, and their error feedback is as before `start` to within rounding.
        """
        if self._given is None:
            raise InputError(
                f"rank {self._owner.backend.rank}: wait() has no tensors to write to, as start_with() was called; "
                "call finish(), then decode(out) or accept()"
            )
        rows = self._owner._rows(self._given, copy=False) if self._buckets else self._given
        if not self._received:
            self._reduce()
        for bucket in self._buckets:
            if not self._received:
                self._receive(bucket)
            self._decode(bucket, rows)
        self._owner._done(self._given, rows)

    def finish(self) -> None:
        """Return when every payload is here and nothing but the error feedback has changed; then end the work.

        Raises:
            TransportError: a peer is dead or too slow; the error feedback is as before to within rounding.
        """
        self._reduce()
        for bucket in self._buckets:
            self._receive(bucket)
        self._received = True

    def all_finite(self) -> Tensor:
        """After `finish`: 0-dim bool, the same on all ranks, False if any rank sent a non-finite number.

        With one rank nothing is sent, and the tensors themselves are looked at. Masked elements may be anything.
        """
        if self._buckets:
            plain = [part.mean for part in self._owner.parts if isinstance(part, PlainPart)]
            signs = [part for part in self._owner.parts if not isinstance(part, PlainPart)]
            if not signs:
                return all_finite(plain)
            finite = self._owner._operators.all_finite([p.gathered for p in signs], [p.layout for p in signs])
            return finite & all_finite(plain) if plain else finite
        if self._given is None:
            return torch.ones((), dtype=torch.bool, device=self._owner._device)
        return all_finite(self._owner._taking_part(self._given))

    def decode(self, out: Tensors) -> None:
        """After `finish`: write the mean to `out`, shaped as the tensors given to `start`, which may be the same.

        Raises:
            InputError: other shapes, dtypes or device; nothing was changed.
        """
        targets = as_list(out)
        check_same(self._owner.backend.rank, targets, self._owner._like)
        rows = self._owner._rows(targets, copy=False) if self._buckets else self._given or targets
        for bucket in self._buckets:
            self._decode(bucket, rows)
        self._owner._done(targets, rows)

    def accept(self) -> None:
        """After `finish`, instead of `decode`: the caller has consumed `gathered` of every part by itself."""
        for bucket in self._buckets:
            bucket.encoded = False
        self._owner._flight = None

    def undo(self, tensors: Tensors | None = None) -> None:
        """Instead of `decode` or `accept`: put the error feedback back to what it was before `start`.

        It is recomputed from what was sent and from what was encoded, so it is the old one to within rounding (a few
        units in the last place of the largest of the numbers involved); no copy is kept for it. Buckets that are
        decoded or accepted stay as they are.

        Args:
            tensors: what was encoded, shaped as the tensors that the average was made for. None: what was given to
                `start`, which must be as it was; or `start_with` was told how to undo.

        Raises:
            InputError: `start_with` was not told how to undo and `tensors` is None, or they do not fit; nothing was
                changed.
        """
        undo_encode = self._undo_encode
        if tensors is not None:
            listed = as_list(tensors)
            check_same(self._owner.backend.rank, listed, self._owner._like)
            _, undo_encode = self._owner.encoding(self._owner._rows(listed, copy=True))
        elif undo_encode is None and any(bucket.encoded for bucket in self._buckets):
            raise InputError(
                f"rank {self._owner.backend.rank}: undo() does not know what was encoded; give it the tensors, or tell "
                "start_with() how to undo"
            )
        self._put_back(undo_encode)

    def settle_server(self, finite: Tensor) -> None:
        """After `finish`: end the work where the host does not know whether the step will be made; never waits.

        The server's error feedback is put back where `finite` is false. That of this rank, `residual` of the parts, is
        the caller's to put back.

        Args:
            finite: 0-dim bool on the device of the tensors, the same on every rank.
        """
        for bucket in self._buckets:
            bucket.undo_reduce(keep=finite)
        self.accept()

    def _send_all(self) -> None:
        for index in sorted(self._to_send):
            self._send(index, self._in_line)

    def _send(self, index: int, in_line: bool) -> None:
        """Phase 1 of a part up to the transport."""
        self._to_send.discard(index)
        bucket = self._buckets[index]
        with self._stages["encode"]:
            bucket.encode(self._encode)
        with self._stages["all_to_all"]:
            bucket.exchange(in_line)

    def _reduce(self) -> None:
        self._send_all()
        for index in sorted(self._to_pass_on):
            self.pass_on(index)

    def _receive(self, bucket: Bucket) -> None:
        with self._stages["all_gather"]:
            bucket.wait_gather()

    def _decode(self, bucket: Bucket, rows: Sequence[Tensor]) -> None:
        with self._stages["decode"]:
            bucket.part.decode(self._owner._operators, rows)
        bucket.encoded = False

    def _put_back(self, undo_encode: Callable[[Part], None] | None) -> None:
        """Undo what is encoded; the worker's side only if it is known how."""
        for index, bucket in enumerate(self._buckets):
            residual = bucket.part.residual
            if bucket.encoded and index in self._lost:
                if residual is not None:
                    residual.zero_()
            elif bucket.encoded and undo_encode is not None:
                undo_encode(bucket.part)
            if bucket.encoded:
                bucket.undo_reduce()
            bucket.encoded = False
        self._owner._flight = None


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
        tensor: a tensor or list of tensors, fp32, bf16 or fp16, any strides; overwritten.
        residual: error feedback, kept from call to call; start with an empty `Residual()`. None: the error of this
            call is forgotten.
        backend, codec: as for `CompressedAllreduce`.

    Returns:
        `tensor`.

    Raises:
        InputError, MismatchError, BackendError, TransportError: as `CompressedAllreduce`.
    """
    CompressedAllreduce(tensor, backend, codec, residual=residual)(tensor)
    return tensor


def bucket_mb_for(tensors: Sequence[Tensor], bucket_mb: float | None) -> float:
    """Return the bucket size for these tensors: the one given, or None: the default for their device.

    Raises:
        InputError: not a positive number.
    """
    if bucket_mb is None:
        return BUCKET_MB.get(tensors[0].device.type if tensors else "cpu", BUCKET_MB["cpu"])
    if isinstance(bucket_mb, bool) or not isinstance(bucket_mb, (int, float)) or not 0 < bucket_mb < float("inf"):
        raise InputError(f"bucket_mb must be a positive number of MiB, got {bucket_mb!r}")
    return float(bucket_mb)
