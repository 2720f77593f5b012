"""0/1 Adam: a variance that is updated ever more rarely, and local steps between ever rarer compressed averages."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from onebit.comm.levels import LocalGroup
from onebit.compress import Codec
from onebit.optim.exchange import Exchange, GroupReducers
from onebit.optim.fused_groups import FusedGroups
from onebit.optim.fused_interval import FusedInterval
from onebit.optim.fused_local import FusedLocal
from onebit.optim.interrupts import whole
from onebit.optim.known import Known
from onebit.optim.left_out import LeftOut
from onebit.optim.local_kernels import LocalStep, local_kernel
from onebit.optim.local_steps import Reach, is_open, starts_of
from onebit.optim.options import check_adam_options, check_flags, check_number
from onebit.optim.policies import phase_after, schedules
from onebit.optim.state_keys import EXTRA, INTERVAL, LEFT_OUT_STEPS
from onebit.optim.untraced import untraced
from onebit.optim.zero_one_exchanges import FusedLocalExchange, LocalExchange, SyncExchange, VarianceExchange


class ZeroOneAdam(FusedGroups):
    """Adam or AdamW whose ranks meet in ever fewer steps, and then exchange about one bit per parameter.

    With m, v, x as in Adam, γ = lr / (1-β₁ᵗ), D = √(v / (1-β₂ᵏ)) + ε and k the number of variance steps so far:

    * variance step, Adam's own on gradients averaged in fp32: m = β₁·m + (1-β₁)·g, v = β₂·v + (1-β₂)·g², x -= γ·m/D;
    * local step, of every rank by itself, without any communication: m = β₁·m + (1-β₁)·gᵢ, u += γ·m, x -= γ·m/D;
    * synchronised step, a local step and then the ranks agree: m = C(u/Σγ), x = x_last - Σγ·m/D, u = 0, where C is
      `CompressedAllreduce` and x_last is what x was when the ranks last agreed.

    Until `var_freeze_step` every step is a variance step or a synchronised one; then the variance is frozen and local
    steps begin. `onebit.optim.policies` has both schedules; `phase` is ``"variance"``, ``"sync"`` or ``"local"``.
    Algorithm: Lu et al. 2022, arXiv 2202.06009. Do not average gradients yourself; a model in `DistributedDataParallel`
    needs `onebit.comm.ddp.attach`.

    **Between synchronisations the parameters of ranks differ.** Call `synchronize` before you evaluate or save a model
    that all ranks are to share; a checkpoint to go on from needs every rank's own parameters and state. During an
    interval parameters are computed from their value at its start, so what you write to them then is lost.

    A number that is not finite makes all ranks skip a variance step or a synchronised step, which then comes next time.
    In a local step the others cannot know: a rank leaves its own contribution out, and the schedule goes on.

    Decoupled weight decay stays outside u. An entry whose variance is 0 is dead: its update, momentum and feedback are
    0 until a variance step brings it to life. A parameter that no rank had a gradient for in any variance step is
    left alone. In other steps a gradient that is None counts as zero. With one rank this is Adam whose variance is
    updated by the schedule, and nothing is compressed.

    Args:
        params: as for any torch optimizer; fp32, bf16 or fp16, with the same start on every rank. Moments are fp32.
        lr, betas, eps, weight_decay, maximize: as in `torch.optim.AdamW`.
        var_freeze_step: the last step that may update the variance; usually the end of the learning rate's warm-up.
        var_update_scaler: the gap between variance steps doubles after this many of them.
        local_step_scaler: once the variance is frozen, the gap between synchronised steps doubles after so many steps.
        local_step_clipper: the longest gap between synchronised steps.
        variance_floor: when a step follows that does not update v, √v of an entry becomes at least this share of the
            mean √v of its block, on more than one rank; see `onebit.optim.floor`. 0: the algorithm as published.
        adamw_mode: True: decoupled weight decay (AdamW); False: decay is added to the gradient (Adam).
        bias_correction: False leaves the factors 1-β₁ᵗ and 1-β₂ᵏ out.
        master_weights: keep an fp32 copy of parameters in half precision, so that small updates add up.
        bucket_mb: MiB of fp32 that travel together, None: what suits the device; changes no result.
        backend: None, a name, a process group, a communicator or a Backend; see `onebit.comm.make_backend`.
        codec: what goes on the wire in synchronised steps.
        local_group: as for `onebit.comm.CompressedAllreduce`.
        check_every: k: every k-th step ends with `onebit.optim.check_replicas`, which raises where ranks have drifted
            apart; None: no check and no cost.
        overlap: exchanges start during backward, bucket by bucket; see `onebit.optim.overlap`. Then accumulate in
            `no_sync`, and leave gradients as they are between backward and `step`.

    Raises:
        InputError: an option is out of range or a parameter has an unsupported dtype.
        BackendError: the backend is unknown or cannot be used.
    """

    _own_keys = INTERVAL

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        var_freeze_step: int,
        var_update_scaler: int = 16,
        local_step_scaler: int = 32678,
        local_step_clipper: int = 16,
        variance_floor: float = 0.1,
        adamw_mode: bool = True,
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
            "var_freeze_step": var_freeze_step,
            "var_update_scaler": var_update_scaler,
            "local_step_scaler": local_step_scaler,
            "local_step_clipper": local_step_clipper,
            "variance_floor": variance_floor,
            "adamw_mode": adamw_mode,
            "bias_correction": bias_correction,
            "maximize": maximize,
        }
        self._left_out = LeftOut()
        self._locals: WeakKeyDictionary[GroupReducers, FusedLocal] = WeakKeyDictionary()
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
    def local_kernels(self) -> str:
        """What makes local steps: ``"cpu"`` or ``"gpu"``, a fused kernel; or ``"torch"``, its operations.

        Fused kernels come with the codec's own, on more than one rank and with decoupled weight decay or none.
        """
        kernels = [self._local_kernel(group) for group in self.param_groups if group["params"]]
        names = {"torch" if kernel is None else kernel.name for kernel in kernels}
        return names.pop() if len(names) == 1 and self.backend.size > 1 else "torch"

    @property
    def left_out_steps(self) -> int:
        """Local steps that this rank took no part in, as it had a non-finite number; waits for the device."""
        self._left_out.hear()
        return self._left_out.steps

    @untraced
    @torch.no_grad()
    def synchronize(self) -> None:
        """Make the parameters of all ranks equal now, by ending the interval that is under way; collective.

        It makes no step and changes no schedule: the next interval starts here and ends where this one would have.

        Raises:
            TransportError: a rank is dead or too slow; nothing but error feedback was touched, and that was put back.
        """
        self._refuse_under_way("synchronize()")
        exchanges: list[SyncExchange] = []
        with whole(exchanges) as begin_to_end:
            for group, reducers in zip(self.param_groups, self._of_groups(), strict=True):
                known = self._known(group)
                if is_open(known.states):
                    exchanges.append(SyncExchange(self, group, reducers, known, steps=0))
                    exchanges[-1].sending.finish()
            begin_to_end()
            for exchange in exchanges:
                exchange.commit()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state[EXTRA][LEFT_OUT_STEPS] = self.left_out_steps
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._left_out.hear()
        self._left_out.steps = state_dict.get(EXTRA, {}).get(LEFT_OUT_STEPS, 0)

    def _check_options(self, group: Mapping[str, Any]) -> None:
        check_adam_options("ZeroOneAdam", group)
        check_flags("ZeroOneAdam", group, "adamw_mode", "bias_correction", "maximize")
        check_number("ZeroOneAdam", "variance_floor", group["variance_floor"], 0.0, 1.0)
        schedules(group)

    def _averages(self, group: Mapping[str, Any]) -> bool:
        return self._planned(group, group["step"]) == "variance" and not is_open(self._known(group).states)

    def _planned(self, group: Mapping[str, Any], step: int) -> str:
        return phase_after(step, group)

    def _exchange(self, group: dict[str, Any], reducers: GroupReducers) -> Exchange:
        known = self._known(group)
        kind, within = self._planned(group, group["step"]), is_open(known.states)
        if kind == "sync" and self.backend.size > 1:
            make = self._fused_interval if within else self._fused_step
            fused = make(group, reducers, known, self._known_gradients(group, reducers, known))
            if fused is not None:
                return fused
        self._unfuse(group, reducers)
        if kind == "variance" and not within:
            return VarianceExchange(self, group, reducers)
        if kind == "local" and self.backend.size > 1:
            kernel = self._local_kernel(group) if known.params else None
            step = LocalExchange if kernel is None else functools.partial(FusedLocalExchange, kernel)
            return step(self, group, reducers, known)
        return SyncExchange(self, group, reducers, known)

    def _local_kernel(self, group: Mapping[str, Any]) -> type[LocalStep] | None:
        return local_kernel(group["params"][0].device, group, self._codec)

    def _is_staged(self, group: Mapping[str, Any]) -> bool:
        return self._planned(group, group["step"]) != "local"

    def _leaves_others(self, group: Mapping[str, Any]) -> bool:
        return bool(group["step"] >= group["var_freeze_step"])  # until then they may get a variance

    def _fused_interval(
        self, group: Mapping[str, Any], reducers: GroupReducers, known: Known, gradients: Sequence[Tensor | None]
    ) -> Exchange | None:
        """The step that ends an interval, by fused kernels; None: there are none, or none for these options."""
        reach = Reach.of(known.states, known.counts(), group)
        coupled = not group["adamw_mode"] and group["weight_decay"]
        if coupled or len(set(reach.shares)) != 1:
            return None
        momentum = self._fused_momentum(reducers, known)
        return None if momentum is None else FusedInterval(momentum, group, known, gradients, reach)

    def _renew(self, reducers: GroupReducers) -> None:
        super()._renew(reducers)
        self._locals.pop(reducers, None)

    def _tell_scaler(self, made: Tensor) -> None:
        latest = self._left_out.latest()
        if getattr(self, "found_inf", None) is not None:
            for taken in latest:
                made = made.to(taken.device) & taken
        super()._tell_scaler(made)

    def _common_value(self, p: Tensor) -> Tensor:
        state = self.state.get(p, {})
        return starts_of([state])[0] if is_open([state]) else p
