"""The shaped link: what is missing is said and told apart by the exit status, and no namespace outlives a run."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from onebit.benchmarks import net, record
from onebit.benchmarks.launch import Host
from onebit.benchmarks.namespaces import FORBIDDEN, MISSING, NetworkError, shaped_hosts

FakeTool = Callable[[str, str], None]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTool:
    """Makes a PATH that holds nothing but the tools that a test writes as shell scripts."""
    monkeypatch.setenv("PATH", f"{tmp_path}")

    def write(name: str, script: str) -> None:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return write


def allowed() -> bool:
    """Whether this process may make a shaped link, tried out."""
    try:
        with shaped_hosts("1gbit"):
            return True
    except NetworkError:
        return False


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines() if line.startswith("onebit-")}


def launches(
    flags: list[str], tool: FakeTool, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[list[Host], list[str], str]]:
    """What a run with these flags would launch: hosts, the driver's flags and the backend."""
    found: list[tuple[list[Host], list[str], str]] = []
    tool("tc", "exit 0")
    tool("ip", "exit 0")
    monkeypatch.setattr(
        net, "launch", lambda hosts, wanted, backend: found.append((list(hosts), list(wanted), backend))
    )
    assert net.main(flags) == 0
    return found


def test_a_machine_without_iproute2_is_told_what_to_install(tool: FakeTool, capsys: pytest.CaptureFixture[str]) -> None:
    assert net.main([]) == MISSING
    assert "apt-get install iproute2" in capsys.readouterr().err


def test_only_the_tool_that_is_absent_is_named(tool: FakeTool, capsys: pytest.CaptureFixture[str]) -> None:
    tool("ip", "exit 0")
    net.main([])
    assert "needs tc:" in capsys.readouterr().err


def test_where_namespaces_are_forbidden_it_says_how_to_read_that(
    tool: FakeTool, capsys: pytest.CaptureFixture[str]
) -> None:
    tool("tc", "exit 0")
    tool("ip", "echo 'mount --make-shared /run/netns failed: Operation not permitted' >&2; exit 255")
    assert net.main([]) == FORBIDDEN
    said = capsys.readouterr().err
    assert "Operation not permitted" in said
    assert "root" in said
    assert "unshare -n true" in said


def test_a_kernel_without_the_queue_is_told_apart(tool: FakeTool, capsys: pytest.CaptureFixture[str]) -> None:
    tool("ip", "exit 0")
    tool("tc", "echo 'Error: Specified qdisc kind is unknown.' >&2; exit 2")
    assert net.main([]) == MISSING
    assert "sch_tbf" in capsys.readouterr().err


def test_namespaces_are_taken_away_when_shaping_fails(tool: FakeTool, tmp_path: Path) -> None:
    log = tmp_path / "log"
    tool("tc", "exit 2")
    tool("ip", f'echo "$*" >> {log}')
    with pytest.raises(NetworkError), shaped_hosts("1gbit"):
        pytest.fail("there is no link")
    calls = log.read_text().splitlines()
    added = {call.split()[-1] for call in calls if call.startswith("netns add")}
    assert len(added) == 2
    assert added == {call.split()[-1] for call in calls if call.startswith("netns del")}


def test_a_delay_is_a_queue_of_its_own_above_the_rate(tool: FakeTool, tmp_path: Path) -> None:
    log = tmp_path / "log"
    tool("tc", f'echo "$*" >> {log}')
    tool("ip", "exit 0")
    with shaped_hosts("1gbit", delay="5ms"):
        calls = [call.partition("qdisc add ")[2] for call in log.read_text().splitlines()]
    assert len(calls) == 4
    for first, second in zip(calls[::2], calls[1::2], strict=True):
        assert "root handle 1: netem delay 5ms" in first
        assert "parent 1:1 handle 10: tbf rate 1gbit" in second


def test_a_kernel_that_cannot_delay_is_told_apart(tool: FakeTool, capsys: pytest.CaptureFixture[str]) -> None:
    tool("ip", "exit 0")
    tool("tc", "echo 'Error: Specified qdisc kind is unknown.' >&2; exit 2")
    assert net.main(["--delay=5ms"]) == MISSING
    assert "sch_netem" in capsys.readouterr().err


