"""The curves of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from soundmind.run.records import (
    CORRELATION,
    PROBABILITY_GAP,
    Validation,
    read_metrics,
    read_validations,
)
from soundmind.task.reward_settings import COMPONENTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


def draw_losses(run: Path, start: str | None) -> Path:
    """Draw the losses of a supervised fine-tuning run into <run>/plots/loss.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = read_metrics(run)
    (run / "plots").mkdir(exist_ok=True)
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for key, label in (("train/loss", "rows of the step"), ("val/loss", "held-out rows")):
        steps, values = _series(metrics, key)
        if values:
            axes.plot(steps, values, label=label, marker="o" if key == "val/loss" else None)
    _style(axes, "Loss of annotated chains", "nats a response token")
    return _save(figure, run / "plots" / "loss.png", start)


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
