"""Optimizers whose parameter groups are averaged over ranks: by which backend, on which levels and in which buckets."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from onebit.comm import Backend, Residual, make_backend
from onebit.comm.bucket_size import bucket_mb_for
from onebit.comm.levels import Levels, LocalGroup, find_levels
from onebit.comm.registry import depends_on_device
from onebit.compress import Codec
from onebit.optim.codecs import codec_of_momenta
from onebit.optim.exchange import GroupReducers


class Averaging(torch.optim.Optimizer):
    """Base of these: what their averages have in common, and those of every group, made when first needed.

    Args:
        params, defaults: as for `torch.optim.Optimizer`.
        bucket_mb, backend, codec, local_group: as for `onebit.comm.CompressedAllreduce`.
        default_bucket_mb: by the type of the device, what `bucket_mb` is where it is None.

    Raises:
        InputError: an option is out of range.
        BackendError: the backend is unknown or cannot be used.
    """

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        bucket_mb: float | None,
        backend: object,
        codec: Codec | None,
        local_group: LocalGroup,
        default_bucket_mb: Mapping[str, float],
    ) -> None:
        self._bucket_mb = None if bucket_mb is None else bucket_mb_for([], bucket_mb)
        self._default_bucket_mb = default_bucket_mb
        self._codec = codec_of_momenta(type(self).__name__, codec)
        self._local_group = local_group
        self._levels: Levels | None = None
        # A name is looked up now, so that a wrong one raises here. None is looked up at the first step: the process
        # group is often made after the optimizer. Then, too, the half of a group is chosen that carries the parameters.
        self._spec = backend
        named = None if backend is None else make_backend(backend)
        self._backend = None if depends_on_device(backend) else named
        self._reducers: list[GroupReducers] = []
        super().__init__(params, defaults)

    @property
    def backend(self) -> Backend:
        """The resolved backend."""
        if self._backend is None:
            device = next((p.device for group in self.param_groups for p in group["params"]), None)
            self._backend = make_backend(self._spec, device=device)
        return self._backend

    @property
    def local_transport(self) -> str | None:
        """What numbers travel by inside a node, as of `onebit.comm.CompressedAllreduce`; None before they have."""
        return next((found for found in (reducers.local_transport for reducers in self._reducers) if found), None)

    def _of_groups(self) -> list[GroupReducers]:
        """The averages of every group, in order."""
        while len(self._reducers) < len(self.param_groups):
            self._reducers.append(self._group_reducers())
        return self._reducers

    def _group_reducers(self, residual: Residual | None = None) -> GroupReducers:
        backend = partial(_backend_of, weakref.ref(self))  # optimizers are freed when dropped, not by the collector
        return GroupReducers(backend, self._codec, self._bucket_size(), self._local_group, residual)

    def _bucket_size(self) -> float:
        """MiB of fp32 that travel together."""
        return bucket_mb_for(self.param_groups[0]["params"], self._bucket_mb, self._default_bucket_mb)

    def _nodes(self) -> Levels | None:
        """The levels of `local_group`; None: there is one. Collective the first time, where there are two."""
        if self._levels is None and self._local_group is not None and self.backend.size > 1:
            self._levels = find_levels(self.backend, self._local_group, type(self).__name__)
        return self._levels

    def _place(self) -> tuple[int, int]:
        """Whose error feedback this rank has, and of how many: its own, or that of its node; collective as `_nodes`."""
        levels = self._nodes()
        return (self.backend.rank, self.backend.size) if levels is None else (levels.between.rank, levels.between.size)


def _backend_of(optimizer: weakref.ref[Averaging]) -> Backend:
    owner = optimizer()
    assert owner is not None, "only an optimizer that there is makes averages"
    return owner.backend
