"""Saved responses, scored again."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from graded import RIGHT, ROW, grade

from soundmind import rewards as rewards_door
from soundmind.task import rescore
from soundmind.task.labels import ENTAILED, NOT_ENTAILED

ROOT = Path(__file__).resolve().parents[2]


def save(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_verls_dump_is_scored_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dump = {"input": "?", "output": RIGHT, "gts": ENTAILED, "score": 1.0, "step": 3}
    row = {"reference_tokens": 20, "response_tokens": 10}
    path = save(tmp_path / "3.jsonl", {**dump, **row}, {**dump, **row, "gts": NOT_ENTAILED})
    assert rewards_door.main([str(path)]) == 0
    table = capsys.readouterr().out
    assert "2 responses, preset paper" in table
    assert ["answer", "2.00", "0.5000", "1", "0", "1"] in [
        line.split() for line in table.split("\n")
    ]
    assert "text_length         1.00   0.5000       0       2       0" in table
    assert "2 of 2 lines differ now" in table and "tokens 2" in table


def test_predictions_with_a_label_are_scored_again(tmp_path: Path) -> None:
    path = save(
        tmp_path / "predictions.jsonl",
        {"response": RIGHT, "label": 1, "extra_info": {**ROW}},
        {"response": RIGHT, "ground_truth": NOT_ENTAILED, "response_tokens": -1},
    )
    first, second = rescore.rescore(rescore.read_saved(path))
    assert (first["score"], second["score"]) == (4.0, 1.0)
    assert "score_before" not in first


def test_a_dump_without_reference_lengths_gets_its_length_credit_back(tmp_path: Path) -> None:
    saved = [
        grade(RIGHT, row={"reference_tokens": n, "response_tokens": 10}) for n in (5, 10, 17, 40)
    ]
    path = save(tmp_path / "1.jsonl", *({"output": RIGHT, "gts": ENTAILED, **s} for s in saved))
    again = rescore.rescore(rescore.read_saved(path))
    assert [a["score"] for a in again] == pytest.approx([s["score"] for s in saved])
    other = rescore.rescore(rescore.read_saved(path), preset="no_answer_reward")
    assert [a["score"] for a in other] == pytest.approx([s["score"] - 2.0 for s in saved])


def test_length_credit_of_a_guarded_run_is_not_taken_for_a_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = grade(RIGHT, row={"reference_tokens": 10, "response_tokens": 30}, preset="guarded")
    path = save(tmp_path / "1.jsonl", {"output": RIGHT, "gts": ENTAILED, **saved})
    assert rescore.rescore(rescore.read_saved(path))[0]["score"] == 3.0
    assert rewards_door.main([str(path)]) == 0
    assert "1 of 1 lines lose text_length" in capsys.readouterr().out


def test_rescoring_takes_preset_labels_and_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(
        tmp_path / "p.jsonl",
        {"response": "<think>a</think> Answer: B", "ground_truth": "B", "data_source": "mcq"},
        {"response": "<think>a</think> Answer: C", "label": 0, "data_source": "other"},
    )
    config = tmp_path / "run.yaml"
    config.write_text(
        "reward:\n  custom_reward_function:\n    reward_kwargs:\n      weights: {answer: 7}\n"
    )
    arguments = [str(path), "--config", str(config), "--labels", "A,B,C", "--preset", "guarded"]
    assert rewards_door.main([*arguments, "--output", str(tmp_path / "out.jsonl")]) == 0
    table = capsys.readouterr().out
    assert "1 responses of mcq, preset guarded, labels A/B/C" in table and "of other" in table
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["score"] for line in lines] == [8.0, 1.0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "p.jsonl", "run.yaml"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no responses in it"),
        ("{}\n", r"bad.jsonl:1: needs the response under 'output' or 'response'"),
        ("\n[1]\n", "bad.jsonl:2: a JSON object is wanted, found list"),
        ("{\n", "bad.jsonl:1: not a JSON line"),
        ('{"response": "x", "label": 2}\n', "label 2 is not an index"),
    ],
)
def test_unreadable_input_is_named_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    assert rewards_door.main([str(path)]) == 2
    assert message in capsys.readouterr().err


def test_the_command_line_runs_as_documented(tmp_path: Path) -> None:
    path = save(tmp_path / "p.jsonl", {"response": RIGHT, "label": 1, **ROW})
    run = subprocess.run(
        [sys.executable, "-m", "soundmind.rewards", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "acc 1.0000 1 of 1" in " ".join(run.stdout.split()) and run.stderr == ""


# --- files as they are ----------------------------------------------------------------------------


GOOD = json.dumps({"output": RIGHT, "gts": "entailed"}).encode() + b"\n"


def test_a_byte_that_is_no_utf8_is_data_of_a_response(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "latin1.jsonl"
    path.write_bytes(GOOD + GOOD.replace(b"three", b"caf\xe9"))
    assert rewards_door.main([str(path)]) == 0
    assert "2 responses" in capsys.readouterr().out


def test_gzipped_responses_are_read_and_damaged_ones_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ok.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD * 100))
    assert rewards_door.main([str(path)]) == 0
    path.write_bytes(path.read_bytes()[:-20])
    assert rewards_door.main([str(path)]) == 2
    assert "ok.jsonl.gz: gzip data that is cut" in capsys.readouterr().err


def test_one_bad_line_is_named_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(GOOD + b"[1]\n" + b'{"a": \n' + GOOD)
    assert rewards_door.main([str(path)]) == 0
    told = capsys.readouterr()
    assert "2 responses" in told.out
    assert "mixed.jsonl:2: a JSON object" in told.err and "2 lines were passed over" in told.err
