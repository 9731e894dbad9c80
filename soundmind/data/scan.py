"""Rows of the Parquet files: their Arrow types, and building them in chunks of annotations.

A chunk of 256 annotations is the unit of work of `soundmind.preprocess`. `scan_chunk` runs in a
worker process: it checks every line, probes the clips, counts tokens and leaves a *part*, an Arrow
file named by a hash of everything that went into it (lines, sizes and times of the clips, options,
our own source code). A part that is there already is finished work and is not made again.
Chunks do not depend on the number of workers, so neither does the output.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soundmind.data import audio
from soundmind.data.audio import ClipError, ClipInfo, num_audio_tokens, probe_clip
from soundmind.data.columns import row_schema
from soundmind.data.sources import Candidate, Fault, RawLine, SplitSource, read_candidate
from soundmind.data.token_count import TokenCounter
from soundmind.task import labels, prompts
from soundmind.task.schema import ABILITY, DATA_SOURCES, Mode, Task

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK_LINES = 256

_SOURCE_FILES = (
    *("data/audio", "data/containers", "data/columns", "data/scan", "data/sources"),
    *("data/token_count", "system/content"),
    *("task/labels", "task/prompts", "task/schema"),
)

_MAJOR_PREMISE = re.compile(r'Major premise is "(.*?)"\.?\s*\n\s*Minor premise', re.DOTALL)


@dataclass(frozen=True)
class RowOptions:
    """What decides a row's content, beside the annotation and its clips."""

    mode: Mode
    task: Task = "alr"
    with_answers: bool = True  # measure recorded answers where there are any
    tokenizer_file: Path | None = None
    tokenizer_sha256: str | None = None

    def fingerprint(self) -> str:
        """Hash of the options and of the code that acts on them; equal means the same rows."""
        fields = (self.mode, self.task, self.with_answers, self.tokenizer_sha256)
        return hashlib.sha256(f"{_code_digest()} {fields!r}".encode()).hexdigest()


@dataclass(frozen=True)
class Chunk:
    """Consecutive annotations of one split."""

    source: SplitSource
    index: int  # of the chunk within its split, from 0
    lines: list[RawLine]


@dataclass(frozen=True)
class ScannedChunk:
    """What a worker says about a chunk; the rows themselves are in the part."""

    key: str
    part: Path | None  # None where only the key was asked for
    reused: bool


@cache
def _code_digest() -> str:
    digest = hashlib.sha256()
    for name in _SOURCE_FILES:
        digest.update((Path(__file__).parents[1] / f"{name}.py").read_bytes())
    return digest.hexdigest()


@cache
def part_schema() -> pa.Schema:
    """Schema of a part: a row, then what only preprocessing needs to know of it."""
    import pyarrow as pa

    schema = row_schema()
    for name, kind in {
        "_line": pa.int64(),
        "_where": pa.string(),
        "_question_digest": pa.binary(16),  # of the exact text
        "_premise_digest": pa.binary(16),  # of the major premise; null where there is none
        "_answer_missing": pa.bool_(),
        "_clip_bytes": pa.int64(),  # size of the question file
    }.items():
        schema = schema.append(pa.field(name, kind))
    return schema


def text_digest(text: str) -> bytes:
    """16 bytes that stand for a text when duplicates are looked for."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def major_premise(question: str) -> str | None:
    """The quoted major premise of an ALR question, None for other questions."""
    match = _MAJOR_PREMISE.search(question)
    return match.group(1) if match else None


def scan_chunk(
    chunk: Chunk, options: RowOptions, parts: Path | None, counter: TokenCounter | None
) -> ScannedChunk:
    """Check a chunk and leave its part in folder `parts`; with None only the key is computed."""
    candidates = [
        read_candidate(line, chunk.source, options.mode, options.with_answers)
        for line in chunk.lines
    ]
    key = _chunk_key(candidates, chunk, options)
    if parts is None:
        return ScannedChunk(key, None, reused=False)
    part = parts / f"{chunk.source.split}-{chunk.index:06d}-{key[:32]}.arrow"
    reused = part.exists() and _is_whole(part)
    if not reused:
        _write_part(part, *_build_columns(candidates, chunk.source.root, options, counter))
    return ScannedChunk(key, part, reused)


def _chunk_key(candidates: Sequence[Candidate], chunk: Chunk, options: RowOptions) -> str:
    digest = hashlib.sha256(options.fingerprint().encode())
    digest.update(f"{chunk.source.split} {chunk.index} {chunk.source.layout}\n".encode())
    for candidate in candidates:
        line = candidate.line
        digest.update(f"{line.number} {line.where} {len(line.data)} {candidate.stats}\n".encode())
        digest.update(line.data)
        # faults of paths: a clip that is missing now may be there the next time, and reverse
        digest.update(repr(candidate.faults).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _write_part(part: Path, columns: dict[str, list[Any]], notes: dict[str, Any]) -> None:
    import pyarrow as pa

    schema = part_schema()
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    metadata = {b"notes": json.dumps(notes).encode()}
    table = pa.Table.from_arrays(arrays, schema=schema.with_metadata(metadata))
    temporary = part.with_name(f".{part.name}.{os.getpid()}.tmp")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    os.replace(temporary, part)


def read_part(part: Path) -> tuple[pa.Table, dict[str, Any]]:
    """Rows and notes of a part; the rows are mapped from the file, not loaded."""
    import pyarrow as pa

    table = pa.ipc.open_file(pa.memory_map(str(part))).read_all()
    return table, json.loads(table.schema.metadata[b"notes"])


def _is_whole(part: Path) -> bool:
    """Whether a part can be read; after a power cut it may have its name and not its content."""
    import pyarrow as pa

    try:
        read_part(part)
    except (pa.ArrowInvalid, OSError, KeyError, ValueError):
        return False
    return True


def _build_columns(
    candidates: Sequence[Candidate], root: Path, options: RowOptions, counter: TokenCounter | None
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Columns of the rows without faults, and notes: every fault, and the ids of faulty lines."""
    good: list[tuple[Candidate, ClipInfo | None, ClipInfo | None]] = []
    faults: list[Fault] = []
    faulty: list[tuple[int, str, str]] = []  # line, place and id, to find duplicate ids among all
    for candidate in candidates:
        question = _probe(candidate, candidate.question_clip, root, is_question=True)
        answer = _probe(candidate, candidate.answer_clip, root)
        faults += candidate.faults
        if candidate.faults or candidate.annotation is None:
            faulty.append((candidate.line.number, candidate.line.where, candidate.row_id))
        else:
            good.append((candidate, question, answer))
    tokens = _count_tokens([candidate for candidate, _, _ in good], counter)
    columns: dict[str, list[Any]] = {name: [] for name in part_schema().names}
    for (candidate, question, answer), counts in zip(good, tokens, strict=True):
        for name, value in _part_row(candidate, question, answer, counts, options).items():
            columns[name].append(value)
    notes = {"faults": [dataclasses.astuple(fault) for fault in faults], "faulty": faulty}
    return columns, notes


