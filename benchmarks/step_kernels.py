"""The kernels of the fused steps on one GPU, against copy and against torch's fused AdamW."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onebit.benchmarks.gpu_timing import CODEC, against, differing, make_row, timed
from onebit.benchmarks.row import Row
from onebit.comm import Part
from onebit.compress.masks import pack_mask
from onebit.optim.gpu.lamb import LayerwiseUpdate
from onebit.optim.gpu.local import LocalStep
from onebit.optim.kernels import StepKernels
from onebit.optim.kernels import step_kernels as kernels_for
from onebit.optim.lamb import Layers

BETA1, ALPHA, EPS = 0.9, 0.1, 1e-8
_DEAD = (1 << 20, 100)  # one entry of so many is dead: few blocks have one, and all have


@dataclass
class _Step:
    """One tensor's step with no rank to talk to: what is sent is what is received.

    Attributes:
        momentum: the average before, as a payload.
    """

    kernels: StepKernels
    part: Part
    grad: Tensor
    param: Tensor
    master: Tensor | None
    variance: Tensor
    momentum: Tensor
    steps: Tensor
    scalars: Tensor

    def encode(self) -> None:
        self.kernels.encode_momentum(
            self.part, [self.grad], self.momentum, [self.param], beta1=BETA1, alpha=ALPHA, l2=0.0
        )

    def count(self) -> None:
        self.kernels.adam_scalars(
            self.steps,
            self.steps,
            self.scalars,
            lr=1e-3,
            betas=(BETA1, 0.999),
            weight_decay=0.01,
            bias_correction=True,
        )

    def update(self) -> None:
        self.kernels.decode_update(
            self.part, [self.param], [self.master], [self.variance], self.momentum, self.scalars, eps=EPS
        )

    def settle(self, finite: Tensor) -> None:
        """What undoing costs where there is nothing to undo."""
        self.kernels.undo_encode(
            self.part, [self.grad], self.momentum, [self.param], beta1=BETA1, alpha=ALPHA, l2=0.0, proceed=finite
        )


def step_kernels(numel: int, device: torch.device, rounds: int) -> list[Row]:
    """Copy, AdamW, and the step's kernels for fp32 and bf16 parameters, with masters too, and with dead entries."""
    rows = [_copy(numel, device, rounds), _adamw(numel, device, rounds)]
    for dtype, mastered in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        rows += _kernels_of(_step(numel, dtype, mastered, device), " master" if mastered else "", rounds)
    for every in _DEAD:
        rows += _with_dead_entries(numel, every, device, rounds)
    rows.append(_local_step(numel, device, rounds))
    rows += _lamb_step(numel, device, rounds)
    for row in rows:
        if row.numel == numel:
            row.ratios.update(against("copy", row, rows[0]))
    return rows


def _step(numel: int, dtype: torch.dtype, mastered: bool, device: torch.device, dead: Tensor | None = None) -> _Step:
    kernels = kernels_for(device, CODEC)
    assert kernels is not None
    torch.manual_seed(1)
    (layout,) = CODEC.plan([numel])
    mask = None if dead is None else pack_mask([dead], layout)
    momentum = CODEC.encode(torch.randn(numel, device=device), layout=layout, mask=mask)
    sent = torch.zeros_like(momentum)
    master = torch.randn(numel, device=device)
    return _Step(
        kernels=kernels,
        part=Part(
            layout=layout,
            used=(0,),
            residual=torch.zeros(layout.padded_numel, device=device),
            mask=mask,
            sent=sent,
            gathered=sent,
            squared=False,
        ),
        grad=torch.randn(numel, device=device).to(dtype),
        param=master.to(dtype, copy=True),
        master=master if mastered else None,
        variance=torch.rand(numel, device=device),
        momentum=momentum,
        steps=torch.ones(1, device=device),
        scalars=torch.zeros(1, 3, device=device),
    )


def _two_kernels_of(step: _Step, suffix: str, dead: str, rounds: int) -> tuple[Row, Row]:
    """Encoding and the update, which alone differs with a master and is then told apart by `suffix`."""
    numel, dtype, packed = step.grad.numel(), step.grad.dtype, step.momentum.numel()
    moved = numel * (dtype.itemsize + 8) + 2 * packed, numel * _updated(step) + 2 * packed
    wrong = _wrong_encoding(step)
    encode = make_row("encode_momentum" + dead, dtype, numel, moved[0], timed(step.encode, rounds), wrong)
    step.count()
    wrong = _wrong_update(step)
    update = make_row("decode_update" + suffix + dead, dtype, numel, moved[1], timed(step.update, rounds), wrong)
    return encode, update


def _kernels_of(step: _Step, suffix: str, rounds: int) -> list[Row]:
    encode, update = _two_kernels_of(step, suffix, "", rounds)
    dtype, numel, moved = step.grad.dtype, step.grad.numel(), encode.nbytes + update.nbytes
    finite = torch.tensor(True, device=step.grad.device)
    count = make_row("adam_scalars", dtype, 1, 24, timed(step.count, rounds), None)
    undo = make_row("undo_encode of nothing", dtype, 1, 1, timed(lambda: step.settle(finite), rounds), None)

    def all_of_them() -> None:
        step.encode()
        step.count()
        step.update()
        step.settle(finite)

    whole = make_row("all of these" + suffix, dtype, numel, moved, timed(all_of_them, rounds), None)
    return [encode, update, count, undo, whole]


