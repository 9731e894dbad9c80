"""What a run of preprocessing leaves: overlap, equal output, finished work, embedded clips."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from prepared import content_of, edit_line, prepare_data, report_of, rows_of

from soundmind import preprocess
from soundmind.data import preprocess as data_preprocess
from soundmind.data import sources as data_sources
from soundmind.data import write as data_write
from soundmind.system import files as system_files
from soundmind.task.schema import METADATA_KEY

MakeData = Callable[..., Path]
ALL = {"train": 5, "dev": 3, "test": 2}


# -- overlap ---------------------------------------------------------------------------------------


def share_questions(root: Path) -> None:
    """Line 0 of train is in dev, line 1 of train and line 1 of dev are in test."""

    def take(source: str, index: int) -> Callable[[dict[str, Any]], None]:
        line = (root / source).read_text("utf-8").splitlines()[index]
        return lambda record: record.update(user_content=json.loads(line)["user_content"])

    edit_line(root / "train.jsonl", 0, take("dev.jsonl", 0))
    edit_line(root / "train.jsonl", 1, take("test.jsonl", 0))
    edit_line(root / "dev.jsonl", 1, take("test.jsonl", 1))


def test_overlap_is_reported_and_dropped_from_train_then_dev(make_github: MakeData) -> None:
    root = make_github(ALL)
    share_questions(root)
    assert prepare_data(root) == 0
    before = report_of(root)["overlap"]
    assert {pair: n["question"] for pair, n in before.items()} == {
        "train, dev": 1, "train, test": 1, "dev, test": 1
    }  # fmt: skip
    assert before["dev, test"]["major_premise"] == 1
    assert prepare_data(root, "--drop-overlap") == 0
    after = report_of(root)
    assert [n["question"] for n in after["overlap"].values()] == [0, 0, 0]
    dropped = {name: split["overlap_dropped"] for name, split in after["splits"].items()}
    assert dropped == {"train": ["0000", "0001"], "dev": ["0006"], "test": []}
    assert len(rows_of(root, "test")) == 2


def test_overlap_is_dropped_even_if_the_other_splits_are_not_prepared(
    make_github: MakeData, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_github(ALL)
    share_questions(root)
    assert prepare_data(root, "--splits", "train", "--drop-overlap") == 0
    assert len(rows_of(root, "train")) == 3
    edit_line(root / "dev.jsonl", 0, lambda record: record.update(user_content="Something else"))
    assert prepare_data(root, "--splits", "train", "--drop-overlap") == 0
    assert "up to date" not in capsys.readouterr().out
    assert len(rows_of(root, "train")) == 4
    (root / "dev.jsonl").unlink()
    assert prepare_data(root, "--splits", "train", "--drop-overlap") == 2


# -- same output, finished work --------------------------------------------------------------------


def test_output_is_identical_for_any_number_of_workers(
    make_github: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_github({"train": 1})
    line = json.loads((root / "train.jsonl").read_text("utf-8"))
    lines = [json.dumps({**line, "id": f"{i:04d}", "label": i % 2}) for i in range(700)]
    (root / "train.jsonl").write_text("\n".join(lines), "utf-8")
    contents = []
    for workers in ("1", "2", "3"):
        assert prepare_data(root, "--splits", "train", "--workers", workers, mode="text") == 0
        contents.append(content_of(root))
        shutil.rmtree(root / "parquet")
    assert contents[0] == contents[1] == contents[2]
    assert len(contents[0]) == 2


def test_second_run_does_nothing_until_something_changes(
    make_github: MakeData, noise_clip: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_github(ALL)
    assert prepare_data(root) == 0
    before = content_of(root)
    capsys.readouterr()
    assert prepare_data(root) == 0
    assert "up to date" in capsys.readouterr().out
    assert content_of(root) == before
    noise_clip(root / "dev/0005/question.wav", 9.0)  # an input
    assert prepare_data(root) == 0
    assert "up to date" not in capsys.readouterr().out
    assert rows_of(root, "dev")[0]["extra_info"]["question_seconds"] == 9.0
    output = root / "parquet/audio/test.parquet"  # an output
    output.write_bytes(output.read_bytes()[:-1] + b"x")
    assert prepare_data(root) == 0
    assert "up to date" not in capsys.readouterr().out
    (root / "train/0001/question.wav").unlink()
    assert prepare_data(root) == 2


def test_failed_run_leaves_earlier_files_alone(make_github: MakeData) -> None:
    root = make_github(ALL)
    assert prepare_data(root) == 0
    before = content_of(root)
    (root / "dev/0005/question.wav").write_bytes(b"")
    assert prepare_data(root) == 2
    assert content_of(root) == before


def test_preparing_one_split_keeps_what_the_report_says_of_others(make_github: MakeData) -> None:
    root = make_github(ALL)
    assert prepare_data(root) == 0
    edit_line(root / "dev.jsonl", 0, lambda record: record.update(answer="Answer: entailed"))
    assert prepare_data(root, "--splits", "dev") == 0
    assert list(report_of(root)["splits"]) == ["train", "dev", "test"]
    (root / "parquet/audio/test.parquet").unlink()
    edit_line(root / "dev.jsonl", 0, lambda record: record.update(answer="Answer: not entailed"))
    assert prepare_data(root, "--splits", "dev") == 0
    assert list(report_of(root)["splits"]) == ["train", "dev"]


def test_killed_run_leaves_no_half_file_and_is_picked_up(
    make_github: MakeData, tmp_path: Path
) -> None:
    root = make_github({"train": 1})
    line = json.loads((root / "train.jsonl").read_text("utf-8"))
    line["answer"] = "word " * 1500 + "Answer: not entailed."
    lines = [json.dumps({**line, "id": f"{i:05d}"}) for i in range(4096)]
    (root / "train.jsonl").write_text("\n".join(lines), "utf-8")
    command = [sys.executable, "-m", "soundmind.preprocess", "--mode", "text", "--splits", "train"]
    command += ["--data-dir", str(root), "--tokenizer", "none", "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    work = root / "parquet/text/.work"
    while len(list(work.glob("*.arrow"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)  # the parent alone: its workers must notice by themselves
    assert process.wait() == -signal.SIGKILL
    assert list((root / "parquet/text").glob("*.parquet")) == []
    deadline = time.monotonic() + 30
    while group_is_alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not group_is_alive(process.pid)
    finished = {path: path.stat().st_mtime_ns for path in work.glob("*.arrow")}
    assert finished
    job = data_preprocess.make_job(**vars(preprocess.parse_arguments(command[3:])))
    scanned = data_preprocess.scan_splits(job, [data_sources.find_split(root, "train")], work)
    assert set(finished) <= set(scanned["train"].parts)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished  # used as they were
    assert prepare_data(root, "--splits", "train", mode="text") == 0
    assert len(rows_of(root, "train", "text")) == 4096
    assert not work.exists()
    resumed = content_of(root)
    shutil.rmtree(root / "parquet")
    assert prepare_data(root, "--splits", "train", mode="text") == 0
    assert content_of(root) == resumed


def test_part_damaged_by_a_power_cut_is_made_again(make_github: MakeData) -> None:
    root = make_github({"dev": 3})
    arguments = ["--mode", "audio", "--data-dir", str(root), "--tokenizer", "none"]
    job = data_preprocess.make_job(
        **vars(preprocess.parse_arguments([*arguments, "--splits", "dev"]))
    )
    job.work.mkdir(parents=True)
    sources = [data_sources.find_split(job.root, "dev")]
    (part,) = data_preprocess.scan_splits(job, sources, job.work)["dev"].parts
    part.write_bytes(bytes(part.stat().st_size))
    assert prepare_data(root, "--splits", "dev") == 0
    assert len(rows_of(root, "dev")) == 3


def group_is_alive(group: int) -> bool:
    """Whether a running process of the group is left; zombies nobody collected do not count."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False


