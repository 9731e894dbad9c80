"""Algorithms by one word: each composes, dry-runs and trains; GDPO's components and DAPO's bound."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("verl")

from algorithm_words import words
from processes import REPOSITORY, clean_environment

from soundmind import preprocess
from soundmind.run.config import CONFIG_DIR, ConfigError, compose_config
from soundmind.run.supported import unsupported
from soundmind.task.length_rules import overlong
from soundmind.task.reward import compute_score
from soundmind.task.reward_settings import resolve
from soundmind.training.algorithms import RecipeTrainer, add_components, groups_without_signal

WORDS = {
    *("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp"),
    *("reinforce_pp_baseline", "sapo", "gdpo"),
}
composed = lru_cache(compose_config)


@pytest.fixture(scope="module")
def trained(random_stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process made of every word: see tests/support/algorithm_words.py."""
    folder = tmp_path_factory.mktemp("words")
    arguments = ["--mode", "audio", "--task", "practice", "--workers", "1"]
    arguments += ["--data-dir", str(REPOSITORY / "data/sample"), "--output-dir", str(folder)]
    assert preprocess.main([*arguments, "--tokenizer", str(random_stand_in)]) == 0
    script = REPOSITORY / "tests/support/algorithm_words.py"
    command = [sys.executable, "-W", "ignore", str(script), "--model", str(random_stand_in)]
    command += ["--parquet", str(folder / "audio/train.parquet")]
    command += ["--rendezvous", str(folder / "rendezvous"), "--output", str(folder / "out.json")]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=clean_environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return found


def test_the_ten_words_are_the_files() -> None:
    assert set(words()) == WORDS


@pytest.mark.parametrize("word", sorted(WORDS))
def test_a_word_names_its_source_and_changes_only_where_it_says(word: str) -> None:
    head = (CONFIG_DIR / "algorithm" / f"{word}.yaml").read_text().split("defaults:")[0]
    assert "arXiv" in head
    config = composed("grpo_7b_8gpu", (f"algorithm={word}",))
    assert config.algorithm.adv_estimator
    assert config.data == composed("grpo_7b_8gpu").data


@pytest.mark.parametrize("word", sorted(WORDS))
def test_a_word_passes_the_dry_run_and_trains_two_steps(trained: dict[str, Any], word: str) -> None:
    result = trained[word]
    assert result["problems"] == []
    assert "all checks passed" in result["text"]
    assert all(math.isfinite(loss) for loss in result["losses"])
    assert result["moved"] > 10
    assert len({round(value, 6) for value in result["advantages"]}) >= 8


def test_a_word_that_does_not_exist_shows_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean algorithm=dapo\? There are: cispo, dapo"):
        compose_config("grpo_tiny_cpu", ["algorithm=dappo"])
    with pytest.raises(ConfigError, match="Did you mean length=capped"):
        compose_config("grpo_tiny_cpu", ["length=caped"])


def test_a_word_means_the_same_on_every_experiment() -> None:
    first, second = (
        composed(name, ("algorithm=dapo",))
        for name in ("reinforce_pp_7b_8gpu", "grpo_7b_8gpu_fast")
    )
    for key in (
        "clip_ratio_low",
        "clip_ratio_high",
        "clip_ratio_c",
        "loss_agg_mode",
        "use_kl_loss",
    ):
        assert first.actor_rollout_ref.actor[key] == second.actor_rollout_ref.actor[key]
    assert first.algorithm.adv_estimator == second.algorithm.adv_estimator == "grpo"
    assert first.algorithm.filter_groups == second.algorithm.filter_groups
    assert not first.algorithm.use_kl_in_reward


def test_gdpo_normalises_each_component_by_itself() -> None:
    """A common component does not drown a rare one: both move their responses by as much."""
    from verl import DataProto
    from verl.trainer.ppo.core_algos import compute_gdpo_outcome_advantage

    infos = [{"answer": float(i == 0), "text_length": float(i == 1)} for i in range(4)]
    for info in infos:
        info["text_length"] *= 0.01  # a hundredth of the other's range
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]])
    data = DataProto.from_dict(tensors={"response_mask": mask})
    add_components(data, infos, ["answer", "text_length"])
    found, _ = compute_gdpo_outcome_advantage(
        token_level_rewards=torch.zeros(4, 3),
        response_mask=mask,
        index=np.array(["a"] * 4, dtype=object),
        config={"gdpo_reward_keys": ["answer", "text_length"]},
        non_tensor_batch=data.non_tensor_batch,
        batch=data.batch,
    )
    assert found[0, 0].item() == pytest.approx(found[1, 0].item(), rel=1e-2)
    assert found[2, 0].item() < 0 < found[0, 0].item()
    assert found[0, 2] == 0 and found[2, 1] == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.gdpo_reward_keys=[fluency]"], "gdpo_reward_keys: fluency; use one of"),
        (["algorithm.gdpo_reward_keys=null"], "gdpo_reward_keys: nothing"),
        (["algorithm.gdpo_reward_weights=[1.0]"], "has 1 numbers for 3"),
        (["algorithm.use_kl_in_reward=true"], "would lose the penalty"),
    ],
)
def test_gdpo_of_components_that_no_reward_returns_is_refused(
    overrides: list[str], message: str
) -> None:
    config = compose_config("grpo_tiny_cpu", ["algorithm=gdpo", *overrides])
    assert message in "\n".join(unsupported(config))


def test_dapo_on_a_measure_that_no_reward_returns_is_refused() -> None:
    wrong = ["algorithm=dapo", "algorithm.filter_groups.metric=seq_reward"]
    config = compose_config("grpo_tiny_cpu", wrong)
    assert "algorithm.filter_groups.metric=seq_reward" in "\n".join(unsupported(config))


