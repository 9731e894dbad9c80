"""Everything this project knows about sound: rates, frames, audio tokens, reading and checking.

    samples --(/160)--> mel frames, 100/s --(two stages of stride 2)--> audio tokens, 25/s

`load_waveform` is the one place where sound is decoded and resampled. It gives what the model
makers' own `qwen_omni_utils.process_mm_info` gives for the same file (tests/data/test_audio.py), so the
model hears what their tool would feed it. `probe_clip` measures and checks a file without decoding
it all: a header, the file's size and the first sound.

Log-mel features are the processor's business, not this module's. numpy, soundfile and soxr only.

    python -c "from soundmind.data.audio import probe_clip; print(probe_clip('question.wav'))"
"""

from __future__ import annotations

import math
import os
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from soundmind.data.containers import clip_fault
from soundmind.system.errors import UserError

if TYPE_CHECKING:
    from soundfile import SoundFile

SAMPLE_RATE = 16_000  # Hz; the rate the audio tower was trained on
HOP_LENGTH = 160  # samples between mel frames
NUM_MEL_BINS = 128
MEL_FRAMES_PER_SECOND = SAMPLE_RATE // HOP_LENGTH  # 100
FRAMES_PER_AUDIO_TOKEN = 4  # two stages of stride 2: one convolution, one pooling
AUDIO_TOKENS_PER_SECOND = MEL_FRAMES_PER_SECOND // FRAMES_PER_AUDIO_TOKEN  # 25

MAX_CLIP_SECONDS = 300  # the processor's window; it cuts what is longer without a word
MAX_CLIP_SAMPLES = MAX_CLIP_SECONDS * SAMPLE_RATE  # 4_800_000
MAX_MEL_FRAMES = MAX_CLIP_SAMPLES // HOP_LENGTH  # 30_000
MIN_CLIP_SECONDS = 0.1  # [ours] shorter is a click, not a question; below 0.021 s no token is left
MIN_CLIP_SAMPLES = int(MIN_CLIP_SECONDS * SAMPLE_RATE)  # 1_600

# [ours] A clip whose loudest sample stays below this is silence: -80 dB of full scale, three steps
# of 16-bit audio, so that dither does not pass for speech.
SILENCE_PEAK = 1e-4
SOUND_WINDOWS = 3  # [ours] windows of 10 ms that must hold sound; a click is in one or two
MAX_PEAK = 10.0  # [ours] of full scale: floats may pass 1 a little, integers in disguise by far

Waveform = npt.NDArray[np.float32]


class ClipError(UserError, ValueError):
    """A clip that cannot be used. `kind` is the short name that reports count."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.kind, str(self))  # so that it survives worker processes


@dataclass(frozen=True)
class ClipInfo:
    """What a clip's header says, checked against its size.

    `num_frames` counts sampling instants at `sample_rate` (Hz), not values: a stereo second at
    24 kHz has 24,000 frames.
    """

    num_frames: int
    sample_rate: int
    channels: int
    encoding: str  # of the samples: "PCM_16", "FLOAT", "FLAC/PCM_16" ...

    @property
    def seconds(self) -> float:
        """Duration of the file as recorded."""
        return self.num_frames / self.sample_rate

    @property
    def num_samples(self) -> int:
        """Length of `load_waveform`'s result: samples at 16 kHz."""
        return resampled_length(self.num_frames, self.sample_rate)


