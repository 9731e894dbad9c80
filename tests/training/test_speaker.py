"""What a rank makes of rows that cannot be spoken or heard, on the stand-in of random weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("verl")

from processes import REPOSITORY, clean_environment
from speech_rank import SETTINGS

from soundmind.training.speech import Speaker

ROWS, PROMPT = 4, 6


@pytest.fixture(scope="module")
def speaker(random_stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> Speaker:
    whisper = tmp_path_factory.mktemp("whisper")
    script = REPOSITORY / "tests/support/tiny_whisper.py"
    subprocess.run([sys.executable, str(script), str(whisper)], check=True, env=clean_environment())
    settings = {**SETTINGS, "model": str(random_stand_in), "stage": "transcript"}
    settings["transcript"] = {"recogniser": str(whisper), "seconds": 0.2}
    return Speaker(settings, "cpu")


def speak(speaker: Speaker, states: list[Any], *, audited: int = -1) -> list[dict[str, Any]]:
    marks = torch.randn(3, states[0].shape[1], generator=torch.Generator().manual_seed(9))
    seeds = list(range(len(states)))
    return speaker.speak(
        states, [PROMPT] * len(states), marks, seeds, [row == audited for row in seeds]
    )


def states() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(PROMPT + 2 + row, 128, generator=generator) for row in range(ROWS)]


def test_every_row_says_what_it_says_alone(speaker: Speaker) -> None:
    rows = states()
    together = speak(speaker, rows)
    assert [row["codes_digest"] for row in together] == [
        speak(speaker, [row])[0]["codes_digest"] for row in rows
    ]
    assert {row["speech_tokens"] for row in together} == {24}  # cut at half a second
    assert {row["speech_transcript"] for row in together} == {""}  # and so without an end


def test_states_that_are_not_finite_fail_their_row_alone(speaker: Speaker) -> None:
    rows = states()
    rows[1][0, 0] = torch.inf
    found = speak(speaker, rows)
    assert ["speech_error" in row for row in found] == [False, True, False, False]
    assert "not finite" in found[1]["speech_error"]


def test_a_response_of_the_end_token_alone_is_silent(speaker: Speaker) -> None:
    found = speak(speaker, [*states(), torch.randn(PROMPT, 128)])
    assert (found[-1]["speech_tokens"], found[-1]["speech_ended"]) == (0, True)
    assert found[-1]["speech_transcript"] == "" and "speech_error" not in found[-1]


@pytest.fixture
def ending(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that end, so that they are heard."""
    from soundmind.speech.decoding import Codes

    monkeypatch.setattr(
        speaker.talker,
        "speak",
        lambda inputs, *_: [Codes((row + 1, 7, 9) * 10, True) for row in range(len(inputs))],
    )


def test_what_is_heard_is_the_end(speaker: Speaker, ending: None) -> None:
    lengths = []
    heard = speaker._recogniser.transcribe

    def note(clips: Any) -> Any:
        lengths.extend(clip.size for clip in clips)
        return heard(clips)

    speaker._recogniser.transcribe = note
    try:
        found = speak(speaker, states(), audited=2)
    finally:
        speaker._recogniser.transcribe = heard
    assert all(row["speech_transcript"] for row in found)
    assert lengths == [3200] * ROWS + [9600]  # 0.2 s of each, all of the audited one
    assert [row for row, line in enumerate(found) if "audit_transcript" in line] == [2]


@pytest.mark.parametrize("part", ["vocoder", "recogniser"])
def test_a_part_that_raises_fails_the_row_it_raises_for(
    speaker: Speaker, ending: None, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if part == "vocoder":
        tail = speaker._vocoder.tail

        def broken(codes: Any, *rest: Any) -> Any:
            if codes[0] == 4:
                raise torch.OutOfMemoryError("no memory")
            return tail(codes, *rest)

        monkeypatch.setattr(speaker._vocoder, "tail", broken)
    else:
        monkeypatch.setattr(
            speaker._vocoder,
            "tail",
            lambda codes, *_: np.full(4800, 0.1 * codes[0], np.float32),
        )
        transcribe = speaker._recogniser.transcribe

        def deaf(clips: Any) -> Any:
            if any(abs(float(clip[1000]) - 0.4) < 0.05 for clip in clips):
                raise RuntimeError("nothing heard")
            return transcribe(clips)

        monkeypatch.setattr(speaker._recogniser, "transcribe", deaf)
    found = speak(speaker, states())
    assert [row for row, line in enumerate(found) if "speech_error" in line] == [3]
    assert found[3]["speech_error"].startswith(f"{part}:")
