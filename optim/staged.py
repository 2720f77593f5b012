"""A compressed average of local momenta that are made part by part, each when its part is sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from onebit.comm import CompressedAllreduce, CompressedWork, Part
from onebit.optim.exchange import CompressedSending


class StagedAverage:
    """One use of a compressed average, for steps that have no kernels to encode by.

    Args:
        reduce: the average.
        like: its tensors' shapes and device; values are not read.
        make: of the tensors with these indices, what this rank gives, fp32; called once for each index.
        indices: in the group, of the parameters that are averaged.
        made_in: row-major fp32 tensors like those of the average, where what `make` returns is kept; None: new ones.

    Attributes:
        sending: what a staged exchange has; `all_finite`, and then `decode`, `accept` or `undo`, come after it has
            finished.
    """

    def __init__(
        self,
        reduce: CompressedAllreduce,
        like: Sequence[Tensor],
        make: Callable[[Sequence[int]], Sequence[Tensor]],
        indices: Sequence[int],
        made_in: Sequence[Tensor] | None = None,
    ) -> None:
        # Row-major, as parts are encoded.
        self._local = [torch.empty(t.shape, device=t.device) for t in like] if made_in is None else made_in
        self._make = make
        self._to_make = set(range(len(self._local)))
        self._work = self._start(reduce)
        self.sending = CompressedSending(self._work, reduce.parts, indices, copied=True)

    def all_finite(self) -> Tensor:
        """As of `CompressedWork`."""
        return self._work.all_finite()

    def decode(self, out: Sequence[Tensor]) -> None:
        """As of `CompressedWork`."""
        self._work.decode(out)
        self._let_go()

    def accept(self) -> None:
        """As of `CompressedWork`."""
        self._work.accept()
        self._let_go()

    def undo(self) -> None:
        """As of `CompressedWork`."""
        self._work.undo()
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
            torch._foreach_copy_([self._local[i] for i in wanted], list(self._make(wanted)))

    def _let_go(self) -> None:
        """Forget who knows the gradients, and this: all is to be freed at once, not by the garbage collector."""
        del self._work, self._make, self.sending
