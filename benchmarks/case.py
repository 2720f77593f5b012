"""A case is one thing to time: its inputs, what it runs, what must come out, and the formulas of its bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from onebit.comm.backend import Backend
from onebit.compress import Codec, SignCodec, num_threads

State = TypeVar("State")

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One point of a sweep, the same on every rank.

    Attributes:
        numel: elements of the tensor that is copied, encoded or averaged.
        dtype: its dtype; residuals are always float32.
        backend: the ranks that run together; size 1 when alone.
        device: where the tensors are.
        threads: threads that a NumPy yardstick may use (torch and Numba are told theirs at start).
        codec: the codec of every compressed case.
        payloads: how many payloads `reduce_encode` averages.
        bucket_mb: bucket size of the compressed average, in MB of float32.
        local: neighbouring ranks that share a node; 1: every rank is a node of its own.
        seed: rank r draws its inputs from `seed + r`.
    """

    numel: int
    backend: Backend
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    threads: int = 1
    codec: Codec = field(default_factory=SignCodec)
    payloads: int = 2
    bucket_mb: float = 16.0
    local: int = 1
    seed: int = 1

    def normal(self, rank: int | None = None) -> torch.Tensor:
        """The (numel,) standard normal input of a rank (None: this rank), equal wherever it is drawn."""
        generator = torch.Generator().manual_seed(self.seed + (self.backend.rank if rank is None else rank))
        return torch.randn(self.numel, generator=generator).to(self.device, self.dtype)

    def normals(self) -> list[torch.Tensor]:
        """The inputs of all ranks, in their order, on the CPU; a thread draws each."""
        with ThreadPoolExecutor(num_threads()) as pool:
            return list(pool.map(lambda rank: self.normal(rank).cpu(), range(self.backend.size)))


def nothing(state: object) -> None:
    """What a case does between runs when its inputs survive them."""


@dataclass(frozen=True, kw_only=True)
class Case(Generic[State]):
    """One table entry. The driver calls the functions in the order in which they stand here.

    Attributes:
        name: what `--case` and the tables call it.
        summary: one line for `--help`.
        family: the cases that are timed together, turn by turn, such as ``"kernels"``.
        role: what it serves as, when others are measured against it (``"copy"``, ``"chain"``, ``"plain"``).
        against: the roles it is measured against; the fastest case of a role is the yardstick.
        devices: the types of devices that it runs on.
        codecs: the kinds of codecs that it is about.
        nodes: it is about nodes of several ranks.
        capturable: on CUDA it can be captured in a graph once it has run.
        moved: the bytes that algbw counts: read and written in memory by a kernel, or the tensor of a collective.
        wire: the bytes that one rank must send, by formula.
        inputs: makes the state: inputs, outputs and whatever is built once.
        refresh: puts the inputs back before a run; not timed.
        run: the timed part.
        stages: seconds per named stage, summed over all runs so far, for a case that knows its stages.
        check: called before a run that is not timed; returns a function that afterwards counts the wrong elements.
    """

    name: str
    summary: str
    family: str
    role: str = ""
    against: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    codecs: tuple[type[Codec], ...] = (Codec,)
    nodes: bool = False
    capturable: bool = False
    moved: Callable[[Setting], float]
    wire: Callable[[Setting], float] = lambda setting: 0.0
    inputs: Callable[[Setting], State]
    refresh: Callable[[State], None] = nothing
    run: Callable[[State], None]
    stages: Callable[[State], Mapping[str, float]] = lambda state: {}
    check: Callable[[State], Callable[[], int]]

    def runs_with(self, device_type: str, codec: Codec, local: int = 1) -> bool:
        """Whether it is about such tensors, such a codec and nodes of `local` ranks."""
        return device_type in self.devices and isinstance(codec, self.codecs) and (local > 1 or not self.nodes)
