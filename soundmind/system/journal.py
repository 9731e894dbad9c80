"""A file of finished work, one JSON object a line, that a kill at any moment leaves readable.

What costs time or money is appended, complete and on disk, before anything is done with it. A
kill leaves whole lines and perhaps the beginning of one, which the next opening cuts off. Every
entry has a key that says what it answers: another question has another key, so an old answer is
never taken for a new one.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from soundmind.system.errors import UserError
from soundmind.system.files import lock_file


class JournalError(UserError):
    """The journal cannot be opened or written; what was finished before is valid."""


class Journal:
    """Entries by key, those of earlier processes included. One process at a time, by a lock."""

    def __init__(self, path: Path) -> None:
        """Open or make the file; JournalError where another process has it."""
        self.path = path
        self.entries: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+", buffering=0)
        if not lock_file(self._file, path):
            self._file.close()
            raise JournalError(f"{path} is in use; wait for the other process to end")
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                self.entries[entry["key"]] = entry
            except (ValueError, KeyError, TypeError) as error:
                self._file.close()
                raise JournalError(
                    f"{path}:{number} is no entry ({error}); move the file away to begin again"
                ) from error
            end += len(line)
        self._file.truncate(end)

    def append(self, key: str, *, flush: bool = True, **entry: Any) -> None:
        """Note an entry, on disk when this returns; without `flush` it survives a kill of this
        process, not of the machine. A full disk leaves the file as it was."""
        line = json.dumps({"key": key, **entry}, ensure_ascii=False, sort_keys=True) + "\n"
        data, size = line.encode("utf-8", "backslashreplace"), os.fstat(self._file.fileno()).st_size
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
            if flush:
                os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(size)
            raise JournalError(
                f"{self.path}: {error.strerror or error}. What was finished before is kept; make "
                "room and run the same command again"
            ) from error
        self.entries[key] = {"key": key, **entry}

    def close(self) -> None:
        """Give the file, and its lock, back."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
