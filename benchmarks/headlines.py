"""The summary of all results: which figures it has, and those faster and slower than what they stand beside."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from onebit.benchmarks import view
from onebit.benchmarks.headline import Headline, Spread, ratio, step, to_the_loss, trained
from onebit.benchmarks.overlap import AFTER
from onebit.benchmarks.record import Document
from onebit.benchmarks.view import Cells

AVERAGE, WHOLE_RUN = "average of {}", "whole run, {}: "
GLOO, NCCL, NCCL_BF16 = "Gloo's average", "NCCL's average", "NCCL's average in bfloat16"
DDP, FUSED, COPY = "AdamW in DDP", "torch's fused AdamW", "a copy's bandwidth"
SMALL, MIDDLE = 1 << 14, 1 << 20

HEADLINES = (
    *(
        Headline(
            result=f"net-{link}", what=AVERAGE, beside=GLOO, pick=ratio("compressed", "plain"), goal=goal, over="gloo"
        )
        for link, goal in (("100mbit", 28), ("1gbit", 17), ("10gbit", 1.8))
    ),
    Headline(result="gloo-2", what=AVERAGE, beside=GLOO, pick=ratio("compressed", "plain")),
    Headline(
        result="net-1gbit-2-ranks-each",
        what=f"{AVERAGE}, on two levels",
        beside="ours on one level",
        pick=ratio("two-level", "one level"),
        goal=1.8,
    ),
    *(
        Headline(result=f"net-{link}", what=AVERAGE, beside=NCCL, pick=ratio("compressed", "plain"), over="nccl")
        for link in ("1gbit", "10gbit", "10gbit-4-hosts")
    ),
    Headline(result="nccl-2-124Mi-sockets", what=AVERAGE, beside=NCCL, pick=ratio("group-compressed", "plain")),
    Headline(result="nccl-4-124Mi-sockets", what=AVERAGE, beside=NCCL, pick=ratio("compressed", "plain"), goal=25),
    Headline(result="nccl-2", what=AVERAGE, beside=NCCL, pick=ratio("compressed", "NCCL float32"), goal=1 / 0.48),
    Headline(result="nccl-4", what=AVERAGE, beside=NCCL, pick=ratio("compressed", "NCCL float32"), goal=1 / 0.32),
    Headline(result="nccl-4", what=AVERAGE, beside=NCCL_BF16, pick=ratio("compressed", "NCCL bfloat16"), goal=1 / 0.65),
    Headline(
        result="nccl-4-codecs",
        what=f"{AVERAGE}, in int8",
        beside=NCCL,
        pick=ratio("compressed int8:error_feedback=false", "NCCL float32"),
        goal=1 / 0.55,
    ),
    Headline(
        result="peers-4",
        what=AVERAGE,
        beside="DeepSpeed's 1-bit average",
        pick=ratio("peer-compressed", "DeepSpeed"),
        goal=13,
    ),
    *(
        Headline(result=name, what=AVERAGE, beside=GLOO, pick=ratio("compressed", "plain", SMALL), over="gloo")
        for name in ("gloo-2", "net-1gbit")
    ),
    Headline(result="mpi-2", what=AVERAGE, beside="MPI's average", pick=ratio("compressed", "plain", SMALL)),
    *(
        Headline(result=name, what=AVERAGE, beside=NCCL, pick=ratio("compressed", "NCCL float32", MIDDLE), goal=1 / 2.5)
        for name in ("nccl-2", "nccl-4")
    ),
    Headline(result="nccl-4", what=AVERAGE, beside=NCCL_BF16, pick=ratio("compressed", "NCCL bfloat16", 8 * MIDDLE)),
    *(
        Headline(
            result=f"train-{link}",
            what="compressed training step, {}",
            beside=DDP,
            pick=trained("OnebitAdam", "compressed"),
            goal=goal,
        )
        for link, goal in (("100mbit-short", 8.0), ("1gbit", 3.0))
    ),
    *(
        Headline(result=f"train-{link}", what=WHOLE_RUN + optimizer, beside=DDP, pick=to_the_loss(optimizer))
        for link, optimizer in (("1gbit", "OnebitAdam"), ("10gbit", "OnebitAdam"), ("10gbit", "ZeroOneAdam"))
    ),
    *(
        Headline(result=name, what="training step, {}", beside=DDP, pick=step(AFTER), goal=goal)
        for name, goal in (
            ("overlap-compressed-2-10gbit", None),
            ("overlap-compressed-4-sockets", 3.0),
            ("overlap-compressed-4", None),
        )
    ),
    Headline(
        result="steps-4",
        what="step of OnebitAdam with its average, {}",
        beside=f"{FUSED} and NCCL's average",
        pick=ratio("OnebitAdam", "AdamW + NCCL fp32", 300 << 20),
        goal=1 / 0.33,
    ),
    Headline(
        result="steps-4",
        what="step of OnebitAdam with its average, {}",
        beside=f"{FUSED} alone",
        pick=ratio("OnebitAdam", "AdamW", 300 << 20),
        goal=1 / 1.05,
    ),
    Headline(result="adam", what="step of CPUAdam, {}", beside=FUSED, pick=ratio("CPUAdam", "fused")),
    Headline(
        result="adam", what="step of FusedAdam, {}", beside=FUSED, pick=ratio("FusedAdam", "fused"), goal=1 / 0.85
    ),
    Headline(result="kernels", what="encode, {}", beside=COPY, pick=ratio("encode", "copy"), measure=True),
    *(
        Headline(
            result="cuda-kernels", what=case + ", {}", beside=COPY, pick=ratio(case, "copy"), goal=goal, measure=True
        )
        for case, goal in (
            ("encode", 0.92),
            ("reduce_encode of 4", 0.85),
            ("decode", 0.85),
        )
    ),
)


def lines(which: str, found: Mapping[str, Sequence[Document]], places: Mapping[str, str]) -> list[Cells]:
    """The rows of one of the two tables.

    which: ``"slower"``, figures below 1, or ``"faster"``, all others; found: results by name, of which one that is not
    there leaves its figures out; places: a link to the details of each name.
    """
    rows = []
    for headline in HEADLINES:
        for result in found.get(headline.result, ()):
            figure = headline.figure(result)
            if figure is not None and _is_loss(headline, figure[1]) is (which == "slower"):
                place = places.get(headline.result, f"`{headline.result}`")
                rows.append(_line(headline, *figure) | {"on": _where(result), "details": place})
    order = ("what", "on", "beside", "times as fast", "goal", "details")
    return [{name: row[name] for name in order} for row in rows]


def _is_loss(headline: Headline, spread: Spread) -> bool:
    return spread["median"] < 1.0 and not headline.measure


def _line(headline: Headline, measured: str, spread: Spread) -> Cells:
    goal, figure = headline.goal, spread["median"]
    missed = goal is not None and figure < goal
    return {
        "what": headline.what.format(measured),
        "beside": headline.beside,
        "times as fast": view.quartiles(spread) if "low" in spread else f"**{figure:.2f}**",
        "goal": "" if goal is None else f"{goal:.3g}{', missed' * missed}",
    }


def _where(result: Document) -> str:
    """``2 hosts, 1 Gbit/s, 2 CPU cores``: what the ranks had, in the words of one who does not know namespaces."""
    run, box = result["run"], result["machine"]
    device = f"{box['cores']} CPU cores" if box["device"] == "cpu" else f"{run['ranks']} × {box['device']}"
    if run["ranks"] == 1 or run["link"] == "this machine":
        return device
    link = re.sub(r"(\d+)([gm])bit", lambda rate: f"{rate[1]} {rate[2].upper()}bit/s", run["link"])
    return f"{link.replace('namespaces', 'hosts')}, {device}"
