"""One Adam step of many CPU tensors: factors in double precision, then the compiled loops."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onebit.compress.cpu.build import compile_kernel
from onebit.compress.cpu.launch import launch
from onebit.optim.cpu.adam import SCALARS, count_steps, update_words
from onebit.optim.cpu.adam_tables import Tables

_FACTORS = np.dtype([(name, np.float32) for name in SCALARS])

Group = tuple[Mapping[str, Any], int]  # options, and the number of tensors, one after the other, that they are for


def update(tables: Tables, groups: Sequence[Mapping[str, Any]], decoupled: str) -> None:
    """Make the step that the tables are for: parameters, moments, copies and steps change.

    Args:
        groups: options of each group.
        decoupled: the name of the option that tells AdamW from Adam.
    """
    compile_kernel(update_words)  # should that fail, then before steps are counted
    count = len(tables.steps)
    steps = np.empty(count, np.float32)
    launch(count_steps, count, 1, tables.steps.ctypes.data, steps.ctypes.data)
    scalars = _scalars(steps, zip(groups, tables.counts, strict=True), decoupled)
    words = int(tables.rows["first_word"][-1])
    launch(update_words, words, 32, tables.rows.ctypes.data, count, scalars.ctypes.data)
    for tensor, values in tables.put_back:
        tensor.copy_(values)


def _scalars(steps: npt.NDArray[np.float32], groups: Iterable[Group], decoupled: str) -> npt.NDArray[np.void]:
    """Each parameter's SCALARS for its own count of steps, found in double precision as torch does."""
    scalars = np.empty(len(steps), _FACTORS)
    first = 0
    for group, number in groups:
        rows = scalars[first : first + number]
        t = steps[first : first + number].astype(np.float64)
        first += number
        lr, (beta1, beta2), decay = float(group["lr"]), group["betas"], group["weight_decay"]
        corrected = group["bias_correction"]
        rows["sign"] = -1.0 if group["maximize"] else 1.0
        rows["l2"] = 0.0 if group[decoupled] else decay
        rows["keep"] = 1.0 - lr * decay if group[decoupled] else 1.0
        rows["beta1"], rows["alpha1"] = beta1, 1.0 - beta1
        rows["beta2"], rows["alpha2"] = beta2, 1.0 - beta2
        rows["rate"] = lr / (1.0 - beta1**t) if corrected else lr
        rows["root"] = (1.0 - beta2**t) ** -0.5 if corrected else 1.0
        rows["eps"] = group["eps"]
    return scalars