def test_dapo_gives_up_with_the_next_step_where_no_group_differs() -> None:
    trainer = object.__new__(RecipeTrainer)
    trainer.config = composed("grpo_tiny_cpu", ("algorithm=dapo",))
    trainer.global_steps = 7
    submitted: list[int] = []
    stock = "verl.trainer.ppo.v1.trainer_base.PPOTrainer._add_prompts_to_generate"
    with mock.patch(stock, lambda self, count: submitted.append(count)):
        for _ in range(9):  # beside the step's own batch of 16
            trainer._add_prompts_to_generate(16)
        with pytest.raises(RuntimeError, match="step 7: 10 batches of 16 prompts did not bring 16"):
            trainer._add_prompts_to_generate(16)
    assert sum(submitted) == 144


def test_the_features_of_groups_that_dapo_evicted_are_gone_after_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """verl clears an evicted group's prompt and rollouts, and so nothing holds its features."""
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    from soundmind.training import feature_store

    tag = {feature_store.SECONDS: 0.1, feature_store.BYTES: 8}
    store: dict[str, dict[str, Any]] = {
        "features": {"kept": tag, "evicted": tag},
        "train": {
            "evicted": {"is_prompt": True, "status": "finished", "global_steps": 1},
            **{f"evicted_{session}_0": {} for session in range(2)},
            **{f"kept_{session}_0": {} for session in range(2)},
        },
    }

    def kv_clear(keys: list[str], partition_id: str) -> None:
        for key in keys:
            store[partition_id].pop(key, None)

    def kv_list(partition_id: str | None = None) -> dict[str, Any]:
        return {name: dict(rows) for name, rows in store.items() if partition_id in (None, name)}

    fake = SimpleNamespace(kv_clear=kv_clear, kv_list=kv_list)
    monkeypatch.setattr("verl.trainer.ppo.v1.replay_buffer.tq", fake)
    monkeypatch.setattr(feature_store, "tq", fake)
    buffer = ReplayBuffer(
        "sync", SimpleNamespace(), None, "drop", None, refill_fn=print, filter_groups_metric="acc"
    )
    buffer._sync_metadata_from_transfer_queue()
    buffer._clear_groups("train", {"evicted"})
    metrics = feature_store.clear_spent([f"kept_{session}_0" for session in range(2)])
    assert metrics["features/prompts"] == 2 and metrics["features/left"] == 0
    assert store["features"] == {} and all(key.startswith("kept") for key in store["train"])


def test_groups_whose_responses_all_earn_the_same_are_counted() -> None:
    infos = [{"uid": f"a_{i}_0", "score": 1.0} for i in range(3)]
    infos += [{"uid": f"b_{i}_0", "score": float(i)} for i in range(3)]
    assert groups_without_signal(infos) == {"rollout/groups_without_signal": 0.5}
    assert groups_without_signal([]) == {}


@pytest.mark.parametrize(
    ("tokens", "value"), [(None, 0.0), (10, 0.0), (80, 0.0), (90, 0.5), (100, 1.0), (120, 1.0)]
)
def test_overlong_rises_over_the_last_part_of_the_budget(tokens: int | None, value: float) -> None:
    row = {"response_tokens": tokens}
    assert overlong("", row, limit=100, buffer=0.2) == pytest.approx(value)


def test_dapo_s_price_reaches_the_score_with_the_experiment_s_budget() -> None:
    from omegaconf import OmegaConf

    config = composed("grpo_tiny_cpu", ("algorithm=dapo",))
    kwargs: Any = OmegaConf.to_container(
        config.reward.custom_reward_function.reward_kwargs, resolve=True
    )
    row = {"response_tokens": 32, "reference_words": 1}
    full = compute_score("practice", "Answer: entailed", "entailed", row, **kwargs)
    assert full["overlong"] == pytest.approx(1.0)
    assert full["score"] == pytest.approx(full["text_length"] - 1.0)


@pytest.mark.parametrize(
    ("length", "ratio", "right", "paid"),
    [
        ("paper", 3.0, True, 1.0),
        ("paper", 0.5, False, 0.5),
        ("capped", 3.0, True, 0.5),
        ("capped", 1.0, False, 1.0),
        ("correct_only", 3.0, True, 1.0),
        ("correct_only", 1.0, False, 0.0),
    ],
)
def test_a_length_preset_pays_as_its_file_says(
    length: str, ratio: float, right: bool, paid: float
) -> None:
    config = composed("grpo_7b_8gpu", (f"length={length}",))
    kwargs = dict(config.reward.custom_reward_function.reward_kwargs)
    truth = "entailed" if right else "not-entailed"
    row = {"response_tokens": int(10 * ratio), "reference_tokens": 10}
    found = compute_score("x", "<think>So.</think>\nAnswer: entailed", truth, row, **kwargs)
    assert found["text_length"] == pytest.approx(paid)
    with pytest.raises(ValueError, match=r"reward_kwargs\.length"):
        resolve(length="short")


def test_rollout_correction_cuts_the_weight_of_a_token_that_the_trainer_finds_likelier() -> None:
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights

    settings = composed("grpo_7b_8gpu", ("correction=bf16",)).algorithm.rollout_correction
    assert not settings.bypass_mode
    gap = torch.tensor([[0.0, math.log(1.5), math.log(5.0)]])
    weights, metrics = compute_rollout_correction_weights(
        log_ratio=gap,
        response_mask=torch.ones(1, 3),
        rollout_is=settings.rollout_is,
        rollout_is_threshold=settings.rollout_is_threshold,
    )
    assert weights.tolist()[0] == pytest.approx([1.0, 1.5, 2.0])
    assert metrics
