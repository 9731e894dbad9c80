"""What the machine must have is asked before Ray, which would wait for it for ever."""

from __future__ import annotations

from functools import lru_cache

import pytest
from omegaconf import DictConfig, open_dict

pytest.importorskip("verl")

from soundmind.run import machine_checks
from soundmind.run.config import compose_config, config_names
from soundmind.system import machine

composed = lru_cache(compose_config)


def configured(name: str, **settings: object) -> DictConfig:
    config = composed(name).copy()
    with open_dict(config):
        config.merge_with_dotlist([f"{key}={value}" for key, value in settings.items()])
    return config


def test_eight_gpus_reserve_33_processors_and_one_gpu_6() -> None:
    assert machine_checks.processors_wanted(configured("grpo_7b_8gpu")) == 33
    assert machine_checks.processors_wanted(configured("grpo_3b_1gpu")) == 6
    assert machine_checks.processors_wanted(configured("grpo_7b_lora_1gpu")) == 6


def test_too_few_processors_are_refused_with_settings_that_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 32)
    (problem,) = machine_checks.processors(configured("grpo_7b_8gpu"))
    key, value = problem.split("Set ")[1].split(",")[0].split("=")
    assert not list(machine_checks.processors(configured("grpo_7b_8gpu", **{key: value})))
    monkeypatch.setattr(machine, "cores", lambda: 8)
    (problem,) = machine_checks.processors(configured("grpo_7b_8gpu"))
    assert "ray_kwargs.ray_init.num_cpus=33" in problem


def test_a_cluster_brings_its_own_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 1)
    assert not list(machine_checks.processors(configured("grpo_7b_2x8gpu")))


@pytest.mark.parametrize("name", config_names())
def test_the_embedding_table_fits_the_bucket_of_every_configuration(name: str) -> None:
    assert not list(machine_checks.weight_bucket(configured(name)))


def test_a_bucket_that_is_too_small_is_refused_with_its_key() -> None:
    config = configured("grpo_7b_8gpu", **{machine_checks.BUCKET: 2048})
    (problem,) = machine_checks.weight_bucket(config)
    assert problem.startswith(f"{machine_checks.BUCKET}=2048:") and problem.endswith("2079")


def test_a_driver_older_than_cuda_13_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "driver_version", lambda: "570.133.20")
    (problem,) = machine_checks.driver(configured("grpo_7b_8gpu"))
    assert "570.133.20" in problem and "580" in problem
    monkeypatch.setattr(machine, "driver_version", lambda: "580.65.06")
    assert not list(machine_checks.driver(configured("grpo_7b_8gpu")))


@pytest.mark.parametrize("name", config_names())
def test_no_configuration_compiles_the_entropy_that_it_takes_in_chunks(name: str) -> None:
    actor = configured(name).actor_rollout_ref.actor
    assert not (actor.fsdp_config.use_torch_compile and actor.entropy_from_logits_with_chunking)
