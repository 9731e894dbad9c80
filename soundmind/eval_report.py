"""What an evaluation looks like: the table on the terminal, plots, and one page for a browser.

`report.html` opens from disk without a network: styles, script, plots and all answers are in it.
The answers are gzip-compressed (656 of a thousand words would be 4 MB of text) and unpacked by the
browser. Clips stay files: the page refers to them relative to its own folder and loads one only
when its row is opened. Every table and plot shows the majority floor; the published figures stand
beside an evaluation of the whole ALR test split only.

Reads   nothing; gets predictions, metrics and configuration
Writes  plots/*.png and report.html below the output folder
"""

from __future__ import annotations

import base64
import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from soundmind.labels import VERDICTS, split_response
from soundmind.metrics import NO_VERDICT, is_correct, is_truncated

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

PRACTICE = "Practice output of a stand-in model, no result"
TEMPLATE = "evaluation.html.j2"
HISTOGRAM_BINS = 30


# --- words for numbers ----------------------------------------------------------------------------


def percent(value: float | None) -> str:
    """A share as percent with two decimals, as the paper prints it."""
    return "-" if value is None else f"{100 * value:.2f}"


def interval_text(interval: Sequence[float] | None) -> str:
    """An interval in percent: `78.2 to 84.2`."""
    if interval is None:
        return "-"
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def headline(summary: dict[str, Any]) -> list[dict[str, str]]:
    """Rows of the first table: this evaluation, the floor, and the paper where it has a figure."""
    accuracy, speech = summary["accuracy"], summary.get("speech")
    rows = [
        {
            "what": "this evaluation" + (", from text" if speech else ""),
            "n": str(accuracy["n"]),
            "correct": str(accuracy["correct"])
            + (f" of {accuracy['responses']}" if "responses" in accuracy else ""),
            "accuracy": percent(accuracy["value"]),
            "interval": interval_text(accuracy["interval"]),
            "wer": percent(speech["wer"]["value"]) if speech else "",
        }
    ]
    if speech:
        heard = speech["accuracy_from_transcript"]
        rows.append({"what": "this evaluation, from the transcript", **_rate_cells(heard)})
    if "sampled" in summary:
        vote = summary["sampled"]["majority_vote"]
        count = summary["sampled"]["samples_per_row"]
        rows.append({"what": f"majority vote of {count}", **_rate_cells(vote)})
    floor = summary["majority_floor"]
    rows.append(
        {
            "what": f"majority floor: always “{floor['verdict']}”",
            "n": str(floor["n"]),
            "correct": str(floor["correct"]),
            "accuracy": percent(floor["value"]),
            "interval": "",
            "wer": "",
        }
    )
    for figure in summary["paper"]:
        rows.append(
            {
                "what": f"paper: {figure['model']}",
                "n": str(figure["n"]),
                "correct": str(figure["correct"]),
                "accuracy": f"{figure['accuracy']:.2f}",
                "interval": "not given",
                "wer": f"{figure['wer']:.2f}" if "wer" in figure else "",
            }
        )
    return rows


def _rate_cells(rate: dict[str, Any]) -> dict[str, str]:
    return {
        "n": str(rate["n"]),
        "correct": str(rate["correct"]),
        "accuracy": percent(rate["value"]),
        "interval": interval_text(rate["interval"]),
        "wer": "",
    }


