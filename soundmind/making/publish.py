"""Stage 6: the rows as a data set in both published layouts, with report and data card.

    <output>/{split}.jsonl                        id, user_content, answer, label         GitHub
    <output>/{split}/metadata.jsonl               the same in the other layout's names    Hugging Face
    <output>/{split}/NNNN/annotation.json, question.wav, answer_{label}.wav
    <output>/report.json, README.md, dropped.jsonl

Clips are hard links to those in `work`, copies where the disk has no links.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from soundmind.system.files import replace_folder, write_atomically
from soundmind.task.labels import VERDICTS

# As their repositories say, October 2026; a source of another name is shown without one.
KNOWN_LICENCES = {
    "logiqa": "LogiQA 2.0: CC BY-NC-SA 4.0",
    "control": "ConTRoL: CC BY-NC-SA 4.0",
    "folio": "FOLIO: CC BY-SA 4.0",
}


def write_set(
    rows: Sequence[dict[str, Any]], output: Path, clips: Path, splits: Sequence[str]
) -> None:
    """Write all splits; a row has key, split, user_content, answer, label, question_clip and, if
    answers are spoken, answer_clip: paths below `clips`."""
    for split in splits:
        for scratch in output.glob(f".{split}.*"):  # of a run that was killed
            shutil.rmtree(scratch, ignore_errors=True)
        mine = [row for row in rows if row["split"] == split]
        if not mine:  # of an earlier run with other splits
            shutil.rmtree(output / split, ignore_errors=True)
            (output / f"{split}.jsonl").unlink(missing_ok=True)
            for parquet in output.glob(f"parquet/*/{split}.parquet"):
                parquet.unlink()
                parquet.with_name("report.json").unlink(missing_ok=True)
            continue
        width = max(4, len(str(len(mine))))
        numbered = [(f"{number:0{width}d}", row) for number, row in enumerate(mine, 1)]

        def fill(folder: Path, numbered: list[tuple[str, dict[str, Any]]] = numbered) -> None:
            records = []
            for row_id, row in numbered:
                own = folder / row_id
                own.mkdir()
                record = {
                    "id": row_id,
                    "question_file_name": f"{row_id}/question.wav",
                    "answer_file_name": f"{row_id}/answer_{row['label']}.wav",
                    "annotation_question": row["user_content"],
                    "annotation_answer": row["answer"],
                    "label": row["label"],
                }
                link(clips / row["question_clip"], own / "question.wav")
                if row["answer_clip"]:
                    link(clips / row["answer_clip"], own / f"answer_{row['label']}.wav")
                else:
                    del record["answer_file_name"]
                (own / "annotation.json").write_text(_line(record), "utf-8")
                records.append(record)
            (folder / "metadata.jsonl").write_text("".join(map(_line, records)), "utf-8")

        replace_folder(output / split, fill)
        annotations = (
            {
                "id": row_id,
                "user_content": row["user_content"],
                "answer": row["answer"],
                "label": row["label"],
            }
            for row_id, row in numbered
        )
        write_atomically(output / f"{split}.jsonl", "".join(map(_line, annotations)).encode())


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def link(source: Path, target: Path) -> None:
    """A hard link, or a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def describe(rows: Sequence[dict[str, Any]], splits: Sequence[str]) -> dict[str, Any]:
    """Rows, labels, words, seconds and word error rates by split."""
    result: dict[str, Any] = {}
    for split in splits:
        mine = [row for row in rows if row["split"] == split]
        if not mine:
            continue
        heard = [row["word_error_rate"] for row in mine if row["word_error_rate"] is not None]
        result[split] = {
            "rows": len(mine),
            **{VERDICTS[label]: sum(row["label"] == label for row in mine) for label in (1, 0)},
            "question_words": _spread(len(row["user_content"].split()) for row in mine),
            "answer_words": _spread(len(row["answer"].split()) for row in mine),
            "question_seconds": _spread(row["question_seconds"] for row in mine),
            "answer_seconds": _spread(row["answer_seconds"] for row in mine if row["answer_clip"]),
            "word_error_rate": _spread(heard),
            "voices": sorted({row["voice"] for row in mine}),
        }
    return result


def _spread(values: Any) -> dict[str, float] | None:
    found = list(values)
    if not found:
        return None
    return {
        "mean": round(mean(found), 3),
        "median": round(median(found), 3),
        "min": round(min(found), 3),
        "max": round(max(found), 3),
        "sum": round(sum(found), 3),
    }


def card(report: dict[str, Any], name: str, licence: str) -> str:
    """The data card: README.md with the header that the Hugging Face Hub reads."""
    settings, splits = report["settings"], report["splits"]
    sources = [
        f"- `{Path(source).name}` (sha256 {digest}): "
        + next(
            (text for word, text in KNOWN_LICENCES.items() if word in source.lower()),
            "licence not known here; say it before you publish",
        )
        for source, digest in settings["triples"]["sources"].items()
    ]
    table = [
        f"| {split} | {found['rows']} | {found['entailed']} | {found['not-entailed']} | "
        f"{found['question_seconds']['sum'] / 3600:.2f} | "
        f"{(found['answer_seconds'] or {'sum': 0.0})['sum'] / 3600:.2f} |"
        for split, found in splits.items()
    ]
    dropped = [
        f"| {stage} | {reason} | {count} |"
        for stage, found in report["stages"].items()
        for reason, count in found["dropped"].items()
    ]
    header = ["---", f"license: {licence}"] if licence else ["---", "license: other"]
    return "\n".join(
        [
            *header,
            f"language: {settings['words']['language']}",
            "task_categories: [audio-text-to-text]",
            "---",
            f"# {name}",
            "",
            "Spoken logic questions in the layout of the SoundMind data set (arXiv 2506.12935), made by "
            "`python -m soundmind.make_data`. It is not the published set.",
            "",
            "| split | rows | entailed | not-entailed | hours of questions | hours of answers |",
            "| --- | --: | --: | --: | --: | --: |",
            *table,
            "",
            f"- Reasoning by `{settings['reasoning']['model']}` (as its server calls itself: "
            f"`{report['teacher_model']}`), kept where its verdict agrees with the label; check the terms "
            "under which its output may be used and published.",
            f"- Speech by {settings['speech']['engine']}, voices {', '.join(settings['speech']['voices'])}"
            f"; 24 kHz, 16 bit, mono. Heard again by: {settings['check']['recogniser'] or 'nobody'}.",
            f"- Kept free of: {', '.join(map(_name, settings['triples']['exclude'])) or 'nothing'} "
            "(questions and premises, exact and nearly the same).",
            "",
            "## Sources",
            "",
            *sources,
            "",
            "## Dropped",
            "",
            *(
                ["| stage | reason | rows |", "| --- | --- | --: |", *dropped]
                if dropped
                else ["Nothing."]
            ),
            "",
            "Each is listed with its place in `dropped.jsonl`; all counts are in `report.json`.",
            "",
        ]
    )


def _name(path: str) -> str:
    return f"`{Path(path).name}`"
