"""espeak-ng through ctypes. Skipped where its wheel is not installed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from soundmind.standin import espeak

pytest.importorskip("espeakng_loader")

SENTENCE = "All wugs are daxes, Rex is a wug, so Rex is a dax."


def digest(text: str, voice: str, speed: int = 200, pitch: int = 50) -> str:
    waveform, _ = espeak.speak(text, voice=voice, speed=speed, pitch=pitch)
    return hashlib.sha256(waveform.tobytes()).hexdigest()


def test_a_sentence_is_float32_mono_of_plausible_length_and_level() -> None:
    waveform, rate = espeak.speak(SENTENCE, speed=200)
    assert rate == 22_050
    assert waveform.dtype == np.float32 and waveform.ndim == 1
    assert 2.0 < len(waveform) / rate < 5.0
    assert 0.1 < np.abs(waveform).max() <= 1.0


def test_utterances_are_the_same_bytes_in_any_order() -> None:
    jobs = [(SENTENCE, f"en-us+{variant}") for variant in ("m1", "f3", "steph", "m7", "f5")]
    jobs += [("Tom is a blicket.", "en-gb+f4"), ("Lily is a fep.", "en-gb+m3")]
    forward = [digest(*job) for job in jobs]
    backward = [digest(*job) for job in reversed(jobs)]
    assert forward == backward[::-1]
    assert len(set(forward)) == len(jobs)


def test_another_process_speaks_the_same_bytes() -> None:
    code = (
        "import hashlib; from soundmind.standin import espeak; "
        f"w, _ = espeak.speak({SENTENCE!r}, voice='en-gb+f2', speed=200, pitch=50); "
        "print(hashlib.sha256(w.tobytes()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    digest("something else before", "en-us+m8")
    assert other.stdout.strip() == digest(SENTENCE, "en-gb+f2")


def test_voice_speed_and_pitch_all_change_the_sound() -> None:
    plain = digest(SENTENCE, "en-us")
    assert plain != digest(SENTENCE, "en-gb")
    assert plain != digest(SENTENCE, "en-us", pitch=60)
    slow, _ = espeak.speak(SENTENCE, speed=150)
    fast, _ = espeak.speak(SENTENCE, speed=250)
    assert len(fast) < 0.8 * len(slow)


def test_an_unknown_variant_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(espeak.SpeechError, match=r"no voice 'en-us\+nobody'.*steph"):
        espeak.speak(SENTENCE, voice="en-us+nobody")
    with pytest.raises(espeak.SpeechError, match="no voice 'tlh-nowhere'"):
        espeak.speak(SENTENCE, voice="tlh-nowhere")


def test_an_error_leaves_the_next_utterance_untouched() -> None:
    before = digest(SENTENCE, "en-us+f1")
    with pytest.raises(espeak.SpeechError):
        espeak.speak(SENTENCE, voice="en-us+nobody")
    assert digest(SENTENCE, "en-us+f1") == before


@pytest.mark.parametrize("text", ["", "  \n"])
def test_silence_is_an_error(text: str) -> None:
    with pytest.raises(espeak.SpeechError, match="nothing to say"):
        espeak.speak(text)


def test_values_espeak_would_clamp_are_errors() -> None:
    with pytest.raises(espeak.SpeechError, match="speed 20"):
        espeak.speak(SENTENCE, speed=20)
    with pytest.raises(espeak.SpeechError, match="pitch 100"):
        espeak.speak(SENTENCE, pitch=100)


def test_a_missing_wheel_names_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    espeak._paths.cache_clear()
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(espeak.SpeechError, match="pip install espeakng-loader"):
        espeak.speak(SENTENCE)
    monkeypatch.undo()
    espeak._paths.cache_clear()


def test_data_in_a_very_deep_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import espeakng_loader

    expected = digest(SENTENCE, "en-us+f3")
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    (deep / "espeak-ng-data").symlink_to(espeakng_loader.get_data_path())
    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: str(deep / "espeak-ng-data"))
    espeak._paths.cache_clear()
    try:
        assert digest(SENTENCE, "en-us+f3") == expected
    finally:
        espeak._paths.cache_clear()


def test_the_command_writes_a_wav_file(tmp_path: Path) -> None:
    import soundfile

    target = tmp_path / "rex.wav"
    assert espeak.main(["Rex is a dax.", "--voice", "en-us+f3", "--output", str(target)]) == 0
    assert soundfile.info(target).samplerate == 22_050