def _with_dead_entries(numel: int, every: int, device: torch.device, rounds: int) -> list[Row]:
    """The kernels that are given a mask, the server's too: its tests say that that is right."""
    dead, told = torch.arange(numel, device=device) % every == every // 2, f", 1 in {every:,} dead"
    step = _step(numel, torch.float32, False, device, dead)
    step.variance[dead] = 0.0
    del dead
    part, operators = step.part, CODEC.unchecked(device)
    rows = _two_kernels_of(step, "", told, rounds)
    payloads = torch.stack([step.momentum, part.sent])

    def reduce() -> None:
        operators.reduce_encode(payloads, part.residual, part.mask, part.sent, part.layout, 0)

    moved = 8 * numel + 3 * part.sent.numel()
    return [*rows, make_row("reduce_encode of 2" + told, torch.float32, numel, moved, timed(reduce, rounds), None)]


def _updated(step: _Step) -> int:
    """Bytes per element that an update reads and writes, payloads left aside."""
    size = step.param.element_size()
    return 4 + (2 * size if step.master is None else 8 + size)


def _wrong_encoding(step: _Step) -> int:
    """Bytes and residuals that differ from those of the codec for the same sum made by separate operations."""
    old = torch.empty_like(step.variance)
    CODEC.decode(step.momentum, old, mask=step.part.mask)
    local = (old * BETA1).add_(step.grad.float() * ALPHA)
    del old
    kept = step.part.residual
    assert kept is not None
    residual = kept.clone()
    expected = CODEC.encode(local, residual, layout=step.part.layout, mask=step.part.mask)
    step.encode()
    return differing(step.part.sent, expected) + differing(kept, residual)


def _wrong_update(step: _Step) -> int:
    """Parameters and masters that differ from those of separate operations."""
    rate, root, keep = step.scalars[0]
    m = torch.empty_like(step.variance)
    CODEC.decode(step.part.gathered, m, mask=step.part.mask)
    w = (step.param.float() if step.master is None else step.master) * keep
    w.sub_(m.mul_(rate).div_(step.variance.sqrt().mul_(root).add_(EPS)))
    step.update()
    wrong = differing(step.param, w.to(step.param.dtype)) + differing(step.momentum, step.part.gathered)
    return wrong + (0 if step.master is None else differing(step.master, w))


def _copy(numel: int, device: torch.device, rounds: int) -> Row:
    x, y = torch.randn(2, numel, device=device)
    return make_row("copy", x.dtype, numel, 8 * numel, timed(lambda: y.copy_(x), rounds), None)


def _adamw(numel: int, device: torch.device, rounds: int) -> Row:
    p = torch.nn.Parameter(torch.randn(numel, device=device))
    p.grad = torch.randn(numel, device=device)
    optimizer = torch.optim.AdamW([p], fused=True)
    return make_row("AdamW(fused=True)", p.dtype, numel, 28 * numel, timed(optimizer.step, rounds), None)


def _local_step(numel: int, device: torch.device, rounds: int) -> Row:
    """0/1 Adam's: reads the gradient, m, a, y and v, writes m, a and the parameter. Its tests say that it is right."""
    grad, param, m, a, y, v = torch.rand(6, numel, device=device).unbind()
    step = LocalStep(
        layout=CODEC.plan([numel])[0],
        grads=[grad],
        params=[param],
        momenta=[m],
        means=[a],
        starts=[y],
        variances=[v],
        rows=torch.tensor([[0.5, 1e-3, 0.999, 1.0]], device=device),
        finite=torch.ones((), dtype=torch.bool, device=device),
        beta1=BETA1,
        alpha=ALPHA,
        eps=EPS,
    )
    return make_row("local step of 0/1 Adam", grad.dtype, numel, 32 * numel, timed(step.make, rounds), None)


def _lamb_step(numel: int, device: torch.device, rounds: int) -> list[Row]:
    """1-bit LAMB's: the update, which measures as well, and the whole step. Its tests say that it is right."""
    step = _step(numel, torch.float32, False, device)
    layerwise, fresh = LayerwiseUpdate([numel], [0], device), step.variance.clone()
    layers, variance_steps = Layers([{}], device), torch.ones(1, device=device)
    layers.coeff_mean.fill_(1.0)
    layers.coeff_weight.fill_(1.0)
    finite = torch.tensor(True, device=device)
    group = {
        "lr": 1e-3,
        "betas": (BETA1, 0.999),
        "eps": EPS,
        "weight_decay": 0.01,
        "bias_correction": True,
        "factor_min": 0.5,
        "factor_max": 4.0,
        "factor_threshold": 0.1,
    }

    def update() -> None:
        layerwise.begin(step.steps, variance_steps, layers, group)
        layerwise.update(
            step.part, 0, [step.param], [None], [step.variance], [fresh], step.momentum, step.momentum, group
        )
        layerwise.finish(layers, group)

    def all_of_them() -> None:
        step.encode()
        update()
        step.settle(finite)

    dtype, packed = step.param.dtype, step.momentum.numel()
    moved = 20 * numel + 3 * packed, (12 + 20) * numel + 5 * packed
    return [
        make_row("update of 1-bit LAMB", dtype, numel, moved[0], timed(update, rounds), None),
        make_row("all of 1-bit LAMB", dtype, numel, moved[1], timed(all_of_them, rounds), None),
    ]
