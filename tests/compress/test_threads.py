"""How many threads a rank takes, and that kernels may be called from any thread and in a forked child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from numba.core import analysis, compiler, ir

from onebit.compress import InputError, SignCodec, num_threads, set_num_threads
from onebit.compress.cpu import kernels
from onebit.compress.launch_env import LAUNCHERS
from onebit.compress.threads import FEW, share_out
from tests.compress import samples

CORES = 48
real_affinity = getattr(os, "sched_getaffinity", None)  # the tests pretend to another

needs_affinity = pytest.mark.skipif(real_affinity is None, reason="no affinity on this platform")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No launcher, no choice made, and a machine of 48 cores."""
    for launcher in LAUNCHERS:
        monkeypatch.delenv(launcher.world_size, raising=False)
        monkeypatch.delenv(launcher.local_world_size, raising=False)
    monkeypatch.delenv("ONEBIT_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(CORES)), raising=False)
    yield
    set_num_threads(None)


def test_alone_a_rank_takes_the_cores_it_may_run_on() -> None:
    assert num_threads() == CORES


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("LOCAL_WORLD_SIZE", "4", 6),
        ("LOCAL_WORLD_SIZE", "5", 4),
        ("LOCAL_WORLD_SIZE", "1", CORES),
        ("LOCAL_WORLD_SIZE", "64", 1),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "3", 8),
        ("MPI_LOCALNRANKS", "6", 4),
        ("SLURM_STEP_TASKS_PER_NODE", "4(x2),3", 6),
        ("LOCAL_WORLD_SIZE", "", CORES),
        ("LOCAL_WORLD_SIZE", "0", CORES),
        ("LOCAL_WORLD_SIZE", "many", CORES),
    ],
)
def test_ranks_of_a_machine_share_half_of_its_cores(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, expected: int
) -> None:
    monkeypatch.setenv(variable, value)
    assert num_threads() == expected


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"])
def test_variables_of_other_libraries_are_not_looked_at(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    assert num_threads() == CORES


def test_a_machine_without_affinity_counts_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert num_threads() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert num_threads() == 1


def test_the_variable_wins_over_the_cores_and_a_call_over_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("ONEBIT_NUM_THREADS", "20")
    assert num_threads() == 20
    set_num_threads(5)
    assert num_threads() == 5
    set_num_threads(None)
    assert num_threads() == 20


@pytest.mark.parametrize("wrong", [0, -1, 2.0, 1.5, True, "x", "", "2.5", [3]])
def test_a_number_of_threads_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, wrong: object) -> None:
    set_num_threads(3)
    with pytest.raises(InputError, match="number of threads must be a positive integer"):
        set_num_threads(wrong)  # type: ignore[arg-type]
    assert num_threads() == 3, "changed by a refused call"
    set_num_threads(None)
    monkeypatch.setenv("ONEBIT_NUM_THREADS", "many" if not isinstance(wrong, str) else wrong)
    with pytest.raises(InputError, match="ONEBIT_NUM_THREADS must be a positive integer"):
        num_threads()


