"""`python -m onebit.benchmarks.train --rate 1gbit`: a transformer trained by AdamW and by 1-bit optimizers.

Each host is a network namespace of this machine, joined to the others by links of that speed; they share its
processors. Every contender makes a step in turn. With --short a whole run would take too long on that link: only some
steps of each kind are timed on it. Runs in a checkout; needs root and iproute2. Under torchrun on GPUs see
`python -m onebit.benchmarks.train_gpu`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from onebit.benchmarks import console, record, training_view
from onebit.benchmarks.__main__ import leave
from onebit.benchmarks.contenders import CONTENDERS, Plan
from onebit.benchmarks.group import join
from onebit.benchmarks.launch import RankError, launch, loopback
from onebit.benchmarks.link import Link
from onebit.benchmarks.namespaces import NetworkError, shaped_hosts
from onebit.benchmarks.net import rank_on
from onebit.benchmarks.training import ALONE, Course, train
from onebit.benchmarks.transformer import EXAMPLES, Shape
from onebit.compress import num_threads


def _parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m onebit.benchmarks.train", description=__doc__)
    flags.add_argument("--rate", help="speed of the links, as tc writes it: 1gbit; without it: the loopback interface")
    flags.add_argument("--hosts", type=int, default=2, help="how many; more than two are joined by a switch")
    flags.add_argument("--steps", type=int, default=400, help="steps of each contender")
    flags.add_argument("--exact", type=int, help="first steps, averaged exactly (default: a quarter of all)")
    flags.add_argument("--short", type=int, metavar="K", help="do not learn: time about K steps of each kind")
    flags.add_argument("--batch", type=int, default=1, help="windows per rank and step")
    flags.add_argument("--lr", type=float, default=3e-4, help="highest learning rate")
    flags.add_argument("--seed", type=int, default=1, help="of weights and samples")
    for name, size in vars(Shape()).items():
        flags.add_argument(f"--{name}", type=int, default=size, help=f"the model's {name}")
    flags.add_argument("--only", nargs="+", choices=tuple(CONTENDERS), default=tuple(CONTENDERS), help="contenders")
    flags.add_argument("--output", type=Path, default=record.default_folder(), help="folder for the JSON result")
    flags.add_argument("--plot", action="store_true", help="draw the JSON result, beside it")
    for inner in ("--backend", "--init_method", "--interface"):  # what `launch` and `rank_on` give to ranks
        flags.add_argument(inner, help=argparse.SUPPRESS)
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all ended with equal parameters; 1: not so, or a rank failed; 69: a tool is missing; 77: not allowed here."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    if options.init_method:
        return _rank(options)
    if not EXAMPLES.is_dir():
        raise SystemExit("training runs take their model from examples/: start them in the root of a checkout")
    module = "onebit.benchmarks.train"
    try:
        if options.rate is None:
            launch(loopback(options.hosts), given, module=module)
        else:
            with shaped_hosts(options.rate, options.hosts) as hosts:
                launch([rank_on(host) for host in hosts], given, module=module)
    except (NetworkError, RankError) as error:
        console.say(f"{error}", stderr=True)
        return error.status if isinstance(error, NetworkError) else 1
    except KeyboardInterrupt:
        console.say("stopped; the namespaces are gone", stderr=True)
        return 130
    return 0


def _plan(options: argparse.Namespace) -> Plan:
    if options.short:
        return Plan(steps=4 * options.short, exact=options.short, sparse=options.short, lr=options.lr)
    steps: int = options.steps
    return Plan(steps=steps, exact=max(1, steps // 4), sparse=max(1, 2 * steps // 5), lr=options.lr)


def _rank(options: argparse.Namespace) -> int:
    """Train as one rank; rank 0 tells and writes what came out."""
    torch.set_num_threads(num_threads())  # of a rank's share of the processors, as the kernels here
    backend = join("gloo", options.init_method)
    shape = Shape(**{name: getattr(options, name) for name in vars(Shape())})
    course = Course(
        plan=_plan(options),
        shape=shape,
        batch=options.batch,
        seed=options.seed,
        learns=not options.short,
        only=options.only,
    )
    link = Link(options.interface) if options.interface else None
    runs = course.plan.steps * (len({*options.only} | {next(iter(CONTENDERS))}) + 1)
    with console.progress_bar(runs, show=backend.rank == 0) as progress:
        rows = train(course, backend, link, progress)
    if backend.rank == 0:
        _show(rows, course, options)
    backend.barrier()  # nobody leaves, and takes the others down, before the result is written
    return 0 if all(row["replicas_equal"] for row in rows if row["case"] != ALONE) else 1


def _show(rows: list[dict[str, object]], course: Course, options: argparse.Namespace) -> None:
    run = {
        "ranks": options.hosts,
        "backend": "gloo",
        "link": f"{options.hosts} namespaces, {options.rate}" if options.rate else "loopback",
        "threads": num_threads(),
        "iterations": course.plan.steps,
        "learns": course.learns,
        "plan": vars(course.plan),
        "shape": vars(course.shape),
        "batch": course.batch,
        "seed": course.seed,
    }
    result = record.make(_name(options), run, rows)
    path = record.save(result, options.output)
    cells = training_view.cells(result)
    console.show_table(training_view.title(result), list(cells[0]), cells)
    console.say(f"JSON: {path}")
    if options.plot and course.learns:
        console.say(f"plot: {training_view.draw(result, path.with_suffix('.png'))}")


def _name(options: argparse.Namespace) -> str:
    """What the result is called: ``train-1gbit``, ``train-100mbit-4-hosts-short``."""
    hosts = f"-{options.hosts}-hosts" if options.hosts != 2 else ""
    return f"train-{options.rate or 'loopback'}{hosts}" + ("-short" if options.short else "")


if __name__ == "__main__":
    leave(main())