@pytest.mark.parametrize("hosts", [1, 251])
def test_a_network_of_too_few_or_too_many_hosts_is_refused(hosts: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert net.main([f"--hosts={hosts}"]) == MISSING
    assert f"2 to 250 hosts, not {hosts}" in capsys.readouterr().err


def test_several_ranks_on_a_host_are_told_in_the_result_and_to_the_driver(
    tool: FakeTool, monkeypatch: pytest.MonkeyPatch
) -> None:
    [(ranks, wanted, backend)] = launches(["--local=2", "--hosts=3", "--cases=compressed,two-level"], tool, monkeypatch)
    assert (len(ranks), backend) == (6, "gloo")
    said = {
        "--cases=compressed,two-level",
        "--local=2",
        "--name=net-1gbit-3-hosts-2-ranks-each",
        "--link=3 namespaces of 2 ranks, 1gbit",
    }
    assert said <= set(wanted)
    assert not [word for word in wanted if word.startswith("--bucket_mb")]  # the driver has a default for each device


def test_nccl_takes_a_namespace_for_a_host_and_its_link_for_the_only_way_out(
    tool: FakeTool, monkeypatch: pytest.MonkeyPatch
) -> None:
    [(ranks, wanted, backend)] = launches(["--backend=nccl", "--local=2", "--bucket_mb=64"], tool, monkeypatch)
    assert backend == "nccl"
    assert "--bucket_mb=64.0" in wanted
    hosts = [rank.environment["NCCL_HOSTID"] for rank in ranks]
    assert hosts[0] == hosts[1] != hosts[2] == hosts[3]
    for rank in ranks:
        assert rank.environment["NCCL_NET"] == "Socket"
        assert rank.environment["ONEBIT_PEER_MEMORY"] == "0"
        assert rank.arguments == (f"--interface={rank.environment['NCCL_SOCKET_IFNAME']}",)


@pytest.mark.skipif(not allowed(), reason="needs root, iproute2 and a kernel that allows network namespaces")
class TestOnARealLink:
    """Where namespaces are allowed."""

    def test_both_averages_are_right_and_the_link_saw_what_was_counted(self, tmp_path: Path) -> None:
        before = namespaces()
        assert net.main(["--rate=1gbit", "-e1M", "-n5", f"--output={tmp_path}"]) == 0
        assert namespaces() <= before
        [path] = tmp_path.glob("*-net-1gbit-*.json")
        rows = record.load(path)["rows"][-3:]
        assert [row["wrong"] for row in rows] == [0] * 3
        for row in rows:
            # On top of the payload come headers, acknowledgements, a stray barrier; few rounds send a segment twice.
            assert row["wire_formula"] <= row["link_bytes"] <= 1.15 * row["wire_formula"] + 4096

    def test_three_hosts_are_joined_by_a_switch_and_leave_nothing(self, tmp_path: Path) -> None:
        before = namespaces()
        assert net.main(["--rate=1gbit", "--hosts=3", "-e64K", "-n1", f"--output={tmp_path}"]) == 0
        assert namespaces() <= before
        [path] = tmp_path.glob("*-net-1gbit-3-hosts-*.json")
        document = record.load(path)
        assert document["run"]["ranks"] == 3
        assert all(row["wrong"] == 0 for row in document["rows"])

    def test_a_rate_that_tc_does_not_know_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        before = namespaces()
        assert net.main(["--rate=fast"]) == MISSING
        assert "100mbit, 1gbit, 10gbit" in capsys.readouterr().err
        assert namespaces() <= before

    def test_namespaces_are_gone_after_an_interrupt(self) -> None:
        seen: set[str] = set()
        with contextlib.suppress(KeyboardInterrupt), shaped_hosts("1gbit") as hosts:
            seen = {host.name for host in hosts} & namespaces()
            raise KeyboardInterrupt
        assert len(seen) == 2
        assert not seen & namespaces()
