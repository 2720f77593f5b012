"""Kernels are compiled once per machine, whoever starts first; where nothing can be kept, they still work."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import pytest

from onebit.compress import reference
from onebit.compress.cpu import build, kernels, operators

RANKS = 4

# Calls kernels, compares with the reference, and tells which were compiled, as Numba's own events have it, and what was
# logged.
RANK = """
import json, logging, sys
import torch
from numba.core import event
from onebit.compress import SignCodec, pack_signs, unpack_signs

operators = sys.argv[1].split(",")
messages = []
handler = logging.Handler()
handler.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("onebit").addHandler(handler)
x = torch.randn(3000)
payload = SignCodec(kernels="reference").encode(x)

def results(name):
    codec, residual, server = SignCodec(kernels=name), torch.zeros(3000), torch.zeros(3000)
    calls = {
        "encode": lambda: codec.encode(x, residual),
        "reduce_encode": lambda: codec.reduce_encode(payload.repeat(2), server, numel=3000),
        "decode": lambda: codec.decode(payload, numel=3000),
        "pack_signs": lambda: pack_signs(x, kernels=name),
        "unpack_signs": lambda: unpack_signs(torch.arange(255).byte(), kernels=name),
    }
    found = [calls[operator]() for operator in operators]
    return [t.tolist() for t in (*found, residual, server)]

expected = results("reference")
import onebit.compress.cpu.operators  # Numba's own import: what follows "go" is short
print("ready", flush=True)
sys.stdin.readline()
with event.install_recorder("numba:compile") as recorder:
    assert results("cpu") == expected
compiled = [e.data["dispatcher"].py_func.__name__ for _, e in recorder.buffer if e.is_start]
print(json.dumps({"compiled": compiled, "messages": messages}))
"""
KERNELS = {
    "encode": kernels.encode_blocks,
    "reduce_encode": kernels.reduce_encode_blocks,
    "decode": kernels.decode_blocks,
    "pack_signs": kernels.pack_words,
    "unpack_signs": kernels.unpack_words,
}


def start(chosen: list[str], cache: Path, **variables: str) -> subprocess.Popen[str]:
    """A process that calls the chosen operators as soon as it is told to."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", RANK, ",".join(chosen)],
        env=os.environ | {"NUMBA_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"} | variables,
        text=True,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
    )


def finish(processes: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    """Let all go at the same moment, and return what they tell."""
    try:
        for process in processes:
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise AssertionError(process.communicate()[1])
        for process in processes:
            if process.stdin is not None:
                process.stdin.write("go\n")
                process.stdin.flush()
        told = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, told, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(out) for out, _ in told]


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(f): (f.stat().st_mtime_ns, f.stat().st_size) for f in sorted(folder.rglob("*")) if f.is_file()}


def test_ranks_that_start_together_compile_once_and_later_processes_not_at_all(tmp_path: Path) -> None:
    *processes, last = [start(list(KERNELS), tmp_path) for _ in range(RANKS + 1)]
    ranks = finish(processes)
    compiled = [name for rank in ranks for name in rank["compiled"]]
    for kernel in KERNELS.values():
        assert compiled.count(kernel.__name__) == 1, f"{RANKS} ranks compiled {kernel.__name__} more or less than once"
    before = files_of(tmp_path)
    (later,) = finish([last])
    assert later["compiled"] == []
    assert files_of(tmp_path) == before, "the cache was written again"
    assert not any(rank["messages"] for rank in (*ranks, later))


