"""Hooks that start a step's exchanges during backward, and end a step that is given up, on all ranks alike."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from onebit.compress import InputError
from onebit.optim.exchange import Exchange
from onebit.optim.refusals import refused_gradient
from onebit.optim.rounds import Place, Round

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from onebit.optim.base import CompressedOptimizer

# MiB of fp32 per bucket. What is sent last is not hidden; but ranks wait for each other twice in every bucket.
OVERLAPPED_BUCKET_MB = {"cpu": 12.0, "cuda": 64.0}


# Whose hook on a parameter acts: that of the latest optimizer, for one before it may still be alive.
_latest = WeakTensorKeyDictionary()  # parameter -> weak reference to its Overlap, or None


def claim(params: Iterable[Tensor], overlap: Overlap | None) -> None:
    """From now on the hooks of no other optimizer act for these parameters."""
    for p in params:
        _latest[p] = None if overlap is None else weakref.ref(overlap)


class Overlap:
    """What ``overlap=True`` adds to an optimizer.

    A first step is made as without it: ranks agree, and rank 0 tells the order in which its gradients became ready, by
    which buckets are sent from then on. With one rank nothing is sent. Ranks that are threads share one thread for the
    backward of a GPU, where one would wait for the other; there nothing is sent before `step`.

    Args:
        optimizer: whose it is; not kept alive by this.

    Attributes:
        started, buckets: of the last step, how many buckets were sent before `step` was called, and of how many.
    """

    def __init__(self, optimizer: CompressedOptimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._handles: dict[Tensor, RemovableHandle] = {}
        self._places: dict[Tensor, Place] = {}
        self._order: dict[Place, int] | None = None
        self._arrived: list[Place] = []
        self._round: Round | None = None
        self._accumulating = False
        self._side: torch.cuda.Stream | None = None
        self.started = self.buckets = 0

    def __del__(self) -> None:
        for handle in self._handles.values():
            handle.remove()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in here start nothing."""
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    def watch(self) -> None:
        """Hook into the parameters that are trained now and were not before."""
        own = weakref.ref(self)

        def ready(p: Tensor) -> None:
            overlap = own()
            if overlap is not None:
                overlap._ready(p)

        for p, place in self._all_places():
            self._places[p] = place
            if p.requires_grad and p not in self._handles:
                self._handles[p] = p.register_post_accumulate_grad_hook(ready)  # type: ignore[no-untyped-call]

    def start_over(self) -> None:
        """Parameters or state have changed: the next step is made as the first."""
        self._order = None
        self._arrived.clear()
        self.watch()

    def refuse_under_way(self, call: str) -> None:
        """Raise InputError if a step is on its way."""
        if self._round is not None:
            raise InputError(
                f"{self._who()}: {call} between backward and step(), while gradients are on their way; call it after "
                "step(), or after zero_grad(), which gives the step up on every rank"
            )

    def exchange_all(self, exchanges: list[Exchange]) -> None:
        """Exchange what `step` needs, and fill the list with the exchanges of all groups, in order.

        Raises:
            InputError: gradients are not those that were sent; no rank makes the step.
        """
        wrong = self._wrong()
        if wrong is not None:
            self.give_up()
            raise InputError(f"{self._who()}: {wrong}; this step was not made, on any rank")
        if self._order is not None and self._owner().backend.size > 1:
            self._finish(exchanges)
            return
        if self._order is None:
            self._order = self._learn_order()
        self.started = self.buckets = 0
        self._owner()._steps.exchange_all(exchanges)

    @torch.no_grad()
    def give_up(self) -> None:
        """End a step that is on its way without making it; collective if there is one, as the other ranks' `step` is.

        Error feedback is put back. Where gradients were overwritten after they were sent, it becomes 0 instead. Of a
        step in which all groups make local ones nobody else hears, so it is made without what this rank has to give.
        None is on its way before the first gradient is ready: nothing tells a backward that failed by then from none.
        """
        if self._round is not None:
            optimizer = self._owner()
            optimizer._steps.make(lambda exchanges: self._finish(exchanges, spoil=True), on_device=False)

    @torch.no_grad()
    def _ready(self, p: Tensor) -> None:
        """A gradient is complete in this backward."""
        optimizer = self._optimizer()
        latest = _latest[p]
        if optimizer is None or self._accumulating or latest is None or latest() is not self:
            return
        place = self._places[p]
        if not optimizer._agreed or self._order is None:
            self._arrived.append(place)
        elif optimizer.backend.size > 1 and not (p.is_cuda and optimizer.backend.name == "threads"):
            if p.grad is not None and p.grad.layout is not torch.strided:
                self._refuse_sparse(optimizer)
            self._advance(optimizer, self._order, p, place)

    def _advance(self, optimizer: CompressedOptimizer, order: dict[Place, int], p: Tensor, place: Place) -> None:
        """Send what can be sent now."""
        if p.is_cuda and self._side is None:
            self._side = torch.cuda.Stream(p.device)  # type: ignore[no-untyped-call]
        if self._round is None:
            self._round = Round(optimizer, order)
        try:
            self._round.ready(place, self._side)
        except InputError:
            raise  # the round is as before: `step` or `zero_grad` ends it, on all ranks alike
        except BaseException:
            failed, self._round = self._round, None
            failed.undo()
            raise

    def _finish(self, exchanges: list[Exchange], spoil: bool = False) -> None:
        under_way, self._round = self._round, None
        if under_way is None:
            under_way = Round(self._owner(), self._order or {})
        under_way.finish(exchanges, spoil)
        self.started, self.buckets = under_way.sent_early, len(under_way.buckets)

    def _wrong(self) -> str | None:
        """Why the step that is on its way cannot be made; None: it can."""
        optimizer = self._owner()
        if optimizer.averager is not None:
            return "its model is in DistributedDataParallel, which overlaps warm-up by itself; use overlap=False"
        if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
            return (
                "a GradScaler drives step(), but gradients were sent during backward with its scale in them; train in "
                "bfloat16, which needs no scaler, or make the optimizer with overlap=False"
            )
        altered = None if self._round is None else self._round.altered()
        if altered is None:
            return None
        return (
            f"{altered} between backward and step(), after it was sent; clipping, unscaling and other changes need "
            "overlap=False, a second backward() needs the others in optimizer.no_sync(), and gradients are dropped by "
            "optimizer.zero_grad()"
        )

    def _learn_order(self) -> dict[Place, int]:
        """Number gradients in the order of rank 0's last backward; those that it had none for come last."""
        places = self._all_places()
        expected = list(dict.fromkeys([*self._arrived, *reversed([place for _, place in places])]))
        self._arrived.clear()
        numbers = {place: number for number, place in enumerate(expected)}
        backend = self._owner().backend
        if backend.size == 1 or not places:
            return numbers
        told = torch.tensor([numbers[place] for _, place in places], dtype=torch.int64, device=places[0][0].device)
        if backend.rank != 0:
            told.zero_()
        backend.all_reduce(told).wait()
        return dict(zip([place for _, place in places], told.tolist(), strict=True))

    def _all_places(self) -> list[tuple[Tensor, Place]]:
        groups: Sequence[Mapping[str, Any]] = self._owner().param_groups
        return [(p, (g, i)) for g, group in enumerate(groups) for i, p in enumerate(group["params"])]

    def _refuse_sparse(self, optimizer: CompressedOptimizer) -> None:
        refusal = refused_gradient(optimizer)
        if refusal is not None:
            raise refusal

    def _owner(self) -> CompressedOptimizer:
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer

    def _who(self) -> str:
        optimizer = self._owner()
        return f"rank {optimizer.backend.rank}: {type(optimizer).__name__}(overlap=True)"
