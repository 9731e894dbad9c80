"""A clip: what it says and how, its samples, and which are refused.

24 kHz, 16 bit, mono, evenly loud. A clip's file is named by all that decides how it sounds (text, voice,
engine, attempt), so another text is another file, and what is there need not be made again.
"""

from __future__ import annotations

import hashlib
import io
import json
import wave as wave_file
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from soundmind.system.files import write_atomically

RATE = 24_000  # Hz; [release] by the files' sizes
LOUDNESS = -23.0  # dB of full scale, of the parts with sound [ours]
PEAK = 0.89  # -1 dB of full scale
SILENCE = 1e-3  # of full scale; below it is no sound
FRAME = RATE // 20  # samples; loudness is judged in pieces of 50 ms
SECONDS_A_WORD = (0.08, 2.0)  # faster is cut, slower is endless
GRACE_SECONDS = 3.0
FORMAT = 1  # a change of what is done to every clip makes all of them anew

Wave = npt.NDArray[np.float32]


class ClipFault(Exception):
    """One clip cannot be used; `reason` is counted."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Utterance:
    """One clip to make."""

    text: str  # spoken form
    voice: str
    engine: str  # `describe` of it
    attempt: int = 0  # of saying the same again, after the recogniser did not understand

    @property
    def key(self) -> str:
        """Name of its file, without suffix."""
        parts = [FORMAT, self.text, self.voice, self.engine, self.attempt]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]

    def path(self, folder: Path) -> Path:
        """Its file below the folder of clips."""
        return folder / self.key[:2] / f"{self.key}.wav"


def decode(data: bytes) -> tuple[npt.NDArray[Any], int]:
    """Wave and rate of an encoded sound; ClipFault."""
    import soundfile

    try:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=False)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise ClipFault("broken-clip", f"{len(data)} bytes are no sound: {error}") from error
    return samples, int(rate)


def mono(samples: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(num_samples,) of (num_samples,) or (num_samples, channels)."""
    return samples.mean(axis=1) if samples.ndim == 2 else samples


def even(samples: npt.NDArray[Any], rate: int, num_words: int) -> Wave:
    """The clip as it is kept, (num_samples,) at RATE; ClipFault for one that cannot be used."""
    import soxr

    wave = mono(samples)
    if wave.size == 0 or not np.isfinite(wave).all():
        raise ClipFault("broken-clip", "no samples, or some that are no numbers")
    seconds, (fast, slow) = wave.size / rate, SECONDS_A_WORD
    if seconds > slow * num_words + GRACE_SECONDS:
        raise ClipFault("endless", f"{seconds:.1f} s for {num_words} words")
    if seconds < fast * num_words:
        raise ClipFault("cut", f"{seconds:.2f} s for {num_words} words")
    if rate != RATE:
        wave = soxr.resample(wave, rate, RATE, quality="HQ")
    wave = np.asarray(wave, dtype=np.float32)
    whole = (
        wave[: wave.size // FRAME * FRAME].reshape(-1, FRAME) if wave.size >= FRAME else wave[None]
    )
    power = np.einsum("ij,ij->i", whole, whole) / whole.shape[1]
    sounding = power[power > max(SILENCE**2, power.max() * 1e-3)]
    if sounding.size * FRAME < fast * num_words * RATE / 2:
        raise ClipFault(
            "silent", f"{sounding.size * FRAME / RATE:.2f} s of sound in {seconds:.1f} s"
        )
    gain = 10 ** (LOUDNESS / 20) / float(np.sqrt(sounding.mean()))
    loud: Wave = wave * np.float32(min(gain, PEAK / max(float(wave.max()), -float(wave.min()))))
    return loud


def save(path: Path, wave: Wave) -> int:
    """Write 16-bit wav under its name, complete or not at all; its bytes."""
    file = io.BytesIO()
    with wave_file.open(file, "wb") as writer:
        writer.setparams((1, 2, RATE, 0, "NONE", ""))
        writer.writeframes(np.rint(wave * np.float32(32_767)).astype("<i2").tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, file.getvalue())
    return file.tell()
