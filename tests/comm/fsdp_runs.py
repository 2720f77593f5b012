"""Training runs of a model in `fully_shard`, on 2 replicas or on one sharding of all ranks, beside a plain twin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from onebit.comm.fsdp import UnitHooks, compress_gradients
from onebit.compress import Codec
from tests.comm.samples import bits

STEPS = 5
FIRST_ELEMENTS = 24  # of a sample

Grads = dict[str, Tensor]


class Net(nn.Module):
    """Uneven shards, a parameter that one rank has all of, a frozen one, one that two modules share, nested modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FIRST_ELEMENTS, 37)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(37, 67), nn.ReLU(), nn.Linear(67, 37)) for _ in range(2))
        self.gain = nn.Parameter(torch.ones(1))
        self.frozen = nn.Linear(37, 37).requires_grad_(False)
        self.last = nn.Linear(37, 5)
        self.again = self.last

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return (self.last(self.frozen(hidden)) + self.again(hidden)) * self.gain


def net(device: Any = "cpu") -> Net:
    """The same on every rank."""
    torch.manual_seed(3)
    return Net().to(device)


def sharded(mesh: DeviceMesh, device: Any = "cpu", **options: Any) -> Any:
    """A model whose blocks, and all else, are units."""
    model = net(device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def hybrid_mesh(device: str = "cpu", replicas: int = 2) -> DeviceMesh:
    """All ranks, as so many replicas of a sharding."""
    shape = (replicas, dist.get_world_size() // replicas)
    return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))


def data(rank: int, step: int, device: Any = "cpu") -> Tensor:
    """What a rank sees in a step."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(6, FIRST_ELEMENTS, generator=generator).to(device)


def backward(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    model(x).float().square().mean().backward()


def gradients(model: nn.Module) -> Grads:
    """This rank's shard of each gradient, a copy."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: local(grad).detach().clone() for name, grad in grads.items()}


def local(tensor: Any) -> Tensor:
    """This rank's shard."""
    shard: Tensor = tensor.to_local()
    return shard


@dataclass
class Seen:
    """One rank's run.

    Attributes:
        own: after each step this rank's shards of the gradients that its replica alone has.
        means: of those that the compressed model has.
        states: of the hooks.
        params: bits of this rank's shards of the parameters.
        stats: wire bytes, dense bytes and calls of all steps.
    """

    own: list[Grads] = field(default_factory=list)
    means: list[Grads] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    params: list[list[bytes]] = field(default_factory=list)
    stats: tuple[int, int, int] = (0, 0, 0)


def train(
    mesh: DeviceMesh,
    compress: Callable[[nn.Module], UnitHooks],
    *,
    sharding: DeviceMesh | None = None,
    resume_at: int | None = None,
    steps: int = STEPS,
    device: Any = "cpu",
    **options: Any,
) -> Seen:
    """SGD on the compressed means; the twin has the same parameters and the gradients that FSDP makes by itself.

    Args:
        compress: makes the hooks of a model.
        sharding: the mesh of `fully_shard`; None: the inner dimension of `mesh`.
        options: of `fully_shard`.
    """
    inner = mesh["shard"] if sharding is None else sharding
    model, twin = sharded(inner, device, **options), sharded(inner, device, **options)
    hooks = compress(model)
    seen = Seen()
    for number in range(steps):
        if number == resume_at:
            state, params = hooks.state_dict(), model.state_dict()
            model = sharded(inner, device, **options)
            model.load_state_dict(params)
            hooks = compress(model)
            hooks.load_state_dict(state)
        twin.load_state_dict(model.state_dict())
        x = data(dist.get_rank(), number, device)
        backward(twin, x)
        backward(model, x)
        seen.own.append(gradients(twin))
        seen.means.append(gradients(model))
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.sub_(0.05 * p.grad)
        seen.params.append(bits([local(p) for p in model.parameters()]))
        seen.states.append(hooks.state_dict())
    stats = hooks.stats
    seen.stats = stats.wire_bytes, stats.dense_bytes, stats.calls
    return seen


def over_replicas(mesh: DeviceMesh, codec: Codec | None = None, **options: Any) -> Callable[[nn.Module], UnitHooks]:
    """What compresses over the outer dimension of a mesh."""
    return lambda model: compress_gradients(model, mesh["replicate"], codec, **options)
