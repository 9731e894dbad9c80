"""Spoken rollouts that could not work are refused before Ray starts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import REPOSITORY, clean_environment

pytest.importorskip("verl")

from soundmind import preprocess
from soundmind.run.config import compose_config
from soundmind.run.speech_checks import speech_problems


@pytest.fixture(scope="module")
def overrides(random_stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A configuration whose rollouts can be spoken."""
    folder = tmp_path_factory.mktemp("parquet")
    arguments = ["--mode", "audio", "--task", "practice", "--workers", "1"]
    arguments += ["--data-dir", str(REPOSITORY / "data/sample"), "--output-dir", str(folder)]
    assert preprocess.main([*arguments, "--tokenizer", str(random_stand_in)]) == 0
    return [
        "speech.enable=true",
        f"data.train_files={folder / 'audio/train.parquet'}",
        f"actor_rollout_ref.model.path='{random_stand_in}'",
    ]


def problems(overrides: list[str], *more: str) -> list[str]:
    return list(speech_problems(compose_config("grpo_tiny_cpu", [*overrides, *more])))


def test_rollouts_that_can_be_spoken_have_no_problem(overrides: list[str]) -> None:
    assert problems(overrides) == []


def test_a_run_without_speech_is_not_asked(overrides: list[str]) -> None:
    assert problems(overrides, "speech.enable=false", "speech.speaker=Nobody") == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("speech.stage=sound", "choose codes or transcript"),
        ("speech.groups=0", "speech.groups=0"),
        ("speech.every=true", "speech.every=True"),
        ("speech.max_seconds=.nan", "a number from 0.04 to inf"),
        ("speech.rows=some", "auto, or a number above 0"),
        ("speech.speaker=Nobody", "it has ['Chelsie', 'Ethan']"),
        ("speech.max_seconds=655", "set speech.max_seconds=651 or less"),
        ("trainer.v1.trainer_mode=colocate_async", "the policy has moved on"),
        ("reward.custom_reward_function.reward_kwargs.preset=no_audio_rewards", "for nothing"),
        ("reward.custom_reward_function.path=pkg://mine", "not by pkg://mine"),
    ],
)
def test_a_problem_is_named(overrides: list[str], override: str, expected: str) -> None:
    found = problems(overrides, override)
    assert len(found) == 1 and expected in found[0], found


def test_a_recogniser_that_cannot_be_loaded_is_named(overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    where = f"speech.transcript.recogniser='{tmp_path}'"
    assert problems(overrides, where) == []  # nobody listens
    for listens in ("speech.stage=transcript", "speech.audit.every=5"):
        found = problems(overrides, where, listens)
        assert len(found) == 1 and "no Whisper model" in found[0], found


def test_a_folder_without_a_talker_is_named(
    random_stand_in: Path, overrides: list[str], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    poor = tmp_path / "poor"
    shutil.copytree(random_stand_in, poor)
    tensors = load_file(poor / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not name.startswith("talker.")}
    save_file(kept, poor / "model.safetensors", {"format": "pt"})
    found = problems(overrides, f"speech.model='{poor}'")
    assert len(found) == 1 and "weights of talker.*" in found[0]


def test_a_talker_of_another_width_is_named(
    random_stand_in: Path, overrides: list[str], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(random_stand_in, other)
    config = json.loads((other / "config.json").read_text())
    config["talker_config"]["embedding_size"] = 64
    (other / "config.json").write_text(json.dumps(config))
    found = problems(overrides, f"speech.model='{other}'")
    assert len(found) == 1 and "states of width 64, the policy's have 128" in found[0]


def test_rows_without_a_recorded_answer_are_counted(overrides: list[str], tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = Path(overrides[1].partition("=")[2])
    rows = pq.read_table(source).to_pylist()
    for row in rows[:3]:
        row["extra_info"]["reference_seconds"] = None
    path = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(source)), path)
    found = problems(overrides, f"data.train_files={path}")
    assert len(found) == 1 and f"3 of {len(rows)} rows have no reference_seconds" in found[0]


def test_the_command_refuses_and_starts_nothing(overrides: list[str], tmp_path: Path) -> None:
    result = subprocess.run(
        [
            *(sys.executable, "-m", "soundmind.train", "--config-name", "grpo_tiny_cpu"),
            *(*overrides, "speech.speaker=Nobody", f"run.root='{tmp_path}'"),
        ],
        cwd=REPOSITORY,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and "no voice 'Nobody'" in result.stderr
    assert "Traceback" not in result.stderr and not any(tmp_path.iterdir())
