"""Every configuration composes over verl's, says how to run it, and keeps what the plugin needs."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from processes import REPOSITORY, clean_environment
from repeated_rows import repeat_rows

pytest.importorskip("verl")

from soundmind.run.config import CONFIG_DIR, ConfigError, compose_config, config_names
from soundmind.task.reward_settings import resolve

STAND_IN = "grpo_tiny_cpu"
PUBLISHED = [name for name in config_names() if name != STAND_IN]
MODALITIES = ("audio", "text", "mixed")

composed = lru_cache(compose_config)


@pytest.mark.parametrize("name", config_names())
def test_config_composes_and_keeps_the_plugin(name: str) -> None:
    config = composed(name)
    parts = config.actor_rollout_ref
    model, rollout = parts.model, parts.rollout
    assert model._target_ == "soundmind.training.model_config.OmniModelConfig"
    assert model.model_type == "omni_thinker"
    assert not model.use_fused_kernels
    assert parts.actor.strategy == parts.ref.strategy == "fsdp2"
    for side in (parts.actor, parts.ref):
        assert side.fsdp_config._target_ == "soundmind.training.model_config.OmniEngineConfig"
        assert side.fsdp_config.train_audio_tower == config.train.audio_tower
        assert side.fsdp_config.train_projector == config.train.projector
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


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_s_configuration_says_what_it_costs_and_what_to_expect(name: str) -> None:
    head = (CONFIG_DIR / f"{name}.yaml").read_text().split("hydra:")[0]
    head = " ".join(head.replace("#", " ").split())
    assert f"python -m soundmind.plan --config-name {name}" in head
    assert "Not yet run on" in head
    assert "Expected result" in head or "no result is known" in head


@pytest.fixture(scope="module")
def dry_runs(random_stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcome of every dry run; see tests/support/dry_runs.py."""
    from soundmind import preprocess

    folder = tmp_path_factory.mktemp("dry runs")
    arguments = ["--mode", "audio", "--task", "practice", "--workers", "1", "--splits", "train"]
    arguments += ["--data-dir", str(REPOSITORY / "data/sample"), "--output-dir", str(folder)]
    assert preprocess.main([*arguments, "--tokenizer", str(random_stand_in)]) == 0
    results = folder / "results.json"
    script = REPOSITORY / "tests/support/dry_runs.py"
    parquet = folder / "audio/train.parquet"
    repeat_rows(parquet, 16)
    process = subprocess.run(
        [sys.executable, str(script), str(random_stand_in), str(parquet), str(results)],
        cwd=REPOSITORY,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    outcomes: dict[str, Any] = json.loads(results.read_text())
    return outcomes


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("name", PUBLISHED)
def test_without_gpu_model_and_data_a_dry_run_misses_exactly_those(
    dry_runs: dict[str, Any], name: str, modality: str
) -> None:
    """Batches, lengths, LoRA, verl's validate_config and every settings class are in order."""
    problems: list[str] = dry_runs[f"{name} {modality}"]["bare"]["problems"]
    modes = ("audio", "text") if modality == "mixed" else (modality,)
    expected = [rf"data\.train_files: data/alr/parquet/{mode}/train\.parquet not" for mode in modes]
    expected += [rf"data\.val_files: data/alr/parquet/{modes[0]}/dev\.parquet not found"]
    size = "3B" if "3b" in name else "7B"
    expected += [rf"actor_rollout_ref\.model\.path: .* hf download Qwen/Qwen2\.5-Omni-{size} "]
    if "2x8" not in name:  # there the GPUs are the cluster's
        expected += [r"the configuration wants \d GPUs? and this machine shows none"]
    assert len(problems) == len(expected), problems
    for pattern in expected:
        assert sum(bool(re.match(pattern, problem)) for problem in problems) == 1, problems


@pytest.mark.parametrize(
    ("name", "modality"),
    [(name, "audio") for name in PUBLISHED] + [("grpo_7b_8gpu", m) for m in ("text", "mixed")],
)
def test_with_gpu_model_and_data_a_dry_run_passes(
    dry_runs: dict[str, Any], name: str, modality: str
) -> None:
    outcome = dry_runs[f"{name} {modality}"]["complete"]
    assert outcome["problems"] == []
    assert f"outputs/{name}/<timestamp> (new)" in outcome["text"]
    state = "LoRA rank 32" if "lora" in name else "trained"
    assert re.search(rf"^language model .* {state}$", outcome["text"], re.MULTILINE)
    state = "frozen" if "lora" in name else "trained"
    assert re.search(rf"^audio tower .* {state}$", outcome["text"], re.MULTILINE)
    assert re.search(r"^vision .* 0 +not loaded$", outcome["text"], re.MULTILINE)


def test_the_8_gpu_configuration_keeps_the_released_values() -> None:
    config = composed("grpo_7b_8gpu")
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert config.algorithm.adv_estimator == "grpo"
    assert config.data.train_batch_size == 4
    assert config.data.max_response_length == 2048
    assert actor.optim.lr == 3e-7
    assert actor.use_kl_loss
    assert (actor.kl_loss_coef, actor.kl_loss_type) == (0.001, "low_var_kl")
    assert (rollout.n, rollout.temperature, rollout.gpu_memory_utilization) == (2, 1.0, 0.6)
    assert actor.fsdp_config.param_offload
    assert actor.fsdp_config.optimizer_offload
    assert config.trainer.n_gpus_per_node == 8
    assert config.trainer.total_epochs == 10
    assert (config.trainer.save_freq, config.trainer.test_freq) == (100, 100)


def test_what_the_release_leaves_to_verl_s_defaults_still_has_those_values() -> None:
    config = composed("grpo_7b_8gpu")
    actor = config.actor_rollout_ref.actor
    assert (actor.clip_ratio, actor.ppo_epochs, actor.entropy_coeff) == (0.2, 1, 0)
    assert actor.loss_agg_mode == "token-mean"
    assert actor.optim.clip_grad == 1.0
    assert actor.optim.weight_decay == 0.01
    assert actor.optim.lr_scheduler_type == "constant"
    assert config.algorithm.norm_adv_by_std_in_grpo
    assert not config.actor_rollout_ref.rollout.val_kwargs.do_sample


def test_reinforce_pp_follows_the_paper_s_text() -> None:
    config = composed("reinforce_pp_7b_8gpu")
    algorithm, actor = config.algorithm, config.actor_rollout_ref.actor
    assert algorithm.adv_estimator == "reinforce_plus_plus"
    assert algorithm.use_kl_in_reward
    assert not actor.use_kl_loss
    assert (algorithm.kl_penalty, algorithm.kl_ctrl.type) == ("kl", "fixed")
    assert (algorithm.gamma, algorithm.kl_ctrl.kl_coef) == (1.0, 0.001)
    rollout = config.actor_rollout_ref.rollout
    assert (config.data.train_batch_size, rollout.n, rollout.temperature) == (8, 8, 0.7)
    assert actor.optim.lr == 4e-7
    assert config.data.max_response_length == 4096
    trainer = config.trainer
    assert trainer.total_training_steps == 50_000
    # verl ends at whichever comes first, steps or epochs.
    assert trainer.total_epochs * (5184 // 8) >= trainer.total_training_steps


def test_verl_s_reinforce_pp_is_the_paper_s_equations() -> None:
    """Eqs. 6-7: R minus beta times the KL still to come, whitened over the batch's tokens."""
    torch = pytest.importorskip("torch")
    from verl.trainer.config import AlgoConfig
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn, kl_penalty

    torch.manual_seed(0)
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    policy, reference = torch.randn(3, 4), torch.randn(3, 4)
    score, beta = torch.tensor([4.0, 1.0, 0.0]), 0.001
    kl = kl_penalty(policy, reference, kl_penalty="kl") * mask
    rewards = -beta * kl
    for row, length in enumerate(mask.sum(1).int().tolist()):
        rewards[row, length - 1] += score[row]
    config = AlgoConfig(**dict(composed("reinforce_pp_7b_8gpu").algorithm, filter_groups=None))
    estimator = get_adv_estimator_fn("reinforce_plus_plus")
    advantages, _ = estimator(token_level_rewards=rewards, response_mask=mask, config=config)

    expected = torch.zeros(3, 4)
    for row in range(3):
        for t in range(int(mask[row].sum())):
            to_come = ((policy - reference) * mask)[row, t:].sum()
            expected[row, t] = score[row] - beta * to_come
    values = expected[mask.bool()]
    expected = (expected - values.mean()) / values.std() * mask
    assert torch.allclose(advantages, expected, atol=1e-5)


def test_a_mix_has_both_files_and_the_longer_budget() -> None:
    config = composed("grpo_7b_8gpu_fast", ("modality=mixed",))
    assert [Path(path).parent.name for path in config.data.train_files] == ["audio", "text"]
    assert config.data.max_prompt_length == 4096
    assert composed("grpo_7b_8gpu_fast", ("modality=text",)).data.max_prompt_length == 1024


@pytest.mark.parametrize("name", PUBLISHED)
def test_choices_are_made_on_dev_never_on_test(name: str) -> None:
    assert composed(name).data.val_files == "data/alr/parquet/audio/dev.parquet"


def test_every_part_of_the_fast_step_is_timed_under_the_names_it_gives() -> None:
    """The keys of the comment are verl's: a renamed timer would leave the reader searching."""
    import verl

    trainers = Path(verl.__file__).parent / "trainer/ppo/v1"
    source = "".join((trainers / f"trainer_{name}.py").read_text() for name in ("base", "sync"))
    head = (CONFIG_DIR / "grpo_7b_8gpu_fast.yaml").read_text().split("hydra:")[0]
    for part in ("step", "gen", "old_log_prob", "ref", "adv", "update_actor", "update_weights"):
        assert re.search(rf"\b{part}\b", head), part
        assert f'marked_timer("{part}"' in source, part
    assert '"perf/mfu/actor"' in source
    assert "perf/mfu/actor" in head


def test_one_seed_reaches_order_rollouts_adapters_and_the_stand_in() -> None:
    config = compose_config("grpo_tiny_cpu", ["run.seed=7"])
    roles = config.actor_rollout_ref
    assert config.data.seed == config.run.stand_in_seed == roles.rollout.seed == 7
    assert roles.actor.data_loader_seed == 7
    assert roles.actor.fsdp_config.seed == roles.ref.fsdp_config.seed == 7


def test_the_seed_decides_the_order_of_the_rows() -> None:
    from verl.trainer.ppo.utils import create_rl_sampler

    def order(seed: int) -> list[int]:
        config = compose_config("grpo_tiny_cpu", [f"run.seed={seed}"])
        return list(create_rl_sampler(config.data, range(100)))

    assert order(0) == order(0) != order(1)
    assert sorted(order(1)) == list(range(100))


def test_an_unknown_override_names_the_key_and_its_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.temprature") as error:
        compose_config("grpo_tiny_cpu", ["actor_rollout_ref.rollout.temprature=0.7"])
    assert "Did you mean actor_rollout_ref.rollout.temperature" in str(error.value)


@pytest.mark.parametrize(
    "place",
    [
        *("/data/run=3/model", "/data/Omni (7B)", "/data/a,b", "/data/~x", "/data/{a}", "/data/#1"),
        *(
            "/data/\u65e5\u672c",
            "/data/it's",
            "/data/a:b c=d",
            "/data/f\u00fcr",
            '/data/"x"',
            "/d/$HOME=",
        ),
    ],
)
def test_a_value_with_characters_of_hydra_s_grammar_gets_a_hint_that_works(place: str) -> None:
    with pytest.raises(ConfigError, match="quote the value") as error:
        compose_config("grpo_tiny_cpu", [f"run.root={place}"])
    (pasted,) = shlex.split(str(error.value).partition("for the shell: ")[2])
    assert compose_config("grpo_tiny_cpu", [pasted]).run.root == place


def test_the_home_folder_is_expanded_in_places() -> None:
    overrides = ["run.root='~/runs'", "data.train_files=['~/a.parquet',b.parquet]"]
    config = compose_config("grpo_tiny_cpu", overrides)
    assert config.run.root == str(Path.home() / "runs")
    assert config.data.train_files == [str(Path.home() / "a.parquet"), "b.parquet"]


def test_a_file_without_defaults_is_refused_with_what_to_begin_it_with(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("reward: {custom_reward_function: {}}\n")
    with pytest.raises(ConfigError, match=r"begin it with the lines `hydra:` and `defaults:`"):
        compose_config("mine", config_dir=tmp_path)


def test_an_unknown_modality_lists_those_that_exist() -> None:
    with pytest.raises(ConfigError, match="There are: audio, mixed, text"):
        compose_config("grpo_7b_8gpu", ["modality=video"])


def test_an_unknown_configuration_lists_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there are: .*grpo_tiny_cpu"):
        compose_config("grpo_13b")


def test_every_test_that_the_fidelity_page_names_exists() -> None:
    page = (REPOSITORY / "docs/fidelity.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", page)
    assert len(named) > 40
    for file, test in named:
        source = next((REPOSITORY / "tests").rglob(file)).read_text()
        assert re.search(rf"^(async )?def {test}\(", source, re.MULTILINE), f"{file}::{test}"
