"""Clips: how they sound, who may make them, and which are refused."""

from __future__ import annotations

import io
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from scripted_server import ScriptedServer

from soundmind.making import engines
from soundmind.making.engines import Command, Engine, Espeak, Server, pieces
from soundmind.making.sound import LOUDNESS, RATE, ClipFault, Utterance, decode, even
from soundmind.making.speech import make_all
from soundmind.system.chat import Client
from soundmind.system.errors import UserError
from soundmind.system.journal import Journal

TEXT = "Every boluk that lives near the river is a tarim, and Rex is one of them."


def make(
    engine: Engine, folder: Path, texts: list[str], voice: str = "en-us", **keys: Any
) -> list[dict[str, Any]]:
    """Journal entries of the texts, each with the clip's path."""
    utterances = [Utterance(text, voice, engine.describe()) for text in texts]
    with Journal(folder / "clips.jsonl") as journal:
        make_all(utterances, engine, folder / "clips", journal, keys.pop("workers", 1), **keys)
        return [{**journal.entries[u.key], "path": u.path(folder / "clips")} for u in utterances]


def tone(seconds: float, rate: int = RATE, level: float = 0.1) -> np.ndarray:
    """A hum as loud as speech."""
    return level * np.sin(np.arange(round(seconds * rate)) * 0.1).astype(np.float32)


