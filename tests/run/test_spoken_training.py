"""Two steps of training with spoken rollouts, through Ray, TransferQueue and vLLM on two ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import REPOSITORY, clean_environment

pytest.importorskip("verl")
pytest.importorskip("vllm")

pytestmark = pytest.mark.e2e
CODES = 24  # of half a second, the last token dropped as `generate` does


@pytest.fixture(scope="module")
def run(random_stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from soundmind import preprocess

    folder = tmp_path_factory.mktemp("spoken training")
    arguments = ["--mode", "audio", "--task", "practice", "--workers", "1"]
    arguments += [
        "--data-dir",
        str(REPOSITORY / "data/sample"),
        "--tokenizer",
        str(random_stand_in),
    ]
    assert preprocess.main([*arguments, "--output-dir", str(folder / "parquet")]) == 0
    command = [
        *(sys.executable, "-m", "soundmind.train", "--config-name", "grpo_tiny_cpu"),
        f"run.root='{folder / 'outputs'}'",
        f"data.train_files='{folder}/parquet/audio/train.parquet'",
        f"data.val_files='{folder}/parquet/audio/test.parquet'",
        f"actor_rollout_ref.model.path='{random_stand_in}'",
        "trainer.n_gpus_per_node=2",
        "data.train_batch_size=4",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.rollout.n=2",
        "trainer.total_training_steps=2",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        "trainer.val_before_train=false",
        "run.export=false",
        "speech.enable=true",
        "speech.max_seconds=0.5",
    ]
    result = subprocess.run(
        command, cwd=folder, env=clean_environment(), capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return next(folder.glob("outputs/*/*/metrics.jsonl")).parent


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def test_every_rollout_is_spoken_and_paid_for_its_length(run: Path) -> None:
    steps = [line for line in lines(run / "metrics.jsonl") if line["step"] > 0]
    assert [line["step"] for line in steps] == [1, 2]
    for step in steps:
        assert step["speech/rows"] == 8 and step["speech/failed"] == 0
        assert step["speech/codes/max"] == CODES
        assert 0 < step["reward/audio_length/mean"] < 1
        assert step["reward/audio_format/mean"] == 0  # the stage without a recogniser
        assert step["training/rollout_actor_probs_pearson_corr"] > 0.999


def test_a_dump_holds_what_was_spoken_and_scores_the_same_again(run: Path) -> None:
    dump = run / "rollouts/1.jsonl"
    spoken = [line["speech_tokens"] for line in lines(dump)]
    assert len(spoken) == 8 and all(0 < count <= CODES for count in spoken)
    again = subprocess.run(
        [
            sys.executable,
            "-m",
            "soundmind.rewards",
            str(dump),
            "--config",
            str(run / "config.yaml"),
        ],
        cwd=REPOSITORY,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    assert "0 of 8 lines differ now" in again.stdout, again.stdout
