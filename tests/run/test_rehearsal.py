"""What a rehearsal changes of a configuration, and that nothing else is changed."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest

pytest.importorskip("verl")

from soundmind import rehearse
from soundmind.run import rehearsal
from soundmind.run.config import compose_config, config_names
from soundmind.run.machine_checks import weight_bucket

FOLDER = Path("/tmp/a folder")
composed = lru_cache(compose_config)


def settings(name: str) -> dict[str, object]:
    return rehearsal.forced_settings(composed(name), FOLDER, 152_064, 896)


@pytest.mark.parametrize("name", config_names())
def test_every_configuration_takes_what_is_forced_in_hydras_grammar(name: str) -> None:
    forced = settings(name)
    written = [rehearsal.as_override(key, value) for key, value in forced.items()]
    assert rehearsal.changes(compose_config(name, written), forced) == []
    assert rehearsal.changes(composed(name), forced) != []


def test_what_the_experiment_is_about_stays() -> None:
    kept = (
        "algorithm.",
        "train.audio_tower",
        "train.projector",
        "train.share_prompts",
        "actor_rollout_ref.model.lora",
        "actor_rollout_ref.actor.use_kl",
    )
    for name in config_names():
        changed = [change.key for change in rehearsal.changes(composed(name), settings(name))]
        assert not [key for key in changed if key.startswith(kept)]
        assert "actor_rollout_ref.model.use_remove_padding" not in changed


def test_the_bucket_holds_the_whole_vocabulary_of_the_narrow_model() -> None:
    forced = settings("grpo_7b_8gpu")
    config = composed("grpo_7b_8gpu").copy()
    key = "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes"
    assert forced[key] == 520  # 152,064 x 896 values of 4 bytes
    assert not list(weight_bucket(config))


def test_half_a_download_ends_in_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    arguments = ["--config-name", "grpo_tiny_cpu", "--published", str(tmp_path)]
    assert rehearse.main([*arguments, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path} lacks ") and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_command_that_fails_shows_its_end_and_its_log(tmp_path: Path) -> None:
    with pytest.raises(rehearsal.RehearsalError, match="exit 2") as failure:
        rehearsal.rehearse_stage(["soundmind.train", "--config-name"], tmp_path / "log", 120)
    assert "expected one argument" in str(failure.value) and "log" in str(failure.value)
