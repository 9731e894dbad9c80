"""What is refused before Ray starts, and whether the message says what to do."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, open_dict
from processes import REPOSITORY, clean_environment
from repeated_rows import repeat_rows

pytest.importorskip("verl")

from soundmind import preprocess
from soundmind.data import lengths
from soundmind.run import checks
from soundmind.run.config import compose_config


@pytest.fixture(scope="module")
def parquet(random_stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed sample as Parquet, audio mode."""
    folder = tmp_path_factory.mktemp("parquet")
    arguments = ["--mode", "audio", "--task", "practice", "--workers", "1"]
    arguments += ["--data-dir", str(REPOSITORY / "data/sample"), "--output-dir", str(folder)]
    assert preprocess.main([*arguments, "--tokenizer", str(random_stand_in)]) == 0
    repeat_rows(folder / "audio/train.parquet", 4)
    return folder / "audio"


@pytest.fixture
def overrides(random_stand_in: Path, parquet: Path) -> list[str]:
    """A configuration that passes every check."""
    return [
        f"data.train_files={parquet / 'train.parquet'}",
        f"data.val_files={parquet / 'test.parquet'}",
        f"actor_rollout_ref.model.path='{random_stand_in}'",
    ]


composed = lru_cache(compose_config)


def configured(overrides: list[str], *more: str, name: str = "grpo_tiny_cpu") -> DictConfig:
    config = composed(name).copy()
    with open_dict(config):
        config.merge_with_dotlist([override.lstrip("+") for override in (*overrides, *more)])
    return config


def problems(overrides: list[str], *more: str, name: str = "grpo_tiny_cpu") -> list[str]:
    return list(checks.find_problems(configured(overrides, *more, name=name)))


def test_a_sound_configuration_has_no_problem(overrides: list[str]) -> None:
    assert problems(overrides) == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.train_files=nowhere.parquet", "soundmind.prepare --config-name grpo_tiny_cpu"),
        ("data.max_prompt_length=100", "set it to at least 128"),
        ("actor_rollout_ref.actor.ppo_mini_batch_size=5", "nearest that work: 15 or 20"),
        ("trainer.n_gpus_per_node=3", "do not divide over 3 ranks"),
        ("actor_rollout_ref.rollout.n=1", "use n >= 2"),
        ("actor_rollout_ref.rollout.max_model_len=200", "set it to at least 224"),
        ("actor_rollout_ref.actor.ppo_max_token_len_per_gpu=128", "below one sequence"),
        ("+custom_reward_function.path=mine.py", "verl 0.9.1 ignores it"),
        ("reward.custom_reward_function.path=null", "built-in scorers"),
        ("reward.custom_reward_function.reward_kwargs.preset=generous", "preset"),
        ("actor_rollout_ref.actor.ulysses_sequence_parallel_size=2", "must be 1"),
        ("actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=128", "below one sequence"),
        ("actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=false", "asserts"),
        ("actor_rollout_ref.rollout.tensor_model_parallel_size=2", "the 1 GPUs of a node"),
        ("trainer.nnodes=2", "ray start --head"),
        ("ray_kwargs.ray_init.address=auto", "ray_kwargs.ray_init.num_gpus=null"),
        ("actor_rollout_ref.model.lora.rank=8", "set actor_rollout_ref.model.lora_rank"),
        ("actor_rollout_ref.model.lora_rank=8", "lora.merge=true"),
        ("actor_rollout_ref.model.lora_rank=8", "train.audio_tower=false"),
        ("actor_rollout_ref.model.lora_adapter_path=nowhere", "set lora_rank to the adapter's"),
        ("+trainer.resume_mode=resume_path", "name a .../checkpoints/global_step_N"),
    ],
)
def test_a_problem_is_named_with_the_next_step(
    overrides: list[str], override: str, expected: str
) -> None:
    found = problems(overrides, override)
    assert any(expected in problem for problem in found), found


def test_a_missing_model_names_the_command_that_makes_it(overrides: list[str]) -> None:
    found = problems(overrides[:2], "actor_rollout_ref.model.path=checkpoints/nowhere")
    assert len(found) == 1
    assert "python -m soundmind.prepare" in found[0]