def breakdown(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Further tables of rates: {"title", "rows": [{"what", "n", "correct", ...}]}."""

    def table(title: str, rates: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
        return {"title": title, "rows": [{"what": w, **_rate_cells(r)} for w, r in rates]}

    def ranges(groups: Sequence[dict[str, Any]], unit: str) -> list[tuple[str, dict[str, Any]]]:
        return [(f"{_range_text(group)} {unit}", group) for group in groups]

    form = [
        ("readable verdict", summary["parsed"]),
        ("whole format rule", summary["format"]),
        ("cut at the token limit", summary["truncated"]),
    ]
    if "speech" in summary:
        form.append(("speech cut at its limit", summary["speech"]["speech_truncated"]))
    teacher = [
        ("teacher agrees with the label", summary["teacher_agrees_with_label"]),
        ("teacher disagrees with the label", summary["teacher_disagrees_with_label"]),
    ]
    tables = [
        table("Form of the responses (share)", form),
        table("Accuracy by label", list(summary["by_label"].items())),
        table("Accuracy by clip duration", ranges(summary["by_clip_seconds"], "s")),
        table("Accuracy by response length", ranges(summary["by_response_tokens"], "tokens")),
        table("Accuracy where teacher and label differ", teacher),
    ]
    if "sampled" in summary:
        passes = [
            {
                "what": f"pass@{k}",
                "n": str(value["n"]),
                "correct": "",
                "accuracy": percent(value["value"]),
                "interval": "",
            }
            for k, value in summary["sampled"]["pass_at"].items()
        ]
        tables.append({"title": "Several samples a row", "rows": passes})
    return [table for table in tables if table["rows"]]


def _range_text(group: dict[str, Any]) -> str:
    low, high = f"{group['low']:.4g}", f"{group['high']:.4g}"
    return low if low == high else f"{low} to {high}"


def floor_text(summary: dict[str, Any]) -> str:
    """The majority floor in one phrase, for the foot of tables."""
    floor = summary["majority_floor"]
    return f"majority floor {percent(floor['value'])} % ({floor['correct']} of {floor['n']})"


# --- terminal -------------------------------------------------------------------------------------


def print_table(summary: dict[str, Any], config: dict[str, Any], output: Path) -> None:
    """The evaluation's results on the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if summary["stand_in"]:
        console.print(f"[bold]{PRACTICE}[/] ({summary['stand_in']})")
    title = f"{summary['data_source']} {summary['split']}, {summary['configuration']}"
    table = Table(title=title, title_justify="left")
    for name in ("", "n", "correct", "accuracy %", "95 % interval"):
        table.add_column(name, justify="left" if not name else "right")
    speech = summary.get("speech")
    if speech:
        table.add_column("WER %", justify="right")
    for row in headline(summary):
        cells = [row[key] for key in ("what", "n", "correct", "accuracy", "interval")]
        table.add_row(*cells, *([row["wer"]] if speech else []))
    console.print(table)
    parsed, form, cut = summary["parsed"], summary["format"], summary["truncated"]
    console.print(
        f"parsed {percent(parsed['value'])} % and format {percent(form['value'])} % of "
        f"{parsed['n']} responses; {cut['correct']} cut at {config['generation']['max_tokens']} "
        "tokens"
    )
    if speech:
        wer = speech["wer"]
        console.print(
            f"WER over {wer['n']} words of {wer['clips']} clips: {wer['substitutions']} "
            f"substitutions, {wer['deletions']} deletions, {wer['insertions']} insertions; "
            f"{speech['recogniser']}, {speech['normaliser']}, {speech['aligner']}"
        )
    failed = summary["failed_rows"]
    if failed["count"]:
        console.print(f"{failed['count']} of {failed['n']} rows failed and count as wrong:")
        for row in failed["rows"][:10]:
            console.print(f"  {row['id']}: {row['error']}", markup=False)
    console.print(f"{output / 'report.html'}", markup=False)


def print_comparison(comparison: dict[str, Any]) -> None:
    """Paired comparisons on the terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    base = comparison["baseline"]
    sides = [base, *comparison["comparisons"]]
    if any(side["stand_in"] for side in sides):
        console.print(f"[bold]{PRACTICE}[/]")
    console.print(
        f"baseline {base['folder']}: {base['model']}, {base['configuration']}", markup=False
    )
    console.print(_comparison_table(comparison))
    console.print(
        "difference: paired bootstrap, 95 %; McNemar exact, two-sided; Holm over "
        f"{len(comparison['comparisons'])} comparison(s); {floor_text(comparison)}"
    )


def _comparison_table(comparison: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table()
    for name in ("", "rows", "accuracy %", "against", "difference", "won", "lost"):
        table.add_column(name, justify="left" if not name else "right")
    for name in ("McNemar p", "Holm", "bootstrap p", "Holm"):
        table.add_column(name, justify="right")
    for item in comparison["comparisons"]:
        boot, test = item["bootstrap"], item["mcnemar"]
        low, high = boot["interval"]
        table.add_row(
            item["folder"],
            str(item["rows_shared"]),
            percent(item["accuracy"]["value"]),
            percent(item["baseline_accuracy"]["value"]),
            f"{100 * boot['value']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]",
            str(item["won"]["count"]),
            str(item["lost"]["count"]),
            *(f"{p:.3g}" for p in (test["p"], test["p_holm"], boot["p"], boot["p_holm"])),
        )
    return table


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
    groups = [(_range_text(group), group, "tab:blue") for group in summary[key]]
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


# --- the page -------------------------------------------------------------------------------------


def write_report(
    output: Path,
    predictions: Sequence[dict[str, Any]],
    summary: dict[str, Any],
    config: dict[str, Any],
) -> Path:
    """Write report.html; plots of `write_plots` must be there."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("soundmind", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(TEMPLATE).render(
        title=f"{summary['model']}, {summary['configuration']}",
        practice=PRACTICE if summary["stand_in"] else None,
        summary=summary,
        settings=_settings(summary, config),
        headline=headline(summary),
        breakdown=breakdown(summary),
        floor=floor_text(summary),
        confusion=summary["confusion"],
        verdicts=(*VERDICTS, NO_VERDICT),
        plots=[_embedded_plot(output / "plots" / f"{name}.png", name) for name in _PLOT_TEXTS],
        examples=_pack([example_record(line) for line in predictions]),
        count=len(predictions),
        is_speech="speech" in summary,
    )
    path = output / "report.html"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


