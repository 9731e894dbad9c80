"""The data set class of supervised fine-tuning: a prompt as rollouts see it, and its annotated chain.

    data.custom_cls: {path: pkg://soundmind.training.sft_dataset, name: ChainDataset}

verl's own class for this knows no audio. An item is one sequence, the prompt's tokens (placeholders
expanded, one an audio embedding) and the response's behind them, with the clip's features at true
length. The loss is on the response alone. Rows and responses come from `soundmind.data.chains`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch.utils.data import Dataset

from soundmind.data.chains import chains_of
from soundmind.data.clips import load_clip
from soundmind.data.rows import CLIP_COLUMN, with_clip


class ChainDataset(Dataset):
    """Sequences of prompt and annotated chain, built by verl's SFT trainer.

    An item holds `input_ids`, `position_ids`, `loss_mask` (length,) int64, `responses` (response
    tokens,) int64 and `multi_modal_inputs`: `input_features` (1, mel bins, mel frames) float32 and
    `feature_attention_mask` (1, mel frames), or nothing for a text row.
    """

    def __init__(
        self,
        parquet_files: str | Sequence[str],
        tokenizer: Any,
        config: DictConfig,
        processor: Any = None,
        max_samples: int = -1,
    ) -> None:
        if processor is None:
            raise ValueError(
                "no processor, so audio would be dropped; set "
                "model._target_=soundmind.training.model_config.OmniModelConfig"
            )
        self.processor = processor
        self.max_prompt_length = int(config.max_prompt_length)
        chains = chains_of(parquet_files, config, tokenizer, max_samples)
        self.rows = [row for part in chains for row in part.rows]
        self.responses = [ids for part in chains for ids in part.responses]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        messages = with_clip(row["prompt"], row[CLIP_COLUMN])
        text = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        clips = [load_clip(row[CLIP_COLUMN])] if row[CLIP_COLUMN] else None
        inputs = self.processor(text=[text], audio=clips, return_tensors="pt")
        prompt = inputs["input_ids"][0]
        if len(prompt) > self.max_prompt_length:
            info = row["extra_info"]
            raise ValueError(
                f"row {info['split']}/{info['id']} makes a prompt of {len(prompt)} tokens and "
                f"data.max_prompt_length is {self.max_prompt_length}"
            )
        response = torch.tensor(self.responses[index])
        mask = torch.cat([torch.zeros_like(prompt), torch.ones_like(response)])
        return {
            "input_ids": torch.cat([prompt, response]),
            "position_ids": torch.arange(len(mask)),
            "loss_mask": mask,
            "responses": response,
            "multi_modal_inputs": {
                name: inputs[name]
                for name in ("input_features", "feature_attention_mask")
                if name in inputs
            },
        }
