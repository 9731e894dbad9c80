"""Files whole or not at all, folders replaced at once, locks and digests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPOSITORY = (
    Path(__file__).resolve().parents[2]
)  # the project's folder, where it runs from a checkout


class BusyError(OSError):
    """Somebody else is writing to the same folder."""


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, shortened to 16 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is never seen half-written."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_bytes(data)
    os.replace(scratch, path)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flush_to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep a second run out of the same folder; a killed holder's lock is free again."""
    import fcntl

    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"another run is writing to {path.parent.parent}") from None
        yield


def write_json(path: Path, value: Any) -> None:
    """Write `value` in one move, readable by people."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n")
    os.replace(temporary, path)


def replace_folder(output: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a new folder beside `output`, then put it in its place.

    A reader never sees a half-written folder; a failed or killed `fill` leaves the old one.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        fresh = scratch / "new"
        fresh.mkdir()
        fill(fresh)
        if output.exists():
            os.replace(output, scratch / "old")
        os.replace(fresh, output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
