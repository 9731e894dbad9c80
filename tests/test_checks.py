"""What is refused before Ray starts, and whether the message says what to do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import REPOSITORY, clean_environment

pytest.importorskip("verl")

from soundmind import checks, preprocess
from soundmind.train import compose_config


@pytest.fixture(scope="module")
def parquet(random_stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed sample as Parquet, audio mode."""
    folder = tmp_path_factory.mktemp("parquet")
    arguments = ["--mode", "audio", "--task", "practice", "--workers", "1"]
    arguments += ["--data-dir", str(REPOSITORY / "data/sample"), "--output-dir", str(folder)]
    assert preprocess.main([*arguments, "--tokenizer", str(random_stand_in)]) == 0
    return folder / "audio"


@pytest.fixture
def overrides(random_stand_in: Path, parquet: Path) -> list[str]:
    """A configuration that passes every check."""
    return [
        f"data.train_files={parquet / 'train.parquet'}",
        f"data.val_files={parquet / 'test.parquet'}",
        f"actor_rollout_ref.model.path='{random_stand_in}'",
    ]


def problems(overrides: list[str], *more: str, name: str = "grpo_tiny_cpu") -> list[str]:
    return list(checks.find_problems(compose_config(name, [*overrides, *more])))


def test_a_sound_configuration_has_no_problem(overrides: list[str]) -> None:
    assert problems(overrides) == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.train_files=nowhere.parquet", "soundmind.prepare --config-name grpo_tiny_cpu"),
        ("data.max_prompt_length=100", "set it to at least 128"),
        ("actor_rollout_ref.actor.ppo_mini_batch_size=5", "nearest that work: 15 or 20"),
        ("trainer.n_gpus_per_node=3", "do not divide over 3 ranks"),
        ("actor_rollout_ref.rollout.n=1", "use n >= 2"),
        ("actor_rollout_ref.rollout.max_model_len=200", "set it to at least 224"),
        ("actor_rollout_ref.actor.ppo_max_token_len_per_gpu=128", "below one sequence"),
        ("+custom_reward_function.path=mine.py", "verl 0.9.1 ignores it"),
        ("reward.custom_reward_function.path=null", "built-in scorers"),
        ("reward.custom_reward_function.reward_kwargs.preset=generous", "preset"),
        ("actor_rollout_ref.actor.ulysses_sequence_parallel_size=2", "must be 1"),
    ],
)
def test_a_problem_is_named_with_the_next_step(
    overrides: list[str], override: str, expected: str
) -> None:
    found = problems(overrides, override)
    assert any(expected in problem for problem in found), found


def test_a_missing_model_names_the_command_that_makes_it(overrides: list[str]) -> None:
    found = problems(overrides[:2], "actor_rollout_ref.model.path=checkpoints/nowhere")
    assert len(found) == 1
    assert "python -m soundmind.prepare" in found[0]


def test_a_folder_without_a_processor_is_never_trained_on_text(
    overrides: list[str], random_stand_in: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(random_stand_in, broken)
    (broken / "processor_config.json").unlink()
    found = problems(overrides[:2], f"actor_rollout_ref.model.path={broken}")
    assert any("silently drop the audio" in problem for problem in found), found


def test_a_processor_that_cuts_clips_is_refused(
    overrides: list[str], random_stand_in: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short"
    shutil.copytree(random_stand_in, short)
    file = short / "processor_config.json"
    settings: dict[str, Any] = json.loads(file.read_text())
    settings["feature_extractor"].update(chunk_length=30, n_samples=480_000, nb_max_frames=3_000)
    file.write_text(json.dumps(settings))
    found = problems(overrides[:2], f"actor_rollout_ref.model.path={short}")
    assert any("window is 30 s" in problem for problem in found), found


def test_missing_gpus_point_at_the_stand_in(overrides: list[str]) -> None:
    from soundmind.run_folder import gpu_names

    if gpu_names():
        pytest.skip("this machine has GPUs")
    found = problems([], name="grpo_7b_8gpu")
    assert any("CONFIG=grpo_tiny_cpu" in problem for problem in found)


def test_all_problems_are_reported_at_once(overrides: list[str]) -> None:
    found = problems(overrides, "actor_rollout_ref.rollout.n=1", "data.train_files=nowhere.parquet")
    assert len(found) >= 2


def test_the_prompt_count_is_what_the_processor_makes(parquet: Path, random_stand_in: Path) -> None:
    import soundfile

    from soundmind.processor import load_processor
    from soundmind.prompts import build_messages

    processor = load_processor(str(random_stand_in))
    row_id, tokens = checks.longest_prompt_tokens(str(parquet / "test.parquet"), processor)
    clip = REPOSITORY / "data/sample/test" / row_id / "question.wav"
    waveform, rate = soundfile.read(clip, dtype="float32")
    assert rate == 16_000
    messages = build_messages("audio", "", "clip", "practice")
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert len(processor(text=[text], audio=[waveform])["input_ids"][0]) == tokens


def test_the_command_exits_2_and_starts_nothing(tmp_path: Path) -> None:
    result = subprocess.run(
        [
            *(sys.executable, "-m", "soundmind.train", "--config-name", "grpo_tiny_cpu"),
            *("data.train_files=nowhere.parquet", f"run.root={tmp_path}"),
        ],
        cwd=REPOSITORY,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert "nowhere.parquet not found" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
