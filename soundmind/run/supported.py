"""Which of verl's settings this trainer can run, as tables: a key, the values that work, and why.

verl has some nine hundred keys. Many belong to other engines, other rollouts or other trainers, and most
of those are noticed minutes after the start, in a worker, or never. Algorithms that are listed
compute on the fields of a step (tests/run/test_supported.py); other values are those of our configurations
and tests, or ones that nothing is known against. What is not listed for a key is refused. `ranges` also
checks every number that must lie in a range before anyone divides by it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from soundmind.planning.rules import GROUPED
from soundmind.task.reward_settings import RATE_KEYS, component_names

ACTOR, REF = "actor_rollout_ref.actor", "actor_rollout_ref.ref"
ROLLOUT, MODEL = "actor_rollout_ref.rollout", "actor_rollout_ref.model"

ESTIMATORS = (*GROUPED, "reinforce_plus_plus")
LOSSES = (
    *("vanilla", "gspo", "sapo", "gpg", "clip_cov", "kl_cov", "geo_mean", "cispo", "dro"),
    *("dppo_tv", "dppo_kl"),
)
# `+` takes the gradient of the squared difference; without a gradient it changes nothing.
PENALTIES = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
LOSS_PENALTIES = (*PENALTIES, *(f"{name}+" for name in PENALTIES))
REJECTIONS = (
    *("token_k1", "token_k2", "token_k3", "seq_sum_k1", "seq_sum_k2", "seq_sum_k3"),
    *("seq_mean_k1", "seq_mean_k2", "seq_mean_k3", "seq_max_k2", "seq_max_k3"),
)
OTHER_ENGINE = "it belongs to an engine, a model or a server that is not used here"
OTHER_TRAINER = "the trainer that counts components and clears audio features is soundmind_sync"


class Choice(NamedTuple):
    """A key with the values that work, and what is wrong with the others."""

    key: str
    allowed: tuple[Any, ...]
    why: str


CHOICES = (
    Choice(
        "algorithm.adv_estimator",
        ESTIMATORS,
        "gae wants a critic's values, remax a greedy answer beside each prompt, the "
        "token baselines sums over the vocabulary; a step here has none of them",
    ),
    Choice("trainer.v1.trainer_mode", ("soundmind_sync",), OTHER_TRAINER),
    Choice("trainer.use_v1", (True,), OTHER_TRAINER),
    Choice("trainer.val_only", (False,), "python -m soundmind.evaluate evaluates"),
    Choice("trainer.resume_mode", ("auto", "disable", "resume_path"), "verl knows no other"),
    Choice("actor_rollout_ref.hybrid_engine", (True,), OTHER_TRAINER),
    Choice("critic.enable", (False,), "there is no critic for this model"),
    Choice("reward.reward_model.enable", (False,), "the reward is computed by rule"),
    Choice("reward.reward_manager.name", ("naive",), "the others call a reward in another way"),
    Choice("distillation.enabled", (False,), "no teacher hears clips"),
    Choice("algorithm.use_pf_ppo", (False,), "it weighs a critic's samples"),
    Choice("trainer.v1.sampler.sync_refill_failed_groups", (False,), "not run with this trainer"),
    Choice(
        "algorithm.rollout_correction.rollout_is",
        (None, "token", "sequence"),
        "verl knows no other",
    ),
    Choice(
        "algorithm.rollout_correction.loss_type", ("ppo_clip", "reinforce"), "verl knows no other"
    ),
    Choice(
        f"{ACTOR}.policy_loss.loss_mode", LOSSES, "verl knows no other, or takes it from elsewhere"
    ),
    Choice(f"{ACTOR}.calculate_sum_pi_squared", (False,), "nothing here reads it"),
    Choice(f"{ACTOR}.use_prefix_grouper", (False,), "train.share_prompts does it for this model"),
    Choice(f"{ACTOR}.strategy", ("fsdp2", "fsdp"), OTHER_ENGINE),
    Choice(f"{ACTOR}.qat.enable", (False,), OTHER_ENGINE),
    Choice(
        f"{ACTOR}.checkpoint.async_save", (False,), "a checkpoint is moved to its name when whole"
    ),
    Choice(f"{MODEL}.model_type", ("omni_thinker",), OTHER_ENGINE),
    Choice(f"{MODEL}.use_liger", (False,), "it has no kernels for this model"),
    Choice(f"{MODEL}.use_shm", (False,), "not run with this model"),
    Choice(f"{MODEL}.tiled_mlp.enabled", (False,), "not run with this model"),
    Choice(f"{MODEL}.enable_activation_offload", (False,), "not run with this model"),
    Choice(f"{MODEL}.mtp.enable", (False,), OTHER_ENGINE),
    Choice(f"{ROLLOUT}.name", ("vllm",), OTHER_ENGINE),
    Choice(f"{ROLLOUT}.mode", ("async",), "verl knows no other"),
    Choice(f"{ROLLOUT}.nnodes", (0,), OTHER_TRAINER),
    Choice(f"{ROLLOUT}.dtype", ("float32", "bfloat16"), "no other has been run"),
    Choice(
        f"{ROLLOUT}.load_format", ("dummy", "auto", "safetensors"), "vLLM would not load this model"
    ),
    Choice(
        f"{ROLLOUT}.logprobs_mode", ("processed_logprobs",), "others are not what is trained on"
    ),
    Choice(f"{ROLLOUT}.multi_turn.enable", (False,), "a question has one answer"),
    Choice(f"{ROLLOUT}.disaggregation.enabled", (False,), OTHER_ENGINE),
    Choice(f"{ROLLOUT}.quantization", (None,), "not run with this model"),
    Choice(f"{ROLLOUT}.data_parallel_size", (1,), "every rank has a server of its own already"),
    Choice(f"{ROLLOUT}.checkpoint_engine.backend", ("naive",), "not run with this model"),
    Choice("data.truncation", ("error",), "a cut prompt loses placeholders and shifts clips"),
    Choice("data.filter_overlong_prompts", (False,), "lengths are checked before the start"),
    Choice("data.return_raw_chat", (True,), "the agent loop renders the chat"),
    Choice("data.prompt_key", ("prompt",), "it is the column of soundmind.preprocess"),
    Choice("data.reward_fn_key", ("data_source",), "it is the column of soundmind.preprocess"),
    Choice("data.use_shm", (False,), "not run with this data set"),
    Choice("skip.rollout.enable", (False,), "saved rollouts bring no audio features"),
    Choice("skip.rollout_tq.enable", (False,), "saved rollouts bring no audio features"),
    Choice("skip.async_rollout.enable", (False,), "saved rollouts bring no audio features"),
    Choice(
        "transfer_queue.backend.storage_backend", ("SimpleStorage",), "not run with this trainer"
    ),
    *(
        Choice(f"{side}.fsdp_config.{key}", allowed, why)
        for side in (ACTOR, REF)
        for key, allowed, why in (
            ("model_dtype", ("fp32", "bf16"), "no other has been run"),
            ("mixed_precision.param_dtype", (None, "fp32", "bf16"), "no other has been run"),
            ("mixed_precision.reduce_dtype", (None, "fp32", "bf16"), "no other has been run"),
            ("offload_policy", (False,), "use param_offload and optimizer_offload"),
            ("ulysses_sequence_parallel_size", (1,), "verl has no input slicing for this model"),
            ("pad_to_length", (False,), "not run with this model"),
        )
    ),
)
# A CPU differs from a GPU in configuration; configs/base/cpu.yaml says why for each.
CPU_CHOICES = (
    Choice(f"{ROLLOUT}.enforce_eager", (True,), "there are no CUDA graphs on a CPU"),
    Choice(f"{ROLLOUT}.free_cache_engine", (False,), "vLLM's CPU build does not sleep"),
    Choice(f"{ROLLOUT}.enable_sleep_mode", (False,), "vLLM's CPU build does not sleep"),
    *(
        Choice(key, (False,), "compiling needs a C++ tool chain")
        for side in (ACTOR, REF)
        for key in (f"{side}.use_torch_compile", f"{side}.fsdp_config.use_torch_compile")
    ),
    Choice(f"{ACTOR}.fsdp_config.forward_prefetch", (False,), "there is no stream to prefetch in"),
    Choice(
        f"{MODEL}.override_config.attn_implementation",
        ("sdpa", "eager"),
        "it needs a GPU, or is no attention of transformers",
    ),
)
GPU_ATTENTION = Choice(
    f"{MODEL}.override_config.attn_implementation",
    (None, "sdpa", "eager", "flash_attention_2"),
    "no other has been run with this model",
)
# Classes of ours in verl's places; one of the user's own may stand there, verl's cannot.
OURS = (
    f"{MODEL}._target_",
    f"{ACTOR}.fsdp_config._target_",
    f"{REF}.fsdp_config._target_",
    f"{ROLLOUT}.agent.agent_loop_manager_class",
    "data.custom_cls.path",
    "data.custom_cls.name",
)


class Range(NamedTuple):
    """A key whose value must be a number with `low` <= value <= `high`; None where it may be unset."""

    key: str
    low: float
    high: float = float("inf")
    whole: bool = True
    unset: bool = False


SMALLEST = 1e-6
RANGES = (
    *(
        Range(key, 1)
        for key in (
            "data.train_batch_size",
            "data.max_prompt_length",
            "data.max_response_length",
            f"{ACTOR}.ppo_mini_batch_size",
            f"{ACTOR}.ppo_epochs",
            f"{ROLLOUT}.n",
            f"{ROLLOUT}.max_num_seqs",
            f"{ROLLOUT}.max_num_batched_tokens",
            f"{ROLLOUT}.tensor_model_parallel_size",
            f"{ROLLOUT}.agent.num_workers",
            f"{ROLLOUT}.val_kwargs.n",
            "reward.num_workers",
            "trainer.nnodes",
            "trainer.n_gpus_per_node",
            "trainer.total_epochs",
            "transfer_queue.backend.SimpleStorage.num_data_storage_units",
        )
    ),
    Range("trainer.total_training_steps", 1, unset=True),
    Range("trainer.max_actor_ckpt_to_keep", 1, unset=True),
    Range("trainer.critic_warmup", 0),
    Range("train.max_failed_share", 0, 1, whole=False),
    Range("data.dataloader_num_workers", 0),
    Range("data.gen_batch_size", 1, unset=True),
    Range(f"{ACTOR}.ppo_micro_batch_size_per_gpu", 1, unset=True),
    Range(f"{ACTOR}.ppo_max_token_len_per_gpu", 1, unset=True),
    Range(f"{MODEL}.lora_rank", 0),
    Range(f"{ROLLOUT}.temperature", SMALLEST, whole=False),
    Range(f"{ROLLOUT}.top_p", SMALLEST, 1, whole=False),
    Range(f"{ROLLOUT}.gpu_memory_utilization", SMALLEST, 1, whole=False),
    Range(f"{ACTOR}.optim.lr", 0, whole=False),
    Range(f"{ACTOR}.optim.clip_grad", SMALLEST, whole=False),
    Range(f"{ACTOR}.clip_ratio", SMALLEST, whole=False),
)


def unsupported(config: DictConfig) -> Iterator[str]:
    """Settings of verl that would fail later or do something else than they say."""
    cpu = config.run.device == "cpu"
    for choice in (*CHOICES, *(CPU_CHOICES if cpu else (GPU_ATTENTION,))):
        value = OmegaConf.select(config, choice.key)
        if value not in choice.allowed and (value is not None or None in choice.allowed):
            yield f"{choice.key}={_text(value)}: {choice.why}; {_listed(choice.allowed)}"
    for key in OURS:
        value = OmegaConf.select(config, key)
        if not value or str(value).startswith("verl"):
            yield f"{key}={_text(value)}: audio would not arrive; leave it as configs/base/omni.yaml has it"
    loop = config.actor_rollout_ref.rollout.agent.default_agent_loop
    if loop in ("single_turn_agent", "tool_agent"):
        yield f"{ROLLOUT}.agent.default_agent_loop={loop}: it hears no clips; use soundmind_audio"
    for check in (algorithms, logprobs, rollout_sizes, optimizer, trackers, checkpoint_contents):
        yield from check(config)


def ranges(config: DictConfig) -> Iterator[str]:
    """Numbers that others divide by or count with; nothing else is checked while one is wrong."""
    for rule in RANGES:
        value = OmegaConf.select(config, rule.key)
        if value is None and rule.unset:
            continue
        number = isinstance(value, int if rule.whole else (int, float)) and value is not True
        if not number or not rule.low <= value <= rule.high:
            low = "above 0" if rule.low == SMALLEST else f"of at least {rule.low:g}"
            high = "" if rule.high == float("inf") else f" and at most {rule.high:g}"
            yield f"{rule.key}={_text(value)}: set {'a whole' if rule.whole else 'a'} number {low}{high}"


def algorithms(config: DictConfig) -> Iterator[str]:
    """Names that are read only where something is switched on."""
    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    if algorithm.use_kl_in_reward and algorithm.kl_penalty not in LOSS_PENALTIES:
        yield f"algorithm.kl_penalty={algorithm.kl_penalty}; {_listed(PENALTIES)}"
    if algorithm.use_kl_in_reward and algorithm.kl_ctrl.type not in ("fixed", "adaptive"):
        yield f"algorithm.kl_ctrl.type={algorithm.kl_ctrl.type}; {_listed(('fixed', 'adaptive'))}"
    if actor.use_kl_loss and actor.kl_loss_type not in LOSS_PENALTIES:
        yield f"{ACTOR}.kl_loss_type={actor.kl_loss_type}; {_listed(LOSS_PENALTIES)}"
    if actor.policy_loss.loss_mode == "dro" and not (actor.policy_loss.get("dro_beta") or 0) > 0:
        yield f"{ACTOR}.policy_loss.loss_mode=dro needs policy_loss.dro_beta above 0"
    yield from _recipes(config)
    if config.actor_rollout_ref.model.lora_rank and actor.strategy != "fsdp2":
        yield f"{ACTOR}.strategy={actor.strategy}: LoRA runs with fsdp2 alone; use fsdp2"
    rejections = algorithm.rollout_correction.rollout_rs
    for name in str(rejections).split(",") if rejections else ():
        if name.strip() not in REJECTIONS:
            yield f"algorithm.rollout_correction.rollout_rs={name.strip()}; {_listed(REJECTIONS)}"
    if rejections and algorithm.rollout_correction.rollout_rs_threshold is None:
        yield "algorithm.rollout_correction.rollout_rs needs rollout_rs_threshold"


def _recipes(config: DictConfig) -> Iterator[str]:
    """GDPO's components and DAPO's measure are numbers that the reward returns."""
    algorithm, reward = config.algorithm, config.reward.custom_reward_function
    if reward.path != "pkg://soundmind.rewards":
        return
    settings: Any = OmegaConf.to_container(reward.get("reward_kwargs") or {}, resolve=True)
    try:
        components = component_names(**settings)
    except (ValueError, TypeError):
        return  # `reward_settings` says so
    keys, weights = algorithm.get("gdpo_reward_keys"), algorithm.get("gdpo_reward_weights")
    if algorithm.adv_estimator == "gdpo":
        for name in keys or ("nothing",):
            if name not in components:
                yield f"algorithm.gdpo_reward_keys: {name}; {_listed(components)}"
        if weights is not None and len(weights) != len(keys or ()):
            yield (
                f"algorithm.gdpo_reward_weights has {len(weights)} numbers for {len(keys or ())} "
                "gdpo_reward_keys; give one each"
            )
        if algorithm.use_kl_in_reward:
            yield (
                "algorithm.use_kl_in_reward=true: gdpo normalises the components alone and would lose "
                f"the penalty; set it to false and {ACTOR}.use_kl_loss=true"
            )
    filtered = algorithm.filter_groups
    measures = ("reward", "score", *RATE_KEYS, *components)
    if filtered.enable and filtered.metric not in measures:
        yield f"algorithm.filter_groups.metric={_text(filtered.metric)}; {_listed(measures)}"
    if filtered.enable and config.actor_rollout_ref.rollout.n < 2:
        yield "algorithm.filter_groups.enable=true: one response a prompt never differs; use n >= 2"


def logprobs(config: DictConfig) -> Iterator[str]:
    """The alarm for audio that does not arrive compares rollout with trainer at every step."""
    if not config.actor_rollout_ref.rollout.calculate_log_probs:
        yield (
            f"{ROLLOUT}.calculate_log_probs=false: nothing would show that rollout and trainer see "
            "different audio; leave it true"
        )


def rollout_sizes(config: DictConfig) -> Iterator[str]:
    """Keys that repeat others, and budgets of the rollout server."""
    data, rollout = config.data, config.actor_rollout_ref.rollout
    for ours, theirs in (
        ("max_prompt_length", "prompt_length"),
        ("max_response_length", "response_length"),
    ):
        if rollout[theirs] != data[ours]:
            yield (
                f"{ROLLOUT}.{theirs}={rollout[theirs]} is not data.{ours}={data[ours]}; set data.{ours} "
                "alone"
            )
    longest = rollout.max_model_len or data.max_prompt_length + data.max_response_length
    if not rollout.enable_chunked_prefill and rollout.max_num_batched_tokens < longest:
        yield (
            f"{ROLLOUT}.max_num_batched_tokens={rollout.max_num_batched_tokens} is below one sequence of "
            f"{longest} tokens, which enable_chunked_prefill=false cannot cut; raise it"
        )
    if rollout.max_num_batched_tokens < rollout.max_num_seqs:
        yield (
            f"{ROLLOUT}.max_num_batched_tokens={rollout.max_num_batched_tokens} is below "
            f"max_num_seqs={rollout.max_num_seqs}: a step decodes a token of each; lower max_num_seqs"
        )
    if rollout.top_k != -1 and not (isinstance(rollout.top_k, int) and rollout.top_k >= 1):
        yield f"{ROLLOUT}.top_k={rollout.top_k}: -1 for all tokens, or at least 1"
    gpus = config.trainer.n_gpus_per_node * config.trainer.nnodes
    for side in (config.actor_rollout_ref.actor, config.actor_rollout_ref.ref):
        size = side.fsdp_config.fsdp_size
        if size != -1 and (size < 1 or gpus % size):
            yield f"fsdp_config.fsdp_size={size} does not divide the {gpus} ranks; -1 takes all"
            break
    generated = data.get("gen_batch_size")
    if generated and data.train_batch_size % generated:
        yield (
            f"data.gen_batch_size={generated} does not divide data.train_batch_size="
            f"{data.train_batch_size}; leave it null"
        )
    storage = config.transfer_queue.backend.SimpleStorage.total_storage_size
    entries = data.train_batch_size * (rollout.n + 2)
    if storage < entries:
        yield (
            f"transfer_queue.backend.SimpleStorage.total_storage_size={storage} is below a step's "
            f"{entries} entries; raise it"
        )


def optimizer(config: DictConfig) -> Iterator[str]:
    """The optimizer can be imported."""
    optim = config.actor_rollout_ref.actor.optim
    try:
        found = importlib.util.find_spec(optim.optimizer_impl) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        yield f"{ACTOR}.optim.optimizer_impl={optim.optimizer_impl}: no such package; install it"
        return
    if "adam" not in str(optim.optimizer).lower():
        yield f"{ACTOR}.optim.optimizer={optim.optimizer}: only kinds of AdamW have been run"
    elif not hasattr(importlib.import_module(optim.optimizer_impl), optim.optimizer):
        yield f"{ACTOR}.optim.optimizer={optim.optimizer}: {optim.optimizer_impl} has no such class"


TRACKERS = ("console", "file", "tensorboard", "wandb", "mlflow", "swanlab", "clearml", "trackio")


def trackers(config: DictConfig) -> Iterator[str]:
    """Every logger is one that verl has, and its package is installed."""
    wanted = config.trainer.logger
    for name in [wanted] if isinstance(wanted, str) else wanted or ():
        if name not in TRACKERS:
            yield f"trainer.logger={name}; {_listed(TRACKERS)}"
        elif name not in ("console", "file") and importlib.util.find_spec(name) is None:
            yield f"trainer.logger={name}: the package is not installed; pip install {name}"


def checkpoint_contents(config: DictConfig) -> Iterator[str]:
    """A checkpoint that a run continues from and that is exported holds these three."""
    needed = ("model", "optimizer", "extra")
    for key in ("save_contents", "load_contents"):
        contents = list(config.actor_rollout_ref.actor.checkpoint[key])
        if config.trainer.save_freq > 0 and contents != [*needed]:
            yield (
                f"{ACTOR}.checkpoint.{key}={_text(contents)}: a run resumes from and is exported from "
                f"{', '.join(needed)}; python -m soundmind.export writes Hugging Face folders"
            )


def _text(value: Any) -> str:
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def _listed(allowed: tuple[Any, ...]) -> str:
    names = [_text(value) for value in allowed]  # in the order of the table, the usual one first
    return f"use {names[0]}" if len(names) == 1 else f"use one of {', '.join(names)}"
