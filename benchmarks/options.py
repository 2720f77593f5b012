"""The driver's flags, in the manner of nccl-tests and the OSU benchmarks."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from onebit.benchmarks.driver import Sweep
from onebit.benchmarks.sizes import parse_size, sweep_sizes
from onebit.benchmarks.tables import CASES, select
from onebit.comm.bucket_size import BUCKET_MB
from onebit.compress import Codec, Fp8Codec, Int4Codec, Int8Codec, OnebitError, SignCodec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CODECS: dict[str, type[Codec]] = {"sign": SignCodec, "int8": Int8Codec, "int4": Int4Codec, "fp8": Fp8Codec}
BACKENDS = ("gloo", "nccl", "mpi", "threads")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What one run of the driver was asked for; see `parser` for the meaning of each."""

    sizes: tuple[int, ...]
    sweep: Sweep
    dtype: torch.dtype
    codec: Codec
    device: str
    cases: tuple[str, ...] | None
    backend: str | None
    ranks: int
    init_method: str | None
    interface: str | None
    payloads: int
    bucket_mb: float
    local: int
    seed: int
    name: str | None
    link: str
    output: Path | None
    plot: bool


def _table_of_cases() -> str:
    """One case a line, under the name of its family."""
    lines = ["cases, by family:"]
    for family in dict.fromkeys(case.family for case in CASES):
        lines.append(f"  {family}")
        lines.extend(f"    {case.name}: {case.summary}" for case in CASES if case.family == family)
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Every flag with its help."""
    flags = argparse.ArgumentParser(
        prog="python -m onebit.benchmarks",
        description="Times onebit's kernels, collectives and steps and checks what they give.\n"
        "Runs alone, under torchrun, or under mpiexec with --backend mpi.\n"
        "'python -m onebit.benchmarks plot' draws JSON results.",
        epilog=_table_of_cases(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("-b", "--minbytes", type=parse_size, default="256M", help="first size, bytes of the tensor")
    flags.add_argument("-e", "--maxbytes", type=parse_size, help="last size (the first one)")
    flags.add_argument("-f", "--stepfactor", type=int, default=2, help="each size is so many times the one before")
    flags.add_argument("-n", "--iters", type=int, default=20, help="timed runs of each case")
    flags.add_argument("-w", "--warmup_iters", type=int, default=3, help="runs before them")
    flags.add_argument("-m", "--agg_iters", type=int, default=1, help="runs that are timed as one")
    flags.add_argument("-c", "--check", type=int, choices=(0, 1), default=1, help="count wrong elements")
    flags.add_argument("-d", "--dtype", choices=DTYPES, default="fp32", help="of the tensor; residuals are fp32")
    flags.add_argument("-G", "--graph", type=int, choices=(0, 1), default=0, help="on CUDA, time graphs")
    flags.add_argument(
        *("--cases", "--case"), help="cases or families, comma-separated (alone: kernels; with ranks: collectives)"
    )
    flags.add_argument(
        "--codec",
        default="",
        help=f"{', '.join(CODECS)} and its options (sign): int8, block_size=64,scale=rms, int4:rotate=true,seed=3",
    )
    flags.add_argument("--device", choices=("cpu", "cuda"), help="of the tensors (nccl: cuda, else cpu)")
    flags.add_argument("--backend", choices=BACKENDS, help="transport (gloo under torchrun, else none)")
    flags.add_argument("--ranks", type=int, default=2, help="ranks of --backend threads")
    flags.add_argument("--init_method", help="where the ranks of torch.distributed meet, such as file:///shared/file")
    flags.add_argument("--interface", help="network interface whose sent bytes are read around each run")
    flags.add_argument("--payloads", type=int, default=2, help="payloads that reduce_encode averages")
    flags.add_argument("--bucket_mb", type=float, help="bucket size of averages (cpu: 16, cuda: 512)")
    flags.add_argument("--local", type=int, default=1, help="ranks of a node, of averages on two levels")
    flags.add_argument("--seed", type=int, default=1, help="rank r draws its inputs from seed + r")
    flags.add_argument("--name", help="name of the result")
    flags.add_argument("--link", default="this machine", help="how the result names what is between the ranks")
    flags.add_argument("--output", type=Path, help="folder for the JSON result (none: no JSON)")
    flags.add_argument("--plot", action="store_true", help="draw the JSON result, beside it")
    return flags


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Options from the command line; exits with a message about the first bad one."""
    flags = parser()
    given = flags.parse_args(arguments)
    try:
        cases = tuple(given.cases.split(",")) if given.cases else None
        device = given.device or ("cuda" if given.backend == "nccl" else "cpu")
        _check_together(given, device)
        _check_cases(cases, device)
        sizes = sweep_sizes(given.minbytes, given.maxbytes or given.minbytes, given.stepfactor)
        sweep = Sweep(
            iterations=given.iters,
            warmup=given.warmup_iters,
            check=bool(given.check),
            together=given.agg_iters,
            graph=bool(given.graph),
        )
        codec = parse_codec(given.codec)
    except ValueError as error:
        flags.error(str(error))
    return Options(
        sizes=tuple(sizes),
        sweep=sweep,
        dtype=DTYPES[given.dtype],
        codec=codec,
        device=device,
        cases=cases,
        backend=given.backend,
        ranks=given.ranks,
        init_method=given.init_method,
        interface=given.interface,
        payloads=given.payloads,
        bucket_mb=given.bucket_mb or BUCKET_MB[device],
        local=given.local,
        seed=given.seed,
        name=given.name,
        link=given.link,
        output=given.output,
        plot=given.plot,
    )


