"""A checkpoint is complete or absent under its name.

    checkpoints/
        global_step_N/        actor/ (one shard a rank), data.pt, complete.json
        latest_checkpointed_iteration.txt     what verl continues from
        .writing/             a checkpoint being written; left by a kill, swept at the next save

verl writes a checkpoint file by file under its final name, so that a kill leaves a folder that looks
like one. Here it is written aside, recorded in `complete.json` (every file with its size, and a
fingerprint of the base model), and then moved to its name in one step. Only after that are older
ones removed. [ours]
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from soundmind.model.folder import tensor_shapes, weight_files
from soundmind.model.parts import THINKER_PREFIX
from soundmind.system.errors import UserError
from soundmind.system.files import write_text

COMPLETE = "complete.json"
WRITING = ".writing"
TRACKER = "latest_checkpointed_iteration.txt"
_STEP = re.compile(r"global_step_(\d+)")
_SAMPLE_BYTES = 256  # of each tensor's start and middle


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be published; the message says what to change."""


def steps(root: Path) -> dict[int, Path]:
    """Folders `global_step_N` of `root`, by step, complete or not."""
    if not root.is_dir():
        return {}
    return {
        int(match[1]): path
        for path in root.iterdir()
        if path.is_dir() and (match := _STEP.fullmatch(path.name))
    }


def faults(folder: Path) -> list[str]:
    """Why the checkpoint `folder` (global_step_N) is not complete; empty if it is."""
    path = folder / COMPLETE
    if not path.is_file():
        return [f"{folder} has no {COMPLETE}: saving it was interrupted, or it was copied in part"]
    try:
        sizes: dict[str, int] = json.loads(path.read_text())["files"]
    except (ValueError, KeyError, TypeError):
        return [f"{path} cannot be read: the checkpoint was copied in part"]
    found = []
    for name, size in sorted(sizes.items()):
        file = folder / name
        if not file.is_file():
            found.append(f"{file} is missing")
        elif file.stat().st_size != size:
            found.append(f"{file} has {file.stat().st_size:,} bytes of {size:,}")
    return found


def newest(root: Path) -> int | None:
    """Step of the newest complete checkpoint in `root`, or None."""
    found = sorted(steps(root).items(), reverse=True)
    return next((step for step, path in found if not faults(path)), None)


def publish(root: Path, step: int, base: Path | None) -> Path:
    """Move the finished checkpoint `root/.writing/global_step_N` to its name; returns that folder.

    `base` is the model folder that training started from, or None where it is not local. Raises
    `CheckpointError` if shards of other machines are not there to be moved.
    """
    written = root / WRITING / f"global_step_{step}"
    _require_shards(written / "actor")
    files = sorted(path for path in written.rglob("*") if path.is_file())
    record: dict[str, Any] = {
        "step": step,
        "base": weights_fingerprint(base) if base is not None and base.is_dir() else None,
        "files": {str(path.relative_to(written)): path.stat().st_size for path in files},
    }
    (written / COMPLETE).write_text(json.dumps(record, indent=1) + "\n")
    final = root / written.name
    if final.exists():  # from an attempt that a resumed run repeats
        shutil.rmtree(final)
    os.replace(written, final)
    shutil.rmtree(root / WRITING, ignore_errors=True)
    track(root)
    return final


def _require_shards(actor: Path) -> None:
    """One shard of every rank is visible from here."""
    settings = actor / "fsdp_config.json"
    ranks = json.loads(settings.read_text())["world_size"] if settings.is_file() else 0
    shards = [actor / f"model_world_size_{ranks}_rank_{rank}.pt" for rank in range(ranks)]
    missing = [path.name for path in shards if not path.is_file()]
    if missing or not shards:
        raise CheckpointError(
            f"{actor}: {len(missing)} of {ranks} shards are not there, first "
            f"{missing[0] if missing else settings.name}. Every node writes its own; put "
            "run.root on storage that all nodes share"
        )


def track(root: Path) -> None:
    """Let verl continue from the newest complete checkpoint, or from none."""
    last = newest(root)
    tracker = root / TRACKER
    if last is None:
        tracker.unlink(missing_ok=True)
        return
    write_text(tracker, str(last))


def prune(root: Path, keep: int | None) -> None:
    """Remove all but the newest `keep` complete checkpoints; none when `keep` is None or 0.

    Never the last complete one, and nothing newer than it.
    """
    last = newest(root)
    if not keep or last is None:
        return
    older = {step: path for step, path in steps(root).items() if step <= last}
    kept = sorted(step for step, path in older.items() if not faults(path))[-keep:]
    for step, path in older.items():
        if step not in kept:
            # The record goes first: a kill on the way leaves a folder that does not look complete.
            (path / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(path)


def weights_fingerprint(base: Path) -> str:
    """A digest that tells one set of thinker weights from another, however it is cut into files.

    Name, type, shape and a few bytes of every tensor: training changes it, renaming or splitting
    files does not. Raises `WeightFileError` for a file that is cut short.
    """
    found: dict[str, bytes] = {}
    for path in weight_files(base):
        tensor_shapes(path)  # complains about a damaged file
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            for name, entry in header.items():
                if name.startswith(THINKER_PREFIX):
                    start, end = (8 + length + offset for offset in entry["data_offsets"])
                    found[name] = f"{entry['dtype']} {entry['shape']}".encode()
                    for place in (start, (start + end) // 2):
                        file.seek(place)
                        found[name] += file.read(min(_SAMPLE_BYTES, end - place))
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(name.encode() + found[name])
    return digest.hexdigest()[:16]


def recorded_base(folder: Path) -> str | None:
    """Fingerprint of the base that the checkpoint `folder` was trained from, where it is known."""
    record: dict[str, Any] = json.loads((folder / COMPLETE).read_text())
    return record.get("base")
