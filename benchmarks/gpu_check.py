"""The first minutes on any GPU: does the thinker compute what it should, and how fast?

    bash scripts/gpu_check.sh                           # 7B's width, 4 + 4 layers
    bash scripts/gpu_check.sh --width 3b --layers 2     # a smaller GPU
    bash scripts/gpu_check.sh --layers 12 --audio-layers 32
    bash scripts/gpu_check.sh --width tiny --device cpu # no GPU, a narrow model

Nothing is downloaded. The model is Qwen2.5-Omni's thinker (`soundmind.training.policy` on transformers'
class) with random weights: width, heads and vocabulary as published, depth an argument. Every part
is a row of the table; one that fails says why, and the rest goes on. Exit status 1: a part failed.

    environment       GPU, memory, driver, versions; names what is missing
    forward           log-probabilities of the answers are finite
    backward          the GRPO loss reaches every part: gradients finite, and not zero
    optimizer_step    AdamW on fp32 master weights changes them, and the bf16 copy follows
    packed            several sequences in one row against each alone, in fp32 with sdpa and in bf16
                      with flash-attention; positions that do not restart must show as a difference
    audio             another clip changes the answers' log-probabilities; a text-only batch runs,
                      and its silent clip gives the audio tower gradients of exactly zero
    precision         log-probabilities in bf16 against fp32, the same weights
    shared            --sequences answers to one prompt with the prompt computed once
                      (`train.share_prompts`, sdpa), against a packed row of each: the same in fp32,
                      and how much faster a pass is in bf16
    update            one actor update of --sequences rows, over micro-batch and gradient
                      checkpointing: tokens/s, MFU, peak memory
    profile           slowest kernels of the best cell, if its MFU is below 45 % (or --profile)
    end_to_end        two steps of `python -m soundmind.train`, the stand-in, where verl and vLLM are

The same as in training: model class, forward, logits at the answers' positions alone, autocast
to bf16 over bf16 weights, gradients summed and stored in fp32, AdamW on fp32 master weights, gradient
clipping. Not the same: one process without FSDP, so nothing is gathered or scattered, and the
optimizer's part of an update weighs more than in a run sharded over several GPUs; few layers, so the
vocabulary's part weighs more; every row has a clip of its own, where the rows of one prompt share.

Needs torch and transformers. Whatever else is missing is named and its part skipped.
Writes  outputs/gpu_check.json (--output) and, with a profile, <output>.profile.txt beside it
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from soundmind.model.parts import part_of
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
from soundmind.system import files as system_files
from soundmind.system import machine
from soundmind.training.policy import as_policy
from soundmind.training.shared_prompts import share_prompts

REPOSITORY = Path(__file__).resolve().parent.parent
TARGET_MFU = 0.45  # below it the update is profiled
FP32_PACKING_GAP = 1e-4  # nats; fp32 sums in another order
BF16_PACKING_GAP = 0.05  # nats, mean; a neighbour that leaks in shows far above, see `packed`
PRECISION_CORRELATION = 0.995  # of log-probabilities, bf16 against fp32
FRAMES_PER_SECOND = 100  # log-mel frames; four of them make one placeholder token
CHUNK_ROWS = 1024  # rows of logits turned into log-probabilities at a time

# Widths, heads and vocabulary; depth comes from the arguments. `tiny` is this check's own.
WIDTHS: dict[str, tuple[TextSize, AudioSize]] = {
    "7b": (QWEN2_5_OMNI_7B.text, QWEN2_5_OMNI_7B.audio),
    "3b": (QWEN2_5_OMNI_3B.text, QWEN2_5_OMNI_3B.audio),
    "tiny": (
        TextSize(hidden=128, layers=2, heads=4, kv_heads=2, intermediate=384, vocab=2048),
        AudioSize(width=128, layers=2, heads=4, ffn=384, output=128),
    ),
}


@dataclass
class Row:
    """One part's result: `status` is ok, failed or skipped; `figures` are plain numbers and texts."""

    part: str
    status: str
    seconds: float
    figures: dict[str, Any] = field(default_factory=dict)
    message: str = ""


class Skipped(Exception):
    """A part that cannot run here; the message names what is missing."""


class CheckFailed(Exception):
    """A figure outside its bounds; the message says which and what it means."""


