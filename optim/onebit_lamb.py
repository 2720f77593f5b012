"""1-bit LAMB: LAMB until the variance is stable, then compressed momentum with each layer's mean rate of warm-up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from onebit.comm.levels import LocalGroup
from onebit.compress import Codec
from onebit.optim import lamb
from onebit.optim.exchange import Exchange, GroupReducers
from onebit.optim.freezing import Freezing
from onebit.optim.fused_lamb import FusedLamb, lamb_kernels
from onebit.optim.fused_rates import FusedRates
from onebit.optim.kernels import StepKernels
from onebit.optim.master import fp32_values, write_back
from onebit.optim.moments import adam_state, corrections, dead_masks, local_momenta
from onebit.optim.options import check_lamb_options
from onebit.optim.refusals import refuse_without_coefficients
from onebit.optim.staged import CompressedExchange
from onebit.optim.state_keys import LAYERWISE
from onebit.optim.warmup import WarmupStep


class OnebitLamb(Freezing):
    """LAMB whose ranks exchange about one bit per parameter after a warm-up.

    Steps 1 to `freeze_step` are LAMB on the mean gradient, which is averaged in fp32: with u = m̂/(√v̂ + ε) + λ·x, each
    parameter tensor moves by  x -= lr·c·u,  c = ‖x‖/‖u‖ within [min_coeff, max_coeff], or 1 if a norm is 0. Then the
    variance is frozen, the momentum is averaged by `CompressedAllreduce`, and  x -= lr·c̄·u  with the running mean c̄
    of c. Algorithms: You et al. 2020, arXiv 1904.00962; Li et al. 2021, arXiv 2104.06069. Do not average gradients
    yourself; a model in `DistributedDataParallel` needs `onebit.comm.ddp.attach`.

    The published algorithm multiplies these steps by a factor r as well, which ``factor_min=0.5, factor_max=4.0`` asks
    for. It follows the variance v′ that the averaged momentum stands for: r = max((√v̂ + ε)/(√v̂′ + ε)) over the tensor,
    damped by the share of weight decay in u, within these bounds, and at most factor_threshold of itself away from its
    last value. A step multiplies by the r that the step before has left, 1 at first, and finds the next, so that one
    pass over memory moves the parameters and measures. Such a maximum makes steps up to three times as long as LAMB's
    own, where without r they were about as long (docs/convergence.md), so r has to be asked for.

    The published algorithm also brings all tensors' momenta to one size before they are compressed. Here no two tensors
    share a scale, so that would change nothing and is left out. c̄ is corrected for its start at 0.

    An entry whose variance is 0 at the freeze is dead: its momentum and error feedback stay 0, and r does not see it. A
    parameter that had no gradient on any rank during warm-up is left alone until `add_param_group` gives it a warm-up
    of its own. After the freeze a gradient that is None counts as zero: momentum and weight decay still move the
    parameter, so put layers that are to stand still in a group whose lr is 0 then. With one rank nothing is compressed.
    `phase` is ``"warmup"``, ``"compressed"`` or, with ``compress=False`` in a group, ``"dense"``.

    Args:
        params: as for any torch optimizer; fp32, bf16 or fp16, with the same start on every rank. Moments are fp32.
        lr, betas, weight_decay, maximize: as in `torch.optim.AdamW`; lr is relative to the norm of a tensor.
        eps: more than 0, for 0/0 of a single entry would spoil the norm of its whole tensor.
        freeze_step: number of warm-up steps, at least 1; 15 to 25 % of training, past the learning rate's own warm-up.
            ``"auto"``: until the variance is stable; see `onebit.optim.freeze.observe`. More than there are steps:
            plain LAMB, as with ``compress=False`` in a group.
        total_steps: length of the training, if known: a warning comes when it would end before the freeze.
        max_coeff, min_coeff: bounds of c; published for BERT: 0.3 and 0.01.
        coeff_beta: how much of c̄ stays from step to step.
        factor_max, factor_min, factor_threshold: bounds of r, and of its change in one step; both bounds 1: no r.
            Published for BERT: 4.0, 0.5 and 0.1. r costs 4 bytes of memory per element.
        variance_floor: √v of an entry becomes at least this share of the mean √v of its block at the freeze, on more
            than one rank; see `onebit.optim.floor`. 0: the algorithm as published.
        bias_correction: False leaves the factors 1-β₁ᵗ and 1-β₂ᵗ out.
        master_weights: keep an fp32 copy of parameters in half precision, so that small updates add up.
        bucket_mb: MiB of fp32 that travel together, None: what suits the device; changes no result.
        backend: None, a name, a process group, a communicator or a Backend; see `onebit.comm.make_backend`.
        codec: what goes on the wire after warm-up.
        local_group: as for `onebit.comm.CompressedAllreduce`.
        check_every: k: every k-th step ends with `onebit.optim.check_replicas`, which raises where ranks have drifted
            apart; None: no check and no cost.
        overlap: exchanges start during backward, bucket by bucket; see `onebit.optim.overlap`. Then accumulate in
            `no_sync`, and leave gradients as they are between backward and `step`.

    Raises:
        InputError: an option is out of range or a parameter has an unsupported dtype.
        BackendError: the backend is unknown or cannot be used.
    """

    _own_keys = LAYERWISE

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        *,
        freeze_step: int | str,
        total_steps: int | None = None,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        coeff_beta: float = 0.9,
        factor_max: float = 1.0,
        factor_min: float = 1.0,
        factor_threshold: float = 0.1,
        variance_floor: float = 0.1,
        bias_correction: bool = True,
        maximize: bool = False,
        master_weights: bool = False,
        bucket_mb: float | None = None,
        backend: object = None,
        codec: Codec | None = None,
        local_group: LocalGroup = None,
        check_every: int | None = None,
        overlap: bool = False,
        **unsupported: NoReturn,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "freeze_step": freeze_step,
            "total_steps": total_steps,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
            "coeff_beta": coeff_beta,
            "factor_max": factor_max,
            "factor_min": factor_min,
            "factor_threshold": factor_threshold,
            "variance_floor": variance_floor,
            "bias_correction": bias_correction,
            "maximize": maximize,
        }
        self._layers: dict[int, lamb.Layers] = {}
        super().__init__(
            params,
            defaults,
            master_weights=master_weights,
            unsupported=unsupported,
            bucket_mb=bucket_mb,
            backend=backend,
            codec=codec,
            local_group=local_group,
            check_every=check_every,
            overlap=overlap,
        )

    @property
    def kernels(self) -> str:
        """What makes compressed steps: ``"cpu"`` or ``"gpu"``, fused kernels; or ``"torch"``, its operations.

        Fused kernels are for a `SignCodec`, on more than one rank, with `local_group` on more than one node (how many
        there are is known after the first step); steps with a factor r have them on CUDA devices alone, for blocks of
        1024. Between their steps ``state_dict()`` has ``exp_avg`` but ``state`` does not. Of several groups the first
        one with parameters is told of.
        """
        group = next((group for group in self.param_groups if group["params"]), None)
        if group is None or self.backend.size == 1:
            return "torch"
        fused = self._kernels_of(group, group["params"][0].device)
        return "torch" if fused is None else fused.name

    def lamb_coefficients(self, group: int = 0) -> dict[str, Tensor]:
        """What each of the k parameter tensors' updates of a group is multiplied by, beside lr.

        Returns:
            ``"coeff"``: c or, after warm-up, c̄ of the last step; ``"factor"``: r of the next step, 1 in warm-up. Both
            are copies, (k,) fp32 on the parameters' device, in the order of the group, and 1 for a parameter that was
            not updated yet.
        """
        layers = self._layers_of(self.param_groups[group])
        return {"coeff": layers.coeff.clone(), "factor": layers.factor.clone()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._layers.clear()

    def _layers_of(self, group: Mapping[str, Any]) -> lamb.Layers:
        """The per-tensor numbers of a group."""
        index = next(i for i, one in enumerate(self.param_groups) if one is group)
        if index not in self._layers:
            params = group["params"]
            states = [self.state.get(p, {}) for p in params]
            self._layers[index] = lamb.Layers(states, params[0].device if params else torch.device("cpu"))
        return self._layers[index]

    def _regrouped(self, index: int) -> None:
        super()._regrouped(index)
        before = self._layers.pop(index, None)
        if before is not None:
            self._layers_of(self.param_groups[index]).dead = before.dead

    def _check_options(self, group: Mapping[str, Any]) -> None:
        super()._check_options(group)
        check_lamb_options("OnebitLamb", group)

    def _exchange(self, group: dict[str, Any], reducers: GroupReducers) -> Exchange:
        if self._planned(group, group["step"]) == "compressed":
            return self._fused_exchange(group, reducers) or _Compressed(self, group, reducers)
        self._unfuse(group, reducers)
        self._forget_dead(reducers)
        self._renew(reducers)  # whoever goes back to dense steps ends the compressed average that there was
        return _Dense(self, group, reducers)

    def _kernels_of(self, group: Mapping[str, Any], device: torch.device) -> StepKernels | None:
        """The fused kernels of a group's compressed steps; None: there are none."""
        kernels = self._step_kernels(device)
        if kernels is None or not lamb.has_factor(group):
            return kernels
        return lamb_kernels(device, self._codec)

    def _fused_exchange(self, group: dict[str, Any], reducers: GroupReducers) -> Exchange | None:
        """The compressed step by fused kernels; None: there are none, or nothing to average."""
        known = self._known(group)
        kernels = self._kernels_of(group, known.params[0].device) if known.params else None
        if kernels is None or reducers.backend.size == 1:
            if reducers in self._fused:  # the group has been given a factor
                self._unfuse(group, reducers)
                del self._fused[reducers]
                self._layers_of(group).dead = dead_masks([s["exp_avg_sq"] for s in known.states])
            return None
        gradients = self._known_gradients(group, reducers, known)
        refuse_without_coefficients(known.states, group)
        fused, kind = self._fused.get(reducers), FusedLamb if lamb.has_factor(group) else FusedRates
        if not isinstance(fused, kind):
            self._unfuse(group, reducers)
            reduce = self._average_of(reducers, [s["exp_avg_sq"] for s in known.states])
            if not reduce.parts:
                return None
            fused = self._fused[reducers] = kind(kernels, reduce, known, self._layers_of(group))
        return fused.exchange(group, known, gradients)


