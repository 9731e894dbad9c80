"""From a configuration to what the arithmetic asks for: cards, assumptions, engine, micro-batches."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from soundmind.data.audio import AUDIO_TOKENS_PER_SECOND, MEL_FRAMES_PER_SECOND
from soundmind.planning import flops
from soundmind.planning.memory import MicroBatch, Training
from soundmind.planning.sizes import OmniSize

GB = 10**9
# Rows of the published splits (paper, table 3), used where the Parquet is not there yet. [paper]
PUBLISHED_ROWS = {"train": 5184, "dev": 606, "test": 656}
PUBLISHED_SECONDS = 62.33  # mean length of a training question (paper, table 3) [paper]
# Mean text of a prompt by its mode, in tokens of the published tokenizer: system line, instruction and
# chat marks, and the written question where there is one (201 on average). Measured on the 606 dev
# rows: python -m soundmind.preprocess --mode text --tokenizer <published folder>. [ours]
TEXT_TOKENS = {"audio": 138, "text": 338, "dual": 339}
# Mean of the annotated reasonings on the same rows, and so of the answers that are paid for. [ours]
RESPONSE_TOKENS = 1056


@dataclass(frozen=True)
class Card:
    """A GPU by the maker's figures: memory in bytes, dense bf16 operations and bytes a second."""

    name: str
    memory: int
    operations: float
    bandwidth: float


CARDS = {
    "H100": Card("H100", 80 * GB, flops.DENSE_PEAK["H100"], 3.35e12),
    "H800": Card("H800", 80 * GB, flops.DENSE_PEAK["H800"], 3.35e12),
    "H200": Card("H200", 141 * GB, flops.DENSE_PEAK["H200"], 4.8e12),
    "A100": Card("A100", 80 * GB, flops.DENSE_PEAK["A100"], 2.04e12),
}


@dataclass(frozen=True)
class Assumptions:
    """What the estimate of time rests on; every one can be given on the command line."""

    clip_seconds: float
    response_tokens: int
    prompt_text_tokens: int
    clip_share: float = 1.0  # of the prompts, those with a clip
    mfu: float = 0.40  # share of the peak in forward, backward and prefill
    decode_share: float = 0.60  # share of the memory bandwidth while decoding
    longest_answer: float = 2.0  # the slowest answer of a batch, in mean answers
    host_link: float = 25e9  # bytes a second between GPU and host memory
    overhead_seconds: float = 5.0  # per step: rewards, data, waking and sleeping of vLLM

    @property
    def mel_frames(self) -> int:
        """Mel frames of a mean clip."""
        return round(self.clip_seconds * MEL_FRAMES_PER_SECOND)

    @property
    def audio_tokens(self) -> int:
        """Tokens of a mean clip."""
        return round(self.clip_seconds * AUDIO_TOKENS_PER_SECOND)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a mean prompt, over those with and without a clip."""
        return self.prompt_text_tokens + round(self.clip_share * self.audio_tokens)


def assumptions(config: DictConfig, **given: Any) -> Assumptions:
    """What is assumed of `config` where nothing else is `given`: its modes, the published lengths.

    Values of `given` that are None count as not given; answers are never longer than the limit.
    """
    share, text = mixture(config)
    values: dict[str, Any] = {
        "clip_seconds": PUBLISHED_SECONDS,
        "response_tokens": RESPONSE_TOKENS,
        "prompt_text_tokens": text,
        "clip_share": share,
        **{name: value for name, value in given.items() if value is not None},
    }
    limit = int(config.data.max_response_length)
    values["response_tokens"] = min(values["response_tokens"], limit)
    return Assumptions(**values)


def mixture(config: DictConfig) -> tuple[float, int]:
    """Share of the training prompts that have a clip, and mean tokens of their text."""
    files = config.data.train_files
    counts: dict[str, int] = {}
    for name in [files] if isinstance(files, str) else files:
        mode = mode_of(Path(name))
        counts[mode] = counts.get(mode, 0) + rows_of(name, "train")[0]
    total = max(1, sum(counts.values()))
    text = sum(TEXT_TOKENS[mode] * count for mode, count in counts.items()) / total
    return 1 - counts.get("text", 0) / total, round(text)


def mode_of(file: Path) -> str:
    """Prompt mode of a Parquet file: what its rows say, else its folder's name, else audio."""
    if file.is_file():
        import pyarrow.parquet as parquet

        first = next(parquet.ParquetFile(file).iter_batches(1, columns=["extra_info"]), None)
        mode = first["extra_info"][0].as_py().get("mode") if first else None
        if mode in TEXT_TOKENS:
            return str(mode)
    return file.parent.name if file.parent.name in TEXT_TOKENS else "audio"


