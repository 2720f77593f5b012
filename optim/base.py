"""What the compressed optimizers share: when ranks meet, in which order, and that a step is whole or not made."""

from __future__ import annotations

import contextlib
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from onebit.comm import Backend, Residual, Stats, agree, make_backend
from onebit.comm.bucket_size import STEP_BUCKET_MB, bucket_mb_for
from onebit.comm.ddp import AveragingHook, unattached
from onebit.comm.levels import Levels, LocalGroup, find_levels
from onebit.compress import Codec, InputError
from onebit.optim import copying
from onebit.optim.codecs import codec_of_momenta
from onebit.optim.common_facts import common_facts
from onebit.optim.exchange import DeviceExchange, DraftedExchange, Exchange, GroupReducers, StagedExchange
from onebit.optim.loading import check_state
from onebit.optim.loss_scale import unscaled
from onebit.optim.metrics import Metrics, metrics
from onebit.optim.options import RightOptions, check_count, check_flags, check_supported
from onebit.optim.overlap import OVERLAPPED_BUCKET_MB, Overlap, claim
from onebit.optim.owners import take_over
from onebit.optim.pending import PendingSteps
from onebit.optim.refusals import check_parameters, refuse_capture, refused, refused_devices
from onebit.optim.regroup import put_back, take_out
from onebit.optim.replicas import check_replicas
from onebit.optim.restoring import restore_options, restore_tensors
from onebit.optim.state_keys import EXTRA, FORMAT, RESIDUALS, SLICES
from onebit.optim.untraced import untraced

_log = logging.getLogger(__name__)


