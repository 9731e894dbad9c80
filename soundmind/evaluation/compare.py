"""Finished evaluations side by side: is one better than another, on the very same rows?

    python -m soundmind.evaluate compare outputs/eval/base outputs/eval/a outputs/eval/b

The first folder is the baseline; every other is compared with it on the rows both answered, paired
by data source, split and id (so audio may be compared with text input). With one answer a row the
test is McNemar's; with several, its rows are decided by majority vote and the bootstrap works on
shares. p-values of several models are corrected after Holm.

Reads   config.yaml and predictions.jsonl of each folder
Writes  nothing; the command prints a table, and JSON where `--output` says
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from soundmind.evaluation.grade import graded
from soundmind.evaluation.metrics import (
    accuracy,
    holm,
    is_correct,
    majority_floor,
    majority_verdict,
    mcnemar_exact,
    paired_bootstrap,
)
from soundmind.evaluation.store import read_config, read_predictions
from soundmind.system.errors import UserError

Key = tuple[str, str, str]


ROWS_LISTED = 50  # ids of rows won and lost kept in the JSON


class CompareError(UserError, ValueError):
    """Evaluations that cannot be compared, with the reason."""


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation, by row."""

    path: Path
    config: dict[str, Any]
    rows: dict[Key, list[dict[str, Any]]]  # samples of each row

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        config = read_config(path)
        if config is None:
            raise CompareError(f"{path} holds no config.yaml; is it the folder of an evaluation?")
        rows: dict[Key, list[dict[str, Any]]] = {}
        lines = read_predictions(path)
        expected = config["data"]["rows"] * config["generation"]["samples"]
        if len(lines) < expected:
            raise CompareError(
                f"{path} is not finished ({len(lines)} of {expected} predictions); run the same "
                "evaluation again to continue it"
            )
        for line in lines:
            line |= graded(line)
            rows.setdefault((line["data_source"], line["split"], line["id"]), []).append(line)
        return cls(path, config, rows)

    def shares(self, keys: Sequence[Key]) -> list[float]:
        """Share of right answers of each row."""
        return [float(np.mean([is_correct(line) for line in self.rows[key]])) for key in keys]

    def decisions(self, keys: Sequence[Key]) -> list[bool]:
        """Whether each row's one answer, or its majority vote, is right."""
        return [
            majority_verdict(line["verdict"] for line in self.rows[key])
            == self.rows[key][0]["ground_truth"]
            for key in keys
        ]

    def describe(self, keys: Sequence[Key]) -> dict[str, Any]:
        lines = [line for key in keys for line in self.rows[key]]
        return {
            "folder": str(self.path),
            "model": self.config["model"]["given"],
            "stand_in": self.config["model"]["stand_in"],
            "configuration": f"{self.config['data']['mode']} to {self.config['output_modality']}",
            "accuracy": accuracy(lines),
        }


def compare(folders: Sequence[Path], seed: int = 0) -> dict[str, Any]:
    """Compare every evaluation with the first; see the module docstring."""
    if len(folders) < 2:
        raise CompareError("name at least two folders: the baseline, then what to compare with it")
    baseline, *others = [Evaluation.read(folder) for folder in folders]
    comparisons = [_compare_two(baseline, other, seed) for other in others]
    for test in ("mcnemar", "bootstrap"):
        adjusted = holm([comparison[test]["p"] for comparison in comparisons])
        for comparison, p in zip(comparisons, adjusted, strict=True):
            comparison[test]["p_holm"] = p
    return {
        "baseline": baseline.describe(list(baseline.rows)),
        "majority_floor": majority_floor([lines[0]["label"] for lines in baseline.rows.values()]),
        "comparisons": comparisons,
    }


def _compare_two(baseline: Evaluation, other: Evaluation, seed: int) -> dict[str, Any]:
    shared = [key for key in baseline.rows if key in other.rows]
    if not shared:
        raise CompareError(f"{baseline.path} and {other.path} have no row in common")
    for key in shared:
        truths = {evaluation.rows[key][0]["ground_truth"] for evaluation in (baseline, other)}
        if len(truths) > 1:
            raise CompareError(
                f"row {'/'.join(key[1:])} is {' in one and '.join(sorted(truths))} in the other "
                "evaluation; they were made from different data"
            )
    before, after = baseline.decisions(shared), other.decisions(shared)
    won = [key[2] for key, b, a in zip(shared, before, after, strict=True) if a and not b]
    lost = [key[2] for key, b, a in zip(shared, before, after, strict=True) if b and not a]
    return {
        **other.describe(shared),
        "baseline_accuracy": accuracy([line for key in shared for line in baseline.rows[key]]),
        "rows_shared": len(shared),
        "rows_only_in_one": len(baseline.rows.keys() ^ other.rows.keys()),
        "won": {"n": len(shared), "count": len(won), "ids": won[:ROWS_LISTED]},
        "lost": {"n": len(shared), "count": len(lost), "ids": lost[:ROWS_LISTED]},
        "mcnemar": {"n": len(shared), "p": mcnemar_exact(len(won), len(lost))},
        "bootstrap": paired_bootstrap(baseline.shares(shared), other.shares(shared), seed=seed),
    }
