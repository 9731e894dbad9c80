"""The columns of a prepared Parquet file in Arrow's types; `task.schema.Row` says what they mean."""

from __future__ import annotations

from functools import cache

import pyarrow as pa


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