def test_the_published_mini_batch_does_not_divide_over_8_ranks() -> None:
    """The authors' own values: 2 prompts x 2 responses over 8 GPUs; 4 prompts work."""
    mini = "actor_rollout_ref.actor.ppo_mini_batch_size"
    published = problems([], f"{mini}=2", name="grpo_7b_8gpu")
    assert any(
        "ppo_mini_batch_size=2 x rollout.n=2 = 4 responses do not divide over 8 ranks" in problem
        and problem.endswith("that work: 4")
        for problem in published
    ), published
    assert not any(mini in problem for problem in problems([], f"{mini}=4", name="grpo_7b_8gpu"))
    half = problems([], f"{mini}=2", "trainer.n_gpus_per_node=4", name="grpo_7b_8gpu")
    assert not any("do not divide" in problem for problem in half), half


def test_micro_batches_of_log_probabilities_divide_the_responses_of_a_rank() -> None:
    """verl asserts on it inside the worker, after model and engine have been loaded."""
    key = "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu"
    found = problems([], f"{key}=3", "actor_rollout_ref.rollout.n=8", name="grpo_7b_8gpu")
    assert any(f"{key}=3 does not divide the 4 responses" in problem for problem in found), found
    assert any("nearest that work: 2 or 4" in problem for problem in found), found


def test_shared_prompts_need_attention_with_a_mask() -> None:
    config = composed("grpo_7b_8gpu").copy()
    config.train.share_prompts = True
    (problem,) = checks.shared_prompts(config)
    assert "flash_attention_2" in problem
    with open_dict(config):
        config.actor_rollout_ref.model.override_config.attn_implementation = "sdpa"
    assert not list(checks.shared_prompts(config))


def test_the_reference_of_a_lora_run_has_no_micro_batches_of_its_own() -> None:
    """It is the actor without its adapter; a setting that nobody reads is no problem."""
    settings = ["actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=null"]
    full = problems(settings, name="grpo_7b_8gpu")
    lora = ["actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.model.lora.merge=true"]
    adapted = problems([*settings, *lora, "train.audio_tower=false"], name="grpo_7b_8gpu")
    assert any("set actor_rollout_ref.ref.log_prob_micro" in problem for problem in full), full
    assert not any("actor_rollout_ref.ref" in problem for problem in adapted), adapted


@pytest.mark.parametrize(
    ("split", "fits"), [(1, True), (2, True), (4, True), (8, False), (3, False)]
)
def test_tensor_parallel_rollouts_share_out_the_heads_of_a_7b(split: int, fits: bool) -> None:
    """28 attention heads; a replica lies within a node of 8."""
    key = "actor_rollout_ref.rollout.tensor_model_parallel_size"
    found = problems([], f"{key}={split}", name="grpo_7b_8gpu")
    assert any(key in problem for problem in found) == (not fits), found


def test_a_split_rollout_needs_more_than_the_engine_process(overrides: list[str]) -> None:
    split = "actor_rollout_ref.rollout.tensor_model_parallel_size=2"
    backend = "actor_rollout_ref.rollout.engine_kwargs.vllm.distributed_executor_backend"
    found = problems(overrides, split, "trainer.n_gpus_per_node=2")
    assert any(f"set {backend}=mp" in problem for problem in found), found
    assert not problems(overrides, split, "trainer.n_gpus_per_node=2", f"{backend}=mp")


@pytest.mark.parametrize(
    ("targets", "reaches"),
    [
        ("all-linear", False),
        ("[q_proj,v_proj]", False),
        (r"'model\.layers\.\d+\.self_attn\.q_proj'", False),
        (r"'.*\.q_proj'", True),
        (r"'.*(fc1|fc2)'", True),
    ],
)
def test_an_adapter_stays_out_of_the_audio_tower(targets: str, reaches: bool) -> None:
    key = "actor_rollout_ref.model.target_modules"
    found = problems([], f"{key}={targets}", name="grpo_7b_lora_1gpu")
    assert any("reaches into the audio tower" in problem for problem in found) == reaches, found


def test_a_target_that_is_no_pattern_is_refused() -> None:
    found = problems([], "actor_rollout_ref.model.target_modules='('", name="grpo_7b_lora_1gpu")
    assert any("is no regular expression" in problem for problem in found), found


def _cut(folder: Path) -> str:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return "model.safetensors has"


def _pointer(folder: Path) -> str:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    return "is a Git LFS pointer"


