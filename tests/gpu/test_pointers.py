"""Tables of addresses on a device: sent without waiting, and part of a captured graph."""

from __future__ import annotations

import torch

from onebit.compress.gpu.pointers import Pointers


def test_nothing_waits_and_a_replay_finds_what_was_captured() -> None:
    x, y = torch.zeros(2, 8, device="cuda")
    pointers = Pointers(1, "cuda")
    seen = torch.zeros(1, dtype=torch.int64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        pointers.update([x])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pointers.update([x])
        seen.copy_(pointers.table)
    pointers.update([y])
    graph.replay()
    assert seen.item() == x.data_ptr()
    assert pointers.table.item() == x.data_ptr()
    assert pointers.update([y])
    assert pointers.table.item() == y.data_ptr()
