"""Everything about a training run that can be known before Ray starts, checked in one pass.

`find_problems(config)` yields *all* problems, each naming what is wrong and what to do
next. verl itself would notice most of them minutes later, inside a worker, and some of them never:
an unsupported processor becomes text-only training, and old reward keys are ignored.
"""

from __future__ import annotations

import importlib.metadata
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from soundmind.data.lengths import longest_prompt_tokens
from soundmind.model import checkpoints
from soundmind.model.folder import weight_faults
from soundmind.planning.rules import (
    batch_sizes,
    group_size,
    lengths,
    micro_batch_sizes,
    tensor_parallel,
)
from soundmind.planning.setup import CARDS, GB, assumptions
from soundmind.planning.sizes import PUBLISHED, SizeError
from soundmind.plugin import environment
from soundmind.run import lora_checks, machine_checks, speech_checks, supported
from soundmind.run.data_checks import (
    counted_lengths,
    curriculum_rows,
    data_files,
    ground_truths,
    paths_of,
)
from soundmind.run.lora_checks import lora_targets
from soundmind.system.errors import UserError
from soundmind.system.hub import is_hub_id

VERL_VERSION = "0.9.1"


class CheckError(UserError, ValueError):
    """One or more problems with a configuration; `problems` lists them."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(
            f"{count} found before anything was started:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
        )


def find_problems(config: DictConfig) -> Iterator[str]:
    """Problems of `config`, cheap checks first; the model is read only when its folder is there."""
    wrong_numbers = list(supported.ranges(config))
    yield from wrong_numbers
    for check in (
        *(installed_versions, reward_keys, reward_settings, device, cluster, shared_prompts),
        *(lora_targets, resume, data_files, ground_truths, curriculum_rows, counted_lengths),
        *(machine_checks.driver, machine_checks.attention),
    ):
        yield from check(config)
    # These count with the numbers above, and divide by some of them.
    for check in (
        *(gpu_capacity, group_size, batch_sizes, micro_batch_sizes, tensor_parallel, lengths),
        *(supported.unsupported, machine_checks.processors, machine_checks.weight_bucket),
        *(machine_checks.host_memory_fits, machine_checks.disk_fits),
    ):
        if not wrong_numbers:
            yield from check(config)
    model_problems = list(model_folder(config))
    yield from model_problems
    yield from lora_checks.part_problems(config)
    yield from speech_checks.speech_problems(config)
    if not model_problems:
        yield from processor_and_prompts(config)


def installed_versions(config: DictConfig) -> Iterator[str]:
    """The plugin relies on internals of one verl release, each pinned by a test."""
    if stale := environment.stale_installation():
        yield stale
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
    from soundmind.task.labels import ENTAILED, answer_line
    from soundmind.task.reward import compute_score

    keywords: Any = OmegaConf.to_container(
        function.get("reward_kwargs") or OmegaConf.create({}), resolve=True
    )
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
    from soundmind.system.machine import gpu_names

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


def gpu_capacity(config: DictConfig) -> Iterator[str]:
    """The smallest GPU of this machine holds what `soundmind.plan` counts for the configuration."""
    from soundmind.planning import plan
    from soundmind.system import machine

    if config.run.device == "cpu" or config.ray_kwargs.ray_init.get("address"):
        return
    found = machine.gpu_memory()
    if not found:
        return  # `device` has said so
    card = replace(CARDS["H100"], name="this machine's", memory=min(found))
    try:
        # Means matter for the estimate of time alone; memory is that of the longest rows.
        need = plan.make_plan(config, "check", card, assumptions(config))
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
            f"GPU memory: {largest.name} ({largest.moment}) needs {largest.total / GB:.1f} GB a "
            f"GPU and {need.reserve / GB:.1f} GB are kept free, but the smallest GPU here has "
            f"{card.memory / GB:.1f} GB. {more}"
        )
    else:
        yield (
            f"GPU memory: vLLM would have room for {need.kv_tokens:,} tokens on a GPU of "
            f"{card.memory / GB:.1f} GB, and one sequence takes "
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
        found = checkpoints.weights_fingerprint(base)
        if found != recorded:
            return [
                f"{step} was trained from another base than {base} (fingerprint {recorded}, here "
                f"{found}); set actor_rollout_ref.model.path to the folder it was trained from"
            ]
    return []


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
    if is_hub_id(path):
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
    from soundmind.model.processor import load_processor, max_clip_seconds

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
    files = [*paths_of(config.data.train_files), *paths_of(config.data.val_files)]
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


def verl_problems(config: DictConfig) -> Iterator[str]:
    """What verl would refuse once its processes run: its own checks, and every settings class.

    Builds what the workers build from the configuration (actor, reference, rollout, algorithm and,
    where the model is a local folder, both model configs with tokenizer and processor) and no
    weights. `config` is left as it is.
    """
    from soundmind.plugin.verl_entry import require_loaded

    require_loaded()
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config
    from verl.workers.config.model import HFModelConfig

    config = config.copy()
    roles = config.actor_rollout_ref

    def validate() -> None:
        validate_config(
            config=config,
            use_reference_policy=need_reference_policy(config),
            use_critic=need_critic(config),
        )

    steps: list[tuple[str, Callable[[], Any]]] = [
        ("verl's validate_config", validate),
        ("algorithm", lambda: omega_conf_to_dataclass(config.algorithm)),
        ("actor_rollout_ref.actor", lambda: omega_conf_to_dataclass(roles.actor)),
        ("actor_rollout_ref.ref", lambda: omega_conf_to_dataclass(_reference(config))),
        ("actor_rollout_ref.rollout", lambda: omega_conf_to_dataclass(roles.rollout)),
    ]
    if Path(str(roles.model.path)).expanduser().is_dir():
        # The trainer's class, and the plain one that verl's vLLM server builds from the same keys.
        for built in (None, HFModelConfig):
            model = partial(omega_conf_to_dataclass, roles.model, dataclass_type=built)
            steps.append(("actor_rollout_ref.model", model))
    for name, build in steps:
        try:
            with warnings.catch_warnings():
                # The server's class cannot make this model's processor; ours has, just before.
                warnings.filterwarnings("ignore", message="Failed to create processor")
                warnings.filterwarnings("ignore", message=".* engine is not available")
                build()
        except Exception as error:  # whatever a settings class raises is a problem to report
            yield f"{name}: {type(error).__name__}: {' '.join(str(error).split())}"


def _reference(config: DictConfig) -> DictConfig:
    """The reference's settings under the names of an actor's, as verl's worker renames them."""
    reference = config.actor_rollout_ref.ref.copy()
    with open_dict(reference):
        reference.ppo_mini_batch_size = config.actor_rollout_ref.actor.ppo_mini_batch_size
        for ours, theirs in (
            ("ppo_micro_batch_size", "log_prob_micro_batch_size"),
            ("ppo_micro_batch_size_per_gpu", "log_prob_micro_batch_size_per_gpu"),
            ("use_dynamic_bsz", "log_prob_use_dynamic_bsz"),
            ("ppo_max_token_len_per_gpu", "log_prob_max_token_len_per_gpu"),
        ):
            reference[ours] = reference.pop(theirs, None)
    return reference
