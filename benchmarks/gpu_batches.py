"""What the GPU check computes with: a thinker of published width, batches, loss, optimizer, clock."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from soundmind.planning import flops
from soundmind.planning.sizes import (
    QWEN2_5_OMNI_3B,
    QWEN2_5_OMNI_7B,
    AudioSize,
    OmniSize,
    TextSize,
    VisionSize,
)
from soundmind.standin.random_thinker import random_thinker, random_thinker_config
from soundmind.training.policy import as_policy
from soundmind.training.shared_prompts import share_prompts

FRAMES_PER_SECOND = 100  # log-mel frames; four of them make one placeholder token
# Widths, heads and vocabulary; depth comes from the arguments. `tiny` is this check's own.
WIDTHS: dict[str, tuple[TextSize, AudioSize]] = {
    "7b": (QWEN2_5_OMNI_7B.text, QWEN2_5_OMNI_7B.audio),
    "3b": (QWEN2_5_OMNI_3B.text, QWEN2_5_OMNI_3B.audio),
    "tiny": (
        TextSize(hidden=128, layers=2, heads=4, kv_heads=2, intermediate=384, vocab=2048),
        AudioSize(width=128, layers=2, heads=4, ffn=384, output=128),
    ),
}


class Skipped(Exception):
    """A part that cannot run here; the message names what is missing."""


class CheckFailed(Exception):
    """A figure outside its bounds; the message says which and what it means."""


def reduced_size(
    width: str, layers: int, audio_layers: int, vocabulary: int | None = None
) -> OmniSize:
    """A thinker of a published width; vision, which is dropped, as small as its class allows."""
    text, audio = WIDTHS[width]
    return OmniSize(
        name=width,
        text=replace(text, layers=layers, vocab=vocabulary or text.vocab),
        audio=replace(audio, layers=audio_layers),
        vision=VisionSize(hidden=64, layers=1, intermediate=64, output=text.hidden),
        source="benchmarks/gpu_check.py",
    )


def build_policy(
    size: OmniSize, device: torch.device, dtype: torch.dtype, attention: str, seed: int
) -> Any:
    """The policy with random weights on `device`, without a vision tower, in training mode."""
    thinker = random_thinker(size, attention, dtype=dtype, device=device, seed=seed)
    del thinker.visual
    return as_policy(thinker).train()


@dataclass
class Sequences:
    """Rows of one batch: token ids per row, where each answer starts, one clip a row or none."""

    rows: list[torch.Tensor]  # int64, (length,)
    answer_starts: list[int]
    features: torch.Tensor | None  # (num_rows, 128, frames) float32
    masks: torch.Tensor | None  # (num_rows, frames) int64

    def part(self, start: int, stop: int) -> Sequences:
        return Sequences(
            self.rows[start:stop],
            self.answer_starts[start:stop],
            None if self.features is None else self.features[start:stop],
            None if self.masks is None else self.masks[start:stop],
        )

    @property
    def lengths(self) -> list[int]:
        return [row.numel() for row in self.rows]

    @property
    def frames(self) -> list[int]:
        """Log-mel frames of each clip; empty without clips."""
        return [] if self.masks is None else self.masks.sum(-1).tolist()

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def num_answer_tokens(self) -> int:
        """Positions at which logits are computed."""
        return self.num_tokens - sum(self.answer_starts)


def make_sequences(
    size: OmniSize,
    count: int,
    *,
    seconds: float,
    answer: int,
    instruction: int,
    device: torch.device,
    seed: int,
    ragged: bool = False,
) -> Sequences:
    """`count` random rows: instruction, clip of `seconds` (0: none), answer; `ragged` varies lengths."""
    generator = torch.Generator().manual_seed(seed)
    config = random_thinker_config(size)
    placeholders = partial(flops.audio_tokens, size.audio)
    highest = config.audio_token_id - 64  # no special token
    rows, starts, lengths = [], [], []
    for index in range(count):
        shorter = 1.0 - 0.1 * index if ragged else 1.0
        frames = int(seconds * FRAMES_PER_SECOND * shorter)
        prompt = torch.randint(0, highest, (instruction,), generator=generator)
        if frames:
            prompt = torch.cat(
                [
                    torch.tensor([config.audio_start_token_id]),
                    torch.full((placeholders(frames),), config.audio_token_id),
                    torch.tensor([config.audio_end_token_id]),
                    prompt,
                ]
            )
        response = torch.randint(0, highest, (int(answer * shorter),), generator=generator)
        rows.append(torch.cat([prompt, response]).to(device))
        starts.append(len(prompt))
        lengths.append(frames)
    if not seconds:
        return Sequences(rows, starts, None, None)
    features = torch.randn(count, size.audio.mel_bins, max(lengths), generator=generator)
    masks = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    features = features * masks[:, None]
    return Sequences(rows, starts, features.to(device), masks.long().to(device))


def packed_inputs(batch: Sequences) -> dict[str, Any]:
    """Rows one behind another as verl sends them: ids (1, total), positions that restart."""
    positions = [torch.arange(row.numel(), device=row.device) for row in batch.rows]
    return {
        "input_ids": torch.cat(batch.rows)[None],
        "attention_mask": None,
        "position_ids": torch.cat(positions)[None],
        "input_features": batch.features,
        "feature_attention_mask": batch.masks,
    }


def padded_inputs(batch: Sequences) -> dict[str, Any]:
    """Rows below one another, padded on the right: ids, mask and positions (num_rows, longest)."""
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in batch.rows], batch_first=True)
    positions = [torch.arange(row.numel(), device=row.device) for row in batch.rows]
    return {
        "input_ids": pad(batch.rows, batch_first=True),
        "attention_mask": mask,
        "position_ids": pad(positions, batch_first=True),
        "input_features": batch.features,
        "feature_attention_mask": batch.masks,
    }


# --- log-probabilities, loss, optimizer -----------------------------------------------------------


def log_probs_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (tokens,) float32 of `labels` under `logits` (tokens, vocabulary).

    As verl: flash-attention's kernel where it is installed, on a GPU, which destroys `logits` in
    backward. Without it a fp32 copy of the logits is made: 0.6 GB per thousand tokens.
    """
    if logits.is_cuda and has("flash_attn"):
        from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

        return -cross_entropy_loss(logits, labels, inplace_backward=True)[0]
    return -torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")


