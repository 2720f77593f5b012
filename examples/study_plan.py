"""Which runs the convergence study consists of, and with which settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

CODECS = (
    *("onebit-adam-fp8", "onebit-adam-int8", "onebit-adam-int4", "onebit-adam-int4-stochastic"),
    *("onebit-adam-int4-rotated", "onebit-adam-two-level", "adamw-int8", "adamw-int4"),
)
ADAM = ("adamw", "adamw-short", "onebit-adam", "onebit-adam-auto", "onebit-adam-refresh", "zero-one-adam", *CODECS)
LAMB = ("lamb", "onebit-lamb", "onebit-lamb-steady")
ADAMW = ("adamw", "adamw-short", "adamw-int8", "adamw-int4")  # torch's own; LAMB is OnebitLamb that never freezes
LOCAL = {"onebit-adam-two-level": 2}  # ranks of a node; there have to be more than one
USUAL = ("adamw", "onebit-adam", "onebit-adam-auto", "zero-one-adam", *LAMB)  # of the tasks that a CPU makes
BASELINE = {name: family[0] for family in (ADAM, LAMB) for name in family}  # what an optimizer is measured against
LABELS = {
    "adamw": "AdamW",
    "adamw-short": "AdamW, β₂ = 0.95",
    "onebit-adam": "OnebitAdam",
    "onebit-adam-auto": 'OnebitAdam, freeze_step="auto"',
    "onebit-adam-refresh": "OnebitAdam, variance_refresh=25",
    "zero-one-adam": "ZeroOneAdam",
    "onebit-adam-fp8": "OnebitAdam, fp8",
    "onebit-adam-int8": "OnebitAdam, int8",
    "onebit-adam-int4": "OnebitAdam, int4",
    "onebit-adam-int4-stochastic": "OnebitAdam, int4, stochastic rounding",
    "onebit-adam-int4-rotated": "OnebitAdam, int4, rotated",
    "onebit-adam-two-level": "OnebitAdam, local_group=2",
    "adamw-int8": "AdamW, gradients in int8",
    "adamw-int4": "AdamW, gradients in int4",
    "lamb": "LAMB",
    "onebit-lamb": "OnebitLamb, factor as published",
    "onebit-lamb-steady": "OnebitLamb, factor 1",
}
# Where the Adam of a task has a long memory, these have one of 20 variance steps: 0/1 Adam takes ever fewer of them.
SHORT = {"adamw-short": {"beta2": 0.95}, "zero-one-adam": {"beta2": 0.95}}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, all of it: two runs with equal settings see the same data and start from the same weights.

    Attributes:
        batch: samples per step, of all ranks together, so that any number of ranks sees the same ones.
        warmup: share of the steps that are warm-up of a 1-bit optimizer; the learning rate warms up in half of them.
        lr: the peak learning rate.
        doubling: share of the steps after which the gaps between meetings of 0/1 Adam's ranks double.
        beta2: for Adam such that a variance frozen after warm-up has forgotten the first steps; for LAMB larger, for
            OnebitLamb's factor is a maximum over entries and sees what chance there is in a short mean.
        clip: bound of the gradients' norm, 0 for none. Ranks agree on one factor, except in ZeroOneAdam, where they do
            not meet in every step.
        width, layers, heads, context: the transformer's; `width` is that of the hidden layers for "digits".
        held_out_batches: batches of held-out samples, as large as those of training.
        evaluations: how many times in the run the held-out loss is taken.
    """

    task: str
    optimizer: str
    ranks: int
    seed: int
    steps: int
    batch: int
    lr: float
    weight_decay: float
    warmup: float = 0.15
    doubling: float = 1 / 6
    beta2: float
    eps: float = 1e-6
    clip: float = 0.0
    width: int
    layers: int
    heads: int = 1
    context: int = 1
    held_out_batches: int = 16
    evaluations: int = 10

    @property
    def name(self) -> str:
        """What its record's file is called."""
        return f"{self.task}-{self.ranks}ranks-{self.optimizer}-seed{self.seed}"

    @property
    def freeze_step(self) -> int:
        """The last step of warm-up."""
        return max(1, round(self.warmup * self.steps))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a task; each family of optimizers, named by its baseline, has some of its own."""

    common: dict[str, object]
    family: dict[str, dict[str, object]]

    def run(self, task: str, optimizer: str, ranks: int, seed: int, changes: dict[str, object]) -> Run:
        """One run of the task, with some settings changed."""
        given = {**self.common, **self.family[BASELINE[optimizer]], **SHORT.get(optimizer, {}), **changes}
        return Run(task=task, optimizer=optimizer, ranks=ranks, seed=seed, **given)  # type: ignore[arg-type]


RECIPES = {
    # One core of a common machine makes one run in about a minute.
    "digits": Recipe(
        common={"steps": 2000, "batch": 64, "weight_decay": 0.1, "width": 128, "layers": 2, "held_out_batches": 6},
        family={"adamw": {"lr": 3e-3, "beta2": 0.95}, "lamb": {"lr": 7e-3, "beta2": 0.999}},
    ),
    "bytes": Recipe(
        common={"steps": 2000, "batch": 16, "weight_decay": 0.01, "width": 64, "layers": 2, "heads": 2, "context": 48},
        family={"adamw": {"lr": 3e-3, "beta2": 0.95}, "lamb": {"lr": 7e-3, "beta2": 0.999}},
    ),
    # 125 million parameters; two H200 make a step in some 20 ms.
    "gpt": Recipe(
        common={
            "steps": 3000,
            "batch": 16,
            "weight_decay": 0.1,
            "clip": 1.0,
            "doubling": 0.4,  # about as fast as the learning rate halves, as published
            "width": 896,
            "layers": 13,
            "heads": 14,
            "context": 512,
            "held_out_batches": 32,
        },
        family={"adamw": {"lr": 6e-4, "beta2": 0.99}, "lamb": {"lr": 5e-3, "beta2": 0.999}},
    ),
}


def plan(
    tasks: Sequence[str],
    optimizers: Sequence[str],
    ranks: Sequence[int],
    seeds: Sequence[int],
    changes: dict[str, object],
) -> list[Run]:
    """Every combination that there is, the costliest first."""
    return [
        RECIPES[task].run(task, optimizer, n, seed, changes)
        for n in sorted(ranks, reverse=True)
        for task in tasks
        for seed in seeds
        for optimizer in optimizers
        if n > LOCAL.get(optimizer, 0)
    ]


def flags(run: Run) -> list[str]:
    """The command line that `study.py train` makes this run from."""
    listed = asdict(run)
    return [f"--{name.replace('_', '-')}={value}" for name, value in listed.items()]
