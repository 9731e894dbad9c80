"""Each family of models hears a clip by its own rule, also beside our extraction at true length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")

SECONDS = (10, 62)


def clip(seconds: int) -> np.ndarray:
    return np.random.default_rng(seconds).normal(0, 0.1, 16_000 * seconds).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def patched() -> None:
    from soundmind.plugin import patches

    patches.true_length_features()


@pytest.fixture(scope="module")
def tokenizer(random_stand_in: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(random_stand_in)


@pytest.mark.parametrize(("seconds", "tokens"), [(10, 250), (62, 750)])
def test_qwen2_audio_hears_30_seconds_in_a_window_of_3000_frames(
    tokenizer: Any, seconds: int, tokens: int
) -> None:
    extractor = transformers.WhisperFeatureExtractor(feature_size=128)
    processor = transformers.Qwen2AudioProcessor(extractor, tokenizer)
    text = "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\nThink."
    encoded = processor(text=[text], audio=[clip(seconds)], sampling_rate=16_000)
    assert np.asarray(encoded["input_features"]).shape == (1, 128, 3000)
    sound = processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    assert list(np.ravel(encoded["input_ids"])).count(sound) == tokens


@pytest.mark.parametrize("seconds", SECONDS)
@pytest.mark.parametrize("window", [30, 300])
def test_whispers_extractor_gives_what_it_gave(seconds: int, window: int) -> None:
    """As Qwen3-Omni asks (all of the clip) and as Whisper and Ultravox ask (its window)."""
    extractor = transformers.WhisperFeatureExtractor(feature_size=128, chunk_length=window)
    whole = extractor(
        clip(seconds),
        sampling_rate=16_000,
        padding=True,
        truncation=False,
        return_attention_mask=True,
        return_tensors="np",
    )
    assert whole["attention_mask"].sum() == 100 * seconds
    assert whole["input_features"].shape[-1] == 100 * seconds
    if window == 30:
        default = extractor(clip(seconds), sampling_rate=16_000, return_tensors="np")
        assert default["input_features"].shape == (1, 128, 3000)


@pytest.mark.parametrize("seconds", SECONDS)
def test_omni_hears_the_whole_clip_at_its_own_length(random_stand_in: Path, seconds: int) -> None:
    from soundmind.model.processor import load_processor

    processor = load_processor(str(random_stand_in))
    text = "<|audio_bos|><|AUDIO|><|audio_eos|>"
    encoded = processor(text=[text], audio=[clip(seconds)], sampling_rate=16_000)
    sound = processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    assert list(np.ravel(encoded["input_ids"])).count(sound) == 25 * seconds
    assert np.asarray(encoded["input_features"]).shape[-1] == 100 * seconds


@pytest.mark.parametrize(
    ("name", "seconds", "frames"),
    [
        ("Gemma3nAudioFeatureExtractor", 10, 997),
        ("Gemma3nAudioFeatureExtractor", 62, 2997),  # the first 30 s
        ("Phi4MultimodalFeatureExtractor", 10, 998),
        ("Phi4MultimodalFeatureExtractor", 62, 6198),
    ],
)
def test_extractors_of_their_own_hear_by_their_own_rule(
    name: str, seconds: int, frames: int
) -> None:
    found = getattr(transformers, name)()([clip(seconds)])
    features = next(value for key, value in found.items() if key.endswith("input_features"))
    assert np.asarray(features).shape[1] == frames
