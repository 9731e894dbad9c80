"""What a run came to: export, curves, `summary.json` and the table at its end.

    python -m soundmind.report outputs/grpo_tiny_cpu/<timestamp>    # make all of it again, no GPU

Numbers of a validation are recomputed from its dumped answers, so that every share has its count;
the first and the last validation are compared on the same rows with an exact McNemar test.

Reads   <run>/metrics.jsonl, <run>/validation/*.jsonl, <run>/config.yaml
Writes  <run>/plots/*.png, <run>/export/ and, last, <run>/summary.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest

from soundmind.rewards import COMPONENTS
from soundmind.run_folder import RunFolder, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CORRELATION = "training/rollout_actor_probs_pearson_corr"
PROBABILITY_GAP = "training/rollout_probs_diff_max"


@dataclass(frozen=True)
class Validation:
    """The dumped answers of one validation, by row."""

    step: int
    rows: dict[tuple[str, str], dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Validation:
        rows = {}
        for line in path.read_text().splitlines():
            row = json.loads(line)
            # One id may stand in several modes; the prompt tells them apart.
            rows[(str(row["id"]), row["input"])] = row
        return cls(int(path.stem), rows)

    def mean(self, name: str) -> float:
        """Mean of a numeric entry over all rows."""
        return statistics.fmean(float(row[name]) for row in self.rows.values())

    @property
    def correct(self) -> int:
        return sum(int(row["acc"]) for row in self.rows.values())

    def interval(self) -> tuple[float, float]:
        """Wilson interval of the accuracy, 95 %."""
        bounds = binomtest(self.correct, len(self.rows)).proportion_ci(0.95, method="wilson")
        return float(bounds.low), float(bounds.high)

    def majority_share(self) -> float:
        """Accuracy of always giving the commoner ground truth."""
        truths = [row["gts"] for row in self.rows.values()]
        return max(truths.count(truth) for truth in set(truths)) / len(truths)


def mcnemar(before: Validation, after: Validation) -> dict[str, Any]:
    """Exact two-sided McNemar test on the rows that both validations answered."""
    shared = before.rows.keys() & after.rows.keys()
    won = sum(before.rows[key]["acc"] < after.rows[key]["acc"] for key in shared)
    lost = sum(before.rows[key]["acc"] > after.rows[key]["acc"] for key in shared)
    p = float(binomtest(min(won, lost), won + lost).pvalue) if won + lost else 1.0
    return {"n": len(shared), "won": won, "lost": lost, "p": p}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl in step order."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return sorted(lines, key=lambda line: line["step"])


def read_validations(run: Path) -> list[Validation]:
    """The run's validations in step order."""
    paths = sorted((run / "validation").glob("*.jsonl"), key=lambda path: int(path.stem))
    return [Validation.read(path) for path in paths]


def summarise(run: Path, config: DictConfig, seconds_total: float) -> dict[str, Any]:
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


def start_note(model: Path) -> str | None:
    """What the starting policy owes to supervised learning, for a stand-in; None for other "
    "models."""
    record = model / "warmup.json"
    if not record.is_file():
        return None
    if not json.loads(record.read_text()).get("stages"):
        return "stand-in with random weights"
    return (
        "stand-in: a supervised warm-up taught it to hear and then a bad verdict habit, "
        "which GRPO mends; no result about Qwen2.5-Omni"
    )


# --- curves ---------------------------------------------------------------------------------------