class _Dense(WarmupStep):
    """LAMB's own step on gradients averaged in fp32."""

    _optimizer: OnebitLamb

    def _update(self, params: Sequence[Tensor], means: list[Tensor]) -> None:
        group, used = self._group, self._used()
        layers = self._optimizer._layers_of(group)
        states = [adam_state(self._optimizer.state, p) for p in params]
        for i, state in zip(used, states, strict=True):
            layers.attach(i, state)
        values = fp32_values(params, states, group)
        momenta, variances = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        lamb.update_moments(momenta, variances, means, group)
        torch._foreach_add_([s["step"] for s in states], 1.0)
        torch._foreach_copy_([s["variance_step"] for s in states], [s["step"] for s in states])

        rates, roots = zip(*(corrections(s, group) for s in states), strict=True)
        updates = list(torch._foreach_div(momenta, lamb.spreads(variances, roots, group["eps"])))
        torch._foreach_mul_(updates, list(rates))
        if group["weight_decay"]:
            torch._foreach_add_(updates, values, alpha=group["weight_decay"])
        coeff = lamb.trust(lamb.norms(values), lamb.norms(updates), group)
        layers.learn(layers.rows(used), coeff, group["coeff_beta"])
        lamb.move(values, updates, coeff * group["lr"])
        write_back(params, values)


