"""What predictions come to: rates with intervals, pass@k, word error rate.

    accuracy    share of rows whose verdict equals the label. No readable verdict, a response that
                was cut and a row that failed are wrong
    lenient     the same after the lenient reading (soundmind.task.lenient): reasoning without form
    parsed      share of responses with a readable verdict, cut and failed ones not counted as such
    among parsed   accuracy over the responses with a readable verdict
    format      share of responses that keep the whole format rule (labels.split_response)
    floor       share of the commoner label among the same rows: the accuracy of always saying it
    pass@k      chance that k of a row's n samples hold a right one: 1 - C(n - c, k) / C(n, k)
    WER         (substitutions + deletions + insertions) / reference words, over the whole corpus

Intervals are those of soundmind.evaluation.intervals. Pure functions over plain values; jiwer is
imported where words are aligned. Nothing is read or written.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from soundmind.evaluation.intervals import Metric, clustered_interval, rate, spread
from soundmind.task.labels import VERDICTS
from soundmind.task.reward_settings import COMPONENTS

NO_VERDICT = "none"  # column of the confusion matrix for responses without a readable verdict
NUM_BINS = 4  # of equal size, for durations and lengths
WELL_PARSED = 0.9  # below, accuracy says more about the form than about the reasoning

Prediction = Mapping[str, Any]  # one line of predictions.jsonl
Reading = Callable[[Prediction], str | None]


# --- several samples a row ------------------------------------------------------------------------


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that `k` samples, drawn from `n` of which `correct` are right, hold a right one."""
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {correct} right among {n} samples is not defined")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority_verdict(verdicts: Iterable[str | None]) -> str | None:
    """The commonest readable verdict; None without one, or on a tie (never a coin toss)."""
    ranked = Counter(verdict for verdict in verdicts if verdict).most_common(2)
    if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return None
    return ranked[0][0]


def by_row(predictions: Iterable[Prediction]) -> dict[int, list[Prediction]]:
    """Predictions grouped by row, samples in order."""
    rows: dict[int, list[Prediction]] = {}
    for prediction in predictions:
        rows.setdefault(prediction["index"], []).append(prediction)
    return rows


# --- speech ---------------------------------------------------------------------------------------


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> Metric:
    """Corpus word error rate with its counts; texts are compared as they are, so normalise first.

    "n" counts reference words. A reference without words only adds insertions. value is None
    where there is no reference word at all.
    """
    import jiwer

    counts = {"substitutions": 0, "deletions": 0, "insertions": 0}
    words = 0
    worded = [
        (reference, hypothesis)
        for reference, hypothesis in zip(references, hypotheses, strict=True)
        if reference.split()
    ]
    if worded:
        aligned = jiwer.process_words([pair[0] for pair in worded], [pair[1] for pair in worded])
        counts = {name: getattr(aligned, name) for name in counts}
        words = aligned.hits + aligned.substitutions + aligned.deletions
    counts["insertions"] += sum(
        len(hypothesis.split())
        for reference, hypothesis in zip(references, hypotheses, strict=True)
        if not reference.split()
    )
    value = sum(counts.values()) / words if words else None
    return {"n": words, "clips": len(references), **counts, "value": value}


def word_errors_by_minute(
    references: Sequence[str], hypotheses: Sequence[str], seconds: Sequence[float]
) -> list[Metric]:
    """Word error rate by minute of the answer: does the voice fade on long ones?

    A word's minute is taken from its place in the text, as if the answer were read at one pace.
    """
    import jiwer

    words: Counter[int] = Counter()
    errors: Counter[int] = Counter()
    for reference, hypothesis, length in zip(references, hypotheses, seconds, strict=True):
        total = len(reference.split())
        if not total:
            continue
        for chunk in jiwer.process_words(reference, hypothesis).alignments[0]:
            count = max(
                chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx
            )
            for step in range(count):
                place = min(chunk.ref_start_idx + step, total - 1)
                minute = int(place / total * length / 60)
                words[minute] += chunk.type != "insert"
                errors[minute] += chunk.type != "equal"
    return [
        {"minute": minute, "n": words[minute], "value": errors[minute] / words[minute]}
        for minute in sorted(words)
        if words[minute]
    ]


# --- an evaluation --------------------------------------------------------------------------------


def is_truncated(prediction: Prediction) -> bool:
    """Whether the response was cut at the token limit."""
    return bool(prediction["finish_reason"] == "length")


def is_failed(prediction: Prediction) -> bool:
    """Whether the row could not be asked. One that could not be spoken keeps its text."""
    spoken = "speech_transcript" in prediction and prediction["finish_reason"] != "error"
    return bool(prediction["error"]) and not spoken