_PLOT_TEXTS = {
    "accuracy": "Bars: accuracy over all rows and by label, with intervals and the majority floor",
    "by_duration": "Bars: accuracy by clip duration, with the majority floor",
    "by_length": "Bars: accuracy by response length, with the majority floor",
    "confusion": "Matrix: label against verdict of the response",
    "lengths": "Histogram: response tokens of right and wrong responses",
}


def _settings(summary: dict[str, Any], config: dict[str, Any]) -> list[tuple[str, str]]:
    data = config["data"]
    settings = [
        ("model", f"{config['model']['given']} ({config['model']['adapter']})"),
        ("model digest", config["model"]["digest"]),
        ("data", f"{data['path']}, {data['rows']} rows, SHA-256 {data['digest']}"),
        *((key.replace("_", " "), str(value)) for key, value in config["generation"].items()),
    ]
    if "speech" in summary:
        speech = summary["speech"]
        settings += [
            ("recogniser digest", speech["recogniser_digest"]),
            ("normaliser", speech["normaliser"]),
            ("aligner", speech["aligner"]),
            ("WER reference", speech["reference_text"]),
            *((key.replace("_", " "), str(config["speech"][key])) for key in config["speech"]),
        ]
    return settings


def _embedded_plot(path: Path, name: str) -> dict[str, str]:
    return {"alt": _PLOT_TEXTS[name], "data": base64.b64encode(path.read_bytes()).decode()}


def example_record(line: dict[str, Any]) -> dict[str, Any]:
    """One prediction as the page's script wants it; the thinking apart so that it can be folded."""
    response = split_response(line["response"])
    record = {
        "id": line["id"],
        "sample": line["sample"],
        "label": line["ground_truth"],
        "verdict": line["verdict"],
        "right": is_correct(line),
        "form": line["components"]["text_format"] == 1.0,
        "cut": is_truncated(line),
        "error": line["error"],
        "teacher": line["teacher_verdict"],
        "thinking": response.thinking if response.one_block else "",
        "after": response.after if response.one_block else line["response"],
        "tokens": line["response_tokens"],
        "seconds": line["question_seconds"],
        "question": line["question"],
        "audio": _link(line["question_audio"]),
        "score": line["score"],
        "components": line["components"],
    }
    if "speech_audio" in line:
        record["speech"] = _link(line["speech_audio"])
        record["transcript"] = line["speech_transcript"]
        record["heard"] = line["transcript_verdict"]
    return record


def _link(path: str | None) -> str | None:
    """A relative path as a URL."""
    return None if path is None else quote(path)


def _pack(records: Sequence[dict[str, Any]]) -> str:
    """JSON, gzip, base64; the same bytes for the same records."""
    text = json.dumps(records, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()
