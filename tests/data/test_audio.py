from __future__ import annotations

import math
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from soundmind.data import audio
from soundmind.data.audio import (
    MAX_CLIP_SAMPLES,
    SAMPLE_RATE,
    ClipError,
    load_waveform,
    num_audio_tokens,
    probe_clip,
)


def noise(seconds: float, rate: int = 24_000, channels: int = 1, seed: int = 0) -> np.ndarray:
    shape = (round(seconds * rate), channels)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.1


def encode(path: Path, samples: np.ndarray, rate: int = 24_000, subtype: str = "PCM_16") -> bytes:
    soundfile.write(path, samples, rate, subtype=subtype)
    return path.read_bytes()


@pytest.fixture(scope="module")
def extractor() -> Any:
    """The feature extractor with the published window of 300 s."""
    transformers = pytest.importorskip("transformers")
    return transformers.WhisperFeatureExtractor(
        feature_size=audio.NUM_MEL_BINS,
        chunk_length=audio.MAX_CLIP_SECONDS,
        hop_length=audio.HOP_LENGTH,
    )


def test_derived_constants_are_those_of_the_processor(extractor: Any) -> None:
    assert extractor.n_samples == audio.MAX_CLIP_SAMPLES == 4_800_000
    assert extractor.nb_max_frames == audio.MAX_MEL_FRAMES == 30_000
    assert extractor.sampling_rate == SAMPLE_RATE
    assert audio.AUDIO_TOKENS_PER_SECOND == 25


LENGTHS = [
    *(round(seconds * SAMPLE_RATE) for seconds in (0.1, 0.5, 1, 3.34, 10, 29.99, 61.7, 154.3, 300)),
    *(16_000 + extra for extra in (1, 77, 159, 160, 161, 319, 320, 321, 479, 480, 481, 639, 641)),
    MAX_CLIP_SAMPLES - 1,
]


@pytest.mark.parametrize("num_samples", LENGTHS)
def test_token_count_is_the_processors_own(num_samples: int, extractor: Any) -> None:
    processing = pytest.importorskip("transformers.models.qwen2_5_omni.processing_qwen2_5_omni")
    # The real class, with the parts that a clip does not pass through left out.
    processor = object.__new__(processing.Qwen2_5OmniProcessor)
    processor.feature_extractor = CheapMel(extractor)
    processor.tokenizer = CountingTokenizer()
    processor.audio_token, processor.image_token, processor.video_token = "<A>", "<I>", "<V>"
    processor.image_processor = processor.video_processor = MergeSize()
    inputs = processor(text="<A>", audio=[np.zeros(num_samples, np.float32)], sampling_rate=16_000)
    assert num_audio_tokens(num_samples) == inputs["input_ids"][0]


class CheapMel:
    """The real extractor without the spectrogram itself, which takes seconds and is not counted."""

    def __init__(self, extractor: Any) -> None:
        self._extractor = extractor

    def __call__(self, clips: list[np.ndarray], **keys: Any) -> Any:
        from transformers import WhisperFeatureExtractor

        class Framed(WhisperFeatureExtractor):
            def _torch_extract_fbank_features(self, waveform: Any, device: str = "cpu") -> Any:
                return np.zeros((1, 1, waveform.shape[-1] // self.hop_length), np.float32)

            _np_extract_fbank_features = _torch_extract_fbank_features

        return Framed(**self._extractor.to_dict())(clips, **keys)


class CountingTokenizer:
    def __init__(self) -> None:
        self.init_kwargs: dict[str, Any] = {}

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [text.count("<A>") for text in texts]}


class MergeSize:
    merge_size = 2


@pytest.mark.parametrize("seconds", [0.1, 3.337, 61.7, 299.99, 300])
def test_complete_processor_inserts_as_many_placeholders(seconds: float, complete: Any) -> None:
    clip = noise(seconds, SAMPLE_RATE)[:, 0]
    inputs = complete(text="<|AUDIO|>", audio=[clip], sampling_rate=SAMPLE_RATE)
    assert num_audio_tokens(len(clip)) == len(inputs["input_ids"][0])


@pytest.fixture(scope="module")
def complete() -> Any:
    """The stand-in checkpoint's processor: the published classes and values, a small tokenizer."""
    pytest.importorskip("transformers")
    tiny = pytest.importorskip("soundmind.standin.tiny")
    return tiny.build_processor(tiny.build_tokenizer(tiny.tokenizer_corpus()))


def test_token_count_is_25_a_second() -> None:
    assert num_audio_tokens(60 * SAMPLE_RATE) == 1500
    assert num_audio_tokens(MAX_CLIP_SAMPLES) == 7500


def test_clips_beyond_the_window_are_counted_in_full() -> None:
    assert num_audio_tokens(400 * SAMPLE_RATE) == 10_000


def test_token_count_never_falls_and_starts_at_zero() -> None:
    counts = [num_audio_tokens(n) for n in range(0, 20_000, 7)]
    assert counts == sorted(counts)
    assert num_audio_tokens(0) == 0
    assert num_audio_tokens(audio.MIN_CLIP_SAMPLES) > 0


def test_negative_length_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        num_audio_tokens(-1)


FORMATS = [
    ("wav", "PCM_16"),
    ("wav", "PCM_24"),
    ("wav", "FLOAT"),
    ("wav", "PCM_U8"),
    ("flac", "PCM_16"),
]


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 24_000, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("suffix,subtype", FORMATS)
def test_clip_is_heard_as_the_model_makers_tool_feeds_it(
    tmp_path: Path, rate: int, channels: int, suffix: str, subtype: str
) -> None:
    utils = pytest.importorskip("qwen_omni_utils")
    path = tmp_path / f"clip.{suffix}"
    encode(path, noise(1.2345, rate, channels), rate, subtype)
    messages = [{"role": "user", "content": [{"type": "audio", "audio": str(path)}]}]
    theirs = utils.process_mm_info(messages, use_audio_in_video=False)[0][0]
    ours = load_waveform(path)
    assert ours.dtype == np.float32 and ours.ndim == 1
    np.testing.assert_array_equal(ours, theirs)
    assert probe_clip(path).num_samples == len(ours)
    np.testing.assert_array_equal(load_waveform(path.read_bytes()), ours)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 23_999, 24_000, 1_622_401, 1_622_402, 6_000_001])
