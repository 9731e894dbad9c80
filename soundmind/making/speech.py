"""Stage 4: questions and answers as clips: 24 kHz, 16 bit, mono, evenly loud.

    Espeak()                                   embedded, needs nothing; a stand-in voice
    Server(client, ...)                        any server of OpenAI's speech protocol
    Command("piper -m {voice} -f {output}")    a command of one's own; the text comes on its input

A clip's file is named by what it says and how (text, voice, engine, attempt), so another text is
another file, and what is there need not be made again. What was made is in a journal with its
length, its faults too. Several clips are made at once; the bytes do not depend on how many.
"""
# ruff: noqa: RUF001

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import wave as wave_file
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from soundmind.data.workers import die_with
from soundmind.standin.espeak import SpeechError, speak
from soundmind.system.chat import Client, run_all
from soundmind.system.errors import UserError
from soundmind.system.files import write_atomically
from soundmind.system.journal import Journal

RATE = 24_000  # Hz; [release] by the files' sizes
LOUDNESS = -23.0  # dB of full scale, of the parts with sound [ours]
PEAK = 0.89  # -1 dB of full scale
SILENCE = 1e-3  # of full scale; below it is no sound
FRAME = RATE // 20  # samples; loudness is judged in pieces of 50 ms
SECONDS_A_WORD = (0.08, 2.0)  # faster is cut, slower is endless
GRACE_SECONDS = 3.0
PARAGRAPH_SECONDS = 0.3  # of silence between two paragraphs of espeak-ng
LARGEST_FILE = 512 << 20  # bytes of a command's output
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


class Engine(Protocol):
    """Whatever makes sound of text."""

    def describe(self) -> str:
        """All that decides how it sounds, beside text and voice."""

    def check(self, voices: Sequence[str]) -> None:
        """Raise UserError for a voice it does not have, as far as that can be known."""

    def sound(self, utterance: Utterance) -> tuple[npt.NDArray[Any], int]:
        """Wave (num_samples,) or (num_samples, channels) and their rate; ClipFault."""


@dataclass(frozen=True)
class Espeak:
    """The embedded synthesiser."""

    speed: int = 165  # words a minute, as published
    repeated: frozenset[str] = frozenset()  # paragraphs of many texts, spoken once a voice

    def describe(self) -> str:
        return f"espeak-ng at {self.speed} words a minute"

    def check(self, voices: Sequence[str]) -> None:
        for voice in voices:
            try:
                speak("a", voice=voice, speed=self.speed)
            except SpeechError as error:
                raise UserError(str(error)) from error

    def sound(self, utterance: Utterance) -> tuple[npt.NDArray[Any], int]:
        speed = max(80, self.speed - 15 * utterance.attempt)  # again, more slowly
        try:
            sounds = [
                (_speak_once if paragraph in self.repeated else speak_paragraph)(
                    paragraph, utterance.voice, speed
                )
                for paragraph in utterance.text.split("\n\n")
                if paragraph.strip()
            ]
        except SpeechError as error:
            raise ClipFault("no-speech", str(error)) from error
        pause = np.zeros(round(PARAGRAPH_SECONDS * RATE), dtype=np.float32)
        parts = [part for sound in sounds for part in (sound, pause)]
        return np.concatenate(parts[:-1]), RATE


def speak_paragraph(text: str, voice: str, speed: int) -> Wave:
    """One paragraph by espeak-ng, (num_samples,) at RATE."""
    import soxr

    samples, rate = speak(text, voice=voice, speed=speed)
    return np.asarray(soxr.resample(samples, rate, RATE, quality="HQ"), dtype=np.float32)


_speak_once = lru_cache(maxsize=128)(speak_paragraph)  # a few megabytes each, in every worker


