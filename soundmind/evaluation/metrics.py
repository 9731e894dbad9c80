"""What predictions come to: rates with intervals, paired comparisons, word error rate.

    accuracy    share of rows whose verdict equals the label; no readable verdict is wrong
    parsed      share of responses with a readable verdict
    format      share of responses that keep the whole format rule (labels.split_response)
    floor       share of the commoner label among the same rows: the accuracy of always saying it
    interval    Wilson score interval, 95 %; over several samples a row, bootstrap over rows
    McNemar     exact two-sided test on the rows that only one of two models gets right
    bootstrap   rows resampled with replacement, both models on the same ones; percentile interval
    Holm        step-down correction of several p-values
    pass@k      chance that k of a row's n samples hold a right one: 1 - C(n - c, k) / C(n, k)
    WER         (substitutions + deletions + insertions) / reference words, over the whole corpus

    >>> wilson_interval(534, 656)          # the paper's 81.40 %
    (0.7824..., 0.8418...)

Rates are dictionaries that carry their own count, so that no number travels without its n. Pure
functions over plain values; jiwer is imported where words are aligned. Nothing is read or written.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from soundmind.task.labels import VERDICTS
from soundmind.task.reward import COMPONENTS

CONFIDENCE = 0.95


BOOTSTRAP_SAMPLES = 10_000


NO_VERDICT = "none"  # column of the confusion matrix for responses without a readable verdict


NUM_BINS = 4  # of equal size, for durations and lengths


Prediction = Mapping[str, Any]  # one line of predictions.jsonl


Metric = dict[str, Any]


# --- one proportion -------------------------------------------------------------------------------


def wilson_interval(correct: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson score interval of `correct` out of `n`, as shares; ValueError where there is none."""
    if n <= 0 or not 0 <= correct <= n:
        raise ValueError(f"no interval for {correct} of {n}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # exact at the ends, where rounding would leave 1e-17
    return (0.0 if correct == 0 else centre - half, 1.0 if correct == n else centre + half)


def rate(flags: Iterable[bool | int]) -> Metric:
    """{"n", "correct", "value", "interval"} of yes-or-no outcomes; value None where n is 0."""
    outcomes = [bool(flag) for flag in flags]
    n, correct = len(outcomes), sum(outcomes)
    if n == 0:
        return {"n": 0, "correct": 0, "value": None, "interval": None}
    return {
        "n": n,
        "correct": correct,
        "value": correct / n,
        "interval": list(wilson_interval(correct, n)),
    }


def spread(values: Iterable[float | int | None]) -> Metric:
    """{"n", "mean", "median", "p95", "max", "sum"} of the values that are there."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if known.size == 0:
        return {"n": 0, "mean": None, "median": None, "p95": None, "max": None, "sum": 0.0}
    return {
        "n": int(known.size),
        "mean": float(known.mean()),
        "median": float(np.median(known)),
        "p95": float(np.percentile(known, 95)),
        "max": float(known.max()),
        "sum": float(known.sum()),
    }


# --- two or more models on the same rows ----------------------------------------------------------


def mcnemar_exact(won: int, lost: int) -> float:
    """Two-sided exact McNemar p-value: `won` rows turned right, `lost` rows turned wrong.

    Under the null each of them is a fair coin, so this is a binomial test, in whole numbers.
    """
    if won < 0 or lost < 0:
        raise ValueError(f"counts must not be negative: won {won}, lost {lost}")
    discordant = won + lost
    tail = sum(math.comb(discordant, i) for i in range(min(won, lost) + 1))
    return float(min(1.0, 2 * tail / 2**discordant))


def bootstrap_means(
    values: Sequence[float] | npt.NDArray[np.float64],
    samples: int = BOOTSTRAP_SAMPLES,
    seed: int = 0,
) -> npt.NDArray[np.float64]:
    """Means of `samples` resamples of `values` with replacement, shape (samples,) float64."""
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise ValueError("nothing to resample")
    generator = np.random.default_rng(seed)
    distinct, counts = np.unique(data, return_counts=True)
    if distinct.size <= 64:  # a resample is fully described by how often each value is drawn
        draws = generator.multinomial(data.size, counts / data.size, size=samples)
        return np.asarray(draws @ distinct / data.size)
    means = np.empty(samples)
    for start in range(0, samples, 1000):  # bounds memory: 1000 x n indices at a time
        stop = min(start + 1000, samples)
        chosen = generator.integers(0, data.size, size=(stop - start, data.size))
        means[start:stop] = data[chosen].mean(axis=1)
    return means


def percentile_interval(
    means: npt.NDArray[np.float64], confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """The middle `confidence` of bootstrap means."""
    tail = 50 * (1 - confidence)
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def paired_bootstrap(
    before: Sequence[float],
    after: Sequence[float],
    samples: int = BOOTSTRAP_SAMPLES,
    seed: int = 0,
) -> Metric:
    """Difference of means after - before on the same rows: value, interval and two-sided p.

    p is twice the share of resampled differences on the other side of zero, at least
    1 / samples: a resampling test cannot show less.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} rows against {len(after)}: not paired")
    differences = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    means = bootstrap_means(differences, samples, seed)
    beyond = min(np.mean(means <= 0), np.mean(means >= 0))
    return {
        "n": len(before),
        "value": float(differences.mean()),
        "interval": list(percentile_interval(means)),
        "p": float(min(1.0, max(2 * beyond, 1 / samples))),
        "samples": samples,
        "seed": seed,
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment, in the order given."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, largest)
    return adjusted


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


def is_correct(prediction: Prediction) -> bool:
    """Whether the verdict equals the ground truth; a row in error is wrong."""
    return prediction["verdict"] is not None and (
        prediction["verdict"] == prediction["ground_truth"]
    )


def is_truncated(prediction: Prediction) -> bool:
    """Whether the response was cut at the token limit."""
    return bool(prediction["finish_reason"] == "length")


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
        counts[prediction["ground_truth"]][prediction["verdict"] or NO_VERDICT] += 1
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


def accuracy(predictions: Sequence[Prediction]) -> Metric:
    """Accuracy over rows. With one sample a row a Wilson interval, else bootstrap over rows."""
    rows = by_row(predictions)
    if all(len(samples) == 1 for samples in rows.values()):
        return {**rate(map(is_correct, predictions)), "interval_method": "wilson"}
    shares = [float(np.mean([is_correct(p) for p in samples])) for samples in rows.values()]
    return {
        "n": len(rows),
        "responses": len(predictions),
        "correct": sum(map(is_correct, predictions)),
        "value": float(np.mean(shares)),
        "interval": list(percentile_interval(bootstrap_means(shares))),
        "interval_method": f"bootstrap over rows, {BOOTSTRAP_SAMPLES} resamples, seed 0",
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
            majority_verdict(p["verdict"] for p in samples) == samples[0]["ground_truth"]
            for samples in rows.values()
        ),
    }


