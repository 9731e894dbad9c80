"""What a launch would do, in words: every check, and where it would write. Starts and writes nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from soundmind.model import parts
from soundmind.planning.disk import disk_space, steps_of
from soundmind.planning.plan import host_memory
from soundmind.planning.setup import GB, assumptions, training_setup
from soundmind.planning.sizes import SizeError, model_size
from soundmind.plugin import environment as plugin_environment
from soundmind.run import folder as run_folder
from soundmind.run.experiment import experiment
from soundmind.run.folder import RunFolder
from soundmind.run.train import parts_of, require, wanted
from soundmind.task.reward import resolve


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
        f"reward     {reward_in_words(config)}",
        f"ranks      {config.trainer.nnodes} x {config.trainer.n_gpus_per_node} = {ranks}",
        f"train      {_listed(config.data.train_files)}",
        f"validate   {_listed(config.data.val_files)}",
        f"model      {model.path}",
        f"needs      {needs_in_words(config)}",
        f"output     {destination(config, name)}",
    ]
    if table := parts_of(config):
        lines += ["", parts.format_table(table)]
    return "\n".join(lines)


def reward_in_words(config: DictConfig) -> str:
    """Preset, terms with their weights, unit of lengths and labels, or whose function it is."""
    function = config.reward.custom_reward_function
    if function.path != "pkg://soundmind.rewards":
        return f"{function.path}:{function.name}"
    given = function.get("reward_kwargs")
    reward = resolve(**(OmegaConf.to_container(given) if given else {}))  # type: ignore[arg-type]
    terms = ", ".join(f"{term} {weight:g}" for term, weight in reward.weights.items() if weight)
    labels = ", ".join(reward.labels.labels)
    return f"{reward.preset}: {terms}; lengths in {reward.length_unit}; labels {labels}"


def needs_in_words(config: DictConfig) -> str:
    """Host memory of a node and disk of the run, as `soundmind.plan` counts them."""
    try:
        setup = training_setup(config, model_size(str(config.actor_rollout_ref.model.path)))
    except SizeError:
        return "not known before the model is here"
    assumed = assumptions(config)
    host = sum(host_memory(config, setup, assumed).values())
    disk = sum(disk_space(config, setup, assumed, steps_of(config)).values())
    return f"about {host / GB:.0f} GB of memory on a node, {disk / GB:.0f} GB of disk"


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
