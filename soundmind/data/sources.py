"""Published annotations and their clips: finding, reading and checking them, line by line.

Two layouts are recognised by what lies in the data folder:

    GitHub         {split}.jsonl (also under dataset-annotation-json/) with
                   id, user_content, answer, label;
                   clips in {split}/{id}/ or audio_dataset/{split}/{id}/
    Hugging Face   {split}/metadata.jsonl with id, question_file_name, answer_file_name,
                   annotation_question, annotation_answer, label;
                   without it, {split}/NNNN/annotation.json, clips beside it

A fault is one thing wrong with one line. Nothing here raises over a fault and nothing is dropped:
every line comes back as a `Candidate` with the list of its faults.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG
from typing import Any, Literal

from soundmind.system.content import known_kind
from soundmind.system.errors import UserError
from soundmind.task.schema import Annotation, Mode, Split

Layout = Literal["github", "huggingface", "folders"]

CLIP_SUFFIXES = (".wav", ".flac")
_BOM = b"\xef\xbb\xbf"


class SourceError(UserError):
    """The data folder as a whole cannot be used; the message says what to do."""


@dataclass(frozen=True)
class SplitSource:
    """Where one split's annotations and clips lie. All paths are below `root`."""

    split: Split
    layout: Layout
    root: Path  # the data root that clip paths in rows are relative to
    annotations: Path  # a JSON lines file; for "folders" the split's folder
    clips: Path  # folder of clip folders

    @property
    def name(self) -> str:
        """Annotations relative to the data root, as messages and reports show it."""
        return self.annotations.relative_to(self.root).as_posix()


@dataclass(frozen=True)
class RawLine:
    """One annotation as it lies on disk."""

    number: int  # line, from 1; for "folders" the position in the sorted list of folders
    where: str  # "train.jsonl:12" or "train/0012/annotation.json"
    data: bytes
    folder: str | None = None  # clip folder's name where the layout gives it
    trouble: str = ""  # why there are no bytes, where a file of its own cannot be read


@dataclass(frozen=True)
class Fault:
    """One thing wrong with one annotation."""

    kind: str  # "missing-clip", "bad-label" ...: what is counted
    where: str
    row: str  # "train/0012", or "" while the id is not known
    detail: str


@dataclass
class Candidate:
    """One annotation after reading: what is known of it and what is wrong with it."""

    line: RawLine
    split: Split
    annotation: Annotation | None = None  # None where the text itself cannot be used
    label: int | None = None
    row_id: str = ""
    question_clip: str | None = None  # relative to the data root, "/" as separator
    answer_clip: str | None = None
    stats: list[tuple[str, int, int]] = field(default_factory=list)  # path, bytes, mtime in ns
    faults: list[Fault] = field(default_factory=list)

    def add_fault(self, kind: str, detail: str) -> None:
        """Note a fault at this annotation's place."""
        row = _shown(f"{self.split}/{self.row_id}", 80) if self.row_id else ""
        self.faults.append(Fault(kind, self.line.where, row, _shown(detail, 400)))


