"""OnebitAdam over the shards of a model in `fully_shard`, beside a twin with copies of them and of their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from onebit.comm import Backend
from onebit.optim import OnebitAdam
from tests.comm.fsdp_runs import hybrid_mesh, local
from tests.comm.samples import bits

FREEZE, STEPS = 4, 16
AHEAD = 6  # steps before the device is kept busy for a while where no host waits; none waits for what is made by then
BUSY = 10**9  # cycles, half a second: all the steps to come are queued meanwhile
SEEN = 8  # steps before the model is evaluated, after which FSDP has everything whole
MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
KINDS = {"fp32": MixedPrecisionPolicy(), "bf16 products": MIXED}


@dataclass
class Shards:
    """One rank's run.

    Attributes:
        model, twin: bits of what the model holds in the end, and of what the twin's optimizer has made.
        losses: of every step, on this rank.
        apart: after every step, how many elements of the model are not the twin's.
        skipped: steps that the optimizer and the twin's skipped.
        moved: parameters that are not where the optimizer knows them.
    """

    model: list[bytes]
    twin: list[bytes]
    losses: list[float]
    apart: list[int]
    skipped: tuple[int, ...]
    moved: int

    def story(self) -> str:
        """What a failed test should tell."""
        return (
            f"elements apart after each step {self.apart}, skipped {self.skipped}, losses {self.losses}; "
            f"model and twin: {differences(self.model, self.twin)}"
        )


def differences(some: Sequence[bytes], others: Sequence[bytes]) -> list[str]:
    """Which fp32 tensors differ, in how many elements, where first and by how much; short, whatever their size."""
    found = []
    for index, (a, b) in enumerate(zip(some, others, strict=True)):
        if a != b:
            x, y = (np.frombuffer(part, np.float32) for part in (a, b))
            apart = np.flatnonzero(x.view(np.int32) != y.view(np.int32))
            by = np.abs(x[apart] - y[apart]).max()
            found.append(f"tensor {index}: {len(apart)} of {len(x)}, first {apart[0]}, last {apart[-1]}, by {by:.3g}")
    return found


class Net(nn.Sequential):
    """Layers of which each is a unit, and a parameter that is in none of them."""

    def __init__(self, width: int, uneven: bool) -> None:
        super().__init__(*(nn.Linear(width + uneven * (i % 2), width + uneven * (1 - i % 2)) for i in range(4)))
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = super().forward(x)
        return made * self.gain


def train(
    backend: Backend,
    device: str,
    kind: str,
    width: int,
    uneven: bool,
    waits: bool = True,
    mesh: DeviceMesh | None = None,
) -> Shards:
    """All ranks see other samples; the wider the layers, the smaller the learning rate.

    Args:
        uneven: layers are wider by one element in turn, so that shards differ and lie at odd addresses.
        waits: the host waits for the device after every step; else it gets ahead, once the freeze is over.
        mesh: 2 replicas; None: a new one.
    """
    mesh = hybrid_mesh(device) if mesh is None else mesh
    torch.manual_seed(1)
    model: Any = Net(width, uneven).to(device)
    for layer in model:
        fully_shard(layer, mesh=mesh["shard"], mp_policy=KINDS[kind])
    fully_shard(model, mesh=mesh["shard"], mp_policy=KINDS[kind])
    parameters = list(model.parameters())
    own = [nn.Parameter(local(p).detach()) for p in parameters]
    twin = [nn.Parameter(p.detach().clone()) for p in own]
    group = mesh.get_group("replicate")
    optimizers = [OnebitAdam(listed, lr=0.32 / width, freeze_step=FREEZE, backend=group) for listed in (own, twin)]
    generator = torch.Generator().manual_seed(backend.rank)
    batches = [torch.randn(16, width, generator=generator).to(device) for _ in range(STEPS)]
    losses: list[Tensor] = []
    apart: list[Tensor] = []
    for number, x in enumerate(batches):
        if number == AHEAD and not waits:
            torch.cuda._sleep(BUSY)
        model.zero_grad()
        loss = (model(x).float() - x).square().mean()
        loss.backward()
        for held, copy, p in zip(own, twin, parameters, strict=True):
            held.grad = local(p.grad)
            copy.grad = held.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.detach())
        apart.append(torch.stack([(local(p) != q).sum() for p, q in zip(parameters, twin, strict=True)]).sum())
        if waits and device == "cuda":
            torch.cuda.synchronize()
        if number + 1 == SEEN:
            with torch.no_grad():
                model(x)
            model.reshard()
    moved = sum(local(p).data_ptr() != held.data_ptr() for p, held in zip(parameters, own, strict=True))
    return Shards(
        model=bits([local(p) for p in parameters]),
        twin=bits(twin),
        losses=torch.stack(losses).tolist(),
        apart=torch.stack(apart).tolist(),
        skipped=tuple(optimizer.skipped_steps for optimizer in optimizers),
        moved=moved,
    )
