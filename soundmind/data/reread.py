"""What `rows.read_rows` needs to know of a Parquet file that others may have saved again or moved.

pandas, datasets, polars and duckdb drop our schema metadata and choose their own types; links and moves
change where a file is reached from. So nothing about rows is taken from outside of them that can be
seen in them: which carry their sound, and, by durations, whether the clips found are theirs.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from soundmind.data.audio import ClipError, probe_clip
from soundmind.data.columns import row_schema
from soundmind.system.content import describe_bytes
from soundmind.system.errors import UserError
from soundmind.task.schema import METADATA_KEY

MEASURED_CLIPS = 8  # whose duration is compared with their rows; a wrong root is wrong for all
LARGEST_GROUP = 1 << 30  # bytes of sound in a row group, which is read whole for one clip of it
PREPARE = "python -m soundmind.preprocess"
_NAME_ROOT = "name the folder with the clips (data.audio_root, or --audio-root)"


class RowsError(UserError, ValueError):
    """A Parquet file whose rows cannot be used; the message says what to do."""


def open_rows(path: str) -> pq.ParquetFile:
    """The Parquet file `path`; RowsError says what another file is, OSError where there is none."""
    if not os.path.isfile(path):
        code = errno.EISDIR if os.path.isdir(path) else errno.ENOENT
        raise OSError(code, os.strerror(code), path)
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        with open(path, "rb") as file:
            head = file.read(4096)
        cut = head.startswith(b"PAR1")
        said = (
            "a Parquet file that was cut short"
            if cut
            else f"no Parquet file but {describe_bytes(head)}"
        )
        raise RowsError(f"{path} is {said}. Make it with: {PREPARE}") from error


def conformed(table: pa.Table, path: str) -> pa.Table:
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
                f"Make it again with: {PREPARE}"
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


def embedded_rows(
    file: pq.ParquetFile, metadata: dict[str, Any], path: str
) -> npt.NDArray[np.bool_]:
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


def data_roots(parquet: str) -> list[str]:
    """Folders that a Parquet file may have been made from, the most trusted one first."""
    metadata = pq.ParquetFile(parquet).schema_arrow.metadata or {}
    return list(dict.fromkeys(_roots(parquet, json.loads(metadata.get(METADATA_KEY, b"{}")))))


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


def require_clips(
    clips: Sequence[str | None], infos: Sequence[dict[str, Any]], path: str, all_of_them: bool
) -> None:
    """RowsError where questions that are heard have no clip; with `all_of_them` not even one may."""
    heard = [index for index, info in enumerate(infos) if info.get("mode") in ("audio", "dual")]
    lacking = [index for index in heard if clips[index] is None]
    if lacking and (all_of_them or len(lacking) == len(heard)):
        raise RowsError(
            f"{path}: row {lacking[0]} (id {infos[lacking[0]].get('id')}) is a question that is heard, "
            f"and its column audio holds neither a path nor bytes, as in {len(lacking)} rows of "
            f"{len(heard)}. Make the file again with: {PREPARE}"
        )


def check_clips(clips: Sequence[tuple[str, float | None]], path: str, need: bool) -> None:
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
