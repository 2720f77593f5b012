"""Error feedback as an object: what compression has not said yet, on both sides of the collective."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onebit.compress.errors import InputError
from onebit.compress.layout import Layout, Segment

_log = logging.getLogger(__name__)

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a residual is the feedback of; a change of any of it would give elements the feedback of others.

    Attributes:
        numels: elements of every tensor, in the order of the list that is averaged.
        layouts: the buckets, none with one rank; segments count tensors as `numels` does.
        rank: whose residual it is, which is also the chunk it serves.
        world_size: number of ranks.
        device: where the tensors are.
        feedback: errors are kept; else there is nothing to hold.
    """

    numels: tuple[int, ...]
    layouts: tuple[Layout, ...]
    rank: int
    world_size: int
    device: torch.device
    feedback: bool = True


class Residual:
    """The error feedback of one compressed average; make it empty, the first average gives it its sizes.

    The *worker* residual is what this rank has not yet told the others, one fp32 per element. The *server* residual
    belongs to the chunk whose mean this rank computes, and is what it has not yet told of that mean. Padding is part of
    neither. Where the codec keeps no errors both stay empty.
    """

    def __init__(self) -> None:
        self._place: Place | None = None
        self.worker: list[Tensor] = []
        self.server: list[Tensor] = []
        self._pending: Mapping[str, Any] | None = None

    def refusal(self, place: Place) -> InputError | None:
        """Return why `bind(place)` would raise; None if it would not."""
        if self._place not in (None, place):
            held = self._place
            assert held is not None
            return InputError(
                f"rank {place.rank}: this Residual holds the error feedback of {len(held.numels)} tensors with "
                f"{sum(held.numels)} elements (rank {held.rank} of {held.world_size}), and is used now for "
                f"{len(place.numels)} with {sum(place.numels)} (rank {place.rank} of {place.world_size}), or with "
                "another codec, bucket size or device; use one Residual per averaged list of tensors"
            )
        return None if self._pending is None or not place.feedback else _misfit(self._pending, place)

    def bind(self, place: Place) -> None:
        """Allocate for this place and take over a loaded state, or check that what is there was made for it.

        Raises:
            InputError: it holds feedback of other tensors, another codec, bucket size, world size or rank; nothing was
                changed.
        """
        refusal = self.refusal(place)
        if refusal is not None:
            raise refusal
        if self._place is None:
            self._place = place
            kept = place.layouts if place.feedback else ()
            self.worker = [torch.zeros(layout.padded_numel, device=place.device) for layout in kept]
            self.server = [torch.zeros(layout.chunk_numel, device=place.device) for layout in kept]
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self.load_state_dict(pending)

    def per_bucket(self) -> Sequence[tuple[Tensor | None, Tensor | None]]:
        """The worker's and the server's residual of every bucket of the place that it is bound to."""
        if self.worker:
            return list(zip(self.worker, self.server, strict=True))
        return [(None, None)] * (0 if self._place is None else len(self._place.layouts))

    def reset(self) -> None:
        """Forget all feedback, a loaded state that was not used yet included. Sizes stay."""
        self._pending = None
        for part in (*self.worker, *self.server):
            part.zero_()

    def rescale(self, factor: float) -> None:
        """Multiply all feedback by `factor`, as when a loss scale changes.

        Raises:
            InputError: `factor` is not finite.
        """
        if not isinstance(factor, (int, float, Tensor)) or not math.isfinite(factor):
            raise InputError(f"rescale: the factor must be finite, got {factor!r}")
        for part in (*self.worker, *self.server):
            part.mul_(factor)
        if self._pending is not None:
            scaled = {key: self._pending[key] * factor for key in ("worker", "server")}
            self._pending = {**self._pending, **scaled}

    def norm(self) -> Tensor:
        """The Euclidean norm of all feedback of this rank, as a 0-dim fp32 tensor on its device."""
        loaded = () if self._pending is None else (self._pending["worker"], self._pending["server"])
        parts = [part for part in (*self.worker, *self.server, *loaded) if part.numel()]
        if not parts:
            return torch.zeros(())
        total: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part) for part in parts]))
        return total

    def state_dict(self) -> dict[str, Any]:
        """Return real elements only, in tensor order, independent of padding; needs only ``weights_only`` loading.

        Keys: ``version``, ``rank``, ``world_size``, ``numels``, ``worker`` (sum of numels,) fp32, ``server`` (elements
        of this rank's chunks,) fp32 and ``server_spans``, (k, 3) int64 rows of tensor, offset, number of elements; or
        ``version`` alone where there is no feedback, as before the first use, with one rank and where none is kept.
        """
        if self._pending is not None:
            return dict(self._pending)
        if self._place is None or not self.worker:
            return {"version": VERSION}
        place = self._place
        worker = torch.zeros(sum(place.numels), device=place.device)
        for part, target in self._worker_parts(place, worker):
            target.copy_(part)
        served = [(part, segment) for part, segment in self._server_parts(place) if segment.numel]
        spans = [[s.tensor, s.offset, s.numel] for _, s in served]
        return {
            "version": VERSION,
            "rank": place.rank,
            "world_size": place.world_size,
            "numels": list(place.numels),
            "worker": worker,
            "server": torch.cat([part for part, _ in served]) if served else worker.new_empty(0),
            "server_spans": torch.tensor(spans, dtype=torch.int64).view(-1, 3),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of the same rank, world size and tensors; before the first use it is kept until then.

        Raises:
            InputError: it is of other tensors, another rank or world size, or incomplete; nothing was changed.
        """
        _check_state(state)
        if "worker" not in state:
            self.reset()
            return
        place = self._place
        if place is None:
            self._pending = dict(state)
            return
        if not place.feedback:
            _log.warning(
                "rank %d: the codec keeps no error feedback, so that of %d elements which was loaded is dropped",
                place.rank,
                sum(state["numels"]),
            )
            return
        misfit = _misfit(state, place)
        if misfit is not None:
            raise misfit
        held = _Spans(state["server"], state["server_spans"])
        for part, source in self._worker_parts(place, state["worker"].to(place.device)):
            part.copy_(source)
        for part, s in self._server_parts(place):
            found = held.find(s.tensor, s.offset, s.numel)
            assert found is not None
            part.copy_(found)

    @staticmethod
    def check(state: Any) -> None:
        """Raise InputError unless this can be a state of some rank: complete, and every size that of the others."""
        _check_state(state)

    @staticmethod
    def reshard(states: Sequence[Mapping[str, Any]], world_size: int) -> list[dict[str, Any]]:
        """Turn the states of all ranks into those of `world_size` ranks.

        What the residuals add to the average is conserved: the mean of the worker residuals (every new rank holds that
        mean) and the server residual of every element. Of an average with `local_group` the ranks of one number in
        their nodes are numbered by node, and each holds its slice alone: here a state is one of a node, and each rank
        of that node may load it.

        Args:
            states: `state_dict()` of every rank, in any order; with `local_group` of all ranks of all nodes.
            world_size: the new number of ranks; with `local_group` of nodes.

        Returns:
            One state per new rank; their tensors are the same objects.

        Raises:
            InputError: ranks are missing, doubled, or hold different tensors.
        """
        if world_size < 1:
            raise InputError(f"reshard: world_size must be at least 1, got {world_size}")
        for state in states:
            _check_state(state)
        if states and all("worker" not in state for state in states):
            return [{"version": VERSION} for _ in range(world_size)]
        held = [state for state in states if "worker" in state]
        ranks = sorted(state["rank"] for state in held)
        old = held[0]["world_size"] if held else 0
        kinds = {(state["world_size"], *state["numels"]) for state in held}
        whole = ranks == list(range(old)) or _are_slices(held, old)
        if len(kinds) != 1 or len(held) != len(states) or not whole:
            raise InputError(
                f"reshard: expected one state of each of {old or 'all'} ranks, all of the same tensors; got "
                f"{len(states)}, of ranks {ranks} with {sorted({sum(state['numels']) for state in held})} elements"
            )
        numels = states[0]["numels"]
        total = torch.zeros_like(states[0]["worker"], dtype=torch.float64)
        for state in sorted(states, key=lambda state: int(state["rank"])):  # the order given changes no bit
            total += state["worker"].to(total)
        worker = (total / old).float()
        server = torch.zeros_like(worker)
        starts = torch.tensor([0, *numels]).cumsum(0).tolist()
        for state in states:
            at = 0
            for tensor, offset, numel in state["server_spans"].tolist():
                first = starts[tensor] + offset
                server[first : first + numel] = state["server"][at : at + numel]
                at += numel
        spans = torch.tensor([[t, 0, n] for t, n in enumerate(numels) if n], dtype=torch.int64).view(-1, 3)
        common = {"version": VERSION, "world_size": world_size, "numels": numels, "server_spans": spans}
        return [{**common, "rank": r, "worker": worker, "server": server} for r in range(world_size)]

    def _worker_parts(self, place: Place, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of the same elements: in a bucket's residual, and in one flat tensor of all tensors in order."""
        starts = torch.tensor([0, *place.numels]).cumsum(0).tolist()
        for layout, worker in zip(place.layouts, self.worker, strict=True):
            for s in layout.segments:
                first = starts[s.tensor] + s.offset
                yield worker[layout.residual_span(s)], flat[first : first + s.numel]

    def _server_parts(self, place: Place) -> Iterator[tuple[Tensor, Segment]]:
        for layout, server in zip(place.layouts, self.server, strict=True):
            for s in layout.chunk_segments(place.rank):
                yield server[layout.residual_span(s)], s


class _Spans:
    """Looks up runs of elements in the server part of a state."""

    def __init__(self, values: Tensor, spans: Tensor) -> None:
        self._values = values
        self._rows: dict[int, list[tuple[int, int, int]]] = {}
        at = 0
        for tensor, offset, numel in spans.tolist():
            self._rows.setdefault(tensor, []).append((offset, numel, at))
            at += numel

    def find(self, tensor: int, offset: int, numel: int) -> Tensor | None:
        for start, length, at in self._rows.get(tensor, ()):
            if start <= offset and offset + numel <= start + length:
                first = at + offset - start
                return self._values[first : first + numel]
        return None


def _are_slices(states: Sequence[Mapping[str, Any]], world_size: int) -> bool:
    """Whether these are as many states of each rank, which together serve every element once."""
    ranks = [state["rank"] for state in states]
    even = len({ranks.count(rank) for rank in range(world_size)}) == 1
    return even and sum(state["server"].numel() for state in states) == sum(states[0]["numels"])


def _misfit(state: Mapping[str, Any], place: Place) -> InputError | None:
    """Why a state, complete by itself, cannot be taken over in this place."""
    if place.world_size == 1:
        return InputError(
            f"the error feedback to load is of rank {state['rank']} of {state['world_size']}, and a single rank "
            "compresses nothing: load without it, or train on as many ranks as before"
        )
    expected = {"numels": list(place.numels), "rank": place.rank, "world_size": place.world_size}
    for key, value in expected.items():
        if state[key] != value:
            return InputError(
                f"rank {place.rank}: the residual to load has {key} {state[key]}, here it is {value}; load on every "
                "rank the state that it saved itself; onebit.optim.checkpoint.load, and "
                "Residual.reshard(states of all ranks, world_size), take other numbers of ranks"
            )
    held = _Spans(state["server"], state["server_spans"])
    for layout in place.layouts:
        for s in layout.chunk_segments(place.rank):
            if held.find(s.tensor, s.offset, s.numel) is None:
                return InputError(
                    f"rank {place.rank}: the residual to load was made with another bucket size, block size or "
                    f"local_group: it does not hold (tensor, offset, numel) {(s.tensor, s.offset, s.numel)}; use "
                    "the old options, or Residual.reshard"
                )
    return None


def _check_state(state: Any) -> None:
    """Raise InputError unless a state is complete and consistent by itself."""
    version = state.get("version") if isinstance(state, Mapping) else type(state).__name__
    if type(version) is not int or version != VERSION:
        raise InputError(f"a residual's state has version {VERSION}, got {version!r}; was it made by state_dict()?")
    if len(state) == 1:
        return
    keys = {"version", "rank", "world_size", "numels", "worker", "server", "server_spans"}
    if state.keys() != keys:
        raise InputError(
            f"a residual's state lacks {', '.join(sorted(keys - state.keys())) or 'nothing'}, and has "
            f"{', '.join(sorted(map(str, state.keys() - keys))) or 'nothing'} beside; was it made by state_dict()?"
        )
    rank, world_size, numels = state["rank"], state["world_size"], state["numels"]
    if type(rank) is not int or type(world_size) is not int or not 0 <= rank < world_size:
        raise InputError(f"a residual's state is of rank {rank!r} of {world_size!r}, expected ints, the first smaller")
    if not isinstance(numels, (list, tuple)) or not all(type(n) is int and n >= 0 for n in numels):
        raise InputError(
            "a residual's state has numels that are not the sizes of tensors; was it made by state_dict()?"
        )
    for key, dtype, dim in (
        ("worker", torch.float32, 1),
        ("server", torch.float32, 1),
        ("server_spans", torch.int64, 2),
    ):
        value = state[key]
        if not isinstance(value, Tensor) or value.dtype != dtype or value.dim() != dim or value.layout != torch.strided:
            raise InputError(f"a residual's state has {key} that is no tensor of {dim} dimensions and dtype {dtype}")
    if state["worker"].numel() != sum(numels):
        raise InputError(
            f"a residual's state of {sum(numels)} elements holds a worker residual of {state['worker'].numel()}"
        )
    _check_spans(state["server_spans"], numels, state["server"].numel())


def _check_spans(spans: Tensor, numels: Sequence[int], served: int) -> None:
    """Raise InputError unless these runs lie within tensors of these sizes and have `served` elements in all."""
    rows = spans.tolist() if spans.shape[1] == 3 else [(-1, 0, 0)]
    for tensor, offset, numel in rows:
        if not 0 <= tensor < len(numels) or offset < 0 or numel < 1 or offset + numel > numels[tensor]:
            raise InputError(
                f"a residual's state has (tensor, offset, numel) {(tensor, offset, numel)} among its server_spans, "
                f"which is no part of its {len(numels)} tensors"
            )
    total = sum(numel for _, _, numel in rows)
    if served != total:
        raise InputError(f"a residual's state whose spans have {total} elements holds a server residual of {served}")
