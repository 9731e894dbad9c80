"""The rows an evaluation asks about: read from a prepared Parquet file and checked once.

    examples = read_examples(Path("data/alr/parquet/audio/test.parquet"))

Against `soundmind.data.rows.read_rows`, which training uses, a clip that has gone is no reason to stop:
the row is kept, counts as wrong and is listed. Only a file of which no clip at all is there is
refused, since that is a moved folder and not a bad row.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soundmind.data.reread import RowsError
from soundmind.data.rows import CLIP_COLUMN, read_rows, with_clip
from soundmind.system.errors import UserError
from soundmind.task.labels import VERDICTS
from soundmind.task.schema import MODES

COLUMNS = ("data_source", "prompt", "reward_model", "extra_info", "audio")
INFO_KEYS = ("id", "split", "mode", "label", "question_seconds", "audio_tokens")


class DataError(UserError, ValueError):
    """A Parquet file that cannot be evaluated, with what to do about it."""


@dataclass(frozen=True)
class Example:
    """One row: what is asked, what is true, and what is known about both."""

    index: int  # row in the Parquet file, from 0
    data_source: str
    messages: list[dict[str, Any]]  # a clip is a reference (soundmind.data.clips)
    clip: str | None  # the same reference
    ground_truth: str
    info: dict[str, Any]  # schema.ExtraInfo

    @property
    def question(self) -> str:
        """The written part of the question; empty where it is only heard."""
        parts = [p["text"] for p in self.messages[-1]["content"] if p["type"] == "text"]
        return "" if self.info["mode"] == "audio" else "\n".join(parts[:-1])

    def clip_file(self) -> str | None:
        """Path of a clip that lies in a file of its own; None for embedded ones and for text."""
        return self.clip if self.clip and not self.clip.startswith("parquet://") else None


def read_examples(path: Path, limit: int | None = None, root: str | None = None) -> list[Example]:
    """The first `limit` rows of a file of `soundmind.preprocess`, all of one mode.

    `root` replaces the recorded data root. DataError for another layout, mixed modes, or where no
    clip is there.
    """
    rows = _read(path, root)
    examples = [
        Example(
            index=index,
            data_source=row["data_source"],
            messages=with_clip(row["prompt"], row[CLIP_COLUMN]),
            clip=row[CLIP_COLUMN],
            ground_truth=row["reward_model"]["ground_truth"],
            info=row["extra_info"],
        )
        for index, row in enumerate(rows)
    ][:limit]
    _check(examples, path)
    return examples


def _read(path: Path, root: str | None) -> list[dict[str, Any]]:
    """Rows without embedded sound, each with the reference to its clip."""
    try:
        table = read_rows(str(path), root=root, needed=COLUMNS, need_clips=False)
    except FileNotFoundError as error:
        raise DataError(
            f"{path} not found; make it with `python -m soundmind.preprocess --mode audio`"
        ) from error
    except (RowsError, OSError) as error:
        raise DataError(str(error)) from error
    rows: list[dict[str, Any]] = table.to_pylist()
    _check_layout(rows, path)
    return rows


def _check_layout(rows: Sequence[dict[str, Any]], path: Path) -> None:
    if not rows:
        raise DataError(f"{path} holds no rows")
    first = rows[0]
    absent = [key for key in INFO_KEYS if key not in (first["extra_info"] or {})]
    if absent:
        raise DataError(
            f"{path} has another layout: extra_info lacks {', '.join(absent)}. Make it again with "
            "`python -m soundmind.preprocess`"
        )
    for row in rows:
        [[part["type"] for part in message["content"]] for message in row["prompt"]]
        row["reward_model"]["ground_truth"]


def _check(examples: Sequence[Example], path: Path) -> None:
    modes = sorted({example.info["mode"] for example in examples})
    if len(modes) > 1:
        raise DataError(
            f"{path} mixes the modes {', '.join(modes)}; evaluate them one at a time, each from "
            "its own file"
        )
    if modes[0] not in MODES:
        raise DataError(f"{path}: mode {modes[0]!r} is none of {', '.join(MODES)}")
    truths = sorted({example.ground_truth for example in examples} - set(VERDICTS))
    if truths:
        raise DataError(f"{path}: ground truth {truths[0]!r} is none of {', '.join(VERDICTS)}")
    files = [clip for example in examples if (clip := example.clip_file())]
    if files and not any(os.path.isfile(clip) for clip in files):
        raise DataError(
            f"{path} refers to {files[0]}, and neither this nor any other of its clips is there. "
            "Move the data folder as a whole, or name the folder with the clips: --audio-root"
        )
