from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from alr_data import question_text
from prepared import edit_line, prepare_data, report_of, rows_of

from soundmind import preprocess
from soundmind.data.audio import num_audio_tokens, resampled_length
from soundmind.data.columns import row_schema
from soundmind.task.prompts import INSTRUCTIONS
from soundmind.task.schema import MODES

MakeData = Callable[..., Path]
ALL = {"train": 5, "dev": 3, "test": 2}


# -- rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_rows_have_verls_layout_in_every_mode(make_github: MakeData, mode: str) -> None:
    root = make_github(ALL)
    assert prepare_data(root, mode=mode) == 0
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
    assert prepare_data(root, "--splits", "dev", "--tokenizer", str(bpe_folder)) == 0
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
    assert prepare_data(root, "--splits", "test") == 0
    row = rows_of(root, "test")[1]
    assert row["reward_model"]["ground_truth"] == "entailed"
    assert row["extra_info"]["teacher_verdict"] == "not-entailed"
    teacher = report_of(root)["splits"]["test"]["teacher"]
    assert teacher["disagreements"] == 1
    assert teacher["by_label"]["entailed"] == {"entailed": 0, "not-entailed": 1, "none": 0}


def test_real_dev_annotations_give_the_published_counts(alr_dev: Path, tmp_path: Path) -> None:
    shutil.copy(alr_dev, tmp_path / "dev.jsonl")
    assert prepare_data(tmp_path, "--splits", "dev", mode="text") == 0
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
    assert prepare_data(root, mode="text") == 0
    info = rows_of(root, "train", "text")[0]["extra_info"]
    assert info["audio_tokens"] == 0 and info["question_seconds"] is None


def test_practice_rows_have_one_text_part_and_no_system_line(make_github: MakeData) -> None:
    root = make_github(ALL)
    assert prepare_data(root, "--task", "practice") == 0
    row = rows_of(root, "train")[0]
    assert row["data_source"] == "soundmind/practice"
    assert [m["role"] for m in row["prompt"]] == ["user"]
    assert [part["type"] for part in row["prompt"][0]["content"]] == ["audio", "text"]


@pytest.mark.parametrize("metadata", [True, False])
def test_hugging_face_layout_gives_the_same_rows(
    make_github: MakeData, make_huggingface: MakeData, metadata: bool
) -> None:
    github, hub = make_github({"dev": 4}), make_huggingface({"dev": 4}, metadata=metadata)
    assert prepare_data(github, "--splits", "dev") == prepare_data(hub, "--splits", "dev") == 0
    for ours, theirs in zip(rows_of(github, "dev"), rows_of(hub, "dev"), strict=True):
        ours["extra_info"].update(question_seconds=0, audio_tokens=0)
        theirs["extra_info"].update(question_seconds=0, audio_tokens=0)
        assert ours == theirs


def test_clips_under_audio_dataset_are_found(make_github: MakeData) -> None:
    root = make_github({"dev": 2})
    (root / "audio_dataset").mkdir()
    (root / "dev").rename(root / "audio_dataset" / "dev")
    assert prepare_data(root, "--splits", "dev") == 0
    assert rows_of(root, "dev")[0]["audio"]["path"] == "audio_dataset/dev/0000/question.wav"


def test_spaces_and_flac_and_stereo_are_fine(make_github: MakeData, noise_clip: Any) -> None:
    root = make_github({"dev": 2}, name="my data, copy 2")
    (root / "dev/0000/question.wav").unlink()
    soundfile.write(
        root / "dev/0000/question.flac", np.random.default_rng(0).random((44_100, 2)), 44_100
    )
    assert prepare_data(root, "--splits", "dev") == 0
    row = rows_of(root, "dev")[0]
    assert row["audio"]["path"] == "dev/0000/question.flac"
    assert row["extra_info"]["audio_tokens"] == 25