def parse_codec(text: str) -> Codec:
    """The codec of ``"int8:rounding=stochastic"``, ``"int8"`` or, for a `SignCodec`, ``"block_size=64,scale=rms"``.

    Raises:
        ValueError: no such codec or option, or not a value of it.
    """
    kinds: dict[str, Callable[[str], object]] = {
        "block_size": lambda value: None if value == "none" else int(value),
        "error_feedback": _truth_value,
        "rotate": _truth_value,
        "seed": int,
    }
    name, _, given = ("sign", "", text) if not text or "=" in text.partition(":")[0] else text.partition(":")
    if name not in CODECS:
        raise ValueError(f"--codec knows {', '.join(CODECS)}; got {name}")
    known = [field.name for field in fields(CODECS[name])]
    pairs = [part.partition("=") for part in given.split(",") if part]
    unknown = [option for option, _, _ in pairs if option not in known]
    if unknown:
        raise ValueError(f"--codec {name} knows {', '.join(known)}; got {', '.join(unknown)}")
    try:
        return CODECS[name](**{option: kinds.get(option, str)(value) for option, _, value in pairs})  # type: ignore[arg-type]
    except OnebitError as error:
        raise ValueError(f"--codec {text}: {error}") from error


def _truth_value(text: str) -> bool:
    """True or false as written.

    Raises:
        ValueError: it is neither.
    """
    if text not in ("true", "false"):
        raise ValueError(f"expected true or false, got {text!r}")
    return text == "true"


def _check_cases(names: Sequence[str] | None, device: str) -> None:
    """Whether there are such cases, and they run on such a device.

    Raises:
        ValueError: not so.
    """
    for group in select(names or ()):
        if not any(device in case.devices for case in group):
            raise ValueError(
                f"the {group[0].family} asked for do not run on {device}; add --device {group[0].devices[0]}"
            )


def _check_together(given: argparse.Namespace, device: str) -> None:
    """Flags that need others.

    Raises:
        ValueError: one is alone.
    """
    if given.graph and device != "cuda":
        raise ValueError("--graph 1 needs --device cuda: only CUDA work is captured in graphs")
    if given.local < 1:
        raise ValueError(f"--local is a number of ranks, got {given.local}")
    if given.plot and not given.output:
        raise ValueError("--plot draws the JSON result: name its folder with --output")
    if {"nccl": "cuda", "gloo": "cpu"}.get(given.backend, device) != device:
        raise ValueError(f"--backend {given.backend} does not carry tensors on {device}")
