"""Written answers of the stand-in through vLLM, end to end; one engine for all cases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from processes import REPOSITORY, clean_environment

from soundmind.evaluation.examples import read_examples
from soundmind.evaluation.store import read_predictions

pytest.importorskip("vllm")
SAMPLE = REPOSITORY / "data/sample"
ROWS = 8


def preprocess(output: Path, mode: str, tokenizer: Path, *more: str) -> None:
    command = [sys.executable, "-m", "soundmind.preprocess", "--mode", mode, "--task", "practice"]
    where = ["--data-dir", str(SAMPLE), "--splits", "test", "--output-dir", str(output)]
    subprocess.run(
        [*command, *where, "--tokenizer", str(tokenizer), *more],
        check=True,
        cwd=REPOSITORY,
        env=clean_environment(),
        capture_output=True,
    )


def write_faulty_rows(source: Path, target: Path, write_clip: Any) -> None:
    """A copy whose row 1 has no clip, row 3 a clip of 301 s and row 5 a broken one."""
    table = pq.read_table(source)
    rows = table.to_pylist()
    folder = target.parent
    folder.mkdir(parents=True)
    write_clip(folder / "long.wav", 301.0, rate=8_000)
    (folder / "broken.wav").write_bytes(b"RIFF\x00\x00\x00\x00WAVEfmt ")
    for index, name in ((1, "gone.wav"), (3, "long.wav"), (5, "broken.wav")):
        clip = str(folder / name)
        rows[index]["audio"]["path"] = clip
        for part in rows[index]["prompt"][-1]["content"]:
            part["path"] = clip if part["type"] == "audio" else None
    rows[3]["extra_info"]["question_seconds"] = 301.0  # or the file would be of other clips
    pq.write_table(type(table).from_pylist(rows, table.schema), target)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, random_stand_in: Path) -> Path:
    """The folder in which tests/support/evaluate_stand_in.py has run all its cases."""
    from alr_data import write_clip

    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "tiny").symlink_to(random_stand_in)
    for mode in ("audio", "text", "dual"):
        preprocess(folder / "parquet", mode, random_stand_in)
    preprocess(folder / "embedded", "audio", random_stand_in, "--embed-audio")
    clean = folder / "parquet/audio/test.parquet"
    write_faulty_rows(clean, folder / "faulty/audio/test.parquet", write_clip)
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "tests/support/evaluate_stand_in.py"), str(folder)],
        cwd=REPOSITORY,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (folder / "stdout.txt").write_text(result.stdout)
    return folder


def without_seconds(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_predictions(folder)]


def test_every_row_is_there_once_and_in_order(work: Path) -> None:
    lines = read_predictions(work / "whole")
    assert [line["index"] for line in lines] == list(range(ROWS))
    for line in lines:
        assert line["error"] is None
        assert line["finish_reason"] in ("stop", "length")
        assert 0 < line["response_tokens"] <= 24
        assert line["response_tokens"] == 24 or line["finish_reason"] == "stop"
        assert line["seconds"] > 0
        assert (work / "whole" / line["question_audio"]).is_file()


def test_an_interrupted_evaluation_ends_like_an_undisturbed_one(work: Path) -> None:
    assert without_seconds(work / "killed") == without_seconds(work / "whole")
    assert "continuing: 6 of 8 rows" in (work / "stdout.txt").read_text()


def test_prompts_are_those_of_training(work: Path, random_stand_in: Path) -> None:
    from soundmind.data.clips import load_clip
    from soundmind.model.processor import load_processor

    processor = load_processor(str(random_stand_in))
    lines = read_predictions(work / "whole")
    examples = read_examples(work / "parquet/audio/test.parquet")
    for example, line in zip(examples, lines, strict=True):
        assert example.clip is not None
        text = processor.apply_chat_template(
            example.messages, add_generation_prompt=True, tokenize=False
        )
        encoded = processor(text=[text], audio=[load_clip(example.clip)], sampling_rate=16_000)
        assert line["prompt_tokens"] == len(encoded["input_ids"][0])


@pytest.mark.parametrize("mode", ["text", "dual"])
def test_written_questions_are_evaluated_too(work: Path, mode: str) -> None:
    lines = read_predictions(work / mode)
    assert len(lines) == ROWS
    assert all(line["error"] is None and "All " in line["question"] for line in lines)
    assert (lines[0]["question_audio"] is None) == (mode == "text")
    config = json.loads((work / mode / "metrics.json").read_text())
    assert config["configuration"] == f"{mode} to text"


def test_bad_rows_are_listed_count_as_wrong_and_end_nothing(work: Path) -> None:
    lines = read_predictions(work / "faulty_out")
    errors = {line["index"]: line["error"] for line in lines if line["error"]}
    assert set(errors) == {1, 3, 5}
    assert "gone.wav" in errors[1]
    assert "301.0 s" in errors[3] and "300 s" in errors[3]
    assert "broken.wav" in errors[5]
    metrics = json.loads((work / "faulty_out/metrics.json").read_text())
    assert metrics["accuracy"]["n"] == ROWS
    assert [row["index"] for row in metrics["failed_rows"]["rows"]] == [1, 3, 5]
    assert "3 of 8 rows failed" in (work / "stdout.txt").read_text()


def test_embedded_clips_give_the_same_answers_and_a_file_to_listen_to(work: Path) -> None:
    whole = read_predictions(work / "whole")
    for ours, theirs in zip(read_predictions(work / "embedded_out"), whole, strict=True):
        assert ours["response"] == theirs["response"]
        assert (work / "embedded_out" / ours["question_audio"]).stat().st_size > 1000


def test_samples_of_one_seed_repeat_and_differ_among_themselves(work: Path) -> None:
    lines = without_seconds(work / "sampled")
    assert [(line["index"], line["sample"]) for line in lines] == [
        (index, sample) for index in range(4) for sample in range(3)
    ]
    assert lines == without_seconds(work / "sampled_again")
    assert len({line["response"] for line in lines if line["index"] == 0}) == 3
    metrics = json.loads((work / "sampled/metrics.json").read_text())
    assert set(metrics["sampled"]["pass_at"]) == {"1", "2", "3"}


def test_the_output_of_a_stand_in_is_called_practice(work: Path) -> None:
    assert "Practice output of a stand-in model, no result" in (work / "stdout.txt").read_text()
    assert "Practice output of a stand-in" in (work / "whole/report.html").read_text()
    metrics = json.loads((work / "whole/metrics.json").read_text())
    assert metrics["stand_in"] and metrics["paper"] == []


def test_the_output_folder_holds_what_is_promised(work: Path) -> None:
    found = {os.path.relpath(path, work / "whole") for path in (work / "whole").rglob("*.*")} - {
        ".lock"
    }
    assert found == {
        "config.yaml",
        "predictions.jsonl",
        "metrics.json",
        "report.html",
        "versions.json",
        *(
            f"plots/{name}.png"
            for name in ("accuracy", "by_duration", "by_length", "confusion", "lengths")
        ),
    }
    versions = json.loads((work / "whole/versions.json").read_text())
    assert versions["launch"]["rows"] == ROWS and "transformers" in versions["packages"]


def test_saved_predictions_can_be_scored_again_under_another_reward(work: Path) -> None:
    from soundmind.task.rescore import read_saved, rescore

    lines = rescore(read_saved(work / "whole/predictions.jsonl"), preset="guarded")
    assert len(lines) == ROWS and all(line["reward_error"] == 0 for line in lines)
