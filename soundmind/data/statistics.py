"""Numbers about a prepared split: statistics, duplicates, overlaps, and tables of them.

    mean, median, p95, max   over rows; p95 by linear interpolation
    majority share           share of the more frequent label: the accuracy of always saying it
    duplicates               rows beyond the first with the same exact text, within a split
    overlap                  distinct exact texts that occur in both of two splits
    teacher                  verdict of the annotated reasoning, against the label

"Exact text" is the whole question, or its major premise where the question quotes one.
Inputs are `facts`: Arrow tables of some numbers a row, which lie in the mapped files of the parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from soundmind.data.audio import MAX_CLIP_SECONDS
from soundmind.task import labels

if TYPE_CHECKING:
    import pyarrow as pa

    from soundmind.data.sources import Fault


Array = npt.NDArray[Any]

MEASURES = {
    "question_seconds": "question, s",
    "audio_tokens": "audio tokens",
    "question_tokens": "question tokens",
    "question_words": "question words",
    "reference_seconds": "reference, s",
    "reference_tokens": "reference tokens",
    "reference_words": "reference words",
}

_KEPT = ("_line", "_where", "_question_digest", "_premise_digest", "_answer_missing", "_clip_bytes")


def facts_of_part(table: pa.Table) -> pa.Table:
    """What is remembered of a part's rows: `extra_info` flat, what begins with `_`, the clip."""
    import pyarrow as pa
    import pyarrow.compute as pc

    info = table["extra_info"].combine_chunks()
    columns = {field.name: info.field(field.name) for field in info.type}
    clip = pc.struct_field(table["audio"], "path")
    return pa.table({**columns, **{name: table[name] for name in _KEPT}, "_clip": clip})


def measured(facts: pa.Table, name: str) -> Array:
    """One column as floats, NaN where nothing is measured."""
    values: Array = facts[name].cast("float64").to_numpy()
    return values


def summary(values: Array) -> dict[str, float] | None:
    """mean, median, p95 and max of the measured values, rounded; None if nothing is measured."""
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    numbers = {
        "mean": values.mean(),
        "median": np.median(values),
        "p95": np.percentile(values, 95),
        "max": values.max(),
    }
    return {name: round(float(number), 3) for name, number in numbers.items()}


def describe_split(facts: pa.Table) -> dict[str, Any]:
    """Everything the report says about the rows of one split, ready for JSON."""
    counts = Counter(labels.verdict_of(label) for label in facts["label"].to_pylist())
    majority = max(labels.VERDICTS, key=lambda verdict: counts[verdict])
    seconds = measured(facts, "question_seconds")
    audible = measured(facts, "audio_tokens") > 0
    too_long = np.flatnonzero(audible & (np.nan_to_num(seconds) > MAX_CLIP_SECONDS))
    return {
        "rows": len(facts),
        "labels": {verdict: counts[verdict] for verdict in reversed(labels.VERDICTS)},
        "majority": {
            "verdict": majority,
            "share": round(counts[majority] / len(facts), 4) if len(facts) else None,
        },
        "measures": {name: summary(measured(facts, name)) for name in MEASURES},
        "question_hours": round(float(np.nansum(seconds)) / 3600, 3),
        "beyond_processor_window": facts["id"].take(too_long).to_pylist(),
        "teacher": teacher_table(facts),
        "duplicates": {
            "question": _num_repeats(facts["_question_digest"]),
            "major_premise": _num_repeats(facts["_premise_digest"].drop_null()),
        },
    }


def teacher_table(facts: pa.Table) -> dict[str, Any]:
    """Counts of label against the annotated reasoning's own verdict, and the disagreements."""
    truths = [labels.verdict_of(label) for label in facts["label"].to_pylist()]
    said = [verdict or "none" for verdict in facts["teacher_verdict"].to_pylist()]
    pairs = Counter(zip(truths, said, strict=True))
    verdicts = (labels.verdict_of(1), labels.verdict_of(0))
    return {
        "by_label": {
            truth: {verdict: pairs[truth, verdict] for verdict in (*verdicts, "none")}
            for truth in verdicts
        },
        "disagreements": sum(n for (truth, verdict), n in pairs.items() if truth != verdict),
    }


