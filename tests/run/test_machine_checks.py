"""What the machine must have is asked before Ray, which would wait for it for ever."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
from omegaconf import DictConfig, open_dict

pytest.importorskip("verl")

from soundmind.run import checks, machine_checks
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


@pytest.mark.parametrize(
    ("name", "gigabytes", "fits"),
    [
        ("grpo_7b_8gpu", 80, True),
        ("grpo_7b_8gpu_fast", 80, True),
        ("reinforce_pp_7b_8gpu", 80, True),
        ("grpo_7b_lora_1gpu", 80, True),
        ("grpo_3b_1gpu", 80, True),
        ("grpo_7b_lora_1gpu", 24, False),
        ("grpo_3b_1gpu", 40, False),
        ("grpo_7b_8gpu_fast", 24, False),
    ],
)
def test_a_gpu_that_is_too_small_is_told_before_it_runs_out(
    monkeypatch: pytest.MonkeyPatch, name: str, gigabytes: int, fits: bool
) -> None:
    monkeypatch.setattr(machine, "gpu_memory", lambda: [10**11, gigabytes * 10**9])
    found = list(checks.gpu_capacity(configured(name)))
    assert len(found) == (not fits), found
    assert all(problem.startswith("GPU memory: ") for problem in found)
    assert all(f"{gigabytes}.0 GB" in problem and "soundmind.plan" in problem for problem in found)


def test_usual_adamw_would_not_hold_the_3b(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why that configuration asks for the fused one."""
    monkeypatch.setattr(machine, "gpu_memory", lambda: [80 * 10**9])
    setting = {"actor_rollout_ref.actor.optim.override_optimizer_config": "null"}
    found = list(checks.gpu_capacity(configured("grpo_3b_1gpu", **setting)))
    assert any("update" in problem for problem in found), found


def test_gpu_memory_is_read_from_the_driver_s_list(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 81559\necho '[N/A]'\necho 24564\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert machine.gpu_memory() == [81_559 * 2**20, 24_564 * 2**20]