def encoded(samples: np.ndarray, rate: int = RATE) -> bytes:
    """The samples as a wav file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV")
    return file.getvalue()


def script(folder: Path, code: str) -> str:
    """A command line that runs `code` with {voice}, {output} and {text} as its arguments."""
    path = folder / "own engine.py"
    path.write_text("import sys, time\nvoice, output, text = sys.argv[1:4]\n" + code)
    return f"{shlex.quote(sys.executable)} {shlex.quote(str(path))} {{voice}} {{output}} {{text}}"


# -- every clip -----------------------------------------------------------------------------------


@pytest.mark.parametrize("voice", ["en-us", "en-us+f2", "en-gb+m1"])
def test_a_clip_is_24_khz_16_bit_mono_and_as_loud_as_any_other(voice: str, tmp_path: Path) -> None:
    entry = make(Espeak(), tmp_path, [TEXT], voice)[0]
    info = soundfile.info(entry["path"])
    assert (info.samplerate, info.channels, info.subtype) == (24_000, 1, "PCM_16")
    assert info.duration == pytest.approx(entry["seconds"], abs=0.001)
    samples, _ = soundfile.read(entry["path"])
    frames = np.square(samples[: len(samples) // 1200 * 1200].reshape(-1, 1200)).mean(axis=1)
    loud = frames[frames > frames.max() * 1e-3].mean()
    assert 10 * np.log10(loud) == pytest.approx(LOUDNESS, abs=0.5)
    assert np.abs(samples).max() < 0.9


def test_loudness_does_not_depend_on_that_of_the_engine() -> None:
    quiet, loud = (even(tone(3, level=level), RATE, 8) for level in (0.02, 0.9))
    np.testing.assert_allclose(quiet, loud, atol=1e-4)


def test_clips_are_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    texts = [f"This is number {n} of them." for n in ("one", "two", "three", "four", "five")]
    found = [
        [
            entry["path"].read_bytes()
            for entry in make(Espeak(), tmp_path / str(n), texts, workers=n)
        ]
        for n in (1, 3)
    ]
    assert found[0] == found[1]


def test_a_clip_is_made_once_and_anew_where_its_file_was_cut(tmp_path: Path) -> None:
    path = make(Espeak(), tmp_path, [TEXT])[0]["path"]
    whole, made = path.read_bytes(), path.stat().st_mtime_ns
    make(Espeak(), tmp_path, [TEXT])
    assert path.stat().st_mtime_ns == made
    path.write_bytes(whole[:1000])
    make(Espeak(), tmp_path, [TEXT])
    assert path.read_bytes() == whole


def test_other_words_voice_speed_or_attempt_are_another_clip() -> None:
    base = Utterance("a", "v", "e")
    others = [Utterance("b", "v", "e"), Utterance("a", "w", "e"), Utterance("a", "v", "f")]
    assert len({base.key, Utterance("a", "v", "e", 1).key, *(u.key for u in others)}) == 5
    assert Espeak(160).describe() != Espeak(165).describe()


@pytest.mark.parametrize(
    ("samples", "fault"),
    [
        (np.zeros(5 * RATE), "silent"),
        (tone(5, level=1e-4), "silent"),
        (np.concatenate([tone(0.1), np.zeros(5 * RATE)]), "silent"),
        (tone(40), "endless"),
        (tone(0.2), "cut"),
        (np.zeros(0), "broken-clip"),
        (np.full(5 * RATE, np.nan), "broken-clip"),
    ],
    ids=["silent", "faint", "a click", "endless", "cut", "empty", "no numbers"],
)
def test_a_clip_that_is_no_speech_of_ten_words_is_refused(samples: np.ndarray, fault: str) -> None:
    with pytest.raises(ClipFault) as error:
        even(samples, RATE, 10)
    assert error.value.reason == fault


def test_a_text_without_spaces_has_a_word_for_every_sign(tmp_path: Path) -> None:
    code = (
        "import soundfile, numpy\n"
        "soundfile.write(output, numpy.sin(numpy.arange(24_000 * 8) * 0.1) * 0.1, 24_000)\n"
    )
    text = "所有的人都会死而苏格拉底是人所以苏格拉底会死"
    assert make(Command(script(tmp_path, code)), tmp_path, [text])[0]["fault"] is None


def test_stereo_at_another_rate_comes_out_as_mono_of_the_same_length() -> None:
    stereo = np.stack([tone(3, 44_100), tone(3, 44_100)], axis=1)
    assert even(stereo, 44_100, 10).shape == (3 * RATE,)


@pytest.mark.parametrize("data", [b"", b"<html>no</html>", encoded(tone(1))[:20]])
def test_bytes_that_are_no_sound_are_a_fault(data: bytes) -> None:
    with pytest.raises(ClipFault):
        decode(data)


# -- engines --------------------------------------------------------------------------------------


@pytest.mark.parametrize("voice", ["klingon", "en-us+nobody", ""])
def test_a_voice_that_espeak_does_not_have_is_said_before_anything_is_spoken(voice: str) -> None:
    with pytest.raises(UserError, match="voice"):
        Espeak().check(["en-us", voice])


def test_a_command_gets_voice_and_text_and_its_sound_is_kept(tmp_path: Path) -> None:
    code = (
        "import soundfile, numpy\n"
        "assert voice == 'anna k' and open(text).read() == sys.stdin.read()\n"
        "soundfile.write(output, numpy.sin(numpy.arange(90_000) * 0.1) * 0.1, 16_000)\n"
    )
    engine = Command(script(tmp_path, code))
    entry = make(engine, tmp_path, [TEXT], "anna k")[0]
    assert entry["fault"] is None and entry["seconds"] == pytest.approx(90_000 / 16_000, abs=0.01)


@pytest.mark.parametrize(
    ("code", "fault", "detail"),
    [
        ("sys.exit('no such voice: ' + voice)", "no-speech", "no such voice: nobody"),
        ("pass", "no-speech", "wrote no file"),
        ("open(output, 'w').write('text')", "broken-clip", "no sound"),
        ("time.sleep(60)", "timeout", "no end"),
        (
            "f = open(output, 'wb')\nwhile True: f.write(bytes(1 << 16)); f.flush()",
            "endless",
            "bytes",
        ),
        ("while True: print('x' * 60_000, flush=True)", "endless", "bytes"),
    ],
    ids=["fails", "no file", "no sound", "hangs", "endless file", "endless talk"],
)
def test_a_command_that_misbehaves_is_a_fault_of_its_clip(
    code: str, fault: str, detail: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "LARGEST_FILE", 4 << 20)
    timeout = 1.0 if fault == "timeout" else 30.0
    entry = make(Command(script(tmp_path, code), timeout), tmp_path, [TEXT], "nobody")[0]
    assert entry["fault"] == fault and detail in entry["detail"]


@pytest.mark.parametrize("template", ["", "no-such-program {output}", "ls", "ls {output} 'open"])
def test_a_command_line_that_cannot_work_is_said_at_once(template: str) -> None:
    with pytest.raises(UserError, match="speech-command"):
        Command(template).check(["v"])


def test_an_engine_that_always_fails_is_given_up(tmp_path: Path) -> None:
    engine = Command(script(tmp_path, "sys.exit(1)"))
    with pytest.raises(UserError, match="3 clips in a row"):
        make(engine, tmp_path, [f"{TEXT} {n}" for n in range(9)], patience=3)


def spoken(body: dict[str, Any]) -> tuple[int, bytes]:
    """A server's sound: as long as the text, as high as its first letter."""
    if body["voice"] == "nobody":
        return 400, b"unknown voice nobody"
    pitch = 0.02 * (1 + ord(body["input"][0]) % 7)
    seconds = 0.4 * len(body["input"].split())
    samples = 0.1 * np.sin(np.arange(round(seconds * RATE)) * pitch)
    return 200, encoded(samples.astype(np.float32))


