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
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from soundmind.evaluation.metrics import NO_VERDICT, is_correct, is_truncated
from soundmind.evaluation.tables import PRACTICE, breakdown, floor_text, headline, parse_warning
from soundmind.system.files import write_text
from soundmind.task.labels import VERDICTS, split_response

TEMPLATE = "page.html.j2"


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
        loader=PackageLoader("soundmind.evaluation", ""),
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
        warning=parse_warning(summary),
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
    write_text(path, page)
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
        "lenient": line["lenient_verdict"],
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
