"""A run's folder: where everything about one training run lies, and how an interrupted one is
found.

    outputs/<config>/<timestamp>/
        experiment.json   what makes it this experiment: keys, and digests of weights and rows
        config.yaml       the resolved configuration of the last launch
        versions.json     packages, commit, hardware, seed, command line of the first launch;
                          versions-N.json of the launches that continued it
        metrics.jsonl     one line a step: verl's keys and reward/<component>/mean
        rollouts/         every response of every step, with its components
        validation/       every validation answer, by step
        checkpoints/      verl's checkpoints; what a resumed run continues from
        tensorboard/, logs/
        export/           a complete Qwen2.5-Omni folder of the last step
        plots/*.png       curves
        summary.json      what the run came to; written last, so its absence means "unfinished"

`RunFolder.open` continues the newest unfinished run of the same experiment, unless told otherwise;
`choose_run` says which, for a launch and for a dry run alike. A lock that dies with its process keeps
two launchers out of one folder.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from soundmind.model import checkpoints
from soundmind.run.experiment import differences, stored_experiment
from soundmind.system.errors import UserError
from soundmind.system.files import try_lock, write_json


class RunFolderError(UserError, RuntimeError):
    """A run folder that cannot be used, with what to do about it."""


@dataclass
class RunFolder:
    """An open run folder, locked for this process."""

    path: Path
    resumed: bool
    notes: list[str] = field(default_factory=list)  # runs that are not continued, and why
    _lock: Any = field(repr=False, default=None)

    @classmethod
    def open(
        cls,
        root: Path,
        name: str,
        experiment: dict[str, Any],
        resume: str = "auto",
        steps: int | None = None,
    ) -> RunFolder:
        """Continue or start a run of configuration `name`; see `choose_run` for the arguments.

        A finished run that is extended is unfinished again: its summary goes aside.
        """
        chosen = choose_run(root, name, experiment, resume, steps)
        for path in chosen.paths:
            lock = try_lock(path / ".lock")
            if lock is not None:
                folder = cls(path, resumed=True, notes=chosen.notes, _lock=lock)
                if (path / "summary.json").exists():
                    step = folder.last_checkpoint()
                    os.replace(path / "summary.json", path / f"summary-step-{step}.json")
                return folder
        if resume not in ("auto", "new"):
            raise RunFolderError(f"run.resume={resume}: another process is running in it")
        path = _new_folder(root / name)
        write_json(path / "experiment.json", experiment)
        return cls(path, resumed=False, notes=chosen.notes, _lock=try_lock(path / ".lock"))

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


@dataclass(frozen=True)
class Chosen:
    """Run folders that a launch may continue, the first free one of them; none: a new one.

    `notes`: one line for a run that somebody might have meant and that is not continued.
    """

    paths: list[Path]
    notes: list[str]


def choose_run(
    root: Path,
    name: str,
    experiment: dict[str, Any],
    resume: str = "auto",
    steps: int | None = None,
) -> Chosen:
    """Which folder of configuration `name` a launch means. Reads alone, for launch and dry run.

    `experiment`: see `soundmind.run.experiment`; only a run of the same one is continued. `resume`
    is "auto" (the newest unfinished run, else a new one), "new", or a run folder's path, which may
    be finished if `steps`, the last step that is wanted, lies beyond its own. Raises `RunFolderError`
    where the named folder cannot be continued.
    """
    if resume not in ("auto", "new"):
        path = Path(resume)
        if not path.is_dir():
            raise RunFolderError(f"run.resume={resume}: no such run folder")
        if why := _difference(path, experiment):
            raise RunFolderError(
                f"run.resume={resume}: this folder belongs to another configuration: {why}. Give it "
                "what it had, or start a new run with run.resume=new"
            )
        last = checkpoints.newest(path / "checkpoints")
        if (path / "summary.json").exists() and (last is None or last >= (steps or last + 1)):
            raise RunFolderError(
                f"run.resume={resume}: this run is finished"
                + (" and kept no checkpoint" if last is None else f" at step {last}; to extend it ")
                + (f"set trainer.total_training_steps above {last}" if last is not None else "")
            )
        return Chosen([path], [])
    parent = root / name
    folders = (
        sorted((p for p in parent.iterdir() if p.is_dir()), reverse=True) if parent.is_dir() else []
    )
    if resume == "new" or not folders:
        return Chosen([], [])
    unfinished = [path for path in folders if not (path / "summary.json").exists()]
    reasons = {path: _difference(path, experiment) for path in unfinished}
    same = [path for path in unfinished if reasons[path] == ""]
    if same:
        return Chosen(same, [])
    notes = []
    other = next((path for path in unfinished if reasons[path]), None)
    if other is not None:
        step = checkpoints.newest(other / "checkpoints")
        notes.append(
            f"{other} is unfinished ({f'step {step}' if step else 'no checkpoint'}) and is not "
            f"continued: {reasons[other]}"
        )
    for path in folders:
        last = checkpoints.newest(path / "checkpoints")
        shorter = path not in unfinished and last and steps and steps > last
        if shorter and _difference(path, experiment) == "":
            notes.append(f"{path} is finished at step {last}; run.resume={path} extends it")
            break
    return Chosen([], notes)


def _difference(path: Path, experiment: dict[str, Any]) -> str | None:
    """In what the run in `path` is another experiment; empty if in nothing, None if it is no run."""
    old = stored_experiment(path)
    return None if old is None else differences(old, experiment)


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
