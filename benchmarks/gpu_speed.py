"""Parts of the GPU check that measure: an update over its settings, its profile, two real steps."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_batches import (
    CheckFailed,
    Sequences,
    Skipped,
    answer_log_probs,
    autocast,
    grpo_loss,
    has,
    require,
)
from gpu_numbers import Check

from soundmind.planning import flops

REPOSITORY = Path(__file__).resolve().parent.parent
TARGET_MFU = 0.45  # below it the update is profiled


class Speed(Check):
    """The update's sweep, the best cell's profile, and training end to end."""

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
