"""Every configuration composes over verl's, says how to run it, and keeps what the plugin needs."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("verl")

from soundmind.rewards import resolve
from soundmind.train import CONFIG_DIR, ConfigError, compose_config, config_names


@pytest.mark.parametrize("name", config_names())
def test_config_composes_and_keeps_the_plugin(name: str) -> None:
    config = compose_config(name)
    model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    assert model._target_ == "soundmind.verl_ext.model.OmniModelConfig"
    assert model.model_type == "omni_thinker"
    assert not model.use_fused_kernels
    assert config.actor_rollout_ref.actor.strategy == "fsdp2"
    assert config.actor_rollout_ref.ref.strategy == "fsdp2"
    assert rollout.agent.default_agent_loop == "soundmind_audio"
    assert rollout.engine_kwargs.vllm.limit_mm_per_prompt == {"audio": 1, "image": 0, "video": 0}
    assert rollout.tensor_model_parallel_size == 1
    assert config.reward.custom_reward_function.path == "pkg://soundmind.rewards"
    assert config.trainer.v1.trainer_mode == "soundmind_sync"
    resolve(**config.reward.custom_reward_function.reward_kwargs)


@pytest.mark.parametrize("name", config_names())
def test_config_opens_with_its_command_and_hardware(name: str) -> None:
    head = (CONFIG_DIR / f"{name}.yaml").read_text().split("hydra:")[0]
    assert "bash main_grpo.sh" in head
    assert f"--config-name {name}" in head
    assert "Hardware:" in head


def test_the_8_gpu_configuration_keeps_the_released_values() -> None:
    config = compose_config("grpo_7b_8gpu")
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert config.algorithm.adv_estimator == "grpo"
    assert config.data.train_batch_size == 4
    assert config.data.max_response_length == 2048
    assert actor.optim.lr == 3e-7
    assert actor.use_kl_loss
    assert (actor.kl_loss_coef, actor.kl_loss_type) == (0.001, "low_var_kl")
    assert (rollout.n, rollout.temperature, rollout.gpu_memory_utilization) == (2, 1.0, 0.6)
    assert config.trainer.n_gpus_per_node == 8
    assert config.trainer.total_epochs == 10


def test_an_override_reaches_the_configuration() -> None:
    assert compose_config("grpo_tiny_cpu", ["run.seed=7"]).data.seed == 7


def test_an_unknown_override_names_the_key_and_its_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.temprature") as error:
        compose_config("grpo_tiny_cpu", ["actor_rollout_ref.rollout.temprature=0.7"])
    assert "Did you mean actor_rollout_ref.rollout.temperature" in str(error.value)


def test_an_unknown_configuration_lists_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there are: .*grpo_tiny_cpu"):
        compose_config("grpo_13b")