def test_two_runs_cannot_write_the_same_folder(
    make_github: MakeData, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_github(ALL)
    work = root / "parquet/audio/.work"
    work.mkdir(parents=True)
    with system_files.locked(work / "lock", work.parent):
        assert prepare_data(root) == 2
    assert "another run is writing" in capsys.readouterr().err
    assert prepare_data(root) == 0


def test_nothing_but_the_results_is_left_in_the_output_folder(make_github: MakeData) -> None:
    root = make_github(ALL)
    assert prepare_data(root) == 0
    names = sorted(os.listdir(root / "parquet/audio"))
    assert names == ["dev.parquet", "report.json", "test.parquet", "train.parquet"]


# -- embedding -------------------------------------------------------------------------------------


def test_embedded_clips_are_the_files_own_bytes(
    make_github: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_write, "ROW_GROUP_BYTES", 150_000)
    root = make_github({"train": 7})
    assert prepare_data(root, "--splits", "train", "--embed-audio") == 0
    file = pq.ParquetFile(root / "parquet/audio/train.parquet")
    assert file.metadata.num_row_groups > 2
    for row in rows_of(root, "train"):
        assert row["audio"]["bytes"] == (root / row["audio"]["path"]).read_bytes()
        assert row["extra_info"]["index"] == int(row["extra_info"]["id"])
    assert json.loads(file.schema_arrow.metadata[METADATA_KEY])["embedded"] is True


def damaged_reports() -> list[Any]:
    odd: list[Any] = [[], {}, {"format": 1}, {"format": 1, "options": {}, "splits": []}]
    return [*odd, {"format": 1, "splits": {"dev": "x"}, "overlap": {}, "tokenizer": None}]


@pytest.mark.parametrize("cut", ["output", "input", "skipped", "annotations", "labels", None])
def test_a_report_that_says_other_things_counts_as_none(
    make_github: MakeData, cut: str | None
) -> None:
    root = make_github(ALL)
    assert prepare_data(root) == 0
    path = root / "parquet/audio/report.json"
    whole = path.read_bytes()
    report = json.loads(whole)
    if cut is not None:
        del report["splits"]["dev"][cut]
    for content in [report] if cut is not None else damaged_reports():
        path.write_text(json.dumps(content))
        assert prepare_data(root) == 0
        assert path.read_bytes() == whole
