"""This process's share of the machine: GPUs, cores and memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from soundmind.system import machine

DRIVER = """#!/bin/sh
case "$*" in
  -L) for i in 0 1 2 3; do echo "GPU $i: NVIDIA X$i (UUID: GPU-aa$i)"; done ;;
  *name*) for i in 0 1 2 3; do echo "NVIDIA X$i"; done ;;
  *memory.total*) for i in 0 1 2 3; do echo "${i}0000"; done ;;
esac
"""


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A driver's tool that lists four cards whatever is visible, as the real one does."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(DRIVER)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("visible", "cards"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("2", [2]),
        ("3,1", [3, 1]),
        (" 0 , 2 ", [0, 2]),
        ("GPU-aa1", [1]),
        ("GPU-aa", []),  # not one alone
        ("GPU-zz", []),
        ("0,-1,2", [0]),  # CUDA stops at the first that is none
        ("-1", []),
        ("NoDevFiles", []),
        ("1,7,2", [1]),
    ],
)
def test_only_visible_gpus_count(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, cards: list[int]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.gpu_names() == [f"NVIDIA X{card}" for card in cards]
    # The first card's driver says 00000 MiB.
    assert machine.gpu_memory() == [card * 10_000 * 2**20 for card in cards]


def test_a_part_of_a_gpu_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-5,0")
    assert machine.gpu_names() == ["MIG-5", "NVIDIA X0"]


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty tree of control groups, with this process in `job/step` of the unified hierarchy."""
    root = tmp_path / "cgroup"
    (root / "job/step").mkdir(parents=True)
    monkeypatch.setattr(machine, "CONTROL_GROUPS", root)
    own = tmp_path / "self"
    own.write_text("0::/job/step\n")
    monkeypatch.setattr(machine, "OWN_GROUPS", own)
    return root


def test_without_limits_the_machine_counts(groups: Path) -> None:
    assert machine.cores() == len(os.sched_getaffinity(0))
    assert machine.memory_bytes() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_limit_of_a_group_above_holds_too(groups: Path) -> None:
    (groups / "job/cpu.max").write_text("100000 100000\n")
    (groups / "job/step/cpu.max").write_text("max 100000\n")
    (groups / "job/memory.max").write_text(f"{3 * 2**30}\n")
    (groups / "job/step/memory.max").write_text("max\n")
    assert machine.cores() == 1
    assert machine.memory_bytes() == 3 * 2**30
    assert machine.hardware()["memory_gib"] == 3.0


def test_half_a_core_is_one(groups: Path) -> None:
    (groups / "job/step/cpu.max").write_text("50000 100000\n")
    assert machine.cores() == 1


def test_groups_of_the_first_version_count_too(groups: Path, tmp_path: Path) -> None:
    (tmp_path / "self").write_text("4:memory:/host/path\n1:cpu,cpuacct:/host/path\n0::/\n")
    (groups / "memory").mkdir()
    (groups / "memory/memory.limit_in_bytes").write_text(f"{2**30}\n")
    (groups / "cpu,cpuacct").mkdir()
    (groups / "cpu,cpuacct/cpu.cfs_quota_us").write_text("100000\n")
    (groups / "cpu,cpuacct/cpu.cfs_period_us").write_text("100000\n")
    assert machine.memory_bytes() == 2**30
    assert machine.cores() == 1