def _shown(text: str, longest: int) -> str:
    """A name or message for a line of a table; what has no end (a clip in base64) is cut."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def find_split(root: Path, split: Split) -> SplitSource:
    """Locate one split below `root`, or raise SourceError with the command that fetches it."""
    metadata = root / split / "metadata.jsonl"
    if metadata.is_file():
        _require_json_lines(metadata)
        return SplitSource(split, "huggingface", root, metadata, metadata.parent)
    for folder in (root, root / "dataset-annotation-json"):
        annotations = folder / f"{split}.jsonl"
        if annotations.is_file():
            _require_json_lines(annotations)
            nested = root / "audio_dataset" / split
            clips = nested if nested.is_dir() else root / split
            return SplitSource(split, "github", root, annotations, clips)
    if next((root / split).glob("*/annotation.json"), None) is not None:
        return SplitSource(split, "folders", root, root / split, root / split)
    near = sorted(path.name for path in (*root.glob(f"{split}.*"), *root.glob(f"{split}/meta*")))
    raise SourceError(
        f"{root}: no annotations of split {split} (looked for {split}.jsonl, "
        f"{split}/metadata.jsonl and {split}/*/annotation.json"
        + (f"; {', '.join(near[:3])} is there and not read" if near else "")
        + f"). Fetch them with: bash scripts/download_data.sh {split}, or leave the split out with "
        "--splits"
    )


def _require_json_lines(path: Path) -> None:
    """SourceError for a file that is as a whole something else than one JSON object a line."""
    with path.open("rb") as file:
        head = file.read(4096)
    text = head.removeprefix(_BOM).lstrip()
    kind = None
    if text.startswith(b"["):
        kind = "a JSON array (jq -c '.[]' FILE writes an object a line)"
    elif b"\r" in text and b"\n" not in text:
        kind = "text whose lines end in a carriage return alone (tr '\\r' '\\n' < FILE)"
    elif not text.startswith(b"{"):
        kind = known_kind(head)
    if kind is not None:
        raise SourceError(f"{path} is {kind}; expected: one JSON object a line, in UTF-8")


def read_lines(source: SplitSource) -> Iterator[RawLine]:
    """The split's annotations in their published order, undecoded; blank lines are left out."""
    if source.layout == "folders":
        folders = sorted(path.parent for path in source.annotations.glob("*/annotation.json"))
        for number, folder in enumerate(folders, 1):
            where = (folder / "annotation.json").relative_to(source.root).as_posix()
            try:
                data, trouble = (folder / "annotation.json").read_bytes(), ""
            except OSError as error:
                data, trouble = b"", str(error.strerror)
            yield RawLine(number, where, data, folder.name, trouble)
        return
    with source.annotations.open("rb") as lines:
        for number, data in enumerate(lines, 1):
            data = data.removeprefix(_BOM)  # also within: files were joined
            if data.strip():
                yield RawLine(number, f"{source.name}:{number}", data)


def read_candidate(line: RawLine, source: SplitSource, mode: Mode, with_answers: bool) -> Candidate:
    """Check one annotation and find its clips. `with_answers`: recorded answers are wanted too."""
    candidate = Candidate(line, source.split)
    record = _decode(candidate)
    if record is None:
        return candidate
    _read_fields(candidate, record, line.folder)
    digit = _answer_digit(str(record.get("answer_file_name") or ""))
    if digit is not None and candidate.label is not None and digit != candidate.label:
        candidate.add_fault(
            "label-contradicts-clip",
            f"label {candidate.label}, but answer_file_name is {record['answer_file_name']!r}",
        )
    if mode != "text" and candidate.row_id:
        _find_clips(candidate, record, source, with_answers)
    return candidate


def _decode(candidate: Candidate) -> dict[str, Any] | None:
    if candidate.line.trouble:
        candidate.add_fault("unreadable-annotation", candidate.line.trouble)
        return None
    if not candidate.line.data.strip(b"\0\r\n"):
        candidate.add_fault("broken-json", "nothing but zero bytes (not written to its end?)")
        return None
    try:
        text = candidate.line.data.decode("utf-8")
    except UnicodeDecodeError as error:
        candidate.add_fault(
            "not-utf8", f"byte {error.start} of the line is 0x{error.object[error.start]:02x}"
        )
        return None
    try:
        record = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        candidate.add_fault("broken-json", str(error))
        return None
    if not isinstance(record, dict):
        candidate.add_fault("broken-json", f"a {type(record).__name__}, expected an object")
        return None
    return record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a field that is there twice readers take the first or the last."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice} is there twice")
    return record


