"""Folders of finished evaluations, made without a model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

CONFIG: dict[str, Any] = {
    "model": {
        "given": "some/model",
        "type": "qwen2_5_omni",
        "adapter": "Qwen2.5-Omni",
        "digest": "0" * 16,
        "stand_in": None,
    },
    "data": {
        "path": "test.parquet",
        "digest": "1" * 16,
        "data_source": "soundmind/alr",
        "split": "test",
        "mode": "audio",
        "rows": 0,
        "limit": None,
    },
    "output_modality": "text",
    "generation": {"max_tokens": 4096, "samples": 1, "temperature": 0.0, "batch_rows": 64},
    "reward": {"preset": "paper", "length_unit": "tokens"},
}


def vocabulary(size: int = 4000, seed: int = 0) -> list[str]:
    """Made-up words, so that a report compresses no better than with real ones."""
    generator = random.Random(seed)
    letters = "etaoinshrdlucmfw"
    return ["".join(generator.choices(letters, k=generator.randint(2, 9))) for _ in range(size)]


def saved_line(index: int, label: int, says: int | None, thinking: str = "So.") -> dict[str, Any]:
    """One line of predictions.jsonl; `says` is the label it commits to, None for no verdict."""
    verdicts = ("not-entailed", "entailed")
    closing = "I cannot say." if says is None else f"Answer: {verdicts[says]}"
    return {
        "index": index,
        "id": f"{index + 1:04d}",
        "split": "test",
        "mode": "audio",
        "data_source": "soundmind/alr",
        "sample": 0,
        "label": label,
        "ground_truth": verdicts[label],
        "prompt_tokens": 1500,
        "response": f"<think>{thinking}</think>\n{closing}",
        "response_tokens": 20 + len(thinking.split()),
        "finish_reason": "stop",
        "reference_tokens": 1000,
        "reference_words": 820,
        "seconds": 0.1,
        "error": None,
        "question": "",
        "question_seconds": 40.0 + index % 40,
        "question_audio": None,
        "teacher_verdict": verdicts[label],
    }


def save(folder: Path, lines: list[dict[str, Any]], **changes: Any) -> Path:
    """Write an evaluation folder; `changes` go into the configuration by dotted key."""
    config = OmegaConf.create(CONFIG)
    config.data.rows = len({line["index"] for line in lines})
    for key, value in changes.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, folder / "config.yaml")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "predictions.jsonl").write_text(text)
    return folder


def alr_test_lines(correct: int = 534, words: int = 820) -> list[dict[str, Any]]:
    """656 lines with the test split's labels, `correct` of them right, of published length."""
    generator = random.Random(1)
    table = vocabulary()
    labels = [0] * 360 + [1] * 296
    generator.shuffle(labels)
    right = set(generator.sample(range(656), correct))
    lines = []
    for index, label in enumerate(labels):
        thinking = " ".join(
            generator.choices(table, k=generator.randint(words // 2, words * 3 // 2))
        )
        lines.append(saved_line(index, label, label if index in right else 1 - label, thinking))
    return lines
