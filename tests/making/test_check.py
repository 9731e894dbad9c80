"""A recogniser hears every clip: what it does not understand is said again, or dropped."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from soundmind.making.check import ListeningCommand, ListeningModel, error_rate, hear_all
from soundmind.making.sound import ClipFault, Utterance
from soundmind.making.words import Wording
from soundmind.system.errors import UserError
from soundmind.system.journal import Journal

WORDING = Wording.load()


class Ears:
    """A listener that says what it is told, by file name."""

    at_once = 2

    def __init__(self, heard: dict[str, str]) -> None:
        self.heard, self.asked = heard, 0

    def describe(self) -> str:
        return "ears"

    def hear(self, clip: Path) -> str:
        self.asked += 1
        if clip.stem not in self.heard:
            raise ClipFault("no-speech", "deaf")
        return self.heard[clip.stem]


@pytest.mark.parametrize(
    ("wanted", "heard", "rate"),
    [
        ("in twenty twenty-four, five percent", "In 2024 5%", 0.0),
        ("Doctor Wu said it's fine.", "Dr. Wu said its fine", 0.0),
        ("one two three four", "one two four", 0.25),
        ("one two", "", 1.0),
    ],
)
def test_the_error_rate_compares_spoken_words(wanted: str, heard: str, rate: float) -> None:
    assert error_rate(wanted, heard, WORDING) == rate


def test_a_clip_is_heard_once_and_a_failure_counts_as_all_wrong_and_is_tried_again(
    tmp_path: Path,
) -> None:
    good, bad = Utterance("one two", "v", "e"), Utterance("three four", "v", "e")
    ears = Ears({good.key: "one two"})
    for _ in range(2):
        with Journal(tmp_path / "heard.jsonl") as journal:
            rates = hear_all([good, bad], ears, WORDING, tmp_path, journal)
        assert rates == {good.key: 0.0, bad.key: 1.0}
    assert ears.asked == 3


def test_a_recogniser_that_always_fails_is_given_up(tmp_path: Path) -> None:
    utterances = [Utterance(f"text {n}", "v", "e") for n in range(30)]
    with (
        Journal(tmp_path / "heard.jsonl") as journal,
        pytest.raises(UserError, match=r"in a row.*deaf"),
    ):
        hear_all(utterances, Ears({}), WORDING, tmp_path, journal)


def test_a_recogniser_of_the_speech_room_hears_the_clip_at_16_khz(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recogniser = pytest.importorskip("soundmind.speech.recogniser")

    class Counting:
        def describe(self) -> dict[str, str]:
            return {"name": "counting", "digest": "0"}

        def transcribe(self, waveforms: list[np.ndarray]) -> list[object]:
            return [recogniser.Transcript(f"{wave.size} samples", 1) for wave in waveforms]

    monkeypatch.setattr(recogniser, "open_recogniser", lambda name: Counting())
    clip = tmp_path / "clip.wav"
    soundfile.write(clip, 0.1 * np.sin(np.arange(48_000) * 0.1), 24_000)
    listener = ListeningModel("any")
    assert listener.describe() == "counting 0"
    assert listener.hear(clip) == "32000 samples"


def test_a_command_hears_a_clip(tmp_path: Path) -> None:
    clip = tmp_path / "a clip.wav"
    soundfile.write(clip, np.zeros(1200), 24_000)
    own = tmp_path / "ears.py"
    own.write_text("import soundfile, sys; print(len(soundfile.read(sys.argv[1])[0]), 'samples')")
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(own))} {{audio}}"
    assert ListeningCommand(command).hear(clip) == "1200 samples"
    with pytest.raises(UserError, match="recogniser-command"):
        ListeningCommand("ls").hear(clip)
