"""What of this machine is this process's own: cores and memory, by affinity and control groups.

A container or a batch system gives a process a part of the machine; `os.cpu_count` and /proc/meminfo
tell of the whole. Both versions of Linux control groups are read, and limits of groups above ours
count too. Elsewhere the machine is ours.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores this process may use: those of its affinity, or fewer by a quota; at least 1."""
    whole = range(os.cpu_count() or 1)
    cores = len(getattr(os, "sched_getaffinity", lambda _: whole)(0))
    for folder in _folders("cpu"):
        numbers = _numbers(folder, "cpu.max")  # quota and period in microseconds
        numbers = numbers or [
            *_numbers(folder, "cpu.cfs_quota_us"),
            *_numbers(folder, "cpu.cfs_period_us"),
        ]
        if len(numbers) == 2 and min(numbers) > 0:
            cores = min(cores, numbers[0] // numbers[1])
    return max(1, cores)


def usable_memory() -> int:
    """Bytes of memory this process may use: the machine's, or fewer by a limit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder in _folders("memory"):
        limits = _numbers(folder, "memory.max") or _numbers(folder, "memory.limit_in_bytes")
        memory = min([memory, *(limit for limit in limits if limit > 0)])
    return memory


def _folders(controller: str) -> Iterator[Path]:
    """The control groups of this process, innermost first, of `controller` or of version 2."""
    try:
        lines = GROUPS.read_text("utf-8", "replace").splitlines()
    except OSError:
        return
    for line in lines:
        names, _, path = line.partition(":")[2].partition(":")
        if names and controller not in names.split(","):
            continue
        base = MOUNT / controller if names else MOUNT
        # Seen from inside a container, a path may begin outside of it: then only the base is there.
        folder = base / path.lstrip("/")
        yield from (place for place in (folder, *folder.parents) if place.is_relative_to(base))


def _numbers(folder: Path, name: str) -> list[int]:
    """Whole numbers in a file of a group; empty where it is not there or says `max`."""
    try:
        words = (folder / name).read_text("utf-8").split()
    except OSError:
        return []
    return [int(word) for word in words] if all(word.isdigit() for word in words) else []