@needs_affinity
def test_a_process_pinned_to_one_core_uses_one_thread_whatever_omp_says() -> None:
    cores = real_affinity(0)
    code = f"""
import os
from onebit.compress import num_threads
os.sched_setaffinity(0, {{{min(cores)}}})
assert num_threads() == 1, num_threads()
os.sched_setaffinity(0, {cores})
assert num_threads() == {len(cores)}, num_threads()
"""
    env = os.environ | {"OMP_NUM_THREADS": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("total", [0, 1, 2, 3, 99, 100, 101, 1000])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_work_is_shared_out_without_gaps_and_in_parts_worth_a_thread(total: int, threads: int) -> None:
    set_num_threads(threads)
    ranges: list[tuple[int, int, str]] = []
    share_out(lambda first, last, name: ranges.append((first, last, name)), total, 50, "argument")  # type: ignore[arg-type]
    covered = sorted(ranges)
    assert [i for first, last, _ in covered for i in range(first, last)] == list(range(total))
    assert len(covered) <= threads
    assert all(last - first >= min(50, total) for first, last, _ in covered)
    assert all(name == "argument" for *_, name in covered)
    if total >= 50 * threads and threads <= FEW:
        assert len(covered) == threads


@pytest.mark.parametrize(("worth", "expected"), [(3, 3), (4, 4), (24, 4), (36, 6), (99, 9), (10_000, CORES)])
def test_more_threads_than_their_waking_is_worth_are_left_asleep(worth: int, expected: int) -> None:
    """The time w/p + p of w units of work on p threads is smallest for `expected`, or for fewer than FEW."""
    ranges = []
    share_out(lambda first, last: ranges.append((first, last)), 50 * worth, 50)
    assert len(ranges) == expected
    if FEW < expected < CORES:
        assert min(range(1, CORES + 1), key=lambda p: worth / p + p) in (expected, expected + 1)


def test_an_exception_in_another_threads_part_reaches_the_caller() -> None:
    def kernel(first: int, last: int) -> None:
        if first > 0:
            raise ZeroDivisionError

    set_num_threads(4)
    with pytest.raises(ZeroDivisionError):
        share_out(kernel, 1000, 1)


def test_a_caller_that_is_interrupted_waits_for_the_other_threads() -> None:
    """They write to arrays that it lets go of."""
    finished: list[int] = []

    def kernel(first: int, last: int) -> None:
        if first == 0:
            raise KeyboardInterrupt
        time.sleep(0.2)
        finished.append(first)

    set_num_threads(3)
    with pytest.raises(KeyboardInterrupt):
        share_out(kernel, 300, 100)
    assert sorted(finished) == [100, 200]


def work(seed: int, codec: SignCodec) -> list[bytes]:
    """Enough for several threads: encode, mean of two ranks, decode."""
    x = torch.randn(300_001, generator=torch.Generator().manual_seed(seed))
    residual, server = torch.zeros_like(x), torch.zeros_like(x)
    payload = codec.encode(x, residual)
    mean = codec.reduce_encode(torch.stack([payload, payload]), server, numel=x.numel())
    back = codec.decode(mean, torch.empty(x.numel(), dtype=torch.bfloat16))
    assert isinstance(back, torch.Tensor)
    return [samples.as_bytes(t) for t in (payload, residual, mean, server, back)]


@pytest.mark.parametrize("block_size", [1024, None])
def test_eight_threads_at_once_get_right_results(block_size: int | None) -> None:
    codec = SignCodec(block_size=block_size)
    set_num_threads(1)
    expected = [work(seed, codec) for seed in range(8)]
    set_num_threads(4)
    results: list[list[list[bytes]]] = [[] for _ in range(8)]
    start = threading.Barrier(8)

    def rank(seed: int) -> None:
        start.wait()
        for _ in range(5):
            results[seed].append(work(seed, codec))

    threads = [threading.Thread(target=rank, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [[e] * 5 for e in expected]


@pytest.mark.parametrize(
    "kernel",
    [
        kernels.encode_blocks,
        kernels.reduce_encode_blocks,
        kernels.decode_blocks,
        kernels.pack_words,
        kernels.unpack_words,
    ],
)
def test_no_array_of_a_kernel_is_freed_before_its_loops_have_ended(kernel: Callable[..., None]) -> None:
    """Numba frees an array after its last use, and work on its address is none; another thread may take the memory."""
    code = compiler.run_frontend(kernel, emit_dels=True)
    graph = analysis.compute_cfg_from_blocks(code.blocks)
    loops = {loop.header for loop in graph.loops().values()}
    assert loops
    for label, block in code.blocks.items():
        freed = {instruction.value for instruction in block.find_insts(ir.Del)}
        if "scratch" in freed:
            assert not loops & {label, *graph.descendents(label)}, "a loop still uses its address"


def in_forked_child(function: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether `function` returned True in a child that inherits this process as it is; a hang is a False."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if function() else 1)
        finally:
            os._exit(2)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_uses_the_kernels_after_its_parent_did() -> None:
    set_num_threads(3)
    codec, x = SignCodec(), torch.randn(300_001)
    expected, residual = codec.encode(x), torch.zeros_like(x)  # the parent has its pool of threads now
    payload, out = torch.zeros_like(expected), torch.empty_like(x)

    def child() -> bool:  # no large operator of torch here: its own threads do not survive a fork
        codec.encode(x, residual, out=payload)
        codec.decode(payload, out)
        return payload.numpy().tobytes() == expected.numpy().tobytes() and bool((out.numpy() != 0).all())

    assert in_forked_child(child)
    assert samples.same_bytes(codec.encode(x), expected), "the parent's own threads go on"


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_child_forked_while_the_pool_is_being_made_does_not_wait_for_it() -> None:
    from onebit.compress import threads

    set_num_threads(3)
    seen: list[int] = []
    with threads._lock:  # as if another thread were in there at the moment of the fork
        assert in_forked_child(lambda: share_out(lambda a, b: seen.append(b - a), 300, 1) is None and sum(seen) == 300)
