"""Divisibility and length rules of a step; planning prints them, the checks before a run enforce them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from omegaconf import DictConfig

from soundmind.planning.sizes import SizeError, model_size

# Advantages that compare the responses of a prompt with one another, by their names in verl.
GROUPED = (
    *("grpo", "grpo_vectorized", "grpo_passk", "rloo", "rloo_vectorized", "opo", "gpg"),
    *("reinforce_plus_plus_baseline", "gdpo"),
)


def group_size(config: DictConfig) -> Iterator[str]:
    """What compares the responses of a group needs two of them."""
    n, estimator = config.actor_rollout_ref.rollout.n, config.algorithm.adv_estimator
    if estimator in GROUPED and n < 2:
        yield (
            f"actor_rollout_ref.rollout.n={n}: {estimator.upper()} has no group to compare with and "
            "would use the raw score as advantage; use n >= 2"
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


def micro_batch_sizes(config: DictConfig) -> Iterator[str]:
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
    if config.actor_rollout_ref.model.lora_rank == 0 and needs_reference(config):
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


def needs_reference(config: DictConfig) -> bool:
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
