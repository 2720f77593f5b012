"""`python -m onebit.benchmarks.scaling`: the tables and pictures of docs/scaling.md, from the newest JSON results.

The page marks where a table stands by ``<!-- model: NAME -->`` and a later ``<!-- end -->``, with NAME one of
``constants``, ``held-out``, ``break-even`` and ``flat``; what is between them is replaced.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from onebit.benchmarks import console, model_plot, record, report, view
from onebit.benchmarks.model import Host
from onebit.benchmarks.model_fit import Point, fit, held_out, is_loopback, is_shaped
from onebit.benchmarks.record import Document
from onebit.benchmarks.view import Cells

SECTION = re.compile(r"(?m)^<!-- model: (?P<name>\S+) -->\n(?:.*\n)*?<!-- end -->$")
SHOWN_RANKS = (2, 8, 64, 512, 4096, 16384)
SHOWN_RATES = (1.0, 10.0, 100.0)
MESSAGE = 5e-6  # assumed, of a GPU's message between hosts
CONSTANTS = {
    "message": ("to send or receive a message", 1e6, "µs"),
    "call": ("to start and end a bucket's compressed average", 1e6, "µs"),
    "byte": ("per byte that the transport moves and adds", 1e9, "ns"),
    "element": ("per element, encode and decode", 1e9, "ns"),
    "served": ("per element of a rank's chunk, reduce_encode", 1e9, "ns"),
    "payload": ("the same, for each rank's payload", 1e9, "ns"),
}


def gpu_host(kernels: Document, averages: Document) -> Host:
    """A rank on a GPU: its kernels and NCCL's bytes as measured, and a message of `MESSAGE`.

    kernels: a result named ``cuda-kernels``; averages: one named ``nccl-2``.

    Raises:
        ValueError: they lack what is needed.
    """
    try:
        encode, decode = (_per_element(kernels, name) for name in ("encode", "decode"))
        two, eight = (_per_element(kernels, f"reduce_encode of {n}") for n in (2, 8))
        plain = [row for row in averages["rows"] if row["case"] == "nccl" and row["dtype"] == "float32"][-1]
        call = next(row["time"]["median"] for row in averages["rows"] if row["case"] == "compressed")
    except (StopIteration, IndexError) as error:
        raise ValueError("the results cuda-kernels and nccl-2 lack a case that the model needs") from error
    payload = (eight - two) / 6
    return Host(
        message=MESSAGE,
        call=call,
        byte=plain["time"]["median"] / plain["wire_formula"],
        element=encode + decode,
        served=two - 2 * payload,
        payload=payload,
        ahead=True,
    )


def _per_element(result: Document, case: str) -> float:
    row = next(row for row in result["rows"] if row["case"] == case and row["dtype"] == "float32")
    return float(row["time"]["median"] / row["numel"])


def _measured(results: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Results over loopback and over shaped links, of the one kind of machine whose loopback was measured last."""
    loopback = [result for result in results if is_loopback(result)]
    if not loopback:
        raise SystemExit("no result over loopback to fit the model to: make bench, or make bench-gloo NP=2")
    kind = max(loopback, key=lambda result: str(result["created"]))["kind"]
    shaped = [result for result in results if is_shaped(result) and result["kind"] == kind]
    return [result for result in loopback if result["kind"] == kind], shaped


def sections(cpu: Host, errors: Sequence[tuple[Point, float]], gpu: Host) -> dict[str, str]:
    """What belongs into each marked section."""
    return {
        "constants": view.markdown(_constants(cpu, gpu)),
        "held-out": f"{_summary(errors)}\n\n{view.markdown([_error(point, error) for point, error in errors])}",
        "break-even": view.markdown([_break_even(gpu, numel) for numel in model_plot.NUMELS]),
        "flat": view.markdown([_flat(gpu, numel) for numel in model_plot.NUMELS]),
    }


def fill(page: str, texts: Mapping[str, str]) -> str:
    """`page` with the text of every marked section made anew."""

    def section(match: re.Match[str]) -> str:
        return f"{match[0].partition(chr(10))[0]}\n{texts[match['name']]}\n<!-- end -->"

    return SECTION.sub(section, page)


def _constants(cpu: Host, gpu: Host) -> list[Cells]:
    return [
        {
            "constant": said,
            "two CPU cores, Gloo": f"{factor * getattr(cpu, name):.3g} {unit}",
            "GPU, NCCL": f"{factor * getattr(gpu, name):.3g} {unit}",
        }
        for name, (said, factor, unit) in CONSTANTS.items()
    ]


def _summary(errors: Sequence[tuple[Point, float]]) -> str:
    if not errors:
        return "No shaped link has been measured yet."
    sizes = [abs(error) for _, error in errors]
    return f"{len(sizes)} points; error: median {statistics.median(sizes):.0%}, worst {max(sizes):.0%}."


def _error(point: Point, error: float) -> Cells:
    return {
        "result": f"`{point.source}`",
        "average": point.mode,
        "ranks": f"{point.ranks}",
        "elements": view.elements(point.numel),
        "measured, ms": f"{1e3 * point.seconds:.3g}",
        "model, ms": f"{1e3 * point.seconds * (1 + error):.3g}",
        "error": f"{error:+.0%}",
    }


def _break_even(host: Host, numel: int) -> Cells:
    cells = {"parameters": f"{numel / 1e9:g} G"}
    for ranks in SHOWN_RANKS:
        cells[f"{ranks:,} ranks"] = model_plot.rate_text(model_plot.break_even(host, ranks, numel))
    return cells


def _flat(host: Host, numel: int) -> Cells:
    cells = {"parameters": f"{numel / 1e9:g} G"}
    for rate in SHOWN_RATES:
        ranks = model_plot.stops_scaling(host, rate, numel)
        cells[f"{rate:g} Gbit/s"] = f"> {model_plot.RANKS[-1]:,}" if ranks is None else f"{ranks:,}"
    return cells


def main(arguments: Sequence[str] | None = None) -> int:
    """0: the page and its pictures are written."""
    flags = argparse.ArgumentParser(prog="python -m onebit.benchmarks.scaling", description=__doc__)
    flags.add_argument("--results", type=Path, default=record.default_folder(), help="folder of the JSON results")
    flags.add_argument("--page", type=Path, default=Path("docs/scaling.md"), help="page to update")
    options = flags.parse_args(arguments)
    found = report.newest(options.results)
    loopback, shaped = _measured([result for results in found.values() for result in results])
    cpu = fit(loopback)
    errors = held_out(cpu, shaped)
    gpu = gpu_host(found["cuda-kernels"][0], found["nccl-2"][0])
    options.page.write_text(fill(options.page.read_text(encoding="utf-8"), sections(cpu, errors, gpu)), "utf-8")
    folder = options.page.parent
    console.say(f"{model_plot.draw_break_even(gpu, folder / 'scaling-break-even.png')}")
    console.say(f"{model_plot.draw_scaling(gpu, 10**9, (10.0, 100.0), folder / 'scaling-ranks.png')}")
    console.say(_summary(errors))
    return 0


if __name__ == "__main__":
    sys.exit(main())