class CompressedOptimizer(torch.optim.Optimizer):
    """Base of optimizers that average over ranks by themselves; gradients given to `step` are this rank's own.

    The collectives of a step depend only on the parameter lists and on each group's step count, never on which
    gradients are None, so ranks with different unused parameters cannot block each other. A step with a non-finite
    number on any rank is skipped by all: parameters and moments stay as they are, error feedback is put back to within
    rounding, and the step is not counted.

    A subclass implements `_planned`, `_exchange` and `_check_options`, and the other hooks below where it needs them.
    What it must know of a group to go on from a checkpoint is in the group's options or in ``state``, so that torch
    saves it.

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

    # Options of a group that tell how far it has come, with their start; a state of torch's own Adam lacks them.
    _progress: ClassVar[Mapping[str, Any]] = {"step": 0}

    # Whether a rank holds a slice of what a state has in its parameter's shape; see `onebit.optim.sharding`.
    _shard = False

    # Keys of a parameter's state beside Adam's; see `onebit.optim.state_keys`.
    _own_keys: ClassVar[frozenset[str]] = frozenset()

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
        self._bucket_mb = None if bucket_mb is None else bucket_mb_for([], bucket_mb)
        self._codec = codec_of_momenta(type(self).__name__, codec)
        self._local_group = local_group
        self._levels: Levels | None = None
        # A name is looked up now, so that a wrong one raises here. None is looked up at the first step: the process
        # group is often made after the optimizer.
        self._spec = backend
        self._backend: Backend | None = None if backend is None else make_backend(backend)
        self._reducers: list[GroupReducers] = []
        self._agreed = False
        self._pending = PendingSteps()
        self._skipped_steps = 0
        self._check_every = check_every
        self._calls = 0
        self._right_options = RightOptions(self._progress)
        self.gradients_averaged = False
        self.averager: AveragingHook | None = None
        self._overlap = Overlap(self) if overlap else None
        self._lent: dict[int, list[Tensor | None]] = {}  # by the identity of a group: gradients to be filled in later
        super().__init__(params, defaults)

    @property
    def backend(self) -> Backend:
        """The resolved backend."""
        if self._backend is None:
            device = next((p.device for group in self.param_groups for p in group["params"]), None)
            self._backend = make_backend(self._spec, device=device)
        return self._backend

    @property
    def overlapped(self) -> tuple[int, int]:
        """Of the last step's buckets, how many were sent during backward, and all; 0 and 0 if it was not overlapped."""
        return (0, 0) if self._overlap is None else (self._overlap.started, self._overlap.buckets)

    @property
    def skipped_steps(self) -> int:
        """Steps skipped because some rank had a non-finite number; waits for the device where it must."""
        self._pending.wait()
        return self._skipped_steps

    @property
    def stats(self) -> Stats:
        """Bytes and times of all averages of this rank so far, warm-up included; a new object each time."""
        hook = [] if self.averager is None else [self.averager.stats]
        return Stats.total([*(part for reducers in self._reducers for part in reducers.stats()), *hook])

    @property
    def local_transport(self) -> str | None:
        """What numbers travel by inside a node, as of `onebit.comm.CompressedAllreduce`; None before they have."""
        return next((found for found in (reducers.local_transport for reducers in self._reducers) if found), None)

    def averages_next_step(self) -> bool:
        """Whether the next step is made of the exact mean gradient in all groups: a function of options and progress.

        Then gradients may be averaged before `step`, by who sets ``gradients_averaged``. Where some group compresses
        they must be each rank's own. It waits for the device where the answer depends on it.
        """
        self._learn_what_matters()
        return all(self._averages(group) for group in self.param_groups)

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
        self._pending.wait()
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

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients: backward passes in this context start no exchange, also with ``overlap=True``.

        The last backward before `step` stands outside. Without ``overlap`` nothing is started in any backward.
        """
        with contextlib.nullcontext() if self._overlap is None else self._overlap.no_sync():
            yield

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, as torch does; with ``overlap=True`` between backward and `step` it gives the step up.

        It is collective then: the ranks that call `step` instead skip that step too, and error feedback is put back.
        """
        if self._overlap is not None:
            self._overlap.give_up()
        super().zero_grad(set_to_none)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedOptimizer:
        """Copy parameters and state; every rank must do the same, for a copy's first step makes ranks agree anew."""
        return copying.duplicate(self, self._settings(), memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return copying.reduced(self, self._settings())

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
        self._make(self._exchange_all if self._overlap is None else self._overlap.exchange_all)
        return loss

    def _make(self, exchange_all: Callable[[list[Exchange]], None], *, on_device: bool = True) -> None:
        """Make a step, or skip it if some rank has a number that is not finite.

        Args:
            exchange_all: fills a list with the exchanges of all groups, in order; they are undone if it raises.
            on_device: the device may decide whether it is made.
        """
        exchanges: list[Exchange] = []
        try:
            with self.backend.limited("step"):
                exchange_all(exchanges)
                flags = [exchange.all_finite() for exchange in exchanges]
                settling = _settling(exchanges, flags) if on_device else []
                made = not settling and all(bool(flag) for flag in flags)
                for exchange in exchanges if made else ():
                    if isinstance(exchange, DraftedExchange):
                        exchange.draft()
            self.backend.check()
        except BaseException:  # an interrupt too, so that whoever handles it can save a whole state
            for exchange in exchanges:
                exchange.undo()
            raise
        if settling:
            self._settle(settling, flags[0] if len(flags) == 1 else torch.stack(flags).all())
        else:
            self._decide(exchanges, made)
        self.gradients_averaged = False
        self._calls += 1
        if self._check_every and self._calls % self._check_every == 0:
            check_replicas(self)
        if self._overlap is not None:
            self._overlap.watch()

    def _exchange_all(self, exchanges: list[Exchange]) -> None:
        self._learn_what_matters()
        for group, reducers in zip(self.param_groups, self._of_groups(), strict=True):
            exchanges.append(self._exchange(group, reducers))
            if isinstance(exchanges[-1], StagedExchange):
                exchanges[-1].sending.finish()

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state_dict plus this rank's error feedback; every rank has its own to save.

        It consists of tensors, numbers, strings and containers, so ``torch.load(..., weights_only=True)`` reads it.

        Raises:
            InputError: it is called between backward and `step`, with ``overlap=True``.
        """
        self._refuse_under_way("state_dict()")
        self._pending.wait()
        state: dict[str, Any] = super().state_dict()
        residuals = [reducers.residual.state_dict() for reducers in self._of_groups()]
        state[EXTRA] = {"version": FORMAT, "skipped_steps": self.skipped_steps, "residuals": residuals}
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state of the same rank and world size; a `torch.optim.AdamW` state is taken as one of warm-up.

        Raises:
            InputError: it is of another version or of other parameters, incomplete or damaged; nothing was changed.
        """
        self._refuse_under_way("load_state_dict()")
        self.check_state_dict(state_dict)
        extra = state_dict.get(EXTRA)
        self._pending.wait()
        residuals = [Residual() for _ in self.param_groups]
        for residual, saved in zip(residuals, extra["residuals"] if extra else (), strict=False):
            residual.load_state_dict(saved)
        defaults = [dict(group) for group in self.param_groups]
        super().load_state_dict(dict(state_dict))
        restore_tensors(self, state_dict)
        restore_options(self, defaults)
        self._reducers = [self._group_reducers(residual) for residual in residuals]
        self._skipped_steps = extra["skipped_steps"] if extra else 0
        self._start_over()

    def check_state_dict(self, state_dict: Any) -> None:
        """Raise the InputError that `load_state_dict` would raise, and change nothing."""
        self._check_saved(state_dict)
        if SLICES in state_dict.get(EXTRA, {}) and not self._shard:
            raise InputError(
                f"{type(self).__name__}: the state to load is a rank's slice, as shard=True saves it, and this "
                "optimizer holds everything; onebit.optim.checkpoint.load and onebit.optim.sharded.load put the slices "
                "of all ranks together, and so does onebit.optim.elastic.reshard"
            )

    def phase(self, group: int = 0) -> str:
        """How the next step of a parameter group is planned; the subclasses say which phases they have."""
        self._pending.wait()
        return self._planned(self.param_groups[group], self.param_groups[group]["step"])

    def _start_over(self) -> None:
        """The next step is made as the first: ranks agree anew."""
        self._agreed = False
        claim((p for group in self.param_groups for p in group["params"]), self._overlap)
        if self._overlap is not None:
            self._overlap.start_over()

    def _refuse_under_way(self, call: str) -> None:
        if self._overlap is not None:
            self._overlap.refuse_under_way(call)

    @abstractmethod
    def _planned(self, group: Mapping[str, Any], step: int) -> str:
        """How a group makes the step that follows its first `step` ones: a function of options and progress alone."""

    @abstractmethod
    def _exchange(self, group: dict[str, Any], reducers: GroupReducers) -> Exchange:
        """What one group needs for its next step, staged or sent and received; only error feedback has changed."""

    @abstractmethod
    def _check_options(self, group: Mapping[str, Any]) -> None:
        """Raise InputError if an option of a group is out of range."""

    def _is_staged(self, group: Mapping[str, Any]) -> bool:
        """Whether a group's next exchange is staged, and can so be made before gradients are there."""
        return False

    def _look_at_others(
        self, group: Mapping[str, Any], reducers: GroupReducers, gradients: Sequence[Tensor | None]
    ) -> None:
        """Say what is to be said about gradients that a staged compressed exchange did not send."""

    def _averages(self, group: Mapping[str, Any]) -> bool:
        """Whether a group's next step is made of the exact mean gradient."""
        return False

    def _learn_what_matters(self) -> None:
        """Hear of the steps whose outcome the next one's collectives depend on, waiting for the device if need be."""
        self._pending.poll()
        if any(self._schedule_depends_on(group, len(self._pending)) for group in self.param_groups):
            self._pending.wait()

    def _schedule_depends_on(self, group: Mapping[str, Any], unknown: int) -> bool:
        """Whether a group's next collectives depend on how many of the last `unknown` steps were made."""
        return len({self._planned(group, group["step"] + made) for made in range(unknown + 1)}) > 1

    def _regrouped(self, index: int) -> None:
        """Parameters that had no state have left this group."""

    def _count_made(self, group: dict[str, Any]) -> None:
        """Bring the host's counts up to date with a step of a group that `DeviceExchange.settle` has made."""

    def _common_value(self, p: Tensor) -> Tensor:
        """What must have the same bits on every rank where a step is to go on: the parameter itself."""
        return p

    def _gradients(self, group: Mapping[str, Any]) -> list[Tensor | None]:
        """This rank's gradients of a group, as they are; or, under a GradScaler, unscaled in new fp32 tensors."""
        if id(group) in self._lent:
            return self._lent[id(group)]
        return unscaled(self, [p.grad for p in group["params"]])

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

    def _settle(self, exchanges: list[DeviceExchange], made: Tensor) -> None:
        """Leave it to the device whether the step is made."""
        made = self.backend.trusted(made)
        for exchange in exchanges:
            exchange.settle(made)
        self._tell_scaler(made)
        groups = list(self.param_groups)
        self._pending.add(made, lambda known: self._learn(groups, known))

    def _learn(self, groups: list[dict[str, Any]], made: bool) -> None:
        if not made:
            if self.backend.sound:  # else the step was given up, which is told by an error
                self._skip()
            return
        for group in groups:
            group["step"] += 1
            self._count_made(group)

    def _decide(self, exchanges: list[Exchange], made: bool) -> None:
        """Make the step in all groups, or in none."""
        self._pending.wait()
        if made:
            for group, exchange in zip(self.param_groups, exchanges, strict=True):
                group["step"] += 1
                exchange.commit()
        else:
            for exchange in exchanges:
                exchange.undo()
            self._skip()
        self._tell_scaler(torch.tensor(made))

    def _skip(self) -> None:
        self._skipped_steps += 1
        _log.warning(
            "rank %d: step skipped, some rank has a non-finite gradient (%d so far)",
            self.backend.rank,
            self._skipped_steps,
        )

    def _tell_scaler(self, made: Tensor) -> None:
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:
            found_inf.copy_(~made)

    def _of_groups(self) -> list[GroupReducers]:
        """The averages of every group, in order."""
        while len(self._reducers) < len(self.param_groups):
            self._reducers.append(self._group_reducers())
        return self._reducers

    def _group_reducers(self, residual: Residual | None = None) -> GroupReducers:
        return GroupReducers(lambda: self.backend, self._codec, self._bucket_size(), self._local_group, residual)

    def _bucket_size(self) -> float:
        """MiB of fp32 that travel together."""
        defaults = STEP_BUCKET_MB if self._overlap is None else OVERLAPPED_BUCKET_MB
        return bucket_mb_for(self.param_groups[0]["params"], self._bucket_mb, defaults)

    def _check_group_options(self, group: Mapping[str, Any]) -> None:
        check_supported(type(self).__name__, group)
        check_flags(type(self).__name__, group, "compress", "master_weights")
        self._check_options(group)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        self._check_group_options(group)
        check_parameters(type(self).__name__, group["params"])

    def _agree(self, refusal: InputError | None) -> None:
        """Once per set of groups: all ranks hold the same parameters, values included, and the same options.

        Args:
            refusal: an error that this rank has found in its own gradients, raised here; the first time all ranks hear
                of it, later they wait for this rank until their time is out.
        """
        if refusal is not None and self._agreed:
            raise refusal
        if not self._agreed:
            refusal = refused_devices(self) or unattached(self) or refusal
            facts = common_facts(self) if self.backend.size > 1 and refusal is None else {}
            agree(self.backend, f"{type(self).__name__}.step", facts, refusal)
            self._settle_slices()
            take_over(self)
        self._agreed = True

    def _settle_slices(self) -> None:
        """What ranks that hold slices of the state settle, after they have agreed about the rest; collective."""

    def _check_saved(self, state_dict: Any) -> None:
        """As `check_state_dict`, of a state that may be a slice whether this optimizer has slices or not."""
        check_state(type(self).__name__, state_dict, self.param_groups, self._own_keys, self._check_loaded_options)

    def _nodes(self) -> Levels | None:
        """The levels of `local_group`; None: there is one. Collective the first time, where there are two."""
        if self._levels is None and self._local_group is not None and self.backend.size > 1:
            self._levels = find_levels(self.backend, self._local_group, type(self).__name__)
        return self._levels

    def _place(self) -> tuple[int, int]:
        """Whose error feedback this rank has, and of how many: its own, or that of its node; collective as `_nodes`."""
        levels = self._nodes()
        return (self.backend.rank, self.backend.size) if levels is None else (levels.between.rank, levels.between.size)

    def _takes(self, state: Mapping[str, Any]) -> bool:
        """Whether what this rank saved, one of as many ranks, is what it goes on from; after `_place`.

        Else it goes on from what all ranks saved; see `onebit.optim.elastic`.
        """
        extra, place = state.get(EXTRA, {RESIDUALS: ()}), self._place()
        alike = all((one["rank"], one["world_size"]) == place for one in extra[RESIDUALS] if len(one) > 1)
        return alike and (SLICES not in extra or self._shard)

    def _check_loaded_options(self, group: Mapping[str, Any]) -> None:
        """Options of torch's own optimizers may be there and do not act, but those that change what is computed."""
        check_supported(type(self).__name__, {"amsgrad": group.get("amsgrad")})
        check_flags(type(self).__name__, group, "compress", "master_weights")
        self._check_options(group)


def _settling(exchanges: list[Exchange], flags: list[Tensor]) -> list[DeviceExchange]:
    """The exchanges, if the device alone can decide about them all; else none."""
    settling = [exchange for exchange in exchanges if isinstance(exchange, DeviceExchange)]
    together = len(settling) == len(exchanges) and len({flag.device for flag in flags}) == 1
    return settling if together else []
