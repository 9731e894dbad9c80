"""The data set class that verl trains with: rows in, references to clips in the messages.

    data.custom_cls: {path: pkg://soundmind.training.dataset, name: AudioRLHFDataset}

What it does beyond verl's RLHFDataset:

* Messages carry a *reference* to the clip, never its samples: an absolute path, or for embedded
  clips `parquet:///.../train.parquet#17`. Messages are copied once per rollout and once more into
  every store they pass; 60 s of sound would be 3.8 MB each time.
* The agent loop calls `process_multi_modal_info` on the class; it decodes through
  `soundmind.data.clips`, once per prompt (`soundmind.training.agent_loop.PromptEncodings`).
* Prompt lengths come from the numbers stored at preprocessing; no clip is decoded at start-up.
  A prompt longer than `data.max_prompt_length`, or a clip longer than the processor's window, is
  an error that names the row and the number needed. With `data.filter_overlong_prompts=True` such
  rows are left out instead, and their number is printed.
* No other row is ever left out, and a row that cannot be read is an error.

Settings (all under `data`, all optional)

    curriculum       a saved evaluation of the training file, which orders it (soundmind.data.pass_rates)
    audio_root       folder that clip paths are relative to, instead of the one recorded in the
                     Parquet file (relative to the file, so that a data folder moves as a whole)

Reads the Parquet files of `soundmind.preprocess`; files of different modes may be mixed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from omegaconf import DictConfig
from verl.utils.dataset.rl_dataset import RLHFDataset

from soundmind.data.audio import MAX_CLIP_SECONDS
from soundmind.data.clips import load_clip
from soundmind.data.pass_rates import ORDERS, curriculum
from soundmind.data.rows import CLIP_COLUMN, read_rows, with_clip

logger = logging.getLogger(__name__)
LENGTH_SLACK = 8  # tokens; nearer than this to the limit a prompt is measured, not added up
_CHECKED_ROWS = 8  # rows on which the stored numbers are compared with the real prompt


class AudioRLHFDataset(RLHFDataset):
    """verl's RLHFDataset for the rows of `soundmind.preprocess`.

    An item has verl's keys (`raw_prompt`, `data_source`, `reward_model`, `extra_info`, `index`
    ...). `raw_prompt` is what `soundmind.task.prompts.build_messages` gives, with a reference to the
    clip. Waveforms appear only where the agent loop asks the class for them.
    """

    def _read_files_and_tokenize(self) -> None:
        """Load the rows without their embedded clips; verl calls this at start and at resume."""
        root = self.config.get("audio_root", None)
        tables = [
            read_rows(path, original, root)
            for path, original in zip(self.data_files, self.original_data_files, strict=True)
        ]
        rows = datasets.Dataset(pa.concat_tables(tables, promote_options="permissive"))
        if 0 < self.max_samples < len(rows):
            chosen: list[int] = list(range(self.max_samples))
            if self.shuffle:
                generator = np.random.default_rng(self.seed)
                chosen = generator.permutation(len(rows))[: self.max_samples].tolist()
            rows = rows.select(chosen)
        training = self.config.get("train_files")
        training = [training] if isinstance(training, str) else list(training or ())
        saved = self.config.get("curriculum", None)
        if saved and list(self.original_data_files) == training:  # validation keeps its order
            order = self.config.get("curriculum_order", ORDERS[0])
            rows = rows.select(curriculum(Path(saved), list(rows["extra_info"]), order))
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
        row["raw_prompt"] = with_clip(row.pop(self.prompt_key), row.pop(CLIP_COLUMN))
        row.pop("audio", None)
        info = row["extra_info"]
        row["index"] = info["index"]
        row["tools_kwargs"] = {}
        row["interaction_kwargs"] = {}
        row["dummy_tensor"] = torch.tensor([0], dtype=torch.uint8)  # verl's batches need a tensor
        return row

    @classmethod
    def _process_multi_modal_info(
        cls, messages: list[dict[str, Any]], image_patch_size: int, config: DictConfig
    ) -> tuple[Any, Any, Any]:
        """Images and videos (None), waveforms; verl calls this on the class, from threads."""
        return None, None, cls._extract_audio_info(messages)

    @classmethod
    def _extract_audio_info(cls, messages: list[dict[str, Any]]) -> Any:
        """Waveforms (float32 mono, 16 kHz) in the order of the messages; None without clips."""
        references = [
            part["audio"]
            for message in messages
            if isinstance(message.get("content"), list)
            for part in message["content"]
            if part.get("type") == "audio"
        ]
        return [load_clip(reference) for reference in references] or None


def _row_name(info: dict[str, Any]) -> str:
    return f"{info['split']}/{info['id']}"
