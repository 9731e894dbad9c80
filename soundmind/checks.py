"""Everything about a training run that can be known before Ray starts, checked in one pass.

`require(config)` raises `CheckError` with *all* problems, each naming what is wrong and what to do
next. verl itself would notice most of them minutes later, inside a worker, and some of them never:
an unsupported processor becomes text-only training, and old reward keys are ignored.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from soundmind import checkpoints, parts
from soundmind.model_folder import weight_faults
from soundmind.sizes import PUBLISHED, SizeError, model_size

VERL_VERSION = "0.9.1"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class CheckError(ValueError):
    """One or more problems with a configuration; `problems` lists them."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(
            f"{count} found before anything was started:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
        )


def require(config: DictConfig) -> None:
    """Raise `CheckError` with every problem found in `config`."""
    problems = list(find_problems(config))
    if problems:
        raise CheckError(problems)


def find_problems(config: DictConfig) -> Iterator[str]:
    """Problems of `config`, cheap checks first; the model is read only when its folder is there."""
    for check in (
        versions,
        reward_keys,
        reward_settings,
        device,
        gpu_memory,
        cluster,
        group_size,
        shared_prompts,
        batch_sizes,
        micro_batches,
        tensor_parallel,
        lengths,
        lora_targets,
        resume,
        data_files,
    ):
        yield from check(config)
    model_problems = list(model_folder(config))
    yield from model_problems
    yield from parts.find_problems(config)
    if not model_problems:
        yield from processor_and_prompts(config)


def versions(config: DictConfig) -> Iterator[str]:
    """The plugin relies on internals of one verl release, each pinned by a test."""
    try:
        found = importlib.metadata.version("verl")
    except importlib.metadata.PackageNotFoundError:
        yield "verl is not installed; run `bash scripts/setup.sh`"
        return
    if found != VERL_VERSION:
        yield (
            f"verl {found} is installed, SoundMind needs {VERL_VERSION}; "
            "run `bash scripts/setup.sh`"
        )


def reward_keys(config: DictConfig) -> Iterator[str]:
    """verl 0.9.1 reads `reward.custom_reward_function` and ignores the old top-level key."""
    if OmegaConf.select(config, "custom_reward_function.path"):
        yield (
            "custom_reward_function.path is set at the top level, where verl 0.9.1 ignores it; "
            "move it "
            "to reward.custom_reward_function.path"
        )
    if not OmegaConf.select(config, "reward.custom_reward_function.path"):
        yield (
            "reward.custom_reward_function.path is not set, so verl would fall back to its "
            "built-in "
            "scorers; set it to pkg://soundmind.rewards"
        )
    if OmegaConf.select(config, "reward_model.reward_manager") not in (None, "naive"):
        yield "reward_model.reward_manager is ignored by verl 0.9.1; use reward.reward_manager.name"


def reward_settings(config: DictConfig) -> Iterator[str]:
    """Preset, weights and plug-in components resolve, and an ideal response can be scored."""
    function = config.reward.custom_reward_function
    if function.path != "pkg://soundmind.rewards":
        return
    from soundmind.labels import ENTAILED, answer_line
    from soundmind.rewards import compute_score

    keywords: Any = OmegaConf.to_container(function.get("reward_kwargs") or OmegaConf.create({}))
    try:
        compute_score(
            "soundmind/check",
            f"<think>It follows.</think>\n{answer_line(ENTAILED)}",
            ENTAILED,
            {"response_tokens": 8, "reference_tokens": 8, "reference_words": 4},
            **keywords,
        )
    except (ValueError, TypeError, KeyError, ImportError, AttributeError) as error:
        yield f"reward.custom_reward_function.reward_kwargs: {error}"