def test_split_without_recorded_answers_is_prepared_and_said(
    make_github: MakeData, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_github({"dev": 3})
    for answer in (root / "dev").glob("*/answer_*.wav"):
        answer.unlink()
    assert prepare_data(root, "--splits", "dev") == 0
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
    assert prepare_data(root, "--splits", "train") == 2
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
    assert prepare_data(root, "--splits", "train", "--on-error", "skip") == 0
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
    assert prepare_data(root, "--splits", "dev") == 2
    output = capsys.readouterr().out
    for kind in ("bad-label", "missing-field", "unreadable-clip"):
        assert kind in output


def test_file_without_one_good_row_lists_its_faults_and_writes_nothing(
    make_github: MakeData, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_github({"dev": 2})
    (root / "dev.jsonl").write_text("{\n[]\n", "utf-8")
    assert prepare_data(root, "--splits", "dev") == 2
    assert capsys.readouterr().out.count("broken-json") == 3  # two lines and the sum
    assert prepare_data(root, "--splits", "dev", "--on-error", "skip") == 2
    assert "no row of split dev is left" in capsys.readouterr().err
    (root / "dev.jsonl").write_text("\n", "utf-8")
    assert prepare_data(root, "--splits", "dev") == 2
    assert "no annotations" in capsys.readouterr().err
    assert not list((root / "parquet").rglob("*.parquet"))


def test_pipe_in_place_of_a_clip_does_not_hang(
    make_github: MakeData, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_github({"dev": 2})
    (root / "dev/0001/question.wav").unlink()
    os.mkfifo(root / "dev/0001/question.wav")
    assert prepare_data(root, "--splits", "dev") == 2
    assert "not a regular file" in capsys.readouterr().out


def test_folder_link_that_stays_inside_is_fine(make_github: MakeData) -> None:
    root = make_github({"dev": 2})
    (root / "dev/0000").rename(root / "moved")
    (root / "dev/0000").symlink_to(root / "moved")
    assert prepare_data(root, "--splits", "dev") == 0


def test_named_clip_may_not_leave_the_root(
    make_huggingface: MakeData, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_huggingface({"dev": 2})
    line = root / "dev/metadata.jsonl"
    edit_line(line, 0, lambda r: r.update(question_file_name="../../other/question.wav"))
    edit_line(line, 1, lambda r: r.update(answer_file_name="0001/answer_0.wav"))
    assert prepare_data(root, "--splits", "dev") == 2
    output = capsys.readouterr().out
    assert "unsafe-path" in output and "label-contradicts-clip" in output


def test_clip_beyond_the_window_is_reported_and_kept(
    make_github: MakeData, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_github({"dev": 2})
    long = np.random.default_rng(0).standard_normal(8_000 * 301) * 0.1
    soundfile.write(root / "dev/0001/question.wav", long, 8_000)
    assert prepare_data(root, "--splits", "dev") == 0
    assert "warning: dev: 1 questions last longer than the 300 s" in capsys.readouterr().out
    assert report_of(root)["splits"]["dev"]["beyond_processor_window"] == ["0001"]
    assert rows_of(root, "dev")[1]["extra_info"]["audio_tokens"] == 7525


def test_missing_split_names_the_command_that_fetches_it(
    make_github: MakeData, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_github({"dev": 2})
    assert prepare_data(root) == 2
    assert "download_data.sh train" in capsys.readouterr().err
    assert prepare_data(root.parent / "nowhere") == 2
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


@pytest.mark.parametrize("same_text", [False, True])
def test_one_clip_for_two_questions_is_a_fault_of_both(
    make_huggingface: MakeData, capsys: pytest.CaptureFixture[str], same_text: bool
) -> None:
    root = make_huggingface({"test": 4})

    def share(record: dict[str, Any]) -> None:
        record["question_file_name"] = "0000/question.wav"
        if same_text:
            record["annotation_question"] = question_text(0)

    edit_line(root / "test/metadata.jsonl", 2, share)
    assert prepare_data(root, "--splits", "test", "--on-error", "skip") == 0
    ids = [row["extra_info"]["id"] for row in rows_of(root, "test")]
    assert ids == (["0000", "0001", "0002", "0003"] if same_text else ["0001", "0003"])
    assert ("shared-clip 2" in capsys.readouterr().out) != same_text


def test_annotations_that_cannot_be_used_leave_nothing_behind(
    make_github: MakeData, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_github(ALL)
    (root / "dev.jsonl").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert prepare_data(root) == 2
    assert "Git LFS pointer" in capsys.readouterr().err
    assert not (root / "parquet").exists()


def test_a_tokenizer_that_cannot_be_read_is_an_error_in_words(
    make_github: MakeData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer.json").write_text("<html></html>")
    root = make_github({"dev": 1})
    assert prepare_data(root, "--splits", "dev", "--tokenizer", str(tmp_path)) == 2
    said = capsys.readouterr().err
    assert "tokenizer.json is no tokenizer but a web page" in said and "Traceback" not in said
