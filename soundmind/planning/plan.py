"""Memory, disk, time and lengths of a configuration, as numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from math import ceil
from typing import Any

from omegaconf import DictConfig

from soundmind.data.audio import AUDIO_TOKENS_PER_SECOND, MEL_FRAMES_PER_SECOND
from soundmind.planning import flops, memory, rollouts, rules
from soundmind.planning.disk import disk_space
from soundmind.planning.memory import MicroBatch, Training
from soundmind.planning.setup import (
    GB,
    Assumptions,
    Card,
    dtype_bytes,
    gpus_of,
    longest_row,
    micro_batch,
    micro_batches,
    rows_of,
    training_setup,
)
from soundmind.planning.sizes import OmniSize, model_size

# Per process on a GPU, not seen by PyTorch's allocator: CUDA context and library kernels. [ours]
CONTEXT_BYTES = int(0.6 * GB)
# NCCL's channels and buffers where there is more than one rank. [ours]
COLLECTIVE_BYTES = 1 * GB
# vLLM's CUDA graphs, outside of its memory share. [ours]
GRAPH_BYTES = 1 * GB
# Kept free of everything that is counted: fragmentation and what is not modelled. [ours]
RESERVE_SHARE = 0.06
# Host memory of one process with torch and verl, and of vLLM's engine. [ours]
PROCESS_BYTES = int(1.5 * GB)
ENGINE_BYTES = 5 * GB


@dataclass(frozen=True)
class Phase:
    """Bytes on one GPU in one phase of a step, by part, at its largest moment."""

    name: str
    moment: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Sum over the parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """Everything that is printed, as plain numbers. Bytes, tokens, seconds."""

    config: str
    model: str
    gpus: int
    nodes: int
    card: Card
    reserve: int
    phases: list[Phase]
    kv_cache: int
    kv_tokens: int
    host: dict[str, int]
    disk: dict[str, int]
    tokens: dict[str, int]
    seconds: dict[str, float]
    steps_per_epoch: int
    steps: int
    rows: int
    rows_source: str
    longest_prompt: dict[str, int]
    problems: list[str]
    assumptions: Assumptions

    @property
    def largest(self) -> Phase:
        """The phase with the most bytes."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        """Whether every phase leaves the reserve free and vLLM has room for one sequence."""
        enough = self.largest.total + self.reserve <= self.card.memory
        return enough and self.kv_tokens >= self.longest_prompt["one sequence"]


# --- memory ---------------------------------------------------------------------------------------


def phases(config: DictConfig, setup: Training, card: Card, clip_tokens: int) -> Iterator[Phase]:
    """Every phase of a step with its largest moment, for one GPU."""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    fsdp = actor.fsdp_config
    share = int(rollout.gpu_memory_utilization * card.memory)
    sleeps = bool(rollout.free_cache_engine and rollout.get("enable_sleep_mode", True))
    asleep = {"vLLM": 0 if sleeps else share}
    contexts = {"CUDA contexts": 2 * CONTEXT_BYTES}
    if setup.ranks > 1:
        contexts["NCCL"] = COLLECTIVE_BYTES
    weights = memory.weight_shard_bytes(setup)
    optimizer = 2 * memory.gradient_shard_bytes(setup)
    resting = {
        "weights": 0 if fsdp.param_offload else weights,
        "optimizer": 0 if fsdp.optimizer_offload else optimizer,
    }
    always = {**contexts, **asleep}

    # 1. Rollouts: vLLM is awake, the trainer keeps what is not offloaded.
    yield Phase(
        "rollout",
        "decoding",
        {**resting, **contexts, "vLLM": share, "CUDA graphs": _graphs(config)},
    )
    # 2. Old log-probabilities and the reference: forwards without gradients.
    old = memory.peak(
        memory.forward_moments(setup, micro_batch(config, "rollout", clip_tokens), True)
    )
    yield Phase(
        "old log-probabilities",
        old.name,
        {**old.parts, "optimizer": resting["optimizer"], **always},
    )
    if rules.needs_reference(config) and not setup.trained.lora_rank:
        moments = memory.forward_moments(setup, micro_batch(config, "ref", clip_tokens), False)
        reference = memory.peak(moments)
        # verl keeps the reference in host memory; a layer at a time is gathered.
        parts = {**reference.parts, **resting}
        yield Phase("reference", reference.name, {**parts, **always})
    # 3. The update, with everything on the GPU, offloaded or not.
    batch = micro_batch(config, "update", clip_tokens)
    update = memory.training_peak(setup, batch, micro_batches(config, batch))
    yield Phase("update", update.name, {**update.parts, **always})
    # 4. Weights to vLLM: it has its weights back, and one whole tensor and one bucket are on the way.
    text = setup.size.text
    tensor = text.embedding_parameters * max(setup.weight_bytes, 2)
    bucket = int(rollout.checkpoint_engine.update_weights_bucket_megabytes) * 2**20
    served = rollouts.rollout_weights(setup.size, int(rollout.tensor_model_parallel_size))
    yield Phase(
        "weights to vLLM",
        "embedding table",
        {
            "weights": weights,
            "optimizer": resting["optimizer"],
            **contexts,
            "gathered": tensor,
            "bucket": bucket,
            "vLLM": served if sleeps else share,
        },
    )


def _graphs(config: DictConfig) -> int:
    return 0 if config.actor_rollout_ref.rollout.enforce_eager else GRAPH_BYTES


def kv_cache(config: DictConfig, size: OmniSize, card: Card) -> int:
    """Bytes of one GPU that vLLM has left for keys and values; negative if there is no room."""
    rollout = config.actor_rollout_ref.rollout
    share = int(rollout.gpu_memory_utilization * card.memory)
    ranks = int(rollout.tensor_model_parallel_size)
    working = rollouts.rollout_activations(
        size, int(rollout.max_num_batched_tokens), int(rollout.max_num_seqs)
    )
    return share - rollouts.rollout_weights(size, ranks) - working


def host_memory(config: DictConfig, setup: Training, assumed: Assumptions) -> dict[str, int]:
    """Bytes of host memory on a node, by part."""
    fsdp, trainer = config.actor_rollout_ref.actor.fsdp_config, config.trainer
    node_share = trainer.n_gpus_per_node / gpus_of(config)
    loaded = memory.loaded_weights(setup)
    parts = {}
    if fsdp.param_offload:
        parts["weights, offloaded"] = int(loaded * setup.weight_bytes * node_share)
    if fsdp.optimizer_offload:
        state = 2 * memory.trained_weights(setup) * memory.trained_bytes(setup)
        parts["optimizer, offloaded"] = int(state * node_share)
    if rules.needs_reference(config) and not setup.trained.lora_rank:
        bytes_each = dtype_bytes(config.actor_rollout_ref.ref.fsdp_config.model_dtype)
        parts["reference, pinned"] = int(loaded * bytes_each * node_share)
    parts["whole model while loading"] = loaded * setup.weight_bytes
    parts["processes"] = int(trainer.n_gpus_per_node) * (PROCESS_BYTES * 2 + ENGINE_BYTES)
    workers = (
        config.actor_rollout_ref.rollout.agent.num_workers + config.data.dataloader_num_workers
    )
    parts["data and agent workers"] = int(workers) * PROCESS_BYTES
    clips = round(int(config.data.train_batch_size) * assumed.clip_share)
    parts["features, one copy a prompt"] = clips * feature_bytes(setup, assumed.mel_frames)
    return parts


def feature_bytes(setup: Training, mel_frames: int) -> int:
    """Bytes of one prompt's features in transit, in the type that the model computes in."""
    return mel_frames * setup.size.audio.mel_bins * setup.compute_bytes


