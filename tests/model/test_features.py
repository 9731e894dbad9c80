"""Features at true length equal the stock extractor's, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")

from soundmind.model.features import wrap_extractor

RATE = 16_000


@pytest.fixture(scope="module")
def extractor() -> Any:
    return transformers.WhisperFeatureExtractor(
        feature_size=128, chunk_length=300, hop_length=160, n_fft=400, sampling_rate=RATE
    )


@pytest.fixture(scope="module")
def stock_call() -> Any:
    # The class may carry our wrapper already; the closure then holds the original.
    call = transformers.WhisperFeatureExtractor.__call__
    return call.__closure__[0].cell_contents if call.__name__ == "call" else call


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(num_samples)).astype(np.float32)


OPTIONS = {
    "padding": "max_length",
    "sampling_rate": RATE,
    "return_attention_mask": True,
    "return_tensors": "np",
}


@pytest.mark.parametrize("num_samples", [400, 799, 1_600, 4_001, 8_000, 12_345, 80_000, 80_077])
def test_true_length_features_equal_the_stock_ones_bit_for_bit(
    extractor: Any, stock_call: Any, num_samples: int
) -> None:
    clip = noise(num_samples)
    stock = stock_call(extractor, [clip], **OPTIONS)
    ours = wrap_extractor(stock_call)(extractor, [clip], **OPTIONS)
    frames = int(stock["attention_mask"].sum())
    assert ours["input_features"].shape == (1, 128, frames)
    assert int(ours["attention_mask"].sum()) == frames
    np.testing.assert_array_equal(ours["input_features"], stock["input_features"][:, :, :frames])


def test_a_half_silent_clip_keeps_its_own_loudness_floor(extractor: Any, stock_call: Any) -> None:
    clip = noise(2 * RATE)
    clip[RATE:] = 0
    stock = stock_call(extractor, [clip], **OPTIONS)["input_features"][:, :, :200]
    ours = wrap_extractor(stock_call)(extractor, [clip], **OPTIONS)["input_features"]
    np.testing.assert_array_equal(ours, stock)


def test_a_clip_at_the_end_of_the_window_is_unchanged(extractor: Any, stock_call: Any) -> None:
    clip = noise(extractor.n_samples - 100)
    stock = stock_call(extractor, [clip], **OPTIONS)
    ours = wrap_extractor(stock_call)(extractor, [clip], **OPTIONS)
    frames = int(stock["attention_mask"].sum())
    np.testing.assert_array_equal(ours["input_features"], stock["input_features"][:, :, :frames])


def test_clips_of_different_length_are_padded_and_masked(extractor: Any, stock_call: Any) -> None:
    clips = [noise(8_000), noise(4_000, seed=1)]
    batch = wrap_extractor(stock_call)(extractor, clips, **OPTIONS)
    assert batch["input_features"].shape == (2, 128, 50)
    assert batch["attention_mask"].sum(-1).tolist() == [50, 25]


def test_other_options_reach_the_stock_extractor(extractor: Any, stock_call: Any) -> None:
    options = {**OPTIONS, "padding": "longest"}
    stock = stock_call(extractor, [noise(8_000)], **options)
    ours = wrap_extractor(stock_call)(extractor, [noise(8_000)], **options)
    np.testing.assert_array_equal(ours["input_features"], stock["input_features"])


def test_a_clip_beyond_the_window_is_refused_not_cut(extractor: Any, stock_call: Any) -> None:
    with pytest.raises(ValueError, match="longer than the processor's window of 300 s"):
        wrap_extractor(stock_call)(extractor, [noise(extractor.n_samples + 1)], **OPTIONS)
