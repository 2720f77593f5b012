"""Over NCCL a rank that is killed or stopped becomes a TransportError too, and the optimizer is whole and can be saved.

PyTorch is told not to end the process, by TORCH_NCCL_ASYNC_ERROR_HANDLING=0, which it reads when a group is made.
"""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import Parameter

from onebit.comm import Backend, TransportError, make_backend
from onebit.comm.torch_backend import HANDLING
from onebit.optim import CompressedOptimizer, checkpoint
from tests.comm.launcher import run_ranks
from tests.comm.samples import state_bits
from tests.faults.training import MAKERS
from tests.gpu.stripes import all_striped
from tests.optim.samples import all_params, bits, values

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

LIMIT = 5.0  # seconds
SLACK = 15.0  # seconds that aborting a communicator may take
SHAPES = ((1024, 512), (513,), (64, 33))
STEPS_AFTER = 12  # more than an interval of 0/1 Adam has, and fewer than the host may be ahead of the device


def train(optimizer: CompressedOptimizer, rank: int, number: int) -> None:
    for i, p in enumerate(all_params(optimizer)):
        p.grad = values(i, number, rank, shape=tuple(p.shape)).cuda()
    optimizer.step()


def everything(optimizer: CompressedOptimizer) -> Any:
    saved = optimizer.state_dict()
    feedback = saved["onebit"].pop("residuals")
    saved["onebit"].pop("skipped_steps")
    return [bits(p.cpu()) for p in all_params(optimizer)], state_bits(saved), feedback


def endure(
    _: Backend, name: str, made: int, fault: str, wait: bool, folder: str, striped: bool = False
) -> dict[str, Any]:
    """The last rank is struck before step `made`; the others go on and tell what they see.

    wait: the host waits for the device after every step, as who prints the loss does.
    """
    os.environ[HANDLING] = "0"
    if striped:
        all_striped(2)
    group = dist.new_group(backend="nccl", timeout=timedelta(seconds=60))
    backend = make_backend(group, timeout=LIMIT)
    optimizer = make(name, backend)
    for number in range(made):
        train(optimizer, backend.rank, number)
    before, count = everything(optimizer), optimizer.param_groups[0]["step"]
    make_backend("gloo").barrier()  # all have made these steps
    if backend.rank == backend.size - 1:
        os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
    seen: dict[str, Any] = {"count": count, "wrong": []}
    start = time.monotonic()
    try:
        for number in range(made, made + STEPS_AFTER):
            train(optimizer, backend.rank, number)
            if wait:
                torch.cuda.synchronize()
        torch.cuda.synchronize()
        optimizer.skipped_steps  # noqa: B018 waits for what the device has decided
        train(optimizer, backend.rank, made + STEPS_AFTER)
        seen["wrong"].append("it did not raise")
    except TransportError as error:
        seen |= {"error": str(error), "operation": error.operation, "waited": error.waited, "rank": error.rank}
    seen["took"] = time.monotonic() - start
    start = time.monotonic()
    after, seen["count_after"] = everything(optimizer), optimizer.param_groups[0]["step"]
    path = checkpoint.save(Path(folder), optimizer)
    seen["saving_took"] = time.monotonic() - start
    seen["skipped"] = optimizer.skipped_steps
    if seen["count_after"] == count:  # else local steps of 0/1 Adam were made before the fault was met
        if before[:2] != after[:2]:
            seen["wrong"].append("parameters, moments or options have changed")
        for old, new in zip(before[2], after[2], strict=True):
            for side in ("worker", "server"):
                if side in old and not torch.allclose(old[side], new[side], rtol=0, atol=1e-4):  # put back, rounded
                    far = float((old[side] - new[side]).abs().max())
                    seen["wrong"].append(f"the {side}'s feedback is off by {far}")
    loaded = torch.load(path, weights_only=True)["optimizer"]
    held = [value for entry in loaded["state"].values() for value in entry.values()]  # 0/1 Adam's has numbers, too
    if not all(bool(torch.isfinite(torch.as_tensor(value)).all()) for value in held):
        seen["wrong"].append("what was saved is not finite")
    return seen


def make(name: str, backend: Backend) -> CompressedOptimizer:
    params = [Parameter(values(i, shape=shape).cuda()) for i, shape in enumerate(SHAPES)]
    optimizer: CompressedOptimizer = MAKERS[name](params, lr=1e-2, backend=backend)
    return optimizer


@pytest.mark.parametrize(
    ("name", "made", "fault", "wait"),
    [
        ("OnebitAdam", 6, "kill", False),
        ("OnebitAdam", 6, "stop", True),
        ("OnebitAdam", 1, "stop", False),
        ("OnebitAdam", 1, "kill", True),
        ("OnebitLamb", 6, "kill", True),
        ("ZeroOneAdam", 6, "stop", False),
    ],
)
def test_the_others_get_a_transport_error_and_are_as_before_the_step(
    name: str, made: int, fault: str, wait: bool, tmp_path: Path
) -> None:
    check_endured(name, made, fault, wait, str(tmp_path))


@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_in_stripes_they_do_too(fault: str, tmp_path: Path) -> None:
    check_endured("OnebitAdam", 6, fault, True, str(tmp_path), True)


def check_endured(*how: object) -> None:
    """What `endure` should see on rank 0, told how."""
    told = run_ranks("nccl", 2, endure, *how, timeout=120.0, without=[1])[0]
    assert told["wrong"] == [], told
    assert told["rank"] == 0, told
    assert told["operation"], told
    assert LIMIT * 0.9 < told["took"] < LIMIT + SLACK, told
    assert told["saving_took"] < SLACK, told
    assert told["skipped"] == 0, told
