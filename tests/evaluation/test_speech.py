"""Spoken answers of the stand-in: talker, vocoder and recogniser of random weights, real code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
from processes import REPOSITORY, clean_environment

from soundmind.evaluation.store import read_predictions

pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
pytest.importorskip("jiwer")

ROWS = 2


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whisper")
    script = REPOSITORY / "tests/support/tiny_whisper.py"
    subprocess.run([sys.executable, str(script), str(folder)], check=True, env=clean_environment())
    return folder


@pytest.fixture(scope="module")
def speak(
    tmp_path_factory: pytest.TempPathFactory, random_stand_in: Path, whisper: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the speech evaluation of two practice rows into a folder."""
    folder = tmp_path_factory.mktemp("speech")
    prepare = [sys.executable, "-m", "soundmind.preprocess", "--mode", "audio"]
    where = ["--data-dir", str(REPOSITORY / "data/sample"), "--output-dir", str(folder)]
    task = ["--task", "practice", "--splits", "test", "--tokenizer", str(random_stand_in)]
    subprocess.run(
        [*prepare, *where, *task],
        check=True,
        cwd=REPOSITORY,
        env=clean_environment(),
        capture_output=True,
    )

    def run(output: Path, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "soundmind.evaluate", "--output-modality", "speech"]
        inputs = ["--model", str(random_stand_in), "--data", str(folder / "audio/test.parquet")]
        limits = ["--limit", str(ROWS), "--max-tokens", "8", "--max-speech-seconds", "0.6"]
        return subprocess.run(
            [
                *command,
                *inputs,
                *limits,
                "--output-dir",
                str(output),
                "--recogniser",
                str(whisper),
                "--talker-temperature",
                "0",
                *more,
            ],
            cwd=REPOSITORY,
            env=clean_environment(),
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture(scope="module")
def spoken(
    tmp_path_factory: pytest.TempPathFactory,
    speak: Callable[..., subprocess.CompletedProcess[str]],
) -> Path:
    output = tmp_path_factory.mktemp("spoken") / "out"
    result = speak(output, "--speech-engine", "reference")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "Practice output of a stand-in model, no result" in result.stdout
    return output


def test_speech_lies_beside_the_predictions_at_24_khz(spoken: Path) -> None:
    lines = read_predictions(spoken)
    assert len(lines) == ROWS
    for line in lines:
        assert line["error"] is None
        info = soundfile.info(spoken / line["speech_audio"])
        assert (info.samplerate, info.channels, info.subtype) == (24_000, 1, "PCM_16")
        assert info.duration == pytest.approx(line["speech_seconds"])
        assert line["speech_tokens"] * 480 == info.frames  # 50 codec tokens a second
        assert line["speech_transcript"].strip()


def test_what_defines_the_word_error_rate_stands_beside_it(spoken: Path, whisper: Path) -> None:
    import jiwer

    from soundmind.evaluation.transcripts import saved_normaliser

    speech = json.loads((spoken / "metrics.json").read_text())["speech"]
    assert speech["recogniser"] == str(whisper)
    assert "1 spellings" in speech["normaliser"]
    normalise, _ = saved_normaliser(spoken)
    lines = read_predictions(spoken)
    texts = [normalise(line["response"]) for line in lines]
    heard = [normalise(line["speech_transcript"]) for line in lines]
    if all(text.split() for text in texts):
        assert speech["wer"]["value"] == pytest.approx(jiwer.wer(texts, heard))
    assert {"substitutions", "deletions", "insertions"} <= speech["wer"].keys()
    assert speech["accuracy_from_text"]["n"] == speech["accuracy_from_transcript"]["n"] == ROWS


def test_the_page_plays_question_and_answer(spoken: Path) -> None:
    page = (spoken / "report.html").read_text()
    assert "WER %" in page and "Response as spoken" in page


@pytest.fixture(scope="module")
def batched(
    tmp_path_factory: pytest.TempPathFactory,
    spoken: Path,
    speak: Callable[..., subprocess.CompletedProcess[str]],
) -> Path:
    """The same rows by the batched engine, from the same text."""
    output = tmp_path_factory.mktemp("batched") / "out"
    output.mkdir()
    (output / "text.jsonl").write_bytes((spoken / "text.jsonl").read_bytes())
    result = speak(output)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return output


def assert_same(ours: Path, theirs: Path) -> None:
    """Lines, codes and sound, byte for byte but for times."""
    lines = [[*map(facts, read_predictions(folder))] for folder in (ours, theirs)]
    assert lines[0] == lines[1]
    for line in lines[0]:
        assert (ours / line["speech_audio"]).read_bytes() == (
            theirs / line["speech_audio"]
        ).read_bytes()
    for file in (theirs / "codes").iterdir():
        assert (ours / "codes" / file.name).read_bytes() == file.read_bytes()


def test_the_batched_engine_says_what_generate_says(batched: Path, spoken: Path) -> None:
    assert_same(batched, spoken)


def test_an_evaluation_killed_in_any_stage_ends_the_same(
    batched: Path, speak: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(batched, output)
    lines = read_predictions(batched)
    (output / "predictions.jsonl").write_text("{")  # transcripts: a line cut short
    sound = output / lines[0]["speech_audio"]
    sound.rename(sound.with_name(sound.name + ".tmp"))  # sound: a file that was not finished
    (output / lines[1]["speech_audio"]).unlink()
    (output / "codes/00001.json").unlink()  # codes: half of the rows
    result = speak(output)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert_same(output, batched)


def test_answers_of_another_engine_are_not_continued(
    spoken: Path, speak: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    result = speak(spoken)
    assert result.returncode == 2 and "another evaluation" in result.stderr


def facts(line: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in line.items() if k not in ("seconds", "question_audio")}


def test_windows_in_which_the_recogniser_loops_are_counted(spoken: Path) -> None:
    speech = json.loads((spoken / "metrics.json").read_text())["speech"]
    # A recogniser of random weights never stops by itself.
    assert speech["windows"] == {"n": ROWS, "looped": ROWS}
    assert speech["wer_without_loops"]["clips"] == 0


def test_more_speech_than_positions_is_refused_before_anything_runs(
    speak: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    result = speak(tmp_path / "out", "--max-speech-seconds", "700")
    assert result.returncode == 2
    assert "35000 codec tokens" in result.stderr and "Traceback" not in result.stderr


def test_an_unknown_voice_names_the_known_ones(
    speak: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    result = speak(tmp_path / "out", "--speaker", "Nobody")
    assert result.returncode == 2
    assert "no voice 'Nobody'" in result.stderr and "Chelsie" in result.stderr
