"""Rows of a Parquet file, the one reader of them: their schema, and a reference to each clip.

A row says what it needs, whoever wrote the file last. Sound that lies in the file is taken from it.
Where clips are files, their paths are relative to the data root, and that is looked for from the
Parquet file: where its schema metadata says, where a report of soundmind.preprocess beside it says,
or in a folder above that holds the clips. So a data folder can be moved as a whole or reached through
links, and its Parquet files can be saved again by pandas, datasets, polars or duckdb, which drop that
metadata and choose their own types. Some clips are measured against the durations in their rows:
those of another data set, found under the same names, are refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from soundmind.data.audio import ClipError, probe_clip
from soundmind.data.clips import embedded_reference
from soundmind.system.content import describe_bytes
from soundmind.system.errors import UserError
from soundmind.task.schema import METADATA_KEY

CLIP_COLUMN = "_clip"  # reference to the row's clip, made at load time
MEASURED_CLIPS = 8  # whose duration is compared with their rows; a wrong root is wrong for all
LARGEST_GROUP = 1 << 30  # bytes of sound in a row group, which is read whole for one clip of it
_PREPARE = "python -m soundmind.preprocess"
_NAME_ROOT = "name the folder with the clips (data.audio_root, or --audio-root)"


class RowsError(UserError, ValueError):
    """A Parquet file whose rows cannot be used; the message says what to do."""


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
    what is found. Raises RowsError, also without the `needed` columns, and with `need_clips` FileNotFoundError where they are not there.
    """
    file = _open(path)
    names = [name for name in file.schema_arrow.names if not name.startswith("__index_level_")]
    missing = [name for name in needed if name not in names]
    if missing:
        raise RowsError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(names)}. "
            f"Prepare the data with: {_PREPARE}"
        )
    table = file.read(columns=[*(name for name in names if name != "audio"), "audio.path"])
    paths: list[str | None] = [None] * len(table)
    if "audio" in table.column_names:  # not where a writer found nothing in it but nulls
        paths = pc.struct_field(table["audio"], "path").to_pylist()
        table = table.drop_columns(["audio"])
    table = _conformed(table, path)
    metadata = json.loads((file.schema_arrow.metadata or {}).get(METADATA_KEY, b"{}"))
    inside = _embedded(file, metadata, path)
    clips = [
        embedded_reference(os.path.abspath(path), index) if inside[index] else clip
        for index, clip in enumerate(paths)
    ]
    outside = [index for index, clip in enumerate(clips) if clip and not inside[index]]
    if outside:
        folder = clip_root(original or path, metadata, root, [clips[i] or "" for i in outside])
        for index in outside:
            clips[index] = os.path.join(folder, clips[index] or "")
        seconds = pc.struct_field(table["extra_info"], "question_seconds").to_pylist()
        _check_clips([(clips[i] or "", seconds[i]) for i in outside], path, need_clips)
    table = table.append_column(CLIP_COLUMN, pa.array(clips, pa.string()))
    return table.replace_schema_metadata(None)


def read_row(path: str, index: int, root: str | None = None) -> dict[str, Any]:
    """One row as Python values, `_clip` being the reference to its clip."""
    table = read_rows(path, root=root)
    if not 0 <= index < len(table):
        raise IndexError(f"{path} has rows 0 to {len(table) - 1}, asked for {index}")
    row: dict[str, Any] = table.slice(index, 1).to_pylist()[0]
    return row


def _open(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, FileNotFoundError) or not os.path.isfile(path):
            raise
        with open(path, "rb") as file:
            kind = describe_bytes(file.read(4096))
        cut = " that was cut short" if kind == "a Parquet file" else ""
        raise RowsError(
            f"{path} is no Parquet file but {kind}{cut}. Make it with: {_PREPARE}"
        ) from error


def _conformed(table: pa.Table, path: str) -> pa.Table:
    """The columns we know in the types we know."""
    for index, field in enumerate(table.schema):
        if field.name not in row_schema().names:
            continue
        wanted = _widened(row_schema().field(field.name).type, field.type)
        if field.type == wanted:
            continue
        try:
            column = pa.array(table[field.name].to_pylist(), wanted)
        except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError) as error:
            raise RowsError(
                f"{path} has another layout inside its column {field.name} ({field.type}: {error}). "
                f"Make it again with: {_PREPARE}"
            ) from error
        table = table.set_column(index, field.name, column)
    return table