def test_kernels_work_and_say_once_that_they_are_compiled_anew_where_no_cache_can_be_written(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.touch()
    below = occupied / "below"  # not even root can make a folder there
    chosen = ["pack_signs", "unpack_signs"]
    (rank,) = finish([start(chosen, below, HOME=str(below), XDG_CACHE_HOME=str(below))])
    assert {KERNELS[operator].__name__ for operator in chosen} <= set(rank["compiled"])
    (message,) = rank["messages"]
    assert "cannot be written" in message
    assert str(below) in message
    assert "NUMBA_CACHE_DIR" in message


def test_the_test_knows_every_kernel_that_there_is() -> None:
    public = {name for name, value in vars(kernels).items() if getattr(value, "__module__", "") == kernels.__name__}
    compiled_alone = {k.__name__ for k in KERNELS.values()}
    assert compiled_alone == {
        name for name in public if not isinstance(vars(kernels)[name], numba.core.registry.CPUDispatcher)
    }


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder of this test alone."""
    monkeypatch.setattr(numba.core.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_cache_folder", build._cache_folder.__wrapped__)
    return tmp_path


def nothing(a: int, b: int) -> None:
    """The smallest kernel."""


def test_a_changed_source_is_compiled_into_a_folder_of_its_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba itself would not notice: it looks at the file of the outermost function only."""
    package = cache / "compress"
    (package / "cpu").mkdir(parents=True)
    other = cache / "other"
    other.mkdir()
    (other / "kernels.py").write_text("")
    for source in (*Path(operators.__file__).parent.glob("*.py"), Path(reference.__file__)):
        shutil.copy(source, package / "cpu" if source.parent.name == "cpu" else package)
    monkeypatch.setattr(build, "__file__", str(package / "cpu" / "build.py"))
    folders = [build._cache_folder(other)]
    shared = [package / source for source in ("cpu/simd.py", "cpu/block.py", "reference.py")]
    for source in (*shared, other / "kernels.py"):
        with open(source, "a", encoding="utf-8") as file:
            file.write("# changed\n")
        folders.append(build._cache_folder(other))
    assert None not in folders
    assert len(set(folders)) == 5
    monkeypatch.setattr(numba, "__version__", "0.0")
    assert build._cache_folder(other) not in folders


def test_a_change_in_another_packages_kernels_leaves_the_codecs_compiled(cache: Path) -> None:
    own, other = Path(build.__file__).parent, cache / "other"
    other.mkdir()
    before = build._cache_folder(own)
    (other / "kernels.py").write_text("# a kernel\n")
    assert build._cache_folder(other) != before
    assert build._cache_folder(own) == before


def test_threads_that_need_a_kernel_at_once_compile_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []

    def slowly(function: Callable[..., None]) -> Callable[..., None]:
        time.sleep(0.1)
        compiled.append(function)
        return lambda *_: None

    monkeypatch.setattr(build, "_compile", slowly)
    monkeypatch.setattr(build, "_kernels", {})
    with ThreadPoolExecutor(8) as pool:
        results = set(pool.map(build.compile_kernel, [nothing] * 8))
    assert compiled == [nothing]
    assert len(results) == 1


def test_compiling_leaves_numbas_own_cache_folder_to_the_user(cache: Path) -> None:
    build._compile(nothing)(1, 2)
    assert str(cache) == numba.core.config.CACHE_DIR
    assert list(cache.glob("onebit/*/*/*.nbc"))


def test_a_full_disk_costs_the_cache_and_not_the_run(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(numba.core.caching.IndexDataCacheFile, "save", no_space)
    with caplog.at_level(logging.WARNING, logger="onebit"):
        build._compile(nothing)(1, 2)
    assert "No space left" in caplog.text


def test_a_user_without_a_home_gets_kernels(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(numba.core.config, "CACHE_DIR", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with caplog.at_level(logging.WARNING, logger="onebit"):
        build._compile(nothing)(1, 2)
    assert "home directory" in caplog.text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_child_forked_during_a_compilation_does_not_keep_the_lock(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    read, write = os.pipe()
    with build._one_process(tmp_path):
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)  # lives until the parent closes the pipe
            os._exit(0)
        with open(tmp_path / "lock", "ab") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(tmp_path / "lock", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(read)
    os.close(write)
    os.waitpid(child, 0)


def test_a_file_system_without_locks_is_no_hindrance(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    build._compile(nothing)(1, 2)
    assert list(cache.glob("onebit/*/*/*.nbc"))