def answer_masks(batch: Sequences) -> list[torch.Tensor]:
    """(length,) bool for each row: positions whose *next* token belongs to the answer."""
    masks = []
    for row, start in zip(batch.rows, batch.answer_starts, strict=True):
        mask = torch.zeros(row.numel(), dtype=torch.bool, device=row.device)
        mask[start - 1 : -1] = True
        masks.append(mask)
    return masks


def autocast(device: torch.device, dtype: torch.dtype) -> Any:
    """verl's context: autocast to the compute dtype, none in fp32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device_type=device.type, dtype=dtype)


def answer_log_probs(
    policy: Any, batch: Sequences, *, padded: bool = False, **changed: Any
) -> torch.Tensor:
    """Log-probabilities of all answer tokens of `batch`, float32, rows one behind another.

    Over one packed row, or with `padded` over rows below one another; `changed` replaces model
    inputs.
    """
    inputs = {**(padded_inputs(batch) if padded else packed_inputs(batch)), **changed}
    masks = answer_masks(batch)
    packed = torch.cat(masks)
    labels = torch.cat(batch.rows).roll(-1)[packed]
    laid_out = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True) if padded else packed
    weight = policy.lm_head.weight
    with autocast(weight.device, weight.dtype):
        # The output head sees these positions alone, as in training.
        positions = laid_out.flatten().nonzero().flatten()
        logits = policy(**inputs, logit_positions=positions, use_cache=False).logits[0]
        return log_probs_of(logits, labels)


@dataclass
class LaidOut:
    """Answers of one prompt as the policy takes them; `labels` are all of their tokens in order."""

    inputs: dict[str, Any]
    labels: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.inputs["input_ids"].numel()


def one_prompt(batch: Sequences) -> tuple[LaidOut, LaidOut]:
    """The answers of `batch` to its first prompt: a packed row of each, and the prompt once.

    Its clip is encoded once in both, as in training.
    """
    prompt = batch.rows[0][: batch.answer_starts[0]]
    answers = [row[start:] for row, start in zip(batch.rows, batch.answer_starts, strict=True)]
    first = batch.part(0, 1)
    count = len(answers)
    rows = Sequences(
        [torch.cat([prompt, answer]) for answer in answers],
        [prompt.numel()] * count,
        first.features,
        first.masks,
    )
    apart = packed_inputs(rows)
    apart["logit_positions"] = torch.cat(answer_masks(rows)).nonzero().flatten()
    apart["clip_index"] = torch.zeros(count, dtype=torch.long, device=prompt.device)
    shared = share_prompts([prompt] * count, answers, [0] * count)
    once = {
        **packed_inputs(first),
        "input_ids": shared.input_ids,
        "position_ids": shared.position_ids,
        "attention_mask": shared.attention_mask,
        "logit_positions": shared.logit_positions,
    }
    labels = torch.cat(answers)
    return LaidOut(apart, labels), LaidOut(once, labels)


def log_probs_at(policy: Any, laid_out: LaidOut) -> torch.Tensor:
    """Log-probabilities (tokens,) float32 of the labels."""
    weight = policy.lm_head.weight
    with autocast(weight.device, weight.dtype):
        logits = policy(**laid_out.inputs, use_cache=False).logits[0]
        return log_probs_of(logits, laid_out.labels)


def grpo_loss(log_probs: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Clipped policy-gradient loss, mean over the `num_tokens` answer tokens of the mini-batch.

    On-policy, so the old log-probabilities are this pass's own. Advantages alternate in sign.
    """
    advantages = torch.ones_like(log_probs)
    advantages[::2] = -0.5
    ratio = (log_probs - log_probs.detach()).exp()
    clipped = ratio.clamp(0.8, 1.2)
    return -torch.minimum(ratio * advantages, clipped * advantages).sum() / num_tokens


