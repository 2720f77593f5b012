"""Machine code of CUDA kernels is compiled once per machine, and a compiler's refusal can be read."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from onebit.compress import OnebitError
from onebit.compress.gpu.build import compile_source


class Refusal(Exception):
    """What the compiler raises."""


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Programs that a compiler in NVRTC's place was given, with their options; it refuses what says error."""
    calls: list[tuple[str, tuple[str, ...]]] = []

    def compile_program(program: str, options: tuple[str, ...]) -> None:
        calls.append((program, options))
        if "error" in program:
            raise Refusal("NVRTC_ERROR_COMPILATION")

    nvrtc = SimpleNamespace(
        NVRTCError=Refusal,
        getVersion=lambda: (13, 0),
        createProgram=lambda code, name, headers, names: code,
        compileProgram=compile_program,
        getCUBIN=lambda program: b"code of " + program.encode(),
        getProgramLog=lambda program: "line 1: no such thing",
        destroyProgram=lambda program: None,
    )
    cuda = ModuleType("cupy.cuda")
    cuda.nvrtc = nvrtc  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", ModuleType("cupy"))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    return calls


def build(code: str, capability: tuple[int, int] = (9, 0), threads: int = 256) -> bytes:
    return compile_source(code, "a.cu", capability, (f"-DTHREADS={threads}",))


def test_a_source_is_compiled_once_per_machine(compiled: list[tuple[str, tuple[str, ...]]]) -> None:
    assert build("one") == build("one") == b"code of one"
    assert len(compiled) == 1


@pytest.mark.parametrize(
    "other", [{"code": "two"}, {"code": "one", "capability": (8, 0)}, {"code": "one", "threads": 128}]
)
def test_what_was_compiled_of_something_else_is_not_taken(
    compiled: list[tuple[str, tuple[str, ...]]], other: dict[str, object]
) -> None:
    build("one")
    build(**other)  # type: ignore[arg-type]
    assert len(compiled) == 2


def test_subnormal_numbers_are_kept_and_nothing_is_contracted(compiled: list[tuple[str, tuple[str, ...]]]) -> None:
    build("one")
    assert {"--ftz=false", "--fmad=false", "--gpu-architecture=sm_90"} <= set(compiled[0][1])


def test_a_refusal_has_the_compilers_words(compiled: list[tuple[str, tuple[str, ...]]]) -> None:
    with pytest.raises(OnebitError, match=r"a\.cu.*line 1: no such thing"):
        build("error")


def test_without_a_folder_to_write_every_process_compiles(
    compiled: list[tuple[str, tuple[str, ...]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file"))
    assert build("one") == build("one") == b"code of one"
    assert len(compiled) == 2