def num_audio_tokens(num_samples: int) -> int:
    """Placeholder tokens the processor inserts for a clip of `num_samples` at 16 kHz.

    mel frames = ceil(samples / 160); stage one keeps (frames - 1) // 2 + 1 of them, stage two
    (n - 2) // 2 + 1 of those. Equal to Qwen2_5OmniProcessor up to its window of 300 s (tested);
    longer clips are counted in full, so that budgets see the true need instead of the cut.
    """
    if num_samples < 0:
        raise ValueError(f"num_samples must not be negative, got {num_samples}")
    mel_frames = -(-num_samples // HOP_LENGTH)
    after_convolution = (mel_frames - 1) // 2 + 1
    return max(0, (after_convolution - 2) // 2 + 1)


def resampled_length(num_frames: int, sample_rate: int, target_rate: int = SAMPLE_RATE) -> int:
    """Samples after resampling. The ratio is rounded to a float first, as librosa does, so that
    the two agree to the sample for any length."""
    if sample_rate == target_rate:
        return num_frames
    return math.ceil(num_frames * (float(target_rate) / sample_rate))


def load_waveform(
    source: str | Path | bytes, *, sample_rate: int = SAMPLE_RATE, check_sound: bool = True
) -> Waveform:
    """Decode a clip: float32 mono in [-1, 1], shape (num_samples,), at `sample_rate` Hz.

    `source` is a path or the bytes of an encoded file (wav, FLAC and what else
    soundmind.data.containers knows). Channels are averaged, then resampled with soxr's
    high-quality filter. Raises the ClipError of `probe_clip` for the same clips, so that what a
    check accepts is read, and at the length it gave.
    """
    name = _name_of(source)
    with _opened(source, name) as (clip, info):
        blocks = list(_blocks(clip, info, name, first=_BLOCK))
    samples = np.concatenate(blocks) if len(blocks) > 1 else blocks[0]
    if check_sound:
        _check_sound(blocks, info, name)
    return resample(samples, info.sample_rate, sample_rate)


def probe_clip(source: str | Path | bytes, *, check_sound: bool = True) -> ClipInfo:
    """Measure and check a clip, decoding no more of it than that takes.

    Finds empty, unreadable and truncated files from header and size; compressed ones are decoded
    to the end, since only that shows what they hold. `check_sound` also looks for silence (up to
    the first sound) and, where samples are floats, for NaN and for a wrong scale (the whole file).
    Raises ClipError with kind missing-clip, empty-clip, unreadable-clip, truncated-clip,
    silent-audio, nan-audio or wrong-scale.
    """
    name = _name_of(source)
    with _opened(source, name) as (clip, info):
        plain = info.encoding in _INTEGERS
        blocks = _blocks(clip, info, name, first=info.sample_rate // 10 if plain else _BLOCK)
        if check_sound:
            _check_sound(blocks, info, name)
        if not plain:
            deque(blocks, maxlen=0)
    return info


# ---------------------------------------------------------------------------------------------
# Both of the above open, check and read a clip with the same three functions, so that they cannot
# disagree. What libsndfile hides, a file that lacks some of its sound, is found by clip_fault.

# Of these a complete file is a readable one, and no sample is NaN or beyond full scale.
_INTEGERS = ("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "ALAW", "ULAW")
# The smallest step of coarse encodings: silence may go to and fro between neighbours.
_STEPS = {"PCM_S8": 1 / 128, "PCM_U8": 1 / 128, "ALAW": 1 / 2048, "ULAW": 1 / 4096}
_COMPRESSED = ("FLAC", "OGG", "MP3")  # their subtype alone does not say so
_BLOCK = 1 << 20  # values a step
_RATES = (1_000, 768_000)  # Hz; outside, a header is damaged
_UNKNOWN_LENGTH = 1 << 40  # frames; libsndfile's stand-in for "not said" is far beyond


def _name_of(source: str | Path | bytes) -> str:
    return f"<{len(source)} bytes>" if isinstance(source, bytes) else os.fspath(source)


def _open(source: str | Path, name: str) -> BinaryIO:
    try:
        if S_ISREG(os.stat(source).st_mode):  # reading a pipe would wait for ever
            return Path(source).open("rb")
    except FileNotFoundError as error:
        raise ClipError("missing-clip", f"{name} not found") from error
    except OSError as error:
        raise ClipError("unreadable-clip", f"{name}: {error.strerror}") from error
    except ValueError as error:  # a zero byte in the name
        raise ClipError("missing-clip", f"{name!r}: {error}") from error
    raise ClipError("unreadable-clip", f"{name} is not a regular file")


@contextmanager
def _on_disk(content: bytes) -> Iterator[str]:
    """A path to encoded bytes: libsndfile reads less of what it gets in another way (MP3)."""
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("clip"), "wb") as file:
            file.write(content)
            file.flush()
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        with tempfile.NamedTemporaryFile() as named:
            named.write(content)
            named.flush()
            yield named.name


@contextmanager
def _opened(source: str | Path | bytes, name: str) -> Iterator[tuple[SoundFile, ClipInfo]]:
    """The clip, open at its first sample, after everything its header and size can show."""
    import soundfile

    if isinstance(source, bytes):
        with _on_disk(source) as path, _opened(path, name) as opened:
            yield opened
        return
    with _open(source, name) as file:
        try:
            size = file.seek(0, os.SEEK_END)
            fault = clip_fault(file, size) if size else ("empty-clip", "0 bytes")
        except OSError as error:
            fault = "unreadable-clip", str(error.strerror)
    if fault is not None:
        raise ClipError(fault[0], f"{name}: {fault[1]}")
    try:
        clip = soundfile.SoundFile(source)
    except soundfile.LibsndfileError as error:
        raise ClipError("unreadable-clip", f"{name}: {error.error_string}") from error
    with clip:
        yield clip, _info_of(clip, name)


def _info_of(clip: SoundFile, name: str) -> ClipInfo:
    coded = clip.format in _COMPRESSED
    encoding = f"{clip.format}/{clip.subtype}" if coded else clip.subtype
    info = ClipInfo(clip.frames, clip.samplerate, clip.channels, encoding)
    if info.num_frames == 0:
        raise ClipError("empty-clip", f"{name}: a header without any sound")
    if not _RATES[0] <= info.sample_rate <= _RATES[1]:
        raise ClipError("unreadable-clip", f"{name}: a sample rate of {info.sample_rate} Hz")
    if not 0 < info.num_frames < _UNKNOWN_LENGTH:
        raise ClipError(
            "unreadable-clip",
            f"{name}: its header leaves the length open (written to a pipe?), so that a cut could "
            "not be seen; write it again, e.g. ffmpeg -i FILE OUT.flac",
        )
    return info


def _blocks(clip: SoundFile, info: ClipInfo, name: str, first: int) -> Iterator[Waveform]:
    """What is heard of a clip, float32 mono at its own rate: some `first` frames, then more."""
    import soundfile

    window = _window(info)
    left, count = info.num_frames, first
    while left:
        count = max(window, min(count, _BLOCK // info.channels) // window * window)
        try:
            block = clip.read(min(left, count), dtype="float32", always_2d=True)
            found = ""
        except soundfile.LibsndfileError as error:
            block, found = np.empty((0, 1), np.float32), f" ({error.error_string})"
        if not len(block):
            there = (info.num_frames - left) / info.sample_rate
            raise ClipError(
                "truncated-clip",
                f"{name}: {there:.1f} s can be read of the {info.seconds:.1f} s that its header "
                f"promises{found}",
            )
        left -= len(block)
        count *= 8
        yield block.mean(axis=1) if info.channels > 1 else block[:, 0]


def _window(info: ClipInfo) -> int:
    """Frames of 10 ms."""
    return info.sample_rate // 100


def _check_sound(blocks: Iterable[Waveform], info: ClipInfo, name: str) -> None:
    """ClipError for a clip in which nothing is heard, or not what was recorded.

    Sound is what moves: in some windows of 10 ms the samples are further apart than silence lets
    them be. A constant is silent, and so is a single click, or a clip whose channels cancel out.
    """
    quiet = max(2 * SILENCE_PEAK, 2.5 * _STEPS.get(info.encoding, 0.0))
    window = _window(info)
    wanted, heard = max(1, min(SOUND_WINDOWS, info.num_frames // window)), 0
    for block in blocks:
        peak = float(np.abs(block).max())
        if not math.isfinite(peak):
            raise ClipError("nan-audio", f"{name}: holds NaN or infinite samples")
        if peak > MAX_PEAK:
            raise ClipError(
                "wrong-scale",
                f"{name}: samples reach {peak:,.0f} where full scale is 1 (floats in the scale of "
                "integers?); divide them by 32768 or write the file as PCM_16",
            )
        whole = block[: max(window, len(block) // window * window)]
        spread = np.ptp(whole.reshape(-1, min(window, len(whole))), axis=1)
        heard += int((spread > quiet).sum())
        if heard >= wanted and info.encoding in _INTEGERS:
            return
    if heard < wanted:
        raise ClipError("silent-audio", f"{name}: {info.seconds:.1f} s without a sound")


def resample(samples: Waveform, rate: int, target_rate: int) -> Waveform:
    if rate == target_rate:
        return np.ascontiguousarray(samples, dtype=np.float32)
    import soxr

    resampled = soxr.resample(samples, rate, target_rate, quality="soxr_hq")
    length = resampled_length(len(samples), rate, target_rate)
    if len(resampled) < length:  # soxr rounds to nearest, librosa up
        resampled = np.pad(resampled, (0, length - len(resampled)))
    return np.ascontiguousarray(resampled[:length], dtype=np.float32)
