"""The first calls of fresh processes are measured with an empty and with a warm compile cache."""

from __future__ import annotations

import json
from pathlib import Path

from onebit.benchmarks import first_call


def test_a_warm_cache_is_faster_than_an_empty_one_for_every_kernel(tmp_path: Path) -> None:
    assert first_call.main(["--repeats=1", f"--output={tmp_path}"]) == 0
    (result,) = tmp_path.glob("*.json")
    empty, warm = json.loads(result.read_text())["rows"]
    assert (empty["cache"], warm["cache"]) == ("empty", "warm")
    for kernel in ("encode", "reduce_encode", "decode"):
        assert warm["seconds"][kernel] < empty["seconds"][kernel]  # compiling takes hundreds of milliseconds