def draw_curves(run: Path, start: str | None) -> list[Path]:
    """Draw every curve of the run into <run>/plots; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = read_metrics(run)
    validations = read_validations(run)
    folder = run / "plots"
    folder.mkdir(exist_ok=True)
    panels = {
        "reward": _reward_panel,
        "accuracy": _accuracy_panel,
        "length": _length_panel,
        "agreement": _agreement_panel,
        "timing": _timing_panel,
    }
    paths = []
    for name, draw in panels.items():
        figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
        draw(axes, metrics, validations)
        paths.append(_save(figure, folder / f"{name}.png", start))
    figure, grid = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for axes, name in zip(grid, ("accuracy", "reward", "length"), strict=True):
        panels[name](axes, metrics, validations)
    paths.append(_save(figure, folder / "overview.png", start))
    return paths


def _save(figure: Figure, path: Path, start: str | None) -> Path:
    import matplotlib.pyplot as plt

    if start:
        figure.supxlabel(start, fontsize=8, color="0.35")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _series(metrics: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    found = [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _style(axes: Axes, title: str, ylabel: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, framealpha=0.9)


def _reward_panel(axes: Axes, metrics: list[dict[str, Any]], __: list[Validation]) -> None:
    for component in COMPONENTS:
        steps, values = _series(metrics, f"reward/{component}/mean")
        if any(values):
            axes.plot(steps, values, label=component)
    steps, values = _series(metrics, "reward/score/mean")
    axes.plot(steps, values, color="black", linewidth=2, label="score (weighted sum)")
    _style(axes, "Reward of sampled responses", "mean per response")


def _accuracy_panel(
    axes: Axes, metrics: list[dict[str, Any]], validations: list[Validation]
) -> None:
    steps, values = _series(metrics, "reward/accuracy/mean")
    axes.plot(steps, values, color="tab:blue", alpha=0.6, label="sampled, training prompts")
    steps, values = _series(metrics, "reward/text_format/mean")
    axes.plot(steps, values, color="tab:green", alpha=0.6, label="sampled, right format")
    if validations:
        shares = [validation.mean("acc") for validation in validations]
        bounds = [validation.interval() for validation in validations]
        errors = [
            [max(0.0, share - low) for share, (low, _) in zip(shares, bounds, strict=True)],
            [max(0.0, high - share) for share, (_, high) in zip(shares, bounds, strict=True)],
        ]
        count = len(validations[-1].rows)
        axes.errorbar(
            [validation.step for validation in validations],
            shares,
            yerr=errors,
            color="tab:red",
            marker="o",
            capsize=3,
            label=f"greedy, {count} held-out rows (95 % interval)",
        )
        floor = validations[-1].majority_share()
        axes.axhline(floor, color="0.5", linestyle=":", label=f"majority class {floor:.1%}")
    axes.set_ylim(0, 1.02)
    _style(axes, "Accuracy", "share")


def _length_panel(axes: Axes, metrics: list[dict[str, Any]], __: list[Validation]) -> None:
    steps, low = _series(metrics, "response_length/min")
    _, high = _series(metrics, "response_length/max")
    if len(low) == len(high):
        axes.fill_between(steps, low, high, alpha=0.15, label="shortest to longest")
    steps, values = _series(metrics, "response_length/mean")
    axes.plot(steps, values, label="mean")
    _style(axes, "Response length", "tokens")


def _agreement_panel(axes: Axes, metrics: list[dict[str, Any]], __: list[Validation]) -> None:
    steps, values = _series(metrics, CORRELATION)
    axes.plot(steps, [max(1e-12, 1 - value) for value in values], label="1 - Pearson correlation")
    steps, values = _series(metrics, PROBABILITY_GAP)
    axes.plot(steps, [max(1e-12, value) for value in values], label="largest probability gap")
    steps, values = _series(metrics, "actor/kl_loss")
    if values:
        axes.plot(steps, [max(1e-12, value) for value in values], label="KL to the reference")
    axes.set_yscale("log")
    _style(axes, "Rollout against trainer", "difference of token probabilities")


def _timing_panel(axes: Axes, metrics: list[dict[str, Any]], __: list[Validation]) -> None:
    parts = ("gen", "old_log_prob", "ref", "adv", "update_actor", "update_weights")
    lines = [line for line in metrics if "timing_s/step" in line]
    steps = [line["step"] for line in lines]
    columns = {
        part: [line.get(f"timing_s/{part}", 0.0) for line in lines]
        for part in parts
        if any(f"timing_s/{part}" in line for line in lines)
    }
    if columns:
        axes.stackplot(steps, *columns.values(), labels=list(columns))
    _style(axes, "Where a step's time goes", "seconds")


# --- the end of a run -----------------------------------------------------------------------------


def finish(folder: RunFolder, config: DictConfig) -> dict[str, Any]:
    """Export, draw, summarise and print the table; `summary.json` marks the run as finished."""
    seconds = folder.end_attempt()
    folder.prune_checkpoints(config.trainer.max_actor_ckpt_to_keep)
    return complete(folder.path, config, seconds)


def complete(run: Path, config: DictConfig, seconds_total: float) -> dict[str, Any]:
    """Everything a finished training leaves behind; safe to repeat."""
    from soundmind import export

    summary = summarise(run, config, seconds_total)
    draw_curves(run, summary["start"])
    if config.run.export and config.trainer.save_freq > 0:
        checkpoint = export.find_checkpoint(run)
        export.export(checkpoint, export.base_of(run), run / "export")
        summary["export"] = str(run / "export")
        summary["export_step"] = int(checkpoint.name.removeprefix("global_step_"))
    print_table(summary)
    write_json(run / "summary.json", summary)
    return summary


def print_table(summary: dict[str, Any]) -> None:
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m soundmind.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="a run folder")
    arguments = parser.parse_args(argv)
    run = arguments.run
    if not (run / "config.yaml").is_file() or not (run / "metrics.jsonl").is_file():
        print(f"error: {run} is not a run folder (config.yaml, metrics.jsonl)", file=sys.stderr)
        return 2
    config = OmegaConf.load(run / "config.yaml")
    attempts = RunFolder(run, resumed=True).attempts()
    seconds = sum(a.get("ended", a["started"]) - a["started"] for a in attempts)
    assert isinstance(config, DictConfig)
    complete(run, config, seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
