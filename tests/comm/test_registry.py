"""make_backend resolves what users name, and says what to do about what it cannot resolve."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from onebit.comm import registry, run_threads
from onebit.comm.backend import DEFAULT_TIMEOUT
from onebit.comm.errors import BackendError
from onebit.comm.registry import BACKENDS, make_backend
from onebit.comm.single_backend import SingleBackend
from onebit.comm.torch_backend import TorchBackend
from onebit.compress.launch_env import LAUNCHERS
from tests.comm.launcher import ROOT, environment, needs_mpi


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in sum(LAUNCHERS, ()):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def gloo_world() -> Iterator[None]:
    """A default group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def pretend_group_has(monkeypatch: pytest.MonkeyPatch, config: str) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda group=None: config)


@pytest.mark.parametrize("name", ["gloo2", "GLOO", "", "ucc"])
def test_unknown_name_lists_the_good_ones(name: str) -> None:
    with pytest.raises(BackendError) as caught:
        make_backend(name)
    assert repr(name) in str(caught.value)
    assert all(repr(good) in str(caught.value) for good in BACKENDS)


@pytest.mark.parametrize("spec", [3, 1.5, object(), [], torch.device("cpu")])
def test_unknown_object_says_what_a_backend_is(spec: object) -> None:
    with pytest.raises(
        BackendError, match=f"process group, an mpi4py communicator or a Backend; got .*{type(spec).__name__}"
    ):
        make_backend(spec)


def test_nothing_named_and_nothing_started_is_a_world_of_one() -> None:
    backend = make_backend()
    assert isinstance(backend, SingleBackend)
    assert (backend.rank, backend.size, backend.timeout) == (0, 1, DEFAULT_TIMEOUT)


@pytest.mark.parametrize("variable", [launcher.world_size for launcher in LAUNCHERS])
def test_ranks_of_a_launcher_do_not_silently_train_alone(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "2")
    with pytest.raises(BackendError, match=rf"2 ranks \({variable}=2\).*init_process_group.*'mpi'.*'single'"):
        make_backend()
    assert make_backend("single").size == 1
    monkeypatch.setenv(variable, "1")
    assert make_backend().size == 1


def test_default_group_is_found(gloo_world: None) -> None:
    for device in (None, "cpu", torch.device("cpu")):
        backend = make_backend(device=device)
        assert isinstance(backend, TorchBackend)
        assert (backend.name, backend.device_type, backend.size) == ("gloo", "cpu", 1)


def test_every_call_makes_a_backend_whose_traffic_is_its_own(gloo_world: None) -> None:
    one, other = make_backend("gloo"), make_backend(dist.group.WORLD)
    one.all_reduce(torch.zeros(3)).wait()
    assert (one.traffic.collectives, other.traffic.collectives) == (1, 0)


def test_a_backend_is_returned_as_it_is() -> None:
    backend = make_backend("single", timeout=7.0)
    assert make_backend(backend) is backend
    assert make_backend(backend, timeout=7.0) is backend
    with pytest.raises(BackendError, match=r"timeout of 7\.0 s, not 8\.0; make one with timeout=8\.0"):
        make_backend(backend, timeout=8.0)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_timeout_must_be_positive(timeout: float) -> None:
    with pytest.raises(BackendError, match="timeout must be a positive number of seconds, got"):
        make_backend("single", timeout=timeout)


def test_gloo_needs_torch_distributed() -> None:
    with pytest.raises(
        BackendError, match=r"'gloo' backend needs .*: add torch\.distributed\.init_process_group\('gloo'\)"
    ):
        make_backend("gloo")


def test_nccl_needs_cuda_then_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match=r"'nccl' backend needs a CUDA device.*'gloo' or 'mpi'"):
        make_backend("nccl")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(BackendError, match=r"init_process_group\('nccl'\)"):
        make_backend("nccl")


