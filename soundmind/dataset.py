"""The data set class that verl trains with: rows in, references to clips in the messages.

    data.custom_cls: {path: pkg://soundmind.dataset, name: AudioRLHFDataset}

What it does beyond verl's RLHFDataset:

* Messages carry a *reference* to the clip, never its samples: an absolute path, or for embedded
  clips `parquet:///.../train.parquet#17`. Messages are copied once per rollout and once more into
  every store they pass; 60 s of sound would be 3.8 MB each time.
* The agent loop calls `process_multi_modal_info` on the class; it decodes through
  `soundmind.audio`, once per clip however many rollouts ask for it at the same time (`ClipCache`).
* Prompt lengths come from the numbers stored at preprocessing; no clip is decoded at start-up.
  A prompt longer than `data.max_prompt_length`, or a clip longer than the processor's window, is
  an error that names the row and the number needed. With `data.filter_overlong_prompts=True` such
  rows are left out instead, and their number is printed.
* No other row is ever left out, and a row that cannot be read is an error.

Settings (all under `data`, all optional)

    audio_root       folder that clip paths are relative to, instead of the one recorded in the
                     Parquet file (relative to the file, so that a data folder moves as a whole)
    clip_cache_mib   memory for decoded clips in each process that decodes, 256 by default

Reads the Parquet files of `soundmind.preprocess`; files of different modes may be mixed.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from omegaconf import DictConfig
from verl.utils.dataset.rl_dataset import RLHFDataset

from soundmind.audio import MAX_CLIP_SECONDS, Waveform, load_waveform
from soundmind.schema import METADATA_KEY

logger = logging.getLogger(__name__)

EMBEDDED = "parquet://"
CLIP_CACHE_MIB = 256  # about 70 clips of a minute
LENGTH_SLACK = 8  # tokens; nearer than this to the limit a prompt is measured, not added up
_CHECKED_ROWS = 8  # rows on which the stored numbers are compared with the real prompt
_CLIP_COLUMN = "_clip"  # reference to the row's clip, made at load time


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
def _open_parquet(path: str, mtime_ns: int) -> tuple[pq.ParquetFile, np.ndarray]:
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


class AudioRLHFDataset(RLHFDataset):
    """verl's RLHFDataset for the rows of `soundmind.preprocess`.

    An item has verl's keys (`raw_prompt`, `data_source`, `reward_model`, `extra_info`, `index`
    ...). `raw_prompt` is what `soundmind.prompts.build_messages` gives, with a reference to the
    clip. Waveforms appear only where the agent loop asks the class for them.
    """

    clips = ClipCache(load_clip, CLIP_CACHE_MIB << 20)  # of this process, shared by all its loops

    def _read_files_and_tokenize(self) -> None:
        """Load the rows without their embedded clips; verl calls this at start and at resume."""
        root = self.config.get("audio_root", None)
        tables = [
            read_rows(path, original, root)
            for path, original in zip(self.data_files, self.original_data_files, strict=True)
        ]
        rows = datasets.Dataset(pa.concat_tables(tables))
        if 0 < self.max_samples < len(rows):
            chosen = np.arange(self.max_samples)
            if self.shuffle:
                generator = np.random.default_rng(self.seed)
                chosen = generator.choice(len(rows), size=self.max_samples, replace=False)
            rows = rows.select(chosen.tolist())
        self.dataframe = self.maybe_filter_out_long_prompts(rows)
        logger.info("%d rows from %s", len(self.dataframe), ", ".join(self.original_data_files))

    def maybe_filter_out_long_prompts(self, dataframe: datasets.Dataset = None) -> datasets.Dataset:
        """Refuse rows that do not fit, or leave them out if `data.filter_overlong_prompts`."""
        lengths = self.prompt_lengths(dataframe)
        infos = list(dataframe["extra_info"])
        too_long = {
            index: f"needs {length} tokens"
            for index, length in enumerate(lengths)
            if length > self.max_prompt_length
        }
        for index, info in enumerate(infos):
            if info["audio_tokens"] and (info["question_seconds"] or 0) > MAX_CLIP_SECONDS:
                too_long[index] = (
                    f"has a clip of {info['question_seconds']:.1f} s, and the processor hears only "
                    f"{MAX_CLIP_SECONDS} s"
                )
        if not too_long:
            return dataframe
        if not self.filter_overlong_prompts:
            index, reason = max(too_long.items(), key=lambda item: int(lengths[item[0]]))
            raise ValueError(
                f"{len(too_long)} of {len(dataframe)} prompts do not fit "
                f"data.max_prompt_length={self.max_prompt_length}. Row {_row_name(infos[index])} "
                f"{reason}. Set data.max_prompt_length={int(lengths.max())} or more, or leave such "
                "rows out with data.filter_overlong_prompts=True"
            )
        kept = [index for index in range(len(dataframe)) if index not in too_long]
        if not kept:
            raise ValueError(
                f"none of the {len(dataframe)} prompts fits data.max_prompt_length="
                f"{self.max_prompt_length}; the longest needs {int(lengths.max())} tokens"
            )
        print(
            f"left out {len(too_long)} of {len(dataframe)} rows: prompt longer than "
            f"data.max_prompt_length={self.max_prompt_length} or clip longer than "
            f"{MAX_CLIP_SECONDS} s; the longest prompt needs {int(lengths.max())} tokens"
        )
        return dataframe.select(kept)

    def prompt_lengths(self, rows: datasets.Dataset) -> np.ndarray:
        """Tokens of every prompt after the chat template, clips expanded: int64, shape (rows,).

        Added up from the numbers stored in the rows. Prompts near or over the limit are measured
        exactly, and all are if the stored numbers do not fit this tokenizer.
        """
        infos, prompts = list(rows["extra_info"]), list(rows[self.prompt_key])
        added = self._added_up_lengths(infos, prompts)
        if added is None:
            return np.array(
                [self._measured_length(*row) for row in zip(prompts, infos, strict=True)]
            )
        for index in np.flatnonzero(added > self.max_prompt_length - LENGTH_SLACK):
            added[index] = self._measured_length(prompts[index], infos[index])
        return added

    def _added_up_lengths(
        self, infos: Sequence[dict[str, Any]], prompts: Sequence[list[dict[str, Any]]]
    ) -> np.ndarray | None:
        """Frame + question + clip for every row; None where the stored numbers cannot be used."""
        if any(info["question_tokens"] is None for info in infos):
            logger.info("rows without token counts: every prompt is tokenized at start-up")
            return None
        frames: dict[Any, int] = {}  # tokens of everything but question and clip
        lengths = np.zeros(len(infos), dtype=np.int64)
        for index, (prompt, info) in enumerate(zip(prompts, infos, strict=True)):
            parts = [part for message in prompt for part in message["content"]]
            kinds = tuple(part["type"] for part in parts)
            key = (kinds, info["mode"], parts[-1]["text"])
            stored = info["audio_tokens"]
            if info["mode"] in ("text", "dual"):
                stored += info["question_tokens"]
            if key not in frames:
                frames[key] = self._measured_length(prompt, info) - stored
            lengths[index] = frames[key] + stored
        chosen = {*np.linspace(0, len(infos) - 1, _CHECKED_ROWS, dtype=int), lengths.argmax()}
        for index in chosen:
            measured = self._measured_length(prompts[index], infos[index])
            if abs(int(lengths[index]) - measured) > LENGTH_SLACK:
                logger.warning(
                    "row %s: %d prompt tokens by the stored counts, %d with this tokenizer; every "
                    "prompt is tokenized instead (prepare the data with --tokenizer set to the "
                    "model in use to save this)",
                    _row_name(infos[index]), lengths[index], measured,
                )  # fmt: skip
                return None
        return lengths

    def _measured_length(self, prompt: list[dict[str, Any]], info: dict[str, Any]) -> int:
        """Exact prompt length: rendered, tokenized, each placeholder counted as its clip."""
        messages = with_clip(prompt, "")
        renderer = self.processor if self.processor is not None else self.tokenizer
        text = renderer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **self.apply_chat_template_kwargs
        )
        tokenizer = getattr(self.processor, "tokenizer", None) or self.tokenizer
        count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        has_clip = any(p["type"] == "audio" for m in prompt for p in m["content"])
        return count + (info["audio_tokens"] - 1 if has_clip else 0)

    def __getitem__(self, item: int) -> dict[str, Any]:
        """verl's item; `raw_prompt` refers to the clip and nothing else does."""
        row: dict[str, Any] = dict(self.dataframe[item])
        row["raw_prompt"] = with_clip(row.pop(self.prompt_key), row.pop(_CLIP_COLUMN))
        row.pop("audio", None)
        info = row["extra_info"]
        row["index"] = info["index"]
        row["tools_kwargs"] = {}
        row["interaction_kwargs"] = {}
        row["dummy_tensor"] = torch.tensor([0], dtype=torch.uint8)  # verl's batches need a tensor
        return row

    @classmethod
    def _process_multi_modal_info(  # type: ignore[override]  # verl's annotation leaves out None
        cls, messages: list[dict[str, Any]], image_patch_size: int, config: DictConfig
    ) -> tuple[None, None, list[Waveform] | None]:
        """Decode the clips of a prompt; verl calls this on the class, from a pool of threads."""
        cls.clips.capacity = int(config.get("clip_cache_mib", None) or CLIP_CACHE_MIB) << 20
        return None, None, cls._extract_audio_info(messages)

    @classmethod
    def _extract_audio_info(  # type: ignore[override]
        cls, messages: list[dict[str, Any]]
    ) -> list[Waveform] | None:
        """Waveforms (float32 mono, 16 kHz) in the order of the messages; None without clips."""
        references = [
            part["audio"]
            for message in messages
            if isinstance(message.get("content"), list)
            for part in message["content"]
            if part.get("type") == "audio"
        ]
        return [cls.clips.get(reference) for reference in references] or None


