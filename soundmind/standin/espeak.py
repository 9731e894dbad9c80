"""Speak text with espeak-ng: the voices of the practice set. No system package is needed.

    python -m soundmind.standin.espeak "Rex is a dax." --voice en-us+f3 --output /tmp/rex.wav

The PyPI package `espeakng-loader` brings the library and its data; ctypes calls it. A sentence of
3 s costs about 5 ms. Output is 22,050 Hz mono.

Every utterance is spoken by a freshly loaded copy of the library. espeak-ng keeps state between
utterances (phase of its pitch flutter, noise generator, the rest of an echo), so the same call
gives other samples the second time, even after `espeak_Terminate`. Loading it anew and seeding its
noise makes an utterance a pure function of its arguments: the same bytes in any order, in any
process. That is what lets a data set be rebuilt byte for byte with any number of workers.

Threads: calls are serialised by a lock. Processes: independent of each other.
"""

from __future__ import annotations

import _ctypes
import argparse
import atexit
import ctypes
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from soundmind.system.errors import UserError

# Accents by the names people know, and espeak-ng 1.52's own identifiers for them. Its short name
# `en-gb` is not found by all builds, and a name that is not found leaves the last voice in place.
ACCENTS = {"en-us": "gmw/en-US", "en-gb": "gmw/en"}
# From espeak-ng's speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000  # otherwise a missing data file ends the process
_CHARS_UTF8 = 1
_RATE, _PITCH = 1, 3
_NO_ERROR = 0
# Its path buffer has 160 characters; longer paths are cut and then not found.
_LONGEST_DATA_PATH = 120
_lock = threading.Lock()


class SpeechError(UserError, RuntimeError):
    """espeak-ng is absent, or cannot do what it was asked to do."""


class _Voice(ctypes.Structure):
    """Head of espeak_VOICE; only the identifier is read."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_char_p),
        ("identifier", ctypes.c_char_p),
    )


_SAMPLES_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


def speak(
    text: str, *, voice: str = "en-us", speed: int = 175, pitch: int = 50
) -> tuple[npt.NDArray[np.float32], int]:
    """Speak `text`: float32 mono in [-1, 1], shape (num_samples,), and its rate in Hz.

    `voice` is an accent (`en-us`, `en-gb`), optionally with one of espeak-ng's variants
    (`en-us+f3`); `speed` is in words per minute (80 to 450), `pitch` from 0 to 99.
    The result depends on the arguments alone. Raises SpeechError.
    """
    if not text.strip():
        raise SpeechError(f"nothing to say: {text!r}")
    if not (80 <= speed <= 450 and 0 <= pitch <= 99):
        raise SpeechError(f"speed {speed} not in 80..450 or pitch {pitch} not in 0..99")
    blocks: list[npt.NDArray[np.int16]] = []

    def receive(samples: ctypes._Pointer[ctypes.c_short], count: int, events: int) -> int:
        if count > 0:  # the buffer is reused by the next call
            blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    callback = _SAMPLES_CALLBACK(receive)
    with _lock, _fresh_library() as library:
        rate = library.espeak_Initialize(
            _AUDIO_OUTPUT_SYNCHRONOUS, 0, os.fsencode(_paths()[1]), _INITIALIZE_DONT_EXIT
        )
        if rate <= 0:
            raise SpeechError(f"espeak-ng could not read its data in {_paths()[1]}")
        library.espeak_SetSynthCallback(callback)
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        _select_voice(library, voice)
        _check(library.espeak_SetParameter(_RATE, speed, 0), "set the speed")
        _check(library.espeak_SetParameter(_PITCH, pitch, 0), "set the pitch")
        spoken = text.encode("utf-8")
        _check(
            library.espeak_Synth(spoken, len(spoken) + 1, 0, 1, 0, _CHARS_UTF8, None, None),
            f"speak {text!r}",
        )
        _check(library.espeak_Synchronize(), "finish")
    if not blocks:
        raise SpeechError(f"no sound for {text!r}")
    return np.concatenate(blocks).astype(np.float32) / 32_768.0, int(rate)


def _check(status: int, action: str) -> None:
    if status != _NO_ERROR:
        raise SpeechError(f"espeak-ng could not {action} (status {status})")


def _select_voice(library: ctypes.CDLL, voice: str) -> None:
    """Set the voice, and make sure that it is the one asked for.

    An unknown variant is no error to espeak-ng: it falls back to the plain accent.
    """
    accent, plus, variant = voice.partition("+")
    identifier = ACCENTS.get(accent, accent) + plus + variant
    status = library.espeak_SetVoiceByName(identifier.encode())
    library.espeak_GetCurrentVoice.restype = ctypes.POINTER(_Voice)
    current = library.espeak_GetCurrentVoice()
    found = current.contents.identifier if current else None
    if status != _NO_ERROR or found != identifier.encode():
        raise SpeechError(
            f"espeak-ng has no voice {voice!r}. Accents: {', '.join(ACCENTS)}; variants, joined "
            f"by a plus sign: {', '.join(variants())}"
        )


@contextmanager
def _fresh_library() -> Iterator[ctypes.CDLL]:
    """espeak-ng as if the process had just loaded it; unloaded again afterwards."""
    path = _paths()[0]
    library = ctypes.CDLL(path)
    try:
        yield library
        library.espeak_Terminate()
    finally:
        _ctypes.dlclose(library._handle)
    if _is_loaded(path):
        raise SpeechError(
            f"{path} stays loaded, so its state would leak into the next utterance. Something "
            "else in this process uses espeak-ng; run this command on its own"
        )


def _is_loaded(path: str) -> bool:
    if not hasattr(os, "RTLD_NOLOAD"):
        return False
    try:
        handle = _ctypes.dlopen(path, os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return False
    _ctypes.dlclose(handle)
    return True


@lru_cache(maxsize=1)
def _paths() -> tuple[str, str]:
    """Paths of the library and of its data folder, the latter short enough for espeak-ng."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise SpeechError(
            "espeak-ng is not installed. It comes as a wheel: "
            "pip install espeakng-loader (bash scripts/setup.sh does it)"
        ) from error
    library, data = espeakng_loader.get_library_path(), espeakng_loader.get_data_path()
    for path in (library, data):
        if not Path(path).exists():
            raise SpeechError(f"{path} is missing; pip install --force-reinstall espeakng-loader")
    if len(os.fsencode(data)) > _LONGEST_DATA_PATH:
        folder = tempfile.mkdtemp(prefix="espeak-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        link = os.path.join(folder, "espeak-ng-data")
        os.symlink(data, link)
        data = link
    return library, data


def variants() -> list[str]:
    """Names of the voice variants that came with espeak-ng, e.g. `m1`, `f3`, `steph`."""
    return sorted(path.name for path in Path(_paths()[1], "voices", "!v").iterdir())


def main(argv: list[str] | None = None) -> int:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m soundmind.standin.espeak", description="Speak a sentence into a wav file."
    )
    parser.add_argument("text")
    parser.add_argument("--voice", default="en-us", help="accent, optionally +variant")
    parser.add_argument("--speed", type=int, default=175, help="words per minute")
    parser.add_argument("--pitch", type=int, default=50, help="0 to 99")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)

    import soundfile

    waveform, rate = speak(
        arguments.text, voice=arguments.voice, speed=arguments.speed, pitch=arguments.pitch
    )
    soundfile.write(arguments.output, waveform, rate, subtype="PCM_16")
    print(f"{arguments.output}: {len(waveform) / rate:.2f} s at {rate} Hz")
    return 0


if __name__ == "__main__":
    sys.exit(main())