# --- model and batches ----------------------------------------------------------------------------


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
        talker=None,
        vocoder=None,
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


class ChunkedLogProbs(torch.autograd.Function):
    """Log-probabilities of labels from logits, fp32 inside, the gradient written over the logits.

    Stands in for flash-attention's cross-entropy kernel, which verl uses where it is installed:
    a full fp32 copy of (tokens, 152,064) logits would be 0.6 GB per thousand tokens.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        normalisers = torch.cat(
            [chunk.float().logsumexp(-1) for chunk in logits.detach().split(CHUNK_ROWS)]
        )
        ctx.save_for_backward(logits, labels, normalisers)
        return logits.gather(-1, labels[:, None])[:, 0].float() - normalisers

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, labels, normalisers = ctx.saved_tensors
        logits = logits.detach()
        for start in range(0, logits.shape[0], CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            softmax = (logits[rows].float() - normalisers[rows, None]).exp_()
            softmax.scatter_add_(-1, labels[rows, None], -torch.ones_like(softmax[:, :1]))
            logits[rows] = softmax.mul_(-gradient[rows, None]).to(logits.dtype)
        return logits, None


def log_probs_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (tokens,) float32 of `labels` under `logits` (tokens, vocabulary).

    As verl: flash-attention's kernel where it is installed, on a GPU. Destroys `logits` in backward.
    """
    if logits.is_cuda and has("flash_attn"):
        from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

        return -cross_entropy_loss(logits, labels, inplace_backward=True)[0]
    return ChunkedLogProbs.apply(logits, labels)


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


# --- the parts ------------------------------------------------------------------------------------


