"""What the compressed optimizers share: their options and groups, a step as the user calls it, and state in and out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from onebit.comm import Residual, Stats
from onebit.comm.bucket_size import STEP_BUCKET_MB
from onebit.comm.ddp import AveragingHook
from onebit.comm.levels import LocalGroup
from onebit.compress import Codec, InputError
from onebit.optim import copying
from onebit.optim.algorithm import Algorithm
from onebit.optim.averaging import Averaging
from onebit.optim.common_facts import agree_to_start
from onebit.optim.loading import check_state, refuse_others, refuse_slice
from onebit.optim.loss_scale import unscaled
from onebit.optim.metrics import Metrics, metrics
from onebit.optim.options import RightOptions, check_count, check_flags, check_supported
from onebit.optim.overlap import OVERLAPPED_BUCKET_MB, Overlap, claim
from onebit.optim.owners import take_over
from onebit.optim.refusals import check_parameters, refuse_capture, refused
from onebit.optim.regroup import put_back, take_out
from onebit.optim.restoring import restore_options, restore_tensors
from onebit.optim.state_keys import EXTRA, FORMAT, OPTIMIZER, RESIDUALS, SKIPPED_STEPS, SLICES, VERSION
from onebit.optim.steps import Steps
from onebit.optim.untraced import untraced


class CompressedOptimizer(Algorithm, Averaging):
    """Base of optimizers that average over ranks by themselves; gradients given to `step` are this rank's own.

    The collectives of a step depend only on the parameter lists and on each group's step count, never on which
    gradients are None, so ranks with different unused parameters cannot block each other. A step with a non-finite
    number on any rank is skipped by all: parameters and moments stay as they are, error feedback is put back to within
    rounding, and the step is not counted.

    A subclass implements `_planned`, `_exchange` and `_check_options`, and the other hooks of
    `onebit.optim.algorithm.Algorithm` where it needs them.

    `torch.amp.GradScaler` may drive it: ``scaler.step`` always calls `step`, which unscales gradients as it reads them,
    so the ranks agree about a skipped step here. Each rank's scaler follows its own gradients; their scales may differ.

    Args:
        params: as for any torch optimizer.
        defaults: the options of a group and their default values, progress included; see `_progress`.
        master_weights: keep an fp32 copy of parameters in half precision, so that small updates add up.
        unsupported: keyword arguments that the subclass does not know, to be refused.
        bucket_mb, backend, codec, local_group: as for `onebit.comm.CompressedAllreduce`.
        overlap: start exchanges during backward; see `onebit.optim.overlap`.
        check_every: k: every k-th call of `step` ends with `check_replicas`; None: it is not called.

    Attributes:
        gradients_averaged: the gradients that the next `step` will find are means over ranks, exchanged already; set by
            whoever has averaged them because `averages_next_step` said so, and False again after the step.
        averager: what sets it, a hook of `onebit.comm.ddp.attach`; None: nothing does.

    Raises:
        InputError: an option is out of range or unknown, or a parameter cannot be averaged.
        BackendError: the backend is unknown or cannot be used.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler's protocol: it sets the two below and calls step() always
    grad_scale: Tensor | None  # without a value here: the scaler multiplies what it finds
    found_inf: Tensor | None

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        master_weights: bool = False,
        unsupported: Mapping[str, Any] | None = None,
        bucket_mb: float | None = None,
        backend: object = None,
        codec: Codec | None = None,
        local_group: LocalGroup = None,
        check_every: int | None = None,
        overlap: bool = False,
    ) -> None:
        check_supported(type(self).__name__, unsupported or {}, known=False)
        check_count(type(self).__name__, "check_every", check_every, "steps between two checks of replicas")
        check_flags(type(self).__name__, {"overlap": overlap}, "overlap")
        defaults = {**defaults, "compress": True, "master_weights": master_weights, **self._progress}
        self._check_group_options(defaults)
        self._agreed = False
        self._check_every = check_every
        self._right_options = RightOptions(self._progress)
        self.gradients_averaged = False
        self.averager: AveragingHook | None = None
        self._overlap = Overlap(self) if overlap else None
        self._lent: dict[int, list[Tensor | None]] = {}  # by the identity of a group: gradients to be filled in later
        self._steps = Steps(self)
        super().__init__(
            params,
            defaults,
            bucket_mb=bucket_mb,
            backend=backend,
            codec=codec,
            local_group=local_group,
            default_bucket_mb=OVERLAPPED_BUCKET_MB if overlap else STEP_BUCKET_MB,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; their group starts at step 0, so it makes its own warm-up. Every rank must do the same.

        Parameters of another group that has made steps without them, such as layers that were unfrozen after its
        warm-up, leave that group for the new one.

        Raises:
            InputError: a parameter has an unsupported dtype or layout, or options are out of range; nothing was added.
        """
        self._refuse_under_way("add_param_group()")
        before = len(self.param_groups)
        if not isinstance(param_group["params"], (Tensor, set)):
            param_group["params"] = list(param_group["params"])  # it may be an iterator, and torch reads it too
        params = param_group["params"]
        self._steps.pending.wait()
        lost = take_out(self.param_groups, self.state, [params] if isinstance(params, Tensor) else params)
        try:
            super().add_param_group(param_group)
            self._check_group(self.param_groups[before])
        except BaseException:
            del self.param_groups[before:]
            put_back(self.param_groups, lost)
            raise
        for index in lost:
            self._regrouped(index)
        self._start_over()

    @untraced
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Average and update; collective: every rank must call it, also one without gradients.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            MismatchError: at the first step, or after add_param_group: ranks differ in parameters or options. With
                `check_every`: replicas are not equal any more; the step was made.
            TransportError: a rank is dead or too slow; nothing but error feedback was touched, and that was put back.
            InputError: a gradient that cannot be averaged, such as a sparse one, or that another averages as well, or
                an option that was set out of range, or another optimizer has begun to update the same parameters, or a
                CUDA graph is being captured; nothing was changed.
        """
        refuse_capture(type(self).__name__)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._agree(refused(self))
        self._steps.make(self._steps.exchange_all if self._overlap is None else self._overlap.exchange_all)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, as torch does; with ``overlap=True`` between backward and `step` it gives the step up.

        It is collective then: the ranks that call `step` instead skip that step too, and error feedback is put back.
        "Between" begins with the first gradient that is ready. Where a backward, or what comes before it, has failed
        earlier, nobody hears of it: the others wait for this rank's next `step`. Make it with a gradient that is not
        finite, and all ranks skip it; docs/recipes/overlap.md has the lines.
        """
        if self._overlap is not None:
            self._overlap.give_up()
        super().zero_grad(set_to_none)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients: backward passes in this context start no exchange, also with ``overlap=True``.

        The last backward before `step` stands outside. Without ``overlap`` nothing is started in any backward.
        """
        with contextlib.nullcontext() if self._overlap is None else self._overlap.no_sync():
            yield

    def phase(self, group: int = 0) -> str:
        """How the next step of a parameter group is planned; the subclasses say which phases they have."""
        self._steps.pending.wait()
        return self._planned(self.param_groups[group], self.param_groups[group]["step"])

    def averages_next_step(self) -> bool:
        """Whether the next step is made of the exact mean gradient in all groups: a function of options and progress.

        Then gradients may be averaged before `step`, by who sets ``gradients_averaged``. Where some group compresses
        they must be each rank's own. It waits for the device where the answer depends on it.
        """
        self._steps.learn_what_matters()
        return all(self._averages(group) for group in self.param_groups)

    @property
    def overlapped(self) -> tuple[int, int]:
        """Of the last step's buckets, how many were sent during backward, and all; 0 and 0 if it was not overlapped."""
        return (0, 0) if self._overlap is None else (self._overlap.started, self._overlap.buckets)

    @property
    def skipped_steps(self) -> int:
        """Steps skipped because some rank had a non-finite number; waits for the device where it must."""
        self._steps.pending.wait()
        return self._steps.skipped

    @property
    def stats(self) -> Stats:
        """Bytes and times of all averages of this rank so far, warm-up included; a new object each time."""
        hook = [] if self.averager is None else [self.averager.stats]
        return Stats.total([*(part for reducers in self._reducers for part in reducers.stats()), *hook])

    def metrics(self, *, compression_error: bool = False) -> Metrics:
        """Return this rank's numbers, for a logger; not collective, but waits for the device.

        ``step`` is that of the group that has made the most, ``phase/0``, ``phase/1``, ... how each group's next one is
        made. ``wire_bytes``, ``dense_bytes``, ``collectives`` and ``seconds/encode`` and so on are the sums of `stats`
        since this optimizer was made or loaded a state; ``skipped_steps`` outlives that. ``residual_norm`` is the
        Euclidean norm of all error feedback of this rank. Where exchanges were started during backward,
        ``overlapped_buckets`` and ``buckets`` are what `overlapped` tells of the last step.

        Args:
            compression_error: add, by another pass over error feedback, ``compression_error``: the relative error of
                what this rank sent last, ‖c - C(c)‖ / ‖c‖ with its feedback in c; absent as long as nothing was sent
                compressed, and after a skipped step.
        """
        return metrics(self, compression_error)

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state_dict plus this rank's error feedback; every rank has its own to save.

        It consists of tensors, numbers, strings and containers, so ``torch.load(..., weights_only=True)`` reads it.

        Raises:
            InputError: it is called between backward and `step`, with ``overlap=True``.
        """
        self._refuse_under_way("state_dict()")
        self._steps.pending.wait()
        state: dict[str, Any] = super().state_dict()
        # Who has looked at `optimizer.state[p]` has made an empty entry there, which other ranks may not have.
        state["state"] = {number: entry for number, entry in state["state"].items() if entry}
        residuals = [reducers.residual.state_dict() for reducers in self._of_groups()]
        state[EXTRA] = {
            VERSION: FORMAT,
            OPTIMIZER: self._algorithm,
            SKIPPED_STEPS: self.skipped_steps,
            RESIDUALS: residuals,
        }
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state of the same rank and world size; a `torch.optim.AdamW` state is taken as one of warm-up.

        Raises:
            InputError: it is of another version, of other parameters or of another compressed optimizer, incomplete or
                damaged; nothing was changed.
        """
        self._refuse_under_way("load_state_dict()")
        self.check_state_dict(state_dict)
        extra = state_dict.get(EXTRA)
        self._steps.pending.wait()
        residuals = [Residual() for _ in self.param_groups]
        for residual, saved in zip(residuals, extra[RESIDUALS] if extra else (), strict=False):
            residual.load_state_dict(saved)
        defaults = [dict(group) for group in self.param_groups]
        super().load_state_dict(dict(state_dict))
        restore_tensors(self, state_dict)
        restore_options(self, defaults)
        self._reducers = [self._group_reducers(residual) for residual in residuals]
        self._steps.skipped = extra[SKIPPED_STEPS] if extra else 0
        self._start_over()

    def check_state_dict(self, state_dict: Any) -> None:
        """Raise the InputError that `load_state_dict` would raise, and change nothing."""
        self._check_saved(state_dict)
        if not self._shard:
            refuse_slice(type(self).__name__, state_dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedOptimizer:
        """Copy parameters and state; every rank must do the same, for a copy's first step makes ranks agree anew."""
        return copying.duplicate(self, self._settings(), memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return copying.reduced(self, self._settings())

    def _check_group(self, group: Mapping[str, Any]) -> None:
        self._check_group_options(group)
        check_parameters(type(self).__name__, group["params"])

    def _check_group_options(self, group: Mapping[str, Any]) -> None:
        check_supported(type(self).__name__, group)
        check_flags(type(self).__name__, group, "compress", "master_weights")
        self._check_options(group)

    def _start_over(self) -> None:
        """The next step is made as the first: ranks agree anew."""
        self._agreed = False
        claim((p for group in self.param_groups for p in group["params"]), self._overlap)
        if self._overlap is not None:
            self._overlap.start_over()

    def _refuse_under_way(self, call: str) -> None:
        if self._overlap is not None:
            self._overlap.refuse_under_way(call)

    def _agree(self, refusal: InputError | None) -> None:
        """Once per set of groups: all ranks hold the same parameters, values included, and the same options.

        Args:
            refusal: an error that this rank has found in its own gradients, raised here; the first time all ranks hear
                of it, later they wait for this rank until their time is out.
        """
        if refusal is not None and self._agreed:
            raise refusal
        if not self._agreed:
            agree_to_start(self, refusal)
            self._nodes()  # what makes steps depends on them
            self._settle_slices()
            take_over(self)
        self._agreed = True

    def _gradients(self, group: Mapping[str, Any]) -> list[Tensor | None]:
        """This rank's gradients of a group, as they are; or, under a GradScaler, unscaled in new fp32 tensors."""
        if id(group) in self._lent:
            return self._lent[id(group)]
        return unscaled(self, [p.grad for p in group["params"]])

    def _tell_scaler(self, made: Tensor) -> None:
        """Have a GradScaler know whether the step was made, 0-dim bool on any device."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:
            found_inf.copy_(~made)

    def _check_saved(self, state_dict: Any) -> None:
        """As `check_state_dict`, of a state that may be a slice whether this optimizer has slices or not."""
        owner = type(self).__name__
        refuse_others(owner, state_dict, self._algorithm)
        check_state(owner, state_dict, self.param_groups, self._own_keys, self._check_loaded_options)

    def _check_loaded_options(self, group: Mapping[str, Any]) -> None:
        """Options of torch's own optimizers may be there and do not act, but those that change what is computed."""
        check_supported(type(self).__name__, {"amsgrad": group.get("amsgrad")})
        check_flags(type(self).__name__, group, "compress", "master_weights")
        self._check_options(group)

    def _takes(self, state: Mapping[str, Any]) -> bool:
        """Whether what this rank saved, one of as many ranks, is what it goes on from; after `_place`.

        Else it goes on from what all ranks saved; see `onebit.optim.elastic`.
        """
        extra, place = state.get(EXTRA, {RESIDUALS: ()}), self._place()
        alike = all((one["rank"], one["world_size"]) == place for one in extra[RESIDUALS] if len(one) > 1)
        return alike and (SLICES not in extra or self._shard)

    def _settings(self) -> dict[str, Any]:
        """The constructor's options that are no group's."""
        return {
            "bucket_mb": self._bucket_mb,
            "backend": self._spec,
            "codec": self._codec,
            "check_every": self._check_every,
            "local_group": self._local_group,
            **({} if self._overlap is None else {"overlap": True}),
        }
