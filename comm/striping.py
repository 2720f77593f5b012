"""Large collectives of NCCL over TCP sockets, cut into stripes that travel over a communicator each.

One thread of a host copies to sockets all that a communicator sends, some 3 GB/s, whatever the network could carry.
Several communicators have as many threads.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from onebit.comm.backend import Collective, Handle
from onebit.comm.clock import medians
from onebit.comm.errors import BackendError
from onebit.comm.machine import machine
from onebit.comm.numbers import gather_numbers
from onebit.compress.launch_env import local_world_size
from onebit.compress.layout import ALIGNMENT
from onebit.compress.threads import cores

if TYPE_CHECKING:
    from onebit.comm.torch_backend import TorchBackend

_log = logging.getLogger(__name__)

SWITCH = "ONEBIT_NCCL_STRIPES"  # in the environment of all ranks: how many, on any network; 1: none
LEAST = 4 << 20  # bytes of an output that is worth several collectives
MOST = 4  # stripes that nobody asked for
MARGIN = 1.2  # a link may carry no more in stripes, and they take threads and memory: they must win by this factor


class Stripes:
    """The communicators that carry an NCCL backend's large collectives together, all with the same ranks.

    Unless somebody has said how many there are to be, the first collective that could use them tries whether it is
    faster with them. If it is not, they stay open without use, as any process group until torch.distributed is closed.

    Attributes:
        count: how many; 1: its own alone; None: none could use them so far.

    Raises:
        BackendError: `SWITCH` is set to what is no number of stripes.
    """

    def __init__(self, backend: TorchBackend) -> None:
        self._backend = weakref.ref(backend)
        self._wanted = _wanted(backend)
        self._parts: Sequence[TorchBackend] = ()
        self.count: int | None = None

    def cut(self, whole: Callable[[], object], output: Tensor, input: Tensor) -> list[Stripe]:
        """A collective in as many stripes as there are; collective, and the host waits for the other ranks.

        Args:
            whole: makes the collective in one piece, and waits.
            output: (n · bytes,) uint8: a piece from every rank.
            input: (n · bytes,) uint8: a piece for every rank; or (bytes,) uint8, the same for all.

        Returns:
            None of them, on all ranks alike, if it is to be made in one piece.

        Raises:
            TransportError: a rank did not take part within the timeout.
        """
        if self.count is not None:
            return _cut(self._parts, output, input)
        backend = self._backend()
        assert backend is not None
        self._parts, told = self._opened(backend)
        stripes = _cut(self._parts, output, input)
        if stripes and not told:
            one, several = medians(backend, output.device, [whole, lambda: start(stripes).wait(backend.timeout)])
            _log.debug("rank %d: %.3g s in one piece, %.3g s in %d", backend.rank, one, several, len(stripes))
            if one < MARGIN * several:
                stripes, self._parts = [], ()
        self.count = max(1, len(stripes))
        return stripes

    def _opened(self, backend: TorchBackend) -> tuple[Sequence[TorchBackend], bool]:
        """A backend for each stripe, at least two, or none; and whether all ranks were told how many."""
        rows = gather_numbers(backend, [*map(float, self._wanted), float(machine()), float(backend.group_count())])
        wanted = [Wanted(int(inside), int(between), bool(told)) for inside, between, told, *_ in rows]
        machines, group_counts = ({row[i] for row in rows} for i in (-2, -1))
        count = min(one.between if len(machines) > 1 else one.inside for one in wanted)
        if len(group_counts) > 1:  # then they cannot be split
            count = 1
        # A part of a process group is one.
        parts = [cast("TorchBackend", backend.split(0)) for _ in range(count if count > 1 else 0)]
        for part in parts:  # connect now, while the timeout limits it
            gather_numbers(part, [0.0])
        return parts, all(one.told for one in wanted)


class Wanted(NamedTuple):
    """How many stripes a rank wants where all ranks are on its machine, and where they are not; whether it was told."""

    inside: int
    between: int
    told: bool


def _wanted(backend: TorchBackend) -> Wanted:
    told = os.environ.get(SWITCH, "")
    if told and not (told.isdecimal() and int(told) > 0):
        raise BackendError(f"rank {backend.rank}: {SWITCH} must be a number of stripes, such as 4 or 1, got {told!r}")
    if not backend.divisible:
        return Wanted(1, 1, False)
    if told:
        return Wanted(int(told), int(told), True)
    count = max(1, min(MOST, cores() // (2 * local_world_size()))) if _by_sockets() else 1
    near = all(os.environ.get(f"NCCL_{way}_DISABLE", "0") != "0" for way in ("P2P", "SHM"))
    return Wanted(count if near else 1, count, False)


def _by_sockets(devices: Path = Path("/sys/class/infiniband")) -> bool:
    """Whether NCCL has nothing better between machines, as far as can be told from outside."""
    network = os.environ.get("NCCL_NET", "")
    if network:
        return network.lower() == "socket"
    if os.environ.get("NCCL_NET_PLUGIN", "none") != "none":
        return False
    return os.environ.get("NCCL_IB_DISABLE", "0") != "0" or not devices.is_dir() or not any(devices.iterdir())


class StripedCollective(Collective):
    """A collective over NCCL, in stripes where it is large and faster so.

    Its first start is in one piece, for opening communicators takes longer than what is made once.
    """

    def __init__(
        self, backend: TorchBackend, stripes: Stripes, operation: str, output: Tensor, input: Tensor, wire_bytes: int
    ) -> None:
        super().__init__(backend, operation, output, input, wire_bytes)
        self._of_backend = stripes
        self._large = output.nbytes >= LEAST
        self._stripes: list[Stripe] | None = None

    def _launch(self, in_line: bool) -> Handle | None:
        if self._large and self._started:
            if self._stripes is None and not torch.cuda.is_current_stream_capturing():  # when others can be waited for
                self._stripes = self._of_backend.cut(self._whole, _as_bytes(self._output), _as_bytes(self._input))
            if self._stripes:
                self._backend.check()
                return start(self._stripes)
        return super()._launch(in_line)

    def _whole(self) -> None:
        handle = super()._launch(in_line=True)
        if handle is not None:
            handle.wait(self._backend.timeout)


class Stripe(NamedTuple):
    """What one communicator sends to and brings from every rank."""

    part: TorchBackend
    outputs: list[Tensor]
    inputs: list[Tensor]


def _cut(parts: Sequence[TorchBackend], output: Tensor, input: Tensor) -> list[Stripe]:
    if not parts:
        return []
    pieces = output.view(parts[0].size, -1)
    own = input.view(-1, pieces.shape[1]).expand_as(pieces)
    return [
        Stripe(part, [piece[first:last] for piece in pieces], [piece[first:last] for piece in own])
        for part, (first, last) in zip(parts, pairwise(bounds(pieces.shape[1], len(parts))), strict=True)
    ]


def bounds(bytes: int, count: int) -> list[int]:
    """Where each stripe of a piece begins, and the last ends: parts as even as whole units of `ALIGNMENT` allow."""
    units = bytes // ALIGNMENT
    return [*(units * i // count * ALIGNMENT for i in range(count)), bytes]


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().view(torch.uint8)


def start(stripes: Sequence[Stripe]) -> Handle:
    """Have all of them sent at once."""
    return _All([part.send(outputs, inputs) for part, outputs, inputs in stripes])


class _All:
    def __init__(self, handles: Sequence[Handle | None]) -> None:
        self._handles = handles

    def wait(self, timeout: float) -> None:
        for handle in self._handles:
            if handle is not None:
                handle.wait(timeout)