def overlap(first: pa.Table, second: pa.Table) -> dict[str, int]:
    """Distinct texts that two splits share."""
    names = {"question": "_question_digest", "major_premise": "_premise_digest"}
    return {
        said: len(
            set(first[name].drop_null().unique().to_pylist()).intersection(second[name].to_pylist())
        )
        for said, name in names.items()
    }


def _num_repeats(digests: pa.ChunkedArray) -> int:
    return len(digests) - len(digests.unique())


def count_faults(faults: Iterable[Fault]) -> dict[str, int]:
    """Faults by kind, the most frequent first."""
    counts = Counter(fault.kind for fault in faults)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


# -- tables -----------------------------------------------------------------------------------


def text_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Plain aligned columns: the first left, the others right where every cell is a number."""
    cells = [[_cell(value) for value in row] for row in rows]
    columns = list(zip(headers, *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [index > 0 and _is_numeric(column[1:]) for index, column in enumerate(columns)]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in [list(headers), ["-" * width for width in widths], *cells]
    ]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 100 else f"{value:.1f}"
    return str(value)


def _is_numeric(cells: Sequence[str]) -> bool:
    return all(not cell.strip("0123456789.,-% ") for cell in cells)


def report_tables(report: dict[str, Any]) -> str:
    """The report as one reads it on a terminal."""
    splits: dict[str, dict[str, Any]] = report["splits"]
    entailed, not_entailed = labels.ENTAILED, labels.NOT_ENTAILED
    headers = f"split,rows,{entailed},{not_entailed},majority %,teacher differs,skipped,"
    headers += "overlap dropped,same question,same premise"
    counts = text_table(headers.split(","), [_count_cells(*item) for item in splits.items()])
    lengths = text_table(
        ["split", "measure", "mean", "median", "p95", "max"],
        [
            [name, title, *(numbers[key] for key in ("mean", "median", "p95", "max"))]
            for name, s in splits.items()
            for measure, title in MEASURES.items()
            if (numbers := s["measures"][measure]) is not None and numbers["max"] > 0
        ],
    )
    blocks = [counts, lengths]
    if report["overlap"]:
        blocks.append(
            text_table(
                ["in both", "questions", "major premises"],
                [[p, n["question"], n["major_premise"]] for p, n in report["overlap"].items()],
            )
        )
    return "\n\n".join(blocks + _warnings(report))


def _count_cells(name: str, split: dict[str, Any]) -> list[object]:
    return [
        name,
        split["rows"],
        split["labels"][labels.ENTAILED],
        split["labels"][labels.NOT_ENTAILED],
        100 * split["majority"]["share"],
        split["teacher"]["disagreements"],
        split["skipped"]["rows"],
        len(split["overlap_dropped"]),
        split["duplicates"]["question"],
        split["duplicates"]["major_premise"],
    ]


def _warnings(report: dict[str, Any]) -> list[str]:
    lines = []
    for name, split in report["splits"].items():
        if long := split["beyond_processor_window"]:
            shown = ", ".join(long[:5]) + (", ..." if len(long) > 5 else "")
            lines.append(
                f"warning: {name}: {len(long)} questions last longer than the {MAX_CLIP_SECONDS} s "
                f"the processor hears (ids {shown}). Kept, and refused by the training data set "
                "unless data.filter_overlong_prompts=True"
            )
        if split["answer_recordings"] == "none":
            lines.append(f"note: {name}: no recorded answers, reference_seconds is empty")
    if report["tokenizer"] is None:
        lines.append("note: no tokenizer: token counts of texts are empty, words are counted")
    return ["\n".join(lines)] if lines else []


def fault_table(faults: Sequence[Fault], shown_per_kind: int | None) -> str:
    """Every fault on a line of its own, at most `shown_per_kind` of each kind (None: all)."""
    seen: Counter[str] = Counter()
    rows = []
    for fault in faults:
        seen[fault.kind] += 1
        if shown_per_kind is None or seen[fault.kind] <= shown_per_kind:
            rows.append([fault.kind, fault.where, fault.row or "-", fault.detail])
    table = text_table(["fault", "where", "row", "found"], rows)
    for kind, count in seen.items():
        if shown_per_kind is not None and count > shown_per_kind:
            table += f"\n... and {count - shown_per_kind} more of {kind} (--list-all shows them)"
    return table
