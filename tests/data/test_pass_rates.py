"""A curriculum: rows in the order of a saved evaluation's pass rates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from soundmind.data.pass_rates import PassRateError, curriculum, pass_rates

RIGHT = {"0001": 1, "0002": 4, "0003": 2}  # of four samples each


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    lines = [
        {"split": "train", "id": row_id, "mode": "audio", "ground_truth": "entailed"}
        | {"verdict": "entailed" if sample < right else None}
        for row_id, right in RIGHT.items()
        for sample in range(4)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "predictions.jsonl").write_text(text)
    return tmp_path


def infos(*ids: str, mode: str = "audio") -> list[dict[str, str]]:
    return [{"split": "train", "id": row_id, "mode": mode} for row_id in ids]


def test_rows_come_by_pass_rate_and_ties_keep_their_order(evaluation: Path) -> None:
    assert pass_rates(evaluation)["train", "0003", "audio"] == 0.5
    rows = infos("0001", "0002", "0003")
    assert curriculum(evaluation, rows, "easy_first") == [1, 2, 0]
    assert curriculum(evaluation / "predictions.jsonl", rows, "hard_first") == [0, 2, 1]
    assert curriculum(evaluation, infos("0002", "0002"), "easy_first") == [0, 1]


@pytest.mark.parametrize("rows", [infos("0001", "0009"), infos("0001", mode="text")])
def test_an_evaluation_of_other_rows_is_refused(
    evaluation: Path, rows: list[dict[str, str]]
) -> None:
    with pytest.raises(PassRateError, match="was made of other rows: 1 of"):
        curriculum(evaluation, rows, "easy_first")


@pytest.mark.parametrize("content", ["", "{}\n", "no json\n", None])
def test_a_file_that_is_no_evaluation_is_refused_with_the_command(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "predictions.jsonl").write_text(content)
    with pytest.raises(PassRateError):
        curriculum(tmp_path, infos("0001"), "easy_first")


def test_an_unknown_order_lists_the_two(evaluation: Path) -> None:
    with pytest.raises(PassRateError, match="one of easy_first, hard_first"):
        curriculum(evaluation, infos("0001"), "random")
