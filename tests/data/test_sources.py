"""Faults of annotations and clips: each is named, with what is there, and none ends the pass."""

from __future__ import annotations

import base64
import gzip
import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from soundmind.data.sources import (
    Candidate,
    SourceError,
    find_split,
    read_candidate,
    read_lines,
)

Make = Callable[..., Path]


def candidates(root: Path, split: Any = "test", mode: Any = "audio") -> list[Candidate]:
    source = find_split(root, split)
    return [read_candidate(line, source, mode, True) for line in read_lines(source)]


def faults(root: Path, **keys: Any) -> list[tuple[str, str]]:
    return [(f.kind, f.detail) for c in candidates(root, **keys) for f in c.faults]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write(path: Path, lines: list[str] | list[dict[str, Any]]) -> None:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts), "utf-8")


@pytest.mark.parametrize(
    "name,words",
    [
        ("question.WAV", "rename it to question.wav"),
        ("Question.Flac", "rename it to question.flac"),
        ("question.mp3", "ffmpeg -i question.mp3 question.wav"),
        ("question.m4a", "question.m4a is there and not read"),
    ],
)
def test_a_clip_under_another_name_is_named(make_github: Make, name: str, words: str) -> None:
    root = make_github({"test": 2})
    clip = root / "test/0001/question.wav"
    clip.rename(clip.with_name(name))
    [(kind, detail)] = faults(root)
    assert kind == "missing-clip" and words in detail


def test_recorded_answers_in_another_format_are_no_absence(make_github: Make) -> None:
    root = make_github({"test": 2})
    for label in (0, 1):
        clip = root / f"test/000{label}/answer_{label}.wav"
        clip.rename(clip.with_suffix(".mp3"))
    assert [kind for kind, _ in faults(root)] == ["missing-clip"] * 2
    assert "answer_1.mp3 is there and not read" in faults(root)[1][1]


@pytest.mark.parametrize(
    "row_id,folder",
    [
        (1, "0001"),  # zeros lost in a table
        ("0001 ", "0001"),
        ("CAFE", "cafe"),
        ("caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")),  # as archives of macOS have it
    ],
)
def test_a_folder_with_nearly_the_name_is_named(
    make_github: Make, row_id: Any, folder: str
) -> None:
    root = make_github({"test": 2})
    (root / "test/0001").rename(root / "test" / folder)
    lines = lines_of(root / "test.jsonl")
    write(root / "test.jsonl", [lines[0], {**lines[1], "id": row_id}])
    [(kind, detail)] = faults(root)
    assert kind == "missing-clip" and f"{folder!r}/ is there" in detail


def test_a_clip_in_the_annotation_itself_is_one_fault_and_ends_nothing(
    make_huggingface: Make,
) -> None:
    root = make_huggingface({"test": 4})
    sound = base64.b64encode((root / "test/0001/question.wav").read_bytes()).decode()
    records = lines_of(root / "test/metadata.jsonl")
    for record, name in zip(
        records[1:], (sound, "data:audio/wav;base64,AAAA", "x" * 300), strict=True
    ):
        record["question_file_name"] = name
    write(root / "test/metadata.jsonl", records)
    found = faults(root)
    assert [kind for kind, _ in found] == ["missing-clip"] * 3
    assert "base64" in found[0][1] and "base64" in found[1][1] and "too long" in found[2][1]
    assert max(len(detail) for _, detail in found) <= 400
    assert candidates(root)[0].question_clip == "test/0000/question.wav"


@pytest.mark.parametrize(
    "content,words",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 18\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (gzip.compress(b"{}"), "gzip"),
        ('{"id": 1}\r\n'.encode("utf-16"), "UTF-16"),
        (b'[{"id": 1}]', "JSON array"),
        (b'\xef\xbb\xbf[\n {"id": 1}]', "JSON array"),
        (b'{"id": 1}\r{"id": 2}\r', "carriage return"),
        (bytes(4096), "zero bytes"),
    ],
)
def test_a_file_that_is_no_json_lines_says_what_it_is(
    make_github: Make, content: bytes, words: str
) -> None:
    root = make_github({"test": 1})
    (root / "test.jsonl").write_bytes(content)
    with pytest.raises(SourceError, match=words):
        find_split(root, "test")


def test_packed_annotations_are_named(make_github: Make) -> None:
    root = make_github({"test": 1})
    (root / "test.jsonl").rename(root / "test.jsonl.gz")
    with pytest.raises(SourceError, match=r"test\.jsonl\.gz is there and not read"):
        find_split(root, "test")


def test_joined_files_with_marks_between_are_read(make_github: Make) -> None:
    root = make_github({"test": 4})
    texts = (root / "test.jsonl").read_text("utf-8").splitlines()
    joined = "".join("\ufeff" + "\n".join(texts[i : i + 2]) + "\n" for i in (0, 2))
    (root / "test.jsonl").write_text(joined, "utf-8")
    assert faults(root) == [] and len(candidates(root)) == 4


@pytest.mark.parametrize(
    "line,kind,words",
    [
        ('{"id": "0000", "label": 0, "label": 1}', "broken-json", "label is there twice"),
        ('{"id": "0000", "a": {"x": 1, "x": 1}}', "broken-json", "x is there twice"),
        ("\0" * 512, "broken-json", "zero bytes"),
    ],
)
def test_a_line_that_two_readers_read_differently_is_a_fault(
    make_github: Make, line: str, kind: str, words: str
) -> None:
    root = make_github({"test": 2})
    texts = (root / "test.jsonl").read_text("utf-8").splitlines()
    write(root / "test.jsonl", [texts[0], line, texts[1]])
    [(found, detail)] = faults(root)
    assert found == kind and words in detail


def test_the_fields_of_both_layouts_must_agree(make_github: Make) -> None:
    root = make_github({"test": 2})
    lines = lines_of(root / "test.jsonl")
    lines[0]["annotation_question"] = lines[0]["user_content"]
    lines[1]["annotation_answer"] = "something else"
    write(root / "test.jsonl", lines)
    assert faults(root) == [("contradicting-fields", "answer and annotation_answer differ")]


def test_one_annotation_file_that_cannot_be_read_is_one_fault(make_huggingface: Make) -> None:
    root = make_huggingface({"test": 3}, metadata=False)
    path = root / "test/0001/annotation.json"
    path.unlink()
    path.mkdir()
    [(kind, detail)] = faults(root)
    assert kind == "unreadable-annotation" and "directory" in detail


def test_links_of_a_hub_cache_are_followed_and_no_others(
    make_huggingface: Make, tmp_path: Path
) -> None:
    real = make_huggingface({"test": 3}, name="real")
    blobs = tmp_path / "datasets--x--y/blobs"
    snapshot = tmp_path / "datasets--x--y/snapshots/0123abc"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(p for p in real.rglob("*") if p.is_file())):
        blob = blobs / f"{number:040x}"
        blob.write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(real)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert faults(snapshot) == []
    stray = snapshot / "test/0001/question.wav"
    stray.unlink()
    stray.symlink_to(real / "test/0001/question.wav")
    assert [kind for kind, _ in faults(snapshot)] == ["link-leaves-root"]
