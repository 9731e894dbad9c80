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
from functools import lru_cache
from urllib.parse import quote, unquote

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from soundmind.data.audio import Waveform, load_waveform

EMBEDDED = "parquet://"


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
