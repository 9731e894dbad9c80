"""What verl has and this trainer cannot run is refused; what is let through computes."""

from __future__ import annotations

import subprocess
import sys
from functools import lru_cache

import pytest
from omegaconf import DictConfig, open_dict
from processes import REPOSITORY, clean_environment

pytest.importorskip("verl")

from soundmind.planning import rules
from soundmind.run import supported
from soundmind.run.config import compose_config, config_names

A, R, M = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"
F = f"{A}.fsdp_config"
composed = lru_cache(compose_config)


def problems(*overrides: str, name: str = "grpo_tiny_cpu") -> list[str]:
    """What the tables say of a configuration with these settings."""
    config: DictConfig = composed(name).copy()
    with open_dict(config):
        config.merge_with_dotlist(list(overrides))
    return list(supported.ranges(config)) or [
        problem
        for check in (supported.unsupported, rules.group_size, rules.batch_sizes)
        for problem in check(config)
    ]


@pytest.mark.parametrize("name", config_names())
def test_every_configuration_of_ours_is_supported(name: str) -> None:
    assert problems(name=name) == []


# One setting each that verl takes and that dies later, hangs, or trains on something else.
REFUSED = [
    *(f"algorithm.adv_estimator={name}" for name in ("gae", "remax", "grpoo")),
    *(f"algorithm.adv_estimator={kind}optimal_token_baseline" for kind in ("", "tir_")),
    *(f"trainer.v1.trainer_mode={name}" for name in ("sync", "colocate_async", "separate_async")),
    *("trainer.use_v1=false", "trainer.val_only=true", "trainer.resume_mode=maybe"),
    *("actor_rollout_ref.hybrid_engine=false", "critic.enable=true", "distillation.enabled=true"),
    *("reward.reward_model.enable=true", "reward.reward_manager.name=prime"),
    "algorithm.use_pf_ppo=true",
    *("trainer.v1.sampler.sync_refill_failed_groups=true", f"{R}.calculate_log_probs=false"),
    "algorithm.rollout_correction.rollout_is=word",
    "algorithm.rollout_correction.rollout_rs=seq",
    "algorithm.rollout_correction.rollout_rs=seq_mean_k1",  # without a threshold
    "algorithm.rollout_correction.loss_type=x",
    *(f"{A}.policy_loss.loss_mode={name}" for name in ("bypass_mode", "reinforce", "dro", "x")),
    *(f"{A}.calculate_sum_pi_squared=true", f"{A}.use_prefix_grouper=true"),
    *(f"{A}.strategy={name}" for name in ("megatron", "veomni", "torchtitan")),
    *(f"{A}.qat.enable=true", f"{A}.checkpoint.async_save=true"),
    f"{A}.checkpoint.save_contents=[model]",
    f"{A}.checkpoint.save_contents=[optimizer,extra]",
    f"{A}.ulysses_sequence_parallel_size=2",
    *(f"{F}.{key}=true" for key in ("offload_policy", "use_torch_compile", "forward_prefetch")),
    *(f"{F}.pad_to_length=true", f"{F}.ulysses_sequence_parallel_size=2", f"{F}.fsdp_size=2"),
    *(f"{F}.model_dtype={name}" for name in ("fp16", "fp64", "int8")),
    f"{F}.mixed_precision.param_dtype=fp16",
    *(f"{M}.use_liger=true", f"{M}.use_shm=true", f"{M}.tiled_mlp.enabled=true"),
    *(f"{M}.enable_activation_offload=true", f"{M}.mtp.enable=true", f"{M}.model_type=x"),
    f"{M}._target_=verl.workers.config.model.HFModelConfig",
    f"{F}._target_=verl.workers.config.FSDPEngineConfig",
    *(
        f"{M}.override_config.attn_implementation={name}"
        for name in ("flash_attention_2", "flex_attention", "sdpaa")
    ),
    *(f"{R}.name={name}" for name in ("sglang", "hf", "trtllm")),
    *(f"{R}.dtype={name}" for name in ("float16", "int8")),
    *(f"{R}.load_format=x", f"{R}.logprobs_mode=processed_logits", f"{R}.quantization=fp8"),
    *(f"{R}.nnodes=1", f"{R}.multi_turn.enable=true", f"{R}.disaggregation.enabled=true"),
    *(f"{R}.data_parallel_size=2", f"{R}.checkpoint_engine.backend=nccl"),
    *(f"{R}.enforce_eager=false", f"{R}.free_cache_engine=true", f"{R}.enable_sleep_mode=true"),
    f"{R}.agent.default_agent_loop=single_turn_agent",
    f"{R}.agent.agent_loop_manager_class=null",
    *(f"{R}.agent.num_workers=0", "reward.num_workers=0", "data.dataloader_num_workers=-1"),
    *("data.custom_cls.path=null", "data.prompt_key=question", "data.reward_fn_key=source"),
    *("data.truncation=left", "data.filter_overlong_prompts=true", "data.return_raw_chat=false"),
    *("data.use_shm=true", "data.train_batch_size=0", "data.gen_batch_size=3"),
    *("data.max_response_length=0", "data.max_prompt_length=0"),
    *(f"{R}.response_length=16", f"{R}.prompt_length=64", f"{R}.n=0", f"{R}.n=1"),
    *(f"{A}.ppo_mini_batch_size=0", f"{A}.ppo_epochs=0", f"{A}.ppo_mini_batch_size=12"),
    *(f"{R}.temperature=0", f"{R}.temperature=-1", f"{R}.temperature=warm", f"{R}.top_p=0"),
    *(f"{R}.top_p=1.5", f"{R}.top_k=0", f"{R}.top_k=-5", f"{R}.gpu_memory_utilization=1.5"),
    *(f"{R}.max_num_seqs=0", f"{R}.max_num_batched_tokens=64", f"{A}.clip_ratio=0"),
    *(f"{A}.optim.lr=fast", f"{A}.optim.lr=-1", f"{A}.optim.clip_grad=0"),
    *(f"{A}.optim.optimizer=SGD", f"{A}.optim.optimizer=AdamWonder"),
    f"{A}.optim.optimizer_impl=nowhere.optim",
    *("trainer.total_epochs=0", "trainer.total_training_steps=0", "trainer.n_gpus_per_node=0"),
    *("trainer.logger=[console,paper]", "trainer.logger=[swanlab]"),
    *(f"skip.{name}.enable=true" for name in ("rollout", "rollout_tq", "async_rollout")),
    "transfer_queue.backend.storage_backend=MooncakeStore",
    "transfer_queue.backend.SimpleStorage.total_storage_size=2",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=0",
]


