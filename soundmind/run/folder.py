"""A run's folder: where everything about one training run lies, and how an interrupted one is
found.

    outputs/<config>/<timestamp>/
        config.yaml       the resolved configuration
        versions.json     packages, commit, hardware, seed, command line
        metrics.jsonl     one line a step: verl's keys and reward/<component>/mean
        rollouts/         every response of every step, with its components
        validation/       every validation answer, by step
        checkpoints/      verl's checkpoints; what a resumed run continues from
        tensorboard/, logs/
        export/           a complete Qwen2.5-Omni folder of the last step
        plots/*.png       curves
        summary.json      what the run came to; written last, so its absence means "unfinished"

`RunFolder.open` continues the newest unfinished run of the same configuration, unless told
otherwise. A lock that dies with its process keeps two launchers out of one folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig
from soundmind.model import checkpoints
from soundmind.system.files import write_json


class RunFolderError(RuntimeError):
    """A run folder that cannot be used, with what to do about it."""


@dataclass
class RunFolder:
    """An open run folder, locked for this process."""

    path: Path
    resumed: bool
    _lock: Any = field(repr=False, default=None)

    @classmethod
    def open(cls, root: Path, name: str, fingerprint: str, resume: str = "auto") -> RunFolder:
        """Continue or start a run of configuration `name`.

        `fingerprint` identifies the experiment; only a run with the same one is continued.
        `resume` is "auto" (the newest unfinished run, else a new one), "new", or a run folder's
        path.
        """
        if resume not in ("auto", "new"):
            path = Path(resume)
            if not path.is_dir():
                raise RunFolderError(f"run.resume={resume}: no such run folder")
            if (found := _stored_fingerprint(path)) != fingerprint:
                raise RunFolderError(
                    f"run.resume={resume}: this folder belongs to another configuration "
                    f"({found} instead of {fingerprint}); compare its config.yaml, or start a "
                    f"new run "
                    "with run.resume=new"
                )
            lock = _try_lock(path)
            if lock is None:
                raise RunFolderError(f"run.resume={resume}: another process is running in it")
            return cls(path, resumed=True, _lock=lock)

        parent = root / name
        for path in unfinished(parent, fingerprint) if resume == "auto" else ():
            lock = _try_lock(path)
            if lock is not None:
                return cls(path, resumed=True, _lock=lock)
        path = _new_folder(parent)
        (path / "fingerprint").write_text(fingerprint + "\n")
        return cls(path, resumed=False, _lock=_try_lock(path))

    def last_checkpoint(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return checkpoints.newest(self.path / "checkpoints")

    def prune_checkpoints(self, keep: int | None) -> None:
        """Remove all but the newest `keep` complete checkpoints, and let verl go on from the last.

        Incomplete ones are passed over.
        """
        root = self.path / "checkpoints"
        if root.is_dir():
            checkpoints.prune(root, keep)
            checkpoints.track(root)

    def attempts(self) -> list[dict[str, Any]]:
        """One entry per launch: when it started and the last sign of life."""
        path = self.path / "attempts.json"
        return json.loads(path.read_text()) if path.exists() else []

    def begin_attempt(self) -> int:
        """Note a launch; returns its number from 0. A killed predecessor ends at its last "
        "metrics."""
        attempts = self.attempts()
        metrics = self.path / "metrics.jsonl"
        if attempts and "ended" not in attempts[-1]:
            last_sign = metrics.stat().st_mtime if metrics.exists() else attempts[-1]["started"]
            attempts[-1]["ended"] = max(last_sign, attempts[-1]["started"])
        attempts.append({"started": time.time()})
        write_json(self.path / "attempts.json", attempts)
        return len(attempts) - 1

    def end_attempt(self) -> float:
        """Note the end of this launch; returns the seconds of all launches together."""
        attempts = self.attempts()
        attempts[-1]["ended"] = time.time()
        write_json(self.path / "attempts.json", attempts)
        return sum(attempt["ended"] - attempt["started"] for attempt in attempts)


def unfinished(parent: Path, fingerprint: str) -> list[Path]:
    """Unfinished runs of the experiment `fingerprint` among the folders of `parent`, newest first."""
    if not parent.is_dir():
        return []
    return [
        path
        for path in sorted((p for p in parent.iterdir() if p.is_dir()), reverse=True)
        if not (path / "summary.json").exists() and _stored_fingerprint(path) == fingerprint
    ]


def config_fingerprint(config: DictConfig) -> str:
    """A short digest of what makes two runs the same experiment: the configuration without "
    "`run.resume`."""
    # Here alone: scripts/gpu_check.sh uses this module where only torch and transformers are.
    from omegaconf import OmegaConf

    plain = json.loads(json.dumps(OmegaConf.to_container(config, resolve=True), default=str))
    for name in ("resume", "dir", "metrics_path", "export"):
        plain.get("run", {}).pop(name, None)
    # Which cluster it runs on: the next job's head node has another address.
    plain.pop("ray_kwargs", None)
    text = json.dumps(plain, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _new_folder(parent: Path) -> Path:
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    parent.mkdir(parents=True, exist_ok=True)
    for suffix in ("", *(f"_{number}" for number in range(1, 100))):
        path = parent / (stamp + suffix)
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise RunFolderError(f"{parent}: a hundred runs started in one second")


def _stored_fingerprint(path: Path) -> str | None:
    file = path / "fingerprint"
    return file.read_text().strip() if file.exists() else None


def _try_lock(path: Path) -> Any | None:
    """An exclusive lock on the folder, released when the process ends however it ends."""
    handle = (path / ".lock").open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    return handle
