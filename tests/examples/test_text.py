"""The example's text is split by file, the same way everywhere, and ranks read different windows of it."""

from __future__ import annotations

from pathlib import Path

import torch

from examples.text import load, sample, windows


def write_files(root: Path, count: int) -> None:
    for number in range(count):
        (root / f"module{number}.py").write_text(f"{number}\n")


def test_every_file_lies_in_one_half_of_the_split_whole(tmp_path: Path) -> None:
    write_files(tmp_path, 100)
    halves = [set(bytes(half.tolist()).decode().split()) for half in load(tmp_path)]
    assert all(halves)
    assert halves[0] | halves[1] == {str(number) for number in range(100)}
    assert not halves[0] & halves[1]


def test_a_new_file_moves_no_other_one(tmp_path: Path) -> None:
    write_files(tmp_path, 50)
    before = bytes(load(tmp_path)[1].tolist()).split()
    write_files(tmp_path, 60)
    after = bytes(load(tmp_path)[1].tolist()).split()
    assert [name for name in after if int(name) < 50] == before


def test_folders_of_tests_and_of_installed_packages_are_left_out(tmp_path: Path) -> None:
    write_files(tmp_path, 20)
    expected = [half.numel() for half in load(tmp_path)]
    for folder in ("test", "site-packages"):
        (tmp_path / folder).mkdir()
        write_files(tmp_path / folder, 20)
    assert [half.numel() for half in load(tmp_path)] == expected


def test_targets_are_the_bytes_after_the_inputs() -> None:
    text = torch.arange(100, dtype=torch.uint8)
    for inputs, targets in (sample(text, 7, 12, torch.Generator().manual_seed(0)), windows(text, 5, 12)):
        assert torch.equal(targets, inputs + 1)


def test_windows_reach_both_ends_and_ranks_share_them_out() -> None:
    text = torch.arange(100, dtype=torch.uint8)
    inputs, targets = windows(text, 6, 10)
    assert inputs[0, 0] == 0
    assert targets[-1, -1] == 99
    shares = [windows(text, 6, 10, rank, 2)[0] for rank in range(2)]
    assert torch.equal(torch.stack(shares, dim=1).flatten(0, 1), inputs)
