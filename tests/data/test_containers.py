from __future__ import annotations

import importlib.util
import io
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from processes import REPOSITORY

from soundmind.data.audio import ClipError, load_waveform, probe_clip

RATE = 16_000
WAVE = 0.3 * np.sin(2 * np.pi * 220 * np.arange(RATE) / RATE)


def load_fuzz() -> Any:
    """benchmarks/clips.py as a module."""
    path = REPOSITORY / "benchmarks/clips.py"
    spec = importlib.util.spec_from_file_location("clips_benchmark", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


FUZZ = load_fuzz()
WHOLE = FUZZ.encodings()


def wav(sound: bytes, size: int | None = None, behind: bytes = b"", before: bytes = b"") -> bytes:
    """16-bit mono at 16 kHz; `size` is what the header says of the sound."""
    header = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    body = b"WAVE" + header + before + b"data"
    body += struct.pack("<I", len(sound) if size is None else size) + sound + behind
    return b"RIFF" + struct.pack("<I", len(body)) + body


SOUND = (WAVE * 32_767).astype("<i2").tobytes()


def refusal(content: bytes) -> ClipError:
    """The error of both ways in, which must be the same."""
    with pytest.raises(ClipError) as probed:
        probe_clip(content)
    with pytest.raises(ClipError) as loaded:
        load_waveform(content)
    assert (probed.value.kind, str(probed.value)) == (loaded.value.kind, str(loaded.value))
    return probed.value


def seconds(content: bytes) -> float:
    """The length of both ways in, which must be the same."""
    info = probe_clip(content)
    assert info.num_samples == len(load_waveform(content))
    return info.seconds


def encode(samples: np.ndarray, **keys: Any) -> bytes:
    content = io.BytesIO()
    soundfile.write(
        content, samples, keys.pop("rate", RATE), format=keys.pop("format", "WAV"), **keys
    )
    return content.getvalue()


@pytest.mark.parametrize("name", WHOLE)
def test_every_encoding_is_read_whole_and_named_when_cut(name: str) -> None:
    content = WHOLE[name]
    assert seconds(content) == pytest.approx(0.3, abs=0.35)  # blocks and 8 kHz lengthen some
    for share in (0.6, 0.9, 0.99):
        assert refusal(content[: int(len(content) * share)]).kind == "truncated-clip", share


@pytest.mark.parametrize("name", WHOLE)
def test_two_files_in_one_are_refused_and_not_heard_by_half(name: str) -> None:
    assert refusal(WHOLE[name] * 2).kind == "unreadable-clip"


def test_a_container_whose_end_is_unknown_is_not_read() -> None:
    known = set(FUZZ.READ_FORMATS)
    for container in (
        set(soundfile.available_formats()) - known - {"RAW", "SD2"}
    ):  # SD2 writes a second file
        subtype = "PCM_16" if "PCM_16" in soundfile.available_subtypes(container) else None
        try:
            content = encode(WAVE, format=container, subtype=subtype)
        except (soundfile.LibsndfileError, ValueError, TypeError):
            continue
        error = refusal(content)
        assert error.kind == "unreadable-clip" and "Clips are wav" in str(error), container


@pytest.mark.parametrize(
    "size", [0xFFFFFFFF, 0xFFFFFFFF - 36, 0x80000000, 0x7FFFFFFF, 0x7FFFF000, 0x7FFFFFFF - 36]
)
def test_a_size_left_open_by_a_pipe_is_read_to_the_end(size: int) -> None:
    assert seconds(wav(SOUND, size)) == 1.0


def test_a_size_that_was_never_filled_in_is_said() -> None:
    error = refusal(wav(SOUND, 0))
    assert error.kind == "empty-clip" and "32,000 bytes follow" in str(error)


def test_sound_behind_the_counted_sound_is_not_left_out_in_silence() -> None:
    assert "16,000 bytes lie behind" in str(refusal(wav(SOUND, len(SOUND) // 2)))
    half = len(SOUND) // 2
    second = b"data" + struct.pack("<I", half) + SOUND[half:]
    assert "second run of sound" in str(refusal(wav(SOUND[:half], behind=second)))


@pytest.mark.parametrize(
    "behind",
    [
        b"",
        bytes(4096),
        b"TAG" + bytes(125),
        b"ID3\x03\0\0\0\0\0\x0atitle",
        b"LIST" + struct.pack("<I", 4) + b"INFO",
        b"id3 " + struct.pack("<I", 10) + b"ID3\x03\0\0\0\0\0\0",
    ],
)
def test_padding_and_titles_behind_the_sound_do_no_harm(behind: bytes) -> None:
    assert seconds(wav(SOUND, behind=behind)) == 1.0
    note = b"LIST" + struct.pack("<I", 3) + b"abc\0"
    assert seconds(wav(SOUND[:-1], behind=b"\0" + note, before=note)) == pytest.approx(
        1.0, abs=1e-3
    )
    assert seconds(wav(SOUND[:-1], behind=note)) == pytest.approx(1.0, abs=1e-3)  # not padded


def test_flac_of_unknown_length_says_so() -> None:
    content = bytearray(WHOLE["FLAC PCM_16 FILE"])
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    assert "leaves the length open" in str(refusal(bytes(content)))


def test_titles_before_and_behind_a_flac_do_no_harm() -> None:
    content = WHOLE["FLAC PCM_16 FILE"]
    titles = b"ID3\x04\0\0\0\0\x01\x00" + bytes(128)
    assert seconds(titles + content) == pytest.approx(0.3)
    assert seconds(content + b"TAG" + bytes(125)) == pytest.approx(0.3)
    assert refusal(titles + content[: len(content) * 6 // 10]).kind == "truncated-clip"
    assert refusal(titles + content * 2).kind == "unreadable-clip"


def test_an_mp3_that_does_not_count_its_bytes_is_refused() -> None:
    content = WHOLE["MP3 MPEG_LAYER_III FILE"]
    assert seconds(b"ID3\x04\0\0\0\0\x01\x00" + bytes(128) + content) == pytest.approx(0.3)
    blind = content.replace(b"Xing", b"\0\0\0\0").replace(b"Info", b"\0\0\0\0")
    assert "does not count its bytes" in str(refusal(blind))


@pytest.mark.parametrize(
    "content,words",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
        (b"/annex/objects/SHA256E-s1--0.wav\n", "git-annex pointer"),
        (b"<!DOCTYPE html><html><head><title>403</title></head></html>", "web page"),
        (b"\xef\xbb\xbf\n <HTML lang=en><body>Sign in</body></html>", "web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML"),
        (b"\0\0\0\x20ftypM4A \0\0\0\0M4A mp42isom" + bytes(99), "m4a"),
        (b"\x1a\x45\xdf\xa3" + bytes(99), "WebM"),
        (b"\xff\xf1\x50\x80" + bytes(99), "AAC"),
        (b"#!AMR\n" + bytes(99), "AMR"),
        (b"\x1f\x8b\x08" + bytes(99), "gzip"),
        (b"PK\x03\x04" + bytes(99), "zip"),
        (b'{"error": "not found, try again"}', "JSON"),
        (b"UklGRiR9AABXQVZFZm10IBAAAAABAAEA", "base64"),
        (b"404: Not Found, really nothing", "404: Not Found"),
        (bytes(4096), "zero bytes"),
        (b"\x81\x92\xa3\xb4\xc5\xd6\xe7\xf8" * 8, "81 92 a3"),
    ],
)
def test_the_message_says_what_the_bytes_are(content: bytes, words: str) -> None:
    error = refusal(content)
    assert error.kind == "unreadable-clip" and words in str(error)


NOISE = np.random.default_rng(0).standard_normal(RATE)
COARSE = {"PCM_U8": 0.6 / 128, "ALAW": 8 / 32_768, "ULAW": 8 / 32_768}  # dither of one step


@pytest.mark.parametrize(
    "samples,subtype",
    [
        (np.full(RATE, 0.1), "PCM_16"),
        (np.full(RATE, 0.1), "FLOAT"),
        (0.02 + 2e-5 * NOISE, "FLOAT"),  # a constant with dither
        (np.full(RATE, -1 / 128), "PCM_U8"),
        *((np.where(NOISE > 0, step, -step), kind) for kind, step in COARSE.items()),
        (np.concatenate([[0.9], np.zeros(RATE - 1)]), "PCM_16"),  # a click
        (np.concatenate([np.zeros(RATE // 2), np.full(RATE // 2, 0.5)]), "PCM_16"),  # a step
        (np.stack([WAVE, -WAVE], axis=1), "PCM_16"),  # channels that cancel out
        (np.stack([WAVE, -WAVE], axis=1), "FLOAT"),
    ],
)
def test_what_would_not_be_heard_is_silence(samples: np.ndarray, subtype: str) -> None:
    assert refusal(encode(samples, subtype=subtype)).kind == "silent-audio"


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
@pytest.mark.parametrize("scale", [127, 32_767, 2**31])
def test_floats_in_the_scale_of_integers_are_refused(subtype: str, scale: float) -> None:
    error = refusal(encode(WAVE * scale, subtype=subtype))
    assert error.kind == "wrong-scale" and "32768" in str(error)


def test_floats_a_little_beyond_full_scale_are_kept() -> None:
    content = encode(WAVE * 4, subtype="FLOAT")
    assert seconds(content) == 1.0 and np.abs(load_waveform(content)).max() == pytest.approx(1.2)


def test_a_check_that_hears_the_mix_hears_one_channel_of_eight() -> None:
    assert seconds(encode(np.stack([WAVE] + [np.zeros(RATE)] * 7, axis=1))) == 1.0


@pytest.mark.parametrize("rate", [1, 4_000_000_000])
def test_a_rate_of_no_recording_is_refused(rate: int) -> None:
    content = bytearray(wav(SOUND))
    content[24:28] = struct.pack("<I", rate)
    assert refusal(bytes(content)).kind == "unreadable-clip"


def test_what_is_no_file_is_a_clip_error(tmp_path: Path) -> None:
    for source, kind in ((tmp_path, "unreadable-clip"), ("a\0b.wav", "missing-clip")):
        for read in (probe_clip, load_waveform):
            with pytest.raises(ClipError) as caught:
                read(source)
            assert caught.value.kind == kind
    with pytest.raises(ClipError, match="too long"):
        probe_clip(tmp_path / ("x" * 300))


def test_check_and_reader_agree_on_damaged_headers() -> None:
    counts, found = FUZZ.disagreements(3_000, seed=7)
    assert found == [] and counts["read"] > 500  # python benchmarks/clips.py: 100,000
