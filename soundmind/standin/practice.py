"""The practice set: syllogisms spoken from a seed, split by split, whole or not at all.

The command line, `soundmind.practice`, describes the language, the layout and the controls.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import time
import wave
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from soundmind.data.audio import SAMPLE_RATE
from soundmind.standin.controls import length_control
from soundmind.standin.espeak import speak
from soundmind.standin.syllogism import NAMES, NOUNS, Syllogism
from soundmind.system.errors import UserError
from soundmind.system.files import locked, write_atomically
from soundmind.system.machine import cores

# To be raised with every change that alters a byte of the set (tests compare data/sample).
PRACTICE_VERSION = 1
ROWS = {"train": 5000, "dev": 200, "test": 800}
SAMPLE_ROWS = {"train": 8, "dev": 8, "test": 8}

# fmt: off
TRAIN_VOICES = (
    "en-us+m1", "en-us+m2", "en-us+m3", "en-us+m4", "en-us+m5", "en-us+m6", "en-us+m7",
    "en-us+f1", "en-us+f2", "en-us+f3", "en-us+f4", "en-us+f5",
    "en-gb+m1", "en-gb+m3", "en-gb+f2", "en-gb+f4",
)

HELD_OUT_VOICES = ("en-us+m8", "en-us+steph", "en-us+edward", "en-gb+f5", "en-gb+m7")
# fmt: on
SPEEDS = (185, 235)  # words per minute, both ends included; so are the ranges below
PITCHES = (30, 70)  # espeak-ng's 0 to 99
PEAKS = (0.5, 0.95)  # of full scale
LEAD_SECONDS = (0.0, 0.15)  # silence before
TAIL_SECONDS = (0.0, 0.2)  # and after the sentence
ANSWER_VOICE, ANSWER_SPEED = "en-us", 240
ANSWER_RATE = 8_000  # Hz; nothing trains on these clips, 16 kHz would take the set over 1 GB
MANIFEST = "manifest.json"
VOICES = "voices.jsonl"


@dataclass(frozen=True)
class Recipe:
    """How one question is spoken, beside its words."""

    voice: str
    held_out: bool  # the voice occurs in no train or dev clip
    speed: int  # words per minute
    pitch: int
    peak: float
    lead: float  # s
    tail: float  # s


@dataclass(frozen=True)
class PracticeRow:
    """One row before it is spoken."""

    id: str
    syllogism: Syllogism
    recipe: Recipe

    @property
    def annotation(self) -> dict[str, Any]:
        """The row's line in `{split}.jsonl`."""
        return {
            "id": self.id,
            "user_content": self.syllogism.text,
            "answer": self.syllogism.answer,
            "label": self.syllogism.label,
        }


# --- rows: pure functions of (seed, split, index) -------------------------------------------------


def make_row(seed: int, split: str, index: int) -> PracticeRow:
    """Row `index` (from 0) of a split.

    Every eight consecutive rows hold each combination of label, kind of mismatch and (in test)
    known or held-out voice equally often, in shuffled order.
    """
    block, place = divmod(index, 8)
    order = list(range(8))
    random.Random(f"{seed}/{split}/block {block}").shuffle(order)
    stratum = order[place]
    entailed = stratum % 2 == 1
    held_out = split == "test" and stratum // 2 % 2 == 1
    wrong_middle = stratum // 4 == 1

    draw = random.Random(f"{seed}/{split}/{index}")
    first, second = draw.sample(list(NOUNS), 2)
    minor, conclusion = first, second
    if not entailed:
        other = draw.choice([noun for noun in NOUNS if noun not in (first, second)])
        minor, conclusion = (other, second) if wrong_middle else (first, other)
    recipe = Recipe(
        voice=draw.choice(HELD_OUT_VOICES if held_out else TRAIN_VOICES),
        held_out=held_out,
        speed=draw.randint(*SPEEDS),
        pitch=draw.randint(*PITCHES),
        peak=draw.uniform(*PEAKS),
        lead=draw.uniform(*LEAD_SECONDS),
        tail=draw.uniform(*TAIL_SECONDS),
    )
    syllogism = Syllogism(first, second, minor, conclusion, draw.choice(NAMES))
    return PracticeRow(f"{index + 1:04d}", syllogism, recipe)


# --- clips ----------------------------------------------------------------------------------------


def speak_question(row: PracticeRow) -> npt.NDArray[np.int16]:
    """The spoken sentence, shape (num_samples,), 16 kHz."""
    import soxr

    recipe = row.recipe
    waveform, rate = speak(
        row.syllogism.text, voice=recipe.voice, speed=recipe.speed, pitch=recipe.pitch
    )
    waveform = soxr.resample(waveform, rate, SAMPLE_RATE)
    waveform = waveform * (recipe.peak / np.abs(waveform).max())
    silence = (int(recipe.lead * SAMPLE_RATE), int(recipe.tail * SAMPLE_RATE))
    return np.round(np.pad(waveform, silence) * 32_767).astype(np.int16)


