"""1-bit Adam: Adam on dense averages until the variance is stable, then momentum averaged in one bit per parameter."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from onebit.comm import CompressedWork
from onebit.compress import SignCodec
from onebit.optim.base import CompressedOptimizer
from onebit.optim.dense import MeanGradients
from onebit.optim.exchange import Exchange, GroupReducers
from onebit.optim.master import fp32_values, write_back
from onebit.optim.moments import adam_state, corrections, dead_masks, decay, local_momenta
from onebit.optim.options import check_adam_options, check_flags, check_freeze_step

_log = logging.getLogger(__name__)


class OnebitAdam(CompressedOptimizer):
    """Adam or AdamW whose ranks exchange about one bit per parameter after a warm-up.

    Steps 1 to `freeze_step` are `torch.optim.AdamW` (or Adam) on the mean gradient, which is averaged in fp32. Then the
    variance is frozen, every rank adds its own gradient to the momentum, and the momentum is averaged by
    `CompressedAllreduce`:  m = C(β₁·m + (1-β₁)·g),  x -= lr·(m / (1-β₁ᵗ)) / (√(v_T / (1-β₂ᵀ)) + ε).
    Algorithm: Tang et al. 2021, arXiv 2102.02888. Do not average gradients yourself and do not wrap the model in DDP.

    An entry whose variance is 0 at the freeze is dead: its update, momentum and error feedback stay 0. A parameter
    that had no gradient on any rank during warm-up is left alone for good. After the freeze a gradient that is None
    counts as zero. With one rank nothing is compressed.

    Args:
        params: as for any torch optimizer; fp32, bf16 or fp16, with the same start on every rank. Moments are fp32.
        lr, betas, eps, weight_decay, maximize: as in `torch.optim.AdamW`.
        freeze_step: number of warm-up steps, at least 1; 15 to 25 % of training, past the learning rate's own warm-up.
        adamw_mode: True: decoupled weight decay (AdamW); False: decay is added to the gradient (Adam).
        bias_correction: False leaves the factors 1-β₁ᵗ and 1-β₂ᵗ out.
        bucket_mb: MiB of fp32 that travel together, None: what suits the device; changes no result.
        backend: None, a name, a process group, a communicator or a Backend; see `onebit.comm.make_backend`.
        codec: what goes on the wire after warm-up.

    Raises:
        InputError: an option is out of range or a parameter has an unsupported dtype.
        BackendError: the backend is unknown or cannot be used.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        freeze_step: int,
        adamw_mode: bool = True,
        bias_correction: bool = True,
        maximize: bool = False,
        master_weights: bool = False,
        bucket_mb: float | None = None,
        backend: object = None,
        codec: SignCodec | None = None,
        **unsupported: NoReturn,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "freeze_step": freeze_step,
            "adamw_mode": adamw_mode,
            "bias_correction": bias_correction,
            "maximize": maximize,
        }
        super().__init__(
            params,
            defaults,
            master_weights=master_weights,
            unsupported=unsupported,
            bucket_mb=bucket_mb,
            backend=backend,
            codec=codec,
        )

    def phase(self, group: int = 0) -> str:
        """``"warmup"`` or ``"compressed"``: how the next step of a parameter group will be made."""
        return "warmup" if _in_warmup(self.param_groups[group]) else "compressed"

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "step" in state:  # where Adam or AdamW made it, every step updated the variance
                state.setdefault("variance_step", state["step"].clone())

    def _check_options(self, group: Mapping[str, Any]) -> None:
        check_adam_options("OnebitAdam", group)
        check_flags("OnebitAdam", group, "adamw_mode", "bias_correction", "maximize")
        check_freeze_step("OnebitAdam", group["freeze_step"])

    def _exchange(self, group: dict[str, Any], reducers: GroupReducers) -> Exchange:
        if _in_warmup(group):
            return _Warmup(self, group, reducers)
        return _Compressed(self, group, reducers)


class _Warmup:
    """Adam's own step on gradients averaged in fp32."""

    def __init__(self, optimizer: OnebitAdam, group: dict[str, Any], reducers: GroupReducers) -> None:
        self._optimizer = optimizer
        self._group = group
        self._gradients = MeanGradients(group["params"], optimizer._gradients(group), reducers)

    def all_finite(self) -> Tensor:
        return self._gradients.all_finite()

    def undo(self) -> None:
        """Nothing was changed."""

    def commit(self) -> None:
        group, mean = self._group, self._gradients
        params = [p for p, present in zip(group["params"], mean.present, strict=True) if present]
        means = [m for m, present in zip(mean.means, mean.present, strict=True) if present]
        if not params:
            return
        states = [adam_state(self._optimizer.state, p) for p in params]
        values = fp32_values(params, states, group)
        steps = [s["step"] for s in states]
        counted = steps if group["bias_correction"] else [torch.full_like(s, torch.inf) for s in steps]
        (adamw if group["adamw_mode"] else adam)(
            values,
            means,
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            counted,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
        if counted is not steps:
            torch._foreach_add_(steps, 1.0)
        torch._foreach_copy_([s["variance_step"] for s in states], steps)
        write_back(params, values)


class _Compressed:
    """Momentum averaged in one bit per entry over a frozen variance."""

    def __init__(self, optimizer: OnebitAdam, group: dict[str, Any], reducers: GroupReducers) -> None:
        self._group = group
        known = ["exp_avg" in optimizer.state.get(p, {}) for p in group["params"]]
        self._params = [p for p, k in zip(group["params"], known, strict=True) if k]
        self._states = [optimizer.state[p] for p in self._params]
        late = [i for i, p in enumerate(group["params"]) if p.grad is not None and not known[i]]
        if late and reducers.first_warning():
            _log.warning(
                "rank %d: parameters %s have their first gradient after the freeze, so there is no variance for them "
                "and they are not updated; give them to add_param_group, where they make a warm-up of their own",
                optimizer.backend.rank,
                late,
            )
        gradients = [g for g, k in zip(optimizer._gradients(group), known, strict=True) if k]
        momenta = [s["exp_avg"] for s in self._states]
        reduce = reducers.compressed(momenta, lambda: dead_masks([s["exp_avg_sq"] for s in self._states]))
        values = fp32_values(self._params, self._states, group)
        self._work: CompressedWork = reduce.start(local_momenta(momenta, gradients, values, group))
        self._work.finish()

    def all_finite(self) -> Tensor:
        return self._work.all_finite()

    def undo(self) -> None:
        self._work.undo()

    def commit(self) -> None:
        if not self._params:
            return
        group, states = self._group, self._states
        momenta = [s["exp_avg"] for s in states]
        self._work.decode(momenta)
        torch._foreach_add_([s["step"] for s in states], 1.0)
        values = fp32_values(self._params, states, group)
        decay(values, group)
        rates, roots = zip(*(corrections(s, group) for s in states), strict=True)
        spread = torch._foreach_sqrt([s["exp_avg_sq"] for s in states])
        torch._foreach_div_(spread, list(roots))
        torch._foreach_add_(spread, group["eps"])
        torch._foreach_addcdiv_(values, momenta, spread, [-float(group["lr"]) * rate for rate in rates])
        write_back(self._params, values)


def _in_warmup(group: Mapping[str, Any]) -> bool:
    return bool(group["step"] < group["freeze_step"])
