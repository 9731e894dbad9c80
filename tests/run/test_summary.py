"""The summary of a run: paired tests on the same rows, counts behind every share, curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from soundmind.model.folder import start_note
from soundmind.report import main
from soundmind.run.curves import draw_curves
from soundmind.run.records import Validation, read_metrics
from soundmind.run.summary import mcnemar, summarise_run
from soundmind.task.reward_settings import COMPONENTS


def answers(correct: list[bool], mode: str = "") -> list[dict[str, Any]]:
    return [
        {
            "id": str(index),
            "input": f"prompt{mode}",
            "acc": float(right),
            "gts": "entailed" if index % 4 else "not-entailed",
            "score": 4.0 * right,
            "text_format": 1.0,
        }
        for index, right in enumerate(correct)
    ]


def write_validation(run: Path, step: int, rows: list[dict[str, Any]]) -> None:
    folder = run / "validation"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{step}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of three steps, from 10 to 18 of 20 correct."""
    folder = tmp_path / "tiny" / "2026-01-01"
    write_validation(folder, 0, answers([True] * 10 + [False] * 10))
    write_validation(folder, 3, answers([False] * 2 + [True] * 18))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in (3, 1, 2):
            line: dict[str, Any] = {"step": step, "timing_s/step": float(step)}
            line |= {f"reward/{name}/mean": step / 4 for name in (*COMPONENTS, "score", "accuracy")}
            line["training/rollout_actor_probs_pearson_corr"] = 1 - step * 1e-6
            line |= {
                "response_length/mean": 20.0,
                "response_length/min": 9,
                "response_length/max": 30,
            }
            line["reward/error/count"] = 1.0
            file.write(json.dumps(line) + "\n")
    return folder


def config() -> Any:
    return OmegaConf.create(
        {
            "run": {"seed": 3, "export": False},
            "actor_rollout_ref": {"model": {"path": "/nowhere"}},
            "trainer": {"save_freq": -1},
        }
    )


def test_the_summary_counts_pairs_and_keeps_first_and_last(run: Path) -> None:
    summary = summarise_run(run, config(), 12.34)
    assert (summary["steps"], summary["seed"], summary["val_n"]) == (3, 3, 20)
    assert (summary["val_acc_first"], summary["val_acc_last"]) == (0.5, 0.9)
    assert (summary["val_score_first"], summary["val_score_last"]) == (2.0, 3.6)
    assert summary["val_mcnemar"]["n"] == 20
    assert (summary["val_mcnemar"]["won"], summary["val_mcnemar"]["lost"]) == (10, 2)
    assert summary["val_majority_share"] == 0.75
    assert summary["components_first"]["answer"] == 0.25
    assert summary["components_last"]["answer"] == 0.75
    assert summary["rollout_actor_corr_min"] == pytest.approx(1 - 3e-6)
    assert summary["seconds_per_step_median"] == 2.0
    assert summary["reward_errors"] == 3


def test_metrics_are_read_in_step_order(run: Path) -> None:
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3]


def test_mcnemar_is_exact_and_pairs_by_row_and_prompt(tmp_path: Path) -> None:
    write_validation(tmp_path, 0, answers([False] * 8) + answers([True] * 8, "b"))
    write_validation(tmp_path, 1, answers([True] * 8) + answers([True] * 8, "b"))
    before, after = (Validation.read(tmp_path / f"validation/{step}.jsonl") for step in (0, 1))
    assert mcnemar(before, after) == {"n": 16, "won": 8, "lost": 0, "p": pytest.approx(2 / 2**8)}
    assert mcnemar(before, before)["p"] == 1.0


def test_the_interval_covers_the_share(tmp_path: Path) -> None:
    write_validation(tmp_path, 0, answers([True] * 534 + [False] * 122))
    low, high = Validation.read(tmp_path / "validation/0.jsonl").interval()
    assert (round(low, 3), round(high, 3)) == (0.782, 0.842)  # the paper's 81.40 % of 656


def test_a_run_without_steps_has_no_figures(tmp_path: Path) -> None:
    summary = summarise_run(tmp_path, config(), 0.0)
    assert summary["steps"] == 0
    assert summary["val_acc_last"] is None
    assert summary["rollout_actor_corr_min"] is None


def test_every_curve_is_drawn(run: Path) -> None:
    paths = draw_curves(run, "where it started")
    assert {path.stem for path in paths} == {
        *("reward", "accuracy", "length", "agreement", "timing", "overview")
    }
    assert all(path.stat().st_size > 5_000 for path in paths)


def test_a_warmed_up_start_is_said_to_be_one(tmp_path: Path) -> None:
    assert start_note(tmp_path) is None
    (tmp_path / "warmup.json").write_text(json.dumps({"stages": []}))
    assert start_note(tmp_path) == "stand-in with random weights"
    (tmp_path / "warmup.json").write_text(json.dumps({"stages": [{"name": "hearing"}]}))
    assert "supervised warm-up" in str(start_note(tmp_path))


def test_a_folder_that_is_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_rows_of_two_splits_and_several_samples_all_count(tmp_path: Path) -> None:
    """In audio mode every prompt is one text, and ids restart in every split."""
    rows = [
        {**row, "data_source": "soundmind/alr", "split": split}
        for split, right in (("dev", True), ("test", False))
        for row in answers([right] * 4)
    ]
    write_validation(tmp_path, 0, rows)
    found = Validation.read(tmp_path / "validation/0.jsonl")
    assert (len(found.rows), found.correct) == (8, 4)
    sampled = [{**row} for row in answers([True, False]) for _ in range(3)]
    sampled[0]["acc"] = 0.0
    write_validation(tmp_path, 1, sampled)
    found = Validation.read(tmp_path / "validation/1.jsonl")
    assert (len(found.rows), found.correct) == (6, 2)


def test_the_lenient_reading_of_a_validation_stands_beside_the_strict_one(tmp_path: Path) -> None:
    rows = answers([False] * 4)
    for row, said in zip(
        rows, ("The answer is {}.", "{}, since Rex is a wug", "Hm.", "?"), strict=True
    ):
        row["output"] = said.format(row["gts"])
    write_validation(tmp_path, 0, rows)
    found = Validation.read(tmp_path / "validation/0.jsonl")
    assert (found.mean("acc"), found.lenient_share()) == (0.0, 0.5)
    write_validation(tmp_path, 1, answers([True]))
    assert Validation.read(tmp_path / "validation/1.jsonl").lenient_share() is None
