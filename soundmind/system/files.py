"""Files whole or not at all, folders replaced at once, locks and digests.

A file that is being written has a name of its own (`.NAME.<process>-<random>.tmp`), so that two
writers never mix what they write, locked or not, and the mode that the user's umask asks for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from soundmind.system.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
# The project's folder: the checkout, or where the command runs if a wheel was installed.
REPOSITORY = PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() else Path.cwd()


class BusyError(UserError):
    """Somebody else is writing to the same folder."""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, shortened to 16 hexadecimal digits."""
    return file_sha256(path)[:16]


def temporary_name(path: Path) -> Path:
    """A name beside `path` that nobody else writes to."""
    return path.with_name(f".{path.name[:200]}.{os.getpid()}-{secrets.token_hex(3)}.tmp")


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A name to write to; at the end of the block the file takes the place of `path` in one move.

    An error leaves `path` as it was. `durable`: on disk before it gets its name, for files that a
    power cut must not empty.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        if durable:
            flush_to_disk(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = os.fspath(path)  # a full disk does not say which file it was
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is never seen half-written."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8 so that it is never seen half-written."""
    write_atomically(path, text.encode("utf-8"))


def write_json(path: Path, value: Any, **keys: Any) -> None:
    """Write `value` in one move, readable by people; `keys` are those of json.dumps."""
    write_text(path, json.dumps(value, **{"indent": 2, **keys}) + "\n")


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def try_lock(path: Path) -> IO[str] | None:
    """An exclusive lock on the file `path`, or None while another process holds it.

    Held until the handle is closed or the process ends, however it ends. OSError, with the name of
    the file, on file systems that have no locks.
    """
    handle = path.open("w")
    if lock_file(handle, path):
        return handle
    handle.close()
    return None


def lock_file(handle: IO[Any], path: Path) -> bool:
    """Lock the open file `handle`, of name `path`, as `try_lock` does; False while another has it."""
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        handle.close()
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    return True


@contextlib.contextmanager
def locked(path: Path, folder: Path | None = None) -> Iterator[None]:
    """Keep a second run out of `folder` (the file's own) by a lock on the file `path`: BusyError."""
    handle = try_lock(path)
    if handle is None:
        raise BusyError(
            f"another run is writing to {folder or path.parent}; wait for it, or choose another folder"
        )
    with handle:
        yield


def replace_folder(output: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a new folder beside `output`, then put it in its place.

    A reader never sees a half-written folder; a failed or killed `fill` leaves the old one.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = temporary_name(output)
    scratch.mkdir()
    try:
        fresh = scratch / "new"
        fresh.mkdir()
        fill(fresh)
        mask = os.umask(0)
        os.umask(mask)
        for path in fresh.rglob("*"):  # safetensors writes weights that nobody else may read
            if path.is_file() and not path.is_symlink():
                path.chmod(0o666 & ~mask)
        if output.exists():
            os.replace(output, scratch / "old")
        os.replace(fresh, output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
