"""Error feedback as an object: what compression has not said yet, on both sides of the collective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from onebit.compress.errors import InputError
from onebit.compress.layout import Layout, Segment

VERSION = 1


class Residual:
    """The error feedback of one compressed average; make it empty, the first average gives it its sizes.

    The *worker* residual is what this rank has not yet told the others, one fp32 per element. The *server* residual
    belongs to the chunk whose mean this rank computes, and is what it has not yet told of that mean. Padding is part
    of neither.
    """

    def __init__(self) -> None:
        self._layouts: tuple[Layout, ...] | None = None
        self._numels: tuple[int, ...] = ()
        self._rank = 0
        self.worker: list[Tensor] = []
        self.server: list[Tensor] = []
        self._pending: Mapping[str, Any] | None = None

    def bind(self, numels: Sequence[int], layouts: Sequence[Layout], rank: int, device: torch.device) -> None:
        """Allocate for these buckets, or check that what is there was made for them.

        Args:
            numels: elements of every tensor, in the order of the list that is averaged.
            layouts: the buckets; segments count tensors as `numels` does.
            rank: whose residual this is, which is also the chunk it serves.
            device: where the tensors are.

        Raises:
            InputError: it holds feedback of other tensors, another codec, bucket size, world size or rank.
        """
        if self._layouts is None:
            self._numels, self._layouts, self._rank = tuple(numels), tuple(layouts), rank
            self.worker = [torch.zeros(layout.padded_numel, device=device) for layout in layouts]
            self.server = [torch.zeros(layout.chunk_numel, device=device) for layout in layouts]
            if self._pending is not None:
                pending, self._pending = self._pending, None
                self.load_state_dict(pending)
        elif (self._numels, self._layouts, self._rank) != (tuple(numels), tuple(layouts), rank):
            raise InputError(
                f"rank {rank}: this Residual holds the error feedback of {len(self._numels)} tensors with "
                f"{sum(self._numels)} elements (rank {self._rank}), and is used now for {len(numels)} with "
                f"{sum(numels)}, or with another codec, bucket size or world size; use one Residual per averaged list of "
                "tensors, or reset() it"
            )

    def refuse_pending(self) -> None:
        """Raise if a state was loaded, because a single rank compresses nothing and would lose it.

        Raises:
            InputError: there is error feedback that nobody would use.
        """
        if self._pending is not None:
            raise InputError(
                f"the loaded error feedback is of rank {self._pending['rank']} of {self._pending['world_size']}, and a "
                "single rank compresses nothing: load without it, or train on as many ranks as before"
            )

    def reset(self) -> None:
        """Forget all feedback and all sizes."""
        self.__init__()  # type: ignore[misc]

    def rescale(self, factor: float) -> None:
        """Multiply all feedback by `factor`, as when a loss scale changes.

        Raises:
            InputError: `factor` is not finite.
        """
        if not torch.isfinite(torch.tensor(float(factor))):
            raise InputError(f"rescale: the factor must be finite, got {factor}")
        for part in (*self.worker, *self.server):
            part.mul_(factor)

    def norm(self) -> Tensor:
        """The Euclidean norm of all feedback of this rank, as a 0-dim fp32 tensor on its device."""
        parts = [part for part in (*self.worker, *self.server) if part.numel()]
        if not parts:
            return torch.zeros(())
        norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part) for part in parts]))
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Return real elements only, in tensor order, independent of padding; needs only ``weights_only`` loading.

        Keys: ``version``, ``rank``, ``world_size``, ``numels``, ``worker`` (sum of numels,) fp32, ``server``
            (elements of this rank's chunks,) fp32 and ``server_spans``, (k, 3) int64 rows of tensor, offset, number
            of elements.
        """
        if self._layouts is None:
            return {"version": VERSION} if self._pending is None else dict(self._pending)
        worker = torch.zeros(sum(self._numels), device=self._device())
        for part, target in self._worker_parts(worker):
            target.copy_(part)
        served = [(part, segment) for part, segment in self._server_parts() if segment.numel]
        spans = [[s.tensor, s.offset, s.numel] for _, s in served]
        return {
            "version": VERSION,
            "rank": self._rank,
            "world_size": self._layouts[0].chunks,
            "numels": list(self._numels),
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
            for part in (*self.worker, *self.server):
                part.zero_()
            return
        if self._layouts is None:
            self._pending = dict(state)
            return
        expected = {"numels": list(self._numels), "rank": self._rank, "world_size": self._layouts[0].chunks}
        for key, value in expected.items():
            if state[key] != value:
                raise InputError(
                    f"rank {self._rank}: the residual to load has {key} {state[key]}, here it is {value}; "
                    "Residual.reshard(states of all ranks, world_size) turns one into the other"
                )
        spans = {(s.tensor, s.offset, s.numel) for _, s in self._server_parts()}
        held = _Spans(state["server"], state["server_spans"])
        missing = [span for span in spans if held.find(*span) is None]
        if missing:
            raise InputError(
                f"rank {self._rank}: the residual to load was made with another bucket size or block size: it does not "
                f"hold (tensor, offset, numel) {missing[0]}; use the old options, or Residual.reshard"
            )
        worker = state["worker"].to(self._device())
        for part, source in self._worker_parts(worker):
            part.copy_(source)
        for part, s in self._server_parts():
            found = held.find(s.tensor, s.offset, s.numel)
            assert found is not None
            part.copy_(found)

    @staticmethod
    def reshard(states: Sequence[Mapping[str, Any]], world_size: int) -> list[dict[str, Any]]:
        """Turn the states of all ranks into those of `world_size` ranks.

        What the residuals add to the average is conserved: the mean of the worker residuals (every new rank holds that
        mean) and the server residual of every element.

        Args:
            states: `state_dict()` of every rank, in any order.
            world_size: the new number of ranks.

        Returns:
            One state per new rank.

        Raises:
            InputError: ranks are missing, doubled, or hold different tensors.
        """
        if world_size < 1:
            raise InputError(f"reshard: world_size must be at least 1, got {world_size}")
        for state in states:
            _check_state(state)
        if not states or any("worker" not in state for state in states):
            return [{"version": VERSION} for _ in range(world_size)]
        old = states[0]["world_size"]
        ranks = sorted(state["rank"] for state in states)
        if ranks != list(range(old)) or any(state["numels"] != states[0]["numels"] for state in states):
            raise InputError(
                f"reshard: expected one state of each of {old} ranks, all of the same tensors; got ranks {ranks} with "
                f"{sorted({sum(state['numels']) for state in states})} elements"
            )
        numels = states[0]["numels"]
        worker = torch.stack([state["worker"].double() for state in states]).mean(0).float()
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
        return [{**common, "rank": r, "worker": worker.clone(), "server": server.clone()} for r in range(world_size)]

    def _device(self) -> torch.device:
        return self.worker[0].device

    def _worker_parts(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Pairs of the same elements: in a bucket's residual, and in one flat tensor of all tensors in order."""
        assert self._layouts is not None
        starts = torch.tensor([0, *self._numels]).cumsum(0).tolist()
        pairs = []
        for layout, worker in zip(self._layouts, self.worker, strict=True):
            for s in layout.segments:
                first = starts[s.tensor] + s.offset
                pairs.append((worker[layout.residual_span(s)], flat[first : first + s.numel]))
        return pairs

    def _server_parts(self) -> list[tuple[Tensor, Segment]]:
        assert self._layouts is not None
        return [
            (server[layout.residual_span(s)], s)
            for layout, server in zip(self._layouts, self.server, strict=True)
            for s in layout.chunk_segments(self._rank)
        ]


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


def _check_state(state: Mapping[str, Any]) -> None:
    if state.get("version") != VERSION:
        raise InputError(
            f"a residual's state has version {VERSION}, got {state.get('version')!r}; was it made by state_dict()?"
        )
    keys = {"rank", "world_size", "numels", "worker", "server", "server_spans"}
    if len(state) > 1 and not keys <= state.keys():
        raise InputError(f"a residual's state lacks {', '.join(sorted(keys - state.keys()))}")
    if "worker" in state and state["worker"].numel() != sum(state["numels"]):
        raise InputError(
            f"a residual's state of {sum(state['numels'])} elements holds a worker residual of "
            f"{state['worker'].numel()}"
        )
