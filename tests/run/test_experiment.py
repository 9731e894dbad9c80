"""What is replaced under the same path makes another experiment."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf
from processes import REPOSITORY

from soundmind import preprocess
from soundmind.run.experiment import differences, experiment


@pytest.fixture
def place(random_stand_in: Path, tmp_path: Path) -> Path:
    """A folder with `model`, `adapter`, `data` (clips) and `data/parquet/audio`."""
    shutil.copytree(random_stand_in, tmp_path / "model")
    shutil.copytree(REPOSITORY / "data/sample", tmp_path / "data")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"weights")
    arguments = [
        "--mode",
        "audio",
        "--task",
        "practice",
        "--workers",
        "1",
        "--splits",
        "train",
        "dev",
    ]
    assert preprocess.main([*arguments, "--data-dir", str(tmp_path / "data")]) == 0
    return tmp_path


def of(place: Path) -> dict[str, Any]:
    """The experiment of a configuration that names what lies in `place`."""
    rows = place / "data/parquet/audio"
    return experiment(
        OmegaConf.create(
            {
                "data": {
                    "train_files": [str(rows / "train.parquet")],
                    "val_files": str(rows / "dev.parquet"),
                    "audio_root": None,
                },
                "actor_rollout_ref": {
                    "model": {
                        "path": str(place / "model"),
                        "lora_adapter_path": str(place / "adapter"),
                    }
                },
            }
        )
    )


def weight(place: Path) -> None:
    file = place / "model/model.safetensors"
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    start = 8 + length + header["thinker.lm_head.weight"]["data_offsets"][0]
    content[start] ^= 1
    file.write_bytes(content)


def appended(name: str) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        with (place / name).open("ab") as file:
            file.write(b" ")

    change.__name__ = name
    return change


def rows_swapped(place: Path) -> None:
    rows = place / "data/parquet/audio"
    shutil.copy(rows / "dev.parquet", rows / "train.parquet")


def validation_rows_halved(place: Path) -> None:
    file = place / "data/parquet/audio/dev.parquet"
    pq.write_table(pq.read_table(file).slice(0, 4), file)


def clip(place: Path) -> None:
    appended(str(next((place / "data/train").glob("*/question.wav")).relative_to(place)))(place)


def flip_last_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def sound_of_the_same_size(place: Path) -> None:
    flip_last_byte(next((place / "data/train").glob("*/question.wav")))


def last_weight(place: Path) -> None:
    flip_last_byte(place / "model/model.safetensors")


CHANGES: list[tuple[Callable[[Path], None], str]] = [
    (clip, "clips of"),
    (sound_of_the_same_size, "clips of"),
    (last_weight, "weights of"),
    (weight, "weights of"),
    (appended("model/tokenizer.json"), "tokenizer and settings of"),
    (appended("model/tokenizer_config.json"), "tokenizer and settings of"),
    (appended("model/chat_template.jinja"), "tokenizer and settings of"),
    (appended("model/config.json"), "tokenizer and settings of"),
    (appended("adapter/adapter_model.safetensors"), "adapter of"),
    (rows_swapped, "rows of"),
    (validation_rows_halved, "rows of"),
]


def test_each_thing_that_is_replaced_under_its_path_is_noticed(place: Path) -> None:
    before = of(place)
    assert of(place) == before
    for change, what in CHANGES:
        change(place)
        after = of(place)
        text = differences(before, after)
        assert what in text, f"{change.__name__}: {text!r}"
        before = after


def test_the_same_files_in_another_folder_differ_by_their_paths_alone(
    place: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other") / "copy"
    shutil.copytree(place, other)
    before, after = of(place), of(other)
    digests = [
        sorted(value for key, value in found.items() if " of " in key) for found in (before, after)
    ]
    assert digests[0] == digests[1]