@pytest.mark.parametrize("setting", REFUSED)
def test_a_setting_that_cannot_run_is_refused_by_its_name(setting: str) -> None:
    found = problems(setting)
    key = setting.partition("=")[0].split(".")[-1]
    assert any(key in problem for problem in found), found


def test_lora_runs_with_fsdp2_alone() -> None:
    lora = (f"{M}.lora_rank=4", f"{M}.lora.merge=true", "train.audio_tower=false")
    assert problems(*lora) == []
    assert any(
        "LoRA runs with fsdp2" in problem for problem in problems(*lora, f"{A}.strategy=fsdp")
    )


def test_there_are_a_hundred_of_them() -> None:
    assert len(set(REFUSED)) == len(REFUSED) >= 100


@pytest.mark.parametrize(
    "settings",
    [
        *(f"algorithm.adv_estimator={name}" for name in supported.ESTIMATORS if name != "gdpo"),
        "algorithm.adv_estimator=gdpo algorithm.gdpo_reward_keys=[answer]",
        *(f"{A}.policy_loss.loss_mode={name}" for name in supported.LOSSES if name != "dro"),
        f"{A}.policy_loss.loss_mode=dro {A}.policy_loss.dro_beta=0.1",
        f"{A}.use_kl_loss=true {A}.kl_loss_type=k3+",
        f"{R}.n=1 algorithm.adv_estimator=reinforce_plus_plus",
        "algorithm.rollout_correction.rollout_is=token",
        "algorithm.rollout_correction.rollout_rs=seq_mean_k1,token_k2"
        " algorithm.rollout_correction.rollout_rs_threshold=2.0",
        f"{M}.override_config.attn_implementation=eager train.share_prompts=false",
        f"{F}.param_offload=true {F}.optimizer_offload=true {F}.model_dtype=bf16",
        "trainer.logger=console trainer.total_training_steps=null data.gen_batch_size=4",
    ],
)
def test_what_works_is_let_through(settings: str) -> None:
    assert problems(*settings.split()) == []


