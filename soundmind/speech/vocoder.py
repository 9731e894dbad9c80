"""The vocoder: codec tokens to sound at 24 kHz, in windows with a second of context on both sides.

In one piece the model's own vocoder refuses anything beyond 327 s (its 32,768 mel frames), and a
published reasoning takes some 600. Windows of 10 s cost 3.3 TFLOP a second of speech, those of 30 s
4.6 (counted). Codes up to one window are vocoded exactly as published. [ours]

A folder with `codebook.npy` speaks by it: row i of (codes, 480) float32 is the sound of code i, as
the stand-in's. Anything else has the published flow-matching transformer and BigVGAN.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from soundmind.model.folder import ModelError
from soundmind.speech.decoding import CODES_PER_SECOND
from soundmind.speech.weights import Voice, load_part, load_voice

SPEECH_RATE = 24_000  # Hz
CODE_SAMPLES = SPEECH_RATE // CODES_PER_SECOND
WINDOW_CODES = 10 * CODES_PER_SECOND
CONTEXT_CODES = CODES_PER_SECOND
MIN_WINDOW_CODES = 4 * CODES_PER_SECOND  # below, running out of memory is an error of the row
CODEBOOK = "codebook.npy"

FloatArray = npt.NDArray[np.float32]


class Vocoder:
    """The vocoder of a complete Qwen2.5-Omni folder, for one voice; float32, as published."""

    def __init__(
        self, folder: Path, voice: str, device: Any = "cpu", window: int = WINDOW_CODES
    ) -> None:
        self.window = window
        self._voice = load_voice(folder, voice)
        book = folder / CODEBOOK
        self._model: Any = _Table(book) if book.is_file() else _published(folder)
        self.to(device)

    def to(self, device: Any) -> None:
        """Move weights and voice, between host and card."""
        self._device = device
        self._model.to(device)
        voice = self._voice
        self._voice = Voice(
            voice.start_token, voice.condition.to(device), voice.reference_mel.to(device)
        )

    def sound(self, codes: Sequence[int], seed: int = 0) -> FloatArray:
        """Sound (num_codes * 480,) float32 of codec tokens; `seed` starts the vocoder's noise."""
        while True:
            try:
                return self._sound(codes, seed)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                if self.window // 2 < MIN_WINDOW_CODES:
                    raise
                self.window //= 2
                seconds = self.window // CODES_PER_SECOND
                print(f"out of memory; vocoding in windows of {seconds} s", flush=True)

    def tail(self, codes: Sequence[int], seconds: float, seed: int = 0) -> FloatArray:
        """Sound of the last `seconds` alone, vocoded with a second of context before it."""
        kept = min(len(codes), round(seconds * CODES_PER_SECOND))
        return self.sound(codes[-(kept + CONTEXT_CODES) :], seed)[-kept * CODE_SAMPLES :]

    @torch.no_grad()
    def _sound(self, codes: Sequence[int], seed: int) -> FloatArray:
        total, pieces = len(codes), [np.zeros(0, np.float32)]
        device = torch.device(self._device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for start, end, low, high in pieces_of(total, self.window):
                window = torch.tensor([list(codes[low:high])], device=device)
                sound = self._model(
                    window,
                    conditioning=self._voice.condition,
                    reference_mel=self._voice.reference_mel,
                )
                samples = sound.reshape(-1).float().cpu().numpy()
                per_code = samples.size // (high - low)
                pieces.append(samples[(start - low) * per_code : (end - low) * per_code])
        return np.concatenate(pieces)


def pieces_of(total: int, window: int) -> list[tuple[int, int, int, int]]:
    """(start, end, first vocoded, last vocoded) of every window of `total` codes."""
    if 0 < total <= window + CONTEXT_CODES:
        return [(0, total, 0, total)]
    starts = range(0, total, window)
    ends = [min(start + window, total) for start in starts]
    return [
        (start, end, max(0, start - CONTEXT_CODES), min(total, end + CONTEXT_CODES))
        for start, end in zip(starts, ends, strict=True)
    ]


def _published(folder: Path) -> Any:
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniToken2WavModel

    config = AutoConfig.from_pretrained(folder).token2wav_config
    with no_init_weights():
        model: Any = Qwen2_5OmniToken2WavModel._from_config(config)
    model = model.float()
    load_part(model, folder, "token2wav.")
    return model.eval().requires_grad_(False)


class _Table(torch.nn.Module):
    """A codebook of waveforms in the place of the published vocoder."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        book = np.load(path)
        if book.ndim != 2 or book.shape[1] != CODE_SAMPLES or book.dtype != np.float32:
            raise ModelError(f"{path}: expected float32 (codes, {CODE_SAMPLES}), got {book.shape}")
        self.register_buffer("book", torch.from_numpy(book))

    def forward(self, codes: torch.Tensor, **_: Any) -> torch.Tensor:
        """Codes beyond the book are silence."""
        known = codes < len(self.book)
        return self.book[codes.clamp(max=len(self.book) - 1)] * known.unsqueeze(-1)