def test_tensors_on_another_device_are_refused(gloo_world: None) -> None:
    with pytest.raises(
        BackendError, match="rank 0: the 'gloo' backend carries cpu tensors, and these are on cuda:0; move"
    ):
        make_backend("gloo", device="cuda:0")
    with pytest.raises(BackendError, match=r"gloo.*cannot carry cuda tensors.*new_group\(backend='nccl'\)"):
        make_backend(device="cuda")
    with pytest.raises(BackendError, match="cannot carry meta tensors; tensors must be on cpu or cuda"):
        make_backend(device="meta")
    assert make_backend("single", device="meta").name == "single"


def test_group_without_the_half_that_is_asked_for(gloo_world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_group_has(monkeypatch, "cuda:nccl")
    for spec, device in (("gloo", None), (None, "cpu"), (dist.group.WORLD, "cpu")):
        with pytest.raises(BackendError, match=r"\(cuda:nccl\) cannot carry cpu tensors.*new_group\(backend='gloo'\)"):
            make_backend(spec, device=device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    pretend_group_has(monkeypatch, "cpu:gloo,cuda:gloo")
    with pytest.raises(BackendError, match=r"cannot carry cuda tensors.*new_group\(backend='nccl'\)"):
        make_backend("nccl")


@pytest.mark.parametrize(
    ("config", "device", "name"),
    [
        ("cuda:nccl", None, "nccl"),
        ("cuda:nccl", "cuda", "nccl"),
        ("cpu:gloo,cuda:nccl", "cuda:0", "nccl"),
        ("cpu:gloo,cuda:nccl", "cpu", "gloo"),
        ("cpu:gloo,cuda:nccl", None, "gloo"),
        ("cpu:gloo,cuda:gloo", None, "gloo"),
    ],
)
def test_device_chooses_the_half(
    gloo_world: None, monkeypatch: pytest.MonkeyPatch, config: str, device: str | None, name: str
) -> None:
    pretend_group_has(monkeypatch, config)
    assert make_backend(device=device).name == name


class Half:
    """Half of a process group, as far as its time limit goes."""

    def __init__(self) -> None:
        self.options = SimpleNamespace(_timeout=timedelta(minutes=10))

    def _set_default_timeout(self, limit: timedelta) -> None:
        self.options._timeout = limit


def test_the_time_limit_over_nccl_is_that_of_the_group(gloo_world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_group_has(monkeypatch, "cuda:nccl")
    half = Half()
    monkeypatch.setattr(dist.ProcessGroup, "_get_backend", lambda group, device: half)
    assert make_backend(device="cuda").timeout == 600.0
    assert make_backend(device="cuda", timeout=5.0).timeout == 5.0
    assert half.options._timeout == timedelta(seconds=5)
    assert make_backend(device="cuda").timeout == 5.0
    with pytest.raises(BackendError, match="timeout must be a positive"):
        make_backend(device="cuda", timeout=-5.0)
    assert half.options._timeout == timedelta(seconds=5)


def test_threads_are_made_by_run_threads() -> None:
    with pytest.raises(BackendError, match="run_threads"):
        make_backend("threads")


def test_mpi4py_absent_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(BackendError, match=r'pip install "onebit\[mpi\]".*openmpi'):
        make_backend("mpi")


def test_torch_backend_without_torch_distributed() -> None:
    with pytest.raises(BackendError, match="not initialised"):
        TorchBackend()


def test_a_new_backend_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Carrier(SingleBackend):
        name = "pigeon"

    monkeypatch.setitem(registry.BACKENDS, "pigeon", Carrier)
    assert make_backend("pigeon", timeout=3.0).timeout == 3.0


FIND_MPI_ALONE = """
import pytest
from onebit.comm.errors import BackendError
from onebit.comm.registry import make_backend
with pytest.raises(BackendError, match=r"2 ranks .WORLD_SIZE=2. but MPI sees one, .*mpiexec"):
    make_backend("mpi")
"""


@pytest.mark.mpi
@needs_mpi
def test_mpi_that_sees_one_rank_where_a_launcher_started_two() -> None:
    variables = {**environment(), "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", FIND_MPI_ALONE], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_a_backend_says_which_rank_it_is_when_it_is_printed() -> None:
    assert [("rank=0, size=2" in text, "rank=1, size=2" in text) for text in run_threads(2, repr)] == [
        (True, False),
        (False, True),
    ]
