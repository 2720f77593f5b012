"""What a result was measured on: processor, memory, versions. No host names and no paths."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata

import torch

PACKAGES = ("onebit", "torch", "numba", "numpy", "mpi4py")


def describe(device: str = "cpu") -> dict[str, object]:
    """Device, processor model, cores and memory of this machine; `device` is ``"cpu"`` or ``"cuda"``."""
    return {
        "device": "cpu" if device == "cpu" else torch.cuda.get_device_name(),
        "cpu": _cpu_model(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
    }


def cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def priority() -> str:
    """How this process is scheduled: ``"normal"``, ``"nice -20"`` and the like, or ``"real-time"`` as under `chrt`."""
    if hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR):
        return "real-time"
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    return f"nice {nice}" if nice else "normal"


def kind(device: str = "cpu") -> str:
    """The machine's kind, as result files are named: ``cpu-2core``, ``h200``."""
    if device == "cpu":
        return f"cpu-{cores()}core"
    return torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-")


def versions() -> dict[str, str]:
    """Versions of what the figures depend on; ``"source"`` or ``"absent"`` for a package that is not installed."""
    found = {"python": platform.python_version(), **{name: _package_version(name) for name in PACKAGES}}
    found["torch"] = torch.__version__
    return found


def _package_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "source" if name in sys.modules else "absent"


def _cpu_model() -> str:
    """The model name that the kernel tells, or what Python knows."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
