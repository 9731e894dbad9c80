"""Finished evaluations side by side: counts, what is refused, what is listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from saved_evaluation import save, saved_line

from soundmind import evaluate as soundmind_evaluate
from soundmind.evaluation.compare import CompareError, compare


def test_compare_counts_rows_won_and_lost_and_corrects_for_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [saved_line(i, i % 2, i % 2 if i < 60 else 1 - i % 2) for i in range(100)]
    better = [saved_line(i, i % 2, i % 2 if 5 <= i < 90 else 1 - i % 2) for i in range(100)]
    same = [dict(line) for line in base]
    folders = [
        str(save(tmp_path / name, lines))
        for name, lines in {"base": base, "better": better, "same": same}.items()
    ]
    output = tmp_path / "comparison.json"
    assert soundmind_evaluate.main(["compare", *folders, "--output", str(output)]) == 0
    assert "won" in capsys.readouterr().out
    first, second = json.loads(output.read_text())["comparisons"]
    assert (first["won"]["count"], first["lost"]["count"]) == (30, 5)
    assert first["bootstrap"]["value"] == pytest.approx(0.25)
    assert first["mcnemar"]["p_holm"] == pytest.approx(2 * first["mcnemar"]["p"])
    assert (second["won"]["count"], second["lost"]["count"], second["mcnemar"]["p"]) == (0, 0, 1)


def test_compare_pairs_the_rows_that_both_have(tmp_path: Path) -> None:
    save(tmp_path / "a", [saved_line(i, 1, 1) for i in range(10)])
    save(tmp_path / "b", [saved_line(i, 1, 0) for i in range(4, 12)])
    comparison = compare([tmp_path / "a", tmp_path / "b"])["comparisons"][0]
    assert (comparison["rows_shared"], comparison["rows_only_in_one"]) == (6, 6)
    assert comparison["baseline_accuracy"]["n"] == 6


def test_compare_refuses_what_cannot_be_compared(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole", [saved_line(i, 1, 1) for i in range(4)])
    part = save(tmp_path / "part", [saved_line(0, 1, 1)], data__rows=4)
    other = save(tmp_path / "other", [saved_line(i, 1, 1) for i in range(8, 12)])
    relabelled = save(tmp_path / "relabelled", [saved_line(i, 0, 1) for i in range(4)])
    for folders, message in (
        ([whole], "at least two"),
        ([whole, part], r"not finished \(1 of 4"),
        ([whole, other], "no row in common"),
        ([whole, relabelled], "different data"),
        ([whole, tmp_path / "nowhere"], "no config.yaml"),
    ):
        with pytest.raises(CompareError, match=message):
            compare(folders)


@pytest.mark.parametrize(
    "changes",
    [
        {"generation__max_tokens": 16},
        {"generation__temperature": 1.3},
        {"data__digest": "2" * 16},
        {"data__mode": "text"},
        {"output_modality": "speech"},
    ],
)
def test_compare_refuses_other_settings_unless_asked_and_lists_them_first(
    tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [
        str(save(tmp_path / "a", [saved_line(i, 1, 1) for i in range(4)])),
        str(save(tmp_path / "b", [saved_line(i, 1, 0) for i in range(4)], **changes)),
    ]
    key = next(iter(changes)).replace("__", ".")
    assert soundmind_evaluate.main(["compare", *folders]) == 2
    assert f"{key}: " in capsys.readouterr().err
    assert soundmind_evaluate.main(["compare", *folders, "--across-settings"]) == 0
    out = capsys.readouterr().out
    assert f"{key}: " in out and out.index(f"{key}: ") < out.index("McNemar")


def test_compare_takes_models_speeds_and_places_for_no_settings(tmp_path: Path) -> None:
    lines = [saved_line(i, 1, 1) for i in range(4)]
    save(tmp_path / "a", lines)
    others = {"model__digest": "9" * 16, "data__path": "b", "generation__batch_rows": 1}
    save(tmp_path / "b", lines, **others)
    assert compare([tmp_path / "a", tmp_path / "b"])["comparisons"][0]["settings_differ"] == []


def test_compare_refuses_one_id_in_two_rows(tmp_path: Path) -> None:
    lines = [saved_line(i, 1, 1) for i in range(4)]
    lines[3]["id"] = lines[0]["id"]
    save(tmp_path / "a", lines)
    save(tmp_path / "b", [saved_line(i, 1, 1) for i in range(4)])
    for folders in (("a", "b"), ("b", "a")):
        with pytest.raises(CompareError, match="0001 stands in two rows"):
            compare([tmp_path / name for name in folders])
