"""Words and tables of an evaluation, for the terminal and for its page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soundmind.evaluation.metrics import WELL_PARSED

if TYPE_CHECKING:
    from rich.table import Table


PRACTICE = "Practice output of a stand-in model, no result"


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
            "correct": _correct_text(accuracy),
            "accuracy": percent(accuracy["value"]),
            "interval": interval_text(accuracy["interval"]),
            "wer": percent(speech["wer"]["value"]) if speech else "",
        }
    ]
    rows.append({"what": "the same, lenient reading", **_rate_cells(summary["accuracy_lenient"])})
    among = _rate_cells(summary["accuracy_among_parsed"])
    rows.append({"what": "among responses with a readable verdict", **among})
    if speech:
        heard = speech["accuracy_from_transcript"]
        rows.append({"what": "this evaluation, from the transcript", **_rate_cells(heard)})
        fairly = speech["accuracy_from_transcript_lenient"]
        rows.append({"what": "the same, lenient reading", **_rate_cells(fairly)})
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


def _correct_text(rate: dict[str, Any]) -> str:
    return f"{rate['correct']}" + (f" of {rate['responses']}" if "responses" in rate else "")


def parse_warning(summary: dict[str, Any]) -> str | None:
    """A sentence where so few verdicts are readable that accuracy measures form, else None."""
    parsed, lenient = summary["parsed"], summary["parsed_lenient"]
    if parsed["value"] is None or parsed["value"] >= WELL_PARSED:
        return None
    return (
        f"Only {percent(parsed['value'])} % of {parsed['n']} responses have a readable verdict "
        f"({percent(lenient['value'])} % to a lenient reader): the accuracy mixes form with "
        "reasoning. Compare models by the lenient reading, too."
    )


def _rate_cells(rate: dict[str, Any]) -> dict[str, str]:
    return {
        "n": str(rate["n"]),
        "correct": _correct_text(rate),
        "accuracy": percent(rate["value"]),
        "interval": interval_text(rate["interval"]),
        "wer": "",
    }


def breakdown(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Further tables of rates: {"title", "rows": [{"what", "n", "correct", ...}]}."""

    def table(title: str, rates: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
        return {"title": title, "rows": [{"what": w, **_rate_cells(r)} for w, r in rates]}

    def ranges(groups: Sequence[dict[str, Any]], unit: str) -> list[tuple[str, dict[str, Any]]]:
        return [(f"{range_text(group)} {unit}", group) for group in groups]

    form = [
        ("readable verdict", summary["parsed"]),
        ("readable to a lenient reader", summary["parsed_lenient"]),
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


def range_text(group: dict[str, Any]) -> str:
    low, high = f"{group['low']:.4g}", f"{group['high']:.4g}"
    return low if low == high else f"{low} to {high}"


def floor_text(summary: dict[str, Any]) -> str:
    """The majority floor in one phrase, for the foot of tables."""
    floor = summary["majority_floor"]
    return f"majority floor {percent(floor['value'])} % ({floor['correct']} of {floor['n']})"


# --- terminal -------------------------------------------------------------------------------------


def print_evaluation(summary: dict[str, Any], config: dict[str, Any], output: Path) -> None:
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
    if warning := parse_warning(summary):
        console.print(f"[bold red]{warning}[/]")
    if speech:
        wer, whole = speech["wer"], speech["wer_without_cut"]
        console.print(
            f"WER without the {wer['clips'] - whole['clips']} clips that were cut: "
            f"{percent(whole['value'])} % over {whole['n']} words of {whole['clips']} clips"
        )
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
    for item in comparison["comparisons"]:
        for line in item["settings_differ"]:
            console.print(f"differs, {item['folder']}: {line}", markup=False)
    console.print(_comparison_table(comparison))
    console.print(
        f"baseline {percent(base['accuracy']['value'])} %, lenient reading "
        f"{percent(base['accuracy_lenient']['value'])} %; difference: paired bootstrap, 95 %; "
        "McNemar exact, two-sided; Holm over "
        f"{len(comparison['comparisons'])} comparison(s); {floor_text(comparison)}"
    )


def _comparison_table(comparison: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table()
    for name in ("", "rows", "accuracy %", "lenient %", "against", "difference"):
        table.add_column(name, justify="left" if not name else "right")
    for name in ("won", "lost", "McNemar p", "Holm", "bootstrap p", "Holm"):
        table.add_column(name, justify="right")
    for item in comparison["comparisons"]:
        boot, test = item["bootstrap"], item["mcnemar"]
        low, high = boot["interval"]
        table.add_row(
            item["folder"],
            str(item["rows_shared"]),
            percent(item["accuracy"]["value"]),
            percent(item["accuracy_lenient"]["value"]),
            percent(item["baseline_accuracy"]["value"]),
            f"{100 * boot['value']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]",
            str(item["won"]["count"]),
            str(item["lost"]["count"]),
            *(f"{p:.3g}" for p in (test["p"], test["p_holm"], boot["p"], boot["p_holm"])),
        )
    return table
