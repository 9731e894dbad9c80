"""The six stages in order, each from the file of the one before; see soundmind.make_data.

    work/triples.jsonl    rows: key, parts, label, where, split
    work/words.jsonl      + user_content, spoken_question
    work/reasoning.jsonl  + answer, spoken_answer               paid answers: work/teacher.jsonl
    work/speech.jsonl     + voice, question_clip, answer_clip, ...   clips made: work/clips.jsonl
    work/check.jsonl      + word_error_rate                     heard: work/heard.jsonl
    work/<stage>.json     settings, counts, what was dropped, and which file it was made from

A stage's file appears whole, after its work; a stage that was stopped goes on from its journal. A file
that was made from another one than is there now is refused, so no old row meets a new question.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from soundmind.data.workers import rows_bar
from soundmind.making import publish, reasoning, triples
from soundmind.making.check import Listener, hear_all
from soundmind.making.engines import Engine
from soundmind.making.reasoning import Settings as TeacherSettings
from soundmind.making.sound import Utterance
from soundmind.making.speech import make_all
from soundmind.making.triples import Dropped
from soundmind.making.words import Wording
from soundmind.system.chat import Client, Usage
from soundmind.system.errors import UserError
from soundmind.system.files import file_digest, locked, write_atomically, write_json
from soundmind.system.journal import Journal
from soundmind.task.schema import SPLITS

STAGE_NAMES = ("triples", "words", "reasoning", "speech", "check", "publish")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Making:
    """All that decides what is made."""

    output: Path
    sources: Sequence[Path]
    wording: Wording
    teacher: Client | None  # with its journal still to come; None where nothing is asked
    engine: Engine
    voices: Sequence[str]
    exclude: Sequence[Path] = ()
    shares: dict[str, float] = field(default_factory=lambda: {"train": 1.0})
    balanced: bool = False
    limit: int | None = None
    seed: int = 0
    asking: TeacherSettings = field(default_factory=TeacherSettings)
    separate_voices: bool = False
    speak_answers: bool = True
    listener: Listener | None = None
    max_error_rate: float = 0.2
    again: int = 1  # times that a clip is said anew
    name: str = "Own audio logical reasoning data"
    licence: str = ""
    workers: int = 2

    @property
    def work(self) -> Path:
        """Files between the stages."""
        return self.output / "work"

    def check_voices(self) -> None:
        """UserError where the engine cannot speak in these voices, as far as can be known."""
        if self.separate_voices and len(self.voices) < 2:
            raise UserError("--separate-voices needs two voices or more")
        self.engine.check(self.voices)

    def settings(self) -> dict[str, dict[str, Any]]:
        """What each stage depends on, beside the stage before."""
        digest = hashlib.sha256(repr(self.wording).encode()).hexdigest()[:16]
        return {
            "triples": {
                "sources": {f"{p.parent.name}/{p.name}": file_digest(p) for p in self.sources},
                "exclude": {f"{p.parent.name}/{p.name}": file_digest(p) for p in self.exclude},
                "splits": self.shares,
                "balanced": self.balanced,
                "limit": self.limit,
                "seed": self.seed,
            },
            "words": {"language": self.wording.language, "wording": digest},
            "reasoning": {
                "model": self.teacher.model if self.teacher else None,
                **asdict(self.asking),
            },
            "speech": {
                "engine": self.engine.describe(),
                "voices": list(self.voices),
                "separate_voices": self.separate_voices,
                "answers": self.speak_answers,
                "seed": self.seed,
            },
            "check": {
                "recogniser": self.listener.describe() if self.listener else None,
                "max_error_rate": self.max_error_rate,
                "again": self.again,
            },
            "publish": {"name": self.name, "licence": self.licence},
        }


@contextlib.contextmanager
def opened(making: Making) -> Iterator[None]:
    """The output folder, locked; UserError where it holds what this command did not make."""
    mark = making.work / "made-by-soundmind"
    if making.output.exists() and any(making.output.iterdir()) and not mark.is_file():
        raise UserError(f"{making.output} holds other things; name a new folder with --output")
    making.work.mkdir(parents=True, exist_ok=True)
    mark.touch()
    with locked(making.work / "lock"):
        yield


def run_stage(stage: str, making: Making) -> dict[str, Any]:
    """Run one stage; its record, as in work/<stage>.json."""
    before = STAGE_NAMES[STAGE_NAMES.index(stage) - 1] if stage != "triples" else None
    rows = _rows_of(before, making) if before else []
    made, dropped, extra = _RUN[stage](making, rows)
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made).encode()
    record = {
        "made_from": _digest(making.work / f"{before}.jsonl") if before else None,
        "settings": making.settings()[stage],
        "rows": len(made),
        "dropped": dict(Counter(item.reason for item in dropped).most_common()),
        **extra,
        "dropped_rows": [asdict(item) for item in dropped],
    }
    # The record first: a kill between the two leaves a file that its record does not fit.
    record["digest"] = hashlib.sha256(data).hexdigest()
    write_json(making.work / f"{stage}.json", record)
    write_atomically(making.work / f"{stage}.jsonl", data)
    if stage == "publish":
        _publish(making, made)
    if not made:
        raise UserError(
            f"no row is left after the stage {stage}; {making.work / f'{stage}.json'} lists why each was "
            f"dropped ({record['dropped'] or 'there was none'})"
        )
    return record


def _record(stage: str, making: Making) -> dict[str, Any]:
    path = making.work / f"{stage}.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(
            f"{path} is not there: run the stage {stage} first (--stages {stage} ...)"
        ) from error
    return found


def _rows_of(stage: str, making: Making) -> Rows:
    """Rows of a stage, if they and all before them belong together."""
    digest = None
    for name in STAGE_NAMES[: STAGE_NAMES.index(stage) + 1]:
        record, path = _record(name, making), making.work / f"{name}.jsonl"
        fits = path.is_file() and _digest(path) == record["digest"]
        if not fits or record["made_from"] != digest:
            raise UserError(
                f"{path} does not fit what is before it: run the stages from {name} on again "
                f"(--stages {' '.join(STAGE_NAMES[STAGE_NAMES.index(name) :])})"
            )
        digest = record["digest"]
    return list(triples.lines(making.work / f"{stage}.jsonl"))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


Made = tuple[Rows, list[Dropped], dict[str, Any]]


def _triples(making: Making, _: Rows) -> Made:
    kept, dropped = triples.run(
        making.sources,
        making.exclude,
        making.wording,
        shares=making.shares,
        balanced=making.balanced,
        limit=making.limit,
        seed=making.seed,
    )
    return [triples.as_record(triple) for triple in kept], dropped, {}


def _words(making: Making, rows: Rows) -> Made:
    made = []
    for row in rows:
        question = making.wording.question(tuple(row["parts"]))
        spoken = making.wording.spoken(question)
        made.append({**row, "user_content": question, "spoken_question": spoken})
    return made, [], {}


def _reasoning(making: Making, rows: Rows) -> Made:
    if making.teacher is None:
        raise UserError("the stage reasoning needs a teacher")
    with Journal(making.work / "teacher.jsonl") as journal:
        client = replace(making.teacher, journal=journal, usage=Usage(), lost=0)
        left, likely, most = reasoning.estimate(rows, client, making.wording, making.asking)
        print(
            f"reasoning: {left} of {len(rows)} rows to ask; about "
            f"{likely.tokens:,} tokens for {likely.cost:.2f}, at most {most.tokens:,} for "
            f"{most.cost:.2f} with {making.asking.tries} tries; spent before: "
            f"{client.usage.cost:.4f}",
            flush=True,
        )

        async def ask() -> reasoning.Reasoned:
            async with client:
                with rows_bar(len(rows), "reasoning") as bar:
                    return await reasoning.ask_rows(
                        rows, client, making.wording, making.asking, bar.update
                    )

        try:
            result = asyncio.run(ask())
        finally:
            usage = client.usage
            print(
                f"reasoning: {usage.requests} requests, {usage.prompt_tokens:,} + "
                f"{usage.completion_tokens:,} tokens, cost {client.usage.cost:.4f} in all"
                + (
                    f"; {client.lost} of them sent and never answered, counted in full"
                    * (client.lost > 0)
                ),
                flush=True,
            )
        reported = making.asking.reported_model or reasoning.first_model(client)
    made = [
        {
            **row,
            "answer": result.answers[row["key"]],
            "spoken_answer": making.wording.spoken(result.answers[row["key"]]),
        }
        for row in rows
        if row["key"] in result.answers
    ]
    order = {row["key"]: place for place, row in enumerate(rows)}
    dropped = sorted(result.dropped, key=lambda item: order[item.key])
    extra = {
        "answers_not_kept": dict(sorted(result.faults.items())),
        "teacher_model": reported,
        "spent": {**asdict(usage), "lost": client.lost},
    }
    return made, dropped, extra


def voice_of(row: dict[str, Any], making: Making, attempt: int = 0) -> str:
    """The row's voice, drawn by seed; with `separate_voices` train shares none with dev and test."""
    voices = list(making.voices)
    if making.separate_voices:
        others = max(1, len(voices) // 4)
        voices = voices[:-others] if row["split"] == "train" else voices[-others:]
    digest = hashlib.sha256(f"{making.seed} {row['key']}".encode()).digest()
    return voices[(int.from_bytes(digest[:8], "big") + attempt) % len(voices)]


def _utterance(row: dict[str, Any], part: str, making: Making, attempt: int = 0) -> Utterance:
    voice = voice_of(row, making, attempt)
    return Utterance(row[f"spoken_{part}"], voice, making.engine.describe(), attempt)


def _parts(making: Making) -> tuple[str, ...]:
    return ("question", "answer") if making.speak_answers else ("question",)


def _speech(making: Making, rows: Rows) -> Made:
    making.check_voices()
    wanted = {
        (row["key"], part): _utterance(row, part, making) for row in rows for part in _parts(making)
    }
    with Journal(making.work / "clips.jsonl") as journal:
        with rows_bar(len(wanted), "speech") as bar:
            make_all(
                list(wanted.values()),
                making.engine,
                making.work / "clips",
                journal,
                making.workers,
                bar.update,
            )
        made, dropped = [], []
        for row in rows:
            new: dict[str, Any] = {
                "voice": voice_of(row, making),
                "answer_clip": None,
                "answer_seconds": None,
            }
            fault = None
            for part in _parts(making):
                utterance = wanted[row["key"], part]
                entry = journal.entries[utterance.key]
                if entry["fault"]:
                    fault = fault or Dropped(
                        row["key"], row["where"], entry["fault"], f"{part}: {entry['detail']}"
                    )
                new[f"{part}_clip"] = str(utterance.path(Path()))
                new[f"{part}_seconds"] = entry["seconds"]
            if fault:
                dropped.append(fault)
            else:
                made.append({**row, **new})
    return made, dropped, {}


def _check(making: Making, rows: Rows) -> Made:
    if making.listener is None:
        return [{**row, "word_error_rate": None} for row in rows], [], {}
    clips = making.work / "clips"
    best: dict[tuple[str, str], tuple[float, int]] = {}  # word error rate and attempt
    said_again = 0
    with (
        Journal(making.work / "clips.jsonl") as journal,
        Journal(making.work / "heard.jsonl") as heard,
    ):
        for attempt in range(making.again + 1):
            wanted = {
                (row["key"], part): _utterance(row, part, making, attempt)
                for row in rows
                for part in _parts(making)
                if best.get((row["key"], part), (2.0, 0))[0] > making.max_error_rate
            }
            said_again += len(wanted) if attempt else 0
            make_all(list(wanted.values()), making.engine, clips, journal, making.workers)
            usable = {k: u for k, u in wanted.items() if not journal.entries[u.key]["fault"]}
            with rows_bar(len(usable), "check") as bar:
                rates = hear_all(
                    list(usable.values()), making.listener, making.wording, clips, heard, bar.update
                )
            for place, utterance in usable.items():
                found = (rates[utterance.key], attempt)
                best[place] = min(best.get(place, found), found)
        made, dropped = [], []
        for row in rows:
            new: dict[str, Any] = {}
            for part in _parts(making):
                utterance = _utterance(row, part, making, best[row["key"], part][1])
                new[f"{part}_clip"] = str(utterance.path(Path()))
                new[f"{part}_seconds"] = journal.entries[utterance.key]["seconds"]
                new["voice"] = utterance.voice if part == "question" else new["voice"]
            rate, part = max((best[row["key"], part][0], part) for part in _parts(making))
            if rate > making.max_error_rate:
                detail = f"{part}: word error rate {rate:.2f}"
                dropped.append(Dropped(row["key"], row["where"], "not-understood", detail))
            else:
                made.append({**row, **new, "word_error_rate": round(rate, 4)})
    return made, dropped, {"said_again": said_again}


def _balanced(making: Making, rows: Rows) -> Made:
    """What is published: balanced again where it was asked for, as stages drop unevenly."""
    if not making.balanced:
        return rows, [], {}
    found = [
        triples.from_record({k: row[k] for k in ("key", "parts", "label", "where", "split")})
        for row in rows
    ]
    kept, dropped = triples.balance(found, making.seed)
    keys = {triple.key for triple in kept}
    return [row for row in rows if row["key"] in keys], dropped, {}


def _publish(making: Making, rows: Rows) -> None:
    report_file = making.output / "report.json"
    report_file.unlink(missing_ok=True)  # until the set is whole again
    publish.write_set(rows, making.output, making.work / "clips", SPLITS)
    records = {stage: _record(stage, making) for stage in STAGE_NAMES}
    shown = ("rows", "dropped", "answers_not_kept", "said_again", "spent")
    report = {
        "settings": {stage: record["settings"] for stage, record in records.items()},
        "teacher_model": records["reasoning"]["teacher_model"],
        "stages": {
            stage: {name: record[name] for name in shown if name in record}
            for stage, record in records.items()
        },
        "splits": publish.describe(rows, SPLITS),
    }
    dropped = [
        {"stage": stage, **item}
        for stage, record in records.items()
        for item in record["dropped_rows"]
    ]
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in dropped)
    write_atomically(making.output / "dropped.jsonl", lines.encode())
    card = publish.card(report, making.name, making.licence)
    write_atomically(making.output / "README.md", card.encode())
    write_json(report_file, report)


_RUN: dict[str, Callable[[Making, Rows], Made]] = {
    "triples": _triples,
    "words": _words,
    "reasoning": _reasoning,
    "speech": _speech,
    "check": _check,
    "publish": _balanced,
}
