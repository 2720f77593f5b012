"""`python -m onebit.benchmarks.net --rate 1gbit`: averages between hosts joined by links of that speed.

The hosts are network namespaces of this machine, with one rank or more in each; they share its processors. With
--backend nccl every rank has a GPU, and those of a host its GPUs' own links. Needs root and iproute2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from onebit.benchmarks import console, record
from onebit.benchmarks.group import TORCH_BACKENDS
from onebit.benchmarks.launch import Host, RankError, launch
from onebit.benchmarks.namespaces import Namespace, NetworkError, shaped_hosts
from onebit.benchmarks.sizes import parse_size, up_to
from onebit.comm.peer_memory import SWITCH as PEER_MEMORY


def _parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m onebit.benchmarks.net", description=__doc__)
    flags.add_argument("--rate", default="1gbit", help="speed of the link, as tc writes it: 100mbit, 1gbit, 10gbit")
    flags.add_argument("--hosts", type=int, default=2, help="how many; more than two are joined by a switch")
    flags.add_argument("--local", type=int, default=1, help="ranks on each host; with more, averages on two levels too")
    flags.add_argument(
        "--backend", choices=TORCH_BACKENDS, default="gloo", help="nccl: between GPUs, one for each rank"
    )
    flags.add_argument(
        "--cases", default="collectives", help="which averages, by name or family, as the driver takes them"
    )
    flags.add_argument("--delay", help="what packets are held back for, as tc writes it: 5ms (needs the queue netem)")
    flags.add_argument("--output", type=Path, default=record.default_folder(), help="folder for the JSON result")
    flags.add_argument(
        "-e", "--maxbytes", type=parse_size, default="64M", help="bytes of the largest tensor that is averaged"
    )
    flags.add_argument("-n", "--iters", type=int, default=15, help="timed runs of each case")
    flags.add_argument("--bucket_mb", type=float, help="bucket size of averages (gloo: 16, nccl: 512)")
    flags.add_argument("--plot", action="store_true", help="draw the JSON result, beside it")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """0: measured and right; 1: a rank failed or elements are wrong; 69: a tool is missing; 77: not allowed here."""
    options = _parser().parse_args(arguments)
    wanted = [
        f"--cases={options.cases}",
        f"--name={_name(options)}",
        f"--link={_link(options)}",
        f"--output={options.output}",
        *up_to(options.maxbytes),
        f"-n{options.iters}",
        f"--local={options.local}",
        *([f"--bucket_mb={options.bucket_mb}"] if options.bucket_mb else []),
        *["--plot"] * options.plot,
    ]
    try:
        with shaped_hosts(options.rate, options.hosts, options.delay) as hosts:
            ranks = [rank_on(host) for host in hosts for _ in range(options.local)]
            launch(ranks, wanted, backend=options.backend)
    except NetworkError as error:
        console.say(f"{error}", stderr=True)
        return error.status
    except RankError as error:
        console.say(f"{error}", stderr=True)
        return 1
    except KeyboardInterrupt:
        console.say("stopped; the namespaces are gone", stderr=True)
        return 130
    return 0


def _name(options: argparse.Namespace) -> str:
    """What the result is called: ``net-1gbit``, ``net-1gbit-4-hosts-5ms``, ``net-1gbit-2-ranks-each``."""
    hosts = f"-{options.hosts}-hosts" if options.hosts != 2 else ""
    ranks = f"-{options.local}-ranks-each" if options.local != 1 else ""
    return f"net-{options.rate}{hosts}{ranks}" + (f"-{options.delay}" if options.delay else "")


def _link(options: argparse.Namespace) -> str:
    """How the result names what is between the ranks."""
    ranks = f" of {options.local} ranks" if options.local != 1 else ""
    return f"{options.hosts} namespaces{ranks}, {options.rate}" + (f", {options.delay}" if options.delay else "")


def rank_on(host: Namespace) -> Host:
    """A rank that lives on `host` and watches what leaves it; NCCL takes namespaces for hosts, too."""
    nccl = {"NCCL_SOCKET_IFNAME": host.interface, "NCCL_NET": "Socket", "NCCL_HOSTID": host.name}
    return Host(
        prefix=host.prefix,
        environment={"GLOO_SOCKET_IFNAME": host.interface, **nccl, PEER_MEMORY: "0"},  # it would bridge the link
        arguments=(f"--interface={host.interface}",),
    )


if __name__ == "__main__":
    sys.exit(main())
