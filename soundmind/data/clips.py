"""From a prepared Parquet file to the sound of a row, without torch or verl.

    reference   what a message carries in place of sound: the absolute path of a clip, or for clips
                embedded in a Parquet file `parquet:///.../train.parquet#17` (row, from 0)

Clip paths in the rows are relative to the data root, and the data root is recorded in the file's
schema metadata relative to the file: a data folder with its Parquet files can be moved as a whole.
Used by training (soundmind.training.dataset), evaluation and `soundmind.inspect`.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from soundmind.data.audio import Waveform, load_waveform

EMBEDDED = "parquet://"


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
    file, starts = open_parquet(path, os.stat(path).st_mtime_ns)
    group = int(np.searchsorted(starts, row, side="right")) - 1
    with _parquet_lock:  # Arrow's readers may not be shared between threads
        column = file.read_row_group(group, columns=["audio.bytes"], use_threads=False)["audio"]
    clip = column[row - int(starts[group])].as_py()
    return clip["bytes"] if clip else None


_parquet_lock = threading.Lock()


@lru_cache(maxsize=8)
def open_parquet(path: str, mtime_ns: int) -> tuple[pq.ParquetFile, npt.NDArray[np.int64]]:
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