class _Compressed(CompressedExchange):
    """Momentum averaged in one bit per entry over a frozen variance, at each tensor's mean rate of warm-up."""

    def __init__(self, optimizer: OnebitLamb, group: dict[str, Any], reducers: GroupReducers) -> None:
        self._group = group
        self._layers = optimizer._layers_of(group)
        known = self._known = optimizer._known(group)
        self._gradients = optimizer._known_gradients(group, reducers, known)
        self._params, self._states = known.params, known.states
        refuse_without_coefficients(self._states, group)
        momenta = [s["exp_avg"] for s in self._states]
        super().__init__(reducers.compressed(momenta, self._dead), momenta, known.indices)

    def commit(self) -> None:
        if not self._params:
            return
        group, states, layers = self._group, self._states, self._layers
        rows = layers.rows(self._known.indices)
        updates = self._take_in_mean(rows)
        self._known.count()

        values = fp32_values(self._params, states, group)
        rates, roots = zip(*(corrections(s, group) for s in states), strict=True)
        spread = lamb.spreads([s["exp_avg_sq"] for s in states], roots, group["eps"])
        torch._foreach_div_(updates, spread)
        torch._foreach_mul_(updates, list(rates))
        plain = lamb.norms(updates) if lamb.has_factor(group) else None
        if group["weight_decay"]:
            torch._foreach_add_(updates, values, alpha=group["weight_decay"])
        layers.freeze(rows)
        rate = layers.coeff[rows] * layers.factor[rows] * group["lr"]
        if plain is not None:
            ratio = lamb.damped(self._largest_ratio(spread), plain, lamb.norms(updates))
            layers.factor[rows] = lamb.limited(ratio, layers.factor[rows], group)
        lamb.move(values, updates, rate)
        write_back(self._params, values)

    def _take_in_mean(self, rows: slice | Tensor) -> list[Tensor]:
        """The averaged momentum becomes that of the states, and v′ follows it; returns it in new tensors."""
        states, momenta = self._states, [s["exp_avg"] for s in self._states]
        mean = [torch.empty_like(m) for m in momenta]
        self._decode(mean)
        if lamb.has_factor(self._group):
            for state in states:
                if "exp_avg_sq_fresh" not in state:
                    state["exp_avg_sq_fresh"] = state["exp_avg_sq"].clone()
            lamb.reconstruct(momenta, mean, [s["exp_avg_sq_fresh"] for s in states], self._group)
        else:
            lamb.forget_factor(states, self._layers, rows)
            torch._foreach_copy_(momenta, mean)
        return mean

    def _local_momenta(self, indices: Sequence[int]) -> list[Tensor]:
        momenta, gradients = [self._states[i]["exp_avg"] for i in indices], [self._gradients[i] for i in indices]
        return local_momenta(momenta, gradients, [], {**self._group, "adamw_mode": True})

    def _largest_ratio(self, spread: list[Tensor]) -> Tensor:
        """(k,) fp32: the largest (√v̂ + ε)/(√v̂′ + ε) of the live entries of each tensor, 1 where none is alive.

        Args:
            spread: √v̂ + ε, overwritten.
        """
        now = [{**s, "variance_step": s["step"]} for s in self._states]
        roots = [corrections(s, self._group)[1] for s in now]
        torch._foreach_div_(spread, lamb.spreads([s["exp_avg_sq_fresh"] for s in now], roots, self._group["eps"]))
        if self._layers.dead is not None:
            for ratios, mask in zip(spread, self._layers.dead, strict=True):
                ratios.masked_fill_(mask, 0.0)
        largest = lamb.largest(spread)
        return torch.where(largest > 0, largest, 1.0)

    def _dead(self) -> list[Tensor] | None:
        """What takes no part, for the average and for the factors."""
        masks = dead_masks([s["exp_avg_sq"] for s in self._states])
        self._layers.dead = masks
        return masks