def _read_fields(candidate: Candidate, record: dict[str, Any], folder: str | None) -> None:
    """Fill in id, label and texts; every field that will not do is a fault of its own."""
    row_id = record.get("id", folder)
    if isinstance(row_id, int) and not isinstance(row_id, bool):
        row_id = str(row_id)
    row_id = _text_field(candidate, row_id, "id")
    if row_id is not None:
        if _is_unsafe_name(row_id):
            candidate.add_fault("unsafe-id", f"id {row_id!r} is not a plain folder name")
        else:
            candidate.row_id = row_id
    question = _named_text(candidate, record, ("user_content", "annotation_question"))
    answer = _named_text(candidate, record, ("answer", "annotation_answer"))
    label = record.get("label")
    if "label" not in record:
        candidate.add_fault("missing-field", "no field label")
    elif type(label) is not int or label not in (0, 1):  # True is not a label
        candidate.add_fault("bad-label", f"label {label!r}, expected 0 or 1")
    else:
        candidate.label = label
    if question is not None and answer is not None and candidate.label is not None:
        candidate.annotation = Annotation(
            id=candidate.row_id, user_content=question, answer=answer, label=candidate.label
        )


def _named_text(candidate: Candidate, record: dict[str, Any], names: tuple[str, ...]) -> str | None:
    there = [name for name in names if name in record]
    if len(there) > 1 and record[there[0]] != record[there[1]]:
        candidate.add_fault("contradicting-fields", f"{there[0]} and {there[1]} differ")
    name = there[0] if there else names[0]
    return _text_field(candidate, record.get(name), name)


def _text_field(candidate: Candidate, value: object, name: str) -> str | None:
    if value is None:
        candidate.add_fault("missing-field", f"no field {name}")
    elif not isinstance(value, str):
        candidate.add_fault("missing-field", f"{name} is a {type(value).__name__}, expected text")
    elif not value.strip():
        candidate.add_fault("empty-field", f"{name} is empty")
    elif not _is_unicode(value):
        candidate.add_fault("not-utf8", f"{name} holds half of a surrogate pair")
    else:
        return value
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_unsafe_name(name: str) -> bool:
    return name in (".", "..") or any(character in name for character in "/\\\0")


def _answer_digit(file_name: str) -> int | None:
    """The label that an answer clip's name claims: answer_1.wav -> 1."""
    match = re.fullmatch(r"answer_([01])\.\w+", file_name.rpartition("/")[2])
    return int(match.group(1)) if match else None


def _find_clips(
    candidate: Candidate, record: dict[str, Any], source: SplitSource, with_answers: bool
) -> None:
    if source.layout == "huggingface":
        question = _named_clip(candidate, record, "question_file_name", source)
        answer = None
        if with_answers and record.get("answer_file_name") is not None:
            answer = _named_clip(candidate, record, "answer_file_name", source)
    else:
        question, answer = _clips_in_folder(candidate, source, with_answers)
    candidate.question_clip = _checked(candidate, question, source.root)
    if with_answers:  # a missing one is judged when the whole split is known, see preprocess
        candidate.answer_clip = _checked(candidate, answer, source.root, required=False)


def _named_clip(
    candidate: Candidate, record: dict[str, Any], name: str, source: SplitSource
) -> str | None:
    """Path of a clip that metadata.jsonl names, relative to its own folder or the data root."""
    value = _text_field(candidate, record.get(name), name)
    if value is None:
        return None
    if os.path.isabs(value) or ".." in value.split("/") or "\\" in value or "\0" in value:
        candidate.add_fault("unsafe-path", f"{name} {value!r} leaves the data root")
        return None
    if (kind := known_kind(value[:64].encode())) is not None:
        candidate.add_fault("missing-clip", f"{name} is {kind} where a file is to be named")
        return None
    beside, below_root = source.clips / value, source.root / value
    # os.path, since Path.exists raises for a name that is too long
    inside = not os.path.exists(beside) and os.path.exists(below_root)
    return (below_root if inside else beside).as_posix()


