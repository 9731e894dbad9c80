"""Log-mel features at a clip's own length: what the stock processor gives, for a tenth of the cost.

transformers' Qwen2.5-Omni processor pads every clip to its 300 s window before it computes the
spectrogram: 15.4 MB and about 0.16 s of CPU a clip, whatever the clip's length. Every frame but the
last depends only on samples within one FFT window, so extracting from the clip padded with zeros to
the next hop *and two hops more*, then cutting to the frames the mask keeps, gives the same bits
(measured; held by tests/model/test_features.py). One thing is global in the stock code: values are
clamped to eight below the clip's own maximum, and the padding never holds that maximum.

`wrap_extractor` turns `WhisperFeatureExtractor.__call__` into this. Nothing is cached here: the agent
loop encodes a prompt once for all of its rollouts, and vLLM's front end keeps what it has extracted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

MIN_FRAMES = 64  # for fewer, the mel filter's matrix product takes another kernel: last bits differ


def extract_at_true_length(
    stock_call: Callable[..., Any], extractor: Any, waveform: np.ndarray
) -> np.ndarray:
    """Log-mel features (num_mel_bins, ceil(num_samples / hop_length)) float32 of one clip.

    `waveform` is (num_samples,) float32 at the extractor's rate, at most its 300 s window long.
    """
    hop = extractor.hop_length
    mel_frames = -(-waveform.size // hop)
    num_samples = max(mel_frames + 2, MIN_FRAMES) * hop
    # Never beyond the window: at its very end the stock code reflects samples, and so must this.
    padded = np.zeros(min(num_samples, extractor.n_samples), dtype=np.float32)
    padded[: waveform.size] = waveform
    output = stock_call(
        extractor,
        [padded],
        padding="longest",
        truncation=False,
        return_attention_mask=True,
        return_tensors="np",
        sampling_rate=extractor.sampling_rate,
    )
    return np.ascontiguousarray(output["input_features"][0][:, :mel_frames])


def _as_clips(raw_speech: Any) -> list[np.ndarray]:
    """The extractor's accepted inputs (one clip or a list of clips) as a list of 1-D arrays."""
    is_array = isinstance(raw_speech, np.ndarray)
    one_clip = raw_speech.ndim == 1 if is_array else np.ndim(raw_speech[0]) == 0
    clips = [raw_speech] if one_clip else list(raw_speech)
    return [np.ascontiguousarray(np.asarray(clip, dtype=np.float32).reshape(-1)) for clip in clips]


# Options under which the true-length path is known to equal the stock one; anything else is theirs.
_PLAIN_OPTIONS = {
    "padding": ("max_length",),
    "truncation": (True, None),
    "return_attention_mask": (True,),
    "sampling_rate": (16_000, None),
    "do_normalize": (None, False),
    "device": ("cpu", None),
}

# The window of the Omni processor, in samples. Whisper's own families hear 30 s, and their encoders
# want all of it: Qwen2-Audio, a recogniser.
OMNI_WINDOW = 300 * 16_000


def wrap_extractor(stock_call: Callable[..., Any]) -> Callable[..., Any]:
    """A `WhisperFeatureExtractor.__call__` that serves the Omni processor's call at true length.

    Returns `input_features` (num_clips, num_mel_bins, longest mel_frames) float32 and
    `attention_mask` (num_clips, longest mel_frames) int32: the stock result without its
    all-padding tail. A clip longer than the window is an error here; the stock code cuts it
    without a word.
    """

    def call(
        self: Any, raw_speech: Any, *args: Any, return_tensors: Any = None, **kwargs: Any
    ) -> Any:
        plain = not args and all(
            name in _PLAIN_OPTIONS and value in _PLAIN_OPTIONS[name]
            for name, value in kwargs.items()
        )
        omni = self.n_samples == OMNI_WINDOW and kwargs.get("padding") == "max_length"
        if not plain or not omni or self.dither:
            return stock_call(self, raw_speech, *args, return_tensors=return_tensors, **kwargs)

        from transformers.feature_extraction_utils import BatchFeature

        clips = _as_clips(raw_speech)
        for clip in clips:
            if clip.size > self.n_samples:
                raise ValueError(
                    f"clip of {clip.size / self.sampling_rate:.1f} s is longer than the "
                    f"processor's "
                    f"window of {self.n_samples / self.sampling_rate:.0f} s; the stock extractor "
                    "would cut it silently. Drop or split it in preprocessing."
                )
        features = [extract_at_true_length(stock_call, self, clip) for clip in clips]
        longest = max(clip.shape[1] for clip in features)
        # Silence in log-mel space is not zero, but masked frames are never read.
        batch = np.zeros((len(features), features[0].shape[0], longest), dtype=np.float32)
        mask = np.zeros((len(features), longest), dtype=np.int32)
        for index, clip in enumerate(features):
            batch[index, :, : clip.shape[1]] = clip
            mask[index, : clip.shape[1]] = 1
        return BatchFeature(
            {"input_features": batch, "attention_mask": mask}, tensor_type=return_tensors
        )

    return call