def _probe(
    candidate: Candidate, clip: str | None, root: Path, is_question: bool = False
) -> ClipInfo | None:
    if clip is None:
        return None
    try:
        info = probe_clip(f"{root}/{clip}")
    except ClipError as error:
        # the message opens with the full path; reports name clips below the data root
        candidate.add_fault(error.kind, str(error).replace(f"{root}/", "", 1))
        return None
    if is_question and info.num_samples < audio.MIN_CLIP_SAMPLES:
        candidate.add_fault(
            "short-clip", f"{clip}: {info.seconds:.3f} s, under {audio.MIN_CLIP_SECONDS} s"
        )
    return info


def _count_tokens(
    candidates: Sequence[Candidate], counter: TokenCounter | None
) -> list[tuple[int | None, int | None]]:
    """Tokens of question and reference of each candidate; None without a tokenizer."""
    if counter is None:
        return [(None, None)] * len(candidates)
    annotations = [candidate.annotation for candidate in candidates]
    questions = counter.count([a["user_content"] for a in annotations if a is not None])
    answers = counter.count([a["answer"] for a in annotations if a is not None])
    return list(zip(questions, answers, strict=True))


def _part_row(
    candidate: Candidate,
    question: ClipInfo | None,
    answer: ClipInfo | None,
    tokens: tuple[int | None, int | None],
    options: RowOptions,
) -> dict[str, Any]:
    annotation = candidate.annotation
    assert annotation is not None, candidate.line.where
    clip = candidate.question_clip
    premise = major_premise(annotation["user_content"])
    extra_info = {
        "id": annotation["id"],
        "split": candidate.split,
        "index": None,  # known when the split is complete
        "mode": options.mode,
        "label": annotation["label"],
        "question_seconds": question.seconds if question else None,
        "audio_tokens": num_audio_tokens(question.num_samples) if question else 0,
        "question_tokens": tokens[0],
        "question_words": len(annotation["user_content"].split()),
        "reference_tokens": tokens[1],
        "reference_words": len(annotation["answer"].split()),
        "reference_seconds": answer.seconds if answer else None,
        "teacher_verdict": labels.parse_verdict(annotation["answer"]),
    }
    return {
        "data_source": DATA_SOURCES[options.task],
        "prompt": stored_messages(options, annotation["user_content"], clip),
        "ability": ABILITY,
        "reward_model": {
            "style": "rule",
            "ground_truth": labels.verdict_of(annotation["label"]),  # never from the answer text
        },
        "extra_info": extra_info,
        "audio": {"bytes": None, "path": clip} if clip else None,
        "_line": candidate.line.number,
        "_where": candidate.line.where,
        "_question_digest": text_digest(annotation["user_content"]),
        "_premise_digest": text_digest(premise) if premise is not None else None,
        "_answer_missing": options.with_answers and options.mode != "text" and answer is None,
        "_clip_bytes": candidate.stats[0][1] if clip else 0,
    }


def stored_messages(options: RowOptions, question: str, clip: str | None) -> list[dict[str, Any]]:
    """The prompt in the Parquet's types: clips under `path`, see `row_schema`."""
    messages = prompts.build_messages(options.mode, question, clip, options.task)
    for message in messages:
        message["content"] = [
            {"type": part["type"], "text": part.get("text"), "path": part.get("audio")}
            for part in message["content"]
        ]
    return messages
