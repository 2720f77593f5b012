"""Two hosts on one machine: network namespaces joined by a virtual cable of a given rate each way."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from onebit.benchmarks.signals import held_signals

MISSING, FORBIDDEN = 69, 77  # exit statuses: sysexits' EX_UNAVAILABLE and EX_NOPERM
TOOLS = ("ip", "tc")
NETWORK = "10.213.77"  # seen only inside the namespaces


class NetworkError(RuntimeError):
    """Namespaces or shaping are not to be had here; the message says what is missing and what to do.

    Attributes:
        status: the exit status that tells the cause apart.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Namespace:
    """One end of the cable: a namespace, and the interface and address it has in there."""

    name: str
    interface: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to put before a command to run it there."""
        return ("ip", "netns", "exec", self.name)


@contextlib.contextmanager
def shaped_pair(rate: str) -> Iterator[tuple[Namespace, Namespace]]:
    """Two namespaces joined by a cable of `rate` (as `tc` writes it: ``1gbit``) each way; gone when the block is left.

    Raises:
        NetworkError: iproute2 is absent, namespaces are not allowed here, or `tc` refuses the rate.
    """
    _require_tools()
    tag = secrets.token_hex(3)
    ends = tuple(Namespace(f"onebit-{tag}-{i}", f"ob{tag}v{i}", f"{NETWORK}.{i + 1}") for i in range(2))
    with held_signals() as release:
        try:
            _connect(ends[0], ends[1])
            for end in ends:
                _shape(end, rate)
            release()
            yield ends[0], ends[1]
        finally:
            for end in ends:
                _remove(end)


def _require_tools() -> None:
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        raise NetworkError(f"a shaped link needs {' and '.join(absent)}: apt-get install iproute2", MISSING)


def _connect(left: Namespace, right: Namespace) -> None:
    """Make both namespaces, the cable between them, and bring up its ends and their loopback interfaces."""
    for end in (left, right):
        _command("ip", "netns", "add", end.name)
    cable = ["ip", "link", "add", left.interface, "netns", left.name, "type", "veth"]
    _command(*cable, "peer", "name", right.interface, "netns", right.name)
    for end in (left, right):
        _command("ip", "-n", end.name, "addr", "add", f"{end.address}/24", "dev", end.interface)
        _command("ip", "-n", end.name, "link", "set", "lo", "up")
        _command("ip", "-n", end.name, "link", "set", end.interface, "up")


def _shape(end: Namespace, rate: str) -> None:
    """Limit what `end` sends, with a token bucket of 512 kB."""
    bucket = ["tbf", "rate", rate, "burst", "512kb", "latency", "100ms"]
    _command("tc", "-n", end.name, "qdisc", "add", "dev", end.interface, "root", *bucket)


def _remove(end: Namespace) -> None:
    """Take the namespace away, and its end of the cable with it; nothing if it was never made."""
    subprocess.run(["ip", "netns", "del", end.name], capture_output=True)


def _command(*words: str) -> None:
    """Run a command of iproute2; a refusal becomes a `NetworkError` that says how to read it."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise NetworkError(f"`{' '.join(words)}` failed: {said}\n{_remedy(said)}", _reason(said))


def _reason(said: str) -> int:
    refused = ("not permitted", "Permission denied", "Read-only file system")
    if any(word in said for word in refused):
        return FORBIDDEN
    return MISSING


def _remedy(said: str) -> str:
    """What a refusal means."""
    if _reason(said) == FORBIDDEN:
        return (
            "This process may not make network namespaces. Run it as root; a container needs the capabilities "
            "NET_ADMIN and SYS_ADMIN for it (docker run --privileged). `unshare -n true` tells: if it fails for root, "
            "the container or the kernel forbids namespaces, and this measurement needs another machine."
        )
    if "rate" in said:
        return "Write the rate as tc does: 100mbit, 1gbit, 10gbit."
    return "The kernel may lack network namespaces, veth or the tbf queue (modules veth and sch_tbf)."
