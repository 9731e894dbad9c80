"""The plan: memory arithmetic against a measured step, and what it says of the configurations."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import REPOSITORY

from soundmind import plan
from soundmind.planning import memory, rollouts, sizes
from soundmind.planning import plan as planning_plan
from soundmind.planning.flops import Trained
from soundmind.planning.memory import MicroBatch, Training
from soundmind.planning.setup import CARDS

SEVEN = sizes.QWEN2_5_OMNI_7B
MINUTE = MicroBatch(rows=1, length=2400, clips=(6000,))


@pytest.fixture(scope="module")
def benchmark() -> Any:
    """benchmarks/plan.py as a module."""
    spec = importlib.util.spec_from_file_location(
        "plan_benchmark", REPOSITORY / "benchmarks" / "plan.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("checkpointing", [True, False])
def test_predicted_memory_is_within_15_percent_of_measured(
    benchmark: Any, checkpointing: bool
) -> None:
    pytest.importorskip("transformers")
    case = benchmark.Case(
        "wide" if checkpointing else "wide, all activations kept",
        *(benchmark.WIDE, benchmark.EARS, 4, 256, 400),
        checkpointing=checkpointing,
    )
    assert case in benchmark.CASES
    ratio = benchmark.predicted(case).total / benchmark.measured(case, "tensors")
    assert 0.85 < ratio < 1.15


def test_states_of_a_full_update_by_hand() -> None:
    # Thinker without vision: 8,255,263,744 values; fp32 weights, gradients and two of Adam, over 8.
    setup = Training(SEVEN, ranks=8)
    values = 7_615_616_512 + 635_056_128 + 4_591_104
    assert memory.loaded_weights(setup) == memory.trained_weights(setup) == values
    last = list(memory.training_moments(setup, MINUTE))[-1]
    assert last.name == "optimizer"
    assert last.parts["weights"] == last.parts["gradients"] == values // 8 * 4
    assert last.parts["optimizer"] == 2 * last.parts["weights"]


def test_logits_of_a_minute_by_hand() -> None:
    setup = Training(SEVEN, ranks=8)
    loss = next(m for m in memory.training_moments(setup, MINUTE) if m.name == "loss")
    assert loss.parts["logits"] == 2 * 2400 * 152_064 * 2  # bf16, and its gradient masked


def test_gradients_grow_to_exactly_what_is_trained() -> None:
    for trained in (Trained(), Trained(False, True), Trained(False, False, lora_rank=32)):
        setup = Training(SEVEN, trained, ranks=1)
        moments = list(memory.training_moments(setup, MINUTE))
        grown = [moment.parts["gradients"] for moment in moments]
        assert grown == sorted(grown)
        # Before the optimizer runs, all that is missing are the small tensors between the layers.
        assert 0.98 * grown[-1] <= grown[-2] <= grown[-1]


def test_what_saves_memory_does() -> None:
    full = memory.training_peak(Training(SEVEN), MINUTE).total
    frozen = memory.training_peak(Training(SEVEN, Trained(False, False)), MINUTE).total
    assert full - frozen >= 3 * 4 * SEVEN.audio.tower_parameters
    lora = Training(SEVEN, Trained(False, False, 32), weight_bytes=2)
    assert memory.training_peak(lora, MINUTE).total < full / 4
    fused = memory.training_peak(Training(SEVEN, optimizer="fused"), MINUTE).total
    assert fused < full
    kept = memory.training_peak(Training(SEVEN, ranks=8, checkpointing=False), MINUTE).total
    assert kept > memory.training_peak(Training(SEVEN, ranks=8), MINUTE).total


def test_key_value_cache_by_hand() -> None:
    assert rollouts.kv_bytes_per_token(SEVEN.text) == 2 * 28 * 4 * 128 * 2
    assert rollouts.kv_bytes_per_token(sizes.QWEN2_5_OMNI_3B.text) == 2 * 36 * 2 * 128 * 2


@pytest.mark.parametrize("border", [0, 1, 77, 1000])
def test_largest_finds_the_border(border: int) -> None:
    assert planning_plan.largest(lambda value: value <= border, limit=1000) == border


# --- the command ----------------------------------------------------------------------------------


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON of the command."""
    pytest.importorskip("verl")
    path = tmp_path / "plan.json"
    status = plan.main([*arguments[:2], "--json", str(path), *arguments[2:]])
    return status, json.loads(path.read_text())


