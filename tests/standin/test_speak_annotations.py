from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from soundmind import preprocess
from soundmind.data.audio import probe_clip

pytest.importorskip("espeakng_loader")
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "speak_annotations.py"
MakeData = Callable[..., Path]


def speak(annotations: Path, output: Path, *arguments: str) -> str:
    command = [sys.executable, str(SCRIPT), str(annotations), str(output), "--workers", "1"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_spoken_annotations_can_be_prepared_and_are_not_spoken_twice(
    make_github: MakeData, tmp_path: Path
) -> None:
    root, output = make_github({"dev": 3}, clips=False), tmp_path / "spoken out loud"
    said = speak(root / "dev.jsonl", output, "--limit", "2", "--answers")
    assert "stand-in voice" in said and "4 clips, 4 of them new" in said
    first = (output / "dev/0000/question.wav").stat().st_mtime_ns
    (output / "dev/0001/answer_1.wav").unlink()  # as if the run had been stopped
    assert "6 clips, 3 of them new" in speak(root / "dev.jsonl", output, "--answers")
    assert (output / "dev/0000/question.wav").stat().st_mtime_ns == first
    assert probe_clip(output / "dev/0002/question.wav").seconds > 3
    arguments = ["--mode", "audio", "--data-dir", str(output), "--splits", "dev"]
    assert preprocess.main([*arguments, "--tokenizer", "none"]) == 0


def test_changed_text_or_voice_is_spoken_again(make_github: MakeData, tmp_path: Path) -> None:
    annotations, output = make_github({"dev": 2}, clips=False) / "dev.jsonl", tmp_path / "spoken"
    speak(annotations, output)
    lines = [json.loads(line) for line in annotations.read_text("utf-8").splitlines()]
    lines[1]["user_content"] = "Something else."
    annotations.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    assert "2 clips, 1 of them new" in speak(annotations, output)
    assert "2 clips, 2 of them new" in speak(annotations, output, "--voice", "en-gb")