COMPUTE = """
import os
from soundmind.plugin.environment import select
select(os.environ, cpu=True)
import numpy, torch
from omegaconf import OmegaConf
from verl.protocol import DataProto
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.utils.config import omega_conf_to_dataclass
from soundmind.run import supported
from soundmind.run.config import compose_config
from soundmind.training.algorithms import add_components

config = compose_config("grpo_tiny_cpu", ["actor_rollout_ref.actor.policy_loss.dro_beta=0.1"])
torch.manual_seed(0)
mask = torch.ones(8, 5)
mask[0, 3:] = 0
rewards = torch.zeros(8, 5)
rewards[:, 2] = torch.rand(8)
keys = [f"prompt{row // 2}_{row % 2}_0" for row in range(8)]
for name in supported.ESTIMATORS:
    # The fields of a step: verl's trainer has no others when it takes the advantages.
    data = DataProto.from_dict({
        "response_mask": mask, "rm_scores": rewards, "token_level_scores": rewards,
        "token_level_rewards": rewards, "old_log_probs": -torch.rand(8, 5),
        "rollout_log_probs": -torch.rand(8, 5), "ref_log_prob": -torch.rand(8, 5),
    })
    data.non_tensor_batch["uid"] = numpy.array([key.split("_")[0] for key in keys], dtype=object)
    if name == "gdpo":  # our trainer adds the components
        OmegaConf.update(config, "algorithm.gdpo_reward_keys", ["answer"], force_add=True)
        add_components(data, [{"answer": float(row % 2)} for row in range(8)], ["answer"])
    found = compute_advantage_for_multi_trajectories(
        data, batch_keys=keys, adv_estimator=name, num_repeat=2, config=config.algorithm)
    advantages = found.batch["advantages"]
    assert torch.isfinite(advantages).all() and advantages.abs().sum() > 0, name
for name in supported.LOSSES:
    config.actor_rollout_ref.actor.policy_loss.loss_mode = name
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    actor.global_batch_info.update(
        dp_size=1, batch_num_tokens=38, global_batch_size=8, loss_scale_factor=None)
    new = (-torch.rand(8, 5)).requires_grad_()
    loss, _ = core_algos.get_policy_loss_fn(name)(
        old_log_prob=-torch.rand(8, 5), log_prob=new, advantages=torch.randn(8, 5),
        response_mask=mask.bool(), loss_agg_mode="token-mean", config=actor, rollout_is_weights=None)
    loss.backward()
    assert torch.isfinite(new.grad).all() and new.grad.abs().sum() > 0, name
for name in supported.LOSS_PENALTIES:
    assert core_algos.kl_penalty(torch.rand(2, 3), torch.rand(2, 3), name).isfinite().all(), name
print("computed", len(supported.ESTIMATORS), len(supported.LOSSES), len(supported.LOSS_PENALTIES))
"""


def test_every_algorithm_that_is_let_through_computes_on_the_fields_of_a_step() -> None:
    result = subprocess.run(
        [sys.executable, "-c", COMPUTE],
        cwd=REPOSITORY,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()[-1] == "computed 10 11 14"
