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
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt

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


Waveform = npt.NDArray[np.float32]


Samples = npt.NDArray[np.floating[Any]]


class ClipError(ValueError):
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
    encoding: str  # "PCM_16", "FLOAT", "FLAC/PCM_16" ...

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


def load_waveform(source: str | Path | bytes, *, sample_rate: int = SAMPLE_RATE) -> Waveform:
    """Decode a clip: float32 mono in [-1, 1], shape (num_samples,), at `sample_rate` Hz.

    `source` is a path or the bytes of an encoded file (wav, FLAC, whatever libsndfile reads).
    Channels are averaged, then resampled with soxr's high-quality filter.
    Raises ClipError, which names the clip, for anything that cannot be heard.
    """
    import soundfile

    name = _name_of(source)
    with _open(source, name) as handle:
        _read_header(handle, name)  # libsndfile shortens a truncated wav without a word
        handle.seek(0)
        try:
            samples, rate = soundfile.read(handle, dtype="float32")
        except soundfile.LibsndfileError as error:
            raise ClipError("unreadable-clip", f"{name}: {error.error_string}") from error
    if samples.ndim > 1:
        samples = samples.mean(axis=1)
    if not np.isfinite(samples).all():
        raise ClipError("nan-audio", f"{name}: holds NaN or infinite samples")
    return _resample(samples, rate, sample_rate)


def probe_clip(source: str | Path | bytes, *, check_sound: bool = True) -> ClipInfo:
    """Measure and check a clip without decoding all of it.

    Finds empty, unreadable and truncated files from header and size. `check_sound` also looks for
    silence (up to the first sound) and, where samples are floats, for NaN (the whole file).
    Raises ClipError with kind missing-clip, empty-clip, unreadable-clip, truncated-clip,
    silent-audio or nan-audio.
    """
    name = _name_of(source)
    with _open(source, name) as handle:
        header = _read_header(handle, name)
        if check_sound:
            _check_sound(handle, header, name)
    return header.info


# ---------------------------------------------------------------------------------------------
# Reading headers. Plain RIFF files are parsed here: it is several times faster than opening them
# with libsndfile, and it shows the difference between the size a header promises and the bytes
# that are there, which libsndfile hides. Everything else goes through libsndfile.

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE


_SAMPLE_DTYPES = {(_PCM, 16): "<i2", (_PCM, 32): "<i4", (_FLOAT, 32): "<f4", (_FLOAT, 64): "<f8"}


_UNKNOWN_SIZE = 0xFFFFFFFF  # by tools that stream to a pipe: sound until the end of the file


_FIRST_READ = 8192  # bytes; header and the first fifth of a second in one call


_BLOCK = 1 << 20  # bytes per step when more of the sound must be read


@dataclass(frozen=True)
class _Header:
    info: ClipInfo
    head: bytes  # the first bytes of the file, already read
    data_start: int  # byte offset and size of the samples; 0, 0 where libsndfile must read them
    data_size: int
    dtype: str | None  # numpy name of one sample, None where libsndfile must read them


class _Format(NamedTuple):
    """The `fmt ` chunk of a RIFF wav."""

    tag: int
    channels: int
    rate: int  # Hz
    frame_bytes: int  # bytes of one sampling instant, all channels
    bits: int  # of one sample


def _name_of(source: str | Path | bytes) -> str:
    return f"<{len(source)} bytes>" if isinstance(source, bytes) else os.fspath(source)


def _open(source: str | Path | bytes, name: str) -> BinaryIO:
    if isinstance(source, bytes):
        return BytesIO(source)
    try:
        # Unbuffered: header, sound and size are read in a few calls of our own.
        return cast(BinaryIO, Path(source).open("rb", buffering=0))
    except FileNotFoundError as error:
        raise ClipError("missing-clip", f"{name} not found") from error
    except OSError as error:
        raise ClipError("unreadable-clip", f"{name}: {error.strerror}") from error


def _read_header(handle: BinaryIO, name: str) -> _Header:
    try:
        head = handle.read(_FIRST_READ)
        size = handle.seek(0, os.SEEK_END)
    except OSError as error:
        raise ClipError("unreadable-clip", f"{name}: {error.strerror}") from error
    if size == 0:
        raise ClipError("empty-clip", f"{name}: 0 bytes")
    header = None
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        header = _read_riff(handle, head, size, name)
    if header is None:
        header = _read_other(handle, head, name)
    if header.info.num_frames == 0:
        raise ClipError("empty-clip", f"{name}: a header without any sound")
    return header


def _read_riff(handle: BinaryIO, head: bytes, size: int, name: str) -> _Header | None:
    """Header of a RIFF wav with PCM or float samples; None if libsndfile has to decide."""
    fmt: _Format | None = None
    offset = 12
    while offset + 8 <= size:
        chunk, chunk_size = struct.unpack("<4sI", _bytes_at(handle, head, offset, 8))
        start = offset + 8
        if chunk == b"fmt ":
            body = _bytes_at(handle, head, start, min(chunk_size, 40))
            if len(body) < 16:
                raise ClipError("truncated-clip", f"{name}: ends inside its header")
            tag, channels, rate, _, frame_bytes, bits = struct.unpack("<HHIIHH", body[:16])
            if tag == _EXTENSIBLE and len(body) >= 26:
                tag = struct.unpack("<H", body[24:26])[0]
            fmt = _Format(tag, channels, rate, frame_bytes, bits)
        elif chunk == b"data":
            if fmt is None or 0 in (fmt.channels, fmt.rate, fmt.frame_bytes):
                raise ClipError("unreadable-clip", f"{name}: no usable format in the wav header")
            if chunk_size == _UNKNOWN_SIZE:
                chunk_size = size - start - (size - start) % fmt.frame_bytes
            return _riff_data(fmt, head, start, chunk_size, size - start, name)
        offset = start + chunk_size + (chunk_size & 1)
    raise ClipError("truncated-clip", f"{name}: {size} bytes, ends before its samples")


