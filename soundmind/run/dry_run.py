"""What a launch would do, in words: every check, and where it would write. Starts and writes nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from soundmind.model import parts
from soundmind.plugin import environment as plugin_environment
from soundmind.run import folder as run_folder
from soundmind.run.experiment import experiment
from soundmind.run.folder import RunFolder
from soundmind.run.train import parts_of, require, wanted


def dry_run(config: DictConfig, name: str) -> str:
    """Everything up to the start of Ray; returns what would be trained and where it would go.

    Raises `checks.CheckError` like `train`. Starts no process and writes no file.
    """
    plugin_environment.select(os.environ, cpu=config.run.device == "cpu", training=True)
    require(config)
    model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    prompts, responses = config.data.train_batch_size, config.data.train_batch_size * rollout.n
    ranks = config.trainer.nnodes * config.trainer.n_gpus_per_node
    lines = [
        f"{name}: all checks passed, nothing was started",
        "",
        f"algorithm  {config.algorithm.adv_estimator}, {prompts} prompts x {rollout.n} responses = "
        f"{responses} a step, {config.actor_rollout_ref.actor.ppo_mini_batch_size} prompts an update",
        f"ranks      {config.trainer.nnodes} x {config.trainer.n_gpus_per_node} = {ranks}",
        f"train      {_listed(config.data.train_files)}",
        f"validate   {_listed(config.data.val_files)}",
        f"model      {model.path}",
        f"output     {destination(config, name)}",
    ]
    if table := parts_of(config):
        lines += ["", parts.format_table(table)]
    return "\n".join(lines)


def _listed(files: Any) -> str:
    return ", ".join(files) if OmegaConf.is_list(files) else str(files)


def destination(config: DictConfig, name: str) -> str:
    """Where `train` would write now, in words, and what it would not continue."""
    root = Path(config.run.root)
    chosen = run_folder.choose_run(root, name, experiment(config), *wanted(config))
    text = f"{root / name}/<timestamp> (new)"
    if chosen.paths:
        step = RunFolder(chosen.paths[0], resumed=True).last_checkpoint() or 0
        text = f"{chosen.paths[0]} (continued from step {step})"
    return "\n".join([text, *(f"note: {note}" for note in chosen.notes)])
