"""A supervised fine-tuning run from a checked configuration to its export."""

from __future__ import annotations

import json
import os
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from soundmind.data.chains import describe_counts
from soundmind.model import checkpoints, export, parts
from soundmind.model.folder import start_note
from soundmind.plugin import environment as plugin_environment
from soundmind.run.curves import draw_losses
from soundmind.run.dry_run import destination
from soundmind.run.experiment import experiment
from soundmind.run.folder import RunFolder
from soundmind.run.records import read_metrics
from soundmind.run.sft_checks import require_sft, require_stage, steps_of_an_epoch
from soundmind.run.train import parts_of, wanted
from soundmind.system import machine
from soundmind.system.errors import UserError
from soundmind.system.files import REPOSITORY, write_json

ROW_COUNTS = (
    "rows.json"  # in a run's folder: how many rows each file teaches, and why others are left out
)


class RankFailedError(UserError):
    """A rank ended early; its own message stands above."""

    status = 1


def sft_dry_run(config: DictConfig, name: str) -> str:
    """Everything up to the start of a rank; returns what would be taught and where it would go.

    Raises `CheckError` like `fine_tune`. Starts no process and writes no file.
    """
    require_stage(config, name, "sft")
    plugin_environment.select(os.environ, cpu=config.run.device == "cpu")
    train, validation = require_sft(config)
    ranks, batch = config.trainer.n_gpus_per_node, config.data.train_batch_size
    epoch = steps_of_an_epoch(sum(len(chains.rows) for chains in train), batch, ranks)
    steps = config.trainer.total_training_steps or epoch * config.trainer.total_epochs
    lines = [
        f"{name}: all checks passed, nothing was started",
        "",
        f"algorithm  supervised fine-tuning, {batch} rows a step, {epoch} steps an epoch, {steps} in all",
        f"ranks      {ranks}",
        *(f"train      {chains.path}: {describe_counts(chains.counts)}" for chains in train),
        *(f"validate   {chains.path}: {describe_counts(chains.counts)}" for chains in validation),
        f"model      {config.model.path}",
        f"output     {destination(config, name)}",
    ]
    if table := parts_of(config):
        lines += ["", parts.format_table(table)]
    return "\n".join(lines)


def fine_tune(config: DictConfig, name: str) -> Path:
    """Fine-tune as `config` says in a new or continued run folder; returns the folder.

    Raises `RankFailedError` if a rank ended early.
    """
    require_stage(config, name, "sft")
    plugin_environment.select(os.environ, cpu=config.run.device == "cpu")
    train, validation = require_sft(config)
    folder = RunFolder.open(Path(config.run.root), name, experiment(config), *wanted(config))
    for note in folder.notes:
        print(f"note: {note}", flush=True)
    folder.prune_checkpoints(config.trainer.max_ckpt_to_keep)
    attempt = folder.begin_attempt()
    step = folder.last_checkpoint() or 0
    print(
        f"run folder: {folder.path}" + (f" (continued from step {step})" if folder.resumed else ""),
        flush=True,
    )
    for chains in (*train, *validation):
        print(f"{chains.path}: {describe_counts(chains.counts)}", flush=True)
    counts = {chains.path: dict(chains.counts) for chains in (*train, *validation)}
    write_json(folder.path / ROW_COUNTS, counts)
    _place(config, folder, attempt)
    resolved = folder.path / "config.yaml"
    OmegaConf.save(config, resolved, resolve=True)
    write_json(
        folder.path / (f"versions-{attempt}.json" if attempt else "versions.json"),
        {
            **machine.versions(config.run.seed, REPOSITORY),
            "parts": [asdict(row) for row in parts_of(config)],
        },
    )
    launch_ranks(resolved, config.trainer.n_gpus_per_node, folder)
    complete_sft(folder.path, config, folder.end_attempt())
    return folder.path


def _place(config: DictConfig, folder: RunFolder, attempt: int) -> None:
    """Point every output of verl into the run folder."""
    path = folder.path.resolve()
    with open_dict(config):
        config.run.dir = str(path)
        config.run.metrics_path = str(path / "metrics.jsonl")
        config.trainer.default_local_dir = str(path / "checkpoints")
        config.trainer.experiment_name = f"{folder.path.parent.name}/{folder.path.name}"
    (path / "logs").mkdir(exist_ok=True)
    os.environ["TENSORBOARD_DIR"] = str(path / "tensorboard")
    os.environ["VERL_FILE_LOGGER_PATH"] = str(path / "logs" / f"verl-metrics-{attempt}.jsonl")


def launch_ranks(config_path: Path, ranks: int, folder: RunFolder) -> None:
    """Run one process a rank on this machine, by torchrun's own agent, to their end."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    agent = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=folder.path.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.5,
    )
    try:
        elastic_launch(agent, sys.executable)("-m", "soundmind.training.sft", str(config_path))
    except ChildFailedError as error:
        step = folder.last_checkpoint() or 0
        raise RankFailedError(
            f"rank {error.get_first_failure()[0]} of {ranks} ended early, see its message above; the "
            f"same command continues from step {step}"
        ) from error


def complete_sft(run: Path, config: DictConfig, seconds: float) -> None:
    """Everything a finished fine-tuning leaves behind: export, curve, `summary.json`; safe to repeat."""
    counts = json.loads((run / ROW_COUNTS).read_text())
    summary = summarise_sft(run, config, counts, seconds)
    if config.run.export and checkpoints.newest(run / "checkpoints") is not None:
        checkpoint = export.find_checkpoint(run)
        export.export(checkpoint, export.base_of(run), run / "export")
        summary["export"] = str(run / "export")
    draw_losses(run, summary["start"])
    print(sft_table(summary), flush=True)
    write_json(run / "summary.json", summary)


def summarise_sft(
    run: Path, config: DictConfig, counts: dict[str, dict[str, int]], seconds: float
) -> dict[str, Any]:
    """The content of an SFT run's summary.json; losses are nats a response token."""
    lines = read_metrics(run)
    steps = [line for line in lines if "train/loss" in line]
    losses = [line["train/loss"] for line in steps]
    held_out = [line["val/loss"] for line in lines if "val/loss" in line]
    times = [line["timing_s/step"] for line in steps if "timing_s/step" in line]
    return {
        "config": run.parent.name,
        "stage": "sft",
        "seed": config.run.seed,
        "steps": steps[-1]["step"] if steps else 0,
        "rows": counts,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "val_loss_first": held_out[0] if held_out else None,
        "val_loss_last": held_out[-1] if held_out else None,
        "seconds_per_step_median": round(statistics.median(times), 3) if times else None,
        "seconds_total": round(seconds, 1),
        "start": start_note(Path(str(config.model.path))),
    }


def sft_table(summary: dict[str, Any]) -> str:
    """The summary in a few lines."""

    def loss(name: str) -> str:
        value = summary[name]
        return "-" if value is None else f"{value:.4f}"

    lines = [f"{summary['config']}, seed {summary['seed']}, {summary['steps']} steps"]
    lines += [f"{path}: {describe_counts(counts)}" for path, counts in summary["rows"].items()]
    lines += [
        f"loss, nats a response token: {loss('loss_first')} -> {loss('loss_last')}; held-out rows "
        f"{loss('val_loss_first')} -> {loss('val_loss_last')}",
        f"{summary['seconds_per_step_median']} s a step in the median, "
        f"{summary['seconds_total']:.0f} s in all",
    ]
    if summary["start"]:
        lines.append(summary["start"])
    return "\n".join(lines)
