"""The driver on CUDA: every case is right there, alone and over NCCL, started anew and replayed from a graph."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from onebit.benchmarks import Setting, Sweep, drive, record, select
from onebit.benchmarks.__main__ import main
from onebit.comm import Backend, CompressedAllreduce, make_backend, tune
from onebit.compress import SignCodec
from tests.comm.launcher import run_ranks

NUMEL = 1_000_003  # no whole number of blocks
WORLD_SIZES = [size for size in (2, 4) if size <= torch.cuda.device_count()]
needs_two = pytest.mark.skipif(not WORLD_SIZES, reason="needs two CUDA devices")


def wrong(backend: Backend, family: str, sweep: Sweep, **options: Any) -> dict[str, int | None]:
    """Wrong elements of each case of a family."""
    [cases] = select([family])
    setting = Setting(numel=NUMEL, backend=backend, device=torch.device("cuda"), **options)
    rows = drive(cases, [setting], sweep)
    assert all(row.time.median > 0 for row in rows), rows
    return {row.case: row.wrong for row in rows}


@pytest.mark.parametrize("graph", [False, True], ids=["started", "graph"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_are_right(dtype: torch.dtype, graph: bool) -> None:
    found = wrong(make_backend("single"), "kernels", Sweep(iterations=2, graph=graph, together=2), dtype=dtype)
    assert found == dict.fromkeys(["copy-torch", "encode", "reduce_encode", "decode"], 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adam_is_right(dtype: torch.dtype) -> None:
    found = wrong(make_backend("single"), "adam", Sweep(iterations=2), dtype=dtype)
    assert set(found.values()) == {0}, found


@needs_two
@pytest.mark.parametrize("graph", [False, True], ids=["started", "graph"])
@pytest.mark.parametrize("family", ["collectives", "modes", "stages"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_averages_and_their_stages_are_right_over_nccl(world_size: int, family: str, graph: bool) -> None:
    for found in run_ranks("nccl", world_size, wrong, family, Sweep(iterations=2, graph=graph), timeout=120.0):
        assert set(found.values()) == {0}, found


@needs_two
def test_steps_are_right_over_nccl() -> None:
    for found in run_ranks("nccl", 2, wrong, "steps", Sweep(iterations=2), timeout=120.0):
        assert set(found.values()) == {0}, found


@pytest.mark.parametrize("flags", [[], ["--graph=1", "--agg_iters=4"]], ids=["started", "graph"])
def test_a_result_names_the_gpu(flags: list[str], tmp_path: Path) -> None:
    assert main(["-b1M", "-n2", "--device=cuda", "--cases=kernels", f"--output={tmp_path}", *flags]) == 0
    [path] = tmp_path.glob("*.json")
    result = record.load(path)
    assert result["machine"]["device"] == torch.cuda.get_device_name()
    assert result["kind"] in path.name
    assert result["run"]["kernels"] == "gpu", result["run"]


def chosen(backend: Backend) -> tuple[str, list[str], bool]:
    """What was measured, what is picked for two tensors, and whether a plain average of them is the mean."""
    tensors = [torch.full((numel,), float(backend.rank), device="cuda") for numel in (1000, 1 << 25)]
    modes = [CompressedAllreduce(tensor, backend, mode="auto").modes[0] for tensor in tensors]
    CompressedAllreduce(tensors, backend, mode="plain")(tensors)
    mean = (backend.size - 1) / 2
    right = all(bool((tensor == mean).all()) for tensor in tensors)
    measured = str(tune(backend, device="cuda", codec=SignCodec()))
    return measured.replace(f"cuda:{backend.rank}", "its device"), list(modes), right


@needs_two
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_all_ranks_pick_alike_over_nccl(world_size: int) -> None:
    first, *others = run_ranks("nccl", world_size, chosen, timeout=120.0)
    assert all(other == first for other in others), [first, *others]
    measured, modes, right = first
    assert right, measured
    small, large = modes
    assert small == "plain" or large == "compressed", measured  # where a thousand elements gain, millions do


LAUNCHERS = {
    1: [],
    **{n: ["torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "-m"] for n in WORLD_SIZES},
}


def measured(ranks: int, module: str, folder: Path, *flags: str) -> record.Document:
    """What a benchmark of so many ranks saves, in which nothing is wrong."""
    flags = ("--mega=1", "-n2", "--per-node=2", f"--output={folder}", *flags)
    command = [sys.executable, "-m", *LAUNCHERS[ranks], f"onebit.benchmarks.{module}", *flags]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    [path] = folder.glob("*.json")
    document = record.load(path)
    assert not [row["case"] for row in document["rows"] if row["wrong"]], run.stdout[-4000:]
    return document


@pytest.mark.parametrize("ranks", LAUNCHERS)
def test_codecs_and_levels_are_right_beside_copies_and_nccl(ranks: int, tmp_path: Path) -> None:
    rows = measured(ranks, "gpu", tmp_path, "--sizes", "--codecs", "sign", "int8", "fp8")["rows"]
    cases = {row["case"] for row in rows}
    assert {"encode fp8", "decode int8"} <= cases if ranks == 1 else {"compressed int8", "compressed fp8"} <= cases
    assert ranks != 4 or "compressed int8, nodes of 2" in cases, cases


@pytest.mark.parametrize("ranks", LAUNCHERS)
def test_steps_are_right_on_one_level_and_on_two_replicated_and_sharded(ranks: int, tmp_path: Path) -> None:
    document = measured(ranks, "gpu_steps", tmp_path)
    checked = {row["case"] for row in document["rows"] if row["wrong"] == 0}
    if ranks == 1:
        assert {"encode_momentum", "decode_update"} <= checked, checked
        return
    for suffix in ("", " BERT-Large"):
        one_level = {f"{name}{suffix}" for name in ("OnebitAdam", "ZeroOneAdam", "OnebitLamb")}
        two_levels = {f"OnebitAdam{suffix}, nodes of 2", f"OnebitAdam{suffix}, nodes of 2, sharded"}
        assert checked >= one_level | (two_levels if ranks == 4 else set()), checked
    if ranks == 4:
        figures = document["run"]["memory"]["BERT-Large"]
        replicated, sharded = figures["nodes of 2"], figures["nodes of 2, sharded"]
        assert replicated["kernels"] == "gpu", figures
        assert sharded["held"] < replicated["held"], figures


@needs_two
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed==0.19.6")
def test_the_peers_are_right_over_nccl() -> None:
    for found in run_ranks("nccl", 2, wrong, "peers", Sweep(iterations=2), timeout=240.0):
        assert set(found.values()) == {0}, found