def summarise(predictions: Sequence[Prediction]) -> Metric:
    """Every text metric of an evaluation; see the module docstring for the definitions."""
    rows = by_row(predictions)
    firsts = [samples[0] for samples in rows.values()]
    failed = [p for p in firsts if p["error"]]
    answered = [p for p in predictions if not p["error"]]
    judged = [p for p in predictions if p["teacher_verdict"] is not None]
    summary: Metric = {
        "rows": len(rows),
        "accuracy": accuracy(predictions),
        "majority_floor": majority_floor([p["label"] for p in firsts]),
        "parsed": rate(p["verdict"] is not None for p in predictions),
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
    windows = sum(p.get("speech_windows", 0) for p in spoken)
    return {
        "wer": word_errors(written, heard),
        # Where the recogniser ran to its limit it heard itself, not the answer.
        "wer_without_loops": word_errors(
            [written[row] for row in straight], [heard[row] for row in straight]
        ),
        "wer_by_minute": word_errors_by_minute(
            written, heard, [p["speech_seconds"] for p in spoken]
        ),
        "windows": {
            "n": windows,
            "looped": sum(p.get("speech_windows_looped", 0) for p in spoken),
        },
        "accuracy_from_text": rate(map(is_correct, predictions)),
        "accuracy_from_transcript": rate(
            p.get("transcript_verdict") == p["ground_truth"] for p in predictions
        ),
        "rows_with_speech": rate(p.get("speech_transcript") is not None for p in predictions),
        "speech_truncated": rate(bool(p.get("speech_truncated")) for p in predictions),
        "speech_short_of_positions": rate(
            bool(p.get("speech_short_of_positions")) for p in predictions
        ),
        "speech_seconds": spread(p.get("speech_seconds") for p in spoken),
    }
