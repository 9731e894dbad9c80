"""A recogniser that is not ours hears speech that is not ours: what the audio terms are paid for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("pocketsphinx")
pytest.importorskip("espeakng_loader")

from soundmind.data.audio import SAMPLE_RATE, Waveform, resample
from soundmind.model.folder import ModelError
from soundmind.speech.recogniser import Recogniser, open_recogniser
from soundmind.task.labels import parse_spoken_verdict
from soundmind.task.reward import compute_score

GRAMMAR = """#JSGF V1.0;
grammar ending;
public <ending> = so the answer is clear answer [not] entailed;
"""


@pytest.fixture(scope="module")
def listener(tmp_path_factory: pytest.TempPathFactory) -> Recogniser:
    folder = tmp_path_factory.mktemp("listener")
    settings = {"grammar": GRAMMAR, "phonemes": {"entailed": "EH N T EY L D"}, "beam": 1e-80}
    (folder / "grammar.json").write_text(json.dumps(settings))
    return open_recogniser(str(folder))


def spoken(text: str) -> Waveform:
    from soundmind.standin.espeak import speak

    sound, rate = speak(text, voice="en-us", speed=160)
    return resample(sound, rate, SAMPLE_RATE)


@pytest.mark.parametrize("verdict", ["entailed", "not entailed"])
def test_an_ideal_spoken_answer_earns_the_papers_maximum(
    listener: Recogniser, verdict: str
) -> None:
    sound = spoken(f"So the answer is clear. Answer: {verdict}.")
    transcript = listener.transcribe([sound])[0].text
    label = verdict.replace(" ", "-")
    assert parse_spoken_verdict(transcript) == label
    seconds = sound.size / SAMPLE_RATE
    row = {
        "response_tokens": 20,
        "reference_tokens": 20,
        "reference_seconds": seconds,
        "speech_tokens": round(50 * seconds),
        "speech_seconds": seconds,
        "speech_transcript": transcript,
    }
    response = f"<think>So the answer is clear.</think>\nAnswer: {label}"
    assert compute_score("alr", response, label, row)["score"] == pytest.approx(5.25)


def test_silence_and_noise_are_no_verdict(listener: Recogniser) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 2 * SAMPLE_RATE).astype(np.float32)
    for sound in (np.zeros(0, np.float32), np.zeros(SAMPLE_RATE, np.float32), noise):
        assert parse_spoken_verdict(listener.transcribe([sound])[0].text) is None


def test_a_clip_is_heard_the_same_in_any_company(listener: Recogniser) -> None:
    sound = spoken("So the answer is clear. Answer: entailed.")
    alone = listener.transcribe([sound])
    assert listener.transcribe([spoken("So the answer is clear."), sound])[1:] == alone


def test_a_grammar_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "grammar.json").write_text(json.dumps({"grammar": "nonsense"}))
    with pytest.raises(ModelError, match="grammar"):
        open_recogniser(str(tmp_path))
