"""Prepared rows: the Parquet schema they are written with and how they are read back."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from soundmind.task.schema import METADATA_KEY

if TYPE_CHECKING:
    import pyarrow as pa
from soundmind.data.clips import embedded_reference, open_parquet

CLIP_COLUMN = "_clip"  # reference to the row's clip, made at load time


def read_rows(path: str, original: str | None = None, root: str | None = None) -> pa.Table:
    """Rows of a Parquet file without embedded clips, with a column that refers to each clip.

    `original` is the name before verl copied the file to local storage: the recorded data root is
    relative to that. `root` replaces it. Raises FileNotFoundError where the clips are not there.
    """
    file = pq.ParquetFile(path)
    missing = {"prompt", "extra_info", "audio"}.difference(file.schema_arrow.names)
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(sorted(missing))}; prepare the data with: "
            "python -m soundmind.preprocess"
        )
    names = [name for name in file.schema_arrow.names if name != "audio"]
    table = file.read(columns=[*names, "audio.path"])
    paths = [clip["path"] if clip else None for clip in table["audio"].to_pylist()]
    metadata = _metadata(file)
    if metadata.get("embedded"):
        where = os.path.abspath(path)
        clips = [embedded_reference(where, i) if clip else None for i, clip in enumerate(paths)]
    else:
        folder = clip_root(original or path, metadata, root)
        clips = [os.path.join(folder, clip) if clip else None for clip in paths]
        _check_first_clip(clips, path)
    table = table.drop_columns(["audio"]).append_column(CLIP_COLUMN, pa.array(clips, pa.string()))
    return table.replace_schema_metadata(None)


def read_row(path: str, index: int, root: str | None = None) -> dict[str, Any]:
    """One row as Python values, `_clip` being the reference to its clip. Reads one row group."""
    file = pq.ParquetFile(path)
    total = file.metadata.num_rows
    if not 0 <= index < total:
        raise IndexError(f"{path} has rows 0 to {total - 1}, asked for {index}")
    _, starts = open_parquet(path, os.stat(path).st_mtime_ns)
    group = int(np.searchsorted(starts, index, side="right")) - 1
    names = [name for name in file.schema_arrow.names if name != "audio"]
    table = file.read_row_group(group, columns=[*names, "audio.path"])
    row: dict[str, Any] = table.slice(index - int(starts[group]), 1).to_pylist()[0]
    audio, metadata = row.pop("audio"), _metadata(file)
    row[CLIP_COLUMN] = None
    if audio and metadata.get("embedded"):
        row[CLIP_COLUMN] = embedded_reference(os.path.abspath(path), index)
    elif audio:
        row[CLIP_COLUMN] = os.path.join(clip_root(path, metadata, root), audio["path"])
    return row


def _metadata(file: pq.ParquetFile) -> dict[str, Any]:
    """What soundmind.preprocess left in the file beside the rows; empty for other files."""
    metadata: dict[str, Any] = json.loads(
        (file.schema_arrow.metadata or {}).get(METADATA_KEY, b"{}")
    )
    return metadata


def clip_root(parquet: str, metadata: dict[str, Any], override: str | None = None) -> str:
    """Absolute data root of a Parquet file: `override`, or what was recorded relative to it."""
    if override is not None:
        return os.path.abspath(override)
    if "root" not in metadata:
        raise ValueError(
            f"{parquet} does not say where its clips are (not written by soundmind.preprocess?); "
            "set data.audio_root to their folder"
        )
    return os.path.normpath(
        os.path.join(os.path.dirname(os.path.abspath(parquet)), metadata["root"])
    )


def _check_first_clip(clips: Sequence[str | None], path: str) -> None:
    """A wrong root is wrong for every clip: say so at start, not at the first rollout."""
    first = next((clip for clip in clips if clip), None)
    if first is not None and not Path(first).is_file():
        raise FileNotFoundError(
            f"{path} refers to {first}, which is not there. Move the data folder as a whole, "
            "set data.audio_root to the folder with the clips, or run soundmind.preprocess again"
        )


def with_clip(prompt: list[dict[str, Any]], reference: str | None) -> list[dict[str, Any]]:
    """Stored messages in the form chat templates and processors know, without null keys."""
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "audio", "audio": reference}
                if part["type"] == "audio"
                else {"type": "text", "text": part["text"]}
                for part in message["content"]
            ],
        }
        for message in prompt
    ]


@cache
def row_schema() -> pa.Schema:
    """Arrow schema of a Parquet file, the same in all modes, so that files concatenate.

    Content parts say `path` instead of `audio`: Arrow gives every part every key, and the chat
    template of Qwen2.5-Omni takes any part that has a key `audio`, even a null one, for a clip.
    """
    import pyarrow as pa

    part = pa.struct({"type": pa.string(), "text": pa.string(), "path": pa.string()})
    message = pa.struct({"role": pa.string(), "content": pa.list_(part)})
    extra_info = pa.struct(
        {
            "id": pa.string(),
            "split": pa.string(),
            "index": pa.int64(),
            "mode": pa.string(),
            "label": pa.int64(),
            "question_seconds": pa.float64(),
            "audio_tokens": pa.int64(),
            "question_tokens": pa.int64(),
            "question_words": pa.int64(),
            "reference_tokens": pa.int64(),
            "reference_words": pa.int64(),
            "reference_seconds": pa.float64(),
            "teacher_verdict": pa.string(),
        }
    )
    return pa.schema(
        {
            "data_source": pa.string(),
            "prompt": pa.list_(message),
            "ability": pa.string(),
            "reward_model": pa.struct({"style": pa.string(), "ground_truth": pa.string()}),
            "extra_info": extra_info,
            "audio": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        }
    )