class GpuCheck:
    """All parts, sharing one policy; `run` returns a row for each part asked for."""

    PARTS = (
        "environment",
        "forward",
        "backward",
        "optimizer_step",
        "packed",
        "audio",
        "precision",
        "shared",
        "update",
        "profile",
        "end_to_end",
    )

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.meter = Meter(self.device)
        self.size = reduced_size(
            options.width, options.layers, options.audio_layers, options.vocabulary
        )
        self.attention = options.attention or (
            "flash_attention_2" if self.device.type == "cuda" and has("flash_attn") else "sdpa"
        )
        self._policy: Any = None
        self._trainer: Trainer | None = None
        self.best: dict[str, Any] | None = None

    @property
    def policy(self) -> Any:
        """The bf16 policy, built when a part first asks for it."""
        if self._policy is None:
            self._policy = build_policy(
                self.size, self.device, torch.bfloat16, self.attention, self.options.seed
            )
        return self._policy

    @property
    def trainer(self) -> Trainer:
        if self._trainer is None:
            self._trainer = Trainer(self.policy, learning_rate=1e-5)
        return self._trainer

    @property
    def peak_flops(self) -> float | None:
        """Dense bf16 operations a second that the maker promises; None for an unknown device."""
        if self.device.type != "cuda":
            return None
        return flops.dense_peak(torch.cuda.get_device_name(self.device))

    def mfu(self, operations: int, seconds: float) -> float | None:
        """Share of the device's peak at `operations` (`soundmind.planning.flops`) in `seconds`."""
        return operations / seconds / self.peak_flops if self.peak_flops else None

    def release(self) -> None:
        self._policy = self._trainer = None
        self.meter.free()

    def batch(self, count: int, *, ragged: bool = False, audio: bool = True) -> Sequences:
        return make_sequences(
            self.size,
            count,
            seconds=self.options.clip_seconds if audio else 0,
            answer=self.options.answer_tokens,
            instruction=self.options.instruction_tokens,
            device=self.device,
            seed=self.options.seed + 1,
            ragged=ragged,
        )

    def short_batch(self, count: int) -> Sequences:
        """Rows of different lengths, a few seconds each: what the numeric comparisons need."""
        return make_sequences(
            self.size,
            count,
            seconds=min(6.3, self.options.clip_seconds),
            answer=min(64, self.options.answer_tokens),
            instruction=min(24, self.options.instruction_tokens),
            device=self.device,
            seed=self.options.seed + 2,
            ragged=True,
        )

    def run(self, parts: Sequence[str], show: Callable[[Row], None]) -> list[Row]:
        rows = []
        for part in parts:
            start = time.perf_counter()
            try:
                self.meter.reset_peak()
                figures = getattr(self, part)()
                row = Row(part, "ok", 0.0, figures)
            except Skipped as reason:
                row = Row(part, "skipped", 0.0, message=str(reason))
            except Exception as error:
                # The next parts say more about the machine than an early stop would.
                row = Row(part, "failed", 0.0, message=f"{type(error).__name__}: {error}")
                if not isinstance(error, CheckFailed):
                    row.figures["traceback"] = traceback.format_exc()
                    self.release()
            row.seconds = round(time.perf_counter() - start, 2)
            rows.append(row)
            show(row)
        return rows

    def environment(self) -> dict[str, Any]:
        """GPU, driver and versions; asks for a GPU that the machine does not have: an error."""
        figures: dict[str, Any] = {"device": str(self.device), "attention": self.attention}
        if self.device.type == "cuda":
            require(
                torch.cuda.is_available(),
                "torch sees no GPU: look at nvidia-smi, and whether torch is a CUDA build "
                f"(torch {torch.__version__}); --device cpu runs the check without one",
            )
            properties = torch.cuda.get_device_properties(self.device)
            figures |= {
                "gpu": properties.name,
                "gpus_on_this_machine": torch.cuda.device_count(),
                "memory_gb": round(properties.total_memory / 1e9, 1),
                "compute_capability": f"{properties.major}.{properties.minor}",
                "driver": driver_version(),
                "cuda": torch.version.cuda,
                "bf16": torch.cuda.is_bf16_supported(),
            }
        figures["missing"] = [
            name for name in ("flash_attn", "vllm", "verl", "ray", "omegaconf") if not has(name)
        ]
        return figures

    def forward(self) -> dict[str, Any]:
        batch = self.batch(1)
        with torch.no_grad():
            answer_log_probs(self.policy, batch)  # warm-up
            self.meter.reset_peak()
            seconds, log_probs = self.meter.timed(lambda: answer_log_probs(self.policy, batch))
        require(bool(torch.isfinite(log_probs).all()), "log-probabilities are not finite")
        require(float(log_probs.max()) <= 0, "a log-probability is above 0")
        operations = flops.forward_flops(
            self.size, batch.lengths, batch.frames, batch.num_answer_tokens
        )
        return {
            "ms": seconds * 1e3,
            "tokens": batch.num_tokens,
            "mfu": self.mfu(operations, seconds),
            "mean_log_prob": float(log_probs.mean()),
            "peak_gb": self.meter.peak_gb(),
        }

    def backward(self) -> dict[str, Any]:
        batch = self.batch(1)
        self.trainer.zero()
        self.meter.reset_peak()

        def work() -> None:
            log_probs = answer_log_probs(self.policy, batch)
            grpo_loss(log_probs, log_probs.numel()).backward()

        seconds, _ = self.meter.timed(work)
        norms = self.gradient_norms()
        for part, norm in norms.items():
            require(math.isfinite(norm), f"the gradient of the {part} is not finite")
            require(norm > 0, f"the {part} got no gradient")
        named = {f"gradient_norm_{part}": norm for part, norm in norms.items()}
        return {"ms": seconds * 1e3, **named, "peak_gb": self.meter.peak_gb()}

    def gradient_norms(self) -> dict[str, float]:
        """Norm of the fp32 gradients of each part of the thinker."""
        squares = dict.fromkeys(("language_model", "projector", "audio_tower"), 0.0)
        names = [name for name, weight in self.policy.named_parameters() if weight.requires_grad]
        for name, master in zip(names, self.trainer.masters, strict=True):
            assert master.grad is not None
            squares[part_of(name)] += float(master.grad.square().sum())
        return {part: math.sqrt(square) for part, square in squares.items()}

    def optimizer_step(self) -> dict[str, Any]:
        batch = self.batch(1)
        trainer = self.trainer
        trainer.zero()
        log_probs = answer_log_probs(self.policy, batch)
        grpo_loss(log_probs, log_probs.numel()).backward()
        before = [master.flatten()[:1024].clone() for master in trainer.masters]
        self.meter.reset_peak()
        seconds, norm = self.meter.timed(trainer.step)
        changed = sum(
            not torch.equal(old, master.flatten()[:1024])
            for old, master in zip(before, trainer.masters, strict=True)
        )
        require(changed > len(before) // 2, f"only {changed} of {len(before)} tensors moved")
        for weight, master in zip(trainer.weights, trainer.masters, strict=True):
            require(
                torch.equal(weight, master.to(weight.dtype)), "the bf16 copy is not the master's"
            )
        return {
            "ms": seconds * 1e3,
            "gradient_norm": norm,
            "tensors_moved": f"{changed}/{len(before)}",
            "peak_gb": self.meter.peak_gb(),
        }

    def rebuilt(self, dtype: torch.dtype, attention: str) -> Any:
        """A copy of the policy, the same weights, in another type or with another attention."""
        policy = build_policy(self.size, self.device, dtype, attention, self.options.seed)
        policy.load_state_dict(self.policy.state_dict())
        return policy

    @contextlib.contextmanager
    def fp32_policy(self) -> Iterator[Any]:
        """A copy of the policy with the same weights in fp32, sdpa attention, no TF32."""
        policy = self.rebuilt(torch.float32, "sdpa")
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        convolutions = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            yield policy.eval()
        finally:
            torch.set_float32_matmul_precision(before)
            torch.backends.cudnn.allow_tf32 = convolutions
            del policy
            self.meter.free()

    @torch.no_grad()
    def packed(self) -> dict[str, Any]:
        batch = self.short_batch(3)

        def compare(policy: Any, name: str, bound: float, statistic: str) -> dict[str, float]:
            alone = torch.cat(
                [answer_log_probs(policy, batch.part(i, i + 1)) for i in range(len(batch.rows))]
            )
            row = gaps(answer_log_probs(policy, batch), alone)
            rows_below = gaps(answer_log_probs(policy, batch, padded=True), alone)
            running = torch.arange(batch.num_tokens, device=self.device)[None]
            leak = gaps(answer_log_probs(policy, batch, position_ids=running), alone)
            for kind, found in (("packed", row), ("padded", rows_below)):
                require(
                    found[statistic] <= bound,
                    f"{name}: {kind} and separate sequences differ by {found[statistic]:.2g} nats "
                    f"({statistic}); bound {bound:g}",
                )
            require(
                leak["mean_gap"] > 2 * row["mean_gap"],
                f"{name}: positions that do not restart change no more than packing does "
                f"({leak['mean_gap']:.2g}): the comparison would not notice a leak",
            )
            return {
                f"{name}_packed_max": row["max_gap"],
                f"{name}_packed_mean": row["mean_gap"],
                f"{name}_padded_max": rows_below["max_gap"],
                f"{name}_leak_mean": leak["mean_gap"],
            }

        with self.fp32_policy() as policy:
            figures: dict[str, Any] = compare(policy, "fp32_sdpa", FP32_PACKING_GAP, "max_gap")
        self.policy.eval()
        try:
            figures |= compare(self.policy, f"bf16_{self.attention}", BF16_PACKING_GAP, "mean_gap")
        finally:
            self.policy.train()
        if self.attention == "sdpa":
            figures["flash_attention"] = "not installed" if not has("flash_attn") else "not chosen"
        return figures

    def audio(self) -> dict[str, Any]:
        batch = self.short_batch(1)
        assert batch.features is not None
        with torch.no_grad():
            one = answer_log_probs(self.policy, batch)
            again = answer_log_probs(self.policy, batch)
            other = answer_log_probs(self.policy, batch, input_features=batch.features.flip(-1))
        noise, change = gaps(one, again)["mean_gap"], gaps(one, other)["mean_gap"]
        require(
            change > 1e-4 and change > 10 * noise,
            f"another clip changes the answers by {change:.2g} nats, the same one by {noise:.2g}: "
            "the audio does not arrive",
        )
        text = self.batch(1, audio=False)
        self.trainer.zero()
        log_probs = answer_log_probs(self.policy, text)
        grpo_loss(log_probs, log_probs.numel()).backward()
        norms = self.gradient_norms()
        require(norms["language_model"] > 0, "a text-only batch gave no gradient")
        silent = norms["audio_tower"] + norms["projector"]
        require(silent == 0.0, f"the silent clip moved the audio tower: gradient norm {silent:.2g}")
        return {
            "other_clip_mean_gap": change,
            "same_clip_mean_gap": noise,
            "text_only_tower_gradient": silent,
        }

    @torch.no_grad()
    def precision(self) -> dict[str, Any]:
        batch = self.batch(1)
        low = answer_log_probs(self.policy, batch)
        with self.fp32_policy() as policy:
            high = answer_log_probs(policy, batch)
        found = gaps(low, high)
        require(
            found["correlation"] >= PRECISION_CORRELATION,
            f"bf16 and fp32 log-probabilities correlate at {found['correlation']:.4f} only",
        )
        return {**found, "tokens": len(high)}

    def shared(self) -> dict[str, Any]:
        """One prompt's answers, the prompt once for all of them and once for each."""
        self.release()  # no masters: the passes below keep every activation
        apart, once = one_prompt(self.batch(self.options.sequences))
        with self.fp32_policy() as policy, torch.no_grad():
            found = gaps(log_probs_at(policy, once), log_probs_at(policy, apart))
        require(
            found["max_gap"] <= FP32_PACKING_GAP,
            f"with the prompt computed once, log-probabilities differ by {found['max_gap']:.2g} "
            f"nats in fp32; bound {FP32_PACKING_GAP:g}",
        )
        seconds, peaks, norms = {}, {}, {}
        for name, inputs, attention in (
            ("apart", apart, self.attention),
            ("once", once, "sdpa"),
        ):
            policy = self.rebuilt(torch.bfloat16, attention)

            def work(policy: Any = policy, inputs: LaidOut = inputs) -> None:
                policy.zero_grad()
                log_probs = log_probs_at(policy, inputs)
                grpo_loss(log_probs, log_probs.numel()).backward()

            work()  # warm-up
            self.meter.reset_peak()
            seconds[name], _ = self.meter.timed(work, self.options.repeats)
            peaks[name] = self.meter.peak_gb()
            norms[name] = float(policy.lm_head.weight.grad.float().norm())
            del policy, work
            self.meter.free()
        require(
            math.isclose(norms["once"], norms["apart"], rel_tol=0.05),
            f"the output head's gradient is {norms['once']:.4g} with the prompt computed once and "
            f"{norms['apart']:.4g} without",
        )
        return {
            "fp32_max_gap": found["max_gap"],
            "tokens_apart": apart.num_tokens,
            "tokens_once": once.num_tokens,
            "ms_apart": seconds["apart"] * 1e3,
            "ms_once": seconds["once"] * 1e3,
            "speedup": seconds["apart"] / seconds["once"],
            "peak_gb_apart": peaks["apart"],
            "peak_gb_once": peaks["once"],
        }

    def update(self) -> dict[str, Any]:
        """Sweep micro-batch and checkpointing over one update; the best cell's figures, all cells."""
        batch = self.batch(self.options.sequences)
        sizes = [size for size in self.options.micro_batches if size <= self.options.sequences]
        cells = []
        for checkpointing in (False, True):
            for size in sizes:
                cells.append(self.update_cell(batch, size, checkpointing))
                print("    " + cell_line(cells[-1]), flush=True)
        self.policy.gradient_checkpointing_disable()
        measured = [cell for cell in cells if "seconds" in cell]
        require(bool(measured), "every cell ran out of memory: fewer layers or a shorter clip")
        self.best = max(measured, key=lambda cell: cell["tokens_per_s"])
        features = batch.part(0, self.best["micro_batch"])
        tower, _ = self.meter.timed(lambda: self.run_tower(features), self.options.repeats)
        self.trainer.zero()
        return {
            **self.best,
            "sequences": self.options.sequences,
            "tokens": batch.num_tokens,
            "layout": self.layout,
            # Forward and backward of the tower alone, for the clips of one micro-batch.
            "audio_tower_ms_per_micro_batch": tower * 1e3,
            "cells": cells,
        }

    @property
    def layout(self) -> str:
        """Packed where the attention knows boundaries; a dense mask would cost the square."""
        return "packed" if self.attention.startswith("flash") else "padded"

    def run_update(self, batch: Sequences, micro_batch: int) -> float:
        """One update of `batch` in micro-batches; returns the gradient norm."""
        num_answer_tokens = batch.num_answer_tokens
        self.trainer.zero()
        for start in range(0, len(batch.rows), micro_batch):
            part = batch.part(start, start + micro_batch)
            log_probs = answer_log_probs(self.policy, part, padded=self.layout == "padded")
            grpo_loss(log_probs, num_answer_tokens).backward()
        return self.trainer.step()

    def run_tower(self, batch: Sequences) -> None:
        with autocast(self.device, self.policy.lm_head.weight.dtype):
            encoded = self.policy.get_audio_features(
                batch.features, batch.masks, return_dict=True
            ).last_hidden_state
        encoded.float().square().mean().backward()

    def update_cell(
        self, batch: Sequences, micro_batch: int, checkpointing: bool
    ) -> dict[str, Any]:
        """Time, throughput and peak memory of one update; `error` if it runs out of memory."""
        cell: dict[str, Any] = {"micro_batch": micro_batch, "checkpointing": checkpointing}
        if checkpointing:
            self.policy.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.policy.gradient_checkpointing_disable()
        trainer = self.trainer  # allocated before memory is counted
        self.meter.free()
        try:
            self.run_update(batch, micro_batch)
            self.meter.reset_peak()
            seconds, norm = self.meter.timed(
                lambda: self.run_update(batch, micro_batch), self.options.repeats
            )
        except RuntimeError as error:
            # cuBLAS reports it under another class and name than PyTorch's allocator.
            if not any(text in str(error) for text in ("out of memory", "ALLOC_FAILED")):
                raise
            cell["error"] = "out of memory"
        if "error" in cell:
            trainer.zero()
            self.meter.free()
            return cell
        require(math.isfinite(norm), f"gradient norm {norm} at micro-batch {micro_batch}")
        peak_gb = self.meter.peak_gb()
        optimizer, _ = self.meter.timed(trainer.step)
        operations = flops.training_flops(
            self.size, batch.lengths, batch.frames, flops.Trained(), batch.num_answer_tokens
        )
        cell |= {
            "seconds": seconds,
            "optimizer_seconds": optimizer,
            "tokens_per_s": batch.num_tokens / seconds,
            "tflop": operations / 1e12,
            "mfu": self.mfu(operations, seconds),
            "mfu_without_optimizer": self.mfu(operations, seconds - optimizer),
            "peak_gb": peak_gb,
        }
        return cell

    def profile(self) -> dict[str, Any]:
        """Kernels of one update of the best cell, slowest first, into a text file."""
        if self.best is None:
            raise Skipped("no cell of `update` was measured")
        mfu = self.best.get("mfu")
        if not self.options.profile:
            if mfu is None:
                raise Skipped("no MFU to judge by on this device; --profile writes one anyway")
            if mfu >= TARGET_MFU:
                raise Skipped(f"MFU {mfu:.1%} is not below {TARGET_MFU:.0%}; --profile forces it")
        if self.best["checkpointing"]:
            self.policy.gradient_checkpointing_enable({"use_reentrant": False})
        from torch.profiler import ProfilerActivity, profile

        cuda = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        batch = self.batch(self.options.sequences)
        with profile(activities=activities) as profiler:
            self.run_update(batch, self.best["micro_batch"])
            self.meter.synchronize()
        self.policy.gradient_checkpointing_disable()
        averages = profiler.key_averages()
        order = "self_device_time_total" if cuda else "self_cpu_time_total"
        path = self.options.output.with_suffix(".profile.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(averages.table(sort_by=order, row_limit=60, max_name_column_width=90))
        attribute = "self_device_time_total" if cuda else "self_cpu_time_total"
        # Operators carry the time of their kernels as well; kernels alone sum to the whole.
        kernels = [e for e in averages if not cuda or "CUDA" in str(e.device_type)]
        kernels.sort(key=lambda event: getattr(event, attribute), reverse=True)
        total = sum(getattr(event, attribute) for event in kernels) or 1
        slowest = {e.key[:70]: round(getattr(e, attribute) / total, 3) for e in kernels[:5]}
        return {"file": str(path), "share_of_kernel_time": slowest}

    def end_to_end(self) -> dict[str, Any]:
        """Two training steps of the stand-in through verl, vLLM and Ray, in processes of their own."""
        missing = [name for name in ("verl", "vllm", "ray", "hydra", "pyarrow") if not has(name)]
        if missing:
            raise Skipped("not installed: " + ", ".join(missing))
        self.release()
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
            folder = Path(name)
            for command in end_to_end_commands(folder, self.device.type):
                run_command(command)
            files = list(folder.glob("outputs/*/*/metrics.jsonl"))
            require(len(files) == 1, f"expected one metrics.jsonl, found {len(files)}")
            lines = [json.loads(line) for line in files[0].open()]
        steps = [line for line in lines if line["step"] > 0]
        require(len(steps) == 2, f"expected 2 steps, found {len(steps)}")
        correlation = min(line["training/rollout_actor_probs_pearson_corr"] for line in steps)
        require(
            correlation >= 0.99,
            f"rollout and trainer correlate at {correlation:.4f} only: they do not see the same",
        )
        return {
            "steps": len(steps),
            "rollout_actor_corr_min": correlation,
            "rollout_probs_diff_max": max(
                line["training/rollout_probs_diff_max"] for line in steps
            ),
            "seconds_per_step": steps[-1]["timing_s/step"],
        }


def end_to_end_commands(folder: Path, device: str) -> list[list[str]]:
    """Commands that make a stand-in and its data under `folder` and train it for two steps."""
    module = [sys.executable, "-m"]
    stand_in = folder / "tiny"
    return [
        [*module, "soundmind.tiny", "--no-warmup", "--output", str(stand_in)],
        [
            *(*module, "soundmind.preprocess", "--mode", "audio", "--task", "practice"),
            *("--data-dir", str(REPOSITORY / "data/sample"), "--workers", "1"),
            *("--output-dir", str(folder / "parquet"), "--tokenizer", str(stand_in)),
        ],
        [
            *(*module, "soundmind.train", "--config-name", "grpo_tiny_cpu"),
            *end_to_end_overrides(folder, device),
        ],
    ]


def end_to_end_overrides(folder: Path, device: str) -> list[str]:
    """`grpo_tiny_cpu` for two small steps under `folder`; on "cuda" with what a GPU run uses.

    bf16 in trainer and rollout, flash-attention over packed rows where it is installed, CUDA
    graphs, and vLLM asleep during the update, as `configs/grpo_7b_8gpu.yaml` has them.
    """
    overrides = [
        f"run.root='{folder / 'outputs'}'",
        "run.resume=new",
        "run.export=false",
        f"data.train_files='{folder}/parquet/audio/train.parquet'",
        f"data.val_files='{folder}/parquet/audio/test.parquet'",
        f"actor_rollout_ref.model.path='{folder / 'tiny'}'",
        "data.train_batch_size=4",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.rollout.n=2",
        "actor_rollout_ref.actor.optim.lr_warmup_steps=0",
        "trainer.total_training_steps=2",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        "trainer.val_before_train=false",
        "trainer.logger=[console,file]",
    ]
    if device == "cpu":
        return overrides
    flash = has("flash_attn")
    mixed = "{param_dtype: bf16, reduce_dtype: fp32, buffer_dtype: fp32}"
    return [
        *overrides,
        "run.device=cuda",
        "trainer.device=cuda",
        f"actor_rollout_ref.model.use_remove_padding={str(flash).lower()}",
        "actor_rollout_ref.model.override_config.attn_implementation="
        + ("flash_attention_2" if flash else "sdpa"),
        f"actor_rollout_ref.actor.fsdp_config.mixed_precision={mixed}",
        f"actor_rollout_ref.ref.fsdp_config.mixed_precision={mixed}",
        "actor_rollout_ref.ref.fsdp_config.model_dtype=bf16",
        "actor_rollout_ref.rollout.dtype=bfloat16",
        "actor_rollout_ref.rollout.enforce_eager=false",
        "actor_rollout_ref.rollout.enable_sleep_mode=true",
        "actor_rollout_ref.rollout.free_cache_engine=true",
        "actor_rollout_ref.rollout.gpu_memory_utilization=0.3",
        "ray_kwargs.ray_init.num_cpus=null",
        "ray_kwargs.ray_init.num_gpus=null",  # Ray counts the real ones
    ]


def run_command(command: Sequence[str], limit: float = 900) -> None:
    """Run a command in the repository; CheckFailed with the end of its output if it fails."""
    try:
        result = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired as error:
        raise CheckFailed(f"{' '.join(command[:3])}: not done after {limit:.0f} s") from error
    if result.returncode:
        output = (result.stdout + result.stderr).strip()
        raise CheckFailed(
            f"{' '.join(command[:3])} ended with {result.returncode}: {output[-1500:]}"
        )


def driver_version() -> str | None:
    """The NVIDIA driver's version as nvidia-smi reports it; None without nvidia-smi."""
    try:
        result = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.splitlines()[0].strip()


# --- table and command line -----------------------------------------------------------------------


def number(value: Any) -> str:
    """A figure as the table shows it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, dict):
        return "; ".join(f"{name}: {number(entry)}" for name, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def cell_line(cell: dict[str, Any]) -> str:
    """One line for a cell of the sweep."""
    head = f"micro-batch {cell['micro_batch']}, checkpointing {number(cell['checkpointing'])}: "
    if "error" in cell:
        return head + cell["error"]
    line = f"{cell['seconds']:.3f} s, {cell['tokens_per_s']:,.0f} tokens/s"
    if cell.get("mfu") is not None:
        line += f", MFU {cell['mfu']:.1%}"
    if cell["peak_gb"] is not None:
        line += f", peak {cell['peak_gb']:.1f} GB"
    return head + line


def table(rows: Sequence[Row]) -> str:
    """All rows as text: part, status, seconds, figures; one figure a line."""
    lines = [f"{'part':<16}{'status':<9}{'s':>8}  figures", "-" * 78]
    for row in rows:
        shown = {n: v for n, v in row.figures.items() if n not in ("cells", "traceback")}
        details = [f"{name} {number(value)}" for name, value in shown.items()]
        if row.message:
            details.insert(0, row.message)
        lines.append(
            f"{row.part:<16}{row.status:<9}{row.seconds:>8.1f}  {(details or [''])[0]}".rstrip()
        )
        lines += [" " * 35 + detail for detail in details[1:]]
        lines += [" " * 35 + cell_line(cell) for cell in row.figures.get("cells", [])]
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bash scripts/gpu_check.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--width", choices=sorted(WIDTHS), help="default: 7b, on a CPU tiny")
    parser.add_argument("--layers", type=int, default=4, help="of the language model (4)")
    parser.add_argument("--audio-layers", type=int, default=4, help="of the audio tower (4)")
    parser.add_argument("--vocabulary", type=int, help="fewer tokens, where memory is short")
    parser.add_argument("--device", default=default_device, help=f"default here: {default_device}")
    parser.add_argument("--attention", help="flash_attention_2 or sdpa; default: what is there")
    parser.add_argument("--clip-seconds", type=float, help="default: 60, with tiny 3")
    parser.add_argument("--answer-tokens", type=int, help="default: 700, with tiny 48")
    parser.add_argument("--instruction-tokens", type=int, help="default: 120, with tiny 16")
    parser.add_argument("--sequences", type=int, help="rows of one update; default: 8, tiny 2")
    parser.add_argument(
        "--micro-batches", type=int, nargs="+", default=[1, 2, 4, 8], help="rows a pass (1 2 4 8)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed updates, median taken (3)")
    parser.add_argument("--parts", nargs="+", choices=GpuCheck.PARTS, default=GpuCheck.PARTS)
    parser.add_argument("--skip", nargs="+", choices=GpuCheck.PARTS, default=[])
    parser.add_argument("--profile", action="store_true", help="profile whatever the MFU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu_check.json"))
    options = parser.parse_args(argv)
    cpu = torch.device(options.device).type == "cpu"
    options.width = options.width or ("tiny" if cpu else "7b")
    tiny = options.width == "tiny"
    for name, small, full in (
        ("clip_seconds", 3.0, 60.0),
        ("answer_tokens", 48, 700),
        ("instruction_tokens", 16, 120),
        ("sequences", 2, 8),
    ):
        if getattr(options, name) is None:
            setattr(options, name, small if tiny else full)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    parts = [part for part in options.parts if part not in options.skip]
    print(
        f"Qwen2.5-Omni's thinker, random weights: width {options.width}, {options.layers} layers, "
        f"{options.audio_layers} audio layers, on {options.device}",
        flush=True,
    )
    check = GpuCheck(options)
    rows = check.run(parts, lambda row: print(f"{row.part}: {row.status}", flush=True))
    report = {
        "versions": machine.versions(options.seed, REPOSITORY),
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "rows": [asdict(row) for row in rows],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    system_files.write_json(options.output, report)
    print("\n" + table(rows))
    print(f"\nwritten: {options.output}")
    return int(any(row.status == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
