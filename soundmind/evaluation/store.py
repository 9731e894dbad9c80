"""The folder of one evaluation, made so that it survives a kill at any moment.

    <output-dir>/
        config.yaml         every setting that defines the numbers, and their fingerprint
        predictions.jsonl   one line per row (and sample), in the order of the Parquet file
        versions.json       packages, commit, hardware, command
        metrics.json, report.html, plots/*.png, speech/*.wav

Rows are answered in batches of a fixed size and a batch is appended at once, after it is complete,
with one fsync. What a kill leaves behind is a whole number of batches and possibly the beginning
of one more, which `resume` cuts off: the next run asks exactly the batches that an undisturbed one
would ask, in the same composition, so greedy answers come out the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from soundmind.system.errors import UserError
from soundmind.system.files import try_lock, write_text

PREDICTIONS = "predictions.jsonl"
CONFIG = "config.yaml"


class StoreError(UserError, RuntimeError):
    """An output folder that cannot be used or written to, with what to do about it."""


def settings_fingerprint(config: dict[str, Any]) -> str:
    """Digest of the settings that define the numbers."""
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass
class Store:
    """An output folder, locked for this process."""

    path: Path
    config: dict[str, Any]
    lock: Any = None

    @classmethod
    def open(cls, path: Path, config: dict[str, Any]) -> Store:
        """Start or continue an evaluation; StoreError if the folder belongs to another one."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = _lock(path)
            stored = read_config(path)
            if stored is None:
                if (path / PREDICTIONS).exists():
                    raise StoreError(
                        f"{path} holds {PREDICTIONS} but no {CONFIG}, so it cannot be continued; "
                        "choose another --output-dir"
                    )
                write_text(path / CONFIG, OmegaConf.to_yaml(OmegaConf.create(config)))
            elif changed := identity_changes(stored, config):
                raise StoreError(
                    f"{path} holds another evaluation ({changed}); choose another --output-dir"
                )
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror or error}; nothing was evaluated") from error
        return cls(path, config, lock)

    def resume(self, batch_lines: int, total_lines: int, name: str = PREDICTIONS) -> int:
        """Cut a file of lines to whole batches of `batch_lines`; returns the lines kept."""
        path = self.path / name
        if not path.exists():
            return 0
        ends = [0]  # byte offset after each complete line
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n") or not _is_json(line):
                    break
                ends.append(ends[-1] + len(line))
        lines = min(len(ends) - 1, total_lines)
        kept = lines if lines == total_lines else lines - lines % batch_lines
        os.truncate(path, ends[kept])
        return kept

    def append(self, predictions: Sequence[dict[str, Any]], name: str = PREDICTIONS) -> None:
        """Add a batch, complete and on disk when this returns; on failure the file is as before."""
        path = self.path / name
        data = "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in predictions).encode()
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("ab", buffering=0) as file:
                written = 0
                while written < len(data):
                    written += file.write(data[written:]) or 0
                os.fsync(file.fileno())
        except OSError as error:
            if path.exists():
                os.truncate(path, size)
            raise StoreError(
                f"{path}: {error.strerror or error}. What was finished before is valid; make room "
                "and run the same command again to continue"
            ) from error

    def predictions(self) -> list[dict[str, Any]]:
        """Everything predicted so far."""
        return read_predictions(self.path)


def read_config(path: Path) -> dict[str, Any] | None:
    """`config.yaml` of an evaluation folder as plain values, or None."""
    file = path / CONFIG
    if not file.is_file():
        return None
    try:
        config = OmegaConf.to_container(OmegaConf.load(file))
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise StoreError(
            f"{file} cannot be read ({' '.join(str(error).split())}); it was cut or edited. Evaluate "
            "into another --output-dir"
        ) from error
    if not isinstance(config, dict):
        raise StoreError(f"{file} holds no settings; is {path} the folder of an evaluation?")
    return {str(key): value for key, value in config.items()}


def read_predictions(path: Path, name: str = PREDICTIONS) -> list[dict[str, Any]]:
    """Lines of `predictions.jsonl`; StoreError names a line that cannot be read.

    A byte that is no UTF-8 is data of a response and read as U+FFFD.
    """
    file = path / name
    if not file.is_file():
        raise StoreError(f"{path} holds no {name}; is it the folder of an evaluation?")
    predictions = []
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                found = json.loads(line)
            except ValueError as error:
                raise StoreError(f"{file}:{number}: not a JSON line ({error})") from error
            if not isinstance(found, dict):
                raise StoreError(
                    f"{file}:{number}: a JSON object is wanted, found {type(found).__name__}"
                )
            predictions.append(found)
    return predictions


# Names of places: what lies there is known by its digest.
PLACES = {"model.given", "data.path", "speech.recogniser"}


def leaves(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration as one level, keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def identity_changes(stored: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What of two identities differs, in words; empty where they are the same."""
    there, now = leaves(stored), leaves(wanted)
    keys = [k for k in {**there, **now} if k not in PLACES and there.get(k) != now.get(k)]
    return "; ".join(f"{key}: {there.get(key)!r} there, {now.get(key)!r} now" for key in keys)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _lock(path: Path) -> Any:
    """An exclusive lock on the folder; the system drops it when the process ends."""
    handle = try_lock(path / ".lock")
    if handle is None:
        raise StoreError(f"{path}: another evaluation is running in this folder")
    return handle
