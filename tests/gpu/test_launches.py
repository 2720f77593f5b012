"""How kernels are started: on torch's stream and device, without waiting, without new memory, in graphs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from onebit.compress import SignCodec, pack_signs
from onebit.compress.gpu import module

CODEC = SignCodec()
NUMEL = 1 << 20


def average_with_itself(x: Tensor, residuals: Tensor | None = None) -> Callable[[], None]:
    """encode, reduce_encode and decode of `x` into `x`, with buffers made once; residuals: (2, NUMEL)."""
    (layout,) = CODEC.plan([NUMEL])
    worker, server = torch.zeros(2, NUMEL, device=x.device) if residuals is None else residuals
    sent, mean = torch.zeros(2, layout.payload_bytes, dtype=torch.uint8, device=x.device)

    def run() -> None:
        CODEC.encode(x, worker, layout=layout, out=sent)
        CODEC.reduce_encode(sent, server, layout=layout, out=mean)
        CODEC.decode(mean, x, layout=layout)

    return run


def test_nothing_waits_for_the_device() -> None:
    run = average_with_itself(torch.randn(NUMEL, device="cuda"))
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_is_allocated_after_the_first_call() -> None:
    run = average_with_itself(torch.randn(NUMEL, device="cuda"))
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    run()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_work_runs_on_the_current_stream() -> None:
    x = torch.randn(NUMEL, device="cuda")
    expected = x.clone()
    average_with_itself(expected)()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        run = average_with_itself(x)
        torch.cuda._sleep(50_000_000)  # without the stream's order, the kernels would run before the copy below
        y = x.clone()
        average_with_itself(y)()
        run()
        done = stream.record_event()
    done.synchronize()
    assert torch.equal(x, expected)
    assert torch.equal(y, expected)


def test_a_captured_graph_replays_to_the_same_bits() -> None:
    start = torch.randn(NUMEL, device="cuda")
    eager = start.clone()
    run = average_with_itself(eager)
    for _ in range(3):
        run()
    x, residuals = start.clone(), torch.zeros(2, NUMEL, device="cuda")
    run = average_with_itself(x, residuals)
    run()  # tables are made by the first call, outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    x.copy_(start)
    residuals.zero_()
    for _ in range(3):
        graph.replay()
    assert torch.equal(x, eager)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_every_device_of_a_process_is_right_whatever_the_current_one() -> None:
    x = torch.randn(NUMEL)
    payload = CODEC.encode(x)
    for device in range(torch.cuda.device_count()):
        for current in range(torch.cuda.device_count()):
            with torch.cuda.device(current):
                assert torch.equal(CODEC.encode(x.to(f"cuda:{device}")).cpu(), payload)
                assert torch.cuda.current_device() == current


def in_a_new_thread(function: Callable[[], Tensor]) -> Tensor:
    """What the function returns on a thread that has never touched a device; raises what it raises."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(60)


def test_threads_that_have_not_touched_a_device_launch_on_its_default_stream() -> None:
    for device in range(torch.cuda.device_count()):
        x = torch.randn(NUMEL, device=f"cuda:{device}")
        bits = torch.zeros(NUMEL // 8, dtype=torch.uint8, device=x.device)
        expected = pack_signs(x)
        assert torch.equal(in_a_new_thread(lambda: pack_signs(x, bits)), expected), device  # noqa: B023
        codec_bits = in_a_new_thread(lambda: CODEC.encode(x))  # noqa: B023
        assert torch.equal(codec_bits, CODEC.encode(x)), device


def test_threads_with_streams_of_their_own_do_not_mix_them_up() -> None:
    """Every thread's work is ordered on its own stream, behind a kernel that takes long."""
    xs = [torch.randn(NUMEL, device="cuda") for _ in range(4)]
    payloads = [CODEC.encode(x) for x in xs]
    torch.cuda.synchronize()

    def encode_behind_a_long_kernel(x: Tensor) -> Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(20_000_000)
            payload = CODEC.encode(
                x.clone()
            )  # the clone is written late: elsewhere than on this stream it is not there
            torch.cuda.current_stream().synchronize()
            return payload

    with ThreadPoolExecutor(4) as pool:
        for k in range(3):
            seen = list(pool.map(encode_behind_a_long_kernel, xs))
            assert all(map(torch.equal, seen, payloads)), k


def test_launches_of_the_same_arguments_are_prepared_once() -> None:
    x = torch.randn(NUMEL, device="cuda")
    run = average_with_itself(x)
    run()
    before = module._prepared.cache_info()
    run()
    after = module._prepared.cache_info()
    assert (after.misses, after.hits) == (before.misses, before.hits + 3)


def test_more_than_2_to_the_31_elements() -> None:
    numel = 2**31 + 5000
    if torch.cuda.mem_get_info()[0] < 11 * numel:
        pytest.skip("needs 24 GB of free memory")
    x = torch.ones(numel, dtype=torch.bfloat16, device="cuda")
    x[-4000:] = -2.0
    residual = torch.zeros(numel, device="cuda")
    payload = CODEC.encode(x, residual)
    out = torch.empty_like(x)
    CODEC.decode(payload, out)
    assert out[:1024].eq(1).all()
    assert out[2**31 - 1024 : 2**31].eq(1).all()
    assert out[-3000:].eq(-2).all()
    whole = numel // 1024 * 1024  # each block but one holds one value, so the scale says all of it
    assert residual[: numel - 5000].eq(0).all()
    assert residual[-(numel - whole) :].eq(0).all()


def test_without_cupy_the_reference_runs_and_says_so_once() -> None:
    script = """
import sys, logging, torch
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'cupy':
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
logging.basicConfig()
from onebit.compress import SignCodec, pack_signs
from onebit.compress.gpu import module
assert SignCodec().kernels_on('cuda') == 'reference'
x = torch.randn(5000)
for _ in range(2):
    payload = SignCodec().encode(x.cuda())
assert torch.equal(payload.cpu(), SignCodec().encode(x))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("CuPy") == 1