def device(config: DictConfig) -> Iterator[str]:
    """The accelerators that the configuration wants are there."""
    ranks = config.trainer.n_gpus_per_node
    if config.run.device == "cpu":
        if config.trainer.device != "cpu":
            yield "run.device=cpu needs trainer.device=cpu; put base/cpu into the defaults list"
        return
    from soundmind.run_folder import gpu_names

    if OmegaConf.select(config, "ray_kwargs.ray_init.address"):
        return  # the GPUs are the cluster's, not this machine's
    gpus = gpu_names()
    if not gpus:
        yield (
            f"the configuration wants {ranks} GPU{'s' * (ranks > 1)} and this machine shows none "
            "(nvidia-smi). "
            "Without a GPU train the stand-in: CONFIG=grpo_tiny_cpu bash main_grpo.sh"
        )
    elif len(gpus) < ranks:
        yield (
            f"trainer.n_gpus_per_node={ranks} and this machine has {len(gpus)}; set "
            f"trainer.n_gpus_per_node={len(gpus)}"
        )


def gpu_memory(config: DictConfig) -> Iterator[str]:
    """The smallest GPU of this machine holds what `soundmind.plan` counts for the configuration."""
    from soundmind import plan, run_folder

    if config.run.device == "cpu" or config.ray_kwargs.ray_init.get("address"):
        return
    found = run_folder.gpu_memory()
    if not found:
        return  # `device` has said so
    card = replace(plan.CARDS["H100"], name="this machine's", memory=min(found))
    # Means matter for the estimate of time alone; memory is that of the longest rows.
    answer = int(config.data.max_response_length)
    assumed = plan.Assumptions(plan.PUBLISHED_SECONDS, answer, plan.PROMPT_TEXT_TOKENS)
    try:
        need = plan.make_plan(config, "check", card, assumed)
    except SizeError:
        return  # a model that is not here and is none of the published ones
    if need.fits:
        return
    largest = need.largest
    more = (
        "`python -m soundmind.plan --config-name ...` shows every part. Use more or larger GPUs, a "
        "smaller actor.ppo_max_token_len_per_gpu, optimizer_offload or param_offload of "
        "actor.fsdp_config, or grpo_7b_lora_1gpu"
    )
    if largest.total + need.reserve > card.memory:
        yield (
            f"GPU memory: {largest.name} ({largest.moment}) needs {largest.total / plan.GB:.1f} GB a "
            f"GPU and {need.reserve / plan.GB:.1f} GB are kept free, but the smallest GPU here has "
            f"{card.memory / plan.GB:.1f} GB. {more}"
        )
    else:
        yield (
            f"GPU memory: vLLM would have room for {need.kv_tokens:,} tokens on a GPU of "
            f"{card.memory / plan.GB:.1f} GB, and one sequence takes "
            f"{need.longest_prompt['one sequence']:,}; raise rollout.gpu_memory_utilization, or: {more}"
        )


def cluster(config: DictConfig) -> Iterator[str]:
    """Several machines need a running Ray cluster, which brings its own processors and GPUs."""
    init = config.ray_kwargs.ray_init
    address, nodes = init.get("address"), config.trainer.nnodes
    if nodes > 1 and not address:
        yield (
            f"trainer.nnodes={nodes} without ray_kwargs.ray_init.address: Ray would start on this "
            "machine alone and wait for the others. Start a cluster (`ray start --head` here, "
            "`ray start --address=<this machine>:6379` on the others), then set "
            "ray_kwargs.ray_init.address=auto"
        )
    if address and address != "local":
        given = [name for name in ("num_cpus", "num_gpus") if init.get(name) is not None]
        if given:
            yield (
                f"ray_kwargs.ray_init.address={address} joins a cluster that has its own count of "
                f"processors and GPUs, and Ray refuses {' and '.join(given)} beside it; set "
                + " ".join(f"ray_kwargs.ray_init.{name}=null" for name in given)
            )


