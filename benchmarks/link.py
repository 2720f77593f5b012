"""The kernel's own count of the bytes that leave a network interface."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Link:
    """A network interface of this host, by name."""

    interface: str

    def sent(self) -> int:
        """Bytes sent since the interface came up, headers included.

        Raises:
            SystemExit: there is no such interface.
        """
        counter = Path("/sys/class/net") / self.interface / "statistics" / "tx_bytes"
        if not counter.exists():
            names = ", ".join(sorted(path.name for path in Path("/sys/class/net").glob("*")))
            raise SystemExit(f"no network interface {self.interface!r} here; there are {names}")
        return int(counter.read_text())
