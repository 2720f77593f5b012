"""LAMB's passes over lists of tensors, and the numbers that it keeps of each tensor, all of them on the device."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

ROW = 1024  # elements whose squares are added up in one go

# What is kept of every tensor, under these names in its state, and what it starts as.
STARTS = {"coeff": 1.0, "coeff_mean": 0.0, "coeff_weight": 0.0, "factor": 1.0}


class Layers:
    """The per-tensor numbers of one parameter group, as (k,) fp32 vectors of which the parameters' states hold views.

    Attributes:
        coeff: what updates were last multiplied by: LAMB's c in warm-up, its mean after it.
        coeff_mean, coeff_weight: the running mean of c that starts at 0, and the same of 1, which corrects it for that.
        factor: r of the next step of the compressed phase.
        dead: bool masks of entries without variance, known once warm-up is over; None: there are none.
    """

    def __init__(self, states: Sequence[MutableMapping[str, Any]], device: torch.device) -> None:
        """Take over what `states`, one per parameter, hold already; the rest is as at the start."""
        self.coeff, self.coeff_mean, self.coeff_weight, self.factor = (
            torch.full((len(states),), start, device=device) for start in STARTS.values()
        )
        self.dead: Sequence[Tensor] | None = None
        for index, state in enumerate(states):
            if "coeff" in state:
                for name in STARTS:
                    getattr(self, name)[index] = state[name]
                self.attach(index, state)

    def attach(self, index: int, state: MutableMapping[str, Any]) -> None:
        """Make the state of parameter `index` hold views of the vectors."""
        for name in STARTS:
            state[name] = getattr(self, name)[index]

    def rows(self, indices: Sequence[int]) -> slice | Tensor:
        """What picks these parameters out of the vectors."""
        everything = len(indices) == self.coeff.numel()
        return slice(None) if everything else torch.tensor(indices, dtype=torch.int64, device=self.coeff.device)

    def learn(self, rows: slice | Tensor, coeff: Tensor, beta: float) -> None:
        """Take new coefficients into the running mean."""
        self.coeff[rows] = coeff
        self.coeff_mean[rows] = beta * self.coeff_mean[rows] + (1 - beta) * coeff
        self.coeff_weight[rows] = beta * self.coeff_weight[rows] + (1 - beta)

    def freeze(self, rows: slice | Tensor) -> None:
        """Coefficients become their mean over warm-up, each time the same."""
        self.coeff[rows] = self.coeff_mean[rows] / self.coeff_weight[rows]


def update_moments(
    momenta: list[Tensor], variances: list[Tensor], gradients: list[Tensor], group: Mapping[str, Any]
) -> None:
    """m <- β₁·m ± (1-β₁)·g and v <- β₂·v + (1-β₂)·g², in place."""
    beta1, beta2 = group["betas"]
    torch._foreach_mul_(momenta, beta1)
    torch._foreach_add_(momenta, gradients, alpha=(beta1 - 1) if group["maximize"] else (1 - beta1))
    torch._foreach_mul_(variances, beta2)
    torch._foreach_addcmul_(variances, gradients, gradients, 1 - beta2)


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """(k,) fp32: the Euclidean norm of every tensor, of which there is at least one.

    The same bits for the same elements whatever the strides and, on the CPU, the number of threads: ranks that differ
    in them must not drift apart.
    """
    in_order = [t.contiguous() for t in tensors]
    if in_order[0].is_cuda:
        return torch.stack(list(torch._foreach_norm(in_order)))
    return torch.stack([_norm_of_rows(t.view(-1)) for t in in_order])


def largest(tensors: Sequence[Tensor]) -> Tensor:
    """(k,) fp32: the largest absolute value of every tensor, 0 where it has no elements."""
    filled = [t if t.numel() else t.new_zeros(1) for t in tensors]
    return torch.stack(list(torch._foreach_norm(filled, float("inf"))))


def spreads(variances: Sequence[Tensor], roots: Sequence[float], eps: float) -> list[Tensor]:
    """√v / root + ε of every tensor, in new tensors; root is √(1-β₂ᵗ)."""
    made = list(torch._foreach_sqrt(list(variances)))
    torch._foreach_div_(made, list(roots))
    torch._foreach_add_(made, eps)
    return made


def reconstruct(
    old: Sequence[Tensor], new: Sequence[Tensor], fresh: Sequence[Tensor], group: Mapping[str, Any]
) -> None:
    """v′ <- β₂·v′ + (1-β₂)·((m′ - β₁·m)/(1-β₁))² with the gradient that the averaged momentum stands for; m <- m′.

    Args:
        old: m, overwritten by m′.
        new: m′.
        fresh: v′, updated in place.
    """
    beta1, beta2 = group["betas"]
    torch._foreach_mul_(list(old), -beta1)
    torch._foreach_add_(list(old), list(new))
    torch._foreach_mul_(list(fresh), beta2)
    torch._foreach_addcmul_(list(fresh), list(old), list(old), (1 - beta2) / (1 - beta1) ** 2)
    torch._foreach_copy_(list(old), list(new))


def trust(x: Tensor, u: Tensor, group: Mapping[str, Any]) -> Tensor:
    """(k,) fp32: LAMB's c from the norms of parameters and updates; 1 where one of them is 0."""
    return torch.where((x > 0) & (u > 0), (x / u).clamp(group["min_coeff"], group["max_coeff"]), 1.0)


def has_factor(group: Mapping[str, Any]) -> bool:
    """Whether compressed steps are multiplied by r; where both of its bounds are 1 they are not, and keep no v′."""
    return not group["factor_min"] == group["factor_max"] == 1


def forget_factor(states: Sequence[MutableMapping[str, Any]], layers: Layers, rows: slice | Tensor) -> None:
    """Have no v′ and an r of 1, which steps without a factor leave behind."""
    layers.factor[rows] = 1.0
    for state in states:
        state.pop("exp_avg_sq_fresh", None)


def damped(ratio: Tensor, plain: Tensor, decayed: Tensor) -> Tensor:
    """(k,) fp32: r·a + 1 - a with a = ‖u₀‖/‖u‖, at most 1: weight decay does not grow with the ratio of variances."""
    share = torch.where(decayed > 0, (plain / decayed).clamp(max=1.0), 1.0)
    return ratio * share + (1 - share)


def limited(ratio: Tensor, last: Tensor, group: Mapping[str, Any]) -> Tensor:
    """(k,) fp32: r within [factor_min, factor_max], and no further from the last one than factor_threshold of it."""
    threshold = group["factor_threshold"]
    clipped: Tensor = ratio.clamp(group["factor_min"], group["factor_max"])
    return torch.minimum(torch.maximum(clipped, last * (1 - threshold)), last * (1 + threshold))


def move(values: Sequence[Tensor], updates: Sequence[Tensor], rates: Tensor) -> None:
    """x <- x - rate·u, with one rate per tensor; `updates` are overwritten."""
    torch._foreach_mul_(list(updates), list(rates.unbind()))
    torch._foreach_sub_(list(values), list(updates))


def _norm_of_rows(x: Tensor) -> Tensor:
    """A norm of norms of rows: torch's own adds all squares one after the other, which loses 3 digits of 20 million."""
    while x.numel() > ROW:
        whole = x.numel() // ROW * ROW
        heads = torch.linalg.vector_norm(x[:whole].view(-1, ROW), dim=1)
        x = torch.cat([heads, torch.linalg.vector_norm(x[whole:]).view(1)]) if whole < x.numel() else heads
    norm: Tensor = torch.linalg.vector_norm(x)
    return norm
