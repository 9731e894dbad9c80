"""Disk of a run: checkpoints, export, rollouts, and what Ray leaves for as long as it runs."""

from __future__ import annotations

from math import ceil
from pathlib import Path

from omegaconf import DictConfig

from soundmind.planning import flops, memory
from soundmind.planning.memory import FP32, Training
from soundmind.planning.setup import GB, Assumptions, rows_of

# Ray's logs and what it spills from its store of objects. Neither weights nor audio features travel
# through that store, so it is never near full. [ours]
RAY_BYTES = 2 * GB
# Ray takes no object any more when the disk of its folder is fuller than this (its default).
RAY_FULL = 0.95
TEXT_BYTES = 4.5  # a token of English
ENTRY_BYTES = 1000  # of a rollout besides its texts: components, ids, lengths


def checkpoint_bytes(setup: Training) -> int:
    """One checkpoint over all ranks: weights as they are stored, and Adam's two moments."""
    adapters = flops.lora_parameters(setup.size.text, setup.trained.lora_rank)
    base = memory.loaded_weights(setup) - adapters
    moments = 2 * memory.trained_weights(setup) * memory.trained_bytes(setup)
    return base * setup.weight_bytes + adapters * FP32 + moments


def kept_checkpoints(config: DictConfig, steps: int) -> int:
    """Checkpoints that lie on the disk at once: one more than are kept, while it is written."""
    every, keep = int(config.trainer.save_freq), config.trainer.max_actor_ckpt_to_keep
    if every <= 0:
        return 0
    written = ceil(steps / every)
    return written if keep is None else min(written, int(keep) + 1)


def steps_of(config: DictConfig) -> int:
    """Steps of the whole run: named, or the epochs of the rows."""
    per_epoch = rows_of(config.data.train_files, "train")[0] // int(config.data.train_batch_size)
    return int(config.trainer.total_training_steps or per_epoch * config.trainer.total_epochs)


def disk_space(
    config: DictConfig, setup: Training, assumed: Assumptions, steps: int
) -> dict[str, int]:
    """Bytes by part; the last one, Ray's, lies in its temporary folder, the others in `run.root`."""
    parts = {}
    count = kept_checkpoints(config, steps)
    if count:
        parts[f"checkpoints, {count} at once"] = count * checkpoint_bytes(setup)
    if count and config.run.export:
        parts["export"] = model_bytes(config, setup)
    responses = int(config.data.train_batch_size * config.actor_rollout_ref.rollout.n)
    tokens = assumed.prompt_tokens + assumed.response_tokens
    parts["rollouts"] = int(steps * responses * (tokens * TEXT_BYTES + ENTRY_BYTES))
    parts["Ray's logs and spill"] = RAY_BYTES
    return parts


def model_bytes(config: DictConfig, setup: Training) -> int:
    """A complete folder, as the export is one: the base's own size, or that of the published one."""
    folder = Path(str(config.actor_rollout_ref.model.path)).expanduser()
    files = list(folder.glob("*.safetensors")) if folder.is_dir() else []
    return sum(file.stat().st_size for file in files) or setup.size.folder_bytes