def _riff_data(
    fmt: _Format, head: bytes, start: int, promised: int, present: int, name: str
) -> _Header | None:
    """`promised` and `present` are bytes of sound: by the header, and in the file."""
    if fmt.tag not in (_PCM, _FLOAT) or fmt.frame_bytes != fmt.channels * ((fmt.bits + 7) // 8):
        return None
    if present < promised:
        bytes_per_second = fmt.frame_bytes * fmt.rate
        raise ClipError(
            "truncated-clip",
            f"{name}: {present} of {promised} bytes of sound "
            f"({present / bytes_per_second:.1f} of {promised / bytes_per_second:.1f} s)",
        )
    num_frames = promised // fmt.frame_bytes
    float_name = "FLOAT" if fmt.bits == 32 else "DOUBLE"
    encoding = f"PCM_{fmt.bits}" if fmt.tag == _PCM else float_name
    info = ClipInfo(num_frames, fmt.rate, fmt.channels, encoding)
    dtype = _SAMPLE_DTYPES.get((fmt.tag, fmt.bits))
    return _Header(info, head, start, num_frames * fmt.frame_bytes, dtype)


def _read_other(handle: BinaryIO, head: bytes, name: str) -> _Header:
    """Header through libsndfile; the last frame is decoded, since only that shows truncation."""
    import soundfile

    handle.seek(0)
    try:
        with soundfile.SoundFile(handle) as clip:
            encoding = f"{clip.format}/{clip.subtype}"
            info = ClipInfo(clip.frames, clip.samplerate, clip.channels, encoding)
            try:
                if clip.frames:
                    clip.seek(clip.frames - 1)
                    complete = len(clip.read(1)) == 1
                else:
                    complete = True
            except soundfile.LibsndfileError:
                complete = False
    except soundfile.LibsndfileError as error:
        raise ClipError("unreadable-clip", f"{name}: {error.error_string}") from error
    if not complete:
        raise ClipError(
            "truncated-clip", f"{name}: ends before the {info.seconds:.1f} s its header promises"
        )
    return _Header(info, head, 0, 0, None)


def _bytes_at(handle: BinaryIO, head: bytes, offset: int, count: int) -> bytes:
    if offset + count <= len(head):
        return head[offset : offset + count]
    handle.seek(offset)
    return handle.read(count)


def _check_sound(handle: BinaryIO, header: _Header, name: str) -> None:
    is_float = header.dtype is None or header.dtype.startswith("<f")
    heard = False
    for block in _blocks(handle, header, name):
        peak = float(np.abs(block).max(initial=0.0))
        if not math.isfinite(peak):
            raise ClipError("nan-audio", f"{name}: holds NaN or infinite samples")
        heard = heard or peak > SILENCE_PEAK
        if heard and not (is_float and header.info.encoding.endswith(("FLOAT", "DOUBLE"))):
            return  # integers cannot be NaN: the first sound settles it
    if not heard:
        seconds = header.info.seconds
        raise ClipError("silent-audio", f"{name}: {seconds:.1f} s without a sound")


def _blocks(
    handle: BinaryIO, header: _Header, name: str
) -> Iterator[npt.NDArray[np.floating[Any]]]:
    """The clip's samples as floats of full scale 1, block by block."""
    if header.dtype is None:
        yield from _decoded_blocks(handle, name)
        return
    dtype = np.dtype(header.dtype)
    scale = np.float32(1.0 if dtype.kind == "f" else 1.0 / np.iinfo(dtype).max)
    first = header.head[header.data_start : header.data_start + header.data_size]
    first = first[: len(first) - len(first) % dtype.itemsize]
    if first:
        yield np.frombuffer(first, dtype) * scale
    position, end = header.data_start + len(first), header.data_start + header.data_size
    handle.seek(position)
    while position < end:
        block = handle.read(min(_BLOCK, end - position))
        if not block:
            raise ClipError("truncated-clip", f"{name}: ended while it was read")
        usable = len(block) - len(block) % dtype.itemsize
        if usable < len(block):
            handle.seek(position + usable)
        if usable == 0:
            return
        position += usable
        yield np.frombuffer(block[:usable], dtype) * scale


def _decoded_blocks(handle: BinaryIO, name: str) -> Iterator[npt.NDArray[np.float32]]:
    import soundfile

    handle.seek(0)
    try:
        yield from soundfile.blocks(handle, blocksize=65_536, dtype="float32")
    except soundfile.LibsndfileError as error:
        raise ClipError("unreadable-clip", f"{name}: {error.error_string}") from error


def _resample(samples: Waveform, rate: int, target_rate: int) -> Waveform:
    if rate == target_rate:
        return np.ascontiguousarray(samples, dtype=np.float32)
    import soxr

    resampled = soxr.resample(samples, rate, target_rate, quality="soxr_hq")
    length = resampled_length(len(samples), rate, target_rate)
    if len(resampled) < length:  # soxr rounds to nearest, librosa up
        resampled = np.pad(resampled, (0, length - len(resampled)))
    return np.ascontiguousarray(resampled[:length], dtype=np.float32)