def _widened(known: pa.DataType, found: pa.DataType) -> pa.DataType:
    """`known` with the fields that only `found` has, without those that it lacks."""
    if pa.types.is_list(known) and hasattr(found, "value_type"):
        return pa.list_(_widened(known.value_type, found.value_type))
    if not (pa.types.is_struct(known) and pa.types.is_struct(found)):
        return known
    theirs = {field.name: field.type for field in found}
    ours = {field.name: field.type for field in known}
    both = {name: _widened(kind, theirs[name]) for name, kind in ours.items() if name in theirs}
    return pa.struct({**both, **{name: theirs[name] for name in theirs if name not in ours}})


def _embedded(file: pq.ParquetFile, metadata: dict[str, Any], path: str) -> npt.NDArray[np.bool_]:
    """Which rows carry their sound: bool, shape (rows,). Read from statistics where they say."""
    leaves = [file.schema.column(i).path for i in range(len(file.schema.names))]
    found = [np.zeros(0, bool)]
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        if "audio.bytes" not in leaves:
            found.append(np.zeros(group.num_rows, bool))
            continue
        chunk = group.column(leaves.index("audio.bytes"))
        statistics = chunk.statistics
        nulls = (
            statistics.null_count if statistics is not None and statistics.has_null_count else None
        )
        if nulls == group.num_rows:
            found.append(np.zeros(group.num_rows, bool))
            continue
        if chunk.total_uncompressed_size > LARGEST_GROUP:
            raise RowsError(
                f"{path} keeps {chunk.total_uncompressed_size / 1e9:.0f} GB of sound in one row group, "
                "all of which would be read for every clip. Save it again with small groups, e.g. "
                "to_parquet(..., row_group_size=16)"
            )
        if nulls == 0 or (nulls is None and metadata.get("embedded")):
            found.append(np.ones(group.num_rows, bool))
            continue
        column = file.read_row_group(number, columns=["audio.bytes"])["audio"]
        sound = pc.is_valid(pc.struct_field(column, "bytes"))
        found.append(np.array(sound.to_pylist(), bool))
    return np.concatenate(found)


def clip_root(
    parquet: str, metadata: dict[str, Any], override: str | None, wanted: Sequence[str]
) -> str:
    """Absolute data root of a Parquet file: `override`, or where some of `wanted` are found."""
    if override is not None:
        return os.path.abspath(override)
    places = list(dict.fromkeys(_roots(parquet, metadata)))
    for place in places:
        if any(os.path.isfile(os.path.join(place, clip)) for clip in wanted[:16]):
            return place
    if "root" in metadata:
        return places[0]
    raise RowsError(
        f"{parquet} does not say where its clips are (saved again by another program?), and no folder "
        f"above it holds {wanted[0]}; {_NAME_ROOT}"
    )


def _roots(parquet: str, metadata: dict[str, Any]) -> Iterator[str]:
    """Where the data root may lie, the most trusted place first."""
    folder = os.path.dirname(os.path.abspath(parquet))
    # Written relative to where the file really lies; but links of a cache lead to one of blobs.
    bases = (os.path.dirname(os.path.realpath(parquet)), os.path.realpath(folder), folder)
    root = metadata.get("root")
    if root is None:
        try:
            report = json.loads(Path(folder, "report.json").read_text("utf-8"))
            root = report["options"]["data_root"]
        except (OSError, ValueError, KeyError, TypeError):
            root = None
    if root is not None:
        yield from (os.path.normpath(os.path.join(base, root)) for base in bases)
    if "root" not in metadata:
        for base in bases:
            yield from (os.fspath(place) for place in (Path(base), *Path(base).parents))


def _check_clips(clips: Sequence[tuple[str, float | None]], path: str, need: bool) -> None:
    """A wrong root is wrong for every clip: say so at start, not at the first rollout."""
    first = clips[0][0]
    if need and not os.path.isfile(first):
        raise FileNotFoundError(
            f"{path} refers to {first}, which is not there. Move the data folder as a whole, "
            f"{_NAME_ROOT}, or run soundmind.preprocess again"
        )
    for index in np.unique(np.linspace(0, len(clips) - 1, MEASURED_CLIPS).astype(int)):
        clip, seconds = clips[index]
        try:
            measured = probe_clip(clip, check_sound=False).seconds
        except ClipError:
            continue  # it has gone or is damaged: said where it is loaded
        if seconds is not None and abs(measured - seconds) > 1e-3:
            raise RowsError(
                f"{path}: {clip} lasts {measured:.3f} s and its row says {seconds:.3f} s, so it is not "
                f"the clip that was prepared; {_NAME_ROOT}, or run soundmind.preprocess again"
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