def strictly(prediction: Prediction) -> str | None:
    """The verdict that counts: none of a response that was cut, or of a row that failed."""
    if is_truncated(prediction) or is_failed(prediction):
        return None
    verdict: str | None = prediction["verdict"]
    return verdict


def leniently(prediction: Prediction) -> str | None:
    """The same after the lenient reading."""
    if is_truncated(prediction) or is_failed(prediction):
        return None
    verdict: str | None = prediction.get("lenient_verdict", prediction["verdict"])
    return verdict


def is_correct(prediction: Prediction, reading: Reading = strictly) -> bool:
    """Whether the verdict that counts equals the ground truth."""
    return bool(reading(prediction) == prediction["ground_truth"])


def is_heard_correctly(prediction: Prediction, key: str = "transcript_verdict") -> bool:
    """Whether the transcript's verdict equals the ground truth; a cut or failed row is wrong."""
    whole = not (
        is_truncated(prediction) or prediction.get("speech_truncated") or prediction["error"]
    )
    return bool(whole and prediction.get(key) == prediction["ground_truth"])


def majority_floor(labels: Sequence[int]) -> Metric:
    """Accuracy of always giving the commoner label; ties go to not-entailed."""
    if not labels:
        return {"n": 0, "correct": 0, "value": None, "verdict": None}
    counts = Counter(labels)
    commonest = max(sorted(counts), key=lambda label: counts[label])
    return {
        "n": len(labels),
        "correct": counts[commonest],
        "value": counts[commonest] / len(labels),
        "verdict": VERDICTS[commonest],
    }


def confusion(predictions: Sequence[Prediction]) -> Metric:
    """{"n", "counts": {label: {verdict or "none": count}}}, every cell present."""
    counts = {truth: dict.fromkeys((*VERDICTS, NO_VERDICT), 0) for truth in VERDICTS}
    for prediction in predictions:
        counts[prediction["ground_truth"]][strictly(prediction) or NO_VERDICT] += 1
    return {"n": len(predictions), "counts": counts}


def quantile_bins(values: Sequence[float], bins: int = NUM_BINS) -> list[tuple[float, float]]:
    """Ranges [low, high] that hold about equally many values; fewer where values repeat."""
    edges = np.unique(
        np.quantile(np.asarray(values, dtype=np.float64), np.linspace(0, 1, bins + 1))
    )
    if edges.size == 1:
        return [(float(edges[0]), float(edges[0]))]
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


def accuracy_by(
    predictions: Sequence[Prediction], measure: Callable[[Prediction], float | None]
) -> list[Metric]:
    """Accuracy in ranges of a measure: rates with "low" and "high", both inclusive at the ends."""
    measured = [(value, p) for p in predictions if (value := measure(p)) is not None]
    if not measured:
        return []
    ranges = quantile_bins([value for value, _ in measured])
    groups: list[list[bool]] = [[] for _ in ranges]
    for value, prediction in measured:
        last = len(ranges) - 1
        position = next((i for i, (_, high) in enumerate(ranges) if value < high), last)
        groups[position].append(is_correct(prediction))
    return [
        {"low": low, "high": high, **rate(group)}
        for (low, high), group in zip(ranges, groups, strict=True)
    ]


def accuracy(predictions: Sequence[Prediction], reading: Reading = strictly) -> Metric:
    """Accuracy over rows; `interval_method` says which interval it has."""
    rows = by_row(predictions)
    if all(len(samples) == 1 for samples in rows.values()):
        return {**rate(is_correct(p, reading) for p in predictions), "interval_method": "wilson"}
    shares = [
        float(np.mean([is_correct(p, reading) for p in samples])) for samples in rows.values()
    ]
    answers = max(map(len, rows.values()))
    return {
        "n": len(rows),
        "responses": len(predictions),
        "correct": sum(is_correct(p, reading) for p in predictions),
        "value": float(np.mean(shares)),
        "interval": list(clustered_interval(shares, answers)),
        "interval_method": "wilson over the answers that are independent by the spread of rows",
    }


def sampled(predictions: Sequence[Prediction]) -> Metric:
    """What several samples a row add: pass@k and the majority vote, over rows."""
    rows = by_row(predictions)
    num_samples = max(len(samples) for samples in rows.values())
    right = [sum(map(is_correct, samples)) for samples in rows.values()]
    powers = [2**i for i in range(num_samples.bit_length()) if 2**i < num_samples]
    return {
        "n": len(rows),
        "samples_per_row": num_samples,
        "pass_at": {
            str(k): {
                "n": len(rows),
                "value": float(np.mean([pass_at_k(num_samples, c, k) for c in right])),
            }
            for k in (*powers, num_samples)
        },
        "majority_vote": rate(
            majority_verdict(map(strictly, samples)) == samples[0]["ground_truth"]
            for samples in rows.values()
        ),
    }


