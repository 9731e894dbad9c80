"""What the practice set must not be solvable by: clip length, or anything but the sound."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def length_control(
    fit: tuple[Sequence[float], Sequence[int]], score: tuple[Sequence[float], Sequence[int]]
) -> dict[str, float]:
    """Accuracy of the best rule "longer (or shorter) than t seconds is entailed".

    `fit` and `score` are (clip seconds, labels). The rule is chosen on `fit`; `scored` is its
    accuracy on `score`, where chance is the larger label share.
    """
    seconds, labels = (np.asarray(values, dtype=float) for values in fit)
    order = np.argsort(seconds, kind="stable")
    hits = np.concatenate(([0.0], np.cumsum(labels[order] == 0)))  # not-entailed at or below
    hits += labels.sum() - np.concatenate(([0.0], np.cumsum(labels[order] == 1)))
    # A threshold between two equal lengths cannot be applied.
    ends = np.flatnonzero(np.diff(seconds[order], append=np.inf) > 0) + 1
    hits, ends = hits[np.concatenate(([0], ends))], np.concatenate(([0], ends))
    shares = hits / len(seconds)
    best = int(np.argmax(np.abs(shares - 0.5)))
    threshold = -np.inf if ends[best] == 0 else float(seconds[order][ends[best] - 1])
    longer_is_entailed = shares[best] >= 0.5
    other_seconds, other_labels = (np.asarray(values, dtype=float) for values in score)
    right = ((other_seconds > threshold) == (other_labels == 1)).mean()
    return {
        "threshold_seconds": round(threshold, 4) if np.isfinite(threshold) else 0.0,
        "fitted": round(float(max(shares[best], 1 - shares[best])), 4),
        "scored": round(float(right if longer_is_entailed else 1 - right), 4),
    }


def swapped_partners(labels: Sequence[int]) -> list[int]:
    """For each row the row whose clip it gets in the swapped control; a permutation.

    Nobody keeps a clip. Half of the rows of each label exchange clips with rows of the other
    label, half with rows of their own, so a policy that follows the sound scores 50 % whatever its
    accuracy, and one that knows the answer without listening keeps its score.
    """
    by_label = [[i for i, label in enumerate(labels) if label == wanted] for wanted in (0, 1)]
    partners = list(range(len(labels)))
    crossing = min(len(rows) for rows in by_label) // 2
    for negative, positive in zip(by_label[0][:crossing], by_label[1][:crossing], strict=True):
        partners[negative], partners[positive] = positive, negative
    for rows in by_label:
        staying = rows[crossing:]
        if len(staying) == 1:
            raise ValueError(f"label {labels[staying[0]]} leaves one row without a partner")
        for position, row in enumerate(staying):
            partners[row] = staying[position - 1]
    return partners
