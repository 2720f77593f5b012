"""The most bytes that the tensors made by a thread's operations hold at once."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts storages from the operation that makes them until they are freed.

    Attributes:
        bytes: of those that are there.
        most: of those that were there at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.most = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, function: Any, kinds: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((arguments, options)) if isinstance(t, Tensor)}
        for t in tree_leaves(result):
            storage = t.untyped_storage() if isinstance(t, Tensor) else None
            if storage is not None and storage._cdata not in given | self._counted:
                size = storage.nbytes()
                self._counted.add(storage._cdata)
                self.bytes += size
                self.most = max(self.most, self.bytes)
                weakref.finalize(storage, self._freed, storage._cdata, size)
        return result

    def _freed(self, storage: int, size: int) -> None:
        self._counted.discard(storage)
        self.bytes -= size
