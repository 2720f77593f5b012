"""Local steps of 0/1 Adam on CPU tensors: addresses out to the compiled loops; see `optim.local_kernels`."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from onebit.compress.cpu.launch import CODES, addresses, launch
from onebit.compress.cpu.operators import STREAM_BYTES
from onebit.optim import local_kernels
from onebit.optim.cpu.local_blocks import COLUMNS, NO_GRADIENT, look_blocks, step_blocks

_ROW = np.dtype([(name, np.int64) for name in COLUMNS])


class LocalStep(local_kernels.LocalStep):
    """One local step of CPU tensors."""

    name: ClassVar[str] = "cpu"

    def make(self) -> None:
        """As `optim.local_kernels.LocalStep.make`; it looks at the gradients first, so m stays to the last bit."""
        layout, table = self.layout, self._table()
        factors = np.array([self.beta1, self.alpha, self.eps], np.float32)
        spoilt = np.zeros(2, np.uint32)
        places = (layout.tensor_of_block, layout.offset_of_block, layout.count_of_block, table, factors, spoilt)
        arguments = [array.ctypes.data for array in places]
        stream = layout.padded_numel * self.params[0].element_size() >= STREAM_BYTES
        launch(look_blocks, layout.blocks, layout.block_size, *arguments)
        launch(step_blocks, layout.blocks, layout.block_size, *arguments, self.rows.data_ptr(), stream)
        self.finite.fill_(not spoilt.any())

    def _table(self) -> npt.NDArray[np.void]:
        table = np.empty(len(self.params), _ROW)
        table["grad"] = addresses(self.grads)
        table["param"] = addresses(self.params)
        table["momentum"] = addresses(self.momenta)
        table["mean"] = addresses(self.means)
        table["start"] = addresses(self.starts)
        table["variance"] = addresses(self.variances)
        table["grad_dtype"] = [NO_GRADIENT if g is None else CODES[g.dtype] for g in self.grads]
        table["param_dtype"] = [CODES[p.dtype] for p in self.params]
        table["begins"] = self.begins is not None
        table["copies"] = self.begins or False
        return table