def shared_prompts(config: DictConfig) -> Iterator[str]:
    """Sharing prompts needs an attention that takes a dense mask."""
    if not config.train.share_prompts:
        return
    attention = config.actor_rollout_ref.model.override_config.get(
        "attn_implementation", "flash_attention_2"
    )
    if attention not in ("sdpa", "eager"):
        yield (
            f"train.share_prompts=true needs attention with a dense mask, and the model's is "
            f"{attention}; add +actor_rollout_ref.model.override_config.attn_implementation=sdpa, "
            f"or set train.share_prompts=false"
        )


def group_size(config: DictConfig) -> Iterator[str]:
    """GRPO compares the responses of a group with one another."""
    n = config.actor_rollout_ref.rollout.n
    if config.algorithm.adv_estimator == "grpo" and n < 2:
        yield (
            f"actor_rollout_ref.rollout.n={n}: GRPO has no group to compare with and would use "
            f"the raw "
            "score as advantage; use n >= 2"
        )


def batch_sizes(config: DictConfig) -> Iterator[str]:
    """Batches divide into mini-batches, and mini-batches over the ranks."""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    train, mini, n = config.data.train_batch_size, actor.ppo_mini_batch_size, rollout.n
    gpus = config.trainer.n_gpus_per_node * config.trainer.nnodes
    sequence_parallel = actor.get("ulysses_sequence_parallel_size", 1) or 1
    ranks = max(1, gpus // sequence_parallel)
    if sequence_parallel != 1:
        yield (
            "actor.ulysses_sequence_parallel_size must be 1: verl has no input slicing for this "
            "model"
        )
    if train % mini:
        yield (
            f"data.train_batch_size={train} is not a multiple of ppo_mini_batch_size={mini} "
            f"(prompts); "
            f"nearest that work: {_nearest(train, lambda value: value % mini == 0)}"
        )
    if mini * n % ranks:
        yield (
            f"ppo_mini_batch_size={mini} x rollout.n={n} = {mini * n} responses do not divide over "
            f"{ranks} ranks; nearest ppo_mini_batch_size that work: "
            f"{_nearest(mini, lambda value: value * n % ranks == 0)}"
        )
    micro = actor.ppo_micro_batch_size_per_gpu
    if not actor.use_dynamic_bsz and micro and mini * n % ranks == 0 and mini * n // ranks % micro:
        yield (
            f"ppo_micro_batch_size_per_gpu={micro} does not divide the {mini * n // ranks} "
            f"responses "
            "of a rank's mini-batch"
        )
    if not actor.use_dynamic_bsz and not micro:
        yield (
            "set actor.ppo_micro_batch_size_per_gpu, or actor.use_dynamic_bsz=True with "
            "actor.ppo_max_token_len_per_gpu; verl reads no other form"
        )


def micro_batches(config: DictConfig) -> Iterator[str]:
    """Log-probabilities are computed in micro-batches too: of the actor, and of the reference."""
    actor, ref = config.actor_rollout_ref.actor, config.actor_rollout_ref.ref
    rollout = config.actor_rollout_ref.rollout
    if actor.use_dynamic_bsz != rollout.log_prob_use_dynamic_bsz:
        yield (
            f"actor.use_dynamic_bsz={actor.use_dynamic_bsz} and rollout.log_prob_use_dynamic_bsz="
            f"{rollout.log_prob_use_dynamic_bsz}: verl asserts that they are the same"
        )
    ranks = config.trainer.n_gpus_per_node * config.trainer.nnodes
    responses = config.data.train_batch_size * rollout.n
    sides = [("rollout", rollout)]
    # With LoRA the reference is the actor without its adapter, in the actor's micro-batches.
    if config.actor_rollout_ref.model.lora_rank == 0 and _needs_reference(config):
        sides.append(("ref", ref))
    for name, side in sides:
        key = f"actor_rollout_ref.{name}.log_prob_micro_batch_size_per_gpu"
        micro = side.log_prob_micro_batch_size_per_gpu
        if side.log_prob_use_dynamic_bsz:
            continue
        if not micro:
            yield f"set {key}, or actor.use_dynamic_bsz=True; verl reads no other form"
        elif responses % ranks == 0 and responses // ranks % micro:
            works = _nearest(micro, lambda value: responses // ranks % value == 0)
            yield (
                f"{key}={micro} does not divide the {responses // ranks} responses of a rank "
                f"({responses} over {ranks}); nearest that work: {works}"
            )


def _needs_reference(config: DictConfig) -> bool:
    return bool(config.algorithm.use_kl_in_reward or config.actor_rollout_ref.actor.use_kl_loss)


def tensor_parallel(config: DictConfig) -> Iterator[str]:
    """A rollout replica lies within a node, and its GPUs share out the attention heads."""
    split = config.actor_rollout_ref.rollout.tensor_model_parallel_size
    key = "actor_rollout_ref.rollout.tensor_model_parallel_size"
    per_node = config.trainer.n_gpus_per_node
    if per_node % split:
        yield (
            f"{key}={split} does not divide the {per_node} GPUs of a node; nearest that work: "
            f"{_nearest(split, lambda value: per_node % value == 0)}"
        )
    if split == 1:
        return
    engine = config.actor_rollout_ref.rollout.engine_kwargs.get("vllm") or {}
    if engine.get("distributed_executor_backend") == "uni":
        yield (
            f"{key}={split} needs a process a part: set "
            "actor_rollout_ref.rollout.engine_kwargs.vllm.distributed_executor_backend=mp"
        )
    try:
        text = model_size(str(config.actor_rollout_ref.model.path)).text
    except SizeError as error:
        yield f"{key}={split} cannot be checked against the model's heads: {error}"
        return
    if text.heads % split or max(text.kv_heads, split) % min(text.kv_heads, split):
        yield (
            f"{key}={split} does not share out {text.heads} attention heads and {text.kv_heads} "
            f"key/value heads; use 1, which a 7B fits"
        )


def _nearest(value: int, works: Callable[[int], bool]) -> str:
    """The closest values below and above that satisfy `works`, as text."""
    below = next((v for v in range(value, 0, -1) if works(v)), None)
    above = next((v for v in range(value + 1, value * 2 + 4097) if works(v)), None)
    return " or ".join(str(v) for v in (below, above) if v)


def lengths(config: DictConfig) -> Iterator[str]:
    """Prompt and response fit the engine and a micro-batch."""
    prompt, response = config.data.max_prompt_length, config.data.max_response_length
    rollout, actor = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor
    total = prompt + response
    if rollout.max_model_len is not None and rollout.max_model_len < total:
        yield (
            f"rollout.max_model_len={rollout.max_model_len} is below max_prompt_length + "
            f"max_response_length = {total}; set it to at least {total}"
        )
    ref = config.actor_rollout_ref.ref
    for key, budget in (
        ("actor.ppo_max_token_len_per_gpu", actor.ppo_max_token_len_per_gpu),
        ("rollout.log_prob_max_token_len_per_gpu", rollout.log_prob_max_token_len_per_gpu),
        ("ref.log_prob_max_token_len_per_gpu", ref.log_prob_max_token_len_per_gpu),
    ):
        if actor.use_dynamic_bsz and budget < total:
            yield (
                f"actor_rollout_ref.{key}={budget} is below one sequence of {total} tokens; set it "
                f"to at least {total}"
            )


# Linear layers of the audio tower, by their names in the thinker.
AUDIO_TOWER_LINEARS = (
    *(f"audio_tower.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")),
    "audio_tower.layers.0.self_attn.out_proj",
    "audio_tower.layers.0.fc1",
    "audio_tower.layers.0.fc2",
    "audio_tower.proj",
)
LANGUAGE_MODEL_LINEAR = "model.layers.0.self_attn.q_proj"


def lora_targets(config: DictConfig) -> Iterator[str]:
    """A LoRA adapter stays in the language model; vLLM could not take one in the audio tower."""
    model = config.actor_rollout_ref.model
    if OmegaConf.select(model, "lora.rank"):
        yield (
            f"actor_rollout_ref.model.lora.rank={model.lora.rank} is the key of verl's Megatron "
            "engine and makes no adapter here; set actor_rollout_ref.model.lora_rank"
        )
    if model.lora_rank == 0:
        return
    targets = parts.language_model_targets(
        OmegaConf.to_container(model.target_modules)
        if isinstance(model.target_modules, ListConfig)
        else model.target_modules
    )
    key = "actor_rollout_ref.model.target_modules"
    try:
        reached = [name for name in AUDIO_TOWER_LINEARS if re.fullmatch(targets, name)]
    except re.error as error:
        yield f"{key}={targets!r} is no regular expression: {error}"
        return
    if reached:
        yield (
            f"{key}={targets!r} reaches into the audio tower ({reached[0]}); PEFT matches the whole "
            "name, so open it with model\\.layers\\. or use all-linear"
        )


def resume(config: DictConfig) -> Iterator[str]:
    """A checkpoint that is named is complete, of this base, and of as many ranks as will read it."""
    if config.trainer.resume_mode == "resume_path":
        key, step = "trainer.resume_from_path", config.trainer.resume_from_path
        if not step or not Path(step).is_dir():
            yield f"{key}={step}: no such folder; name a .../checkpoints/global_step_N"
            return
        yield from (f"{key}: {fault}" for fault in checkpoint_faults(Path(step), config))
    named = str(config.run.resume)
    if named not in ("auto", "new"):
        last = checkpoints.newest(Path(named) / "checkpoints")
        if last is not None:
            step = Path(named) / "checkpoints" / f"global_step_{last}"
            yield from (f"run.resume: {fault}" for fault in checkpoint_faults(step, config))


def checkpoint_faults(step: Path, config: DictConfig) -> list[str]:
    """Why `config` cannot continue from the folder `step` (global_step_N); empty if it can.

    verl writes one file of weights a rank, named after the number of ranks, and reads no other
    number.
    """
    if faults := checkpoints.faults(step):
        return [f"{fault}; name an earlier global_step_N" for fault in faults]
    ranks = config.trainer.n_gpus_per_node * config.trainer.nnodes
    shards = (step / "actor").glob("model_world_size_*_rank_*.pt")
    worlds = {int(path.name.split("_")[3]) for path in shards}
    if ranks not in worlds:
        return [
            f"{step} was written by {max(worlds, default=0)} ranks and trainer.nnodes x "
            f"trainer.n_gpus_per_node is {ranks}; verl's checkpoints are bound to the number. Train "
            "on as many again, or start a new run from its weights: python -m soundmind.export "
            f"{step.parent.parent}"
        ]
    base, recorded = Path(str(config.actor_rollout_ref.model.path)), checkpoints.recorded_base(step)
    if recorded and base.is_dir() and not weight_faults(base):
        found = checkpoints.fingerprint(base)
        if found != recorded:
            return [
                f"{step} was trained from another base than {base} (fingerprint {recorded}, here "
                f"{found}); set actor_rollout_ref.model.path to the folder it was trained from"
            ]
    return []


def data_files(config: DictConfig) -> Iterator[str]:
    """The Parquet files are there."""
    for key in ("train_files", "val_files"):
        for path in _paths(config.data[key]):
            if not Path(path).is_file():
                command = _prepare_command(config, path)
                yield f"data.{key}: {path} not found. Make it with: {command}"


def _paths(value: Any) -> list[str]:
    return list(value) if isinstance(value, (list, ListConfig)) else [value]


def _prepare_command(config: DictConfig, path: str) -> str:
    if config.run.prepare == "practice":
        return "python -m soundmind.prepare --config-name grpo_tiny_cpu"
    mode = Path(path).parent.name
    mode = mode if mode in ("audio", "text", "dual") else "audio"
    return f"bash scripts/download_data.sh && python -m soundmind.preprocess --mode {mode}"


def model_folder(config: DictConfig) -> Iterator[str]:
    """The model is a complete local folder, or plainly a Hub id."""
    path = str(config.actor_rollout_ref.model.path)
    folder = Path(path).expanduser()
    again = f"make it again with: {model_command(config)}"
    if folder.is_dir():
        for name in ("config.json", "tokenizer_config.json"):
            if not (folder / name).is_file():
                yield f"{path} has no {name}; a complete Qwen2.5-Omni folder is needed, {again}"
        for fault in weight_faults(folder):
            yield f"actor_rollout_ref.model.path: {fault}; {again}"
        return
    if HUB_ID.fullmatch(path) and not Path(path.split("/")[0]).exists():
        return  # fetched from the Hub by the processes that load it
    yield f"actor_rollout_ref.model.path: {path} not found. Make it with: {model_command(config)}"


def model_command(config: DictConfig) -> str:
    """The command that brings the model folder of `config`."""
    if config.run.prepare == "practice":
        return "python -m soundmind.prepare --config-name grpo_tiny_cpu"
    path = Path(str(config.actor_rollout_ref.model.path))
    name = path.name if path.name in PUBLISHED else "Qwen2.5-Omni-7B"
    return f"hf download Qwen/{name} --local-dir {path}"


def processor_and_prompts(config: DictConfig) -> Iterator[str]:
    """The processor can be built, and the longest prompt of every file fits."""
    from soundmind.processor import load_processor, max_clip_seconds

    try:
        processor = load_processor(str(config.actor_rollout_ref.model.path))
    except ValueError as error:
        yield str(error)
        return
    if (window := max_clip_seconds(processor)) < 300:
        yield (
            f"{config.actor_rollout_ref.model.path}: the processor's window is {window:.0f} s; the "
            "published one is 300 s, and a shorter one cuts clips without a word"
        )
    budget = config.data.max_prompt_length
    files = [*_paths(config.data.train_files), *_paths(config.data.val_files)]
    for path in sorted({file for file in files if Path(file).is_file()}):
        yield from longest_prompt(path, processor, budget)


def longest_prompt(path: str, processor: Any, budget: int) -> Iterator[str]:
    """One problem if the longest prompt of the Parquet file exceeds `budget` tokens."""
    row_id, tokens = longest_prompt_tokens(path, processor)
    if tokens > budget:
        yield (
            f"{path}: row {row_id} makes a prompt of {tokens} tokens and data.max_prompt_length is "
            f"{budget}; set it to at least {math.ceil(tokens / 64) * 64}"
        )


def longest_prompt_tokens(path: str, processor: Any) -> tuple[str, int]:
    """Id and exact token count of the longest prompt in a Parquet file, without decoding a clip.

    A clip's tokens are stored in its row; text is rendered and counted once per distinct wording.
    """
    import pyarrow.parquet as parquet

    @lru_cache(maxsize=100_000)
    def text_tokens(messages: str) -> int:
        rendered = processor.apply_chat_template(
            json.loads(messages), tokenize=False, add_generation_prompt=True
        )
        return len(processor.tokenizer(rendered)["input_ids"])

    longest = ("none", 0)
    for batch in parquet.ParquetFile(path).iter_batches(columns=["prompt", "extra_info"]):
        for row in batch.to_pylist():
            messages, clips = _without_clips(row["prompt"])
            info = row["extra_info"]
            # Each clip's one placeholder token gives way to its audio tokens.
            tokens = text_tokens(json.dumps(messages)) + (info["audio_tokens"] - 1) * clips
            longest = max(longest, (str(info["id"]), tokens), key=lambda found: found[1])
    return longest


def _without_clips(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Messages with every clip replaced by a constant, and how many clips there were."""
    clips = 0
    plain = []
    for message in messages:
        parts = []
        for part in message["content"]:
            if part["type"] == "audio":
                clips += 1
                parts.append({"type": "audio", "audio": "clip"})
            else:
                parts.append({"type": part["type"], "text": part["text"]})
        plain.append({"role": message["role"], "content": parts})
    return plain, clips
