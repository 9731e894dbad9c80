"""Rows of a Parquet file, the one reader of them: each with a reference to its clip.

A row says what it needs, whoever wrote the file last. Sound that lies in the file is taken from it.
Where clips are files, their paths are relative to the data root, and that is looked for from the
Parquet file: where its schema metadata says, where a report of soundmind.preprocess beside it says,
or in a folder above that holds the clips. So a data folder can be moved as a whole or reached through
links, and its Parquet files can be saved again by other programs (soundmind.data.reread).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from soundmind.data.clips import embedded_reference
from soundmind.data.reread import (
    PREPARE,
    RowsError,
    check_clips,
    clip_root,
    conformed,
    embedded_rows,
    open_rows,
    require_clips,
)
from soundmind.task.schema import METADATA_KEY

CLIP_COLUMN = "_clip"  # reference to the row's clip, made at load time


def read_rows(
    path: str,
    original: str | None = None,
    root: str | None = None,
    *,
    needed: Sequence[str] = ("audio", "extra_info", "prompt"),
    need_clips: bool = True,
) -> pa.Table:
    """Rows of a Parquet file without embedded sound, with a column that refers to each clip.

    Columns have the types of `row_schema`, columns and fields of others are kept. `original` is the
    name before verl copied the file to local storage, `root` the folder of the clips in place of
    what is found. Raises RowsError, also where a `needed` column is not there, and FileNotFoundError
    where the clips are not there and `need_clips`.
    """
    file = open_rows(path)
    names = [name for name in file.schema_arrow.names if not name.startswith("__index_level_")]
    missing = [name for name in needed if name not in names]
    if missing:
        raise RowsError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(names)}. "
            f"Prepare the data with: {PREPARE}"
        )
    table = file.read(columns=[*(name for name in names if name != "audio"), "audio.path"])
    paths: list[str | None] = [None] * len(table)
    if "audio" in table.column_names:  # not where a writer found nothing in it but nulls
        paths = pc.struct_field(table["audio"], "path").to_pylist()
        table = table.drop_columns(["audio"])
    table = conformed(table, path)
    metadata = json.loads((file.schema_arrow.metadata or {}).get(METADATA_KEY, b"{}"))
    inside = embedded_rows(file, metadata, path)
    clips = [
        embedded_reference(os.path.abspath(path), index) if inside[index] else clip
        for index, clip in enumerate(paths)
    ]
    infos = table["extra_info"].to_pylist()
    require_clips(clips, infos, path, need_clips)
    outside = [index for index, clip in enumerate(clips) if clip and not inside[index]]
    if outside:
        folder = clip_root(original or path, metadata, root, [clips[i] or "" for i in outside])
        for index in outside:
            clips[index] = os.path.join(folder, clips[index] or "")
        seconds = [info.get("question_seconds") for info in infos]
        check_clips([(clips[i] or "", seconds[i]) for i in outside], path, need_clips)
    table = table.append_column(CLIP_COLUMN, pa.array(clips, pa.string()))
    return table.replace_schema_metadata(None)


def read_row(path: str, index: int, root: str | None = None) -> dict[str, Any]:
    """One row as Python values, `_clip` being the reference to its clip."""
    table = read_rows(path, root=root)
    if not 0 <= index < len(table):
        raise IndexError(f"{path} has rows 0 to {len(table) - 1}, asked for {index}")
    row: dict[str, Any] = table.slice(index, 1).to_pylist()[0]
    return row


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
