"""A wheel installed from the tree, in an environment of its own, from an empty folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from processes import REPOSITORY, clean_environment
from saved_evaluation import save, saved_line

CONFIGS = REPOSITORY / "configs"
COMMANDS = sorted(
    path.stem
    for path in (REPOSITORY / "soundmind").glob("[a-z]*.py")
    if "def main(" in path.read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel, beside the packages of this one."""
    folder = tmp_path_factory.mktemp("with a wheel")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, tree)
    for name in ("soundmind", "configs"):
        shutil.copytree(
            REPOSITORY / name, tree / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=tree, capture_output=True, text=True, check=True
    )
    wheel = tree / done.stdout.splitlines()[-1]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    shared = sysconfig.get_paths()["purelib"]
    site = next((folder / "venv/lib").glob("python*/site-packages"))
    install = [
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([sys.executable, *install, str(wheel)], check=True)
    # Behind the wheel's own files, so that this environment's soundmind is not the one found.
    (site / "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n")
    return python


def run(python: Path, where: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(python), *arguments],
        cwd=where,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_every_command_of_a_wheel_answers(python: Path, tmp_path: Path) -> None:
    code = (
        "import importlib, json, sys, soundmind\n"
        "answers = {'where': soundmind.__file__}\n"
        f"for name in {COMMANDS!r}:\n"
        "    try:\n"
        "        importlib.import_module(f'soundmind.{name}').main(['--help'])\n"
        "    except SystemExit as end:\n"
        "        answers[name] = end.code\n"
        "print('ANSWERS ' + json.dumps(answers))\n"
    )
    result = run(python, tmp_path, "-c", code)
    assert result.returncode == 0, result.stderr[-2000:]
    line = next(line for line in result.stdout.splitlines() if line.startswith("ANSWERS "))
    answers = json.loads(line.removeprefix("ANSWERS "))
    assert "with a wheel" in answers.pop("where")
    assert answers == dict.fromkeys(COMMANDS, 0)
    assert len(COMMANDS) >= 12


def test_a_wheel_brings_its_configurations(python: Path, tmp_path: Path) -> None:
    pytest.importorskip("verl")
    result = run(
        *(python, tmp_path, "-m", "soundmind.train", "--config-name", "grpo_tiny_cpu", "--dry-run")
    )
    assert result.returncode == 2, result.stdout + result.stderr
    assert "train.parquet not found" in result.stderr
    assert "checkpoints/tiny not found. Make it with" in result.stderr  # and not asked of the Hub
    assert "Traceback" not in result.stderr
    brought = python.parents[1] / "share/soundmind/configs"
    wanted = {path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml")}
    assert {path.relative_to(brought) for path in brought.rglob("*.yaml")} == wanted


def test_a_wheel_finds_the_template_of_an_evaluation_s_page(python: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", [saved_line(index, index % 2, 1) for index in range(4)])
    (folder / "report.html").unlink(missing_ok=True)
    result = run(python, tmp_path, "-m", "soundmind.evaluate", "grade", str(folder))
    assert result.returncode == 0, result.stderr[-2000:]
    assert "<html" in (folder / "report.html").read_text(encoding="utf-8")


def test_an_old_version_that_stays_installed_is_named(python: Path, tmp_path: Path) -> None:
    """Its entry points lead nowhere in this code; verl and vLLM would only log that."""
    from soundmind.plugin.environment import ENTRY_POINTS

    info = tmp_path / "soundmind-0.0.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: soundmind\nVersion: 0.0.9\n")
    (info / "entry_points.txt").write_text(
        "[verl.plugins]\nsoundmind = soundmind.verl_ext.plugin:load\n"
        "[vllm.general_plugins]\nsoundmind = soundmind.vllm_plugin:register\n"
        "[torch.backends]\nsoundmind = soundmind.torch_backend:load\n"
    )
    code = (
        "from soundmind.plugin.environment import stale_installation; print(stale_installation())"
    )
    assert run(python, REPOSITORY, "-c", code).stdout.strip() == "None"
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + code
    message = run(python, REPOSITORY, "-c", code).stdout
    assert "soundmind.verl_ext.plugin:load, of another version" in message
    assert ENTRY_POINTS["verl.plugins"] in message
    assert "pip install" in message
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch; print('imported')"
    assert "imported" in run(python, REPOSITORY, "-c", code).stdout