class Trainer:
    """fp32 master weights and gradients under a bf16 policy, as FSDP's mixed precision keeps them.

    Every micro-batch's gradients are added to the master's in fp32 and freed at once; `step` clips,
    runs AdamW on the masters and copies them back.
    """

    def __init__(self, policy: Any, learning_rate: float) -> None:
        self.weights = [weight for weight in policy.parameters() if weight.requires_grad]
        self.masters = [weight.detach().float().clone() for weight in self.weights]
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = torch.zeros_like(master)
            weight.register_post_accumulate_grad_hook(self._hook(master))
        self.optimizer = torch.optim.AdamW(
            self.masters,
            lr=learning_rate,
            weight_decay=0.01,
            fused=self.masters[0].is_cuda,
        )

    @staticmethod
    def _hook(master: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def move(weight: torch.Tensor) -> None:
            assert master.grad is not None and weight.grad is not None
            master.grad += weight.grad
            weight.grad = None

        return move

    def zero(self) -> None:
        for master in self.masters:
            assert master.grad is not None
            master.grad.zero_()

    @torch.no_grad()
    def step(self) -> float:
        """Clip to norm 1, step, copy back; returns the norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.masters, 1.0, foreach=True)
        self.optimizer.step()
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.copy_(master)
        return float(norm)


# --- measuring ------------------------------------------------------------------------------------


def has(package: str) -> bool:
    """Is `package` installed? Does not import it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


class Meter:
    """Time and peak memory on one device; memory is None on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def reset_peak(self) -> None:
        if self.device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gb(self) -> float | None:
        """Highest allocation since `reset_peak`, in 10^9 bytes."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device) / 1e9

    def timed(self, work: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
        """Median seconds of `repeats` calls, and the last one's result."""
        seconds, result = [], None
        for _ in range(repeats):
            self.synchronize()
            start = time.perf_counter()
            result = work()
            self.synchronize()
            seconds.append(time.perf_counter() - start)
        return sorted(seconds)[len(seconds) // 2], result


def gaps(one: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """Mean and largest absolute difference of two sets of log-probabilities, and correlation."""
    one, other = one.double(), other.double()
    difference = (one - other).abs()
    centred, others = one - one.mean(), other - other.mean()
    norm = float(centred.norm() * others.norm())
    return {
        "mean_gap": float(difference.mean()),
        "max_gap": float(difference.max()),
        "correlation": float(centred @ others) / norm if norm else math.nan,
    }


def require(condition: bool, message: str) -> None:
    if not condition:
        raise CheckFailed(message)