@pytest.mark.parametrize("name", ["grpo_7b_8gpu", "grpo_7b_8gpu_fast", "grpo_7b_lora_1gpu"])
def test_a_7b_configuration_fits_cards_of_80_gb(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = run(tmp_path, "--config-name", name)
    assert (status, found["fits"], found["problems"]) == (0, True, [])
    assert found["card"]["memory"] == 80 * planning_plan.GB
    largest = max(phase["total"] for phase in found["phases"])
    assert largest + found["reserve"] <= found["card"]["memory"]
    for phase in found["phases"]:
        assert phase["total"] == sum(phase["parts"].values())
    output = capsys.readouterr().out
    for part in (
        "optimizer",
        "gathered",
        "KV cache",
        "Tokens a step",
        "an epoch of 5,184",
    ):
        assert part in output


def test_a_small_card_does_not_fit_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = run(tmp_path, "--config-name", "grpo_7b_lora_1gpu", "--gpu-memory", "24")
    assert status == 1 and not found["fits"]
    assert found["kv_cache"] < 0 and found["kv_tokens"] == 0
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_broken_rules_come_with_the_nearest_values_that_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = run(tmp_path, "--config-name", "grpo_7b_8gpu", "--gpus", "6")
    assert status == 1 and found["gpus"] == 6
    assert any(
        "nearest ppo_mini_batch_size that work: 3 or 6" in rule for rule in found["problems"]
    )
    assert "rule broken" in capsys.readouterr().out


def test_overrides_and_length_of_clips_change_the_plan(tmp_path: Path) -> None:
    _, base = run(tmp_path, "--config-name", "grpo_7b_8gpu")
    arguments = ("--clip-seconds", "120", "--response-tokens", "300")
    _, found = run(tmp_path, "--config-name", "grpo_7b_8gpu", *arguments, "data.train_batch_size=8")
    assert found["tokens"]["audio"] == 8 * 2 * 120 * 25
    assert found["tokens"]["response"] == 8 * 2 * 300
    assert found["steps_per_epoch"] == base["steps_per_epoch"] // 2 == 648


def test_the_stand_in_is_planned_from_its_own_folder(random_stand_in: Path, tmp_path: Path) -> None:
    _, found = run(
        tmp_path,
        *("--config-name", "grpo_tiny_cpu"),
        f'actor_rollout_ref.model.path="{random_stand_in}"',
    )
    assert found["model"] == random_stand_in.name
    update = next(phase for phase in found["phases"] if phase["name"] == "update")
    assert update["parts"]["weights"] < 10_000_000


def test_a_model_that_nobody_knows_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("verl")
    arguments = [
        "--config-name",
        "grpo_7b_8gpu",
        "actor_rollout_ref.model.path=checkpoints/unknown",
    ]
    assert plan.main(arguments) == 2
    assert "not a published model" in capsys.readouterr().err


def test_gpus_must_divide_over_the_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("verl")
    assert plan.main(["--config-name", "grpo_7b_2x8gpu", "--gpus", "5"]) == 2
    assert "does not divide over trainer.nnodes=2" in capsys.readouterr().err


def test_time_grows_with_work_and_falls_with_the_card() -> None:
    pytest.importorskip("verl")
    from soundmind.run.config import compose_config

    config = compose_config("grpo_7b_8gpu_fast")
    setup = planning_plan.training_setup(config, SEVEN)
    assumed = planning_plan.Assumptions(
        clip_seconds=60, response_tokens=700, prompt_text_tokens=170
    )
    short = planning_plan.step_seconds(config, setup, CARDS["H100"], assumed)
    longer = replace(assumed, clip_seconds=120)
    assert (
        planning_plan.step_seconds(config, setup, CARDS["H100"], longer)["update"] > short["update"]
    )
    assert (
        planning_plan.step_seconds(config, setup, CARDS["A100"], assumed)["update"]
        > short["update"]
    )
    frozen = replace(setup, trained=Trained(False, False))
    assert (
        planning_plan.step_seconds(config, frozen, CARDS["H100"], assumed)["update"]
        < short["update"]
    )
