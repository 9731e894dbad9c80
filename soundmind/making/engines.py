"""What makes sound of text: the embedded synthesiser, a command, a server.

Espeak()                                   embedded, needs nothing; a stand-in voice
Server(client)                             any server of OpenAI's speech protocol
Command("piper -m {voice} -f {output}")    a command of one's own; the text comes on its input
"""
# ruff: noqa: RUF001

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from soundmind.making.sound import RATE, ClipFault, Utterance, Wave, decode, mono
from soundmind.standin.espeak import SpeechError, speak
from soundmind.system.chat import Client
from soundmind.system.errors import UserError
from soundmind.system.files import write_atomically

PARAGRAPH_SECONDS = 0.3  # of silence between two paragraphs of espeak-ng
LARGEST_FILE = 512 << 20  # bytes of a command's output


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
        try:
            release = version("espeakng-loader")
        except PackageNotFoundError:
            release = "not installed"  # `check` says so where it matters
        return f"espeak-ng ({release}) at {self.speed} words a minute"

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
    if len(text) <= longest:
        return [text]
    result = [""]
    for sentence in re.split(r"(?<=[.!?。！？])\s+", text):
        while len(sentence) > longest:
            cut = sentence.rfind(" ", 0, longest) + 1 or longest
            result, sentence = [*result, sentence[:cut]], sentence[cut:]
        if len(result[-1]) + 1 + len(sentence) > longest:
            result.append("")
        result[-1] += (" " if result[-1] else "") + sentence
    return [piece.strip() for piece in result if piece.strip()]
