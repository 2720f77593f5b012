"""`python -m onebit.benchmarks.net --rate 1gbit`: averages between two hosts joined by a link of that speed.

The hosts are network namespaces of this machine, one rank in each; they share its processors. Needs root and iproute2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from onebit.benchmarks import console, record
from onebit.benchmarks.launch import Host, RankError, launch
from onebit.benchmarks.namespaces import Namespace, NetworkError, shaped_pair
from onebit.benchmarks.sizes import parse_size, up_to


def _parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m onebit.benchmarks.net", description=__doc__)
    flags.add_argument("--rate", default="1gbit", help="speed of the link, as tc writes it: 100mbit, 1gbit, 10gbit")
    flags.add_argument("--output", type=Path, default=record.default_folder(), help="folder for the JSON result")
    flags.add_argument(
        "-e", "--maxbytes", type=parse_size, default="64M", help="bytes of the largest tensor that is averaged"
    )
    flags.add_argument("-n", "--iters", type=int, default=15, help="timed runs of each case")
    flags.add_argument("--bucket_mb", type=float, default=16.0, help="bucket size of the compressed average")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """0: measured and right; 1: a rank failed or elements are wrong; 69: a tool is missing; 77: not allowed here."""
    options = _parser().parse_args(arguments)
    wanted = [
        "--case=collectives",
        f"--name=net-{options.rate}",
        f"--link=two namespaces, {options.rate}",
        f"--output={options.output}",
        *up_to(options.maxbytes),
        f"-n{options.iters}",
        f"--bucket_mb={options.bucket_mb}",
    ]
    try:
        with shaped_pair(options.rate) as pair:
            launch([_host(end) for end in pair], wanted)
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


def _host(end: Namespace) -> Host:
    """A rank that lives in `end` and watches what leaves it."""
    return Host(
        prefix=end.prefix,
        environment={"GLOO_SOCKET_IFNAME": end.interface},
        arguments=(f"--interface={end.interface}",),
    )


if __name__ == "__main__":
    sys.exit(main())
