"""From a prepared Parquet file to the sound of a row, without torch or verl.

    reference   what a message carries in place of sound: the absolute path of a clip, or for clips
                embedded in a Parquet file `parquet:///.../train.parquet#17` (row, from 0)

Clip paths in the rows are relative to the data root, and the data root is recorded in the file's
schema metadata relative to the file: a data folder with its Parquet files can be moved as a whole.
Used by training (soundmind.dataset), evaluation and `soundmind.inspect`.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from soundmind.audio import Waveform, load_waveform
from soundmind.schema import METADATA_KEY

EMBEDDED = "parquet://"
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
    _, starts = _open_parquet(path, os.stat(path).st_mtime_ns)
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


class ClipCache:
    """Decoded clips, the least recently used ones dropped beyond `capacity` bytes. Thread-safe.

    Requests for a clip that another thread is decoding wait for it instead of decoding again.
    Waveforms are shared between callers and therefore read-only.
    """

    def __init__(self, load: Callable[[str], Waveform], capacity: int) -> None:
        self.capacity = capacity
        self.hits = 0
        self.decodes = 0
        self._load = load
        self._lock = threading.Lock()  # guards everything below; never held while decoding
        self._clips: OrderedDict[Any, Waveform] = OrderedDict()
        self._num_bytes = 0
        self._decoding: dict[Any, threading.Lock] = {}

    def get(self, reference: str) -> Waveform:
        """Samples of the clip: float32 mono at 16 kHz, shape (num_samples,)."""
        key = (reference, _file_version(reference))  # a file that was replaced is another clip
        waveform = self._lookup(key)
        if waveform is not None:
            return waveform
        with self._lock:
            decoding = self._decoding.setdefault(key, threading.Lock())
        with decoding:
            waveform = self._lookup(key)
            if waveform is not None:
                return waveform
            try:
                waveform = self._load(reference)
                waveform.flags.writeable = False
                self._store(key, waveform)
            finally:
                with self._lock:
                    self._decoding.pop(key, None)
        return waveform

    def clear(self) -> None:
        """Forget every clip and the counts."""
        with self._lock:
            self._clips.clear()
            self._num_bytes = self.hits = self.decodes = 0

    def _lookup(self, key: Any) -> Waveform | None:
        with self._lock:
            waveform = self._clips.get(key)
            if waveform is not None:
                self._clips.move_to_end(key)
                self.hits += 1
            return waveform

    def _store(self, key: Any, waveform: Waveform) -> None:
        with self._lock:
            self.decodes += 1
            self._clips[key] = waveform
            self._num_bytes += waveform.nbytes
            # the newest clip stays even if it alone is over capacity: its rollouts are waiting
            while self._num_bytes > self.capacity and len(self._clips) > 1:
                _, oldest = self._clips.popitem(last=False)
                self._num_bytes -= oldest.nbytes


def load_clip(reference: str) -> Waveform:
    """Decode what a message refers to: a path, or a row of a Parquet file with embedded clips."""
    if not reference.startswith(EMBEDDED):
        return load_waveform(reference)
    path, _, row = unquote(reference.removeprefix(EMBEDDED)).rpartition("#")
    clip = _embedded_clip(path, int(row))
    if clip is None:
        raise ValueError(f"{path}: row {row} holds no embedded clip")
    return load_waveform(clip)


def embedded_reference(path: str, row: int) -> str:
    """Reference to the clip embedded in row `row` (from 0) of a Parquet file."""
    return f"{EMBEDDED}{quote(f'{path}#{row}')}"


def _embedded_clip(path: str, row: int) -> bytes | None:
    """Encoded bytes of one clip; reads the row group that holds it (16 MiB of clips)."""
    file, starts = _open_parquet(path, os.stat(path).st_mtime_ns)
    group = int(np.searchsorted(starts, row, side="right")) - 1
    with _parquet_lock:  # Arrow's readers may not be shared between threads
        column = file.read_row_group(group, columns=["audio.bytes"], use_threads=False)["audio"]
    clip = column[row - int(starts[group])].as_py()
    return clip["bytes"] if clip else None


_parquet_lock = threading.Lock()


@lru_cache(maxsize=8)
def _open_parquet(path: str, mtime_ns: int) -> tuple[pq.ParquetFile, npt.NDArray[np.int64]]:
    """Footer of a Parquet file and the first row of each row group. Keyed by the file's time."""
    file = pq.ParquetFile(path)
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    return file, np.concatenate([[0], np.cumsum(sizes)])[:-1]


def _file_version(reference: str) -> tuple[int, int]:
    path = reference
    if reference.startswith(EMBEDDED):
        path = unquote(reference.removeprefix(EMBEDDED)).rpartition("#")[0]
    try:
        stat = os.stat(path)
    except OSError:
        return (-1, -1)  # loading it gives the error message
    return (stat.st_mtime_ns, stat.st_size)