# --- tokens and time ------------------------------------------------------------------------------


def tokens_per_step(config: DictConfig, assumed: Assumptions) -> dict[str, int]:
    """Tokens of a step over all GPUs, by kind, and what one GPU computes of them."""
    prompts, n = int(config.data.train_batch_size), int(config.actor_rollout_ref.rollout.n)
    responses = prompts * n
    tokens = {
        "prompt text": responses * assumed.prompt_text_tokens,
        "audio": round(responses * assumed.clip_share) * assumed.audio_tokens,
        "response": responses * assumed.response_tokens,
    }
    return {**tokens, "per GPU": sum(tokens.values()) // gpus_of(config)}


def step_seconds(
    config: DictConfig, setup: Training, card: Card, assumed: Assumptions
) -> dict[str, float]:
    """Seconds of a step by phase: an estimate from the maker's figures and the assumed shares."""
    size, gpus = setup.size, gpus_of(config)
    rollout, fsdp = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor.fsdp_config
    prompts, n = int(config.data.train_batch_size), int(rollout.n)
    responses = prompts * n
    speed = gpus * card.operations * assumed.mfu
    row = assumed.prompt_tokens + assumed.response_tokens
    share = assumed.clip_share if assumed.mel_frames else 0
    clips = [assumed.mel_frames] * round(prompts * share)
    # A rank sees each of its prompts' clips once a micro-batch: at worst once a response.
    heard = [assumed.mel_frames] * round(responses * share)
    logits = responses * assumed.response_tokens
    forward = flops.forward_flops(size, [row] * responses, heard, logits)
    update = flops.training_flops(size, [row] * responses, heard, setup.trained, logits)
    prefill = flops.forward_flops(size, [assumed.prompt_tokens] * prompts, clips, prompts)

    replicas = max(1, gpus // int(rollout.tensor_model_parallel_size))
    sequences = min(ceil(responses / replicas), int(rollout.max_num_seqs))
    rounds = ceil(responses / replicas / sequences)
    context = assumed.prompt_tokens + assumed.response_tokens / 2
    read = rollouts.rollout_weights(size, int(rollout.tensor_model_parallel_size))
    read += int(sequences * context * rollouts.kv_bytes_per_token(size.text))
    token_seconds = read / (card.bandwidth * assumed.decode_share)
    longest = min(
        assumed.response_tokens * assumed.longest_answer, int(config.data.max_response_length)
    )
    seconds = {
        "prefill": prefill / speed,
        "decode": rounds * longest * token_seconds,
        "old log-probabilities": forward / speed,
    }
    if rules.needs_reference(config):
        seconds["reference"] = forward / speed
        if not setup.trained.lora_rank:
            # Pinned shards come over the host link in every micro-batch.
            passes = micro_batches(config, micro_batch(config, "ref", 0))
            shards = memory.shard(memory.loaded_weights(setup), setup.ranks)
            shards *= dtype_bytes(config.actor_rollout_ref.ref.fsdp_config.model_dtype)
            seconds["reference"] += passes * shards / assumed.host_link
    epochs = int(config.actor_rollout_ref.actor.ppo_epochs)
    seconds["update"] = epochs * update / speed
    weights = memory.weight_shard_bytes(setup)
    state = 2 * memory.gradient_shard_bytes(setup)
    moved = (4 * weights if fsdp.param_offload else 0) + (
        2 * state if fsdp.optimizer_offload else 0
    )
    seconds["offloading"] = moved / assumed.host_link
    seconds["weights to vLLM"] = rollouts.rollout_weights(size) / assumed.host_link
    seconds["other"] = assumed.overhead_seconds
    return seconds


# --- the longest prompt ---------------------------------------------------------------------------


def prompt_limits(
    config: DictConfig, setup: Training, card: Card, reserve: int, kv_tokens: int
) -> dict[str, int]:
    """Tokens of the longest prompt that each budget holds, and `one sequence`: what is asked for."""
    response = int(config.data.max_response_length)
    rollout, actor = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor
    limits = {"data.max_prompt_length": int(config.data.max_prompt_length)}
    if rollout.max_model_len is not None:
        limits["rollout.max_model_len"] = int(rollout.max_model_len) - response
    if actor.use_dynamic_bsz:
        limits["actor.ppo_max_token_len_per_gpu"] = int(actor.ppo_max_token_len_per_gpu) - response
    limits["KV cache"] = kv_tokens - response
    limits["memory of the update"] = largest(
        lambda tokens: _one_row(setup, tokens, response) + reserve <= card.memory
    )
    return {**limits, "one sequence": longest_row(config)}


def _one_row(setup: Training, prompt: int, response: int) -> int:
    """Bytes of an update with one row, its prompt all audio, one of several micro-batches."""
    clips = (prompt * MEL_FRAMES_PER_SECOND // AUDIO_TOKENS_PER_SECOND,) if prompt else ()
    batch = MicroBatch(1, prompt + response, clips, logits=response)
    overhead = 2 * CONTEXT_BYTES + (COLLECTIVE_BYTES if setup.ranks > 1 else 0)
    return memory.training_peak(setup, batch, micro_batches=2).total + overhead


def largest(works: Callable[[int], bool], limit: int = 2**20) -> int:
    """The largest number from 1 to `limit` that `works`, which must be monotonic; 0 if none does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if works(middle) else (low, middle - 1)
    return low


# --- all together ---------------------------------------------------------------------------------


def make_plan(config: DictConfig, name: str, card: Card, assumed: Assumptions) -> Plan:
    """The plan of a composed configuration. Raises `SizeError` for a model that is not known."""
    size = model_size(str(config.actor_rollout_ref.model.path))
    setup = training_setup(config, size)
    clip_tokens = 0
    if assumed.clip_seconds and assumed.clip_share:
        clip_tokens = max(0, int(config.data.max_prompt_length) - assumed.prompt_text_tokens)
    reserve = int(RESERVE_SHARE * card.memory)
    cache = kv_cache(config, size, card)
    kv_tokens = max(0, cache) // rollouts.kv_bytes_per_token(size.text)
    kv_tokens *= int(config.actor_rollout_ref.rollout.tensor_model_parallel_size)
    rows, source = rows_of(config.data.train_files, "train")
    per_epoch = rows // int(config.data.train_batch_size)
    steps = config.trainer.total_training_steps or per_epoch * config.trainer.total_epochs
    problems = [
        str(problem)
        for problem in chain.from_iterable(
            check(config)
            for check in (
                rules.group_size,
                rules.batch_sizes,
                rules.micro_batch_sizes,
                rules.tensor_parallel,
                rules.lengths,
            )
        )
    ]
    return Plan(
        config=name,
        model=size.name,
        gpus=gpus_of(config),
        nodes=int(config.trainer.nnodes),
        card=card,
        reserve=reserve,
        phases=list(phases(config, setup, card, clip_tokens)),
        kv_cache=cache,
        kv_tokens=kv_tokens,
        host=host_memory(config, setup, assumed),
        disk=disk_space(config, setup, assumed, int(steps)),
        tokens=tokens_per_step(config, assumed),
        seconds=step_seconds(config, setup, card, assumed),
        steps_per_epoch=per_epoch,
        steps=int(steps),
        rows=rows,
        rows_source=source,
        longest_prompt=prompt_limits(config, setup, card, reserve, kv_tokens),
        problems=problems,
        assumptions=assumed,
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values, with totals and the verdict."""
    content = asdict(plan)
    for phase, entry in zip(plan.phases, content["phases"], strict=True):
        entry["total"] = phase.total
    return {**content, "fits": plan.fits, "largest_phase": plan.largest.name}
