"""Spoken answers of the stand-in: talker, vocoder and recogniser of random weights, real code."""

from __future__ import annotations

import json
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
    result = speak(output)
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


def test_a_row_spoken_after_a_kill_says_the_same(
    spoken: Path,
    speak: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.yaml").write_bytes((spoken / "config.yaml").read_bytes())
    first, second = (spoken / "predictions.jsonl").read_text().splitlines(keepends=True)
    (output / "predictions.jsonl").write_text(first + second[:30])
    result = speak(output)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "continuing: 1 of 2" in result.stdout
    ours, theirs = ([*map(facts, read_predictions(folder))] for folder in (output, spoken))
    assert ours == theirs
    name = theirs[1]["speech_audio"]
    assert (output / name).read_bytes() == (spoken / name).read_bytes()


def facts(line: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in line.items() if k not in ("seconds", "question_audio")}


def test_an_unknown_voice_names_the_known_ones(
    speak: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    result = speak(tmp_path / "out", "--speaker", "Nobody")
    assert result.returncode == 2
    assert "no voice 'Nobody'" in result.stderr and "Chelsie" in result.stderr


def test_windows_of_the_vocoder_join_to_the_length_of_one_piece() -> None:
    from soundmind.evaluation.speech import CONTEXT_CODES, WindowedVocoder

    class Echo(torch.nn.Module):  # type: ignore[name-defined,misc]
        """Four samples per code, each the code's own number."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.longest = 0

        def forward(self, codes: Any, **_: Any) -> Any:
            self.longest = max(self.longest, codes.shape[1])
            return codes.repeat_interleave(4).float()

    for total in (1, 99, 100, 101, 150, 151, 200, 777):
        echo = Echo()
        codes = torch.arange(total).unsqueeze(0)
        sound = WindowedVocoder(echo, window=100)(codes)
        assert torch.equal(sound, codes.repeat_interleave(4).float())
        assert echo.longest <= 100 + 2 * CONTEXT_CODES
    with pytest.raises(ValueError, match="no codec token"):
        WindowedVocoder(Echo())(torch.zeros(1, 0, dtype=torch.long))