def summarise(predictions: Sequence[Prediction]) -> Metric:
    """Every text metric of an evaluation; see the module docstring for the definitions."""
    rows = by_row(predictions)
    firsts = [samples[0] for samples in rows.values()]
    failed = [p for p in firsts if p["error"]]
    answered = [p for p in predictions if not is_failed(p)]
    parsed = [p for p in predictions if strictly(p) is not None]
    judged = [p for p in predictions if p["teacher_verdict"] is not None]
    summary: Metric = {
        "rows": len(rows),
        "accuracy": accuracy(predictions),
        "accuracy_lenient": accuracy(predictions, leniently),
        "accuracy_among_parsed": rate(map(is_correct, parsed)),
        "majority_floor": majority_floor([p["label"] for p in firsts]),
        "parsed": rate(strictly(p) is not None for p in predictions),
        "parsed_lenient": rate(leniently(p) is not None for p in predictions),
        "format": rate(p["components"]["text_format"] == 1.0 for p in predictions),
        "truncated": rate(map(is_truncated, predictions)),
        "failed_rows": {
            "n": len(rows),
            "count": len(failed),
            "rows": [{"index": p["index"], "id": p["id"], "error": p["error"]} for p in failed],
        },
        "confusion": confusion(predictions),
        "by_label": {
            truth: rate(is_correct(p) for p in predictions if p["ground_truth"] == truth)
            for truth in VERDICTS
        },
        "by_clip_seconds": accuracy_by(answered, lambda p: p["question_seconds"]),
        "by_response_tokens": accuracy_by(answered, lambda p: p["response_tokens"]),
        "teacher_agrees_with_label": rate(
            is_correct(p) for p in judged if p["teacher_verdict"] == p["ground_truth"]
        ),
        "teacher_disagrees_with_label": rate(
            is_correct(p) for p in judged if p["teacher_verdict"] != p["ground_truth"]
        ),
        "score": spread(p["score"] for p in predictions),
        "components": {
            name: spread(p["components"][name] for p in predictions) for name in COMPONENTS
        },
        "prompt_tokens": spread(p["prompt_tokens"] for p in answered),
        "response_tokens": spread(p["response_tokens"] for p in answered),
    }
    if len(predictions) > len(rows):
        summary["sampled"] = sampled(predictions)
    return summary


def summarise_speech(predictions: Sequence[Prediction], normalise: Callable[[str], str]) -> Metric:
    """Speech metrics: WER against the thinker's own text, and accuracy from text and transcript."""
    spoken = [p for p in predictions if p.get("speech_transcript") is not None]
    written = [normalise(p["response"]) for p in spoken]
    heard = [normalise(p["speech_transcript"]) for p in spoken]
    straight = [row for row, p in enumerate(spoken) if not p.get("speech_windows_looped")]
    whole = [
        row for row, p in enumerate(spoken) if not p.get("speech_truncated") and not is_truncated(p)
    ]
    windows = sum(p.get("speech_windows", 0) for p in spoken)
    return {
        "wer": word_errors(written, heard),
        # Where the recogniser ran to its limit it heard itself, not the answer.
        "wer_without_loops": word_errors(
            [written[row] for row in straight], [heard[row] for row in straight]
        ),
        # What our own limits cut off counts as deletions in the first rate.
        "wer_without_cut": word_errors(
            [written[row] for row in whole], [heard[row] for row in whole]
        ),
        "wer_by_minute": word_errors_by_minute(
            written, heard, [p["speech_seconds"] for p in spoken]
        ),
        "windows": {
            "n": windows,
            "looped": sum(p.get("speech_windows_looped", 0) for p in spoken),
        },
        "accuracy_from_text": rate(map(is_correct, predictions)),
        "accuracy_from_transcript": rate(map(is_heard_correctly, predictions)),
        "accuracy_from_transcript_lenient": rate(
            is_heard_correctly(p, "transcript_verdict_lenient") for p in predictions
        ),
        "rows_with_speech": rate(p.get("speech_transcript") is not None for p in predictions),
        "speech_truncated": rate(bool(p.get("speech_truncated")) for p in predictions),
        "speech_short_of_positions": rate(
            bool(p.get("speech_short_of_positions")) for p in predictions
        ),
        "speech_seconds": spread(p.get("speech_seconds") for p in spoken),
    }
