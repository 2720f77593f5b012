"""Hosts on one machine: network namespaces joined by virtual cables of a given rate each way."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from onebit.benchmarks.signals import held_signals

MISSING, FORBIDDEN = 69, 77  # exit statuses: sysexits' EX_UNAVAILABLE and EX_NOPERM
TOOLS = ("ip", "tc")
NETWORK = "10.213.77"  # seen only inside the namespaces
SWITCH = "switch"


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
    """A host: a namespace, and the interface and address it has in there."""

    name: str
    interface: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to put before a command to run it there."""
        return ("ip", "netns", "exec", self.name)


@dataclass(frozen=True)
class _Port:
    """One end of a cable."""

    namespace: str
    interface: str


@contextlib.contextmanager
def shaped_hosts(rate: str, count: int = 2, delay: str | None = None) -> Iterator[tuple[Namespace, ...]]:
    """Hosts of which each sends and receives at `rate` each way; gone when the block is left.

    Two are joined by a cable, more by a switch, whose ports are as fast as the hosts'.

    Args:
        rate: as `tc` writes it: ``1gbit``.
        count: how many hosts, 2 to 250.
        delay: what every packet is held back for on its way out of a host, as `tc` writes it: ``5ms``; None: nothing.

    Raises:
        NetworkError: iproute2 is absent, namespaces are not allowed here, or `tc` refuses the rate or the delay.
    """
    if not 2 <= count <= 250:
        raise NetworkError(f"a network has 2 to 250 hosts, not {count}", MISSING)
    _require_tools()
    tag = secrets.token_hex(3)
    hosts = tuple(Namespace(f"onebit-{tag}-{i}", f"ob{tag}v{i}", f"{NETWORK}.{i + 1}") for i in range(count))
    switch = f"onebit-{tag}-switch"
    with held_signals() as release:
        try:
            ports = _join(hosts) if count == 2 else _switch(hosts, switch, tag)
            for host in hosts:
                _shape(_Port(host.name, host.interface), rate, delay)
            for port in ports:
                _shape(port, rate, None)
            release()
            yield hosts
        finally:
            for name in [host.name for host in hosts] + [switch] * (count > 2):
                _remove(name)


def _require_tools() -> None:
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        raise NetworkError(f"a shaped link needs {' and '.join(absent)}: apt-get install iproute2", MISSING)


def _join(hosts: Sequence[Namespace]) -> list[_Port]:
    """Two hosts by a cable; no port is left to shape."""
    for host in hosts:
        _command("ip", "netns", "add", host.name)
    left, right = (_Port(host.name, host.interface) for host in hosts)
    _cable(left, right)
    for host in hosts:
        _bring_up(host)
    return []


def _switch(hosts: Sequence[Namespace], name: str, tag: str) -> list[_Port]:
    """Any number of hosts by cables to a switch in a namespace of its own; returns its ports."""
    _command("ip", "netns", "add", name)
    _command("ip", "-n", name, "link", "add", SWITCH, "type", "bridge")
    _command("ip", "-n", name, "link", "set", SWITCH, "up")
    ports = [_Port(name, f"ob{tag}p{index}") for index in range(len(hosts))]
    for host, port in zip(hosts, ports, strict=True):
        _command("ip", "netns", "add", host.name)
        _cable(_Port(host.name, host.interface), port)
        _command("ip", "-n", name, "link", "set", port.interface, "master", SWITCH)
        _command("ip", "-n", name, "link", "set", port.interface, "up")
        _bring_up(host)
    return ports


def _cable(left: _Port, right: _Port) -> None:
    made = ["ip", "link", "add", left.interface, "netns", left.namespace, "type", "veth"]
    _command(*made, "peer", "name", right.interface, "netns", right.namespace)


def _bring_up(host: Namespace) -> None:
    """Its address, its end of the cable and its loopback interface."""
    _command("ip", "-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
    _command("ip", "-n", host.name, "link", "set", "lo", "up")
    _command("ip", "-n", host.name, "link", "set", host.interface, "up")


def _shape(port: _Port, rate: str, delay: str | None) -> None:
    """Limit what leaves `port`, with a token bucket of 512 kB, and hold it back for `delay`."""
    queue = ["tc", "-n", port.namespace, "qdisc", "add", "dev", port.interface]
    bucket = ["tbf", "rate", rate, "burst", "512kb", "latency", "100ms"]
    if delay is None:
        _command(*queue, "root", *bucket)
    else:
        _command(*queue, "root", "handle", "1:", "netem", "delay", delay, "limit", "100000")
        _command(*queue, "parent", "1:1", "handle", "10:", *bucket)


def _remove(namespace: str) -> None:
    """Take a namespace away, and its end of the cable with it; nothing if it was never made."""
    subprocess.run(["ip", "netns", "del", namespace], capture_output=True)


def _command(*words: str) -> None:
    """Run a command of iproute2; a refusal becomes a `NetworkError` that says how to read it."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise NetworkError(f"`{' '.join(words)}` failed: {said}\n{_remedy(said, words)}", _reason(said))


def _reason(said: str) -> int:
    refused = ("not permitted", "Permission denied", "Read-only file system")
    if any(word in said for word in refused):
        return FORBIDDEN
    return MISSING


def _remedy(said: str, words: Sequence[str]) -> str:
    """What a refusal means."""
    if _reason(said) == FORBIDDEN:
        return (
            "This process may not make network namespaces. Run it as root; a container needs the capabilities "
            "NET_ADMIN and SYS_ADMIN for it (docker run --privileged). `unshare -n true` tells: if it fails for root, "
            "the container or the kernel forbids namespaces, and this measurement needs another machine."
        )
    if "netem" in words:
        return (
            "This kernel cannot delay packets: that is the queue netem (module sch_netem), and no other queue does it. "
            "Leave the delay out, or measure where the kernel has it."
        )
    if "rate" in said:
        return "Write the rate as tc does: 100mbit, 1gbit, 10gbit."
    return "The kernel may lack network namespaces, veth or the tbf queue (modules veth and sch_tbf)."