@dataclass(frozen=True)
class Command:
    """A command line; {voice}, {output}, {text} (a file) and {attempt} are filled in. No shell."""

    template: str
    timeout: float = 600.0

    def describe(self) -> str:
        return f"command {self.template}"

    def check(self, voices: Sequence[str]) -> None:
        split_command(self.template, "output", "--speech-command")

    def sound(self, utterance: Utterance) -> tuple[npt.NDArray[Any], int]:
        with tempfile.TemporaryDirectory(prefix="speech-") as folder:
            output, text = Path(folder, "clip.wav"), Path(folder, "text.txt")
            text.write_text(utterance.text, "utf-8")
            values = {
                "voice": utterance.voice,
                "output": str(output),
                "text": str(text),
                "attempt": str(utterance.attempt),
            }
            template = split_command(self.template, "output", "--speech-command")
            said = run_command(
                [fill(word, values) for word in template], text, self.timeout, output
            )
            if not output.is_file():
                raise ClipFault("no-speech", f"the command wrote no file; it said: {said}")
            return decode(output.read_bytes())


@dataclass(frozen=True)
class Server:
    """A server of OpenAI's speech protocol; long texts are sent in pieces, cut between sentences."""

    client: Client
    longest: int = 4000  # characters; OpenAI takes 4,096

    def describe(self) -> str:
        return f"{self.client.model} by a server of the OpenAI speech protocol"

    def check(self, voices: Sequence[str]) -> None:
        return  # its voices are known to it alone

    def sound(self, utterance: Utterance) -> tuple[npt.NDArray[Any], int]:
        raise NotImplementedError  # asked by `request`, many at once

    async def request(self, utterance: Utterance, folder: Path) -> tuple[npt.NDArray[Any], int]:
        """The sound; pieces that arrived before a kill lie beside the clip and are not paid again."""
        sounds = []
        parts = []
        for number, piece in enumerate(pieces(utterance.text, self.longest)):
            part = utterance.path(folder).with_suffix(f".{number}.part")
            if not part.is_file():
                body: dict[str, Any] = {
                    "model": self.client.model,
                    "input": piece,
                    "voice": utterance.voice,
                    "response_format": "wav",
                }
                if utterance.attempt:
                    body["seed"] = utterance.attempt
                answer = await self.client.speech(body)
                if isinstance(answer, str):
                    reason = "timeout" if answer.startswith("timeout") else "no-speech"
                    raise ClipFault(reason, answer)
                part.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(part, answer)
            parts.append(part)
            sounds.append(decode(part.read_bytes()))
        for part in parts:
            part.unlink()
        if len({rate for _, rate in sounds}) > 1:
            raise ClipFault("broken-clip", "its pieces have different rates")
        return np.concatenate([mono(samples) for samples, _ in sounds]), sounds[0][1]


def split_command(template: str, place: str, option: str) -> list[str]:
    """The words of a command line that names {place}; UserError where it cannot be run."""
    try:
        words = shlex.split(template)
    except ValueError as error:
        raise UserError(f"{option} {template!r} is no command line: {error}") from error
    if f"{{{place}}}" not in template or shutil.which(words[0]) is None:
        raise UserError(
            f"{option} {template!r}: it must name {{{place}}} and begin with a program that is there"
        )
    return words


