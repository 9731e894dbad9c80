from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from soundmind.system import share

Groups = Callable[[str, dict[str, str]], None]


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Groups:
    """groups(lines of /proc/self/cgroup, {file below /sys/fs/cgroup: content})"""
    monkeypatch.setattr(share, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(share, "MOUNT", tmp_path / "mount")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)

    def write(lines: str, files: dict[str, str]) -> None:
        (tmp_path / "groups").write_text(lines)
        for name, content in files.items():
            path = tmp_path / "mount" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    return write


GIB = 2**30


@pytest.mark.parametrize(
    "lines,files,cores,gib",
    [
        # version 2: the tightest limit on the way up counts
        (
            "0::/job/step\n",
            {"job/step/cpu.max": "300000 100000\n", "job/cpu.max": "max 100000\n"},
            3,
            None,
        ),
        (
            "0::/job/step\n",
            {"job/step/cpu.max": "max 100000\n", "job/cpu.max": "200000 100000\n"},
            2,
            None,
        ),
        ("0::/job\n", {"job/cpu.max": "50000 100000\n", "job/memory.max": f"{GIB}\n"}, 1, 1),
        (
            "0::/job/step\n",
            {"job/step/memory.max": "max\n", "job/memory.max": f"{2 * GIB}\n"},
            8,
            2,
        ),
        # a container that sees its own group as the root, and one that is told a path outside
        ("0::/\n", {"cpu.max": "400000 100000\n", "memory.max": f"{GIB}\n"}, 4, 1),
        ("0::/docker/abc\n", {"cpu.max": "400000 100000\n", "memory.max": f"{GIB}\n"}, 4, 1),
        # version 1
        (
            "4:memory:/job\n2:cpu,cpuacct:/job\n",
            {
                "cpu/job/cpu.cfs_quota_us": "250000\n",
                "cpu/job/cpu.cfs_period_us": "100000\n",
                "memory/job/memory.limit_in_bytes": f"{3 * GIB}\n",
            },
            2,
            3,
        ),
        (
            "4:memory:/\n1:cpu:/\n",
            {
                "cpu/cpu.cfs_quota_us": "-1\n",
                "cpu/cpu.cfs_period_us": "100000\n",
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            8,
            None,
        ),
        ("", {}, 8, None),
    ],
)
def test_the_share_of_a_control_group_is_what_counts(
    groups: Groups, lines: str, files: dict[str, str], cores: int, gib: int | None
) -> None:
    groups(lines, files)
    assert share.usable_cores() == cores
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert share.usable_memory() == (whole if gib is None else gib * GIB)


def test_a_machine_without_control_groups_is_ours(groups: Groups, tmp_path: Path) -> None:
    groups("0::/\n", {})
    (tmp_path / "groups").unlink()
    assert share.usable_cores() == 8
