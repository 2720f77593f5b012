"""Microbenchmarks of onebit: one driver, cases as tables, speed and correctness from the same run.

Run them with ``python -m onebit.benchmarks`` (flags: ``--help``); `drive` is the loop for use from code.
"""

from __future__ import annotations

from onebit.benchmarks.case import Case, Setting
from onebit.benchmarks.driver import Sweep, drive
from onebit.benchmarks.row import Row
from onebit.benchmarks.tables import CASES, select

__all__ = ["CASES", "Case", "Row", "Setting", "Sweep", "drive", "select"]
