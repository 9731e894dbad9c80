"""Stage 5: a recogniser hears every clip; what it does not understand is said again, or dropped.

The word error rate of a clip compares what was to be said with what was heard, both as spoken words
in small letters: "2024" heard for "twenty twenty-four" is no error. Heard once, a clip need not be
heard again.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from soundmind.making.engines import fill, run_command, split_command
from soundmind.making.near import plain
from soundmind.making.sound import ClipFault, Utterance
from soundmind.making.words import Wording
from soundmind.system.errors import UserError
from soundmind.system.journal import Journal


class Listener(Protocol):
    """Whatever turns a clip into text."""

    at_once: int  # clips it can hear at the same time

    def describe(self) -> str:
        """All that decides what it hears."""

    def hear(self, clip: Path) -> str:
        """What is said in the clip; ClipFault where it cannot tell."""


@dataclass
class ListeningCommand:
    """A command line that prints what is said in {audio}. No shell."""

    template: str
    at_once: int = 2
    timeout: float = 600.0

    def describe(self) -> str:
        return f"command {self.template}"

    def hear(self, clip: Path) -> str:
        words = split_command(self.template, "audio", "--recogniser-command")
        with tempfile.NamedTemporaryFile() as nothing:
            filled = [fill(word, {"audio": str(clip)}) for word in words]
            return run_command(filled, Path(nothing.name), self.timeout)


class ListeningModel:
    """A recogniser of soundmind.speech: a Whisper folder or Hub id, or the stand-in's."""

    at_once = 1

    def __init__(self, name: str) -> None:
        from soundmind.speech.recogniser import open_recogniser

        self._recogniser = open_recogniser(name)

    def describe(self) -> str:
        description = self._recogniser.describe()
        return f"{description['name']} {description['digest']}"

    def hear(self, clip: Path) -> str:
        from soundmind.data.audio import load_waveform

        return str(self._recogniser.transcribe([load_waveform(clip)])[0].text)


def error_rate(wanted: str, heard: str, wording: Wording) -> float:
    """Word errors over words that were to be said."""
    import jiwer

    reference = plain(wording.spoken(wanted))
    return float(jiwer.wer(reference, plain(wording.spoken(heard)))) if reference else 0.0


def hear_all(
    utterances: Sequence[Utterance],
    listener: Listener,
    wording: Wording,
    folder: Path,
    journal: Journal,
    on_done: Callable[[], object] = lambda: None,
    patience: int = 20,
) -> dict[str, float]:
    """Word error rate by utterance; a clip that the recogniser fails on counts as all wrong."""
    described = listener.describe()
    keys = {
        u.key: hashlib.sha256(f"{described} {u.key}".encode()).hexdigest()[:24] for u in utterances
    }
    unheard = [
        u for u in {u.key: u for u in utterances}.values() if keys[u.key] not in journal.entries
    ]

    def hear(utterance: Utterance) -> dict[str, Any]:
        try:
            return {"heard": listener.hear(utterance.path(folder)), "fault": None}
        except ClipFault as fault:
            return {"heard": "", "fault": f"{fault.reason}: {fault}"[:300]}

    failures = 0
    with ThreadPoolExecutor(listener.at_once) as pool:
        try:
            for utterance, entry in zip(unheard, pool.map(hear, unheard), strict=True):
                failures = failures + 1 if entry["fault"] else 0
                if failures >= patience:
                    raise UserError(
                        f"the recogniser failed on {failures} clips in a row; the last: {entry['fault']}. "
                        "Mend it, or leave it out"
                    )
                if entry["fault"] is None:  # a failure is tried again by the next run
                    journal.append(keys[utterance.key], flush=False, **entry)
                on_done()
        finally:
            pool.shutdown(cancel_futures=True)
    rates = {}
    for utterance in utterances:
        entry = journal.entries.get(keys[utterance.key], {"heard": ""})
        rates[utterance.key] = error_rate(utterance.text, entry["heard"], wording)
    return rates
