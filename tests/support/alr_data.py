"""Fixtures: small data folders in the published layouts, made of noise."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

Rows = dict[str, int]


def alr_dev_file() -> Path:
    """The real dev annotations, or a skip where they are not at hand."""
    default = Path(__file__).resolve().parents[2] / "../shared/data/alr"
    path = Path(os.environ.get("SOUNDMIND_ALR_DIR", default)) / "dev.jsonl"
    if not path.is_file():
        pytest.skip(f"real annotations not at hand ({path}); set SOUNDMIND_ALR_DIR")
    return path


@pytest.fixture
def alr_dev() -> Path:
    return alr_dev_file()


def question_text(number: int) -> str:
    return (
        f'Let us look at these.\nMajor premise is "All things number {number} are warm".\n'
        f'Minor premise is "This is a thing number {number}".\nConclusion is "This is warm".'
    )


def write_clip(
    path: Path, seconds: float, *, rate: int = 24_000, seed: int = 0, **keys: Any
) -> None:
    """A clip of noise as loud as speech."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).standard_normal(round(seconds * rate)) * 0.1
    soundfile.write(path, noise, rate, **keys)


def annotation(number: int, label: int) -> dict[str, Any]:
    """One line of the GitHub layout; `number` sets id and text."""
    verdict = "entailed" if label else "not entailed"
    answer = f"Let me think about thing {number}.\n\nAnswer: {verdict}."
    return {
        "id": f"{number:04d}",
        "user_content": question_text(number),
        "answer": answer,
        "label": label,
    }


@pytest.fixture
def make_github(tmp_path: Path) -> Callable[..., Path]:
    """make_github({"train": 4}, seconds=1.0) -> data folder in the GitHub layout."""

    def make(rows: Rows, *, seconds: float = 1.0, name: str = "data", clips: bool = True) -> Path:
        root = tmp_path / name
        root.mkdir()
        offset = 0
        for split, count in rows.items():
            lines = [annotation(offset + i, i % 2) for i in range(count)]
            offset += count  # no text is in two splits
            write_lines(root / f"{split}.jsonl", lines)
            for line in lines if clips else []:
                folder = root / split / line["id"]
                seed = int(line["id"])
                write_clip(folder / "question.wav", seconds + seed / 50, seed=seed)
                write_clip(folder / f"answer_{line['label']}.wav", 2 * seconds, seed=seed + 1)
        return root

    return make


@pytest.fixture
def make_huggingface(tmp_path: Path) -> Callable[..., Path]:
    """make_huggingface({"dev": 3}) -> the same rows in the Hugging Face layout."""

    def make(rows: Rows, *, metadata: bool = True, name: str = "hub") -> Path:
        root = tmp_path / name
        offset = 0
        for split, count in rows.items():
            records = []
            for i in range(count):
                line = annotation(offset + i, i % 2)
                clip_folder = line["id"]
                record = {
                    "id": line["id"],
                    "question_file_name": f"{clip_folder}/question.wav",
                    "answer_file_name": f"{clip_folder}/answer_{line['label']}.wav",
                    "annotation_question": line["user_content"],
                    "annotation_answer": line["answer"],
                    "label": line["label"],
                }
                records.append(record)
                write_clip(root / split / record["question_file_name"], 1.0, seed=i)
                write_clip(root / split / record["answer_file_name"], 2.0, seed=i)
                (root / split / clip_folder / "annotation.json").write_text(json.dumps(record))
            offset += count
            if metadata:
                write_lines(root / split / "metadata.jsonl", records)
        return root

    return make


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")


@pytest.fixture
def noise_clip() -> Callable[..., None]:
    return write_clip


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level BPE tokenizer.json under the Qwen2 splitting rule."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    from soundmind.data.token_count import QWEN2_SPLIT

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|im_end|>", "<|AUDIO|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([question_text(i) for i in range(50)], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
