"""scripts/keep_training.sh starts a failed training again, so many times and no more."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from processes import REPOSITORY


def kept(tmp_path: Path, statuses: list[int], restarts: int) -> tuple[int, int, str]:
    """Exit status, starts and messages for a command that ends with these statuses, one a start."""
    command = tmp_path / "command.sh"
    cases = "".join(f"{number}) exit {status} ;; " for number, status in enumerate(statuses))
    command.write_text(
        f'n=$(wc -l < "{tmp_path}/starts"); echo >> "{tmp_path}/starts"; case $n in {cases}esac\n'
    )
    (tmp_path / "starts").touch()
    result = subprocess.run(
        ["bash", str(REPOSITORY / "scripts/keep_training.sh"), "bash", str(command)],
        env={**os.environ, "RESTARTS": str(restarts), "PAUSE_SECONDS": "0"},
        capture_output=True,
        text=True,
    )
    return result.returncode, (tmp_path / "starts").read_text().count("\n"), result.stderr


def test_a_fault_is_followed_by_a_restart_until_the_run_ends(tmp_path: Path) -> None:
    status, starts, said = kept(tmp_path, [1, 137, 0], restarts=3)
    assert (status, starts) == (0, 3) and "exit status 137" in said


def test_restarts_are_limited(tmp_path: Path) -> None:
    status, starts, said = kept(tmp_path, [1] * 9, restarts=2)
    assert (status, starts) == (1, 3) and "used up" in said


@pytest.mark.parametrize("status", [2, 130, 143])
def test_bad_input_and_interruptions_are_not_tried_again(tmp_path: Path, status: int) -> None:
    assert kept(tmp_path, [status] * 3, restarts=2)[:2] == (status, 1)