@lru_cache(maxsize=128)  # sixty distinct answers
def answer_wav(answer: str) -> bytes:
    """The spoken answer as the bytes of a wav file."""
    import soxr

    text = answer.replace("\n", ". ").replace("not-entailed", "not entailed")
    waveform, rate = speak(text, voice=ANSWER_VOICE, speed=ANSWER_SPEED)
    waveform = soxr.resample(waveform, rate, ANSWER_RATE)
    loudest = max(1.0, float(np.abs(waveform).max()))  # resampling may overshoot full scale
    return wav_bytes(np.round(waveform / loudest * 32_767).astype(np.int16), ANSWER_RATE)


def wav_bytes(samples: npt.NDArray[np.int16], rate: int) -> bytes:
    """A mono 16-bit wav file."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


def write_clips(index: int, *, seed: int, split: str, folder: Path) -> tuple[str, float, int]:
    """Speak row `index` into `folder`/NNNN. Returns (digest, question seconds, bytes written).

    Runs in worker processes. Clips that an interrupted run left are read instead of spoken.
    """
    row = make_row(seed, split, index)
    target = folder / row.id
    target.mkdir(exist_ok=True)
    answer_name = f"answer_{row.syllogism.label}.wav"
    question = _read_or_write(
        target / "question.wav", lambda: wav_bytes(speak_question(row), SAMPLE_RATE)
    )
    answer = _read_or_write(target / answer_name, lambda: answer_wav(row.syllogism.answer))
    with wave.open(io.BytesIO(question)) as file:
        seconds = file.getnframes() / file.getframerate()
    return clip_digest(question, answer), seconds, len(question) + len(answer)


def _read_or_write(path: Path, make: Any) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        data: bytes = make()
        write_atomically(path, data)
        return data


def clip_digest(question: bytes, answer: bytes) -> str:
    """Digest of a row's two clips."""
    return hashlib.sha256(hashlib.sha256(question).digest() + answer).hexdigest()


# --- building -------------------------------------------------------------------------------------


def settings(seed: int, rows: dict[str, int]) -> dict[str, Any]:
    """What the bytes of the set depend on."""
    return {"version": PRACTICE_VERSION, "seed": seed, "rows": dict(rows)}


def build_practice(
    output: Path, *, seed: int = 0, rows: dict[str, int] | None = None, workers: int | None = None
) -> dict[str, Any]:
    """Bring the set in `output` up to date and return its manifest.

    UserError where another process is building it, or where the folder holds other data.
    """
    output.mkdir(parents=True, exist_ok=True)
    lock = output / ".lock"
    with locked(lock, output):
        try:
            return _build_locked(output, seed, ROWS if rows is None else rows, workers)
        finally:
            lock.unlink(missing_ok=True)


def _build_locked(
    output: Path, seed: int, rows: dict[str, int], workers: int | None
) -> dict[str, Any]:
    wanted = settings(seed, rows)
    manifest = read_manifest(output)
    if not manifest and (strange := [split for split in rows if (output / split).exists()]):
        raise UserError(
            f"{output / strange[0]} is there and {output / MANIFEST} is not: this is no practice set, "
            "and building one would replace it; name another folder with --output"
        )
    if manifest.get("settings") == wanted and is_complete(output, manifest):
        print(f"{output}: up to date", flush=True)
        return manifest

    started = time.monotonic()
    done: dict[str, Any] = {}
    if manifest.get("settings") == wanted:  # an interrupted run: keep what it finished
        done = {
            split: facts
            for split, facts in manifest["splits"].items()
            if is_complete(output, {"splits": {split: facts}})
        }
    for split in rows:
        if split not in done:
            (output / f"{split}.jsonl").unlink(missing_ok=True)
    _write_json(output / MANIFEST, {"settings": wanted, "splits": done})  # from here on it is ours
    seconds: dict[str, list[float]] = {}
    with _worker_pool(workers) as pool:
        for split in rows:
            if split not in done:
                done[split] = _build_split(output, split, wanted, pool)
                partial_manifest = {"settings": wanted, "splits": done}
                _write_json(output / MANIFEST, partial_manifest)
            seconds[split] = done[split]["seconds"]

    labels = {s: [make_row(seed, s, i).syllogism.label for i in range(n)] for s, n in rows.items()}
    manifest = {
        "settings": wanted,
        "splits": done,
        "controls": {
            "length_only": length_control(
                (seconds["train"], labels["train"]), (seconds["test"], labels["test"])
            )
        },
        "bytes": sum(facts["bytes"] for facts in done.values()),
    }
    _write_voices(output, seed, rows, seconds)
    _write_json(output / MANIFEST, manifest)
    report(output, manifest, time.monotonic() - started)
    return manifest


