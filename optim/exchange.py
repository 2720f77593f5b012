"""The averages of one parameter group, made when first needed, and one step's worth of them under way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from onebit.comm import Backend, CompressedAllreduce, CompressedWork, DenseAllreduce, Part, Residual, Stats
from onebit.comm.levels import LocalGroup
from onebit.compress import Codec


class Exchange(Protocol):
    """What the ranks told each other for one step of one group; nothing but error feedback has changed yet."""

    def all_finite(self) -> Tensor:
        """0-dim bool, the same on every rank."""

    def commit(self) -> None:
        """Make the step; the group's step count is already that of the step."""

    def undo(self) -> None:
        """Put error feedback back; the step is not made."""


@runtime_checkable
class DeviceExchange(Exchange, Protocol):
    """An exchange that need not know on the host whether the step is made.

    If every group's exchange is one, `step` waits for nothing: it calls `settle`, and when the device has come so far,
    often during a later step, it counts the step and calls the optimizer's `_count_made`.
    """

    def settle(self, finite: Tensor) -> None:
        """Launch work that makes the step where `finite`, 0-dim bool on the device, is true, and else undoes it.

        The group's step count is not yet that of the step.
        """


@runtime_checkable
class DraftedExchange(Exchange, Protocol):
    """An exchange whose step needs the ranks once more, before anything is changed and when it is sure to be made."""

    def draft(self) -> None:
        """Make the step beside what there is; then `commit` or, if that of another group fails, `undo`."""


class Sending(Protocol):
    """What one exchange sends, bucket by bucket, with the gradients that each needs.

    All ranks send the same buckets in the same order, and pass them on in the same order between.
    """

    @property
    def buckets(self) -> Sequence[Sequence[int]]:
        """Per bucket, the indices in the group of the parameters whose gradients are read when it is sent."""

    @property
    def late(self) -> Sequence[int]:
        """Buckets with something else in them, which is known when the gradients of the whole group are."""

    def send(self, bucket: int) -> None:
        """Read the gradients of a bucket and start phase 1 of its exchange."""

    def spoil(self, bucket: int) -> None:
        """Instead of `send`, read nothing and send NaN, so that no rank makes the step."""

    def pass_on(self, bucket: int) -> None:
        """Wait for phase 1 of a bucket that was sent, and start phase 2."""

    def forget(self, bucket: int) -> None:
        """Gradients that were sent in this bucket are overwritten: what `undo` cannot work out any more becomes 0."""

    def finish(self) -> None:
        """Send and pass on what was not, and return when everything is here."""


@runtime_checkable
class StagedExchange(Exchange, Protocol):
    """An exchange that has sent nothing when it is made; it is one of the kind above when `sending` has finished."""

    sending: Sending


class CompressedSending:
    """The parts of a compressed average, as `Sending`.

    Args:
        work: `CompressedAllreduce.start_with`, told to send nothing yet.
        parts: of that average.
        indices: in the group, of the parameters that are averaged.
        copied: what is encoded is not what may be overwritten, but a copy.
    """

    late: Sequence[int] = ()

    def __init__(
        self, work: CompressedWork, parts: Sequence[Part], indices: Sequence[int], copied: bool = False
    ) -> None:
        self._parts = parts
        self._indices = indices
        self.send = work.send
        self.spoil = work.spoil
        self.pass_on = work.pass_on
        self._forget = None if copied else work.forget
        self.finish = work.finish

    def forget(self, bucket: int) -> None:
        """As of `Sending`."""
        if self._forget is not None:
            self._forget(bucket)

    @property
    def buckets(self) -> Sequence[Sequence[int]]:
        """As of `Sending`."""
        return [[self._indices[i] for i in part.used] for part in self._parts]


class GroupReducers:
    """Makes the dense and the compressed average of one group when they are first used, and remembers them.

    Attributes:
        residual: error feedback of the compressed average.
    """

    def __init__(
        self,
        backend: Callable[[], Backend],
        codec: Codec,
        bucket_mb: float | None,
        local_group: LocalGroup,
        residual: Residual | None,
    ) -> None:
        self._backend = backend
        self._codec = codec
        self._bucket_mb = bucket_mb
        self._local_group = local_group
        self._dense: DenseAllreduce | None = None
        self._dense_sizes: tuple[int, int] | None = None
        self._compressed: CompressedAllreduce | None = None
        self._warned = False
        self._dense_stats = Stats()  # of all dense averages: every refresh of a variance makes another one
        self._stats = [self._dense_stats]
        self.residual = Residual() if residual is None else residual

    @property
    def backend(self) -> Backend:
        """What carries both averages."""
        return self._backend()

    def dense(self, like: Sequence[Tensor]) -> DenseAllreduce:
        """The fp32 average of tensors such as `like`: a group's with what travels along, which is first, or that alone.

        It holds 8 bytes per element until other tensors are averaged or `compressed` is called.
        """
        sizes = len(like), like[0].numel()  # those of a group's tensors stay
        if self._dense is None or self._dense_sizes != sizes:
            self._dense = DenseAllreduce(like, self._backend(), bucket_mb=self._bucket_mb)
            self._dense_sizes = sizes
            self._dense.stats = self._dense_stats
        return self._dense

    def compressed(self, like: Sequence[Tensor], masks: Callable[[], Sequence[Tensor] | None]) -> CompressedAllreduce:
        """The compressed average of tensors such as `like`; `masks` tells, when it is made, what takes no part."""
        self._dense = None
        if self._compressed is None:
            self._compressed = CompressedAllreduce(
                like,
                self._backend(),
                self._codec,
                local_group=self._local_group,
                bucket_mb=self._bucket_mb,
                residual=self.residual,
            )
            self._compressed.set_mask(masks())
            self._stats.append(self._compressed.stats)
        return self._compressed

    @property
    def parts(self) -> Sequence[Part]:
        """Those of the compressed average; none before it is made, and with one rank."""
        return () if self._compressed is None else self._compressed.parts

    @property
    def local_transport(self) -> str | None:
        """As of the compressed average; None before it is made."""
        return None if self._compressed is None else self._compressed.local_transport

    def remask(self, masks: Sequence[Tensor] | None) -> None:
        """Tell the compressed average, where it was made already, what takes no part from now on."""
        if self._compressed is not None:
            self._compressed.set_mask(masks)

    def renew(self) -> None:
        """Forget the compressed average with its error feedback, as its list of tensors has changed."""
        self._compressed = None
        self.residual = Residual()

    def first_warning(self) -> bool:
        """True the first time it is called: some things are said once per group."""
        first, self._warned = not self._warned, True
        return first

    def count(self, stats: Stats) -> None:
        """Have these counts among those of the group."""
        self._stats.append(stats)

    def stats(self) -> Sequence[Stats]:
        """The counts of all averages made so far, those that are not in use any more included."""
        return self._stats
