"""What a training run leaves behind: one JSON file that exists only if the run came to its end."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from onebit.comm.backend import Backend


@dataclass
class Record:
    """One run. Lists have one entry per step; bytes are those that one rank sent; times are rank 0's.

    Attributes:
        options: the command line, defaults filled in.
        environment: device, backend, and the versions of what took part.
        parameters: number of trained elements.
        loss: training loss, nats per byte, mean over ranks.
        phase: ``"dense"`` (plain allreduce), ``"warmup"`` or ``"compressed"``.
        wire_bytes: bytes handed to the transport in the step.
        seconds: time of the whole step.
        update_seconds: the part of it spent on averaging and on the update.
        held_out_loss: loss on held-out files after the last step, nats per byte.
        checksums: one of every rank's final parameters; equal if the ranks hold the same model.
    """

    options: Mapping[str, object]
    environment: Mapping[str, object]
    parameters: int
    loss: list[float] = field(default_factory=list)
    phase: list[str] = field(default_factory=list)
    wire_bytes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    update_seconds: list[float] = field(default_factory=list)
    held_out_loss: float = float("nan")
    checksums: list[int] = field(default_factory=list)

    @property
    def ranks_agree(self) -> bool:
        """Whether all ranks ended with bit-equal parameters."""
        return len(set(self.checksums)) == 1

    def add(self, *, loss: float, phase: str, wire_bytes: int, seconds: float, update_seconds: float) -> None:
        """Append one step."""
        self.loss.append(loss)
        self.phase.append(phase)
        self.wire_bytes.append(wire_bytes)
        self.seconds.append(seconds)
        self.update_seconds.append(update_seconds)

    def write(self, path: Path) -> None:
        """Write it in one move, so that a file at `path` is a whole record."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(asdict(self), default=str), encoding="utf-8")
        os.replace(partial, path)

    @classmethod
    def read(cls, path: Path) -> Record:
        """The record at `path`; FileNotFoundError if the run did not come to its end."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def environment(device: torch.device, backend: Backend) -> dict[str, object]:
    """Where a run took place: device, transport, ranks, threads and versions."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "backend": backend.name,
        "world_size": backend.size,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onebit": _version("onebit"),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
