"""How long the longest prompt of a prepared file is, in tokens of the model."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any


def longest_prompt_tokens(path: str, processor: Any) -> tuple[str, int]:
    """Id and exact token count of the longest prompt in a Parquet file, without decoding a clip.

    A clip's tokens are stored in its row; text is rendered and counted once per distinct wording.
    """
    import pyarrow.parquet as parquet

    @lru_cache(maxsize=100_000)
    def text_tokens(messages: str) -> int:
        rendered = processor.apply_chat_template(
            json.loads(messages), tokenize=False, add_generation_prompt=True
        )
        return len(processor.tokenizer(rendered)["input_ids"])

    longest = ("none", 0)
    for batch in parquet.ParquetFile(path).iter_batches(columns=["prompt", "extra_info"]):
        for row in batch.to_pylist():
            messages, clips = _without_clips(row["prompt"])
            info = row["extra_info"]
            # Each clip's one placeholder token gives way to its audio tokens.
            tokens = text_tokens(json.dumps(messages)) + (info["audio_tokens"] - 1) * clips
            longest = max(longest, (str(info["id"]), tokens), key=lambda found: found[1])
    return longest


def _without_clips(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Messages with every clip replaced by a constant, and how many clips there were."""
    clips = 0
    plain = []
    for message in messages:
        parts = []
        for part in message["content"]:
            if part["type"] == "audio":
                clips += 1
                parts.append({"type": "audio", "audio": "clip"})
            else:
                parts.append({"type": part["type"], "text": part["text"]})
        plain.append({"role": message["role"], "content": parts})
    return plain, clips
