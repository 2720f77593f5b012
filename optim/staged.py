"""A compressed average of local momenta that are made part by part, each when its part is sent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from onebit.comm import CompressedAllreduce, CompressedWork, Part
from onebit.optim.exchange import CompressedSending


class CompressedExchange(ABC):
    """The staged exchange of a step on averaged momenta that has no kernels; a subclass says what is made of them.

    Args:
        reduce: the average. What `_local_momenta` needs must be there before this is called.
        like: its tensors' shapes and device; values are not read.
        indices: in the group, of the parameters that are averaged.
        made_in: row-major fp32 tensors like those of the average, where local momenta are kept; None: new ones.

    Attributes:
        sending: as of `onebit.optim.exchange.StagedExchange`; `all_finite`, and then `commit` or `undo`, come after it
            has finished.
    """

    def __init__(
        self,
        reduce: CompressedAllreduce,
        like: Sequence[Tensor],
        indices: Sequence[int],
        made_in: Sequence[Tensor] | None = None,
    ) -> None:
        # Row-major, as parts are encoded.
        self._local = [torch.empty(t.shape, device=t.device) for t in like] if made_in is None else made_in
        self._to_make = set(range(len(self._local)))
        self._work = self._start(reduce)
        self.sending = CompressedSending(self._work, reduce.parts, indices, copied=True)

    def all_finite(self) -> Tensor:
        """0-dim bool, the same on every rank."""
        return self._work.all_finite()

    def undo(self) -> None:
        """Put error feedback back; the step is not made."""
        self._work.undo()
        self._let_go()

    @abstractmethod
    def commit(self) -> None:
        """Make the step, by `_decode` or `_accept`; the group's step count is already that of the step."""

    @abstractmethod
    def _local_momenta(self, indices: Sequence[int]) -> Sequence[Tensor]:
        """What this rank gives of some tensors of the average, fp32; asked for once for each."""

    def _decode(self, out: Sequence[Tensor]) -> None:
        """Write the mean; as of `CompressedWork`."""
        self._work.decode(out)
        self._let_go()

    def _accept(self) -> None:
        """The mean was read from the parts of the average; as of `CompressedWork`."""
        self._work.accept()
        self._let_go()

    def _start(self, reduce: CompressedAllreduce) -> CompressedWork:
        if not reduce.parts:
            self._fill(range(len(self._local)))
            return reduce.start(self._local)
        encode, undo = reduce.encoding(self._local)

        def fill_and_encode(part: Part) -> None:
            self._fill(part.used)
            encode(part)

        return reduce.start_with(fill_and_encode, undo, overlap=False, send=False)

    def _fill(self, indices: Sequence[int]) -> None:
        wanted = sorted(self._to_make.intersection(indices))
        self._to_make.difference_update(wanted)
        if wanted:
            torch._foreach_copy_([self._local[i] for i in wanted], list(self._local_momenta(wanted)))

    def _let_go(self) -> None:
        """Forget the work, which knows this: gradients are to be freed at once, not by the garbage collector."""
        del self._work, self.sending
