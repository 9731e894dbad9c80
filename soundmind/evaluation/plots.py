"""Pictures of an evaluation: accuracy, ranges, finish reasons, confusion, lengths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soundmind.evaluation.metrics import NO_VERDICT, is_correct
from soundmind.evaluation.tables import PRACTICE, floor_text, percent, range_text
from soundmind.task.labels import VERDICTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HISTOGRAM_BINS = 30


# --- plots ----------------------------------------------------------------------------------------


def write_plots(
    folder: Path,
    predictions: Sequence[dict[str, Any]],
    summary: dict[str, Any],
) -> list[Path]:
    """Draw every plot of an evaluation; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(exist_ok=True)
    plots = {
        "accuracy": lambda axes: _accuracy_plot(axes, summary),
        "by_duration": lambda axes: _ranges_plot(
            axes, summary, "by_clip_seconds", "clip duration, s"
        ),
        "by_length": lambda axes: _ranges_plot(
            axes, summary, "by_response_tokens", "response length, tokens"
        ),
        "confusion": lambda axes: _confusion_plot(axes, summary),
        "lengths": lambda axes: _lengths_plot(axes, predictions, summary),
    }
    paths = []
    for name, draw in plots.items():
        figure, axes = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
        draw(axes)
        if summary["stand_in"]:
            figure.supxlabel(PRACTICE, fontsize=8, color="0.35")
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        paths.append(path)
    return paths


def _accuracy_plot(axes: Axes, summary: dict[str, Any]) -> None:
    bars: list[tuple[str, dict[str, Any], str]] = [("all", summary["accuracy"], "tab:blue")]
    bars.append(("lenient", summary["accuracy_lenient"], "tab:olive"))
    if "speech" in summary:
        heard = summary["speech"]["accuracy_from_transcript"]
        bars.append(("from transcript", heard, "tab:purple"))
    bars += [(label, rate, "tab:cyan") for label, rate in summary["by_label"].items()]
    _rate_bars(axes, bars)
    for figure, style in zip(summary["paper"], ("--", "-."), strict=False):
        label = f"paper, {figure['model']} {figure['accuracy']:.2f}"
        axes.axhline(figure["accuracy"], color="tab:red", linewidth=1, linestyle=style, label=label)
    _finish_rates(axes, summary, "Accuracy")


def _ranges_plot(axes: Axes, summary: dict[str, Any], key: str, xlabel: str) -> None:
    groups = [(range_text(group), group, "tab:blue") for group in summary[key]]
    _rate_bars(axes, groups)
    axes.set_xlabel(xlabel if groups else f"{xlabel}: not measured")
    _finish_rates(axes, summary, "Accuracy by " + xlabel.split(",")[0])


def _rate_bars(axes: Axes, bars: Sequence[tuple[str, dict[str, Any], str]]) -> None:
    """Bars of rates in percent with their intervals, the count under each name."""
    for position, (_, rate, color) in enumerate(bars):
        if rate["value"] is None:
            continue
        value = 100 * rate["value"]
        low, high = (100 * bound for bound in rate["interval"])
        axes.bar(position, value, color=color, alpha=0.75, width=0.6)
        errors = [[max(0.0, value - low)], [max(0.0, high - value)]]
        axes.errorbar(position, value, yerr=errors, color="black", capsize=4, linewidth=1.2)
    axes.set_xticks(range(len(bars)), [f"{name}\nn = {rate['n']}" for name, rate, _ in bars])
    axes.tick_params(axis="x", labelsize=8)


def _finish_rates(axes: Axes, summary: dict[str, Any], title: str) -> None:
    floor = summary["majority_floor"]["value"]
    axes.axhline(100 * floor, color="0.4", linestyle=":", label=f"majority floor {percent(floor)}")
    axes.set_ylim(0, 105)
    axes.set_ylabel("percent, 95 % interval")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7, loc="lower right", framealpha=0.9)


def _confusion_plot(axes: Axes, summary: dict[str, Any]) -> None:
    counts = summary["confusion"]["counts"]
    columns = (*VERDICTS, NO_VERDICT)
    grid = [[counts[truth][verdict] for verdict in columns] for truth in VERDICTS]
    axes.imshow(grid, cmap="Blues", vmin=0, aspect="auto")
    top = max(max(row) for row in grid)
    for i, row in enumerate(grid):
        for j, count in enumerate(row):
            color = "white" if count > top / 2 else "black"
            axes.text(j, i, str(count), ha="center", va="center", color=color)
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(VERDICTS)), VERDICTS, fontsize=8)
    axes.set_xlabel(f"verdict of the response; {floor_text(summary)}", fontsize=8)
    axes.set_ylabel("label")
    axes.set_title(f"Confusion, n = {summary['confusion']['n']}", fontsize=10)


def _lengths_plot(
    axes: Axes, predictions: Sequence[dict[str, Any]], summary: dict[str, Any]
) -> None:
    right = [p["response_tokens"] for p in predictions if is_correct(p)]
    wrong = [p["response_tokens"] for p in predictions if not is_correct(p) and not p["error"]]
    axes.hist(
        [right, wrong],
        bins=HISTOGRAM_BINS,
        stacked=True,
        color=["tab:green", "tab:orange"],
        label=[f"right, n = {len(right)}", f"wrong, n = {len(wrong)}"],
    )
    axes.set_xlabel(f"response tokens; {floor_text(summary)}", fontsize=8)
    axes.set_ylabel("responses")
    axes.set_title("Response length", fontsize=10)
    axes.legend(fontsize=7)