def dtype_bytes(name: Any) -> int:
    """Bytes of a value of verl's dtype names (`fp32`, `bf16`, ...); None is fp32."""
    return 2 if str(name).lower() in ("bf16", "bfloat16", "fp16", "float16", "half") else 4


def gpus_of(config: DictConfig) -> int:
    """Ranks over all nodes."""
    return int(config.trainer.n_gpus_per_node * config.trainer.nnodes)


def training_setup(config: DictConfig, size: OmniSize) -> Training:
    """The actor's engine as `soundmind.planning.memory` wants it described."""
    model, fsdp = config.actor_rollout_ref.model, config.actor_rollout_ref.actor.fsdp_config
    rank = int(model.lora_rank)
    precision = fsdp.get("mixed_precision") or {}
    cpu = config.trainer.device == "cpu"
    shards = gpus_of(config) if fsdp.fsdp_size in (-1, 0) else int(fsdp.fsdp_size)
    return Training(
        size=size,
        trained=flops.Trained(
            audio_tower=bool(config.train.audio_tower),
            projector=bool(config.train.projector),
            lora_rank=rank,
        ),
        ranks=shards,
        weight_bytes=dtype_bytes(fsdp.model_dtype),
        compute_bytes=dtype_bytes(precision.get("param_dtype", "bf16")),
        reduce_bytes=dtype_bytes(precision.get("reduce_dtype", "fp32")),
        checkpointing=bool(model.enable_gradient_checkpointing),
        flash=not cpu,
        forward_prefetch=bool(fsdp.forward_prefetch),
        reshard_after_forward=bool(fsdp.reshard_after_forward),
        keep_gradients_whole=bool(fsdp.get("use_no_sync_for_gradient_accumulation", False)),
        optimizer=optimizer_kind(config),
        scaled_logits=float(config.actor_rollout_ref.rollout.temperature) != 1.0,
    )


def optimizer_kind(config: DictConfig) -> str:
    """How AdamW runs: what the configuration says, else PyTorch's choice for the device."""
    settings = config.actor_rollout_ref.actor.optim.get("override_optimizer_config") or {}
    if settings.get("fused"):
        return "fused"
    if settings.get("foreach") is False or config.trainer.device == "cpu":
        return "loop"
    return "foreach"


def longest_row(config: DictConfig) -> int:
    """Tokens of the longest prompt with the longest response."""
    return int(config.data.max_prompt_length + config.data.max_response_length)


def micro_batch(config: DictConfig, side: str, clip_tokens: int) -> MicroBatch:
    """The largest micro-batch of a pass, filled with the longest rows and a clip of its own each.

    `side`: `update`, `rollout` (old log-probabilities) or `ref`. `clip_tokens`: audio tokens in the
    longest prompt.
    """
    actor = config.actor_rollout_ref.actor
    row = longest_row(config)
    if side == "update":
        dynamic, budget = actor.use_dynamic_bsz, actor.ppo_max_token_len_per_gpu
        rows = actor.ppo_micro_batch_size_per_gpu
    else:
        settings = config.actor_rollout_ref[side]
        dynamic = settings.log_prob_use_dynamic_bsz
        budget = settings.log_prob_max_token_len_per_gpu
        rows = settings.log_prob_micro_batch_size_per_gpu
    clip = (clip_tokens * MEL_FRAMES_PER_SECOND // AUDIO_TOKENS_PER_SECOND,) if clip_tokens else ()
    packed = bool(config.actor_rollout_ref.model.use_remove_padding)
    length = row
    if dynamic:
        rows = max(1, budget // row)
        length = max(row, budget // rows)
    rows = max(1, rows or 1)
    # Logits are computed at response positions only (soundmind.training.micro_batch).
    logits = rows * int(config.data.max_response_length)
    return MicroBatch(rows, length, clip * rows, packed, logits)


def rows_of(files: Any, split: str) -> tuple[int, str]:
    """Rows of the Parquet files, or of the published split if one of them is not there."""
    import pyarrow.parquet as parquet

    paths = [Path(path) for path in ([files] if isinstance(files, str) else files)]
    if all(path.is_file() for path in paths):
        return sum(parquet.ParquetFile(path).metadata.num_rows for path in paths), "Parquet"
    return PUBLISHED_ROWS[split] * len(paths), "paper, table 3"


def micro_batches(config: DictConfig, batch: MicroBatch) -> int:
    """Micro-batches of a rank's mini-batch, at the longest rows."""
    actor = config.actor_rollout_ref.actor
    responses: int = actor.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n
    return max(1, ceil(responses / gpus_of(config) / batch.rows))
