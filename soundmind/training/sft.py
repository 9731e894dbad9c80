"""verl's SFT trainer with our data set and engine in it, and one rank of a run.

    python -m soundmind.training.sft <run>/config.yaml      # under torchrun's variables

`soundmind.run.sft` starts one such process a rank. Against verl 0.9.1's `SFTTrainer`:

* the engine is ours (verl names its own in the code), so audio arrives, parts are frozen as asked and
  logits are computed where a response token is predicted;
* `run.seed` orders the rows; verl's sampler always starts from 0;
* a checkpoint is complete or absent under its name, lies where `soundmind.export` looks for it, and
  one written at the end of an epoch continues with the next (verl's would skip it whole);
* every step is a line of `metrics.jsonl`, on disk before the step's checkpoint.
"""

from __future__ import annotations

import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import verl.trainer.sft_trainer as stock
from omegaconf import OmegaConf
from verl.utils.checkpoint import CheckpointHandler
from verl.utils.distributed import (
    destroy_global_process_group,
    initialize_global_process_group,
)
from verl.utils.tracking import Tracking
from verl.workers.engine_workers import TrainingWorker, TrainingWorkerConfig
from verl.workers.utils.losses import sft_loss

from soundmind.model import checkpoints
from soundmind.plugin.environment import is_cpu_platform
from soundmind.plugin.verl_entry import require_loaded
from soundmind.plugin.vllm_entry import end_with_parent
from soundmind.training.metrics_file import MetricsFile
from soundmind.training.model_config import MODEL_TYPE


class StepLines(Tracking):
    """verl's loggers, and a step's metrics collected into one line of `metrics.jsonl`."""

    def __init__(self, path: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._file = MetricsFile(path)
        self._line: dict[str, Any] = {}
        self._step = 0
        self._began = time.monotonic()

    def log(self, data: dict[str, Any], step: int, backend: Any = None) -> None:
        seconds = time.monotonic() - self._began
        if step != self._step:
            self.flush()
            self._step = step
        if "train/loss" in data:
            data["timing_s/step"] = seconds
        self._line.update(data)
        super().log(data, step, backend)
        self.start_clock()

    def flush(self) -> None:
        """Write what is known of the current step."""
        if self._line:
            self._file.append(self._step, self._line)
        self._line = {}

    def start_clock(self) -> None:
        """What follows is the next step: validation and saving are behind it."""
        self._began = time.monotonic()

    def forget_after(self, step: int) -> None:
        """Drop lines of steps that a resumed run repeats."""
        self._file.forget_after(step)


class CompleteCheckpoints(CheckpointHandler):
    """verl's checkpoints, written aside, recorded and moved to their name; see `checkpoints`."""

    lines: StepLines | None = None  # of rank 0

    def __init__(self, base: Path, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._base = base

    def save_checkpoint(self, step: int) -> None:
        root = Path(self.default_local_dir)
        if self.rank == 0:
            if self.lines:
                self.lines.flush()
            shutil.rmtree(root / checkpoints.WRITING, ignore_errors=True)
        torch.distributed.barrier()
        written = root / checkpoints.WRITING / f"global_step_{step}"
        self.engine.save_checkpoint(local_path=str(written / "actor"), global_step=step)
        torch.save(self.train_dataloader.state_dict(), written / f"data_{self.rank}.pt")
        torch.distributed.barrier()
        if self.rank == 0:
            checkpoints.publish(root, step, self._base)
            checkpoints.prune(root, self.max_ckpt_to_keep)
        torch.distributed.barrier()
        if self.lines:
            self.lines.start_clock()

    def load_checkpoint(self) -> int:
        path = self._determine_resume_path()
        if path is None:
            return 0
        step = int(Path(path).name.removeprefix("global_step_"))
        self.engine.load_checkpoint(str(Path(path) / "actor"))
        # At the end of an epoch the loader's state is that of a finished one: it would give nothing.
        if step % len(self.train_dataloader):
            state = torch.load(Path(path) / f"data_{self.rank}.pt", weights_only=False)
            self.train_dataloader.load_state_dict(state)
        self.resume_global_step = step
        return step


class SoundMindSFTTrainer(stock.SFTTrainer):
    """verl's SFT trainer; see the module's list."""

    def _build_engine(self) -> None:
        self.loss_fn = partial(sft_loss, config=None)
        self.training_client = TrainingWorker(
            config=TrainingWorkerConfig(
                model_type=MODEL_TYPE,
                model_config=self.model_config,
                engine_config=self.engine_config,
                optimizer_config=self.optimizer_config,
                checkpoint_config=self.checkpoint_config,
                profiler_config=self.profiler_config,
            )
        )
        self.training_client.set_loss_fn(loss_fn=self.loss_fn)
        self.engine = self.training_client.engine

    def _build_dataloader(self) -> None:
        super()._build_dataloader()
        self.train_sampler.seed = int(self.config.run.seed)

    def _build_ckpt_handler(self) -> None:
        trainer = self.config.trainer
        self.ckpt_handler = CompleteCheckpoints(
            Path(str(self.config.model.path)).expanduser(),
            engine=self.engine,
            train_dataloader=self.train_dataloader,
            default_local_dir=trainer.default_local_dir,
            max_ckpt_to_keep=trainer.max_ckpt_to_keep,
            resume_mode=trainer.resume_mode,
            resume_from_path=trainer.resume_from_path,
        )

    def _tracking(self, *args: Any, **kwargs: Any) -> StepLines:
        lines = StepLines(self.config.run.metrics_path, *args, **kwargs)
        lines.forget_after(self.resume_global_step)
        self.ckpt_handler.lines = lines
        return lines

    def fit(self) -> None:
        verls = stock.Tracking  # verl makes its loggers inside `fit`
        stock.Tracking = self._tracking
        try:
            super().fit()
        finally:
            stock.Tracking = verls
        if self.ckpt_handler.lines:
            self.ckpt_handler.lines.flush()


def run_rank(config: Any) -> None:
    """Train as the rank that torchrun's environment variables say."""
    require_loaded()
    if is_cpu_platform():
        # verl would name the CPU's back-end twice, which PyTorch refuses.
        torch.distributed.init_process_group("cpu:gloo")
    else:
        initialize_global_process_group()
    SoundMindSFTTrainer(config).fit()
    destroy_global_process_group()


if __name__ == "__main__":
    end_with_parent()
    run_rank(OmegaConf.load(sys.argv[1]))
