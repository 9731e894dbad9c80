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

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from soundmind import preprocess
from soundmind.data import preprocess as data_preprocess
from soundmind.data import sources as data_sources
from soundmind.data import write as data_write
from soundmind.data.audio import num_audio_tokens, resampled_length
from soundmind.data.columns import row_schema
from soundmind.system import files as system_files
from soundmind.task.prompts import INSTRUCTIONS
from soundmind.task.schema import METADATA_KEY, MODES

MakeData = Callable[..., Path]
ALL = {"train": 5, "dev": 3, "test": 2}


def run(root: Path, *arguments: str, mode: str = "audio") -> int:
    command = ["--mode", mode, "--data-dir", str(root), "--tokenizer", "none", "--workers", "1"]
    return preprocess.main([*command, *arguments])


def rows_of(root: Path, split: str, mode: str = "audio") -> list[dict[str, Any]]:
    return pq.read_table(root / "parquet" / mode / f"{split}.parquet").to_pylist()


def report_of(root: Path, mode: str = "audio") -> dict[str, Any]:
    return json.loads((root / "parquet" / mode / "report.json").read_text("utf-8"))


def content_of(root: Path) -> dict[str, bytes]:
    files = sorted(path for path in (root / "parquet").rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def edit_line(path: Path, index: int, change: Callable[[dict[str, Any]], None]) -> None:
    lines = path.read_text("utf-8").splitlines()
    record = json.loads(lines[index])
    change(record)
    lines[index] = json.dumps(record)
    path.write_text("\n".join(lines) + "\n", "utf-8")


# -- rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_rows_have_verls_layout_in_every_mode(make_github: MakeData, mode: str) -> None:
    root = make_github(ALL)
    assert run(root, mode=mode) == 0
    table = pq.read_table(root / "parquet" / mode / "train.parquet")
    assert table.schema.remove_metadata() == row_schema()
    row = table.to_pylist()[1]
    assert row["data_source"] == "soundmind/alr"
    assert row["reward_model"] == {"style": "rule", "ground_truth": "entailed"}
    parts = row["prompt"][-1]["content"]
    assert INSTRUCTIONS["alr"] in parts[-1]["text"]
    question = [part["text"] for part in parts if "Major premise" in (part["text"] or "")]
    assert len(question) == (mode != "audio")
    for part in parts:  # the published chat template takes any part with such a key for a clip
        assert not {"audio", "audio_url", "image", "image_url", "video"} & set(part)
    assert [part["path"] for part in parts if part["type"] == "audio"] == (
        [] if mode == "text" else ["train/0001/question.wav"]
    )


def test_measures_are_those_of_the_files(make_github: MakeData, bpe_folder: Path) -> None:
    from tokenizers import Tokenizer

    root = make_github({"dev": 3}, seconds=2.0)
    assert run(root, "--splits", "dev", "--tokenizer", str(bpe_folder)) == 0
    tokenizer = Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    for index, row in enumerate(rows_of(root, "dev")):
        info = row["extra_info"]
        line = json.loads((root / "dev.jsonl").read_text("utf-8").splitlines()[index])
        clip = soundfile.info(root / row["audio"]["path"])
        answer = soundfile.info(root / f"dev/{info['id']}/answer_{info['label']}.wav")
        assert info == {
            "id": line["id"],
            "split": "dev",
            "index": index,
            "mode": "audio",
            "label": line["label"],
            "question_seconds": clip.frames / clip.samplerate,
            "audio_tokens": num_audio_tokens(resampled_length(clip.frames, clip.samplerate)),
            "question_tokens": len(tokenizer.encode(line["user_content"])),
            "question_words": len(line["user_content"].split()),
            "reference_tokens": len(tokenizer.encode(line["answer"])),
            "reference_words": len(line["answer"].split()),
            "reference_seconds": answer.frames / answer.samplerate,
            "teacher_verdict": row["reward_model"]["ground_truth"],
        }


def test_truth_is_the_label_where_the_teacher_disagrees(make_github: MakeData) -> None:
    root = make_github({"test": 2})
    text = "It cannot be.\nAnswer: not-entailed."
    edit_line(root / "test.jsonl", 1, lambda record: record.update(answer=text))
    assert run(root, "--splits", "test") == 0
    row = rows_of(root, "test")[1]
    assert row["reward_model"]["ground_truth"] == "entailed"
    assert row["extra_info"]["teacher_verdict"] == "not-entailed"
    teacher = report_of(root)["splits"]["test"]["teacher"]
    assert teacher["disagreements"] == 1
    assert teacher["by_label"]["entailed"] == {"entailed": 0, "not-entailed": 1, "none": 0}


def test_real_dev_annotations_give_the_published_counts(alr_dev: Path, tmp_path: Path) -> None:
    shutil.copy(alr_dev, tmp_path / "dev.jsonl")
    assert run(tmp_path, "--splits", "dev", mode="text") == 0
    dev = report_of(tmp_path, "text")["splits"]["dev"]
    assert dev["rows"] == 606
    assert dev["labels"] == {"entailed": 264, "not-entailed": 342}
    assert dev["majority"] == {"verdict": "not-entailed", "share": 0.5644}
    assert dev["teacher"]["disagreements"] == 33
    assert dev["teacher"]["by_label"]["not-entailed"]["entailed"] == 0
    assert dev["duplicates"]["question"] == 2
    assert dev["measures"]["reference_words"]["median"] == 697
    assert dev["measures"]["reference_words"]["max"] == 5045
    truths = [row["reward_model"]["ground_truth"] for row in rows_of(tmp_path, "dev", "text")]
    assert (truths.count("entailed"), truths.count("not-entailed")) == (264, 342)
    assert (tmp_path / "parquet/text/dev.parquet").stat().st_size / 606 <= 12_000


def test_text_mode_needs_no_audio(make_github: MakeData) -> None:
    root = make_github(ALL, clips=False)
    assert run(root, mode="text") == 0
    info = rows_of(root, "train", "text")[0]["extra_info"]
    assert info["audio_tokens"] == 0 and info["question_seconds"] is None


def test_practice_rows_have_one_text_part_and_no_system_line(make_github: MakeData) -> None:
    root = make_github(ALL)
    assert run(root, "--task", "practice") == 0
    row = rows_of(root, "train")[0]
    assert row["data_source"] == "soundmind/practice"
    assert [m["role"] for m in row["prompt"]] == ["user"]
    assert [part["type"] for part in row["prompt"][0]["content"]] == ["audio", "text"]


@pytest.mark.parametrize("metadata", [True, False])
def test_hugging_face_layout_gives_the_same_rows(
    make_github: MakeData, make_huggingface: MakeData, metadata: bool
) -> None:
    github, hub = make_github({"dev": 4}), make_huggingface({"dev": 4}, metadata=metadata)
    assert run(github, "--splits", "dev") == run(hub, "--splits", "dev") == 0
    for ours, theirs in zip(rows_of(github, "dev"), rows_of(hub, "dev"), strict=True):
        ours["extra_info"].update(question_seconds=0, audio_tokens=0)
        theirs["extra_info"].update(question_seconds=0, audio_tokens=0)
        assert ours == theirs


def test_clips_under_audio_dataset_are_found(make_github: MakeData) -> None:
    root = make_github({"dev": 2})
    (root / "audio_dataset").mkdir()
    (root / "dev").rename(root / "audio_dataset" / "dev")
    assert run(root, "--splits", "dev") == 0
    assert rows_of(root, "dev")[0]["audio"]["path"] == "audio_dataset/dev/0000/question.wav"


def test_spaces_and_flac_and_stereo_are_fine(make_github: MakeData, noise_clip: Any) -> None:
    root = make_github({"dev": 2}, name="my data, copy 2")
    (root / "dev/0000/question.wav").unlink()
    soundfile.write(
        root / "dev/0000/question.flac", np.random.default_rng(0).random((44_100, 2)), 44_100
    )
    assert run(root, "--splits", "dev") == 0
    row = rows_of(root, "dev")[0]
    assert row["audio"]["path"] == "dev/0000/question.flac"
    assert row["extra_info"]["audio_tokens"] == 25


def test_split_without_recorded_answers_is_prepared_and_said(
    make_github: MakeData, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_github({"dev": 3})
    for answer in (root / "dev").glob("*/answer_*.wav"):
        answer.unlink()
    assert run(root, "--splits", "dev") == 0
    assert "no recorded answers" in capsys.readouterr().out
    assert rows_of(root, "dev")[0]["extra_info"]["reference_seconds"] is None


# -- faults ----------------------------------------------------------------------------------------


def break_everything(root: Path, noise_clip: Any) -> dict[str, str]:
    """One fault per line of train; returns fault kind by the place where it must be reported."""
    train, jsonl = root / "train", root / "train.jsonl"
    (train / "0001/question.wav").unlink()
    (train / "0002/question.wav").write_bytes(b"")
    clip = (train / "0003/question.wav").read_bytes()
    (train / "0003/question.wav").write_bytes(clip[: len(clip) // 2])
    (train / "0004/question.wav").write_bytes(b"not a sound at all" * 99)
    (train / "0005/answer_1.wav").rename(train / "0005/answer_0.wav")
    edit_line(jsonl, 6, lambda r: r.update(label=2))
    edit_line(jsonl, 7, lambda r: r.pop("answer"))
    edit_line(jsonl, 8, lambda r: r.update(user_content="  "))
    edit_line(jsonl, 9, lambda r: r.update(id="0000", label=0))
    edit_line(jsonl, 11, lambda r: r.update(id="../0011"))
    noise_clip(root.parent / "outside.wav", 1.0)
    (train / "0012/question.wav").unlink()
    (train / "0012/question.wav").symlink_to(root.parent / "outside.wav")
    samples = np.full(24_000, np.nan, np.float32)
    soundfile.write(train / "0013/question.wav", samples, 24_000, subtype="FLOAT")
    soundfile.write(train / "0014/question.wav", np.zeros(24_000), 24_000)
    (train / "0016/answer_0.wav").unlink()
    edit_line(jsonl, 17, lambda r: r.update(label=True))
    lines = jsonl.read_bytes().split(b"\n")
    lines[10] = lines[10][:-20]
    lines[15] = lines[15].replace(b"Let me think", b"Let me \xff\xfe think")
    lines[18] = lines[18].replace(b"Let me think", b"Let me \\ud800 think")
    jsonl.write_bytes(b"\n".join(lines))
    kinds = """missing-clip empty-clip truncated-clip unreadable-clip label-contradicts-clip
        bad-label missing-field empty-field duplicate-id broken-json unsafe-id link-leaves-root
        nan-audio silent-audio not-utf8 missing-clip bad-label not-utf8"""
    return {f"train.jsonl:{line}": kind for line, kind in enumerate(kinds.split(), 2)}


def test_every_fault_is_found_in_one_pass_and_nothing_is_written(
    make_github: MakeData, noise_clip: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_github({"train": 20})
    expected = break_everything(root, noise_clip)
    assert run(root, "--splits", "train") == 2
    output = capsys.readouterr().out
    listed = [line.split()[:2] for line in output.splitlines() if "train.jsonl:" in line]
    assert {where: kind for kind, where in listed} == expected
    assert len(listed) == len(expected)
    assert "--on-error skip" in output
    assert not (root / "parquet").exists()


def test_skip_writes_the_rest_and_counts_every_reason(
    make_github: MakeData, noise_clip: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_github({"train": 20})
    expected = break_everything(root, noise_clip)
    assert run(root, "--splits", "train", "--on-error", "skip") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"skipped {len(expected)} of 20 rows: ")
    for kind in set(expected.values()):
        assert f"{kind} {list(expected.values()).count(kind)}" in last
    rows = rows_of(root, "train")
    assert [row["extra_info"]["id"] for row in rows] == ["0000", "0019"]
    assert [row["extra_info"]["index"] for row in rows] == [0, 1]
    split = report_of(root)["splits"]["train"]
    assert split["rows"] + split["skipped"]["rows"] == split["annotations"] == 20
    assert {f["where"]: f["kind"] for f in split["skipped"]["list"]} == expected


def test_every_fault_of_a_line_is_listed(
    make_github: MakeData, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_github({"dev": 2})
    edit_line(root / "dev.jsonl", 0, lambda r: (r.update(label="1"), r.pop("answer")))
    (root / "dev/0000/question.wav").write_bytes(b"RIFF")
    assert run(root, "--splits", "dev") == 2
    output = capsys.readouterr().out
    for kind in ("bad-label", "missing-field", "unreadable-clip"):
        assert kind in output


def test_file_without_one_good_row_lists_its_faults_and_writes_nothing(
    make_github: MakeData, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_github({"dev": 2})
    (root / "dev.jsonl").write_text("{\n[]\n", "utf-8")
    assert run(root, "--splits", "dev") == 2
    assert capsys.readouterr().out.count("broken-json") == 3  # two lines and the sum
    assert run(root, "--splits", "dev", "--on-error", "skip") == 2
    assert "no row of split dev is left" in capsys.readouterr().err
    (root / "dev.jsonl").write_text("\n", "utf-8")
    assert run(root, "--splits", "dev") == 2
    assert "no annotations" in capsys.readouterr().err
    assert not list((root / "parquet").rglob("*.parquet"))


def test_pipe_in_place_of_a_clip_does_not_hang(
    make_github: MakeData, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_github({"dev": 2})
    (root / "dev/0001/question.wav").unlink()
    os.mkfifo(root / "dev/0001/question.wav")
    assert run(root, "--splits", "dev") == 2
    assert "not a regular file" in capsys.readouterr().out


def test_folder_link_that_stays_inside_is_fine(make_github: MakeData) -> None:
    root = make_github({"dev": 2})
    (root / "dev/0000").rename(root / "moved")
    (root / "dev/0000").symlink_to(root / "moved")
    assert run(root, "--splits", "dev") == 0


def test_named_clip_may_not_leave_the_root(
    make_huggingface: MakeData, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_huggingface({"dev": 2})
    line = root / "dev/metadata.jsonl"
    edit_line(line, 0, lambda r: r.update(question_file_name="../../other/question.wav"))
    edit_line(line, 1, lambda r: r.update(answer_file_name="0001/answer_0.wav"))
    assert run(root, "--splits", "dev") == 2
    output = capsys.readouterr().out
    assert "unsafe-path" in output and "label-contradicts-clip" in output


def test_clip_beyond_the_window_is_reported_and_kept(
    make_github: MakeData, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_github({"dev": 2})
    long = np.random.default_rng(0).standard_normal(8_000 * 301) * 0.1
    soundfile.write(root / "dev/0001/question.wav", long, 8_000)
    assert run(root, "--splits", "dev") == 0
    assert "warning: dev: 1 questions last longer than the 300 s" in capsys.readouterr().out
    assert report_of(root)["splits"]["dev"]["beyond_processor_window"] == ["0001"]
    assert rows_of(root, "dev")[1]["extra_info"]["audio_tokens"] == 7525


def test_missing_split_names_the_command_that_fetches_it(
    make_github: MakeData, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_github({"dev": 2})
    assert run(root) == 2
    assert "download_data.sh train" in capsys.readouterr().err
    assert run(root.parent / "nowhere") == 2
    assert "nowhere not found" in capsys.readouterr().err


def test_default_folder_is_not_taken_for_a_hub_id(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in ([], ["--data-dir", "data/alr"]):
        assert preprocess.main(["--mode", "audio", *arguments]) == 2
        assert "data/alr not found. Fetch it with: bash scripts" in capsys.readouterr().err


def test_hub_without_network_is_a_plain_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("soundmind.data.fetch.hub_is_reachable", lambda: False)
    assert preprocess.main(["--mode", "text", "--data-dir", "Some-Org/SomeSet"]) == 2
    assert "not reachable" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_hub_id_is_fetched_into_the_data_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_huggingface: MakeData
) -> None:
    remote = make_huggingface(ALL)
    asked: dict[str, Any] = {}

    def snapshot_download(repo_id: str, **keys: Any) -> None:
        asked.update(keys, repo_id=repo_id)
        shutil.copytree(remote, keys["local_dir"])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("soundmind.data.fetch.hub_is_reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    arguments = ["--mode", "audio", "--data-dir", "Some-Org/SomeSet", "--tokenizer", "none"]
    assert preprocess.main([*arguments, "--questions-only"]) == 0
    assert asked["repo_id"] == "Some-Org/SomeSet" and asked["repo_type"] == "dataset"
    assert "train/*/question.*" in asked["allow_patterns"]
    assert not any("answer" in pattern for pattern in asked["allow_patterns"])
    row = pq.read_table(tmp_path / "data/SomeSet/parquet/audio/train.parquet").to_pylist()[0]
    assert row["extra_info"]["reference_seconds"] is None


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
    assert run(root) == 0
    before = report_of(root)["overlap"]
    assert {pair: n["question"] for pair, n in before.items()} == {
        "train, dev": 1, "train, test": 1, "dev, test": 1
    }  # fmt: skip
    assert before["dev, test"]["major_premise"] == 1
    assert run(root, "--drop-overlap") == 0
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
    assert run(root, "--splits", "train", "--drop-overlap") == 0
    assert len(rows_of(root, "train")) == 3
    edit_line(root / "dev.jsonl", 0, lambda record: record.update(user_content="Something else"))
    assert run(root, "--splits", "train", "--drop-overlap") == 0
    assert "up to date" not in capsys.readouterr().out
    assert len(rows_of(root, "train")) == 4
    (root / "dev.jsonl").unlink()
    assert run(root, "--splits", "train", "--drop-overlap") == 2


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
        assert run(root, "--splits", "train", "--workers", workers, mode="text") == 0
        contents.append(content_of(root))
        shutil.rmtree(root / "parquet")
    assert contents[0] == contents[1] == contents[2]
    assert len(contents[0]) == 2


def test_second_run_does_nothing_until_something_changes(
    make_github: MakeData, noise_clip: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_github(ALL)
    assert run(root) == 0
    before = content_of(root)
    capsys.readouterr()
    assert run(root) == 0
    assert "up to date" in capsys.readouterr().out
    assert content_of(root) == before
    noise_clip(root / "dev/0005/question.wav", 9.0)  # an input
    assert run(root) == 0
    assert "up to date" not in capsys.readouterr().out
    assert rows_of(root, "dev")[0]["extra_info"]["question_seconds"] == 9.0
    output = root / "parquet/audio/test.parquet"  # an output
    output.write_bytes(output.read_bytes()[:-1] + b"x")
    assert run(root) == 0
    assert "up to date" not in capsys.readouterr().out
    (root / "train/0001/question.wav").unlink()
    assert run(root) == 2


def test_failed_run_leaves_earlier_files_alone(make_github: MakeData) -> None:
    root = make_github(ALL)
    assert run(root) == 0
    before = content_of(root)
    (root / "dev/0005/question.wav").write_bytes(b"")
    assert run(root) == 2
    assert content_of(root) == before


def test_preparing_one_split_keeps_what_the_report_says_of_others(make_github: MakeData) -> None:
    root = make_github(ALL)
    assert run(root) == 0
    edit_line(root / "dev.jsonl", 0, lambda record: record.update(answer="Answer: entailed"))
    assert run(root, "--splits", "dev") == 0
    assert list(report_of(root)["splits"]) == ["train", "dev", "test"]
    (root / "parquet/audio/test.parquet").unlink()
    edit_line(root / "dev.jsonl", 0, lambda record: record.update(answer="Answer: not entailed"))
    assert run(root, "--splits", "dev") == 0
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
    assert run(root, "--splits", "train", mode="text") == 0
    assert len(rows_of(root, "train", "text")) == 4096
    assert not work.exists()
    resumed = content_of(root)
    shutil.rmtree(root / "parquet")
    assert run(root, "--splits", "train", mode="text") == 0
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
    assert run(root, "--splits", "dev") == 0
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
        assert run(root) == 2
    assert "another run is writing" in capsys.readouterr().err
    assert run(root) == 0


def test_nothing_but_the_results_is_left_in_the_output_folder(make_github: MakeData) -> None:
    root = make_github(ALL)
    assert run(root) == 0
    names = sorted(os.listdir(root / "parquet/audio"))
    assert names == ["dev.parquet", "report.json", "test.parquet", "train.parquet"]


# -- embedding -------------------------------------------------------------------------------------


def test_embedded_clips_are_the_files_own_bytes(
    make_github: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_write, "ROW_GROUP_BYTES", 150_000)
    root = make_github({"train": 7})
    assert run(root, "--splits", "train", "--embed-audio") == 0
    file = pq.ParquetFile(root / "parquet/audio/train.parquet")
    assert file.metadata.num_row_groups > 2
    for row in rows_of(root, "train"):
        assert row["audio"]["bytes"] == (root / row["audio"]["path"]).read_bytes()
        assert row["extra_info"]["index"] == int(row["extra_info"]["id"])
    assert json.loads(file.schema_arrow.metadata[METADATA_KEY])["embedded"] is True
