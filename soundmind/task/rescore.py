"""Saved responses, scored again: what did a run earn, and what would it earn under another rule?

    python -m soundmind.rewards outputs/run/rollouts/100.jsonl
    python -m soundmind.rewards predictions.jsonl --preset guarded --output rescored.jsonl
    python -m soundmind.rewards rollouts/*.jsonl --config configs/grpo.yaml --length-unit words

Reads JSON lines: verl's rollout and validation dumps (input, output, gts, score) or our
predictions (response with ground_truth or label). Lengths come from the keys of
`rewards.ROW_KEYS`, on the line itself or under its `extra_info`; a dump that lacks the reference
length gets it back from the length credit it saved. Prints, per data source, the mean of every
component with the counts of full, partial and no credit, then score, accuracy, parsed rate and
verdicts. Writes only where `--output` says, whole or not at all. No GPU, tokenizer or torch.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from soundmind.task.labels import ENTAILMENT, LabelSet
from soundmind.task.reward import ROW_KEYS, compute_score, length_ratio, quantity
from soundmind.task.reward_settings import RATE_KEYS, Reward


def read_saved(
    path: Path, labels: LabelSet = ENTAILMENT, faults: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield saved responses with `response`, `ground_truth` and `row` beside the line's own keys.

    Takes verl's rollout and validation dumps (input, output, gts, score) and our predictions
    (response with ground_truth or label), gzipped or not; a byte that is no UTF-8 is read as U+FFFD.
    A line that is neither is named in `faults` and passed over, or raises ValueError without them.
    """
    with path.open("rb") as raw:
        compressed = raw.peek(2)[:2] == b"\x1f\x8b"
        with gzip.GzipFile(fileobj=raw) if compressed else raw as file:
            for number, text in enumerate(_lines(file, path), start=1):
                if not text.strip():
                    continue
                try:
                    line = _json_line(text, f"{path}:{number}")
                    saved = _saved_response(line, labels, f"{path}:{number}")
                except ValueError as error:
                    if faults is None:
                        raise
                    faults.append(str(error))
                    continue
                yield {**line, **saved}


def _lines(file: Iterable[bytes], path: Path) -> Iterator[bytes]:
    try:
        yield from file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: gzip data that is cut or damaged ({error})") from error


def _json_line(text: bytes, where: str) -> dict[str, Any]:
    try:
        line = json.loads(text.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not a JSON line ({error})") from error
    if not isinstance(line, dict):
        raise ValueError(f"{where}: a JSON object is wanted, found {type(line).__name__}")
    return line


def _saved_response(line: dict[str, Any], labels: LabelSet, where: str) -> dict[str, Any]:
    response = line.get("output", line.get("response"))
    truth = line.get("gts", line.get("ground_truth"))
    if truth is None and isinstance(line.get("label"), int):
        if not 0 <= line["label"] < len(labels.labels):
            raise ValueError(f"{where}: label {line['label']} is not an index of {labels.labels}")
        truth = labels.labels[line["label"]]
    if not isinstance(response, str) or truth is None:
        raise ValueError(
            f"{where}: needs the response under 'output' or 'response' and the truth under 'gts', "
            f"'ground_truth' or 'label' (0 or 1); found the keys {sorted(line)}"
        )
    row = dict(line["extra_info"]) if isinstance(line.get("extra_info"), dict) else {}
    row.update({key: line[key] for key in ROW_KEYS if line.get(key) is not None})
    if row.get("response_tokens") == -1:  # what compute_score returns for "unknown"
        del row["response_tokens"]
    if "reference_tokens" not in row:
        row.update(_recovered_reference(line, row))
    return {"response": response, "ground_truth": str(truth), "row": row}


def _recovered_reference(line: dict[str, Any], row: dict[str, Any]) -> dict[str, float]:
    """Reference tokens of a line that only saved its length credit: L / credit.

    Exact below a credit of 1; at 1 it is the largest reference that explains the credit, which
    every preset but `guarded` grades the same. Scores of `guarded` mix in more than the length.
    """
    credit, tokens = quantity(line.get("text_length")), quantity(row.get("response_tokens"))
    if not credit or credit > 1.0 or not tokens or "no_verdict" in line:
        return {}
    return {"reference_tokens": tokens / credit}


def rescore(lines: Iterable[dict[str, Any]], **reward_kwargs: Any) -> list[dict[str, Any]]:
    """Grade lines of `read_saved` again; each keeps its keys, `score_before` is the saved score."""
    graded = []
    for line in lines:
        result = compute_score(
            line.get("data_source", ""),
            line["response"],
            line["ground_truth"],
            line["row"],
            **reward_kwargs,
        )
        before = {"score_before": line["score"]} if "score" in line else {}
        graded.append({**line, **before, **result})
    return graded


def component_table(graded: Sequence[dict[str, Any]], reward: Reward) -> str:
    """Means and counts of every component over graded lines, as text.

    `full` counts 1.0, `zero` counts 0.0 and `part` what lies between.
    """
    total = len(graded)
    lines = [f"{'component':<16}{'weight':>8}{'mean':>9}{'full':>8}{'part':>8}{'zero':>8}"]
    for name, weight in reward.weights.items():
        values = [line[name] for line in graded]
        full, zero = values.count(1.0), values.count(0.0)
        mean = sum(values) / total
        lines.append(
            f"{name:<16}{weight:>8.2f}{mean:>9.4f}{full:>8}{total - full - zero:>8}{zero:>8}"
        )
    scores = [line["score"] for line in graded]
    speech = any(_has_speech(line["row"]) for line in graded)
    lines.append(
        f"{'score':<16}{'':>8}{sum(scores) / total:>9.4f}   "
        f"from {min(scores):.4f} to {max(scores):.4f}, at most {reward.maximum(speech):g}"
    )
    for name in RATE_KEYS:
        count = sum(int(line[name]) for line in graded)
        lines.append(f"{name:<16}{'':>8}{count / total:>9.4f}   {count} of {total}")
    verdicts = Counter(line["pred"] or "(none)" for line in graded)
    lines.append(f"{'verdicts':<16} " + ", ".join(f"{k} {n}" for k, n in sorted(verdicts.items())))
    lines.extend(_notes(graded, reward, speech))
    return "\n".join(lines)


def _notes(graded: Sequence[dict[str, Any]], reward: Reward, speech: bool) -> Iterator[str]:
    """What a reader of the table has to know about the lines: lost terms and changed scores."""
    units: Counter[str] = Counter()
    lost = 0
    for line in graded:
        tokens = quantity(line["row"].get("response_tokens"))
        unit, ratio = length_ratio(reward.length_unit, line["response"], line["row"], tokens)
        units[unit] += ratio is not None
        lost += ratio is None
    yield f"{'lengths in':<16} " + ", ".join(f"{k} {n}" for k, n in sorted(units.items()) if n)
    if lost:
        yield f"{'no reference':<16} {lost} of {len(graded)} lines lose text_length, weight and all"
    if not speech:
        yield f"{'no speech':<16} audio_format and audio_length drop out, weight and all"
    saved = [
        (line["score"], line["score_before"])
        for line in graded
        if isinstance(line.get("score_before"), (int, float))
    ]
    if saved:
        changed = sum(abs(new - old) > 1e-6 for new, old in saved)
        mean = sum(old for _, old in saved) / len(saved)
        yield f"{'saved score':<16} mean {mean:.4f}; {changed} of {len(saved)} lines differ now"


def _has_speech(row: Mapping[str, Any]) -> bool:
    keys = ("speech_transcript", "speech_tokens", "speech_seconds")
    return any(row.get(key) is not None for key in keys)