@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 24_000, 44_100, 48_000])
def test_resampled_length_rounds_as_librosa_does(num_frames: int, rate: int) -> None:
    expected = math.ceil(num_frames * (float(16_000) / rate))
    assert audio.resampled_length(num_frames, rate) == expected


def kind_of(source: Any, **keys: Any) -> str:
    with pytest.raises(ClipError) as caught:
        probe_clip(source, **keys)
    return caught.value.kind


def test_missing_clip_is_named(tmp_path: Path) -> None:
    assert kind_of(tmp_path / "none.wav") == "missing-clip"
    with pytest.raises(ClipError, match=r"none\.wav not found"):
        load_waveform(tmp_path / "none.wav")


@pytest.mark.parametrize("suffix", ["wav", "flac"])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_truncated_clip_is_found_and_never_loaded(
    tmp_path: Path, suffix: str, share: float
) -> None:
    content = encode(tmp_path / f"clip.{suffix}", noise(2.0))
    cut = content[: int(len(content) * share)]
    assert kind_of(cut) == "truncated-clip"
    with pytest.raises(ClipError):
        load_waveform(cut)


def test_headers_cut_anywhere_are_a_clip_error(tmp_path: Path) -> None:
    content = encode(tmp_path / "clip.wav", noise(0.5))
    for length in range(60):
        assert kind_of(content[:length]) in ("empty-clip", "truncated-clip", "unreadable-clip")


def test_random_bytes_are_unreadable() -> None:
    content = np.random.default_rng(1).bytes(5_000)
    assert kind_of(content) == "unreadable-clip"
    assert kind_of(b"RIFF\x00\x00\x00\x00WAVE" + content) in ("unreadable-clip", "truncated-clip")


def test_header_without_sound_is_empty(tmp_path: Path) -> None:
    assert kind_of(encode(tmp_path / "clip.wav", noise(0.0))) == "empty-clip"
    assert kind_of(b"") == "empty-clip"


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_silence_is_found_even_with_dither(tmp_path: Path, subtype: str) -> None:
    dither = noise(5.0) * 2e-4  # peaks under 1e-4
    assert kind_of(encode(tmp_path / "clip.wav", dither, subtype=subtype)) == "silent-audio"


def test_sound_after_long_silence_is_heard(tmp_path: Path) -> None:
    samples = np.concatenate([np.zeros((24_000 * 30, 1), np.float32), noise(1.0)])
    assert probe_clip(encode(tmp_path / "clip.wav", samples)).seconds == 31.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_sample_at_the_end_is_found(tmp_path: Path, bad: float) -> None:
    samples = noise(20.0)
    samples[-1] = bad
    content = encode(tmp_path / "clip.wav", samples, subtype="FLOAT")
    assert kind_of(content) == "nan-audio"
    with pytest.raises(ClipError, match="NaN"):
        load_waveform(content)


def test_streamed_wav_without_a_size_is_read_to_its_end(tmp_path: Path) -> None:
    content = bytearray(encode(tmp_path / "clip.wav", noise(2.0)))
    content[4:8] = content[40:44] = struct.pack("<I", 0xFFFFFFFF)
    assert probe_clip(bytes(content)).seconds == 2.0
    assert len(load_waveform(bytes(content))) == 2 * SAMPLE_RATE


def test_extra_chunks_and_extensible_headers_are_understood(tmp_path: Path) -> None:
    content = encode(tmp_path / "clip.wav", noise(1.0))
    note = b"LIST" + struct.pack("<I", 9_001) + b"x" * 9_002  # odd size, longer than the first read
    size = struct.pack("<I", len(content) - 8 + len(note))
    padded = content[:4] + size + content[8:36] + note + content[36:]
    assert probe_clip(padded).seconds == 1.0
    soundfile.write(tmp_path / "ext.wav", noise(1.0, channels=3), 24_000, format="WAVEX")
    info = probe_clip(tmp_path / "ext.wav")
    assert (info.channels, info.seconds, info.encoding) == (3, 1.0, "PCM_16")


def test_clip_error_survives_a_worker_process() -> None:
    error = pickle.loads(pickle.dumps(ClipError("nan-audio", "x.wav: NaN")))
    assert (error.kind, str(error)) == ("nan-audio", "x.wav: NaN")
