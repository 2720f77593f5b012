"""DeepSpeed's compressed average beside ours and the transport's own, in one run on CUDA devices over NCCL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onebit.benchmarks.case import Case, Setting
from onebit.benchmarks.collectives import beside

NEEDS = "the case DeepSpeed needs its package, in the last version that has 1-bit optimizers: deepspeed==0.19.6"

# Norms of float32 sums of millions of elements, in an order that is not ours: to within a part in 10^5.
ROUNDING = 1e-5


@dataclass
class Peer:
    """given: (numel,), this rank's input. errors: of worker and server. outcome: what the last run returned."""

    setting: Setting
    given: Tensor
    tensor: Tensor
    worker_error: Tensor
    server_error: Tensor
    backend: Any
    outcome: Tensor


def padded(numel: int, ranks: int) -> int:
    """The number of elements that DeepSpeed averages in place of `numel`: whole bytes of signs for each rank."""
    return -(-numel // (8 * ranks)) * 8 * ranks


def _inputs(setting: Setting) -> Peer:
    try:
        from deepspeed import comm  # type: ignore[import-not-found, unused-ignore]
        from deepspeed.runtime.comm.nccl import NcclBackend  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise SystemExit(f"{NEEDS} ({error})") from error
    comm.init_distributed(dist_backend="nccl", auto_mpi_discovery=False)
    given = setting.normal()
    size = padded(setting.numel, setting.backend.size)
    return Peer(
        setting=setting,
        given=given,
        tensor=given.clone(),
        worker_error=torch.zeros(size, device=setting.device),
        server_error=torch.zeros(size // setting.backend.size, device=setting.device),
        backend=NcclBackend(),
        outcome=given,
    )


def _put_back(state: Peer) -> None:
    state.tensor.copy_(state.given)


def _run(state: Peer) -> None:
    device = torch.cuda.current_device()
    state.outcome = state.backend.compressed_allreduce(
        state.tensor, state.worker_error, state.server_error, local_rank=device
    )


def _check(state: Peer) -> Callable[[], int]:
    state.worker_error.zero_()
    state.server_error.zero_()

    def wrong() -> int:
        return wrong_average(state.setting.normals(), state.outcome.cpu())

    return wrong


def wrong_average(inputs: list[Tensor], outcome: Tensor) -> int:
    """Elements of `outcome` that are not DeepSpeed's average of `inputs`, one per rank, without error feedback.

    Every rank sends signs and one root mean square; of their mean, rank k's part is sent again so. Padding counts.
    """
    ranks, numel = len(inputs), outcome.numel()
    size = padded(numel, ranks)
    said = torch.zeros(size, dtype=torch.float64)
    for given in inputs:
        whole = torch.nn.functional.pad(given.double(), (0, size - numel))
        scale = whole.square().mean().sqrt()
        said += torch.where(whole >= 0, scale, -scale) / ranks
    chunks = said.view(ranks, -1)
    scales = chunks.square().mean(1, keepdim=True).sqrt().expand_as(chunks).reshape(-1)[:numel]
    said = said[:numel]
    unsure = said.abs() <= ROUNDING * scales  # a sum that cancels has either sign
    wrong = (outcome.double().abs() - scales).abs() > ROUNDING * scales
    wrong |= ((outcome >= 0) != (said >= 0)) & ~unsure
    return int(wrong.sum())


PEERS: tuple[Case[Any], ...] = (
    beside("peer", "all_reduce"),
    beside("peer", "all_reduce-bf16"),
    Case(
        name="DeepSpeed",
        summary="NcclBackend.compressed_allreduce of DeepSpeed",
        family="peers",
        role="DeepSpeed",
        devices=("cuda",),
        moved=lambda setting: 4.0 * setting.numel,
        inputs=_inputs,
        refresh=_put_back,
        run=_run,
        check=_check,
    ),
    beside("peer", "compressed", "DeepSpeed"),
)