def read_rows(path: str, original: str | None = None, root: str | None = None) -> pa.Table:
    """Rows of a Parquet file without embedded clips, with a column that refers to each clip.

    `original` is the name before verl copied the file to local storage: the recorded data root is
    relative to that. `root` replaces it. Raises FileNotFoundError where the clips are not there.
    """
    file = pq.ParquetFile(path)
    names = [name for name in file.schema_arrow.names if name != "audio"]
    table = file.read(columns=[*names, "audio.path"])
    paths = [clip["path"] if clip else None for clip in table["audio"].to_pylist()]
    metadata = json.loads((file.schema_arrow.metadata or {}).get(METADATA_KEY, b"{}"))
    if metadata.get("embedded"):
        where = os.path.abspath(path)
        clips = [embedded_reference(where, i) if clip else None for i, clip in enumerate(paths)]
    else:
        folder = clip_root(original or path, metadata, root)
        clips = [os.path.join(folder, clip) if clip else None for clip in paths]
        _check_first_clip(clips, path)
    table = table.drop_columns(["audio"]).append_column(_CLIP_COLUMN, pa.array(clips, pa.string()))
    return table.replace_schema_metadata(None)


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


def _row_name(info: dict[str, Any]) -> str:
    return f"{info['split']}/{info['id']}"
