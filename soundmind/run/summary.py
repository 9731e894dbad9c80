"""What a run came to: `summary.json` and the table at its end."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from soundmind.evaluation.intervals import mcnemar_exact
from soundmind.model.folder import start_note
from soundmind.run.curves import draw_curves
from soundmind.run.folder import RunFolder
from soundmind.run.records import CORRELATION, Validation, read_metrics, read_validations
from soundmind.system.files import write_json
from soundmind.task.reward_settings import COMPONENTS


def mcnemar(before: Validation, after: Validation) -> dict[str, Any]:
    """Exact two-sided McNemar test on the rows that both validations answered."""
    shared = before.rows.keys() & after.rows.keys()
    won = sum(before.rows[key]["acc"] < after.rows[key]["acc"] for key in shared)
    lost = sum(before.rows[key]["acc"] > after.rows[key]["acc"] for key in shared)
    return {"n": len(shared), "won": won, "lost": lost, "p": mcnemar_exact(won, lost)}


def summarise_run(run: Path, config: DictConfig, seconds_total: float) -> dict[str, Any]:
    """The content of summary.json; a figure that the run does not have is None."""
    metrics = read_metrics(run)
    steps = [line for line in metrics if "reward/score/mean" in line]
    validations = read_validations(run)
    first = validations[0] if validations else None
    last = validations[-1] if validations else None

    def components(line: dict[str, Any] | None) -> dict[str, float] | None:
        if line is None:
            return None
        names = (*COMPONENTS, "accuracy", "parsed", "response_tokens", "score")
        return {name: line[key] for name in names if (key := f"reward/{name}/mean") in line}

    correlations = [line[CORRELATION] for line in steps if CORRELATION in line]
    summary: dict[str, Any] = {
        "config": run.parent.name,
        "seed": config.run.seed,
        "steps": steps[-1]["step"] if steps else 0,
        "val_n": len(last.rows) if last else 0,
        "val_majority_share": last.majority_share() if last else None,
        "val_score_first": first.mean("score") if first else None,
        "val_score_last": last.mean("score") if last else None,
        "val_acc_first": first.mean("acc") if first else None,
        "val_acc_last": last.mean("acc") if last else None,
        "val_acc_first_interval": first.interval() if first else None,
        "val_acc_last_interval": last.interval() if last else None,
        "val_acc_lenient_first": first.lenient_share() if first else None,
        "val_acc_lenient_last": last.lenient_share() if last else None,
        "val_format_first": first.mean("text_format") if first else None,
        "val_format_last": last.mean("text_format") if last else None,
        "val_mcnemar": mcnemar(first, last) if first and last else None,
        "components_first": components(steps[0] if steps else None),
        "components_last": components(steps[-1] if steps else None),
        "rollout_actor_corr_min": min(correlations, default=None),
        "failed_sessions": sum(line.get("rollout/failed_sessions", 0) for line in steps),
        "reward_errors": sum(line.get("reward/error/count", 0) for line in steps),
        "seconds_total": round(seconds_total, 1),
        "seconds_per_step_median": (
            round(statistics.median(line["timing_s/step"] for line in steps), 3) if steps else None
        ),
        "start": start_note(Path(str(config.actor_rollout_ref.model.path))),
    }
    return summary


# --- the end of a run -----------------------------------------------------------------------------


def finish_run(folder: RunFolder, config: DictConfig) -> dict[str, Any]:
    """Export, draw, summarise and print the table; `summary.json` marks the run as finished."""
    seconds = folder.end_attempt()
    folder.prune_checkpoints(config.trainer.max_actor_ckpt_to_keep)
    return complete(folder.path, config, seconds)


def complete(run: Path, config: DictConfig, seconds_total: float) -> dict[str, Any]:
    """Everything a finished training leaves behind; safe to repeat."""
    from soundmind.model import export

    summary = summarise_run(run, config, seconds_total)
    draw_curves(run, summary["start"])
    if config.run.export and config.trainer.save_freq > 0:
        checkpoint = export.find_checkpoint(run)
        export.export(checkpoint, export.base_of(run), run / "export")
        summary["export"] = str(run / "export")
        summary["export_step"] = int(checkpoint.name.removeprefix("global_step_"))
    print_summary(summary)
    write_json(run / "summary.json", summary)
    return summary


def print_summary(summary: dict[str, Any]) -> None:
    """The run's results on the terminal."""
    table = Table(title=f"{summary['config']}, seed {summary['seed']}, {summary['steps']} steps")
    table.add_column("")
    table.add_column("start", justify="right")
    table.add_column("end", justify="right")

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    def accuracy(which: str) -> str:
        bounds = summary[f"val_acc_{which}_interval"]
        text = share(summary[f"val_acc_{which}"])
        return f"{text} [{bounds[0]:.1%}, {bounds[1]:.1%}]" if bounds else text

    table.add_row(
        f"greedy accuracy, {summary['val_n']} held-out rows", accuracy("first"), accuracy("last")
    )
    lenient = [summary["val_acc_lenient_first"], summary["val_acc_lenient_last"]]
    table.add_row("the same, lenient reading", *map(share, lenient))
    table.add_row(
        "greedy format", share(summary["val_format_first"]), share(summary["val_format_last"])
    )
    scores = [summary["val_score_first"], summary["val_score_last"]]
    table.add_row("greedy score", *("-" if score is None else f"{score:.3f}" for score in scores))
    before, after = summary["components_first"] or {}, summary["components_last"] or {}
    for name in before:
        table.add_row(f"sampled {name}", f"{before[name]:.3f}", f"{after.get(name, 0.0):.3f}")
    console = Console()
    console.print(table)
    test = summary["val_mcnemar"]
    if test:
        console.print(
            f"same {test['n']} rows, exact McNemar: won {test['won']}, lost {test['lost']}, "
            f"p = {test['p']:.1e}; majority class {summary['val_majority_share']:.1%}"
        )
    if summary["rollout_actor_corr_min"] is not None:
        console.print(
            f"rollout against trainer: correlation at least "
            f"{summary['rollout_actor_corr_min']:.6f}; "
            f"{summary['seconds_per_step_median']} s a step in the median, "
            f"{summary['seconds_total']:.0f} s in all"
        )
    if summary["failed_sessions"] or summary["reward_errors"]:
        console.print(
            f"[bold red]{summary['failed_sessions']} rollout sessions failed and "
            f"{summary['reward_errors']:.0f} rewards raised; see the log[/]"
        )
    if summary["start"]:
        console.print(summary["start"])
