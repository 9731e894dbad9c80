"""Disk of a run: what lies there at once, by hand and in the configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verl")

from soundmind.planning import disk, sizes
from soundmind.planning.setup import GB, assumptions, mixture, training_setup
from soundmind.run.config import compose_config, config_names

SEVEN = 7_615_616_512 + 635_056_128 + 4_591_104  # thinker without vision


def planned(name: str, *overrides: str) -> dict[str, int]:
    config = compose_config(name, overrides)
    size = sizes.model_size(str(config.actor_rollout_ref.model.path))
    return disk.disk_space(config, training_setup(config, size), assumptions(config), 12_960)


def test_a_checkpoint_is_weights_and_two_moments() -> None:
    config = compose_config("grpo_7b_8gpu")
    setup = training_setup(config, sizes.QWEN2_5_OMNI_7B)
    assert disk.checkpoint_bytes(setup) == 12 * SEVEN  # 99 GB in fp32
    lora = training_setup(compose_config("grpo_7b_lora_1gpu"), sizes.QWEN2_5_OMNI_7B)
    adapters = 80_740_352
    assert disk.checkpoint_bytes(lora) == 2 * SEVEN + 12 * adapters


def test_one_more_than_is_kept_lies_there_while_it_is_written() -> None:
    kept = planned("grpo_7b_8gpu")
    assert kept["checkpoints, 4 at once"] == 4 * 12 * SEVEN
    assert kept["export"] == sizes.QWEN2_5_OMNI_7B.folder_bytes
    everything = planned("grpo_7b_8gpu", "trainer.max_actor_ckpt_to_keep=null")
    assert everything["checkpoints, 130 at once"] == 130 * 12 * SEVEN
    none = planned("grpo_7b_8gpu", "trainer.save_freq=-1")
    assert list(none) == ["rollouts", "Ray's logs and spill"]


@pytest.mark.parametrize("name", [name for name in config_names() if "7b" in name or "3b" in name])
def test_no_configuration_keeps_every_checkpoint(name: str) -> None:
    assert compose_config(name).trainer.max_actor_ckpt_to_keep
    assert sum(planned(name).values()) < 700 * GB


@pytest.mark.parametrize(
    ("modality", "share", "text"), [("audio", 1, 138), ("text", 0, 338), ("mixed", 0.5, 238)]
)
def test_a_plan_counts_the_clips_that_are_there(modality: str, share: float, text: int) -> None:
    from soundmind.planning.plan import make_plan
    from soundmind.planning.setup import CARDS

    config = compose_config("grpo_7b_8gpu_fast", [f"modality={modality}"])
    assert mixture(config) == (share, text)
    plan = make_plan(config, "x", CARDS["H100"], assumptions(config))
    responses = 64 * 8
    assert plan.tokens["audio"] == responses * share * round(62.33 * 25)
    assert plan.tokens["prompt text"] == responses * text
    assert plan.tokens["response"] == responses * 1056
    audio = [phase.parts.get("audio_activations", 0) for phase in plan.phases]
    assert any(audio) == (share > 0)
    assert plan.host["features, one copy a prompt"] == 64 * share * 6233 * 128 * 2


def test_the_mode_is_that_of_the_rows_where_they_are_there(parquet_modes: Path) -> None:
    for mode in ("audio", "text"):
        config: Any = compose_config("grpo_tiny_cpu")
        config.data.train_files = str(parquet_modes / f"{mode}.parquet")
        assert mixture(config)[0] == (mode == "audio")


@pytest.fixture
def parquet_modes(tmp_path: Path) -> Path:
    """Two files whose names and folder say nothing of their modes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for mode in ("audio", "text"):
        pq.write_table(pa.table({"extra_info": [{"mode": mode}]}), tmp_path / f"{mode}.parquet")
    return tmp_path