def _build_split(output: Path, split: str, wanted: dict[str, Any], pool: Any) -> dict[str, Any]:
    """Speak one split into a hidden folder, then move it into place, its `.jsonl` last."""
    seed, count = wanted["seed"], wanted["rows"][split]
    scratch = output / f".{split}.partial"
    stamp = scratch / "settings.json"
    if not stamp.is_file() or json.loads(stamp.read_text(encoding="utf-8")) != wanted:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        _write_json(stamp, wanted)

    job = partial(write_clips, seed=seed, split=split, folder=scratch)
    results = []
    for result in pool(job, range(count)):
        results.append(result)
        if len(results) % 1000 == 0 or len(results) == count:
            print(f"{split}: {len(results)} of {count} clips spoken", flush=True)

    rows = [make_row(seed, split, index) for index in range(count)]
    lines = "".join(json.dumps(row.annotation, ensure_ascii=False) + "\n" for row in rows)
    stamp.unlink()
    shutil.rmtree(output / split, ignore_errors=True)
    os.replace(scratch, output / split)
    write_atomically(output / f"{split}.jsonl", lines.encode())
    return {
        "rows": count,
        "entailed": sum(row.syllogism.label for row in rows),
        "held_out_voices": sum(row.recipe.held_out for row in rows),
        "digest": _split_digest(lines.encode(), (digest for digest, _, _ in results)),
        "bytes": sum(size for _, _, size in results),
        "seconds": [round(duration, 4) for _, duration, _ in results],
    }


@contextmanager
def _worker_pool(workers: int | None) -> Iterator[Any]:
    """A function like `map` that keeps the order; one worker means this very process."""
    count = min(8, cores()) if workers is None else workers
    if count < 1:
        raise ValueError(f"workers must be at least 1, got {count}")
    if count == 1:
        yield map
        return
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        yield partial(pool.map, chunksize=25)


def _split_digest(lines: bytes, clips: Iterable[str]) -> str:
    digest = hashlib.sha256(lines)
    for clip in clips:
        digest.update(bytes.fromhex(clip))
    return digest.hexdigest()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def _write_voices(
    output: Path, seed: int, rows: dict[str, int], seconds: dict[str, list[float]]
) -> None:
    lines = []
    for split, count in rows.items():
        for index in range(count):
            row = make_row(seed, split, index)
            facts = {"split": split, "id": row.id, **asdict(row.recipe)}
            lines.append(json.dumps({**facts, "seconds": seconds[split][index]}) + "\n")
    write_atomically(output / VOICES, "".join(lines).encode())


# --- reading back ---------------------------------------------------------------------------------


def read_manifest(output: Path) -> dict[str, Any]:
    """The manifest of a practice set, or an empty one where there is none that can be read."""
    try:
        manifest = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def is_complete(output: Path, manifest: dict[str, Any]) -> bool:
    """Whether the files the manifest counts are there (`verify` also reads them)."""
    splits = manifest.get("splits", {})
    if "settings" in manifest and ("bytes" not in manifest or not (output / VOICES).is_file()):
        return False
    return bool(splits) and all(
        (output / f"{split}.jsonl").is_file()
        and sum(1 for _ in (output / split).glob("*/question.wav")) == facts["rows"]
        for split, facts in splits.items()
    )


def verify(output: Path) -> list[str]:
    """Compare every file with the manifest's digests; returns the splits that differ."""
    manifest = read_manifest(output)
    if not manifest:
        raise FileNotFoundError(
            f"{output / MANIFEST} not found. Build the set with: "
            f"python -m soundmind.practice --output {output}"
        )
    different = []
    for split, facts in manifest["splits"].items():
        try:
            lines = (output / f"{split}.jsonl").read_bytes()
            digests = [
                clip_digest(
                    (output / split / row["id"] / "question.wav").read_bytes(),
                    (output / split / row["id"] / f"answer_{row['label']}.wav").read_bytes(),
                )
                for row in map(json.loads, lines.splitlines())
            ]
        except (FileNotFoundError, ValueError, KeyError):
            different.append(split)
            continue
        if _split_digest(lines, digests) != facts["digest"]:
            different.append(split)
    return different


def report(output: Path, manifest: dict[str, Any], seconds: float) -> None:
    """Print what the set holds."""
    for split, facts in manifest["splits"].items():
        clips = facts["seconds"]
        print(
            f"{output / split}.jsonl: {facts['rows']} rows "
            f"({facts['rows'] - facts['entailed']} not-entailed, {facts['entailed']} entailed, "
            f"{facts['held_out_voices']} in held-out voices), "
            f"clips {min(clips):.2f}-{max(clips):.2f} s, mean {sum(clips) / len(clips):.2f} s"
        )
    control = manifest["controls"]["length_only"]["scored"]
    print(
        f"{manifest['bytes'] / 1e6:.0f} MB in {seconds:.0f} s; "
        f"best clip-length threshold on test: {100 * control:.1f} % (chance is 50)",
        flush=True,
    )