def _missing_shard(folder: Path) -> str:
    index = {"weight_map": {"thinker.lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "model-00002-of-00002.safetensors is missing (1 tensors"


def _misplaced(folder: Path) -> str:
    index = {"weight_map": {"thinker.nowhere.weight": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "first thinker.nowhere.weight"


def _unfinished(folder: Path) -> str:
    download = folder / ".cache/huggingface/download/abc.incomplete"
    download.parent.mkdir(parents=True)
    download.write_bytes(b"half")
    return "is a download that has not ended"


def _none(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "has no *.safetensors weights"


@pytest.mark.parametrize("damage", [_cut, _pointer, _missing_shard, _misplaced, _unfinished, _none])
def test_a_half_downloaded_model_is_refused_with_the_file_and_the_command(
    overrides: list[str], random_stand_in: Path, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    half = tmp_path / "half"
    shutil.copytree(random_stand_in, half)
    expected = damage(half)
    found = problems(overrides[:2], f"actor_rollout_ref.model.path={half}")
    assert any(expected in problem and "soundmind.prepare" in problem for problem in found), found


def test_a_missing_3b_is_not_answered_with_the_7b() -> None:
    found = problems([], name="grpo_3b_1gpu")
    assert any("hf download Qwen/Qwen2.5-Omni-3B --local-dir" in problem for problem in found), (
        found
    )


@pytest.fixture
def checkpoint(random_stand_in: Path, tmp_path: Path) -> Path:
    """global_step_4 of a run on two ranks, complete; its shards are empty."""
    from soundmind.model import checkpoints

    root = tmp_path / "run/checkpoints"
    actor = root / checkpoints.WRITING / "global_step_4/actor"
    actor.mkdir(parents=True)
    (actor / "fsdp_config.json").write_text('{"world_size": 2}')
    for kind in ("model", "optim", "extra_state"):
        for rank in range(2):
            (actor / f"{kind}_world_size_2_rank_{rank}.pt").write_bytes(b"")
    return checkpoints.publish(root, 4, random_stand_in)


def resuming(checkpoint: Path, *more: str) -> list[str]:
    settings = [f"trainer.resume_from_path='{checkpoint}'", "trainer.resume_mode=resume_path"]
    return list(checks.resume(configured(settings, *more)))


def test_a_checkpoint_of_as_many_ranks_is_accepted(checkpoint: Path, overrides: list[str]) -> None:
    ranks = "trainer.n_gpus_per_node=2"
    assert resuming(checkpoint, ranks, overrides[2]) == []
    run = f"run.resume='{checkpoint.parent.parent}'"
    assert list(checks.resume(configured([run, ranks, overrides[2]]))) == []


def test_a_checkpoint_of_another_number_of_ranks_is_refused(checkpoint: Path) -> None:
    for found in (
        resuming(checkpoint),
        list(checks.resume(configured([f"run.resume='{checkpoint.parent.parent}'"]))),
    ):
        assert len(found) == 1
        assert "was written by 2 ranks" in found[0]
        assert "is 1;" in found[0]
        assert f"python -m soundmind.export {checkpoint.parent.parent}" in found[0]


def test_a_checkpoint_of_another_base_is_refused(
    checkpoint: Path, random_stand_in: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(random_stand_in, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    length = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + length])
    start = 8 + length + header["thinker.lm_head.weight"]["data_offsets"][0]
    weights[start] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    found = resuming(
        checkpoint, "trainer.n_gpus_per_node=2", f"actor_rollout_ref.model.path={other}"
    )
    assert len(found) == 1
    assert "trained from another base" in found[0]


def test_an_incomplete_checkpoint_is_refused(checkpoint: Path) -> None:
    (checkpoint / "actor/optim_world_size_2_rank_1.pt").unlink()
    found = resuming(checkpoint, "trainer.n_gpus_per_node=2")
    assert any("optim_world_size_2_rank_1.pt is missing" in problem for problem in found), found


def test_a_folder_without_a_processor_is_never_trained_on_text(
    overrides: list[str], random_stand_in: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(random_stand_in, broken)
    (broken / "processor_config.json").unlink()
    found = problems(overrides[:2], f"actor_rollout_ref.model.path={broken}")
    assert any("silently drop the audio" in problem for problem in found), found


def test_a_processor_that_cuts_clips_is_refused(
    overrides: list[str], random_stand_in: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short"
    shutil.copytree(random_stand_in, short)
    file = short / "processor_config.json"
    settings: dict[str, Any] = json.loads(file.read_text())
    settings["feature_extractor"].update(chunk_length=30, n_samples=480_000, nb_max_frames=3_000)
    file.write_text(json.dumps(settings))
    found = problems(overrides[:2], f"actor_rollout_ref.model.path={short}")
    assert any("window is 30 s" in problem for problem in found), found


def test_missing_gpus_point_at_the_stand_in(overrides: list[str]) -> None:
    from soundmind.system.machine import gpu_names

    if gpu_names():
        pytest.skip("this machine has GPUs")
    found = problems([], name="grpo_7b_8gpu")
    assert any("CONFIG=grpo_tiny_cpu" in problem for problem in found)


def test_all_problems_are_reported_at_once(overrides: list[str]) -> None:
    found = problems(overrides, "actor_rollout_ref.rollout.n=1", "data.train_files=nowhere.parquet")
    assert len(found) >= 2


def test_the_prompt_count_is_what_the_processor_makes(parquet: Path, random_stand_in: Path) -> None:
    import soundfile

    from soundmind.model.processor import load_processor
    from soundmind.task.prompts import build_messages

    processor = load_processor(str(random_stand_in))
    row_id, tokens = lengths.longest_prompt_tokens(str(parquet / "test.parquet"), processor)
    clip = REPOSITORY / "data/sample/test" / row_id / "question.wav"
    waveform, rate = soundfile.read(clip, dtype="float32")
    assert rate == 16_000
    messages = build_messages("audio", "", "clip", "practice")
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert len(processor(text=[text], audio=[waveform])["input_ids"][0]) == tokens


def test_the_command_exits_2_and_starts_nothing(tmp_path: Path) -> None:
    result = subprocess.run(
        [
            *(sys.executable, "-m", "soundmind.train", "--config-name", "grpo_tiny_cpu"),
            *("data.train_files=nowhere.parquet", f"run.root={tmp_path}"),
        ],
        cwd=REPOSITORY,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert "nowhere.parquet not found" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


VERL_PROBLEMS = """
import os, sys
from omegaconf import open_dict
from soundmind.plugin import environment
from soundmind.run import checks
from soundmind.run.config import compose_config
environment.select(os.environ, cpu=True)
config = compose_config("grpo_tiny_cpu", [f"actor_rollout_ref.model.path='{sys.argv[1]}'"])
print("sound:", list(checks.verl_problems(config)))
with open_dict(config):
    config.actor_rollout_ref.model.surprise = 1
    config.actor_rollout_ref.actor.loss_agg_mode = "sum-of-everything"
for problem in checks.verl_problems(config):
    print("problem:", problem)
"""


def test_what_verl_would_refuse_in_a_worker_is_found_before_it_starts(
    random_stand_in: Path,
) -> None:
    """A key of ours in verl's model section stops its server, a bad value its settings classes."""
    result = subprocess.run(
        [sys.executable, "-c", VERL_PROBLEMS, str(random_stand_in)],
        cwd=REPOSITORY,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "sound: []" in result.stdout
    found = [line for line in result.stdout.splitlines() if line.startswith("problem:")]
    assert any("validate_config" in line and "sum-of-everything" in line for line in found), found
    assert any("actor_rollout_ref.model:" in line and "surprise" in line for line in found), found


def test_a_dry_run_prints_what_would_be_trained_and_writes_nothing(
    overrides: list[str], tmp_path: Path
) -> None:
    root = tmp_path / "outputs"
    result = subprocess.run(
        [
            *(sys.executable, "-m", "soundmind.train", "--config-name", "grpo_tiny_cpu"),
            *("--dry-run", *overrides, f"run.root={root}", "train.audio_tower=false"),
        ],
        cwd=REPOSITORY,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "16 prompts x 8 responses = 128 a step" in result.stdout
    assert "reward     paper: text_format 1, " in result.stdout
    assert "answer 2" in result.stdout and "lengths in words; labels" in result.stdout
    assert re.search(
        r"^needs +about \d+ GB of memory on a node, \d+ GB of disk$", result.stdout, re.M
    )
    assert f"{root}/grpo_tiny_cpu/<timestamp> (new)" in result.stdout
    table = {line.split("  ")[0]: line for line in result.stdout.splitlines()}
    assert table["language model"].endswith("trained")
    assert table["audio tower"].endswith("frozen")
    assert table["talker"].endswith("not loaded")
    assert not root.exists()
