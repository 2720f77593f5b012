"""1-bit Adam: Adam on dense averages until the variance is stable, then momentum averaged in one bit per parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor

from onebit.comm.levels import LocalGroup
from onebit.compress import Codec
from onebit.optim.adam_steps import dense_step, move, take_in
from onebit.optim.dense import MeanExchange
from onebit.optim.exchange import Exchange, GroupReducers
from onebit.optim.freeze import frozen_since
from onebit.optim.known import Known
from onebit.optim.master import fp32_values
from onebit.optim.metrics import Metrics
from onebit.optim.moments import adam_state, local_momenta
from onebit.optim.options import check_count, check_flags
from onebit.optim.sharding import Sharding
from onebit.optim.sliced_steps import SlicedDense, SlicedRefresh
from onebit.optim.staged import CompressedExchange
from onebit.optim.state_keys import EXTRA
from onebit.optim.update_rms import update_sizes
from onebit.optim.warmup import WarmupStep


class OnebitAdam(Sharding):
    """Adam or AdamW whose ranks exchange about one bit per parameter after a warm-up.

    Steps 1 to `freeze_step` are `torch.optim.AdamW` (or Adam) on the mean gradient, which is averaged in fp32. Then the
    variance is frozen, every rank adds its own gradient to the momentum, and the momentum is averaged by
    `CompressedAllreduce`:  m = C(β₁·m + (1-β₁)·g),  x -= lr·(m / (1-β₁ᵗ)) / (√(v_T / (1-β₂ᵀ)) + ε).
    Algorithm: Tang et al. 2021, arXiv 2102.02888. Do not average gradients yourself; a model in
    `DistributedDataParallel` needs `onebit.comm.ddp.attach`.

    An entry whose variance is 0 at the freeze is dead: its update, momentum and error feedback stay 0. One whose
    variance is far below its neighbours' would be thrown about by their scale, so it is raised; see `variance_floor`. A
    parameter that had no gradient on any rank during warm-up is left alone until a variance refresh finds one, or until
    `add_param_group` gives it a warm-up of its own. After the freeze a gradient that is None counts as zero: momentum
    and weight decay still move the parameter, so put layers that are to stand still in a group whose lr is 0 then. With
    one rank nothing is compressed.

    Options of a group are those below up to `master_weights`, and ``compress``: False for a group that is to make
    warm-up's steps for ever, such as one of a few numbers that must be exact. `phase` is ``"warmup"``,
    ``"compressed"``, ``"refresh"`` (see `variance_refresh`) or ``"dense"`` (``compress=False``).

    Args:
        params: as for any torch optimizer; fp32, bf16 or fp16, with the same start on every rank. Moments are fp32.
        lr, betas, eps, weight_decay, maximize: as in `torch.optim.AdamW`.
        freeze_step: number of warm-up steps, at least 1; 15 to 25 % of training, past the learning rate's own warm-up.
            ``"auto"``: until the variance is stable; see `onebit.optim.freeze.observe`.
        total_steps: length of the training, if known: a warning comes when it would end before the freeze.
        variance_refresh: k: every k-th step after the freeze averages gradients in fp32 instead and brings the variance
            up to date, as if they had been those of k steps: v <- β₂ᵏ·v + (1-β₂ᵏ)·g². Dead entries that have a gradient
            then come alive. None or 0: never.
        variance_floor: √v of an entry becomes at least this share of the mean √v of its block when the variance is
            frozen or refreshed, on more than one rank; see `onebit.optim.floor`. 0: the algorithm as published.
        adamw_mode: True: decoupled weight decay (AdamW); False: decay is added to the gradient (Adam).
        bias_correction: False leaves the factors 1-β₁ᵗ and 1-β₂ᵗ out.
        master_weights: keep an fp32 copy, ``state["master"]``, of each parameter in bf16 or fp16 and update that.
        bucket_mb: MiB of fp32 that travel together, None: what suits the device; changes no result.
        backend: None, a name, a process group, a communicator or a Backend; see `onebit.comm.make_backend`.
        codec: what goes on the wire after warm-up.
        local_group: as for `onebit.comm.CompressedAllreduce`.
        shard: with `local_group`, every rank of a node holds the moments, masters and error feedback of a slice of the
            parameters alone, updates that slice and gets the others from the ranks of its node; the steps are the same
            bit for bit. See `onebit.optim.sharding`.
        check_every: k: every k-th step ends with `onebit.optim.check_replicas`, which raises where ranks have drifted
            apart; None: no check and no cost.
        overlap: exchanges start during backward, bucket by bucket; see `onebit.optim.overlap`. Then accumulate in
            `no_sync`, and leave gradients as they are between backward and `step`.

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
        freeze_step: int | str,
        total_steps: int | None = None,
        variance_refresh: int | None = None,
        variance_floor: float = 0.1,
        adamw_mode: bool = True,
        bias_correction: bool = True,
        maximize: bool = False,
        master_weights: bool = False,
        bucket_mb: float | None = None,
        backend: object = None,
        codec: Codec | None = None,
        local_group: LocalGroup = None,
        shard: bool = False,
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
            "variance_refresh": variance_refresh,
            "variance_floor": variance_floor,
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
            local_group=local_group,
            shard=shard,
            check_every=check_every,
            overlap=overlap,
        )

    def metrics(self, *, compression_error: bool = False, update_rms: bool = False) -> Metrics:
        """As `CompressedOptimizer.metrics`.

        Args:
            compression_error: as there.
            update_rms: add, by a pass over the moments, ``update_rms``: the root mean square of the last update before
                the learning rate, (m / (1-β₁ᵗ)) / (√(v / (1-β₂ᵀ)) + ε), over all entries that this rank holds; and
                ``largest_update_rms``, that of the parameter where it is largest. Both are absent as long as no
                parameter has a variance. They grow where a frozen variance has become too small.
        """
        found = super().metrics(compression_error=compression_error)
        return found | update_sizes(self) if update_rms else found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if EXTRA not in state_dict:
            for group in self.param_groups:
                self._raise_variances(group)

    def _check_options(self, group: Mapping[str, Any]) -> None:
        super()._check_options(group)
        check_flags("OnebitAdam", group, "adamw_mode")
        check_count("OnebitAdam", "variance_refresh", group["variance_refresh"], "steps between two, 0 for none", 0)

    def _planned(self, group: Mapping[str, Any], step: int) -> str:
        phase, every = super()._planned(group, step), group["variance_refresh"]
        if phase == "compressed" and every and (step + 1 - (frozen_since(group) or 0)) % every == 0:
            return "refresh"
        return phase

    def _exchange(self, group: dict[str, Any], reducers: GroupReducers) -> Exchange:
        phase = self._planned(group, group["step"])
        slices = self._slices_of(reducers)
        if phase == "compressed" and slices is not None:
            return self._sliced_step(group, reducers, slices)
        if phase == "compressed":
            known = self._known(group)
            gradients = self._known_gradients(group, reducers, known)
            fused = self._fused_step(group, reducers, known, gradients)
            return _Compressed(self, group, reducers, known, gradients) if fused is None else fused
        self._unfuse(group, reducers)
        self._forget_dead(reducers)
        if phase == "refresh":
            return _Refresh(self, group, reducers) if slices is None else SlicedRefresh(self, group, reducers, slices)
        self._renew(reducers)  # whoever goes back to dense steps ends the compressed average that there was
        return _Dense(self, group, reducers) if slices is None else SlicedDense(self, group, reducers, slices)


