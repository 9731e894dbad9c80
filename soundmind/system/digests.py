"""What files hold, as digests that cover every byte; a large file is read once and remembered.

A digest that samples a file cannot see what lies between. So all of it is hashed (SHA-256, about a
gigabyte a second and core: 22 GB of weights in some 20 s), and the digest of a file of 16 MiB or more
is kept in the user's cache under what tells one content of a file from another: device, inode, size,
and the times of its last change. `cp -p` and `touch` set the time of modification, not the one of the
inode's change, which is therefore part of it. A file that changed within the last two seconds is not
remembered, since clocks of file systems are coarse.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from soundmind.system.files import file_sha256, write_text

REMEMBERED_BYTES = 16 << 20  # smaller files are read again
SETTLED_SECONDS = 2.0
_THREADS = 4
_NOT_CONTENT = {".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".pdf"}  # of a model folder


def content_digest(path: Path) -> str:
    """SHA-256 of a file, remembered if it is large; OSError where it cannot be read."""
    if path.stat().st_size < REMEMBERED_BYTES:
        return file_sha256(path)
    return _remembered([path], lambda: file_sha256(path))


def files_digest(paths: Sequence[Path]) -> str:
    """16 hexadecimal digits of the content of several files, in order; remembered as one.

    For thousands of clips: ten gigabytes are not read again at every start.
    """
    try:
        return _remembered(paths, lambda: joint_digest(content_digests(paths)))
    except OSError:
        return joint_digest(content_digests(paths))  # one is gone or unreadable: its digest says so


def _remembered(paths: Sequence[Path], compute: Callable[[], str]) -> str:
    """`compute`, or what it returned for these files as long as none of them changed."""
    before = [path.stat() for path in paths]
    key = _content_key(before)
    kept = _cache_folder() / key
    try:
        found = kept.read_text(encoding="ascii")
        if len(found) in (16, 64):
            return found
    except (OSError, ValueError):
        pass  # not there, or not readable: the files are
    digest = compute()
    changed = max((max(status.st_mtime, status.st_ctime) for status in before), default=0.0)
    settled = time.time() - changed > SETTLED_SECONDS
    if settled and _content_key([path.stat() for path in paths]) == key:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept, digest)
        except OSError:
            pass  # a home that cannot be written to costs time, nothing else
    return digest


def content_digests(paths: Sequence[Path]) -> list[str]:
    """`content_digest` of several files; what could not be read is said instead of a digest."""

    def one(path: Path) -> str:
        try:
            return content_digest(path)
        except OSError as error:
            return f"unreadable: {type(error).__name__}"

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(one, paths))


def joint_digest(parts: Iterable[str]) -> str:
    """16 hexadecimal digits of several texts in their order."""
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def folder_digest(folder: Path) -> str:
    """16 hexadecimal digits of everything a model's loader can read in `folder`, names included.

    All files, also below sub-folders and behind links; hidden ones, texts for people and pictures
    aside.
    """
    files = sorted(_files(folder, set()))
    names = [os.fspath(path.relative_to(folder)) for path in files]
    return joint_digest(f"{n} {d}" for n, d in zip(names, content_digests(files), strict=True))


def _files(folder: Path, seen: set[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in seen:
        return  # a link to a folder above
    seen.add(real)
    for entry in folder.iterdir():
        if entry.name.startswith((".", "LICENSE", "NOTICE")):
            continue
        if entry.is_dir():
            yield from _files(entry, seen)
        elif entry.suffix.lower() not in _NOT_CONTENT:
            yield entry


def _content_key(found: Sequence[os.stat_result]) -> str:
    """What tells one content of these files from another, without reading it."""
    lines = (f"{s.st_dev} {s.st_ino} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}" for s in found)
    return f"{len(found)}-{hashlib.sha256(' '.join(lines).encode()).hexdigest()}"


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "soundmind" / "digests"