def fill(word: str, values: dict[str, str]) -> str:
    """`word` with {names} replaced; other braces stay."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), word)


def run_command(words: list[str], text: Path, timeout: float, output: Path | None = None) -> str:
    """Run it with `text` as its input; the end of what it printed. ClipFault where it fails, takes
    too long or writes without end; it and its children are then ended."""
    with text.open("rb") as given, tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            words, stdin=given, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        deadline = time.monotonic() + timeout
        try:
            while True:
                try:
                    status = process.wait(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    written = output.stat().st_size if output and output.exists() else 0
                    if time.monotonic() > deadline:
                        raise ClipFault("timeout", f"no end within {timeout:g} s") from None
                    if max(written, os.fstat(said.fileno()).st_size) > LARGEST_FILE:
                        raise ClipFault("endless", f"more than {LARGEST_FILE} bytes") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said.seek(max(0, said.seek(0, os.SEEK_END) - 20_000))
        printed = said.read().decode("utf-8", "replace").strip()
    if status != 0:
        raise ClipFault("no-speech", f"{words[0]} ended with status {status}: {printed[-300:]}")
    return printed


def pieces(text: str, longest: int) -> list[str]:
    """The text in pieces of at most `longest` characters, cut after sentences or, else, words."""
    result = [""]
    for sentence in re.split(r"(?<=[.!?。！？])\s+", text):
        while len(sentence) > longest:
            cut = sentence.rfind(" ", 0, longest) + 1 or longest
            result, sentence = [*result, sentence[:cut]], sentence[cut:]
        if len(result[-1]) + 1 + len(sentence) > longest:
            result.append("")
        result[-1] += (" " if result[-1] else "") + sentence
    return [piece.strip() for piece in result if piece.strip()]


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


def finish(
    utterance: Utterance, folder: Path, sound: Callable[[], tuple[npt.NDArray[Any], int]]
) -> dict[str, Any]:
    """Make one clip; its line in the journal."""
    try:
        samples, rate = sound()
        wave = even(samples, rate, len(utterance.text.split()))
    except ClipFault as fault:
        return {"fault": fault.reason, "detail": str(fault)[:300], "seconds": 0.0, "bytes": 0}
    size = save(utterance.path(folder), wave)
    return {"fault": None, "detail": "", "seconds": round(wave.size / RATE, 3), "bytes": size}


def _make(engine: Engine, utterance: Utterance, folder: Path) -> dict[str, Any]:
    return finish(utterance, folder, lambda: engine.sound(utterance))


def _start_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=die_with, args=(parent,), daemon=True).start()


def is_made(entry: dict[str, Any] | None, utterance: Utterance, folder: Path) -> bool:
    """Whether the journal's entry holds and the file is there, whole."""
    if entry is None or entry["fault"] in ("timeout", "no-speech"):
        return False  # trouble of a server or a command may have passed
    path = utterance.path(folder)
    return entry["fault"] is not None or (path.is_file() and path.stat().st_size == entry["bytes"])


def make_all(
    utterances: Sequence[Utterance],
    engine: Engine,
    folder: Path,
    journal: Journal,
    workers: int,
    on_done: Callable[[], object] = lambda: None,
    patience: int = 50,
) -> None:
    """Make what is not made yet; every clip is in `journal.entries` then. UserError, OSError.

    Gives up after `patience` faults in a row.
    """
    wanted = {u.key: u for u in utterances if not is_made(journal.entries.get(u.key), u, folder)}
    in_vain = 0

    def note(utterance: Utterance, entry: dict[str, Any]) -> None:
        nonlocal in_vain
        journal.append(utterance.key, flush=False, **entry)
        in_vain = in_vain + 1 if entry["fault"] else 0
        if in_vain >= patience:
            raise UserError(
                f"{in_vain} clips in a row cannot be used; the last, in voice {utterance.voice!r}: "
                f"{entry['fault']}, {entry['detail']}. Mend engine or voice; what was made is kept"
            )
        on_done()

    if isinstance(engine, Server):
        asyncio.run(_ask_all(engine, list(wanted.values()), folder, note))
    elif wanted:
        for utterance, entry in _spread(engine, list(wanted.values()), folder, workers):
            note(utterance, entry)


def _spread(
    engine: Engine, utterances: Sequence[Utterance], folder: Path, workers: int
) -> Iterator[tuple[Utterance, dict[str, Any]]]:
    pool: Executor
    if isinstance(engine, Espeak):
        pool = ProcessPoolExecutor(
            workers, get_context("spawn"), initializer=_start_worker, initargs=(os.getpid(),)
        )
    else:
        pool = ThreadPoolExecutor(workers)
    with pool:
        left = {
            pool.submit(_make, engine, utterance, folder): utterance for utterance in utterances
        }
        try:
            for future in as_completed(list(left)):
                yield left.pop(future), future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, probably for want of memory; the same command goes on "
                "where this one stopped, with --workers 1 on a small machine"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


async def _ask_all(
    engine: Server,
    utterances: Sequence[Utterance],
    folder: Path,
    note: Callable[[Utterance, dict[str, Any]], None],
) -> None:
    async def ask(utterance: Utterance) -> None:
        try:
            samples, rate = await engine.request(utterance, folder)
        except ClipFault as fault:
            failed = fault

            def sound() -> tuple[npt.NDArray[Any], int]:
                raise failed
        else:

            def sound() -> tuple[npt.NDArray[Any], int]:
                return samples, rate

        note(utterance, await asyncio.to_thread(finish, utterance, folder, sound))

    async with engine.client:
        await run_all(ask, utterances, engine.client.concurrency)
