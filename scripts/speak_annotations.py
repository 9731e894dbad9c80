"""Speak the questions of an annotation file, where the published 200 GB of sound are not at hand.

    python scripts/speak_annotations.py dev.jsonl data/spoken                 # questions
    python scripts/speak_annotations.py dev.jsonl data/spoken --answers       # reasoning too, hours
    python -m soundmind.preprocess --mode audio --data-dir data/spoken --splits dev

THIS VOICE IS A STAND-IN. espeak-ng is a formant synthesiser; the published clips were made by
MegaTTS 3 and sound like people. What is trained or measured on these clips says that the path from
real text to a model that listens works, and nothing about results on the published sound.

Reads   an annotation file in the GitHub layout; the split is its name (`--split` to say otherwise)
Writes  OUTPUT/<split>.jsonl and OUTPUT/<split>/<id>/question.wav (and answer_<label>.wav), 22 kHz
        mono, and OUTPUT/<split>/spoken.jsonl: which text every clip says, and in which voice

A run that was stopped goes on where it stopped: clips appear complete or not at all, and those that
say what they should, in the voice asked for, are not spoken again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from soundmind.data import statistics
from soundmind.data.sources import Fault, SplitSource, read_candidate, read_lines
from soundmind.system.machine import cores
from soundmind.task.schema import SPLITS, Annotation, Split


@dataclass(frozen=True)
class Utterance:
    """One clip to make."""

    text: str
    path: Path
    voice: str
    speed: int  # words per minute

    @property
    def digest(self) -> str:
        """What the clip says and how; a clip with another digest is spoken again."""
        return hashlib.sha256(f"{self.voice} {self.speed} {self.text}".encode()).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 0, or 2 where the annotations cannot be used."""
    parser = argparse.ArgumentParser(
        description="Speak questions with espeak-ng, a stand-in voice, into the ALR layout."
    )
    add = parser.add_argument
    add("annotations", type=Path, help="a .jsonl file with id, user_content, answer, label")
    add("output", type=Path, help="data folder to make or to complete")
    add("--split", choices=SPLITS, help="default: the annotation file's name")
    add("--answers", action="store_true", help="speak the annotated reasoning too")
    add("--limit", type=int, help="only the first N annotations")
    add("--voice", default="en-us", help="espeak-ng voice (default: en-us)")
    add("--speed", type=int, default=165, help="words per minute (default: 165, as published)")
    add("--workers", type=int, default=cores())
    arguments = parser.parse_args(argv)
    split = arguments.split or arguments.annotations.stem
    if split not in SPLITS:
        parser.error(f"{arguments.annotations.name} names no split; say which with --split")
    if not arguments.annotations.is_file():
        parser.error(f"{arguments.annotations} not found")
    annotations, faults = read(arguments.annotations, split, arguments.limit)
    if faults:
        print(statistics.fault_table(faults, None), file=sys.stderr)
        return 2
    folder = arguments.output / split
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [
        Utterance(text, folder / annotation["id"] / name, arguments.voice, arguments.speed)
        for annotation in annotations
        for name, text in texts(annotation, arguments.answers)
    ]
    missing = unspoken(wanted, folder / "spoken.jsonl")
    speak_all(missing, folder / "spoken.jsonl", arguments.workers)
    write_annotations(annotations, arguments.output / f"{split}.jsonl")
    print(
        f"{folder}: {len(wanted)} clips, {len(missing)} of them new, by espeak-ng "
        f"{arguments.voice}, "
        "a stand-in voice: nothing measured on it is a result on the published sound"
    )
    return 0


def read(path: Path, split: Split, limit: int | None) -> tuple[list[Annotation], list[Fault]]:
    """Annotations of the file, and every fault in it."""
    source = SplitSource(split, "github", path.parent, path, path.parent)
    annotations: list[Annotation] = []
    faults: list[Fault] = []
    for line in read_lines(source):
        if limit is not None and len(annotations) == limit:
            break
        candidate = read_candidate(line, source, "text", with_answers=False)
        faults += candidate.faults
        if candidate.annotation is not None:
            annotations.append(candidate.annotation)
    return annotations, faults


def texts(annotation: Annotation, answers: bool) -> Iterator[tuple[str, str]]:
    """File name and text of each clip of a row."""
    yield "question.wav", annotation["user_content"]
    if answers:
        yield f"answer_{annotation['label']}.wav", annotation["answer"]


def unspoken(wanted: Sequence[Utterance], log: Path) -> list[Utterance]:
    """Those whose clip is not there, or says something else, or in another voice."""
    spoken: dict[str, str] = {}
    if log.is_file():
        for line in log.read_text("utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the last line of a run that was killed
            spoken[entry["clip"]] = entry["sha256"]
    return [
        utterance
        for utterance in wanted
        if spoken.get(clip_name(utterance)) != utterance.digest or not utterance.path.is_file()
    ]


def clip_name(utterance: Utterance) -> str:
    """`0001/question.wav`, the clip's name in the log."""
    return f"{utterance.path.parent.name}/{utterance.path.name}"


def speak_all(utterances: Sequence[Utterance], log: Path, workers: int) -> None:
    """Speak on several processes and note each clip as soon as it is complete."""
    from rich.console import Console
    from rich.progress import track

    if not utterances:
        return
    console = Console(stderr=True)
    with (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
        log.open("a") as out,
    ):
        done = pool.map(speak_one, utterances, chunksize=4)
        bar = track(
            zip(utterances, done, strict=True),
            "speaking",
            total=len(utterances),
            console=console,
            disable=not sys.stderr.isatty(),
        )
        for utterance, seconds in bar:
            entry = {"clip": clip_name(utterance), "sha256": utterance.digest, "seconds": seconds}
            out.write(json.dumps({**entry, "voice": utterance.voice}) + "\n")
            out.flush()


def speak_one(utterance: Utterance) -> float:
    """Write one clip and return its duration in seconds."""
    import soundfile

    from soundmind.standin.espeak import speak

    waveform, rate = speak(utterance.text, voice=utterance.voice, speed=utterance.speed)
    utterance.path.parent.mkdir(exist_ok=True)
    temporary = utterance.path.with_name(f".{utterance.path.name}.tmp")
    soundfile.write(temporary, waveform, rate, format="WAV", subtype="PCM_16")
    os.replace(temporary, utterance.path)
    return round(len(waveform) / rate, 3)


def write_annotations(annotations: Sequence[Annotation], path: Path) -> None:
    """The annotations that have sound now, as preprocessing expects them beside the clips."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in annotations), "utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