class _Dense(WarmupStep):
    """Adam's own step on gradients averaged in fp32."""

    def _update(self, params: Sequence[Tensor], means: list[Tensor]) -> None:
        dense_step(self._group, params, [adam_state(self._optimizer.state, p) for p in params], means)


class _Compressed(CompressedExchange):
    """Momentum averaged in one bit per entry over a frozen variance, by torch's operations."""

    def __init__(
        self,
        optimizer: OnebitAdam,
        group: dict[str, Any],
        reducers: GroupReducers,
        known: Known,
        gradients: Sequence[Tensor | None],
    ) -> None:
        self._group = group
        self._params, self._states = known.params, known.states
        self._gradients = gradients
        variances = [s["exp_avg_sq"] for s in self._states]
        super().__init__(optimizer._average_of(reducers, variances), variances, known.indices)

    def commit(self) -> None:
        self._decode([s["exp_avg"] for s in self._states])
        if self._params:
            move(self._group, self._params, self._states)

    def _local_momenta(self, indices: Sequence[int]) -> list[Tensor]:
        states = [self._states[i] for i in indices]
        values = fp32_values([self._params[i] for i in indices], states, self._group)
        gradients = [self._gradients[i] for i in indices]
        return local_momenta([s["exp_avg"] for s in states], gradients, values, self._group)


class _Refresh(MeanExchange):
    """Momentum and variance from gradients averaged in fp32; error feedback waits for the next compressed step.

    A parameter without a variance that some rank has a gradient for gets one and takes part from then on. What is
    averaged compressed is another list of tensors then, so error feedback starts anew.
    """

    _optimizer: OnebitAdam

    def commit(self) -> None:
        optimizer, group, mean = self._optimizer, self._group, self._mean
        late = [p for p in self._pairs()[0] if "exp_avg_sq" not in optimizer.state.get(p, {})]
        for p in late:
            adam_state(optimizer.state, p)
        if late:
            optimizer._renew(self._reducers)
        known, every = optimizer._known(group), group["variance_refresh"]
        if known.params:
            ages = [every * mean.present[i] for i in known.indices]
            take_in(group, known.params, known.states, [mean.means[i] for i in known.indices], ages)
            move(group, known.params, known.states)
        optimizer._raise_variances(group)