def server_engine(url: str, longest: int = 4000) -> Server:
    return Server(Client(url, "tts", first_pause=0.01, tries=2), longest)


def test_a_server_speaks_long_texts_in_pieces_put_together_in_order(tmp_path: Path) -> None:
    text = "All of them sing. Nobody at all does. Perhaps some of them dance."
    with ScriptedServer(spoken) as server:
        entry = make(server_engine(server.url, 30), tmp_path, [text])[0]
        assert [body["input"] for body in server.bodies] == [
            "All of them sing.",
            "Nobody at all does.",
            "Perhaps some of them dance.",
        ]
        assert {(b["model"], b["voice"], b["response_format"]) for b in server.bodies} == {
            ("tts", "en-us", "wav")
        }
    assert entry["fault"] is None and entry["seconds"] == pytest.approx(0.4 * 13, abs=0.01)
    assert list(tmp_path.rglob("*.part")) == []


def test_pieces_that_arrived_before_a_failure_are_not_asked_again(tmp_path: Path) -> None:
    text = "All of them sing. Nobody at all does."
    broken = [True]

    def reply(body: dict[str, Any]) -> tuple[int, bytes]:
        return (500, b"") if broken[0] and body["input"][0] == "N" else spoken(body)

    with ScriptedServer(reply) as server:
        engine = server_engine(server.url, 20)
        assert make(engine, tmp_path, [text])[0]["fault"] == "no-speech"
        broken[0] = False
        assert make(engine, tmp_path, [text])[0]["fault"] is None
        asked = [body["input"][0] for body in server.bodies]
    assert asked == ["A", "N", "N", "N"]


def test_a_voice_that_the_server_does_not_have_is_a_fault_with_its_words(tmp_path: Path) -> None:
    with ScriptedServer(spoken) as server:
        entry = make(server_engine(server.url), tmp_path, [TEXT], "nobody")[0]
    assert entry["fault"] == "no-speech" and "unknown voice nobody" in entry["detail"]


def test_pieces_lose_no_word_and_keep_their_limit() -> None:
    text = "One two three. Four! Five six? " + "word " * 30 + "end. " + "x" * 50
    for longest in (12, 20, 40, 1000):
        cut = pieces(text, longest)
        assert "".join(cut).replace(" ", "") == text.replace(" ", "")
        assert max(map(len, cut)) <= longest