def _clips_in_folder(
    candidate: Candidate, source: SplitSource, with_answers: bool
) -> tuple[str | None, str | None]:
    """question.* and answer_{label}.* in the row's folder; a missing question is a fault."""
    folder = f"{source.clips}/{candidate.line.folder or candidate.row_id}"
    try:
        with os.scandir(folder) as entries:
            names = {entry.name for entry in entries}
    except OSError as error:
        place = _relative(folder, source.root)
        found = "not found" if isinstance(error, FileNotFoundError) else error.strerror
        candidate.add_fault("missing-clip", f"{place!r}/ {found}" + _other_spelling(folder))
        return None, None
    place = _relative(folder, source.root)
    question = _first_of(names, "question")
    if question is None:
        there = _not_read(names, "question")
        candidate.add_fault("missing-clip", f"{place}/question.wav not found{there}")
    answer = None
    if candidate.label is not None:
        answer = _first_of(names, f"answer_{candidate.label}")
        other = _first_of(names, f"answer_{1 - candidate.label}")
        if other is not None:
            candidate.add_fault(
                "label-contradicts-clip",
                f"label {candidate.label}, but the folder holds {other}",
            )
            answer = None
        there = _not_read(names, f"answer_{candidate.label}") if with_answers else ""
        if there and answer is None:
            candidate.add_fault(
                "missing-clip", f"{place}/answer_{candidate.label}.wav not found{there}"
            )
    path = f"{folder}/{question}" if question else None
    return path, f"{folder}/{answer}" if answer and with_answers else None


def _first_of(names: set[str], stem: str) -> str | None:
    return next((stem + suffix for suffix in CLIP_SUFFIXES if stem + suffix in names), None)


def _not_read(names: set[str], stem: str) -> str:
    """What lies in a clip's place under another suffix, and what to do about it."""
    name = next((n for n in sorted(names) if n.lower().startswith(f"{stem}.")), None)
    if name is None:
        return ""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in CLIP_SUFFIXES:
        return f"; {name} is there, rename it to {stem}{suffix}"
    return f"; {name} is there and not read, convert it: ffmpeg -i {name} {stem}.wav"


def _other_spelling(folder: str) -> str:
    """The folder that is there under nearly this name: other accents' code, zeros, spaces, case."""
    parent, name = os.path.split(folder)
    near = next((n for n in _names_in(parent) if _bare(n) == _bare(name)), None)
    return f"; {near!r}/ is there" if near is not None else ""


def _bare(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip().casefold().lstrip("0")


@lru_cache(maxsize=4)
def _names_in(folder: str) -> tuple[str, ...]:
    try:
        return tuple(sorted(os.listdir(folder)))
    except OSError:
        return ()


def _checked(
    candidate: Candidate, path: str | None, root: Path, required: bool = True
) -> str | None:
    """The clip's path relative to the root, its size and time noted; None with a fault if bad."""
    if path is None:
        return None
    relative = _relative(path, root)
    if _passes_a_link(path, root):
        real = os.path.realpath(path)
        if not any(_is_below(real, os.path.realpath(place)) for place in _places(root)):
            candidate.add_fault("link-leaves-root", f"{relative} is a link to {real}")
            return None
    try:
        status = os.stat(path)
    except OSError as error:
        if required or not isinstance(error, FileNotFoundError):
            found = "not found" if isinstance(error, FileNotFoundError) else error.strerror
            candidate.add_fault("missing-clip", f"{relative} {found}")
        return None
    if not S_ISREG(status.st_mode):  # reading a pipe would wait for ever
        candidate.add_fault("unreadable-clip", f"{relative} is not a regular file")
        return None
    candidate.stats.append((relative, status.st_size, status.st_mtime_ns))
    return relative


def _places(root: Path) -> list[Path]:
    """Where links may lead: below the data root, and to the blobs of its Hugging Face cache."""
    in_cache = root.parent.name == "snapshots"
    return [root, root.parent.parent / "blobs"] if in_cache else [root]


def _is_below(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _passes_a_link(path: str, root: Path) -> bool:
    """Whether any component below the root is a symbolic link."""
    end = len(os.fspath(root))
    while end != -1:
        end = path.find("/", end + 1)
        if os.path.islink(path if end == -1 else path[:end]):
            return True
    return False


def _relative(path: str, root: Path) -> str:
    return path[len(os.fspath(root)) + 1 :]
