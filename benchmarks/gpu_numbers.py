"""Parts of the GPU check that compare numbers: what is computed, and whether it is the same."""

from __future__ import annotations

import argparse
import contextlib
import math
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_batches import (
    CheckFailed,
    LaidOut,
    Meter,
    Sequences,
    Skipped,
    Trainer,
    answer_log_probs,
    build_policy,
    gaps,
    grpo_loss,
    has,
    log_probs_at,
    make_sequences,
    one_prompt,
    reduced_size,
    require,
)

from soundmind.model.parts import part_of
from soundmind.planning import flops

FP32_PACKING_GAP = 1e-4  # nats; fp32 sums in another order
BF16_PACKING_GAP = 0.05  # nats, mean; a neighbour that leaks in shows far above, see `packed`
PRECISION_CORRELATION = 0.995  # of log-probabilities, bf16 against fp32


@dataclass
class Row:
    """One part's result: `status` is ok, failed or skipped; `figures` are plain numbers and texts."""

    part: str
    status: str
    seconds: float
    figures: dict[str, Any] = field(default_factory=dict)
    message: str = ""


class Check:
    """What parts share: one policy, its trainer, batches; `run` returns a row for each part."""

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


class Numbers(Check):
    """Forward, backward, optimizer, packing, audio, precision, shared prompts."""

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
