"""Finished evaluations side by side: is one better than another, on the very same rows?

    python -m soundmind.evaluate compare outputs/eval/base outputs/eval/a outputs/eval/b

The first folder is the baseline; every other is compared with it on the rows both answered, paired
by data source, split and id. What is compared is models: settings that differ are listed and
refused, unless `--across-settings` asks for them (audio against text input, say). With one answer a
row the test is McNemar's; with several, its rows are decided by majority vote and the bootstrap works on
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
from soundmind.evaluation.intervals import holm, mcnemar_exact, paired_bootstrap
from soundmind.evaluation.metrics import (
    accuracy,
    is_correct,
    leniently,
    majority_floor,
    majority_verdict,
    strictly,
)
from soundmind.evaluation.store import leaves, read_config, read_predictions
from soundmind.system.errors import UserError

Key = tuple[str, str, str]
# Beside the model itself: names of places, and what decides how fast rows are answered.
_NOT_COMPARED = (
    *("model.", "data.path", "data.rows", "speech.recogniser", "speech.speech_rows"),
    *("generation.batch_rows", "generation.max_num_seqs", "generation.tensor_parallel"),
    *("generation.max_model_len", "generation.trust_remote_code"),
)
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
            key = (line["data_source"], line["split"], line["id"])
            others = rows.setdefault(key, [])
            if any(o["index"] != line["index"] or o["sample"] == line["sample"] for o in others):
                raise CompareError(
                    f"{path}: {'/'.join(key)} stands in two rows, so rows cannot be paired by id; "
                    "evaluate a file whose ids are of one row each"
                )
            others.append(line)
        return cls(path, config, rows)

    def settings(self) -> dict[str, Any]:
        """What two models have to share; a seed only where answers are sampled."""
        found = leaves(self.config)
        if found.get("generation.temperature") == 0 and "speech.talker_temperature" not in found:
            found.pop("generation.seed", None)
        return {key: v for key, v in found.items() if not key.startswith(_NOT_COMPARED)}

    def shares(self, keys: Sequence[Key]) -> list[float]:
        """Share of right answers of each row."""
        return [float(np.mean([is_correct(line) for line in self.rows[key]])) for key in keys]

    def decisions(self, keys: Sequence[Key]) -> list[bool]:
        """Whether each row's one answer, or its majority vote, is right."""
        return [
            majority_verdict(map(strictly, self.rows[key])) == self.rows[key][0]["ground_truth"]
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
            "accuracy_lenient": accuracy(lines, leniently),
        }


def compare(
    folders: Sequence[Path], seed: int = 0, *, across_settings: bool = False
) -> dict[str, Any]:
    """Compare every evaluation with the first; see the module docstring."""
    if len(folders) < 2:
        raise CompareError("name at least two folders: the baseline, then what to compare with it")
    baseline, *others = [Evaluation.read(folder) for folder in folders]
    differing = {str(other.path): setting_differences(baseline, other) for other in others}
    if any(differing.values()) and not across_settings:
        listed = "\n".join(
            f"  {path}: {line}" for path, lines in differing.items() for line in lines
        )
        raise CompareError(
            f"settings differ from those of {baseline.path}:\n{listed}\n  evaluate both alike, or "
            "compare across settings with --across-settings"
        )
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


def setting_differences(baseline: Evaluation, other: Evaluation) -> list[str]:
    """`key: value in the baseline, value in the other`, of settings that both name."""
    ours, theirs = baseline.settings(), other.settings()
    keys = [key for key in ours if key in theirs and ours[key] != theirs[key]]
    return [f"{key}: {ours[key]} in the baseline, {theirs[key]} here" for key in keys]


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
        "settings_differ": setting_differences(baseline, other),
        "baseline_accuracy": accuracy([line for key in shared for line in baseline.rows[key]]),
        "rows_shared": len(shared),
        "rows_only_in_one": len(baseline.rows.keys() ^ other.rows.keys()),
        "won": {"n": len(shared), "count": len(won), "ids": won[:ROWS_LISTED]},
        "lost": {"n": len(shared), "count": len(lost), "ids": lost[:ROWS_LISTED]},
        "mcnemar": {"n": len(shared), "p": mcnemar_exact(len(won), len(lost))},
        "bootstrap": paired_bootstrap(baseline.shares(shared), other.shares(shared), seed=seed),
    }
